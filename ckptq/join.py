"""Linears of a denoiser that a file must hold as one, seen so: OmniGen2's linear_1 and linear_3 as gate_up_proj. Pure.

vLLM-Omni 0.30.0 diffusion/model_loader/checkpoint_adapters/modelopt.py drops scales of linears whose names it can't map.
"""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

from ckptq.checkpoint import Component, SourceTensor, TensorSpec
from ckptq.errors import SourceError
from ckptq.scopes.denoisers import Denoiser


def join(component: Component, denoiser: Denoiser) -> Component:
    """The same component with one matrix for the rows of several, one behind another; else itself.

    Raises SourceError where one of them is missing, or they differ in dtype or columns.
    """
    places = {}  # the first of the parts -> (what they become, all parts)
    for name in component.tensors:
        for whole, parts in denoiser.joined.items():
            if name.endswith(first := f".{parts[0]}.weight"):
                around = name.removesuffix(first)
                places[name] = (f"{around}.{whole}.weight", tuple(f"{around}.{part}.weight" for part in parts))
    if not places:
        return component
    gone = {part for _, parts in places.values() for part in parts}
    tensors: dict[str, SourceTensor] = {}
    for name, tensor in component.tensors.items():
        if name in places:
            whole, parts = places[name]
            tensors[whole] = _joined(whole, parts, component)
        elif name not in gone:
            tensors[name] = tensor
    return dataclasses.replace(component, tensors=MappingProxyType(tensors))


def _joined(whole: str, names: tuple[str, ...], component: Component) -> SourceTensor:
    if missing := [name for name in names if name not in component.tensors]:
        raise SourceError(f"{missing[0]}: missing", hint="fetch the checkpoint again")
    parts = tuple(component.tensors[name] for name in names)
    forms = {(part.spec.dtype, part.spec.shape[1:]) for part in parts}
    if len(forms) != 1 or len(parts[0].spec.shape) != 2:
        raise SourceError(
            f"{' and '.join(names)}: expected matrices of one dtype with as many columns, to be one matrix for the server"
        )
    rows = sum(part.spec.shape[0] for part in parts)
    spec = TensorSpec(whole, parts[0].spec.dtype, (rows, *parts[0].spec.shape[1:]))
    return SourceTensor(spec, parts[0].file, parts[0].offset, parts=parts)
