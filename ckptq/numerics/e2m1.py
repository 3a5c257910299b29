"""E2M1, the four bits of NVFP4 and MXFP4: sign, two of exponent, one of mantissa. Two codes a byte, the first in the low nibble."""

from __future__ import annotations

import torch

from ckptq.numerics import Desk

MAX = 6.0
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of the codes 0 to 7; bit 3 is the sign."""


def pack(quotients: torch.Tensor, codes: torch.Tensor, desk: Desk) -> None:
    """codes [.., k / 2] U8 = the E2M1 values nearest to `quotients` [.., k] F32, the even code of two at one distance."""
    size = quotients.abs()
    # The code is a concave function of the magnitude with slopes 2, 1 and 1/2: the least of three lines, each rounded to even.
    code = torch.minimum((size * 2).round_(), size.round() + 2)
    code = torch.minimum(code, (size / 2).round_() + 4).clamp_(max=7).to(torch.uint8)
    code += torch.signbit(quotients).to(torch.uint8) * 8
    torch.add(code[..., 0::2], code[..., 1::2] * 16, out=codes)


def unpack(codes: torch.Tensor) -> torch.Tensor:
    """The values of packed codes [.., k / 2] U8: F32 [.., k]."""
    table = torch.tensor([*VALUES, *(-v for v in VALUES)], dtype=torch.float32, device=codes.device)
    return table[torch.stack([codes & 15, codes >> 4], -1).flatten(-2).long()]
