"""Number formats: one module each, with the functions of `Numerics`. Pure functions over tensors on any device.

A weight [n, k] is encoded in bands of whole rows, as many as fit the buffers; no band knows another, so any thread may take any.
"""

from __future__ import annotations

import importlib
from typing import Protocol, cast

import torch

from ckptq.schemes import Scheme


class Desk:
    """Scratch tensors of one thread, kept from band to band: fresh ones would cost page faults, five times the arithmetic."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._held: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialized tensor [numel]; the same memory whenever `name` and `dtype` are the same."""
        held = self._held.get((name, dtype))
        if held is None or held.numel() < numel:
            held = self._held[name, dtype] = torch.empty(numel, dtype=dtype, device=self.device)
        return held[:numel]

    def number(self, name: str, value: float) -> torch.Tensor:
        """F32 [1]. On CUDA a division by a Python number is a multiplication by its inverse; by a tensor it is a division."""
        return self.take(name, 1, torch.float32).fill_(value)


class Numerics(Protocol):
    """A module of this folder."""

    def encode(
        self,
        values: torch.Tensor,
        scheme: Scheme,
        whole: float | None,
        codes: torch.Tensor,
        scales: torch.Tensor | None,
        desk: Desk,
    ) -> None:
        """Fills `codes` and `scales` from a band of rows. Arithmetic is float32.

        values  [r, k] BF16, F16 or F32, finite, contiguous; r is a multiple of scheme.rows except at the end of the weight
        whole   what the server multiplies the whole tensor with, where scheme.limit says that there is such a scale
        codes   [r, k / scheme.packed] in scheme.codes
        scales  [ceil(r / rows), ceil(k / columns)] in scheme.scale, None where the scheme has no local scales
        """

    def decode(self, codes: torch.Tensor, scheme: Scheme, whole: float | None, scales: torch.Tensor | None) -> torch.Tensor:
        """The values as the server holds them, F32 [r, k]."""


def find_numerics(scheme: Scheme) -> Numerics:
    """The module that does a scheme's arithmetic."""
    return cast(Numerics, importlib.import_module(f"{__name__}.{scheme.numerics}"))
