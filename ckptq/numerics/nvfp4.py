"""NVFP4: E2M1 under an E4M3 scale for 16 columns, under a float32 scale of the whole tensor: value ~ code * local * whole."""

from __future__ import annotations

import torch

from ckptq.numerics import Desk, e2m1, fp8, patterns
from ckptq.schemes import Scheme

COLUMNS = 16
LEAST = 2.0**-9
"""The smallest E4M3 number, for groups too small for any other, all-zero ones too: a scale of 0 makes infinities of quotients."""
_TINY, _LARGEST = 0x07, 0x7E
"""Codes of the scales that may take the nearest one's place. From the first on, neighbors are at most an eighth apart."""


def encode(
    values: torch.Tensor, scheme: Scheme, whole: float | None, codes: torch.Tensor, scales: torch.Tensor | None, desk: Desk
) -> None:
    """codes = values / (local * whole), rounded to nearest even.

    local is one of the two E4M3 numbers around amax / (6 * whole): the one with the smaller squared error. ModelOpt 0.47.0
    (torch/quantization/qtensor/nvfp4_tensor.py) and compressed-tensors 0.17 (quantization/utils/helpers.py calculate_qparams) take
    the nearest, after roundings of their own; the squared error is 13 % smaller with the choice, for weights that are near normal.
    """
    assert scales is not None
    assert whole is not None
    sizes = desk.take("values", values.numel(), torch.float32)
    found = patterns.magnitudes(values, desk).view(-1, COLUMNS)
    groups = sizes.view(-1, COLUMNS).copy_(found.view(values.dtype))
    exact = found.amax(1).view(values.dtype).float().div_(desk.number("full", e2m1.MAX * whole)).clamp_(LEAST, fp8.MAX)
    local = scales.view(-1)
    local.copy_(exact)
    _choose(groups, exact, local, whole, desk)
    groups.div_(fp8.numbers(local).mul_(whole)[:, None])
    e2m1.pack(sizes.view(values.shape), values, codes, desk)


def _choose(groups: torch.Tensor, exact: torch.Tensor, local: torch.Tensor, whole: float, desk: Desk) -> None:
    """Replaces `local` F8_E4M3 [g], the nearest to `exact`, by the number on the other side where the squared error is smaller."""
    nearest = local.view(torch.uint8)
    first = fp8.numbers(local)
    other = (first <= exact).view(torch.uint8).mul_(2).sub_(1).add_(nearest).clamp_(_TINY, _LARGEST)
    second = fp8.numbers(other.view(torch.float8_e4m3fn))
    error = _errors(groups, first * whole, desk).mul_(first).mul_(first)
    better = _errors(groups, second * whole, desk).mul_(second).mul_(second) < error
    nearest.add_(other.sub_(nearest).mul_(better.view(torch.uint8)))


def _errors(groups: torch.Tensor, divisors: torch.Tensor, desk: Desk) -> torch.Tensor:
    """The sum of the squared rounding errors of quotients |values| / divisor below 7, in 1 / 32: F32 [g] of F32 [g, 16].

    In fixed point: bytes are quick, and sums of integers are the same in any order, so on every device. Quotients of 7 and more,
    which only the two least scales have, count too little, and leave those in place.
    """
    quotients = desk.take("line", groups.numel(), torch.float32).view(groups.shape)
    torch.div(groups, divisors.mul_(1 / 32)[:, None], out=quotients).add_(e2m1.INTEGERS)
    fixed = desk.take("low", groups.numel(), torch.uint8).view(groups.shape).copy_(quotients.view(torch.int32))
    # Steps are 1/2 up to 2, 1 up to 4, 2 from there. A part beyond its range stays at the range's end, where the error is none.
    total = desk.take("next", groups.numel(), torch.uint8).view(groups.shape)
    part = desk.take("signs", groups.numel(), torch.uint8).view(groups.shape)
    torch.clamp(fixed, max=64, out=total).add_(8).bitwise_and_(15)
    total.add_(torch.clamp(fixed, 64, 128, out=part).add_(16).bitwise_and_(31))
    total.add_(fixed.clamp_(min=128).add_(32).bitwise_and_(63)).sub_(8 + 16 + 32)
    quotients.copy_(total.view(torch.int8))
    return torch.mv(quotients.mul_(quotients), desk.take("ones", COLUMNS, torch.float32).fill_(1))


def decode(codes: torch.Tensor, scheme: Scheme, whole: float | None, scales: torch.Tensor | None) -> torch.Tensor:
    """code * (local * whole)."""
    assert scales is not None
    assert whole is not None
    values = e2m1.unpack(codes)
    values.view(-1, COLUMNS).mul_(fp8.numbers(scales).mul_(whole).view(-1, 1))
    return values
