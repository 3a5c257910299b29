"""FLUX.2 dev and klein. Blocks of one stream have attention and feed-forward side by side, in two linears."""

from types import MappingProxyType

from ckptq.scopes.denoisers import Denoiser, Encoder, Stack, _linears

DENOISER = Denoiser(
    name="flux2",
    classes=("Flux2Transformer2DModel",),
    pipelines=("Flux2Pipeline", "Flux2KleinPipeline"),
    source="vLLM-Omni 0.30.0 diffusion/models/flux2/flux2_transformer.py and flux2_klein/flux2_klein_transformer.py, "
    "Flux2Transformer2DModel",
    builder="Flux2Transformer2DModel",
    stacks=(
        Stack(
            prefix="transformer_blocks",
            depth="num_layers",
            linears=(
                _linears.qkv("attn"),
                _linears.qkv("attn", "add_kv_proj", _linears.ADDED_QKV),
                _linears.columns("attn.to_out.0"),
                _linears.columns("attn.to_add_out"),
                _linears.rows("ff.linear_in"),
                _linears.columns("ff.linear_out"),
                _linears.rows("ff_context.linear_in"),
                _linears.columns("ff_context.linear_out"),
            ),
        ),
        Stack(
            prefix="single_transformer_blocks",
            depth="num_single_layers",
            linears=(_linears.rows("attn.to_qkv_mlp_proj"), _linears.rows("attn.to_out")),
        ),
    ),
    stays=(
        "x_embedder",
        "context_embedder",
        *(f"time_guidance_embed.{kind}_embedder.linear_{i}" for kind in ("timestep", "guidance") for i in (1, 2)),
        "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.linear",
        "single_stream_modulation.linear",
        "norm_out.linear",
        "proj_out",
    ),
    ignore=("x_embedder*", "context_embedder*", "time_guidance_embed*", "*_stream_modulation*", "norm_out*", "proj_out*"),
    # mistral_encoder/mistral_encoder.py MistralEncoderModel; klein has a plain transformers model.
    encoder=Encoder(
        folder="text_encoder",
        pipelines=("Flux2Pipeline",),
        patterns=("text_encoder*",),
        layers="text_encoder.language_model.model.layers",
        depth="text_config.num_hidden_layers",
        linears=("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    ),
    formats=MappingProxyType({"modelopt": ("fp8", "fp8-dynamic"), "fp8": ("fp8", "fp8-tensor", "fp8-block")}),
)
