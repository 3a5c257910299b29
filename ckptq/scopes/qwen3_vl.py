"""Qwen3-VL, dense. What some blocks of its tower saw is added between the first decoder layers (deepstack).

There is one spelling of names: `model.language_model.*` and `model.visual.*`.
"""

from types import MappingProxyType

from ckptq.scopes import Scope, _decoder, _vision

# vLLM 0.32.0 models/qwen3.py (Qwen3Attention, Qwen3DecoderLayer), models/qwen2.py (Qwen2MLP), models/qwen3_vl.py (Qwen3_Vision*).
PARAMETERS = {
    **_decoder.parameters(
        _decoder.NORMS,
        _decoder.ATTENTION,
        _decoder.given("attention_bias", _decoder.QKV_BIAS),
        _decoder.QK_NORMS,
        _decoder.MLP,
        model="model.language_model",
    ),
    **_vision.qwen3_parameters("model.visual"),
}

SCOPE = Scope(
    name="qwen3_vl",
    architectures=("Qwen3VLForConditionalGeneration",),
    source="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/model_executor/models/qwen3_vl.py",
    auto_class="AutoModelForImageTextToText",
    text_config="text_config",
    generations=(),
    layers="model.language_model.layers",
    linears=_decoder.LINEARS,
    kv=_decoder.KV,
    towers=(_vision.qwen3("model.visual", "vision_config"),),
    parameters=MappingProxyType(PARAMETERS),
    kept=("lm_head", "model.language_model.embed_tokens"),
    server_prefix=(
        ("model.visual.", "visual."),
        ("lm_head.", "language_model.lm_head."),
        ("model.language_model.", "language_model.model."),
    ),
    server_layers="language_model.model.layers",
    server_kept=("lm_head",),  # Qwen3LLMForCausalLM gives its head no prefix, though the mapping does
    explicit_head_dim=True,
    # transformers 5.19.0 models/qwen3_vl/configuration_qwen3_vl.py.
    assumed=MappingProxyType({"head_dim": 128}),
    repeats_towers=True,
)
