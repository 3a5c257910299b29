"""vLLM-Omni's serialized MXFP8, `quant_method: mxfp8`, which it serves on Ascend NPUs alone.

Tensors: vLLM-Omni 0.30.0 quantization/mxfp8_config.py NPUMxfp8LinearMethod; n and k are the rows and columns of a weight.

    <linear>.weight F8_E4M3 [n, k]    <linear>.weight_scale U8 [n, k / 32], E8M0

Shards of a fused linear stay separate. Loading was tried with the real classes; no NPU has run it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ckptq.checkpoint import TensorSpec
from ckptq.errors import RecipeError
from ckptq.plan import Encode, Layout, Observer, Op, QuantizedGroup

SCHEMES: Mapping[str, str] = MappingProxyType({"mxfp8": "mxfp8"})
"""quant_method, by scheme."""
READERS = "vLLM-Omni reads this format on Ascend NPUs alone, where it was not run"
PATTERNS = False


def check(layout: Layout) -> None:
    """Raises RecipeError for anything but a denoiser."""
    if layout.server != "vllm-omni":
        raise RecipeError(
            "export.format mxfp8 is vLLM-Omni's, for denoisers",
            hint="for a language model take the scheme mxfp8 in export.format modelopt or compressed-tensors",
        )


def linear_ops(module: str, weight: TensorSpec, group: QuantizedGroup) -> tuple[Op, ...]:
    """The tensors of the table above."""
    scales = TensorSpec(f"{module}.weight_scale", "U8", group.scheme.scale_shape(weight.shape))
    return (Encode(weight.name, group.scheme, group.scheme.codes_spec(weight.name, weight.shape), None, scales),)


def kv_ops(k: Observer, v: Observer) -> tuple[Op, ...]:
    """None: a denoiser has no KV cache."""
    return ()


def quantization_config(layout: Layout) -> dict[str, Any]:
    """config.json's section: vLLM-Omni 0.30.0 mxfp8_config.py DiffusionMXFP8Config, whose names of what stays count whole."""
    kept = sorted(set(layout.kept_linears))
    return {"quant_method": "mxfp8", "is_checkpoint_mxfp8_serialized": True, "ignored_layers": kept}


def extra_files(layout: Layout) -> dict[str, dict[str, Any]]:
    """None: config.json says it all."""
    return {}
