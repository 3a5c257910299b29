"""Gemma 3 with SigLIP (4B to 27B).

The hub's files say `language_model.model.*`, `vision_tower.*` and `multi_modal_projector.*`; files written since transformers
4.52 may say `model.language_model.*`, `model.vision_tower.*` and `model.multi_modal_projector.*`.
"""

from types import MappingProxyType

from ckptq.scopes import Scope, Tower, _decoder, _vision
from ckptq.scopes import gemma3_text as _text

# vLLM 0.32.0 models/gemma3_mm.py (Gemma3MultiModalProjector); the projection is a parameter, no linear.
PARAMETERS = {
    **_text.PARAMETERS,
    **_vision.siglip_parameters("vision_tower"),
    "multi_modal_projector.mm_input_projection_weight": "vision hidden",
    "multi_modal_projector.mm_soft_emb_norm.weight": "vision",
}

SCOPE = Scope(
    name="gemma3",
    architectures=("Gemma3ForConditionalGeneration",),
    source="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/model_executor/models/gemma3_mm.py",
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
        _vision.siglip("vision_tower", "vision_config"),
        Tower("multi_modal_projector", "vision_config.", (), {"vision": "hidden_size"}, heads=""),
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
    norm_offset=1.0,  # layers/layernorm.py GemmaRMSNorm
    assumed=MappingProxyType({**_text.ASSUMED, "vocab_size": 262_208}),
    model_types=MappingProxyType({"vision_config": ("siglip_vision_model",)}),
)
