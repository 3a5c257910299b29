"""What a tensor that is not its source's is instead: another one, the same one transposed, or under another scale."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ckptq.checkpoint import DTYPE_BYTES, FLOATS, Reader, SourceTensor
from ckptq.validators.rounding import ABSOLUTE, RELATIVE, Coded, Desk, as_float32, beyond, decode, differing

if TYPE_CHECKING:
    import numpy as np

    F32 = np.ndarray[Any, np.dtype[np.float32]]

TILE = 64
"""Rows and columns that are looked at first."""
LOOKS = 20_000
"""Tensors that are looked at in one run: where everything differs, names are of little use."""


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
        import numpy as np

        if tensor.spec.dtype not in {*FLOATS, "F8_E4M3"} or not tensor.spec.numel:
            return ""
        values, steps = self._stored(tensor, coded)
        wanted = _tile(self._original, before)
        if tensor.spec.shape == before.spec.shape[::-1] and len(tensor.spec.shape) == 2 and _is_turned(values, wanted, steps):
            return "; it is the source's, transposed"
        factor = _factor(values, wanted)
        if coded is not None and factor and _close(values * np.float32(factor), wanted, steps * np.float32(factor)):
            return f"; its scale is {1 / factor:.4g} times what its codes need" if not 0.99 < factor < 1.01 else ""
        for other in self._by_shape.get(tensor.spec.shape, ()):
            if other is before or self._left == 0:
                continue
            self._left -= 1
            there = _tile(self._original, other)
            factor = (_factor(values, there) if coded is not None and len(coded.scales) == 1 else 1.0) or 1.0
            with np.errstate(all="ignore"):
                scaled = values * np.float32(factor), steps * np.float32(factor)
            if _close(scaled[0], there, scaled[1]) and self._is(tensor, other, coded, factor):
                under = f" under a scale {1 / factor:.4g} times what it needs" if not 0.99 < factor < 1.01 else ""
                return f"; it is {other.spec.name} of the source{under}"
        return ""

    def _stored(self, tensor: SourceTensor, coded: Coded | None) -> tuple[F32, F32]:
        """A tile of the tensor's values, and what one step between codes may be there: the scale."""
        import numpy as np

        values = _tile(self._reader, tensor)
        if coded is None:
            return values, np.zeros_like(values)
        down, across = (np.arange(n) for n in values.shape)
        steps = coded.table[down // coded.grid.high][:, across // coded.grid.wide]
        with np.errstate(all="ignore"):
            return values * steps, steps

    def _is(self, tensor: SourceTensor, other: SourceTensor, coded: Coded | None, factor: float) -> bool:
        ours, theirs = (self._reader, tensor), (self._original, other)
        if coded is None:
            return differing(ours, theirs, range(tensor.spec.numel), self._desk) is None
        return beyond(ours, theirs, coded.times(factor), range(coded.grid.rows), self._desk) is None


def _tile(reader: Reader, tensor: SourceTensor) -> F32:
    """The values in the corner of a tensor, seen as [rows, columns]: codes without their scale. NaN codes become 480."""
    import numpy as np

    columns = tensor.spec.shape[-1] if tensor.spec.shape else 1
    rows, wide = min(tensor.spec.numel // columns, TILE), min(columns, TILE)
    found = np.empty((rows, wide), np.float32)
    width = DTYPE_BYTES[tensor.spec.dtype]
    buffer = memoryview(bytearray(wide * width))
    for row in range(rows):
        reader.read_into(tensor, row * columns * width, buffer)
        if tensor.spec.dtype == "F8_E4M3":
            decode(buffer, found[row])
        else:
            as_float32(buffer, tensor.spec.dtype, found[row])
    return found


def _close(values: F32, wanted: F32, steps: F32) -> bool:
    """Whether the values are the wanted ones, up to FP8's rounding under scales `steps`, or exactly where they are zero."""
    import numpy as np

    if values.shape != wanted.shape or not np.isfinite(wanted).all():
        return False
    with np.errstate(all="ignore"):
        coded = steps > 0
        limit = np.where(coded, np.maximum(np.abs(wanted) * np.float32(RELATIVE), steps * np.float32(ABSOLUTE)), 0)
        return bool((np.abs(values - wanted) <= limit * np.float32(1.01)).all())


def _is_turned(values: F32, wanted: F32, steps: F32) -> bool:
    """Whether transposed values are the wanted ones, with their scales or with those that lie where they should."""
    import numpy as np

    with np.errstate(all="ignore"):
        turned = _close(values.T, wanted, steps.T) or _close(values.T / steps.T * steps, wanted, steps)
        return turned and not _close(values, wanted, steps)


def _factor(values: F32, wanted: F32) -> float:
    """The factor that fits values to the wanted ones in the sense of least squares, or 0 where none above zero does."""
    import numpy as np

    with np.errstate(all="ignore"):
        factor = float((values.astype(np.float64) * wanted).sum() / (values.astype(np.float64) ** 2).sum())
    return factor if math.isfinite(factor) and factor > 1e-20 else 0.0
