"""vLLM's own format, `quant_method: fp8`: per tensor with static or dynamic activations, or in blocks of 128 x 128.

Tensors: vLLM 0.32.0 model_executor/layers/quantization/fp8.py Fp8LinearMethod; n and k are the rows and columns of a weight.

    scheme       <linear>.weight    scale                                       further
    fp8          F8_E4M3 [n, k]     .weight_scale F32 []                        .input_scale F32 []
    fp8-tensor   F8_E4M3 [n, k]     .weight_scale F32 []
    fp8-block    F8_E4M3 [n, k]     .weight_scale_inv F32 [ceil(n / 128), k / 128]

Every scale multiplies, the one called `inv` too.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ckptq.checkpoint import TensorSpec
from ckptq.errors import RecipeError
from ckptq.plan import Encode, Layout, Observer, Op, QuantizedGroup, Scale

SCHEMES: Mapping[str, str] = MappingProxyType({"fp8": "static", "fp8-tensor": "dynamic", "fp8-block": "weight_block_size"})
"""What says so in config.json, by scheme."""
READERS = "vLLM reads this format; nothing else was tried"
PATTERNS = False
_HINT = "choose another export.format: `ckptq recipes --schemes` shows what goes together"


def check(layout: Layout) -> None:
    """Raises RecipeError for more than one scheme, an FP8 KV cache, and a checkpoint of several stages."""
    if layout.stage:
        raise RecipeError(
            f"quant_method fp8 excludes by exact names alone, and each server has its own for what is beside the {layout.stage}",
            hint=_HINT,
        )
    if len(layout.schemes) > 1:
        raise RecipeError(
            f"schemes {', '.join(layout.schemes)}: quant_method fp8 has one activation_scheme and one block size for all linears",
            hint="give all of them one scheme, or " + _HINT,
        )
    if layout.kv_cache:
        raise RecipeError(
            "kv_cache: quant_method fp8 can't declare an FP8 KV cache in config.json: the server would leave the scales unused",
            hint="remove kv_cache, or " + _HINT,
        )


def linear_ops(module: str, weight: TensorSpec, group: QuantizedGroup) -> tuple[Op, ...]:
    """The tensors of the table above."""
    scheme = group.scheme
    codes = scheme.codes_spec(weight.name, weight.shape)
    if scheme.limit is None:
        local = TensorSpec(f"{module}.weight_scale_inv", "F32", scheme.scale_shape(weight.shape))
        return (Encode(weight.name, scheme, codes, None, local),)
    whole = Scale(group.weight_amax, scheme.limit, TensorSpec(f"{module}.weight_scale", "F32", ()))
    ops: tuple[Op, ...] = (Encode(weight.name, scheme, codes, whole), whole)
    if scheme.activation == "static":
        ops += (Scale(group.input_amax, scheme.limit, TensorSpec(f"{module}.input_scale", "F32", ())),)
    return ops


def kv_ops(k: Observer, v: Observer) -> tuple[Op, ...]:
    """None: `check` refuses them."""
    return ()


def quantization_config(layout: Layout) -> dict[str, Any]:
    """config.json's section.

    vLLM 0.32.0 fp8.py Fp8Config.from_config reads ignored_layers, and where that is absent modules_to_not_convert, which is
    transformers' word. Names count whole: no glob, no parent.
    """
    (name,) = layout.schemes
    kept = sorted({*layout.kept_outside, *layout.kept_linears, *layout.kept_experts})
    section: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "static" if name == "fp8" else "dynamic"}
    if name == "fp8-block":
        section["weight_block_size"] = [128, 128]
    # vLLM-Omni 0.30.0 quantization/factory.py _build_single hands the section to Fp8Config.__init__, which knows one word alone.
    return {**section, "ignored_layers" if layout.server == "vllm-omni" else "modules_to_not_convert": kept}


def extra_files(layout: Layout) -> dict[str, dict[str, Any]]:
    """None: config.json says it all."""
    return {}
