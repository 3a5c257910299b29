"""Whether codes say what the source's weights said, as exactly as their numbers can: in pieces, in float32."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptq.checkpoint import DTYPE_BYTES, Reader, SourceTensor
from ckptq.validators.coding import FP4, FP8, MX_COLUMNS, NVFP4_COLUMNS, Coding, Number, decode
from ckptq.validators.scales import SCALE_DTYPES, Grid, read_part, read_scales, spread_over

if TYPE_CHECKING:
    import numpy as np

    F32 = np.ndarray[Any, np.dtype[np.float32]]
    I32 = np.ndarray[Any, np.dtype[np.int32]]

PIECE = 1 << 16
"""Weights compared at a time: the arrays stay in the processor's cache."""

# |w / s - q| for q, the nearest E4M3 value to x = w / s. Three bits of fraction: for |x| >= 2^-6 the spacing is 2^-3 of the power
# of two below |x|, so the error is at most 2^-4 |x|; below, the spacing is 2^-9 and the error at most 2^-10. ModelOpt and
# llm-compressor round x to BF16 first, which moves it by up to 2^-8 |x|. float32 adds 2^-22 |x|.
RELATIVE = 2.0**-4 + 2.0**-8
ABSOLUTE = 2.0**-10 * (1 + 2.0**-4)
NEAR = (1 << 19) + (1 << 16)
"""Half a step between codes, in units of float32's last bit where the code's last bit is bit 20, and what BF16 may add."""
BF16_SHARE = 2.0**-8
"""What BF16 may move a quotient by, as a share of it."""
SMALL_SCALE, CUT = 2.0**-8, 9.0
"""Down there rounding takes up to half of a group's E4M3 scale: the largest weight over it may be 9, and is cut to the code 6."""
ROUNDING = {"BF16": (2.0**-8, 1e-40), "F16": (2.0**-11, 2.0**-25), "F32": (2.0**-23, 1e-45), "F64": (2.0**-23, 1e-45)}
"""By how much a value moves that is rounded to a dtype: a share of it, at least this; in float32, in which it is compared."""
NO_SCALE = 1e-30
"""Stands for a scale of zero: what is not zero over it is then far off."""
LEAST = 24 * 2.0**-10
"""The same for an E4M3 scale, which rounds to zero below 2^-10: over it, weights of up to 6 times that are called zero."""


@dataclass(frozen=True, slots=True)
class Off:
    """Weights beyond the bound: how many, the first one's place in the flat tensor, and the worst as a multiple of the bound."""

    count: int
    first: int
    worst: float


@dataclass(frozen=True, slots=True)
class Coded:
    """How codes are scaled: value = code * scale * whole.

    The scales are F32 [numel], or still in their file where they are many. `group`: columns under one that has a byte, or None.
    """

    number: Number
    grid: Grid
    scales: F32 | SourceTensor
    group: int | None = None
    whole: float = 1.0

    @property
    def no_scale(self) -> float:
        """What stands for a scale of zero."""
        return LEAST * self.whole if self.group == NVFP4_COLUMNS else NO_SCALE

    def over(self, reader: Reader, top: int, bottom: int, left: int, right: int, zero: float = 0.0) -> F32:
        """What codes are multiplied with, F32, in a shape that spreads over [bottom - top, right - left] of the weight.

        The rows lie in one row of blocks, or each has scales of its own. `zero` takes the place of scales of zero.
        """
        import numpy as np

        grid, across = self.grid, self.grid.shape[1]
        low, high = top // grid.high, -(-bottom // grid.high)
        first, last = left // grid.wide, -(-right // grid.wide)
        if not isinstance(self.scales, SourceTensor):
            lines: F32 = self.scales.reshape(grid.shape)[low:high, first:last]
        elif (first, last) == (0, across):
            lines = read_part(reader, self.scales, low * across, (high - low) * across).reshape(high - low, across)
        else:
            parts = [read_part(reader, self.scales, line * across + first, last - first) for line in range(low, high)]
            lines = np.stack(parts)
        with np.errstate(all="ignore"):
            lines = lines * np.float32(self.whole) if self.whole != 1 else lines
            lines = np.where(lines == 0, np.float32(zero), lines) if zero else lines
        if grid.wide >= grid.columns:
            return lines
        spread: F32 = np.repeat(lines, grid.wide, axis=1)
        return spread[:, left - first * grid.wide :][:, : right - left]

    def times(self, factor: float) -> Coded:
        """The same under other scales."""
        return dataclasses.replace(self, whole=self.whole * factor)


def load(coding: Coding, reader: Reader) -> Coded | None:
    """The scales of a coding, or None where one that can be held is not finite, or the whole one is no factor."""
    import numpy as np

    whole = 1.0
    if coding.whole is not None:
        found = read_scales(reader, coding.whole)
        if found is None or len(found) != 1 or not found[0] > 0 or not math.isfinite(found[0]):
            return None
        whole = 1 / float(found[0]) if coding.inverse else float(found[0])
    group = coding.group
    if coding.coarse is None and group is not None and coding.local.spec.dtype in SCALE_DTYPES and coding.local.spec.numel > PIECE:
        return Coded(coding.number, coding.grid, coding.local, group, whole)
    scales = read_scales(reader, coding.local)
    if scales is not None and coding.coarse is not None:
        scales = spread_over(scales, read_scales(reader, coding.coarse), coding.grid)
    return Coded(coding.number, coding.grid, scales, group, whole) if scales is not None and np.isfinite(scales).all() else None


class Desk:
    """One thread's buffers."""

    def __init__(self) -> None:
        import numpy as np

        self.codes, self.raw, self.other = (memoryview(bytearray(n * PIECE)) for n in (1, 8, 8))
        self.x, self.q, self.limit, self.spare = (np.empty(PIECE, np.float32) for _ in range(4))


def beyond(
    output: tuple[Reader, SourceTensor], source: tuple[Reader, SourceTensor], coded: Coded, rows: range, desk: Desk
) -> Off | None:
    """What is beyond the bound in these rows of a weight, or None. `output` are codes, `source` floats of the weight's shape."""
    import numpy as np

    (reader, tensor), (original, before) = output, source
    width, number, grid = DTYPE_BYTES[before.spec.dtype], coded.number, coded.grid
    found: list[Off] = []
    for top, bottom, left, right in _pieces(grid, rows):
        at, n = top * grid.columns + left, (bottom - top) * (right - left)
        codes, raw = desk.codes[: n // number.packed], desk.raw[: n * width]
        reader.read_into(tensor, at // number.packed, codes)
        original.read_into(before, at * width, raw)
        scale = coded.over(reader, top, bottom, left, right, coded.no_scale)
        x, q = desk.x[:n], desk.q[:n]
        flat = x.reshape(bottom - top, right - left)
        as_float32(raw, before.spec.dtype, x)
        if number is FP8:
            if _all_near(flat, codes, scale, q.view(np.int32)):
                continue
            as_float32(raw, before.spec.dtype, x)
        with np.errstate(all="ignore"):
            np.divide(flat, scale, out=flat)
        decode(codes, q, number)
        if number is not FP8 and _within(x, q, desk.limit[:n], desk.spare[:n], number):
            continue
        _cut(flat, coded, scale)
        wrong = _beyond(x, q, desk.limit[:n], desk.spare[:n], number)
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


def limits(x: F32, number: Number, out: F32) -> None:
    """out = how far a code's value may be from the quotients x that it stands for: half a step there, and what BF16 adds.

    E2M1's steps are 1/2 below 2, 1 below 4 and 2 above: half of one is a quarter of the power of two below x, which is x without
    its fraction. Its scales of groups may go through BF16 as well, for they are stored as products.
    """
    import numpy as np

    if number.top == FP4.top:
        np.bitwise_and(x.view(np.uint32), np.uint32(0x7F800000), out=out.view(np.uint32))
        np.maximum(out, np.float32(1), out=out)
        np.minimum(out, np.float32(4), out=out)
        np.multiply(out, np.float32(0.25 + 4 * BF16_SHARE), out=out)
        return
    np.abs(x, out=out)
    if number is FP8:
        np.multiply(out, np.float32(RELATIVE), out=out)
        np.maximum(out, np.float32(ABSOLUTE), out=out)
    else:
        np.multiply(out, np.float32(BF16_SHARE), out=out)
        np.add(out, np.float32(0.5 * (1 + BF16_SHARE)), out=out)


def _within(x: F32, q: F32, limit: F32, spare: F32, number: Number) -> bool:
    """Whether every code is the nearest one or, where BF16 was in between, nearly so."""
    import numpy as np

    with np.errstate(invalid="ignore"):
        limits(x, number, limit)
        np.subtract(q, x, out=spare)
        np.abs(spare, out=spare)
        return bool((spare <= limit).all())


def _cut(x: F32, coded: Coded, scale: F32) -> None:
    """Sets quotients x [rows, columns] that a scale of a byte can't cover to the largest code, in place.

    MXFP8 and MXFP4: exponents may be rounded down, as the OCP's specification does it, so that up to two powers fall under one.
    """
    import numpy as np

    if coded.group is None:
        return
    reach = (2 * coded.number.power if coded.group == MX_COLUMNS else CUT) * (1 + BF16_SHARE)
    with np.errstate(all="ignore"):
        over = (np.abs(x) > coded.number.top) & (np.abs(x) <= np.float32(reach))
        if coded.group == NVFP4_COLUMNS:
            over &= np.abs(scale) <= np.float32(SMALL_SCALE * 1.01 * coded.whole)
    np.copyto(x, np.copysign(np.float32(coded.number.top), x), where=over)


def _beyond(x: F32, q: F32, limit: F32, spare: F32, number: Number) -> Off | None:
    """What the codes q are too far from the quotients x; q, limit and spare are overwritten."""
    import numpy as np

    with np.errstate(invalid="ignore"):  # infinity by infinity
        limits(x, number, limit)
        np.subtract(q, x, out=q)
        np.abs(q, out=q)
        wrong = ~(q <= limit)  # a NaN is wrong too
        np.abs(x, out=spare)
        if not math.isfinite(spare.max()):
            wrong |= ~np.isfinite(spare)
        count = int(np.count_nonzero(wrong))
        return Off(count, int(wrong.argmax()), float((q[wrong] / limit[wrong]).max())) if count else None


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
