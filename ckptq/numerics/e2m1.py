"""E2M1, the four bits of NVFP4 and MXFP4: sign, two of exponent, one of mantissa. Two codes a byte, the first in the low nibble."""

from __future__ import annotations

import torch

from ckptq.numerics import Desk, patterns

MAX = 6.0
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of the codes 0 to 7; bit 3 is the sign."""

INTEGERS = 1.5 * 2.0**23
"""From 2 ** 23 to 2 ** 24 a float32 has no fraction: an addition rounds to nearest even, and the sum ends in the integer's bits."""


def pack(quotients: torch.Tensor, values: torch.Tensor, codes: torch.Tensor, desk: Desk) -> None:
    """codes [r, k / 2] U8 = the E2M1 numbers nearest to `quotients` F32 [r, k], the even code of two at the same distance.

    `quotients`, magnitudes, are used up. The signs are those of `values` [r, k] BF16, F16 or F32. What is above 6 becomes 6.
    """
    # The code is a concave function of the magnitude with slopes 2, 1 and 1/2: the least of three lines, each rounded.
    line = desk.take("line", quotients.numel(), torch.float32).view(quotients.shape)
    low = desk.take("low", quotients.numel(), torch.uint8).view(quotients.shape)
    next_ = desk.take("next", quotients.numel(), torch.uint8).view(quotients.shape)
    low.copy_(torch.add(desk.number("integers", INTEGERS), quotients, alpha=2, out=line).view(torch.int32))
    next_.copy_(torch.add(quotients, INTEGERS + 2, out=line).view(torch.int32))
    torch.minimum(low, next_, out=low)
    next_.copy_(quotients.mul_(0.5).add_(INTEGERS + 4).view(torch.int32))
    torch.minimum(low, next_, out=low).clamp_(max=7).bitwise_or_(patterns.signs(values, desk))
    pairs = low.view(torch.int16)
    both = desk.take("patterns", pairs.numel(), torch.int16).view(pairs.shape)
    codes.copy_(torch.bitwise_right_shift(pairs, 4, out=both).bitwise_or_(pairs))


def unpack(codes: torch.Tensor) -> torch.Tensor:
    """The numbers of packed codes U8 [r, k / 2]: F32 [r, k]."""
    wide = codes.to(torch.int32)
    # Placed as a float16's sign and last exponent and mantissa bits, two in an int32: E2M1 but for the bias, subnormals too.
    both = (wide & 0x7) << 9 | (wide & 0x8) << 12 | (wide & 0x70) << 21 | (wide & 0x80) << 24
    return both.view(torch.float16).float().mul_(2.0**14)
