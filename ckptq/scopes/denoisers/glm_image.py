"""GLM-Image. Here the server builds modulations and projectors quantized too, unless it is told to ignore them."""

from types import MappingProxyType

from ckptq.scopes.denoisers import Denoiser, Stack, _linears

DENOISER = Denoiser(
    name="glm_image",
    classes=("GlmImageTransformer2DModel",),
    pipelines=("GlmImagePipeline",),
    source="vLLM-Omni 0.30.0 diffusion/models/glm_image/glm_image_transformer.py, GlmImageTransformer2DModel",
    builder="GlmImageTransformer2DModel",
    stacks=(
        Stack(
            prefix="transformer_blocks",
            depth="num_layers",
            linears=(
                _linears.qkv("attn1"),
                _linears.columns("attn1.to_out.0"),
                _linears.rows("ff.net.0.proj"),
                _linears.columns("ff.net.2"),
            ),
            kept=(_linears.whole("norm1.linear"),),
        ),
    ),
    stays=(
        "image_projector.proj",
        *(f"time_condition_embed.{kind}_embedder.linear_{i}" for kind in ("timestep", "condition") for i in (1, 2)),
        "norm_out.linear",
        "proj_out",
    ),
    kept=(
        _linears.rows("glyph_projector.net.0.proj"),
        _linears.columns("glyph_projector.net.2"),
        _linears.rows("prior_projector.net.0.proj"),
        _linears.columns("prior_projector.net.2"),
    ),
    ignore=(
        "*.norm1*",
        "glyph_projector*",
        "prior_projector*",
        "image_projector*",
        "time_condition_embed*",
        "norm_out*",
        "proj_out*",
    ),
    formats=MappingProxyType({"modelopt": ("fp8", "fp8-dynamic"), "fp8": ("fp8", "fp8-tensor", "fp8-block")}),
)
