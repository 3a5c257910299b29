"""vLLM-Omni's MXFP4 under two scales, `quant_method: mxfp4_dualscale`, which it serves on Ascend NPUs alone.

Tensors: vLLM-Omni 0.30.0 quantization/mxfp4_config.py NPUMxfp4DualScaleLinearMethod; n and k are the rows and columns of a weight.

    <linear>.weight             F8_E4M3 [n, k], numbers of E2M1
    <linear>.weight_scale       U8 [n, k / 32], E8M0
    <linear>.weight_dual_scale  F32 [n, k / 512, 1]
    <linear>.mul_scale          F32 [k]: what the server multiplies inputs with, here ones. It is read whether stored or not

value ~ code * weight_scale * weight_dual_scale: see numerics/mxfp4_dualscale.py. Shards of a fused linear stay separate. Loading
was tried with the real classes; no NPU has run it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ckptq.checkpoint import TensorSpec
from ckptq.errors import RecipeError
from ckptq.plan import Encode, Layout, Observer, Op, QuantizedGroup, Scale

SCHEMES: Mapping[str, str] = MappingProxyType({"mxfp4-dualscale": "mxfp4_dualscale"})
"""quant_method, by scheme."""
READERS = "vLLM-Omni reads this format on Ascend NPUs alone, where it was not run"
PATTERNS = False
_FINE = 32


def check(layout: Layout) -> None:
    """Raises RecipeError for anything but a denoiser."""
    if layout.server != "vllm-omni":
        raise RecipeError(
            "export.format mxfp4-dualscale is vLLM-Omni's, for denoisers",
            hint="for a language model take the scheme mxfp4 in export.format compressed-tensors",
        )


def linear_ops(module: str, weight: TensorSpec, group: QuantizedGroup) -> tuple[Op, ...]:
    """The tensors of the table above. The fine scales are codes of their own: of two scales an Encode has one."""
    n, k = weight.shape
    coarse = TensorSpec(f"{module}.weight_dual_scale", "F32", (n, -(-k // (group.scheme.columns or k)), 1))
    fine = dataclasses.replace(group.scheme, codes="U8", packed=_FINE, scale=None)
    return (
        Encode(weight.name, group.scheme, group.scheme.codes_spec(weight.name, weight.shape), None, coarse),
        Encode(weight.name, fine, fine.codes_spec(f"{module}.weight_scale", weight.shape)),
        Scale((), 1.0, TensorSpec(f"{module}.mul_scale", "F32", (k,))),
    )


def kv_ops(k: Observer, v: Observer) -> tuple[Op, ...]:
    """None: a denoiser has no KV cache."""
    return ()


def quantization_config(layout: Layout) -> dict[str, Any]:
    """config.json's section: vLLM-Omni 0.30.0 mxfp4_config.py DiffusionMXFP4DualScaleMixedConfig, whose names count whole."""
    kept = sorted(set(layout.kept_linears))
    return {"quant_method": "mxfp4_dualscale", "is_checkpoint_serialized": True, "ignored_layers": kept}


def extra_files(layout: Layout) -> dict[str, dict[str, Any]]:
    """None: config.json says it all."""
    return {}
