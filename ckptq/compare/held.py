"""A stored tensor as its server holds it, piece by piece in float64: codes times their scales, everything else as it is stored."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptq.checkpoint import DTYPE_BYTES, Component, Reader, SourceTensor
from ckptq.validators.coding import FP8, NVFP4_COLUMNS, Coding, decode, find_coding, number_of
from ckptq.validators.rounding import Coded, as_float32, load
from ckptq.validators.scales import DTYPES, block_of

if TYPE_CHECKING:
    import numpy as np

    F32 = np.ndarray[Any, np.dtype[np.float32]]
    F64 = np.ndarray[Any, np.dtype[np.float64]]

PIECE = 1 << 17
"""Values at a time, an even number for codes in pairs. Of fewer, threads would wait for the interpreter's lock most of the time."""
_INTEGERS = {"BOOL": "?", "U8": "u1", "I8": "i1", "U16": "u2", "I16": "i2", "U32": "u4", "I32": "i4", "U64": "u8", "I64": "i8"}
_NAN = 0x7F
"""Of E4M3, without its sign."""


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor as rows by columns; `coded` is how its codes are scaled, None where the stored values count.

    shape  of the weight: of packed codes twice as many columns as bytes
    coding the format in words, "" for what is no codes
    """

    reader: Reader
    tensor: SourceTensor
    shape: tuple[int, ...]
    coding: str = ""
    coded: Coded | None = None

    @property
    def columns(self) -> int:
        return max(self.shape[-1], 1) if self.shape else 1


@dataclass(frozen=True, slots=True)
class Area:
    """A part of a tensor seen as rows by columns: some whole rows, or a part of one."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def count(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)


class Desk:
    """One thread's buffers."""

    def __init__(self) -> None:
        import numpy as np

        self.raw = memoryview(bytearray(8 * PIECE))
        self.x = np.empty(PIECE, np.float32)
        self.values = tuple(np.empty(PIECE, np.float64) for _ in range(3))


def hold(tensor: SourceTensor, component: Component, reader: Reader) -> Held | str:
    """The tensor to read, or why nobody can tell what its server holds."""
    spec = tensor.spec
    coding = find_coding(tensor, component.tensors, block_of(component.config))
    if coding is not None:
        coded = load(coding, reader)
        if coded is None:
            return f"{coding.number.name} codes with scales that are not finite, or a global scale that is not above 0"
        return Held(reader, tensor, coding.number.shape(spec.shape), _words(coding), coded)
    if number_of(tensor) is not None:
        return f"{spec.dtype} codes without scales that fit them"
    if spec.dtype not in DTYPES and spec.dtype not in _INTEGERS:
        return f"{spec.dtype}, which is not decoded here"
    return Held(reader, tensor, spec.shape)


def _words(coding: Coding) -> str:
    """`FP8 channel`, `NVFP4`, `MXFP8`."""
    number, grid = coding.number, coding.grid
    if coding.coarse is not None:
        return "MXFP4 dual scale"
    if coding.group is not None:
        return "NVFP4" if coding.group == NVFP4_COLUMNS else f"MX{number.name}"
    if (grid.high, grid.wide) == (grid.rows, grid.columns):
        return f"{number.name} tensor"
    by_channel = grid.wide == grid.columns and (grid.high == 1 or len(coding.codes.spec.shape) > 2)
    return f"{number.name} {'channel' if by_channel else 'block'}"


def areas(columns: int, rows: range) -> Iterator[Area]:
    """These rows in pieces of at most PIECE values."""
    if columns > PIECE:
        yield from (Area(row, row + 1, at, min(at + PIECE, columns)) for row in rows for at in range(0, columns, PIECE))
        return
    step = PIECE // columns
    yield from (Area(top, min(top + step, rows.stop), 0, columns) for top in range(rows.start, rows.stop, step))


def read(held: Held, area: Area, desk: Desk, out: F64) -> F64:
    """The values of this area, in `out` [n] or in less of it. Codes are multiplied with their scales in float32."""
    import numpy as np

    first, n, dtype = area.top * held.columns + area.left, area.count, held.tensor.spec.dtype
    out = out[:n]
    if held.coded is not None:
        np.copyto(out, decode_area(held, area, desk))
        return out
    raw = desk.raw[: n * DTYPE_BYTES[dtype]]
    held.reader.read_into(held.tensor, first * DTYPE_BYTES[dtype], raw)
    if dtype == "F64":
        np.copyto(out, np.frombuffer(raw, np.float64))
    elif dtype in DTYPES:
        as_float32(raw, dtype, desk.x[:n])
        np.copyto(out, desk.x[:n])
    else:
        np.copyto(out, np.frombuffer(raw, _INTEGERS[dtype]))
    return out


def decode_area(held: Held, area: Area, desk: Desk) -> F32:
    """What codes stand for, F32 [n], in the desk's buffer: at most PIECE of them."""
    import numpy as np

    assert held.coded is not None
    coded, first, n = held.coded, area.top * held.columns + area.left, area.count
    number, high = coded.number, coded.grid.high
    codes, values = desk.raw[: n // number.packed], desk.x[:n]
    held.reader.read_into(held.tensor, first // number.packed, codes)
    decode(codes, values, number)
    if number.dtype == FP8.dtype:
        np.copyto(values, np.float32(math.nan), where=(np.frombuffer(codes, np.uint8) & _NAN) == _NAN)
    lines, top = values.reshape(area.bottom - area.top, -1), area.top
    with np.errstate(all="ignore"):
        while top < area.bottom:  # one row of blocks after another, unless each row has scales of its own
            bottom = area.bottom if high == 1 else min((top // high + 1) * high, area.bottom)
            part = lines[top - area.top : bottom - area.top]
            np.multiply(part, coded.over(held.reader, top, bottom, area.left, area.right), out=part)
            top = bottom
    return values
