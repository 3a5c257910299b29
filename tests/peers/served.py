"""What vLLM computes with once it has loaded a ModelOpt FP8 folder. tests/test_server.py compares it with the real one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

E4M3_MAX = 448.0


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint folder by name."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            tensors.update({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118 - not a mapping
    return tensors


def served(tensors: Mapping[str, torch.Tensor], shards: Sequence[str]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(each shard's codes F8_E4M3 [out, in], their one scale F32 []) of a fused linear.

    vLLM 0.32.0 model_executor/layers/quantization/modelopt.py: where the shards' scales differ, each is dequantized in float16
    and quantized again under the largest (quantization/utils/w8a8_utils.py requantize_with_max_scale), as the product with
    the scale's reciprocal (csrc/quantization/w8a8/fp8/common.cuh scaled_fp8_conversion).
    """
    codes = [tensors[f"{shard}.weight"] for shard in shards]
    scales = [tensors[f"{shard}.weight_scale"] for shard in shards]
    largest = torch.stack(scales).max()
    if all(torch.equal(scale, largest) for scale in scales):
        return codes, largest
    halves = [code.to(torch.float16) * scale for code, scale in zip(codes, scales, strict=True)]
    return [(half.float() * (1.0 / largest)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn) for half in halves], largest
