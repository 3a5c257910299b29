"""Qwen3-MoE, a language model alone. The hub's files hold each expert by itself."""

from types import MappingProxyType

from ckptq.scopes import Experts, Fused, Scope

# vLLM 0.32.0 models/qwen3_moe.py (Qwen3MoeAttention, Qwen3MoeMLP, Qwen3MoeSparseMoeBlock, Qwen3MoeDecoderLayer).
PARAMETERS = {
    "model.embed_tokens.weight": "vocab hidden",
    "model.norm.weight": "hidden",
    "lm_head.weight": "vocab hidden",
    "model.layers.{i}.input_layernorm.weight": "hidden",
    "model.layers.{i}.post_attention_layernorm.weight": "hidden",
    "model.layers.{i}.self_attn.q_proj.weight": "q hidden",
    "model.layers.{i}.self_attn.k_proj.weight": "kv hidden",
    "model.layers.{i}.self_attn.v_proj.weight": "kv hidden",
    "model.layers.{i}.self_attn.o_proj.weight": "hidden q",
    "model.layers.{i}.self_attn.q_norm.weight": "head",
    "model.layers.{i}.self_attn.k_norm.weight": "head",
    "model.layers.{i}.mlp.gate.weight": "experts hidden",
    "model.layers.{i}.mlp.experts.{e}.gate_proj.weight": "moe hidden",
    "model.layers.{i}.mlp.experts.{e}.up_proj.weight": "moe hidden",
    "model.layers.{i}.mlp.experts.{e}.down_proj.weight": "hidden moe",
    "model.layers.{i}.mlp.gate_proj.weight": "intermediate hidden",
    "model.layers.{i}.mlp.up_proj.weight": "intermediate hidden",
    "model.layers.{i}.mlp.down_proj.weight": "hidden intermediate",
}

SCOPE = Scope(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    source="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/model_executor/models/qwen3_moe.py",
    auto_class="AutoModelForCausalLM",
    text_config="",
    generations=(),
    layers="model.layers",
    linears=(
        Fused("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "heads"),
        Fused("self_attn.o_proj", ("self_attn.o_proj",), "columns"),
        Fused("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"), "rows"),
        Fused("mlp.down_proj", ("mlp.down_proj",), "columns"),
    ),
    kv=("self_attn.k_proj", "self_attn.v_proj"),
    towers=(),
    parameters=MappingProxyType(PARAMETERS),
    kept=("lm_head", "model.embed_tokens"),
    server_prefix=(),
    server_layers="model.layers",
    server_kept=("lm_head",),
    experts=Experts(
        runtime="mlp.experts",
        groups=(("mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj"), ("mlp.experts.{e}.down_proj",)),
        linears=(Fused("mlp.gate", ("mlp.gate",)),),
        dense="mlp.",
        # transformers 5 saves it under the second name: models/qwen3_moe/configuration_qwen3_moe.py attribute_map.
        counts=("num_experts", "num_local_experts"),
        step="decoder_sparse_step",
        dense_layers="mlp_only_layers",
    ),
    explicit_head_dim=True,
)
