"""NVFP4: E2M1 under an E4M3 scale for 16 columns, under a float32 scale of the whole tensor: value ~ code * local * whole."""

from __future__ import annotations

import torch

from ckptq.numerics import Desk, e2m1, fp8, patterns
from ckptq.schemes import Scheme

COLUMNS = 16
LEAST = 2.0**-9
"""The smallest E4M3 number, for groups too small for any other, all-zero ones too: a scale of 0 makes infinities of quotients."""


def encode(
    values: torch.Tensor, scheme: Scheme, whole: float | None, codes: torch.Tensor, scales: torch.Tensor | None, desk: Desk
) -> None:
    """local = amax / (6 * whole), codes = values / (local * whole), rounded to nearest even."""
    assert scales is not None
    assert whole is not None
    sizes = desk.take("values", values.numel(), torch.float32)
    found = patterns.magnitudes(values, desk).view(-1, COLUMNS)
    groups = sizes.view(-1, COLUMNS).copy_(found.view(values.dtype))
    amax = found.amax(1).view(values.dtype).float()
    local = scales.view(-1)
    local.copy_(amax.div_(desk.number("full", e2m1.MAX * whole)).clamp_(LEAST, fp8.MAX))
    groups.div_(fp8.numbers(local).mul_(whole)[:, None])
    e2m1.pack(sizes.view(values.shape), values, codes, desk)


def decode(codes: torch.Tensor, scheme: Scheme, whole: float | None, scales: torch.Tensor | None) -> torch.Tensor:
    """code * (local * whole)."""
    assert scales is not None
    assert whole is not None
    values = e2m1.unpack(codes)
    values.view(-1, COLUMNS).mul_(fp8.numbers(scales).mul_(whole).view(-1, 1))
    return values
