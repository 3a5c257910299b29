"""Qwen2.5-VL.

The hub's files say `model.*` and `visual.*`; files written since transformers 4.52 may say
`model.language_model.*` and `model.visual.*`.
"""

from types import MappingProxyType

from ckptq.scopes import Scope, _decoder, _vision

# vLLM 0.32.0 models/qwen2.py (Qwen2Attention, Qwen2MLP, Qwen2DecoderLayer), models/qwen2_5_vl.py (Qwen2_5_Vision*).
PARAMETERS = {
    **_decoder.parameters(_decoder.NORMS, _decoder.ATTENTION, _decoder.QKV_BIAS, _decoder.MLP),
    **_vision.qwen2_5_parameters("visual"),
}

SCOPE = Scope(
    name="qwen2_5_vl",
    architectures=("Qwen2_5_VLForConditionalGeneration",),
    # Linears and fusing: qwen2.py (Qwen2Attention, Qwen2MLP) and qwen2_5_vl.py (the tower, packed_modules_mapping,
    # hf_to_vllm_mapper) of the tag.
    source="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/model_executor/models/qwen2_5_vl.py",
    auto_class="AutoModelForImageTextToText",
    text_config="text_config",
    generations=(("model.language_model.", "model."), ("model.visual.", "visual.")),
    layers="model.layers",
    linears=_decoder.LINEARS,
    kv=_decoder.KV,
    towers=(_vision.qwen2_5("visual", "vision_config"),),
    parameters=MappingProxyType(PARAMETERS),
    kept=_decoder.KEPT,
    server_prefix=(
        ("model.language_model.", "language_model.model."),
        ("model.visual.", "visual."),
        ("lm_head.", "language_model.lm_head."),
        ("model.", "language_model.model."),
    ),
    server_layers="language_model.model.layers",
    server_kept=("language_model.lm_head",),
    repeats_towers=True,
    flat=True,
)
