"""Schemes: how a linear's weight becomes codes and scales, and how the server quantizes what flows into it.

A scheme says nothing of names and files: exporters do. Its arithmetic is in the module of ckptq/numerics that `numerics` names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from ckptq.checkpoint import TensorSpec

Activation = Literal["static", "dynamic", "none"]


@dataclass(frozen=True, slots=True)
class Scheme:
    """A number format, what shares a scale in it, and what happens to activations.

    numerics    the module of ckptq/numerics with its arithmetic
    codes       dtype in which codes are stored
    packed      codes in one stored element: 2 for 4 bits
    rows        rows of [n, k] under one local scale; None for all
    columns     columns under one local scale; None for all
    scale       dtype of the local scales; None where the one scale of the whole tensor is all there is
    limit       the amax of a fused group becomes this under the scale of the whole tensor; None where there is no such scale
    activation  static: stored scales, from calibration. dynamic: the server's affair. none: activations stay as they are
    title       what has one scale, and what happens to activations; for tables
    """

    name: str
    numerics: str
    codes: Literal["F8_E4M3", "I8", "U8"]
    packed: int
    rows: int | None
    columns: int | None
    scale: Literal["F32", "F8_E4M3", "U8"] | None
    limit: float | None
    activation: Activation
    title: str

    def codes_spec(self, name: str, shape: tuple[int, ...]) -> TensorSpec:
        """The stored codes of a weight [..., k]: [..., k / packed]."""
        *around, k = shape
        return TensorSpec(name, self.codes, (*around, k // self.packed))

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """How many local scales a weight [n, k] has: [ceil(n / rows), ceil(k / columns)]."""
        n, k = shape
        return -(-n // (self.rows or n)), -(-k // (self.columns or k))


# fmt: off
_ALL = (
    Scheme("fp8", "fp8", "F8_E4M3", 1, None, None, None, 448.0, "static", "FP8 a tensor, static activations"),
    Scheme("fp8-tensor", "fp8", "F8_E4M3", 1, None, None, None, 448.0, "dynamic", "FP8 a tensor, dynamic activations"),
    Scheme(
        "fp8-dynamic",
        "fp8",
        "F8_E4M3",
        1,
        1,
        None,
        "F32",
        None,
        "dynamic",
        "FP8 a channel, dynamic activations a token",
    ),
    Scheme(
        "fp8-block",
        "fp8",
        "F8_E4M3",
        1,
        128,
        128,
        "F32",
        None,
        "dynamic",
        "FP8 a block of 128 x 128, dynamic activations",
    ),
    Scheme("int8", "int8", "I8", 1, 1, None, "F32", None, "dynamic", "INT8 a channel, dynamic activations a token"),
    Scheme("nvfp4", "nvfp4", "U8", 2, 1, 16, "F8_E4M3", 2688.0, "static", "NVFP4, static scales for activations"),
    Scheme("nvfp4a16", "nvfp4", "U8", 2, 1, 16, "F8_E4M3", 2688.0, "none", "NVFP4, weights alone"),
    Scheme("mxfp8", "mxfp8", "F8_E4M3", 1, 1, 32, "U8", None, "dynamic", "MXFP8, dynamic activations"),
    Scheme("mxfp4", "mxfp4", "U8", 2, 1, 32, "U8", None, "dynamic", "MXFP4, dynamic activations"),
    Scheme(
        "mxfp4-dualscale",
        "mxfp4_dualscale",
        "F8_E4M3",
        1,
        1,
        512,
        "F32",
        None,
        "dynamic",
        "MXFP4 under two scales, dynamic activations",
    ),
)
# fmt: on
SCHEMES: Mapping[str, Scheme] = MappingProxyType({scheme.name: scheme for scheme in _ALL})


def find_scheme(name: str) -> Scheme:
    """The scheme of that name, which a recipe has named."""
    return SCHEMES[name]
