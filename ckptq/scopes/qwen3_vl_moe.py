"""Qwen3-VL-MoE: Qwen3-VL's tower, and layers as Qwen3-MoE has them.

The hub's files hold the experts of a layer together; ckptq/unstack.py sees them one by one, as they are written.
"""

import dataclasses
from types import MappingProxyType

from ckptq.scopes import Scope, _decoder, _experts, _vision

# vLLM 0.32.0 models/qwen3_vl_moe.py (Qwen3MoeLLMModel), models/qwen3_moe.py, models/qwen3_vl.py (Qwen3_Vision*).
PARAMETERS = {
    **_decoder.parameters(
        _decoder.NORMS,
        _decoder.ATTENTION,
        _decoder.given("attention_bias", _decoder.QKV_BIAS),
        _decoder.QK_NORMS,
        _decoder.MLP,
        _experts.QWEN3_PARAMETERS,
        model="model.language_model",
    ),
    **_vision.qwen3_parameters("model.visual"),
}

SCOPE = Scope(
    name="qwen3_vl_moe",
    architectures=("Qwen3VLMoeForConditionalGeneration",),
    source="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/model_executor/models/qwen3_vl_moe.py",
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
    server_kept=("language_model.lm_head",),
    experts=dataclasses.replace(_experts.QWEN3, stored=("mlp.experts.gate_up_proj", "mlp.experts.down_proj")),
    explicit_head_dim=True,
    repeats_towers=True,
)
