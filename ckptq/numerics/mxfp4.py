"""MXFP4: E2M1 under a power of two for 32 columns."""

from __future__ import annotations

import torch

from ckptq.numerics import Desk, e2m1, mx, patterns
from ckptq.schemes import Scheme


def encode(
    values: torch.Tensor, scheme: Scheme, whole: float | None, codes: torch.Tensor, scales: torch.Tensor | None, desk: Desk
) -> None:
    """codes = values / 2 ** exponent, rounded to nearest even; up to 7 become 6, as they would if 8 had a code."""
    assert scales is not None
    sizes = desk.take("values", values.numel(), torch.float32)
    groups = sizes.view(values.shape).copy_(patterns.magnitudes(values, desk).view(values.dtype)).view(-1, mx.COLUMNS)
    powers = scales.view(-1)
    mx.exponents(groups.amax(1), 2, 1.75, powers)
    groups.div_(mx.powers(powers)[:, None])
    e2m1.pack(sizes.view(values.shape), values, codes, desk)


def decode(codes: torch.Tensor, scheme: Scheme, whole: float | None, scales: torch.Tensor | None) -> torch.Tensor:
    """code * 2 ** exponent."""
    assert scales is not None
    values = e2m1.unpack(codes)
    values.view(-1, mx.COLUMNS).mul_(mx.powers(scales).view(-1, 1))
    return values
