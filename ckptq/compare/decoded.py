"""A quantized checkpoint seen as what its server multiplies with: every weight decoded, code * scale, rounded once to BF16."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import MappingProxyType

import torch

from ckptq.checkpoint import Component, Reader, SourceTensor, TensorSpec
from ckptq.compare.again import Scales, round_again, rounded_again
from ckptq.compare.held import PIECE, Area, Desk, Held, decode_area, hold
from ckptq.errors import DataError
from ckptq.folder import printable
from ckptq.tensors import TORCH_DTYPES
from ckptq.threads import in_order
from ckptq.validators.coding import find_coding, number_of
from ckptq.validators.expected import Expected
from ckptq.validators.scales import block_of, scale_kind

PART = 1 << 22
"""Values that one thread decodes in one go."""
ALONE = 1 << 15
"""Values that torch rounds in the thread that asks: more it would share out among threads of its own."""


class Decoded(Reader):
    """Reads the weights of `stored` as BF16, by the names and shapes that `decoded` gives them; all else as it is stored."""

    def __init__(self, root: Path, component: Component, stored: Component, at: Expected | None = None) -> None:
        """`at`: what the server builds, which rounds some weights a second time.

        Raises DataError for codes whose scales are not there, not finite or no factor.
        """
        super().__init__(root, component)
        self._stored = Reader(root, stored)
        self._held: dict[str, Held] = {}
        self._again: dict[str, Scales] = {}
        try:
            self._again = rounded_again(stored, at, self._stored) if at is not None else {}
            for name in component.tensors:
                if (codes := stored.tensors.get(name, stored.tensors.get(f"{name}_packed"))) is not None and is_coded(
                    codes, stored
                ):
                    held = hold(codes, stored, self._stored)
                    if isinstance(held, str):
                        raise DataError(
                            f"{printable(codes.spec.name)}: {held}", hint="`ckptq validate` says what its server makes of it"
                        )
                    self._held[name] = held
        except BaseException:
            self.close()
            raise

    def read_into(self, tensor: SourceTensor, start: int, buffer: memoryview) -> None:
        """As Reader.read_into. `start` is even, and of codes in pairs a multiple of four."""
        held = self._held.get(tensor.spec.name)
        if held is None:
            super().read_into(tensor, start, buffer)
            return
        out, first = torch.frombuffer(buffer, dtype=torch.bfloat16), start // 2
        jobs = (range(first + at, first + min(at + PART, len(out))) for at in range(0, len(out), PART))
        again = self._again.get(tensor.spec.name)
        if len(out) <= PART:
            _decode(held, again, range(first, first + len(out)), out, Desk())
            return
        for _ in in_order(lambda job, desk: _decode(held, again, job, out[job.start - first :], desk), jobs, Desk):
            pass

    def close(self) -> None:
        self._stored.close()
        super().close()


def _decode(held: Held, again: Scales | None, places: range, out: torch.Tensor, desk: Desk) -> None:
    """Fills `out` with the values at these places of the flat tensor."""
    at = places.start
    while at < places.stop:
        top, left = divmod(at, held.columns)
        rows = min(places.stop - at, PIECE) // held.columns
        if left or not rows:  # a part of a row
            area = Area(top, top + 1, left, min(held.columns, left + PIECE, left + places.stop - at))
        else:
            area = Area(top, top + rows, 0, held.columns)
        exact = torch.split(torch.from_numpy(decode_area(held, area, desk)), ALONE)
        for values, rounded in zip(exact, torch.split(out[at - places.start :][: area.count], ALONE), strict=True):
            rounded.copy_(values if again is None else round_again(values, again))
        at += area.count


def is_coded(tensor: SourceTensor, component: Component) -> bool:
    """Whether it is a weight in codes, with scales beside it."""
    return find_coding(tensor, component.tensors, block_of(component.config)) is not None


def decoded(component: Component) -> Component:
    """The component with BF16 weights in place of codes, and without scales. Raises DataError for codes without scales that fit."""
    tensors: dict[str, SourceTensor] = {}
    for name, tensor in component.tensors.items():
        number = number_of(tensor)
        if number is not None and is_coded(tensor, component):
            plain = name.removesuffix("_packed")
            tensors[plain] = SourceTensor(TensorSpec(plain, "BF16", number.shape(tensor.spec.shape)), tensor.file, tensor.offset)
        elif scale_kind(name):
            continue
        elif tensor.spec.dtype not in TORCH_DTYPES or tensor.spec.dtype.startswith("F8"):
            raise DataError(f"{printable(name)}: {tensor.spec.dtype} without scales that say what its codes stand for")
        else:
            tensors[name] = tensor
    return dataclasses.replace(component, tensors=MappingProxyType(tensors))
