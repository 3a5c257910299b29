"""NVIDIA ModelOpt's checkpoint format, FP8 static per tensor, with FP8 KV scales.

Tensors: vLLM 0.32.0 model_executor/layers/quantization/modelopt.py (ModelOptFp8LinearMethod) and ModelOpt 0.47.0
torch/export/unified_export_hf.py, which writes them. `[]` is a 0-d tensor.

    <linear>.weight        F8_E4M3 [out, in]      value ~ code * weight_scale
    <linear>.weight_scale  F32 []                 amax of the fused group's weights / 448
    <linear>.input_scale   F32 []                 amax of the input / 448
    <k_proj>.k_scale       F32 []                 amax of K after RoPE / 448
    <v_proj>.v_scale       F32 []                 amax of V / 448
"""

from __future__ import annotations

from typing import Any

from ckptq import __version__
from ckptq.checkpoint import TensorSpec
from ckptq.plan import Encode, Layout, Observer, Op, QuantizedGroup, Scale

QUANT_CONFIG = "hf_quant_config.json"


def linear_ops(module: str, weight: TensorSpec, group: QuantizedGroup) -> tuple[Op, ...]:
    """weight F8_E4M3 [out, in], weight_scale F32 [], input_scale F32 []."""
    return (
        Encode(weight.name, group.scheme, group.weight_amax, TensorSpec(weight.name, "F8_E4M3", weight.shape)),
        Scale(group.weight_amax, _scalar(f"{module}.weight_scale")),
        Scale(group.input_amax, _scalar(f"{module}.input_scale")),
    )


def kv_ops(k: Observer, v: Observer) -> tuple[Op, ...]:
    """k_scale F32 [] beside k_proj, v_scale F32 [] beside v_proj (vLLM 0.32.0 quantization/base_config.py maps both)."""
    return (Scale((k,), _scalar(f"{k.module}.k_scale")), Scale((v,), _scalar(f"{v.module}.v_scale")))


def quantization_config(layout: Layout) -> dict[str, Any]:
    """config.json's section. It wins over hf_quant_config.json (vLLM 0.32.0 transformers_utils/config.py)."""
    numbers = {"dynamic": False, "num_bits": 8, "type": "float"}
    group = {"input_activations": numbers, "weights": numbers, "targets": ["Linear"]}
    section: dict[str, Any] = {"config_groups": {"group_0": group}, "ignore": exclude_modules(layout), "quant_algo": "FP8"}
    if layout.kv_cache:
        section["kv_cache_scheme"] = numbers
    return {**section, "producer": _producer(), "quant_method": "modelopt"}


def extra_files(layout: Layout) -> dict[str, dict[str, Any]]:
    """hf_quant_config.json, which says the same in ModelOpt's own words."""
    quantization = {
        "quant_algo": "FP8",
        "kv_cache_quant_algo": "FP8" if layout.kv_cache else None,
        "exclude_modules": exclude_modules(layout),
    }
    return {QUANT_CONFIG: {"producer": _producer(), "quantization": quantization}}


def exclude_modules(layout: Layout) -> list[str]:
    """Parts as `visual*`, heads and single linears by their exact names.

    vLLM 0.32.0 modelopt.py is_layer_excluded: a fused linear is skipped only where every shard is listed exactly; a trailing
    `*` becomes `X` and `X.*`; anything else also matches as a substring of the server's name.
    """
    parts = [part if part in ("lm_head",) or part.endswith("embed_tokens") else f"{part}*" for part in layout.kept_parts]
    return sorted([*parts, *layout.kept_linears])


def _producer() -> dict[str, str]:
    # vLLM 0.32.0 transformers_utils/model_arch_config_convertor.py reads hf_quant_config.json alone only from this producer.
    return {"name": "modelopt", "version": f"ckptq-{__version__}"}


def _scalar(name: str) -> TensorSpec:
    return TensorSpec(name, "F32", ())
