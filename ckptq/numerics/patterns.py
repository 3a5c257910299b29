"""Bit patterns of floats, as integers: without the sign they are in the order of the magnitudes, and quicker to compare."""

from __future__ import annotations

import torch

from ckptq.numerics import Desk


def magnitudes(values: torch.Tensor, desk: Desk) -> torch.Tensor:
    """The patterns of |values|, of any shape, in scratch: I16 for BF16 and F16, I32 for F32."""
    integers, mask = (torch.int32, 0x7FFFFFFF) if values.element_size() == 4 else (torch.int16, 0x7FFF)
    found = desk.take("patterns", values.numel(), integers).view(values.shape)
    return torch.bitwise_and(values.view(integers), mask, out=found)


def amax(values: torch.Tensor, desk: Desk) -> torch.Tensor:
    """The largest magnitude of each row: F32 [r] of [r, k]."""
    return magnitudes(values, desk).amax(1).view(values.dtype).float()


def signs(values: torch.Tensor, desk: Desk) -> torch.Tensor:
    """U8, 8 where the sign bit is set and 0 where not, in scratch. Takes the place of `magnitudes`."""
    integers = torch.int32 if values.element_size() == 4 else torch.int16
    found = desk.take("patterns", values.numel(), integers).view(values.shape)
    torch.bitwise_right_shift(values.view(integers), values.element_size() * 8 - 4, out=found)
    return desk.take("signs", values.numel(), torch.uint8).view(values.shape).copy_(found).bitwise_and_(8)
