"""The shared exponents of MXFP8 and MXFP4: one power of two for 32 columns, stored as E8M0 (the exponent plus 127 in a byte)."""

from __future__ import annotations

import torch

COLUMNS = 32


def exponents(amax: torch.Tensor, emax: int, limit: float, scales: torch.Tensor) -> None:
    """scales U8 = the smallest exponents under which `amax` F32 stays within `limit` * 2 ** emax; 0 gives 2 ** 0."""
    spare = (1 << 23) - 1 - int((limit - 1) * (1 << 23))
    found = ((amax.view(torch.int32) + spare) >> 23) - emax
    scales.copy_(torch.where(amax > 0, found.clamp_(1, 254), 127))


def powers(scales: torch.Tensor) -> torch.Tensor:
    """2 ** (byte - 127), F32."""
    return torch.where(scales > 0, (scales.to(torch.int32) << 23), 1 << 22).view(torch.float32)
