"""FP8 E4M3 ("fn": no infinity, largest finite 448), under one scale a tensor, a channel or a block: value ~ code * scale.

Arithmetic is float32 throughout. ModelOpt 0.47.0 divides in bfloat16 (torch/quantization/qtensor/fp8_tensor.py by way of
export/quant_utils.py), which rounds twice and changes 3-4 % of the codes.
"""

from __future__ import annotations

import math

import torch

from ckptq.numerics import Desk
from ckptq.schemes import Scheme

MAX = 448.0


def amax(values: torch.Tensor) -> float:
    """The largest magnitude in `values` (any shape, BF16/F16/F32). NaN if any is NaN, inf if any is infinite."""
    low, high = torch.aminmax(values)
    return float(torch.maximum(-low, high))


def scale(largest: float, limit: float = MAX) -> float:
    """The float32 scale for an amax: amax / limit, or 1 for an all-zero tensor, whose codes are then all zero.

    Raises ValueError for an amax that is negative, NaN or infinite.
    """
    if not math.isfinite(largest) or largest < 0:
        raise ValueError(f"an amax must be finite and not negative, found {largest}")
    quotient = torch.tensor(largest, dtype=torch.float32) / limit
    return float(quotient) or 1.0


def encode(
    values: torch.Tensor, scheme: Scheme, whole: float | None, codes: torch.Tensor, scales: torch.Tensor | None, desk: Desk
) -> None:
    """codes = values / scale, rounded to nearest even. A quotient that float32 rounds up to just above 448 still becomes 448."""
    scratch = desk.take("values", values.numel(), torch.float32).view(values.shape)
    scratch.copy_(values)
    if scales is None:
        assert whole is not None
        scratch.div_(whole)
    else:
        rows, columns = scheme.rows or 1, scheme.columns or values.shape[1]
        wide = _spread(scratch.abs(), rows, columns, scales)
        scratch.div_(wide)
    codes.copy_(scratch)


def _spread(magnitudes: torch.Tensor, rows: int, columns: int, scales: torch.Tensor) -> torch.Tensor:
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            top = magnitudes[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns].amax()
            scales[i, j] = torch.where(top > 0, top / MAX, torch.ones_like(top))
    n, k = magnitudes.shape
    return scales.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]


def decode(codes: torch.Tensor, scheme: Scheme, whole: float | None, scales: torch.Tensor | None) -> torch.Tensor:
    """code * scale."""
    values = codes.float()
    if scales is None:
        assert whole is not None
        return values * whole
    n, k = values.shape
    return values * scales.repeat_interleave(scheme.rows or 1, 0)[:n].repeat_interleave(scheme.columns or k, 1)[:, :k]
