"""NVIDIA ModelOpt's checkpoint format: FP8, NVFP4 and MXFP8, with FP8 KV scales.

Tensors: vLLM 0.32.0 model_executor/layers/quantization/modelopt.py (QuantKeyScheme) and ModelOpt 0.47.0
torch/export/unified_export_hf.py, which writes them. `[]` is a 0-d tensor; n and k are the rows and columns of a weight.

    quant_algo                 <linear>.weight    .weight_scale               further
    FP8                        F8_E4M3 [n, k]     F32 []                      .input_scale F32 []
    FP8_PER_CHANNEL_PER_TOKEN  F8_E4M3 [n, k]     F32 [n]
    FP8_PB_WO                  F8_E4M3 [n, k]     F32 [ceil(n / 128), 1, k / 128, 1]
    NVFP4                      U8 [n, k / 2]      F8_E4M3 [n, k / 16]         .weight_scale_2 F32 [], .input_scale F32 []
    W4A16_NVFP4                U8 [n, k / 2]      F8_E4M3 [n, k / 16]         .weight_scale_2 F32 []
    MXFP8                      F8_E4M3 [n, k]     U8 [n, k / 32]

    <k_proj>.k_scale, <v_proj>.v_scale  F32 []    amax of K after RoPE, of V / 448

Every scale multiplies: value ~ code * weight_scale (* weight_scale_2).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ckptq import __version__
from ckptq.checkpoint import TensorSpec
from ckptq.errors import RecipeError
from ckptq.plan import Encode, Layout, Observer, Op, QuantizedGroup, Scale
from ckptq.schemes import Scheme

QUANT_CONFIG = "hf_quant_config.json"
SCHEMES: Mapping[str, str] = MappingProxyType(
    {
        "fp8": "FP8",
        "fp8-dynamic": "FP8_PER_CHANNEL_PER_TOKEN",
        "fp8-block": "FP8_PB_WO",
        "nvfp4": "NVFP4",
        "nvfp4a16": "W4A16_NVFP4",
        "mxfp8": "MXFP8",
    }
)
"""quant_algo, by scheme."""
READERS = "vLLM reads this format; transformers does not: it warns, then runs with meaningless weights"
PATTERNS = True
MIXED = "MIXED_PRECISION"


def check(layout: Layout) -> None:
    """Schemes may be mixed, and each goes with an FP8 KV cache. Raises RecipeError for routed experts in a form that none reads.

    vLLM 0.32.0 modelopt.py: FusedMoEMethodCls of all FP8 algorithms is ModelOptFp8MoEMethod, per tensor with static activations.
    """
    for group in layout.groups:
        if group.routed and group.scheme.name in ("fp8-dynamic", "fp8-block"):
            raise RecipeError(
                f"scheme {group.scheme.name} for routed experts: under quant_method modelopt the server reads their FP8 "
                "per tensor, with static activations, and no other",
                hint="give routed experts the scheme fp8, or take export.format compressed-tensors",
            )


def linear_ops(module: str, weight: TensorSpec, group: QuantizedGroup) -> tuple[Op, ...]:
    """The tensors of the table above."""
    scheme = group.scheme
    scales: tuple[Op, ...] = ()
    whole, local = None, None
    if scheme.limit is not None:
        name = f"{module}.weight_scale" if scheme.scale is None else f"{module}.weight_scale_2"
        whole = Scale(group.weight_amax, scheme.limit, TensorSpec(name, "F32", ()))
        scales = (whole,)
    if scheme.scale is not None:
        local = TensorSpec(f"{module}.weight_scale", scheme.scale, _scale_shape(scheme, weight.shape))
    if scheme.activation == "static" and scheme.limit is not None:
        scales += (Scale(group.input_amax, scheme.limit, TensorSpec(f"{module}.input_scale", "F32", ())),)
    return (Encode(weight.name, scheme, scheme.codes_spec(weight.name, weight.shape), whole, local), *scales)


def _scale_shape(scheme: Scheme, weight: tuple[int, ...]) -> tuple[int, ...]:
    down, across = scheme.scale_shape(weight)
    return {"fp8-dynamic": (down,), "fp8-block": (down, 1, across, 1)}.get(scheme.name, (down, across))


def kv_ops(k: Observer, v: Observer) -> tuple[Op, ...]:
    """k_scale F32 [] beside k_proj, v_scale F32 [] beside v_proj (vLLM 0.32.0 quantization/base_config.py maps both)."""
    return tuple(Scale((o,), 448.0, TensorSpec(f"{o.module}.{o.kind}_scale", "F32", ())) for o in (k, v))


def quantization_config(layout: Layout) -> dict[str, Any]:
    """config.json's section. It wins over hf_quant_config.json (vLLM 0.32.0 transformers_utils/config.py)."""
    section: dict[str, Any] = {}
    if groups := _config_groups(layout):
        section["config_groups"] = groups
    section |= {"ignore": exclude_modules(layout), **_algo(layout)}
    if layout.kv_cache:
        section["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    return {**section, "producer": _producer(), "quant_method": "modelopt"}


def _config_groups(layout: Layout) -> dict[str, Any]:
    """ModelOpt 0.47.0 torch/export/convert_hf_config.py writes groups for FP8 and NVFP4 alone.

    vLLM 0.32.0 modelopt.py ModelOptNvFp4Config takes NVFP4 for weight-only where no group has input_activations.
    """
    if len(layout.schemes) > 1 or layout.listed:
        return {}
    numbers: dict[str, Any] = {
        "fp8": {"dynamic": False, "num_bits": 8, "type": "float"},
        "nvfp4": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
    }.get(next(iter(layout.schemes)), {})
    group = {"input_activations": numbers, "weights": numbers, "targets": ["Linear"]}
    return {"group_0": group} if numbers else {}


def _algo(layout: Layout) -> dict[str, Any]:
    """quant_algo; of a mixed layout, and of one that must be listed, also each linear's own, by its name.

    vLLM 0.32.0 modelopt.py ModelOptMixedPrecisionConfig builds what is not listed as it is, a linear without a name, too.
    """
    schemes = layout.schemes
    if len(schemes) == 1 and not layout.listed:
        name = next(iter(schemes))
        return {"quant_algo": SCHEMES[name], **_group_size(name)}
    layers = {module: {"quant_algo": SCHEMES[name], **_group_size(name)} for name, modules in schemes.items() for module in modules}
    return {"quant_algo": MIXED, "quantized_layers": dict(sorted(layers.items()))}


def _group_size(name: str) -> dict[str, int]:
    return {"group_size": 16} if name.startswith("nvfp4") else {}


def extra_files(layout: Layout) -> dict[str, dict[str, Any]]:
    """hf_quant_config.json, which says the same in ModelOpt's own words. vLLM-Omni does not read it for denoisers."""
    if layout.server == "vllm-omni":
        return {}
    quantization = {
        **_algo(layout),
        "kv_cache_quant_algo": "FP8" if layout.kv_cache else None,
        "exclude_modules": exclude_modules(layout),
    }
    return {QUANT_CONFIG: {"producer": _producer(), "quantization": quantization}}


def exclude_modules(layout: Layout) -> list[str]:
    """Parts as `visual*`, heads and single linears by their exact names.

    vLLM 0.32.0 modelopt.py is_layer_excluded: a fused linear is skipped only where every shard is listed exactly; a trailing
    `*` becomes `X` and `X.*`; anything else also matches as a substring of the server's name.

    Of several stages: vLLM-Omni 0.30.0 model_executor/models/qwen2_5_omni maps no names and has `thinker.language_model.model`
    where vLLM has `language_model.model` and the files `thinker.model`. A bare lm_head and globs on the end of a name reach both.
    """
    parts = [_last(part) if _is_head(part) else part if part.endswith("embed_tokens") else f"{part}*" for part in layout.kept_parts]
    globs = [f"*{name.removeprefix(layout.stage)}" for name in layout.kept_fused]
    return sorted([*parts, *layout.kept_linears, *layout.kept_experts, *globs])


def _is_head(part: str) -> bool:
    return _last(part) == "lm_head"


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _producer() -> dict[str, str]:
    # vLLM 0.32.0 transformers_utils/model_arch_config_convertor.py reads hf_quant_config.json alone only from this producer.
    return {"name": "modelopt", "version": f"ckptq-{__version__}"}
