"""Qwen2.5-Omni: of its stages the thinker, and of that the language model. Talker, token2wav and the two towers stay.

vLLM builds the thinker and passes the other stages over; vLLM-Omni builds all, each with what config.json says of quantization.
"""

from dataclasses import replace
from types import MappingProxyType

from ckptq.scopes import Fused, Scope, _audio, _decoder, _vision

_THINKER = "thinker"
_VISUAL, _AUDIO = f"{_THINKER}.visual", f"{_THINKER}.audio_tower"
_VISION_TOWER = _vision.qwen2_5(_VISUAL, "thinker_config.vision_config")
# Qwen2.5-VL's tower, whose q, k and v are stored by themselves. vLLM 0.32.0 models/qwen2_5_omni_thinker.py says `attn.qkv` in
# packed_modules_mapping, where the last part of a name is looked up: exclude lists are not held against q, k and v.
_QKV = Fused("blocks.{i}.attn.qkv", ("blocks.{i}.attn.q", "blocks.{i}.attn.k", "blocks.{i}.attn.v"), "heads", packed=False)
_VISION_PARAMETERS = {name: dims for name, dims in _vision.qwen2_5_parameters(_VISUAL).items() if ".attn.qkv." not in name}
_VISION_PARAMETERS |= {
    f"{_VISUAL}.{shard}.{kind}": dims for shard in _QKV.shards for kind, dims in (("weight", "vision vision"), ("bias", "vision"))
}

# vLLM 0.32.0 models/qwen2.py (Qwen2Attention, Qwen2MLP, Qwen2DecoderLayer); the towers: see _vision.py and _audio.py.
PARAMETERS = {
    **_decoder.parameters(
        _decoder.NORMS, _decoder.ATTENTION, _decoder.QKV_BIAS, _decoder.MLP, model=f"{_THINKER}.model", head=f"{_THINKER}.lm_head"
    ),
    **_VISION_PARAMETERS,
    **_audio.qwen2_5_parameters(_AUDIO),
}

SCOPE = Scope(
    name="qwen2_5_omni",
    architectures=("Qwen2_5OmniModel", "Qwen2_5OmniForConditionalGeneration"),
    source="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/model_executor/models/qwen2_5_omni_thinker.py",
    auto_class="AutoModelForImageTextToText",
    text_config="thinker_config.text_config",
    generations=(),
    layers=f"{_THINKER}.model.layers",
    linears=_decoder.LINEARS,
    kv=_decoder.KV,
    towers=(
        replace(_VISION_TOWER, linears=(_QKV, *(f for f in _VISION_TOWER.linears if f.runtime != _QKV.runtime))),
        _audio.qwen2_5(_AUDIO, "thinker_config.audio_config"),
    ),
    parameters=MappingProxyType(PARAMETERS),
    kept=(f"{_THINKER}.lm_head", f"{_THINKER}.model.embed_tokens"),
    server_prefix=(
        ("thinker.lm_head.", "language_model.lm_head."),
        ("thinker.model.", "language_model.model."),
        ("thinker.", ""),
    ),
    server_layers="language_model.model.layers",
    server_kept=("language_model.lm_head",),
    skipped=("talker.", "token2wav."),
    stage=_THINKER,
)
