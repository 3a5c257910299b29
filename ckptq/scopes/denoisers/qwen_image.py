"""Qwen-Image, its edit models (2509 and 2511 are those of QwenImageEditPlusPipeline) and the layered one: one transformer."""

from types import MappingProxyType

from ckptq.scopes.denoisers import Denoiser, Stack, _linears

DENOISER = Denoiser(
    name="qwen_image",
    classes=("QwenImageTransformer2DModel",),
    pipelines=(
        "QwenImagePipeline",
        "QwenImageEditPipeline",
        "QwenImageEditPlusPipeline",
        "QwenImageLayeredPipeline",
        "QwenImageDMD2Pipeline",
    ),
    source="vLLM-Omni 0.30.0 diffusion/models/qwen_image/qwen_image_transformer.py, QwenImageTransformer2DModel",
    builder="QwenImageTransformer2DModel",
    stacks=(
        Stack(
            prefix="transformer_blocks",
            depth="num_layers",
            linears=(
                _linears.qkv("attn"),
                _linears.qkv("attn", "add_kv_proj", _linears.ADDED_QKV),
                _linears.columns("attn.to_out.0"),
                _linears.columns("attn.to_add_out"),
                _linears.rows("img_mlp.net.0.proj"),
                _linears.columns("img_mlp.net.2"),
                _linears.rows("txt_mlp.net.0.proj"),
                _linears.columns("txt_mlp.net.2"),
            ),
            stays=("img_mod.1", "txt_mod.1"),
        ),
    ),
    stays=(
        "img_in",
        "txt_in",
        "time_text_embed.timestep_embedder.linear_1",
        "time_text_embed.timestep_embedder.linear_2",
        "norm_out.linear",
        "proj_out",
    ),
    modules=MappingProxyType({"attn.to_out.0": "attn.to_out"}),
    ignore=("*img_mod*", "*txt_mod*", "img_in", "txt_in", "time_text_embed*", "norm_out*", "proj_out*"),
    formats=MappingProxyType({"modelopt": ("fp8", "fp8-dynamic"), "fp8": ("fp8", "fp8-tensor", "fp8-block"), "int8": ("int8",)}),
)
