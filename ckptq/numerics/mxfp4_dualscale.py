"""MXFP4 under two scales: E2M1 under a power of two for 32 columns, under a float32 scale for 512: value ~ code * fine * coarse.

As Ascend's kernels have it: CANN ops-nn, aclnnDynamicDualLevelMxQuant and aclnnDualLevelQuantMatmulWeightNz. The coarse scale is
amax / 6, so that the largest of 512 values has the largest code. vLLM-Omni 0.30.0 (quantization/mxfp4_config.py
NPUMxfp4DualScaleLinearMethod) wants codes as numbers in E4M3, which has all of E2M1's, and packs them as it loads.
"""

from __future__ import annotations

import torch

from ckptq.numerics import Desk, e2m1, mx, patterns
from ckptq.schemes import Scheme

COLUMNS = 512
_FINE = COLUMNS // mx.COLUMNS
_LEAST = 2.0**-126
"""What is divided by at least: of all-zero groups under a small coarse scale the product of both is zero."""


def encode(
    values: torch.Tensor, scheme: Scheme, whole: float | None, codes: torch.Tensor, scales: torch.Tensor | None, desk: Desk
) -> None:
    """codes = values / (fine * coarse), rounded to nearest even; scales are the coarse ones, 1 where all is zero.

    Without `scales` the fine ones are what is asked for, as codes U8 [r, k / 32].
    """
    r, k = values.shape
    sizes = desk.take("values", values.numel(), torch.float32)
    groups = sizes.view(values.shape).copy_(patterns.magnitudes(values, desk).view(values.dtype)).view(-1, mx.COLUMNS)
    tops = groups.amax(1).view(r, -1)
    parts = torch.split(tops, _FINE, dim=1)
    coarse = torch.stack([part.amax(1) for part in parts], 1).div_(desk.number("six", e2m1.MAX))
    coarse.masked_fill_(coarse == 0, 1.0)
    spread = coarse.repeat_interleave(_FINE, 1)[:, : k // mx.COLUMNS]
    fine = desk.take("fine", tops.numel(), torch.uint8)
    mx.exponents(tops.div_(spread).view(-1), 2, 1.75, fine)
    if scales is None:
        codes.view(-1).copy_(fine)
        return
    scales.copy_(coarse)
    groups.div_(multipliers(fine.view(r, -1), coarse).clamp_(min=_LEAST).view(-1, 1))
    packed = desk.take("packed", values.numel() // 2, torch.uint8).view(r, k // 2)
    e2m1.pack(sizes.view(values.shape), values, packed, desk)
    codes.copy_(e2m1.unpack(packed))


def multipliers(fine: torch.Tensor, coarse: torch.Tensor) -> torch.Tensor:
    """What codes are multiplied with, F32 [r, k / 32], of fine scales U8 [r, k / 32] and coarse ones F32 [r, ceil(k / 512)]."""
    return mx.powers(fine).mul_(coarse.repeat_interleave(_FINE, 1)[:, : fine.shape[1]])


def decode(codes: torch.Tensor, scheme: Scheme, whole: float | None, scales: torch.Tensor | None) -> torch.Tensor:
    """code * scale, with `scales` as `multipliers` gives them."""
    assert scales is not None
    values = codes.float()
    values.view(-1, mx.COLUMNS).mul_(scales.reshape(-1, 1))
    return values
