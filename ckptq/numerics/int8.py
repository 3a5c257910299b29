"""INT8, symmetric, under one scale a channel or a tensor: value ~ code * scale."""

from __future__ import annotations

import torch

from ckptq.numerics import Desk, patterns
from ckptq.schemes import Scheme

STEPS = 127.5
"""From zero to the amax, which then is half a step from 127 or from -128: no further than others may be from their codes.

With 127 steps the amax is exact and every step 0.4 % longer, so that the squared error is 0.8 % larger. compressed-tensors 0.17
(quantization/utils/helpers.py calculate_qparams) has 127.5 too.
"""


def encode(
    values: torch.Tensor, scheme: Scheme, whole: float | None, codes: torch.Tensor, scales: torch.Tensor | None, desk: Desk
) -> None:
    """codes = values / scale, rounded to nearest even, at most 127; scale is amax / 127.5, and 1 for an all-zero row.

    Without local scales there is the one of the whole tensor.
    """
    rows = desk.take("values", values.numel(), torch.float32).view(values.shape)
    if scales is None:
        assert whole is not None
        scales = desk.number("whole", whole)
    else:
        exact = patterns.amax(values, desk).div_(desk.number("steps", STEPS))
        scales.view(-1).copy_(exact.masked_fill_(exact == 0, 1.0))
    codes.copy_(rows.copy_(values).div_(scales).round_().clamp_(-128.0, 127.0))


def decode(codes: torch.Tensor, scheme: Scheme, whole: float | None, scales: torch.Tensor | None) -> torch.Tensor:
    """code * scale."""
    return codes.float().mul_(scales if scales is not None else torch.tensor(whole, dtype=torch.float32))
