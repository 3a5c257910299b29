"""FP8 E4M3 ("fn": no infinity, largest finite 448), one scale per tensor: value ~ code * scale.

Arithmetic is float32 throughout. ModelOpt 0.47.0 divides in bfloat16 (torch/quantization/qtensor/fp8_tensor.py by way of
export/quant_utils.py), which rounds twice and changes 3-4 % of the codes.
"""

from __future__ import annotations

import math

import torch

MAX = 448.0


def amax(values: torch.Tensor) -> float:
    """The largest magnitude in `values` (any shape, BF16/F16/F32). NaN if any is NaN, inf if any is infinite."""
    low, high = torch.aminmax(values)
    return float(torch.maximum(-low, high))


def scale(largest: float) -> float:
    """The float32 scale for an amax: amax / 448, or 1 for an all-zero tensor, whose codes are then all zero.

    Raises ValueError for an amax that is negative, NaN or infinite.
    """
    if not math.isfinite(largest) or largest < 0:
        raise ValueError(f"an amax must be finite and not negative, found {largest}")
    quotient = torch.tensor(largest, dtype=torch.float32) / MAX
    return float(quotient) or 1.0


def encode(values: torch.Tensor, divisor: float, scratch: torch.Tensor, out: torch.Tensor) -> None:
    """out = E4M3 codes of values / divisor, rounded to nearest even. All three are 1-D and of one length.

    values  [n] BF16/F16/F32     scratch  [n] F32, overwritten     out  [n] float8_e4m3fn, overwritten

    |values| <= 448 * divisor must hold: a quotient that float32 rounds up to just above 448 still becomes 448.
    """
    scratch.copy_(values)
    scratch.div_(divisor)
    out.copy_(scratch)
