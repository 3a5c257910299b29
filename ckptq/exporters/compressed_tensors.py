"""llm-compressor's checkpoint format, compressed-tensors: FP8, INT8, NVFP4, MXFP8 and MXFP4, with FP8 KV scales.

Tensors: vLLM 0.32.0 model_executor/layers/quantization/compressed_tensors/schemes, one file a row; n and k are the rows and
columns of a weight.

    scheme             weight                       .weight_scale               further
    fp8                .weight F8_E4M3 [n, k]       F32 [1]                     .input_scale F32 [1]
    fp8-dynamic        .weight F8_E4M3 [n, k]       F32 [n, 1]
    fp8-block          .weight F8_E4M3 [n, k]       F32 [ceil(n / 128), k / 128]
    int8               .weight I8 [n, k]            F32 [n, 1]
    nvfp4              .weight_packed U8 [n, k/2]   F8_E4M3 [n, k / 16]         .weight_global_scale, .input_global_scale F32 [1]
    nvfp4a16           .weight_packed U8 [n, k/2]   F8_E4M3 [n, k / 16]         .weight_global_scale F32 [1]
    mxfp8              .weight F8_E4M3 [n, k]       U8 [n, k / 32]
    mxfp4              .weight_packed U8 [n, k/2]   U8 [n, k / 32]

    <attention>.k_scale, .v_scale  F32 [1]

The global scales divide, all others multiply: value ~ code * weight_scale / weight_global_scale.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ckptq.checkpoint import TensorSpec
from ckptq.plan import Encode, Layout, Observer, Op, QuantizedGroup, Scale, module_of
from ckptq.schemes import Scheme, find_scheme

SCHEMES: Mapping[str, str] = MappingProxyType(
    {
        "fp8": "float-quantized",
        "fp8-dynamic": "float-quantized",
        "fp8-block": "float-quantized",
        "int8": "int-quantized",
        "nvfp4": "nvfp4-pack-quantized",
        "nvfp4a16": "nvfp4-pack-quantized",
        "mxfp8": "mxfp8-quantized",
        "mxfp4": "mxfp4-pack-quantized",
    }
)
"""The format's word for how codes are packed, by scheme."""
READERS = "vLLM reads this format; nothing else was tried"
PATTERNS = True
MIXED = "mixed-precision"
VERSION = "0.17.0"
"""Of compressed-tensors, as vLLM 0.32.0 requires it: the version in which these words were read."""


def check(layout: Layout) -> None:
    """Nothing to refuse: schemes may be mixed, and each goes with an FP8 KV cache."""


def linear_ops(module: str, weight: TensorSpec, group: QuantizedGroup) -> tuple[Op, ...]:
    """The tensors of the table above."""
    scheme = group.scheme
    codes = scheme.codes_spec(f"{module}.weight_packed" if scheme.packed > 1 else weight.name, weight.shape)
    if scheme.limit is None:
        return (Encode(weight.name, scheme, codes, None, _local(module, scheme, weight)),)
    divides = scheme.scale is not None  # a scale of scales
    part = "global_scale" if divides else "scale"
    whole = Scale(group.weight_amax, scheme.limit, TensorSpec(f"{module}.weight_{part}", "F32", (1,)), divides)
    ops: tuple[Op, ...] = (Encode(weight.name, scheme, codes, whole, _local(module, scheme, weight)), whole)
    if scheme.activation == "static":
        ops += (Scale(group.input_amax, scheme.limit, TensorSpec(f"{module}.input_{part}", "F32", (1,)), divides),)
    return ops


def _local(module: str, scheme: Scheme, weight: TensorSpec) -> TensorSpec | None:
    if scheme.scale is None:
        return None
    return TensorSpec(f"{module}.weight_scale", scheme.scale, scheme.scale_shape(weight.shape))


def kv_ops(k: Observer, v: Observer) -> tuple[Op, ...]:
    """k_scale and v_scale F32 [1] in the attention module, where llm-compressor writes them."""
    return tuple(Scale((o,), 448.0, TensorSpec(f"{module_of(o.module)}.{o.kind}_scale", "F32", (1,))) for o in (k, v))


def quantization_config(layout: Layout) -> dict[str, Any]:
    """config.json's section, as compressed-tensors 0.17 QuantizationConfig has it."""
    schemes = layout.schemes
    formats = {SCHEMES[name] for name in schemes}
    groups = {
        f"group_{i}": _group(find_scheme(name), ["Linear"] if len(schemes) == 1 else _single(modules, layout))
        for i, (name, modules) in enumerate(schemes.items())
    }
    kv = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    return {
        "config_groups": groups,
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "ignore": ignore(layout),
        "kv_cache_scheme": kv if layout.kv_cache else None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "version": VERSION,
    }


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    """compressed-tensors 0.17 quantization/quant_scheme.py: the presets FP8, FP8_DYNAMIC, FP8_BLOCK, INT8, NVFP4, MXFP8, MXFP4."""
    bits = {"nvfp4": 4, "mxfp4": 4}.get(scheme.numerics, 8)
    numbers: dict[str, Any] = {"num_bits": bits, "type": "int" if scheme.numerics == "int8" else "float", "symmetric": True}
    if scheme.numerics == "nvfp4":
        shared = {**numbers, "strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
        weights, inputs = {**shared, "dynamic": False}, {**shared, "dynamic": "local"}
    elif scheme.numerics.startswith("mx"):
        shared = {**numbers, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
        weights, inputs = {**shared, "dynamic": False}, {**shared, "dynamic": True}
    elif scheme.rows == scheme.columns == 128:
        weights = {**numbers, "strategy": "block", "block_structure": [128, 128], "dynamic": False}
        inputs = {**numbers, "strategy": "group", "group_size": 128, "dynamic": True}
    elif scheme.rows == 1:
        weights = {**numbers, "strategy": "channel", "dynamic": False}
        inputs = {**numbers, "strategy": "token", "dynamic": True}
    else:
        weights = inputs = {**numbers, "strategy": "tensor", "dynamic": False}
    if scheme.activation == "none":
        return {"format": SCHEMES[scheme.name], "input_activations": None, "targets": targets, "weights": weights}
    return {"format": SCHEMES[scheme.name], "input_activations": inputs, "targets": targets, "weights": weights}


def extra_files(layout: Layout) -> dict[str, dict[str, Any]]:
    """None: config.json says it all."""
    return {}


def ignore(layout: Layout) -> list[str]:
    """The output head and single linears by their exact names, towers as an expression.

    vLLM 0.32.0 compressed_tensors/utils.py: names count whole and follow the model's prefix rules; expressions are matched against
    the server's own names, as they stand. Embeddings are no linear. Of several stages single linears are expressions, too: see
    modelopt.exclude_modules. Routed experts are asked for one by one: compressed_tensors_moe.py get_moe_method.
    """
    parts = [part for part in layout.kept_parts if not part.endswith("embed_tokens")]
    listed = [part if part.endswith("lm_head") else rf"re:.*\b{_tail(part)}\..*" for part in parts]
    linears = _single(layout.kept_linears, layout)
    experts = [rf"re:.*\b{re.escape(_in_layers(name))}\..*" for name in layout.kept_experts]
    return sorted([*listed, *linears, *experts])


def _in_layers(name: str) -> str:
    """`model.language_model.layers.3.mlp.experts` -> `layers.3.mlp.experts`, which ends the server's name as well."""
    parts = name.split(".")
    return ".".join(parts[next(i for i, part in enumerate(parts) if part.isdigit()) - 1 :])


def _tail(part: str) -> str:
    """The last word of a name, with the number that may follow it: `visual`, `layers.61`."""
    return re.escape(re.search(r"[^.]+(\.\d+)*$", part)[0])  # type: ignore[index]


def _single(modules: Sequence[str], layout: Layout) -> list[str]:
    """Single linears: names, or expressions for what follows the stage."""
    return ["re:.*" + re.escape(m.removeprefix(layout.stage)) + "$" if layout.stage else m for m in modules]
