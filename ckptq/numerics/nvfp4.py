"""NVFP4: E2M1 under an E4M3 scale for 16 columns, under a float32 scale of the whole tensor: value ~ code * local * whole."""

from __future__ import annotations

import torch

from ckptq.numerics import Desk, e2m1
from ckptq.schemes import Scheme

COLUMNS = 16
LEAST = 2.0**-9
"""The smallest E4M3 number: a scale of 0 would make NaN of a group that is not all zero."""


def encode(
    values: torch.Tensor, scheme: Scheme, whole: float | None, codes: torch.Tensor, scales: torch.Tensor | None, desk: Desk
) -> None:
    """local = amax / 6 / whole, codes = values / (local * whole), rounded to nearest even; local is 1 for an all-zero group."""
    assert scales is not None
    assert whole is not None
    groups = values.float().view(-1, COLUMNS)
    amax = groups.abs().amax(1)
    local = scales.view(-1)
    local.copy_(torch.where(amax > 0, (amax / 6 / whole).clamp_(LEAST, 448.0), 1.0))
    e2m1.pack(groups / (local.float() * whole)[:, None], codes.view(-1, COLUMNS // 2), desk)


def decode(codes: torch.Tensor, scheme: Scheme, whole: float | None, scales: torch.Tensor | None) -> torch.Tensor:
    """code * (local * whole)."""
    assert scales is not None
    assert whole is not None
    return e2m1.unpack(codes) * (scales.float() * whole).repeat_interleave(COLUMNS, 1)
