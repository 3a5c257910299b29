"""Qwen2.5-VL.

The hub's files say `model.*` and `visual.*`; files written since transformers 4.52 may say
`model.language_model.*` and `model.visual.*`.
"""

from types import MappingProxyType

from ckptq.scopes import Fused, Scope, Tower

# vLLM 0.32.0 models/qwen2.py (Qwen2Attention, Qwen2MLP, Qwen2DecoderLayer), models/qwen2_5_vl.py (Qwen2_5_Vision*).
PARAMETERS = {
    "model.embed_tokens.weight": "vocab hidden",
    "model.norm.weight": "hidden",
    "lm_head.weight": "vocab hidden",
    "model.layers.{i}.input_layernorm.weight": "hidden",
    "model.layers.{i}.post_attention_layernorm.weight": "hidden",
    "model.layers.{i}.self_attn.q_proj.weight": "q hidden",
    "model.layers.{i}.self_attn.k_proj.weight": "kv hidden",
    "model.layers.{i}.self_attn.v_proj.weight": "kv hidden",
    "model.layers.{i}.self_attn.q_proj.bias": "q",
    "model.layers.{i}.self_attn.k_proj.bias": "kv",
    "model.layers.{i}.self_attn.v_proj.bias": "kv",
    "model.layers.{i}.self_attn.o_proj.weight": "hidden q",
    "model.layers.{i}.mlp.gate_proj.weight": "intermediate hidden",
    "model.layers.{i}.mlp.up_proj.weight": "intermediate hidden",
    "model.layers.{i}.mlp.down_proj.weight": "hidden intermediate",
    "visual.patch_embed.proj.weight": "vision channels frames patch patch",
    "visual.blocks.{i}.norm1.weight": "vision",
    "visual.blocks.{i}.norm2.weight": "vision",
    "visual.blocks.{i}.attn.qkv.weight": "vision_qkv vision",
    "visual.blocks.{i}.attn.qkv.bias": "vision_qkv",
    "visual.blocks.{i}.attn.proj.weight": "vision vision",
    "visual.blocks.{i}.attn.proj.bias": "vision",
    "visual.blocks.{i}.mlp.gate_proj.weight": "vision_mlp vision",
    "visual.blocks.{i}.mlp.gate_proj.bias": "vision_mlp",
    "visual.blocks.{i}.mlp.up_proj.weight": "vision_mlp vision",
    "visual.blocks.{i}.mlp.up_proj.bias": "vision_mlp",
    "visual.blocks.{i}.mlp.down_proj.weight": "vision vision_mlp",
    "visual.blocks.{i}.mlp.down_proj.bias": "vision",
    "visual.merger.ln_q.weight": "vision",
    "visual.merger.mlp.0.weight": "merged merged",
    "visual.merger.mlp.0.bias": "merged",
    "visual.merger.mlp.2.weight": "vision_out merged",
    "visual.merger.mlp.2.bias": "vision_out",
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
    linears=(
        Fused("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "heads"),
        Fused("self_attn.o_proj", ("self_attn.o_proj",), "columns"),
        Fused("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"), "rows"),
        Fused("mlp.down_proj", ("mlp.down_proj",), "columns"),
    ),
    kv=("self_attn.k_proj", "self_attn.v_proj"),
    towers=(
        Tower(
            "visual",
            "vision_config.depth",
            (
                Fused("blocks.{i}.attn.qkv", ("blocks.{i}.attn.qkv",), "heads"),
                Fused("blocks.{i}.attn.proj", ("blocks.{i}.attn.proj",), "columns"),
                Fused("blocks.{i}.mlp.gate_up_proj", ("blocks.{i}.mlp.gate_proj", "blocks.{i}.mlp.up_proj"), "rows"),
                Fused("blocks.{i}.mlp.down_proj", ("blocks.{i}.mlp.down_proj",), "columns"),
                Fused("merger.mlp.0", ("merger.mlp.0",), "rows"),
                Fused("merger.mlp.2", ("merger.mlp.2",), "columns"),
            ),
        ),
    ),
    parameters=MappingProxyType(PARAMETERS),
    kept=("lm_head", "model.embed_tokens"),
    server_prefix=(
        ("model.language_model.", "language_model.model."),
        ("model.visual.", "visual."),
        ("lm_head.", "language_model.lm_head."),
        ("model.", "language_model.model."),
    ),
    server_layers="language_model.model.layers",
    server_kept=("language_model.lm_head",),
)
