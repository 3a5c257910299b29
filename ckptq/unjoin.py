"""A denoiser's files with names of the server's, seen under those of diffusers: undoes `join` and renaming. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import MappingProxyType

from ckptq.checkpoint import DTYPE_BYTES, Component, SourceTensor, TensorSpec
from ckptq.errors import SourceError
from ckptq.folder import printable
from ckptq.scopes.denoisers import all_denoisers


def unjoin(component: Component) -> Component:
    """The component, as `quantized.dense` sees it, with every tensor under its name in diffusers; itself where all are.

    Raises SourceError for a matrix that does not divide into those that it was made of.
    """
    said = component.config.get("_class_name")
    denoiser = next((d for d in all_denoisers() if said in d.classes), None)
    if denoiser is None:
        return component
    tensors: dict[str, SourceTensor] = {}
    for name, tensor in component.tensors.items():
        whole = next((w for w in denoiser.joined if name.endswith(f".{w}.weight")), None)
        if whole is not None:
            around = name.removesuffix(f".{whole}.weight")
            parts = tuple(f"{around}.{part}.weight" for part in denoiser.joined[whole])
            tensors |= {one.spec.name: one for one in _parts(tensor, parts)}
            continue
        called = f".{name}."
        for theirs, ours in denoiser.renamed.items():
            called = called.replace(f".{ours}.", f".{theirs}.")
        called = called.strip(".")
        tensors[called] = dataclasses.replace(tensor, spec=dataclasses.replace(tensor.spec, name=called))
    if tensors.keys() == component.tensors.keys():
        return component
    done = (*component.dequantized, "linears named as diffusers names them")
    return dataclasses.replace(component, tensors=MappingProxyType(tensors), dequantized=done)


def _parts(tensor: SourceTensor, names: tuple[str, ...]) -> Iterator[SourceTensor]:
    """As many matrices of as many rows."""
    rows, columns = tensor.spec.shape if len(tensor.spec.shape) == 2 else (1, 0)
    if rows % len(names):
        raise SourceError(f"{printable(tensor.spec.name)}: expected rows for {len(names)} linears, found {rows}")
    high = rows // len(names)
    for i, name in enumerate(names):
        spec = TensorSpec(name, tensor.spec.dtype, (high, columns))
        if tensor.codes is None:
            yield SourceTensor(spec, tensor.file, tensor.offset + i * spec.nbytes)
            continue
        stored, scale = tensor.codes.stored, tensor.codes.scale
        size = high * columns * DTYPE_BYTES[stored.spec.dtype]
        codes = SourceTensor(TensorSpec(name, stored.spec.dtype, spec.shape), stored.file, stored.offset + i * size)
        if scale.spec.numel == rows and tensor.codes.high == 1:  # one for each
            called = TensorSpec(f"{name}_scale", scale.spec.dtype, (high,))
            scale = SourceTensor(called, scale.file, scale.offset + i * called.nbytes)
        elif scale.spec.numel != 1:
            raise SourceError(f"{printable(tensor.spec.name)}: scales in blocks, over the rows of {len(names)} linears")
        yield SourceTensor(spec, codes.file, codes.offset, dataclasses.replace(tensor.codes, stored=codes, scale=scale))
