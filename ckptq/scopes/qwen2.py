"""Qwen2 and Qwen2.5, dense. Queries, keys and values have a bias; the small sizes tie lm_head to the embeddings."""

from types import MappingProxyType

from ckptq.scopes import Scope, _decoder

# vLLM 0.32.0 models/qwen2.py (Qwen2Attention, Qwen2MLP, Qwen2DecoderLayer). head_dim in the config is not looked at.
PARAMETERS = _decoder.parameters(
    _decoder.NORMS, _decoder.ATTENTION, _decoder.QKV_BIAS, _decoder.given("qk_norm", _decoder.QK_NORMS), _decoder.MLP
)

SCOPE = Scope(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    source="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/model_executor/models/qwen2.py",
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
)
