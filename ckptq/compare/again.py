"""What a server rounds a second time at load: FP8 shards of a fused linear under different scales of whole tensors."""

from __future__ import annotations

import torch

from ckptq.checkpoint import Component, Reader
from ckptq.numerics.fp8 import numbers
from ckptq.validators.expected import Expected
from ckptq.validators.scales import read_scales

Scales = tuple[float, float]
"""A weight's own, and the largest of its shards'."""


def rounded_again(stored: Component, at: Expected, reader: Reader) -> dict[str, Scales]:
    """{weight: its scales} of those that vLLM 0.32.0 encodes again: quantization/utils/w8a8_utils.py requantize_with_max_scale, of
    experts fp8_utils.py process_fp8_weight_tensor_strategy_moe.
    """
    found: dict[str, Scales] = {}
    for linear in dict.fromkeys(at.linears.values()):
        form = at.format_of(linear.shards[0])
        if form is None or (form.codes, form.granularity) != ("F8_E4M3", "tensor") or len(linear.shards) < 2:
            continue
        tensors = {f"{module}.weight": stored.tensors.get(f"{module}.weight_scale") for module in linear.shards}
        read = {name: read_scales(reader, tensor) for name, tensor in tensors.items() if tensor is not None}
        scales = {name: float(values[0]) for name, values in read.items() if values is not None and len(values) == 1}
        if len(set(scales.values())) > 1:
            found |= {name: (scale, max(scales.values())) for name, scale in scales.items()}
    return found


def round_again(values: torch.Tensor, scales: Scales) -> torch.Tensor:
    """Decoded values as the server has them: multiplied in float16, by a product with the largest scale's reciprocal to codes."""
    own, largest = scales
    halves = (values / (own or 1.0)).to(torch.float16) * torch.tensor(own, dtype=torch.float32)
    codes = (halves.float() * (1 / torch.tensor(largest, dtype=torch.float32))).clamp(-448, 448).to(torch.float8_e4m3fn)
    return numbers(codes).mul_(largest)
