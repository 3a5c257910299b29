"""A quantized checkpoint seen as what its server multiplies with: every weight decoded, code * scale, rounded once to BF16."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from ckptq.checkpoint import Component, Reader, SourceTensor, TensorSpec
from ckptq.errors import DataError
from ckptq.folder import printable
from ckptq.tensors import TORCH_DTYPES
from ckptq.validators.coding import Coding, decode, find_coding
from ckptq.validators.rounding import Coded, load
from ckptq.validators.scales import block_of, scale_kind

PIECE = 1 << 18
"""Weights that are decoded at a time."""


class Decoded(Reader):
    """Reads weights as BF16 from a component that `decoded` has looked through. Everything else as it is stored."""

    def __init__(self, root: Path, component: Component, codings: Mapping[str, Coding]) -> None:
        super().__init__(root, component)
        self._codings = codings
        self._scales: dict[str, Coded] = {}

    def read_into(self, tensor: SourceTensor, start: int, buffer: memoryview) -> None:
        """As Reader.read_into. Raises DataError for scales that are not finite."""
        coding = self._codings.get(tensor.spec.name)
        if coding is None:
            super().read_into(tensor, start, buffer)
            return
        coded = self._coded(tensor.spec.name, coding)
        columns, out = tensor.spec.shape[-1], torch.frombuffer(buffer, dtype=torch.bfloat16)
        at, done = start // 2, 0
        while done < len(out):  # whole rows where there are any, else what is left of one
            top, left = divmod(at + done, columns)
            rows = max(1, min((len(out) - done) // columns, PIECE // columns)) if left == 0 else 1
            width = min(columns - left, len(out) - done) if rows == 1 else columns
            values = self._values(coding, coded, top, top + rows, left, left + width)
            out[done : done + rows * width].copy_(torch.from_numpy(values))
            done += rows * width

    def _values(self, coding: Coding, coded: Coded, top: int, bottom: int, left: int, right: int) -> Any:
        """F32 [(bottom - top) * (right - left)]: several rows are whole ones, and in one row of blocks or under own scales."""
        grid, packed = coded.grid, coding.number.packed
        if bottom - top > 1 and grid.high > 1:
            edge = min(bottom, (top // grid.high + 1) * grid.high)
            if edge < bottom:
                parts = (
                    self._values(coding, coded, top, edge, left, right),
                    self._values(coding, coded, edge, bottom, left, right),
                )
                return np.concatenate(parts)
        first = (top * grid.columns + left) // packed
        count = (bottom - top) * (right - left)
        skip = left % packed
        codes = memoryview(bytearray(-(-(count + skip) // packed)))
        self.read_stored(coding.codes, first, codes)
        values = np.empty(len(codes) * packed, np.float32)
        decode(codes, values, coding.number)
        flat = values[skip : skip + count].reshape(bottom - top, right - left)
        return (flat * coded.over(self._stored, top, bottom, left, right)).reshape(-1)

    @property
    def _stored(self) -> Reader:
        return _AsStored(self)

    def _coded(self, name: str, coding: Coding) -> Coded:
        if name not in self._scales:
            found = load(coding, self._stored)
            if found is None:
                raise DataError(f"{printable(coding.local.spec.name)}: scales that are not finite, or no factor")
            self._scales[name] = found
        return self._scales[name]


class _AsStored(Reader):
    """The same files, for who reads codes and scales."""

    def __init__(self, reader: Reader) -> None:
        self._files = reader._files
        self._dequantizer = self._transposer = None


def decoded(component: Component) -> tuple[Component, dict[str, Coding]]:
    """(the component with BF16 weights in place of codes and without scales, how each of them is stored).

    Raises DataError for codes without scales that fit them.
    """
    block = block_of(component.config)
    codings: dict[str, Coding] = {}
    tensors: dict[str, SourceTensor] = {}
    for name, tensor in component.tensors.items():
        coding = find_coding(tensor, component.tensors, block)
        if coding is not None:
            plain = name.removesuffix("_packed")
            shape = coding.number.shape(tensor.spec.shape)
            codings[plain] = coding
            tensors[plain] = SourceTensor(TensorSpec(plain, "BF16", shape), tensor.file, tensor.offset)
        elif scale_kind(name):
            continue
        elif tensor.spec.dtype not in TORCH_DTYPES or tensor.spec.dtype.startswith("F8"):
            raise DataError(f"{printable(name)}: {tensor.spec.dtype} without scales that say what its codes stand for")
        else:
            tensors[name] = tensor
    return dataclasses.replace(component, tensors=MappingProxyType(tensors)), codings
