"""LLaVA 1.5: CLIP, a projector of two linears, and a Llama.

The hub's files say `language_model.model.*`, `language_model.lm_head`, `vision_tower.*` and `multi_modal_projector.*`; files
written since transformers 4.52 may say `model.language_model.*`, `lm_head`, `model.vision_tower.*` and so on.
"""

from types import MappingProxyType

from ckptq.scopes import Fused, Scope, Tower, _decoder, _vision

# vLLM 0.32.0 models/llama.py (LlamaAttention, LlamaMLP), models/llava.py (LlavaMultiModalProjector).
PARAMETERS = {
    **_decoder.parameters(_decoder.NORMS, _decoder.ATTENTION, _decoder.MLP),
    **_vision.clip_parameters("vision_tower"),
    "multi_modal_projector.linear_1.weight": "hidden vision",
    "multi_modal_projector.linear_1.bias": "hidden if multimodal_projector_bias",
    "multi_modal_projector.linear_2.weight": "hidden hidden",
    "multi_modal_projector.linear_2.bias": "hidden if multimodal_projector_bias",
}

SCOPE = Scope(
    name="llava",
    architectures=("LlavaForConditionalGeneration",),
    source="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/model_executor/models/llava.py",
    auto_class="AutoModelForImageTextToText",
    text_config="text_config",
    generations=(
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("language_model.lm_head.", "lm_head."),
        ("model.language_model.", "model."),
        ("language_model.model.", "model."),
        ("model.vision_tower.", "vision_tower."),
    ),
    layers="model.layers",
    linears=_decoder.LINEARS,
    kv=_decoder.KV,
    towers=(
        _vision.clip("vision_tower", "vision_config", "vision_feature_layer"),
        Tower(
            "multi_modal_projector",
            "vision_config.",
            (Fused("linear_1", ("linear_1",), "rows"), Fused("linear_2", ("linear_2",), "columns")),
            {"vision": "hidden_size"},
            heads="",
        ),
    ),
    parameters=MappingProxyType(PARAMETERS),
    kept=_decoder.KEPT,
    server_prefix=(
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("lm_head.", "language_model.lm_head."),
    ),
    server_layers="language_model.model.layers",
    server_kept=("language_model.lm_head",),
    explicit_head_dim=True,
    # transformers 5.19.0 models/llama/configuration_llama.py, models/llava/configuration_llava.py: the 7B's text_config names
    # none of its sizes but the vocabulary's.
    assumed=MappingProxyType(
        {
            "vocab_size": 32_000,
            "hidden_size": 4096,
            "intermediate_size": 11_008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "multimodal_projector_bias": True,
        }
    ),
    model_types=MappingProxyType({"text_config": ("llama", "mistral"), "vision_config": ("clip_vision_model",)}),
)
