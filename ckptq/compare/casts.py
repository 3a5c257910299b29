"""Activations to FP8 codes and back, in float32: what ckptq/numerics/fp8.py makes of them, to the bit, without making the codes."""

from __future__ import annotations

import torch

from ckptq.numerics.fp8 import MAX

PIECE = 1 << 18
"""Values at a time on a CPU: float32 copies of them stay in its cache."""
_EXPONENT, _SMALLEST = 0x7F800000, (127 - 6) << 23
"""Float32's exponent bits, and those of 2^-6, below which E4M3's steps get no smaller."""
_STEPS = 1.5 * 2.0**20


def step_of(values: torch.Tensor) -> int:
    """How many values to take at a time: all of them on a GPU, which has its speed from many."""
    return PIECE if values.device.type == "cpu" else max(values.numel(), 1)


def through_fp8(values: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Values [..., k] as E4M3 codes times their scale, in their own dtype: rounded once to codes, once to that dtype.

    scale  of all of them, beyond 448 times which servers saturate; None for one of each row, amax / 448, or 1 where all is zero
    """
    rows = values.reshape(-1, values.shape[-1]).contiguous()
    found = torch.empty_like(rows)
    step = max(step_of(rows) // max(rows.shape[1], 1), 1)
    whole = None if scale is None else torch.full((), scale, device=rows.device)  # a number would be inverted on CUDA
    for part, out in zip(torch.split(rows, step), torch.split(found, step), strict=True):
        wide = part.float() if part.dtype != torch.float32 else part.clone()
        scales = _row_scales(part) if whole is None else whole
        out.copy_(_nearest(wide.div_(scales).clamp_(-MAX, MAX)).mul_(scales))
    return found.view(values.shape)


def _row_scales(rows: torch.Tensor) -> torch.Tensor:
    """F32 [r, 1]."""
    exact = rows.abs().amax(1, keepdim=True).float() / torch.full((), MAX, device=rows.device)
    return exact.masked_fill_(exact == 0, 1.0)


def _nearest(values: torch.Tensor) -> torch.Tensor:
    """The E4M3 numbers nearest to F32 `values` of at most 448, in their place; of two the even one, NaN where they are NaN.

    Between 2^e and 2^(e+1) E4M3's numbers are 2^(e-3) apart. So are float32's at 1.5 * 2^(e+20), where the sum is rounded.
    """
    steps = values.view(torch.int32).bitwise_and(_EXPONENT).clamp_(min=_SMALLEST).view(torch.float32).mul_(_STEPS)
    return values.add_(steps).sub_(steps)
