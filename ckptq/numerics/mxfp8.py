"""MXFP8: E4M3 under a power of two for 32 columns."""

from __future__ import annotations

import torch

from ckptq.numerics import Desk, mx
from ckptq.schemes import Scheme


def encode(
    values: torch.Tensor, scheme: Scheme, whole: float | None, codes: torch.Tensor, scales: torch.Tensor | None, desk: Desk
) -> None:
    """codes = values / 2 ** exponent, rounded to nearest even."""
    assert scales is not None
    groups = values.float().view(-1, mx.COLUMNS)
    exponents = scales.view(-1)
    mx.exponents(groups.abs().amax(1), 8, 1.8125, exponents)
    codes.view(-1, mx.COLUMNS).copy_((groups / mx.powers(exponents)[:, None]).clamp_(-448, 448))


def decode(codes: torch.Tensor, scheme: Scheme, whole: float | None, scales: torch.Tensor | None) -> torch.Tensor:
    """code * 2 ** exponent."""
    assert scales is not None
    return codes.float() * mx.powers(scales).repeat_interleave(mx.COLUMNS, 1)
