"""Whether codes say what the source's weights said, as exactly as FP8 can: in pieces, in float32."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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

# |w / s - q| for q, the nearest E4M3 value to x = w / s. Three bits of fraction: for |x| >= 2^-6 the spacing is 2^-3 of the power
# of two below |x|, so the error is at most 2^-4 |x|; below, the spacing is 2^-9 and the error at most 2^-10. ModelOpt and
# llm-compressor round x to BF16 first, which moves it by 2^-9 |x| more. float32 adds 2^-22 |x|.
RELATIVE = 2.0**-4 + 2.0**-8
ABSOLUTE = 2.0**-10 * (1 + 2.0**-4)
NEAR = (1 << 19) + (1 << 16)
"""Half a step between codes, in units of float32's last bit where the code's last bit is bit 20, and what BF16 may add."""
ROUNDING = {"BF16": (2.0**-8, 1e-40), "F16": (2.0**-11, 2.0**-25), "F32": (2.0**-23, 1e-45), "F64": (2.0**-23, 1e-45)}
"""By how much a value moves that is rounded to a dtype: a share of it, at least this; in float32, in which it is compared."""
NO_SCALE = 1e-30
"""Stands for a scale of zero: what is not zero over it is then far off."""


@dataclass(frozen=True, slots=True)
class Off:
    """Weights beyond the bound: how many, the first one's place in the flat tensor, and the worst as a multiple of the bound."""

    count: int
    first: int
    worst: float


@dataclass(frozen=True, slots=True)
class Coded:
    """How codes are scaled: F32 scales [numel], laid over the weight as `grid` says. value = code * scale."""

    scales: F32
    grid: Grid

    @property
    def table(self) -> F32:
        """The scales as [rows, columns] of the grid."""
        table: F32 = self.scales.reshape(self.grid.shape)
        return table

    def times(self, factor: float) -> Coded:
        """The same under other scales."""
        import numpy as np

        return Coded(self.scales * np.float32(factor), self.grid)


class Desk:
    """One thread's buffers."""

    def __init__(self) -> None:
        import numpy as np

        self.codes, self.raw, self.other = (memoryview(bytearray(n * PIECE)) for n in (1, 8, 8))
        self.x, self.q, self.limit = (np.empty(PIECE, np.float32) for _ in range(3))


def beyond(
    output: tuple[Reader, SourceTensor], source: tuple[Reader, SourceTensor], coded: Coded, rows: range, desk: Desk
) -> Off | None:
    """What is beyond the bound in these rows of a weight, or None. `output` are E4M3 codes, `source` floats of the same shape."""
    import numpy as np

    (reader, tensor), (original, before) = output, source
    width = DTYPE_BYTES[before.spec.dtype]
    grid, table = coded.grid, np.where(coded.scales == 0, np.float32(NO_SCALE), coded.scales).reshape(coded.grid.shape)
    found: list[Off] = []
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
            found.append(Off(wrong.count, at + wrong.first, wrong.worst))
    return joined(found)


def joined(parts: Sequence[Off]) -> Off | None:
    """Several parts of one tensor, in order, as one."""
    return Off(sum(p.count for p in parts), parts[0].first, max(p.worst for p in parts)) if parts else None


def differing(output: tuple[Reader, SourceTensor], source: tuple[Reader, SourceTensor], part: range, desk: Desk) -> Off | None:
    """Which values of a copy differ, or None. Of one dtype they must be the same bytes; of two, what the narrower one rounds to."""
    import numpy as np

    (reader, tensor), (original, before) = output, source
    widths = [DTYPE_BYTES.get(t.spec.dtype, 0) for t in (tensor, before)]
    cast = tensor.spec.dtype != before.spec.dtype
    if not widths[0]:  # 4 or 6 bits an element: bytes will do
        part, widths = (
            range(part.start * tensor.spec.nbytes // tensor.spec.numel, part.stop * tensor.spec.nbytes // tensor.spec.numel),
            [1, 1],
        )
    found: list[Off] = []
    step = PIECE if cast else len(desk.raw) // widths[0]
    for at in range(part.start, part.stop, step):
        n = min(step, part.stop - at)
        ours, theirs = desk.raw[: n * widths[0]], desk.other[: n * widths[1]]
        reader.read_into(tensor, at * widths[0], ours)
        original.read_into(before, at * widths[1], theirs)
        if cast:
            wrong = _cast_wrong(ours, tensor.spec.dtype, theirs, before.spec.dtype, desk, n)
        else:
            a, b = (np.frombuffer(piece, np.uint8) for piece in (ours, theirs))
            if np.array_equal(a, b):
                continue
            wrong = (a != b).reshape(n, widths[0]).any(1)
        count = int(np.count_nonzero(wrong))
        if count:
            found.append(Off(count, at + int(wrong.argmax()), math.inf))
    return joined(found)


def _cast_wrong(ours: memoryview, dtype: str, theirs: memoryview, before: str, desk: Desk, n: int) -> Any:
    """Which of n values of one dtype are not those of another, rounded to the narrower of the two."""
    import numpy as np

    x, q = desk.x[:n], desk.q[:n]
    with np.errstate(over="ignore"):
        as_float32(ours, dtype, x)
        as_float32(theirs, before, q)
    relative, least = max(ROUNDING[dtype], ROUNDING[before])
    with np.errstate(invalid="ignore"):
        return ~(
            (np.abs(x - q) <= np.maximum(np.abs(q) * np.float32(relative), np.float32(least)))
            | (x == q)
            | (np.isnan(x) & np.isnan(q))
        )


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

    lines: F32 = table[top:bottom] if grid.high == 1 else table[top // grid.high :][:1]
    if grid.wide >= grid.columns:
        return lines
    first = left // grid.wide
    spread: F32 = np.repeat(lines[:, first : -(-right // grid.wide)], grid.wide, axis=1)
    return spread[:, left - first * grid.wide :][:, : right - left]


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
