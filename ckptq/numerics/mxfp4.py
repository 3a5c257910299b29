"""MXFP4: E2M1 under a power of two for 32 columns."""

from __future__ import annotations

import torch

from ckptq.numerics import Desk, e2m1, mx
from ckptq.schemes import Scheme


def encode(
    values: torch.Tensor, scheme: Scheme, whole: float | None, codes: torch.Tensor, scales: torch.Tensor | None, desk: Desk
) -> None:
    """codes = values / 2 ** exponent, rounded to nearest even."""
    assert scales is not None
    groups = values.float().view(-1, mx.COLUMNS)
    exponents = scales.view(-1)
    mx.exponents(groups.abs().amax(1), 2, 1.75, exponents)
    e2m1.pack(groups / mx.powers(exponents)[:, None], codes.view(-1, mx.COLUMNS // 2), desk)


def decode(codes: torch.Tensor, scheme: Scheme, whole: float | None, scales: torch.Tensor | None) -> torch.Tensor:
    """code * 2 ** exponent."""
    assert scales is not None
    return e2m1.unpack(codes) * mx.powers(scales).repeat_interleave(mx.COLUMNS, 1)
