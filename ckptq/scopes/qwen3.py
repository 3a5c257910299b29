"""Qwen3, dense. Queries and keys are normalized head by head; the sizes up to 4B tie lm_head to the embeddings."""

from types import MappingProxyType

from ckptq.scopes import Scope, _decoder

# vLLM 0.32.0 models/qwen3.py (Qwen3Attention, Qwen3DecoderLayer) and models/qwen2.py (Qwen2MLP, Qwen2Model). There o_proj has no
# bias, whatever attention_bias says.
PARAMETERS = _decoder.parameters(
    _decoder.NORMS, _decoder.ATTENTION, _decoder.given("attention_bias", _decoder.QKV_BIAS), _decoder.QK_NORMS, _decoder.MLP
)

SCOPE = Scope(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    source="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/model_executor/models/qwen3.py",
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
    explicit_head_dim=True,
    # transformers 5.19.0 models/qwen3/configuration_qwen3.py.
    assumed=MappingProxyType({"head_dim": 128}),
)
