"""FP8 E4M3 ("fn": no infinity, largest finite 448), under one scale a tensor, a channel or a block: value ~ code * scale.

Arithmetic is float32 throughout. ModelOpt 0.47.0 divides in bfloat16 (torch/quantization/qtensor/fp8_tensor.py by way of
export/quant_utils.py), which rounds twice and changes 3-4 % of the codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ckptq.numerics import Desk, patterns
from ckptq.schemes import Scheme

MAX = 448.0
PIECE = 1 << 20
"""Elements of one row of blocks that are encoded at once."""


def amax(values: torch.Tensor) -> float:
    """The largest magnitude in `values` (any shape, BF16/F16/F32). NaN if any is NaN, inf if any is infinite."""
    if values.element_size() == 2 and values.device.type == "cpu":
        # Half the time: the largest signed integer is that of the positive numbers, the largest unsigned that of the negative.
        integers = values.reshape(-1).view(torch.int16).numpy()
        largest = max(int(integers.max()), int(integers.view("uint16").max()) & 0x7FFF)
        return float(torch.tensor([largest], dtype=torch.int16).view(values.dtype))
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
    """codes = values / scale, rounded to nearest even. A quotient that float32 rounds up to just above 448 still becomes 448.

    Local scales are amax / 448, and 1 where all is zero. No quotient but of subnormals comes to 464, from where torch 2.11 on CUDA
    makes NaN and torch 2.13 448.
    """
    if scales is None:
        assert whole is not None
        _divide(values, desk.number("whole", whole), codes, desk)
    elif scheme.rows == 1:
        scales.view(-1).copy_(_scales(patterns.amax(values, desk), desk))
        _divide(values, scales, codes, desk)
    else:
        rows, columns = scheme.rows or len(values), scheme.columns or values.shape[1]
        for top, bottom, left, right in _pieces(values.shape, rows, columns):
            part = (slice(top, bottom), slice(left, right))
            place = scales[top // rows : -(-bottom // rows), left // columns : -(-right // columns)]
            _encode_blocks(values[part], min(rows, bottom - top), columns, codes[part], place, desk)


def _divide(values: torch.Tensor, divisors: torch.Tensor, codes: torch.Tensor, desk: Desk) -> None:
    scratch = desk.take("values", values.numel(), torch.float32).view(values.shape)
    codes.copy_(scratch.copy_(values).div_(divisors))


def _scales(largest: torch.Tensor, desk: Desk) -> torch.Tensor:
    exact = largest.div_(desk.number("limit", MAX))
    return exact.masked_fill_(exact == 0, 1.0)


def _pieces(shape: torch.Size, rows: int, columns: int) -> Iterator[tuple[int, int, int, int]]:
    """(top, bottom, left, right) of what is encoded at once: rows of blocks of one height, as many columns as scratch holds."""
    r, k = shape
    whole = r // rows * rows
    for top, bottom in ((0, whole), (whole, r)):
        if top < bottom:
            width = k if bottom - top > rows else max(1, PIECE // rows // columns) * columns
            for left in range(0, k, width):
                yield top, bottom, left, min(left + width, k)


def _encode_blocks(values: torch.Tensor, rows: int, columns: int, codes: torch.Tensor, scales: torch.Tensor, desk: Desk) -> None:
    """One height of blocks: [n * rows, k], under scales [n, ceil(k / columns)]."""
    k = values.shape[1]
    n, across = scales.shape
    # The largest of each column first: contiguous rows are compared several times faster than the columns of a block.
    tops = desk.take("tops", n * across * columns, torch.float32).view(n, across * columns)
    tops[:, k:] = 0
    tops[:, :k] = patterns.magnitudes(values, desk).view(n, rows, k).amax(1).view(values.dtype)
    scales.copy_(_scales(tops.view(n, across, columns).amax(2), desk))
    tops.view(n, across, columns).copy_(scales[:, :, None].expand(n, across, columns))
    scratch = desk.take("values", values.numel(), torch.float32).view(n, rows, k)
    scratch.view(values.shape).copy_(values)
    codes.copy_(scratch.div_(tops[:, None, :k]).view(values.shape))


def numbers(codes: torch.Tensor) -> torch.Tensor:
    """The numbers of codes F8_E4M3, of any shape: F32. Several times faster than torch 2.13's own cast, NaN stays NaN."""
    wide = codes.view(torch.uint8).to(torch.int16)
    sizes = wide & 0x7F
    # Placed as a float16's sign, last exponent and first mantissa bits: E4M3 but for the bias, subnormals too. 0x7f carries into
    # the exponent's first bit and makes NaN.
    nan = (sizes + 1).bitwise_and_(0x80)
    sizes.bitwise_or_(nan).bitwise_left_shift_(7)
    return wide.bitwise_and_(0x80).bitwise_left_shift_(8).bitwise_or_(sizes).view(torch.float16).float().mul_(2.0**8)


def decode(codes: torch.Tensor, scheme: Scheme, whole: float | None, scales: torch.Tensor | None) -> torch.Tensor:
    """code * scale."""
    values = numbers(codes)
    if scales is None:
        assert whole is not None
        return values.mul_(whole)
    n, k = values.shape
    rows, columns = scheme.rows or n, scheme.columns or k
    if columns < k:
        scales = scales.repeat_interleave(columns, 1)[:, :k]
    for i, top in enumerate(range(0, n, rows)):
        values[top : top + rows].mul_(scales[i])
    return values
