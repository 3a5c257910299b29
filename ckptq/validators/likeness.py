"""What a tensor that is not its source's is instead: another one, the same one transposed, or under another scale."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptq.checkpoint import DTYPE_BYTES, FLOATS, Reader, SourceTensor
from ckptq.validators.coding import FP4, Number, decode
from ckptq.validators.rounding import Coded, Desk, as_float32, beyond, differing, limits

if TYPE_CHECKING:
    import numpy as np

    F32 = np.ndarray[Any, np.dtype[np.float32]]
    Bools = np.ndarray[Any, np.dtype[np.bool_]]

TILE = 64
"""Rows and columns that are looked at first."""
LOOKS = 20_000
"""Tensors that are looked at in one run: where everything differs, names are of little use."""
REACH = 4 / 3
"""How far above the largest code a quotient may lie under a scale of one byte: MXFP4's largest is 6, and up to 8 falls to it."""
FAR = 1e30
"""Stands for what is not zero over a scale of zero."""
MOST = 0.75
"""Of the codes that do not fit: as many do under scales that are fitted to them."""


class Likeness:
    """Looks for what stored tensors are like, among the source's of the same shape."""

    def __init__(self, originals: Iterable[SourceTensor], reader: Reader, original: Reader) -> None:
        self._reader, self._original = reader, original
        self._by_shape: dict[tuple[int, ...], list[SourceTensor]] = {}
        for tensor in originals:
            if tensor.spec.numel and tensor.spec.dtype in FLOATS:
                self._by_shape.setdefault(tensor.spec.shape, []).append(tensor)
        self._left = LOOKS
        self._desk = Desk()

    def describe(self, tensor: SourceTensor, before: SourceTensor, coded: Coded | None) -> str:
        """`; it is ...`, or "" where nothing is found."""
        if not tensor.spec.numel or (coded is None and tensor.spec.dtype not in FLOATS):
            return ""
        shape = (coded.number.shape if coded else tuple)(tensor.spec.shape)
        tile = self._tile_of(tensor, shape, coded)
        wanted = _floats(self._original, before, before.spec.shape)
        if shape == before.spec.shape[::-1] and len(shape) == 2 and tile.is_turned(wanted):
            return "; it is the source's, transposed"
        if coded is not None and (what := _misread(tile, wanted, coded)):
            return what
        for other in self._by_shape.get(shape, ()):
            if other is before or self._left == 0:
                continue
            self._left -= 1
            there = _floats(self._original, other, shape)
            factor = (tile.factor(there) if coded is not None and coded.grid.shape == (1, 1) else 1.0) or 1.0
            if tile.times(factor).is_like(there) and self._is(tensor, other, coded, factor):
                under = f" under a scale {1 / factor:.4g} times what it needs" if not 0.99 < factor < 1.01 else ""
                return f"; it is {other.spec.name} of the source{under}"
        return ""

    def _tile_of(self, tensor: SourceTensor, shape: tuple[int, ...], coded: Coded | None) -> Tile:
        """A tile of the tensor's values, and what one step between codes may be there: the scale."""
        import numpy as np

        if coded is None:
            codes = _floats(self._reader, tensor, shape)
            return Tile(codes, np.zeros_like(codes))
        codes = _codes(self._reader, tensor, shape, coded.number)
        (rows, wide), high = codes.shape, coded.grid.high
        steps = np.empty_like(codes)
        for top in range(0, rows, high):
            bottom = min(top + high, rows)
            steps[top:bottom] = coded.over(self._reader, top, bottom, 0, wide)
        return Tile(codes, steps, coded.number, REACH if coded.group else 1.0)

    def _is(self, tensor: SourceTensor, other: SourceTensor, coded: Coded | None, factor: float) -> bool:
        ours, theirs = (self._reader, tensor), (self._original, other)
        if coded is None:
            return differing(ours, theirs, range(tensor.spec.numel), self._desk) is None
        return beyond(ours, theirs, coded.times(factor), range(coded.grid.rows), self._desk) is None


@dataclass(frozen=True, slots=True)
class Tile:
    """The corner of a tensor, [rows, columns]: codes and their scales, or values over scales of zero, and no `number`.

    `reach`: how far above the largest code a quotient may lie, as a multiple of it.
    """

    codes: F32
    steps: F32
    number: Number | None = None
    reach: float = 1.0

    def under(self, steps: F32) -> Tile:
        """The same codes under other scales."""
        return Tile(self.codes, steps, self.number, self.reach)

    def times(self, factor: float) -> Tile:
        """The same values, times a factor."""
        import numpy as np

        if self.number is None:
            return self
        with np.errstate(all="ignore"):
            return self.under(self.steps * np.float32(factor))

    def is_like(self, wanted: F32) -> bool:
        """Whether the values are the wanted ones, up to their rounding."""
        import numpy as np

        return self.codes.shape == wanted.shape and bool(np.isfinite(wanted).all()) and bool(self.fit(wanted).all())

    def fit(self, wanted: F32) -> Bools:
        """Which of them are; `wanted` has the same shape."""
        import numpy as np

        if self.number is None:
            return np.asarray(self.codes == wanted)
        with np.errstate(all="ignore"):
            x = np.where(self.steps == 0, np.where(wanted == 0, np.float32(0), np.float32(FAR)), wanted / self.steps)
            limit = np.empty_like(x)
            limits(x, self.number, limit)
            cut = (np.abs(x) > self.number.top) & (np.abs(x) < self.reach * self.number.top)
            x = np.where(cut, np.copysign(np.float32(self.number.top), x), x)
            return np.asarray(np.abs(self.codes - x) <= limit * np.float32(1.01))

    def is_turned(self, wanted: F32) -> bool:
        """Whether transposed values are the wanted ones, with their scales or with those that lie where they should."""
        if self.is_like(wanted) or self.codes.shape != wanted.shape[::-1]:
            return False
        both = (Tile(self.codes.T, steps, self.number, self.reach) for steps in (self.steps.T, self.steps))
        return any(tile.is_like(wanted) for tile in both if tile.codes.shape == tile.steps.shape)

    def factor(self, wanted: F32) -> float:
        """The factor that fits the values to the wanted ones in the sense of least squares, or 0 where none above zero does."""
        import numpy as np

        with np.errstate(all="ignore"):
            values = self.codes.astype(np.float64) * (self.steps if self.number else 1)
            factor = float((values * wanted).sum() / (values**2).sum())
        return factor if math.isfinite(factor) and factor > 1e-20 else 0.0


def _misread(tile: Tile, wanted: F32, coded: Coded) -> str:
    """Codes of the right weight, under other scales or in another order; "" for codes of another one."""
    import numpy as np

    if tile.codes.shape != wanted.shape:
        return ""
    factor = tile.factor(wanted)
    if factor and tile.times(factor).is_like(wanted):
        return f"; its scale is {1 / factor:.4g} times what its codes need" if not 0.99 < factor < 1.01 else ""
    if coded.number is FP4:
        swapped = np.ascontiguousarray(tile.codes.reshape(len(tile.codes), -1, 2)[:, :, ::-1]).reshape(tile.codes.shape)
        if Tile(swapped, tile.steps, tile.number, tile.reach).is_like(wanted):
            return "; its codes lie the wrong way round in their bytes: the first belongs in the low four bits"
    if coded.grid.high == 1 and tile.codes.shape[1] % (wide := min(coded.grid.wide, tile.codes.shape[1])) == 0:
        groups = (len(tile.codes), tile.codes.shape[1] // wide, wide)
        codes, there = tile.codes.reshape(groups).astype(np.float64), wanted.reshape(groups).astype(np.float64)
        with np.errstate(all="ignore"):
            fitting = np.nan_to_num((codes * there).sum(2, keepdims=True) / (codes**2).sum(2, keepdims=True))
        steps = np.broadcast_to(fitting.astype(np.float32), groups).reshape(tile.codes.shape)
        wrong = ~tile.fit(wanted).reshape(groups).all(2)
        if wrong.any() and (fitting[wrong] > 0).all() and tile.under(steps).fit(wanted).reshape(groups)[wrong].mean() > MOST:
            return "; its codes fit, its scales do not: they are those of other rows or columns, or of another weight"
    return ""


def _floats(reader: Reader, tensor: SourceTensor, shape: tuple[int, ...]) -> F32:
    """The values in the corner of an unquantized tensor, seen as [rows, columns]."""
    return _corner(reader, tensor, shape, DTYPE_BYTES[tensor.spec.dtype] * 8, None)


def _codes(reader: Reader, tensor: SourceTensor, shape: tuple[int, ...], number: Number) -> F32:
    """The codes there, without their scale. NaN codes become 480."""
    return _corner(reader, tensor, shape, 8 // number.packed, number)


def _corner(reader: Reader, tensor: SourceTensor, shape: tuple[int, ...], bits: int, number: Number | None) -> F32:
    import numpy as np

    columns = shape[-1] if shape else 1
    rows, wide = min(math.prod(shape) // columns, TILE), min(columns, TILE)
    found = np.empty((rows, wide), np.float32)
    buffer = memoryview(bytearray(wide * bits // 8))
    for row in range(rows):
        reader.read_into(tensor, row * columns * bits // 8, buffer)
        if number is not None:
            decode(buffer, found[row], number)
        else:
            as_float32(buffer, tensor.spec.dtype, found[row])
    return found
