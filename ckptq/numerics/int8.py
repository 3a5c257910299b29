"""INT8, symmetric, under one scale a channel: value ~ code * scale."""

from __future__ import annotations

import torch

from ckptq.numerics import Desk
from ckptq.schemes import Scheme

STEPS = 127.5


def encode(
    values: torch.Tensor, scheme: Scheme, whole: float | None, codes: torch.Tensor, scales: torch.Tensor | None, desk: Desk
) -> None:
    """codes = values / scale, rounded to nearest even; scale is 1 for an all-zero row."""
    assert scales is not None
    rows = values.float()
    amax = rows.abs().amax(1, keepdim=True)
    scales.copy_(torch.where(amax > 0, amax / STEPS, 1.0))
    codes.copy_((rows / scales).round_().clamp_(-128, 127))


def decode(codes: torch.Tensor, scheme: Scheme, whole: float | None, scales: torch.Tensor | None) -> torch.Tensor:
    """code * scale."""
    assert scales is not None
    return codes.float() * scales
