"""vLLM-Omni's serialized INT8, `quant_method: int8`: weights in INT8, activations in INT8 under scales of their own a token.

Tensors: vLLM-Omni 0.30.0 quantization/int8_config.py BaseInt8LinearMethod; n and k are the rows and columns of a weight.

    <linear>.weight I8 [n, k]    <linear>.weight_scale F32 [n, 1]

A linear alone has a scale for each row; linears that the server fuses have one for all their rows, n times. On CUDA it takes rows'
scales for those of shards: Int8LinearMethod says is_channelwise=False, and vLLM 0.32.0 kernels/linear/scaled_mm/cutlass.py and
triton.py then give shard i the scale in row i of the fused weight, so that other ones come out wrong.
Loading was tried with the real classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ckptq.checkpoint import TensorSpec
from ckptq.errors import RecipeError
from ckptq.plan import Encode, Layout, Observer, Op, QuantizedGroup, Scale

SCHEMES: Mapping[str, str] = MappingProxyType({"int8": "int8"})
"""quant_method, by scheme."""
READERS = "vLLM-Omni reads this format, on CUDA and on NPUs; diffusers does not"
PATTERNS = False
STEPS = 127.5
"""See numerics/int8.py."""


def check(layout: Layout) -> None:
    """Raises RecipeError for anything but a denoiser."""
    if layout.server != "vllm-omni":
        raise RecipeError(
            "export.format int8 is vLLM-Omni's, for denoisers",
            hint="for a language model take export.format compressed-tensors",
        )


def linear_ops(module: str, weight: TensorSpec, group: QuantizedGroup) -> tuple[Op, ...]:
    """The tensors of the table above."""
    codes = group.scheme.codes_spec(weight.name, weight.shape)
    scales = TensorSpec(f"{module}.weight_scale", "F32", (weight.shape[0], 1))
    if len(group.modules) == 1:
        return (Encode(weight.name, group.scheme, codes, None, scales),)
    whole = Scale(group.weight_amax, STEPS, scales)
    return Encode(weight.name, dataclasses.replace(group.scheme, rows=None, scale=None, limit=STEPS), codes, whole), whole


def kv_ops(k: Observer, v: Observer) -> tuple[Op, ...]:
    """None: a denoiser has no KV cache."""
    return ()


def quantization_config(layout: Layout) -> dict[str, Any]:
    """config.json's section: vLLM-Omni 0.30.0 int8_config.py DiffusionInt8Config, whose names of what stays count whole."""
    kept = sorted(set(layout.kept_linears))
    return {
        "quant_method": "int8",
        "is_checkpoint_int8_serialized": True,
        "activation_scheme": "dynamic",
        "ignored_layers": kept,
    }


def extra_files(layout: Layout) -> dict[str, dict[str, Any]]:
    """None: config.json says it all."""
    return {}
