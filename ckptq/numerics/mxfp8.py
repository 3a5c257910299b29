"""MXFP8: E4M3 under a power of two for 32 columns."""

from __future__ import annotations

import torch

from ckptq.numerics import Desk, fp8, mx
from ckptq.schemes import Scheme


def encode(
    values: torch.Tensor, scheme: Scheme, whole: float | None, codes: torch.Tensor, scales: torch.Tensor | None, desk: Desk
) -> None:
    """codes = values / 2 ** exponent, rounded to nearest even; up to 464 become 448, as they would if 480 had a code."""
    assert scales is not None
    groups = desk.take("values", values.numel(), torch.float32).view(-1, mx.COLUMNS)
    groups.view(values.shape).copy_(values)
    sizes = desk.take("sizes", values.numel(), torch.float32).view(-1, mx.COLUMNS)
    powers = scales.view(-1)
    mx.exponents(torch.abs(groups, out=sizes).amax(1), 8, 1.8125, powers)
    codes.copy_(groups.div_(mx.powers(powers)[:, None]).view(values.shape))


def decode(codes: torch.Tensor, scheme: Scheme, whole: float | None, scales: torch.Tensor | None) -> torch.Tensor:
    """code * 2 ** exponent."""
    assert scales is not None
    values = fp8.numbers(codes)
    values.view(-1, mx.COLUMNS).mul_(mx.powers(scales).view(-1, 1))
    return values
