"""How a weight is stored: the numbers its codes are, and the scales that lie over them, as names, dtypes and shapes tell."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptq.checkpoint import SourceTensor
from ckptq.validators.scales import DUAL_COLUMNS, Grid, coarse_of, find_grid, group_of, scale_of, whole_of

if TYPE_CHECKING:
    import numpy as np

    F32 = np.ndarray[Any, np.dtype[np.float32]]

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""E2M1's, of the codes 0 to 7; bit 3 is the sign. Two codes a byte, the first in the low nibble."""


@dataclass(frozen=True, slots=True)
class Number:
    """A number format that weights are stored in.

    dtype   safetensors' word for a stored element
    packed  codes in one element
    top     the largest magnitude
    limit   what the amax of the weights under one scale becomes
    power   the largest power of two: under a shared exponent the amax becomes this, or up to twice as much
    """

    name: str
    dtype: str
    packed: int
    top: float
    limit: float
    power: float

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Of the weight whose codes have the shape `stored`."""
        return (*stored[:-1], stored[-1] * self.packed) if stored else stored


FP8 = Number("FP8", "F8_E4M3", 1, 448.0, 448.0, 256.0)
INT8 = Number("INT8", "I8", 1, 127.0, 127.0, 64.0)
FP4 = Number("FP4", "U8", 2, 6.0, 6.0, 4.0)
E2M1 = Number("E2M1", "F8_E4M3", 1, 6.0, 6.0, 4.0)
"""FP4's values, stored as numbers: vLLM-Omni's MXFP4 under two scales."""
NVFP4_COLUMNS, MX_COLUMNS = 16, 32
_GROUPS: Mapping[str, tuple[int | None, ...]] = {
    "FP8": (None, MX_COLUMNS),
    "INT8": (None,),
    "FP4": (NVFP4_COLUMNS, MX_COLUMNS),
    "E2M1": (MX_COLUMNS,),
}
_BY_DTYPE = {number.dtype: number for number in (FP8, INT8, FP4)}


def number_of(tensor: SourceTensor) -> Number | None:
    """The numbers that a weight's stored elements are, or None for a tensor that is no codes. Any FP8 is taken for a weight."""
    number = _BY_DTYPE.get(tensor.spec.dtype)
    return number if number is FP8 or tensor.spec.name.endswith(("weight", "weight_packed")) else None


@dataclass(frozen=True, slots=True)
class Coding:
    """A weight's codes and scales. value = code * local * whole, or code * local / whole where `inverse`.

    local  the scale that lies beside the codes: of the tensor, of channels, blocks or groups
    whole  the scale of those, of which a tensor has one; None where there is none
    coarse the scale of those, one for 512 columns; None where there is none
    grid   how `local` lies over the weight [n, k]; k counts codes, not bytes
    group  columns under one scale of a byte, or None
    """

    codes: SourceTensor
    number: Number
    local: SourceTensor
    whole: SourceTensor | None
    inverse: bool
    grid: Grid
    group: int | None
    coarse: SourceTensor | None = None


def find_coding(tensor: SourceTensor, tensors: Mapping[str, SourceTensor], block: tuple[int, int]) -> Coding | None:
    """How the codes in `tensor` are scaled, or None where the scales are not there or do not fit."""
    number, local = number_of(tensor), scale_of(tensor.spec.name, tensors)
    if number is None or local is None:
        return None
    coarse = coarse_of(tensor.spec.name, tensors) if number is FP8 else None
    if coarse is not None:
        number = E2M1
        if coarse.spec.shape != (*tensor.spec.shape[:-1], -(-tensor.spec.shape[-1] // DUAL_COLUMNS), 1):
            return None
    group, (whole, inverse) = group_of(local.spec.dtype), whole_of(tensor.spec.name, tensors)
    if number is not FP4 or group == MX_COLUMNS:
        whole = None
    elif whole is not None:
        group = NVFP4_COLUMNS  # in whatever dtype its scales are
    grid = find_grid(number.shape(tensor.spec.shape), local.spec.shape, block, group)
    if grid is None or group not in _GROUPS[number.name] or (group == NVFP4_COLUMNS and whole is None):
        return None
    return Coding(tensor, number, local, whole, inverse, grid, group, coarse)


@functools.cache
def _pairs() -> Any:
    """The two values of each byte of packed FP4, as one uint64 [256]: the low nibble's first."""
    import numpy as np

    values = np.array([*FP4_VALUES, *(-v for v in FP4_VALUES)], np.float32)
    byte = np.arange(256)
    return np.stack([values[byte & 15], values[byte >> 4]], 1).view(np.uint64).reshape(-1)


def decode(codes: memoryview, out: F32, number: Number = FP8) -> None:
    """out [n] = the values of n codes. A NaN code becomes 480; values.py looks for those.

    E4M3: a code's 4 exponent and 3 fraction bits, moved to where float32 has its own, read as the value times 2^-120: 120 is the
    difference of the exponents' biases.
    """
    import numpy as np

    if number is INT8:
        np.copyto(out, np.frombuffer(codes, np.int8))
        return
    if number is FP4:
        np.take(_pairs(), np.frombuffer(codes, np.uint8), out=out.view(np.uint64), mode="clip")
        return
    bits = out.view(np.int32)
    np.copyto(bits, np.frombuffer(codes, np.int8))
    np.left_shift(bits, 20, out=bits)
    np.bitwise_and(bits, np.uint32(0x87F00000).view(np.int32), out=bits)
    np.multiply(out, np.float32(2.0**120), out=out)
