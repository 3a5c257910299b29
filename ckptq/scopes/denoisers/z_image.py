"""Z-Image and Z-Image-Turbo. The server builds the transformer by its own numbers: 30 layers, 2 blocks in each refiner."""

from types import MappingProxyType

from ckptq.scopes.denoisers import Denoiser, Encoder, Stack, _linears

BLOCK = (
    _linears.qkv("attention"),
    _linears.columns("attention.to_out.0"),
    _linears.fused("feed_forward.w13", "w1", "w3"),
    _linears.columns("feed_forward.w2"),
)
MODULATION = ("adaLN_modulation.0",)

DENOISER = Denoiser(
    name="z_image",
    classes=("ZImageTransformer2DModel",),
    pipelines=("ZImagePipeline",),
    source="vLLM-Omni 0.30.0 diffusion/models/z_image/z_image_transformer.py, ZImageTransformer2DModel",
    builder="ZImageTransformer2DModel",
    stacks=(
        Stack("noise_refiner", "n_refiner_layers", BLOCK, MODULATION),
        Stack("context_refiner", "n_refiner_layers", BLOCK),
        Stack("layers", "n_layers", BLOCK, MODULATION),
    ),
    stays=(
        "all_x_embedder.2-1",
        "t_embedder.mlp.0",
        "t_embedder.mlp.2",
        "cap_embedder.1",
        "all_final_layer.2-1.linear",
        "all_final_layer.2-1.adaLN_modulation.1",
    ),
    ignore=("*adaLN_modulation*", "all_x_embedder*", "t_embedder*", "cap_embedder*", "all_final_layer*"),
    # pipeline_z_image.py builds it by create_transformers_model, models/utils.py recursive_replace_linear: every linear, and the
    # names begin at the encoder itself.
    encoder=Encoder(
        folder="text_encoder",
        pipelines=("ZImagePipeline",),
        patterns=("model.layers*", "lm_head"),
        layers="model.layers",
        depth="num_hidden_layers",
        linears=(
            *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
            *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        ),
        others=("lm_head",),
    ),
    formats=MappingProxyType({"modelopt": ("fp8", "fp8-dynamic"), "fp8": ("fp8", "fp8-tensor", "fp8-block"), "int8": ("int8",)}),
)
