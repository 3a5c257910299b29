"""Routed experts that families share: how the server builds them, and the names of their parameters in a layer. Not a scope."""

from types import MappingProxyType

from ckptq.scopes import Experts, Fused

# vLLM 0.32.0 models/qwen3_moe.py (Qwen3MoeSparseMoeBlock): relative to a layer, as in _decoder.
QWEN3_PARAMETERS = MappingProxyType(
    {
        "mlp.gate.weight": "experts hidden",
        "mlp.experts.{e}.gate_proj.weight": "moe hidden",
        "mlp.experts.{e}.up_proj.weight": "moe hidden",
        "mlp.experts.{e}.down_proj.weight": "hidden moe",
    }
)
QWEN3 = Experts(
    runtime="mlp.experts",
    groups=(("mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj"), ("mlp.experts.{e}.down_proj",)),
    linears=(Fused("mlp.gate", ("mlp.gate",)),),
    dense="mlp.",
    # transformers 5 saves it under the second name: models/qwen3_moe/configuration_qwen3_moe.py attribute_map.
    counts=("num_experts", "num_local_experts"),
    step="decoder_sparse_step",
    dense_layers="mlp_only_layers",
)
