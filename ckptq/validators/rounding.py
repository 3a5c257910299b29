"""Whether codes say what the source's weights said, as exactly as FP8 can: in pieces, in float32."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptq.checkpoint import DTYPE_BYTES, Reader, SourceTensor
from ckptq.validators.scales import Grid

if TYPE_CHECKING:
    import numpy as np

    F32 = np.ndarray[Any, np.dtype[np.float32]]
    I32 = np.ndarray[Any, np.dtype[np.int32]]

PIECE = 1 << 16
"""Weights compared at a time: the arrays stay in the processor's cache."""

# |w / s - q| for q, the nearest E4M3 value to x = w / s. Three bits of fraction: for |x| >= 2^-6 the spacing is 2^-3 of the power of
# two below |x|, so the error is at most 2^-4 |x|; below, the spacing is 2^-9 and the error at most 2^-10. ModelOpt and
# llm-compressor round x to BF16 first, which moves it by 2^-9 |x| more. float32 adds 2^-22 |x|.
RELATIVE = 2.0**-4 + 2.0**-8
ABSOLUTE = 2.0**-10 * (1 + 2.0**-4)
NEAR = (1 << 19) + (1 << 16)
"""Half a step between codes, in units of float32's last bit where the code's last bit is bit 20, and what BF16 may add."""
NO_SCALE = 1e-30
"""Stands for a scale of zero: what is not zero over it is then far off."""


@dataclass(frozen=True, slots=True)
class Off:
    """Weights beyond the bound: how many, the first one's place in the flat tensor, and the worst as a multiple of the bound."""

    count: int
    first: int
    worst: float


class Desk:
    """One thread's buffers."""

    def __init__(self) -> None:
        import numpy as np

        self.codes, self.raw = memoryview(bytearray(PIECE)), memoryview(bytearray(8 * PIECE))
        self.x, self.q, self.limit = (np.empty(PIECE, np.float32) for _ in range(3))


def compare(
    output: tuple[Reader, SourceTensor], source: tuple[Reader, SourceTensor], scales: F32, grid: Grid, rows: range, desk: Desk
) -> Off | None:
    """What is beyond the bound in these rows of a weight, or None.

    output  E4M3 codes, [..., k]      source  BF16, F16, F32 or F64 of the same shape
    scales  F32 [numel], laid over the weight as `grid` says: value = code * scale
    """
    import numpy as np

    (reader, tensor), (original, before) = output, source
    width = DTYPE_BYTES[before.spec.dtype]
    table = np.where(scales == 0, np.float32(NO_SCALE), scales).reshape(grid.shape)
    count, first, worst = 0, -1, 0.0
    for top, bottom, left, right in _pieces(grid, rows):
        at, n = top * grid.columns + left, (bottom - top) * (right - left)
        codes, raw = desk.codes[:n], desk.raw[: n * width]
        reader.read_into(tensor, at, codes)
        original.read_into(before, at * width, raw)
        scale = _scale_over(table, grid, top, bottom, left, right)
        shape = (bottom - top, right - left)
        x = desk.x[:n]
        as_float32(raw, before.spec.dtype, x)
        if _all_near(x.reshape(shape), codes, scale, desk.q[:n].view(np.int32)):
            continue
        as_float32(raw, before.spec.dtype, x)
        wrong = _beyond(x.reshape(shape), codes, scale, desk.q[:n], desk.limit[:n])
        if wrong is not None:
            first = first if count else at + wrong.first
            count, worst = count + wrong.count, max(worst, wrong.worst)
    return Off(count, first, worst) if count else None


def _pieces(grid: Grid, rows: range) -> Iterator[tuple[int, int, int, int]]:
    """(top, bottom, left, right) over these rows: whole rows of one row of blocks, or a part of one row that is too long."""
    row = rows.start
    while row < rows.stop:
        if grid.columns > PIECE:
            yield from ((row, row + 1, left, min(left + PIECE, grid.columns)) for left in range(0, grid.columns, PIECE))
            row += 1
            continue
        border = rows.stop if grid.high == 1 else (row // grid.high + 1) * grid.high
        bottom = min(row + PIECE // grid.columns, border, rows.stop)
        yield row, bottom, 0, grid.columns
        row = bottom


def _scale_over(table: F32, grid: Grid, top: int, bottom: int, left: int, right: int) -> F32:
    """The scales of a piece, in a shape that spreads over [bottom - top, right - left]."""
    import numpy as np

    if grid.high == 1:
        return table[top:bottom, :1]
    line = table[top // grid.high]
    if grid.wide >= grid.columns:
        return line[:1]
    first = left // grid.wide
    return np.repeat(line[first : -(-right // grid.wide)], grid.wide)[left - first * grid.wide :][: right - left]


def _all_near(x: F32, codes: memoryview, scale: F32, bits: I32) -> bool:
    """Whether every code is the nearest one, as far as bits tell; x [rows, columns] is overwritten.

    A code's 4 exponent and 3 fraction bits, moved to where float32 has its own, read as the value times 2^-120: 120 is the
    difference of the exponents' biases. There, neighbors are 2^20 apart as integers, subnormal ones too. So w / s times 2^-120 must
    be within half of that. False means: look closer.
    """
    import numpy as np

    with np.errstate(all="ignore"):
        np.multiply(x, np.float32(2.0**-120) / scale, out=x)
    np.copyto(bits, np.frombuffer(codes, np.int8))
    np.left_shift(bits, 20, out=bits)
    np.bitwise_and(bits, np.uint32(0x87F00000).view(np.int32), out=bits)
    np.subtract(bits, x.reshape(-1).view(np.int32), out=bits)
    return bool(bits.max() <= NEAR and bits.min() >= -NEAR)


def _beyond(x: F32, codes: memoryview, scale: F32, q: F32, limit: F32) -> Off | None:
    """The same question with the bound itself; x [rows, columns], q and limit [rows * columns] are overwritten."""
    import numpy as np

    with np.errstate(all="ignore"):
        np.divide(x, scale, out=x)
    flat = x.reshape(-1)
    decode(codes, q)
    with np.errstate(invalid="ignore"):  # infinity by infinity
        np.subtract(q, flat, out=q)
        np.abs(q, out=q)
        np.abs(flat, out=flat)
        np.multiply(flat, np.float32(RELATIVE), out=limit)
        np.maximum(limit, np.float32(ABSOLUTE), out=limit)
        wrong = ~(q <= limit)  # a NaN is wrong too
        if not math.isfinite(flat.max()):
            wrong |= ~np.isfinite(flat)
        count = int(np.count_nonzero(wrong))
        return Off(count, int(wrong.argmax()), float((q[wrong] / limit[wrong]).max())) if count else None


def decode(codes: memoryview, out: F32) -> None:
    """out [n] = the values of n E4M3 codes. A NaN code becomes 480; values.py looks for those. `_all_near` says why it works."""
    import numpy as np

    bits = out.view(np.int32)
    np.copyto(bits, np.frombuffer(codes, np.int8))
    np.left_shift(bits, 20, out=bits)
    np.bitwise_and(bits, np.uint32(0x87F00000).view(np.int32), out=bits)
    np.multiply(out, np.float32(2.0**120), out=out)


def as_float32(data: memoryview, dtype: str, out: F32) -> None:
    """out [n] = the values of n numbers in BF16, F16, F32 or F64."""
    import numpy as np

    if dtype == "BF16":
        bits = out.view(np.uint32)
        np.copyto(bits, np.frombuffer(data, np.uint16))
        np.left_shift(bits, 16, out=bits)
        return
    kinds: dict[str, type[np.floating[Any]]] = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
    np.copyto(out, np.frombuffer(data, kinds[dtype]), casting="same_kind")
