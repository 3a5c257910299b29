"""Qwen3-Omni: of its stages the thinker, and of that the language model. Talker, code2wav and the two towers stay.

The hub's files hold each expert by itself.
"""

from types import MappingProxyType

from ckptq.scopes import Scope, _audio, _decoder, _experts, _vision

_THINKER = "thinker"
_VISUAL, _AUDIO = f"{_THINKER}.visual", f"{_THINKER}.audio_tower"

# vLLM 0.32.0 models/qwen3_omni_moe_thinker.py (Qwen3MoeLLMModel, Qwen3Omni_VisionTransformer, Qwen3OmniMoeAudioEncoder),
# models/qwen3_moe.py.
PARAMETERS = {
    **_decoder.parameters(
        _decoder.NORMS,
        _decoder.ATTENTION,
        _decoder.given("attention_bias", _decoder.QKV_BIAS),
        _decoder.QK_NORMS,
        _decoder.MLP,
        _experts.QWEN3_PARAMETERS,
        model=f"{_THINKER}.model",
        head=f"{_THINKER}.lm_head",
    ),
    **_vision.qwen3_omni_parameters(_VISUAL),
    **_audio.qwen3_parameters(_AUDIO),
}

SCOPE = Scope(
    name="qwen3_omni_moe",
    architectures=("Qwen3OmniMoeForConditionalGeneration",),
    source="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/model_executor/models/qwen3_omni_moe_thinker.py",
    auto_class="AutoModelForImageTextToText",
    text_config="thinker_config.text_config",
    generations=(),
    layers=f"{_THINKER}.model.layers",
    linears=_decoder.LINEARS,
    kv=_decoder.KV,
    towers=(
        _vision.qwen3_omni(_VISUAL, "thinker_config.vision_config"),
        _audio.qwen3(_AUDIO, "thinker_config.audio_config"),
    ),
    parameters=MappingProxyType(PARAMETERS),
    kept=(f"{_THINKER}.lm_head", f"{_THINKER}.model.embed_tokens"),
    server_prefix=(
        ("thinker.lm_head.", "language_model.lm_head."),
        ("thinker.model.", "language_model.model."),
        ("thinker.", ""),
        ("model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    ),
    server_layers="language_model.model.layers",
    # Qwen3MoeLLMForCausalLM gives ParallelLMHead the quantization config and no prefix.
    server_kept=("",),
    experts=_experts.QWEN3,
    explicit_head_dim=True,
    skipped=("talker.", "code2wav."),
    stage=_THINKER,
)
