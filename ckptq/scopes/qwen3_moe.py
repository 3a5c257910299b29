"""Qwen3-MoE, a language model alone. The hub's files hold each expert by itself."""

from types import MappingProxyType

from ckptq.scopes import Scope, _decoder, _experts

# vLLM 0.32.0 models/qwen3_moe.py (Qwen3MoeAttention, Qwen3MoeMLP, Qwen3MoeSparseMoeBlock, Qwen3MoeDecoderLayer).
PARAMETERS = _decoder.parameters(
    _decoder.NORMS,
    _decoder.ATTENTION,
    _decoder.given("attention_bias", _decoder.QKV_BIAS),
    _decoder.QK_NORMS,
    _decoder.MLP,
    _experts.QWEN3_PARAMETERS,
)

SCOPE = Scope(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    source="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/model_executor/models/qwen3_moe.py",
    auto_class="AutoModelForCausalLM",
    text_config="",
    generations=(),
    layers="model.layers",
    linears=_decoder.LINEARS,
    kv=_decoder.KV,
    towers=(),
    parameters=MappingProxyType(PARAMETERS),
    kept=_decoder.KEPT,
    server_prefix=(),
    server_layers="model.layers",
    server_kept=("lm_head",),
    experts=_experts.QWEN3,
    explicit_head_dim=True,
)
