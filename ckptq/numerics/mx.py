"""What MXFP8 and MXFP4 share: one power of two for 32 columns, stored as E8M0, its exponent plus 127 in a byte."""

from __future__ import annotations

import torch

COLUMNS = 32


def exponents(amax: torch.Tensor, emax: int, limit: float, scales: torch.Tensor) -> None:
    """scales U8 [g] = the least exponents that leave `amax` F32 [g] at most limit * 2 ** emax.

    emax   of the codes' largest number
    limit  of its significand: where it would round to more with an exponent to spare. A smaller limit doubles the scale of groups
           that lose by it in their small values and gain nothing in their large ones; a larger one saturates what has a code.

    ModelOpt 0.47.0 (torch/quantization/qtensor/mxfp8_tensor.py, mxfp4_tensor.py: the ceiling of log2) stops at the largest number
    itself, compressed-tensors 0.17 (quantization/utils/mxfp_utils.py) at 1.75 or just below it. Both have errors at least as large.
    The least byte is 1, for all-zero groups too: kernels that build the power by a shift read 0 in byte 0.
    """
    spare = (1 << 23) - 1 - int((limit - 1) * (1 << 23))
    scales.copy_(amax.view(torch.int32).add(spare).bitwise_right_shift_(23).sub_(emax).clamp_(1, 254))


def powers(scales: torch.Tensor) -> torch.Tensor:
    """2 ** (byte - 127): F32 of U8."""
    return scales.to(torch.int32).bitwise_left_shift_(23).clamp_(min=1 << 22).view(torch.float32)
