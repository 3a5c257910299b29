"""Gemma 3, the language model alone (270M and 1B). Four norms a layer, and lm_head is tied though config.json does not say so."""

from types import MappingProxyType

from ckptq.scopes import Scope, _decoder

# vLLM 0.32.0 models/gemma3.py (Gemma3Attention, Gemma3MLP, Gemma3DecoderLayer). Norms are stored as what is added to 1; they stay.
NORMS = {"pre_feedforward_layernorm.weight": "hidden", "post_feedforward_layernorm.weight": "hidden"}
PARAMETERS = _decoder.parameters(
    _decoder.NORMS,
    NORMS,
    _decoder.ATTENTION,
    _decoder.given("attention_bias", _decoder.QKV_BIAS),
    _decoder.given("attention_bias", _decoder.O_BIAS),
    _decoder.QK_NORMS,
    _decoder.MLP,
)
# transformers 5.19.0 models/gemma3/configuration_gemma3.py Gemma3TextConfig; published files leave most of it out.
ASSUMED = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True}

SCOPE = Scope(
    name="gemma3_text",
    architectures=("Gemma3ForCausalLM",),
    source="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/model_executor/models/gemma3.py",
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
    norm_offset=1.0,  # layers/layernorm.py GemmaRMSNorm
    assumed=MappingProxyType(ASSUMED),
)
