"""Qwen2.5-VL.

The hub's files say `model.*` and `visual.*`; files written since transformers 4.52 may say
`model.language_model.*` and `model.visual.*`.
"""

from ckptq.scopes import Fused, Scope, Tower

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
        Fused("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Fused("self_attn.o_proj", ("self_attn.o_proj",)),
        Fused("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
        Fused("mlp.down_proj", ("mlp.down_proj",)),
    ),
    kv=("self_attn.k_proj", "self_attn.v_proj"),
    towers=(
        Tower(
            "visual",
            (
                Fused("blocks.{i}.attn.qkv", ("blocks.{i}.attn.qkv",)),
                Fused("blocks.{i}.attn.proj", ("blocks.{i}.attn.proj",)),
                Fused("blocks.{i}.mlp.gate_up_proj", ("blocks.{i}.mlp.gate_proj", "blocks.{i}.mlp.up_proj")),
                Fused("blocks.{i}.mlp.down_proj", ("blocks.{i}.mlp.down_proj",)),
                Fused("merger.mlp.0", ("merger.mlp.0",)),
                Fused("merger.mlp.2", ("merger.mlp.2",)),
            ),
        ),
    ),
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
