"""What a stored scale says: the amax that it was made from. In the same words for every format, so that one rule fits all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ckptq.checkpoint import SourceTensor
from ckptq.validators.coding import FP8, number_of
from ckptq.validators.scales import EXPONENTS, Kind, scale_kind, weight_of

WHOLE = 2688.0
"""NVFP4: what the amax of a tensor becomes under its scale of scales, 6 times 448."""


@dataclass(frozen=True, slots=True)
class Meaning:
    """value = amax / limit, or limit / amax where `inverse`. `rounded`: the power of two below that."""

    kind: Kind
    limit: float
    inverse: bool = False
    rounded: bool = False

    def amax(self, value: float) -> float:
        """Of a stored value above zero."""
        return self.limit / value if self.inverse else value * self.limit

    def value(self, amax: float) -> float:
        """What is stored for an amax above zero."""
        return self.limit / amax if self.inverse else amax / self.limit

    @property
    def text(self) -> str:
        """In words, as `amax / 448`."""
        said = f"{self.limit:g} / amax" if self.inverse else f"amax / {self.limit:g}"
        return f"the power of two below {said}" if self.rounded else said


def meaning_of(scale: SourceTensor, tensors: Mapping[str, SourceTensor]) -> Meaning | None:
    """What a scale's value means, by its name, its dtype and what lies beside it; None where nothing tells.

    NVFP4's scales of groups have none of their own: they count only under the scale of the tensor, and those of MXFP4 under two
    scales only under the coarse ones.
    """
    name, kind = scale.spec.name, scale_kind(scale.spec.name)
    module, _, leaf = name.rpartition(".")
    if kind is None or kind == "other" or (kind == "weight" and _is_of_groups(scale, tensors)):
        return None
    if kind == "whole" or leaf == "input_global_scale" or (leaf == "input_scale" and f"{module}.weight_scale_2" in tensors):
        return Meaning(kind, WHOLE, leaf.endswith("global_scale"))
    weight = weight_of(name if kind == "weight" else f"{module}.weight_scale", tensors)
    number = number_of(weight) if weight else None
    if kind in ("k", "v") or number is None:
        number = FP8
    if scale.spec.dtype in EXPONENTS:
        return Meaning(kind, number.power, rounded=True)
    return Meaning(kind, number.limit)


def _is_of_groups(scale: SourceTensor, tensors: Mapping[str, SourceTensor]) -> bool:
    beside = scale.spec.name.removesuffix("weight_scale")
    whole = {f"{beside}weight_scale_2", f"{beside}weight_global_scale"} & tensors.keys()
    dual = f"{beside}weight_dual_scale" in tensors
    return dual or scale.spec.dtype == "F8_E4M3" or (bool(whole) and scale.spec.dtype not in EXPONENTS and scale.spec.numel > 1)
