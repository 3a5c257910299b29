"""OmniGen2. Its transformer is 2,520 wide, no multiple of 16: the server pads as it multiplies, nothing is padded in files."""

from types import MappingProxyType

from ckptq.scopes.denoisers import Denoiser, Stack, _linears

BLOCK = (
    _linears.qkv("attn"),
    _linears.columns("attn.to_out.0"),
    _linears.fused("feed_forward.gate_up_proj", "linear_1", "linear_3"),
    _linears.columns("feed_forward.linear_2", "feed_forward.down_proj"),
)
MODULATION = ("norm1.linear",)

DENOISER = Denoiser(
    name="omnigen2",
    classes=("OmniGen2Transformer2DModel",),
    pipelines=("OmniGen2Pipeline",),
    source="vLLM-Omni 0.30.0 diffusion/models/omnigen2/omnigen2_transformer.py, OmniGen2Transformer2DModel",
    builder="",
    stacks=(
        Stack("context_refiner", "num_refiner_layers", BLOCK),
        Stack("noise_refiner", "num_refiner_layers", BLOCK, MODULATION),
        Stack("ref_image_refiner", "num_refiner_layers", BLOCK, MODULATION),
        Stack("layers", "num_layers", BLOCK, MODULATION),
    ),
    stays=(
        "x_embedder",
        "ref_image_patch_embedder",
        "time_caption_embed.timestep_embedder.linear_1",
        "time_caption_embed.timestep_embedder.linear_2",
        "time_caption_embed.caption_embedder.1",
        "norm_out.linear_1",
        "norm_out.linear_2",
    ),
    renamed=MappingProxyType({"feed_forward.linear_2": "feed_forward.down_proj"}),
    joined=MappingProxyType({"feed_forward.gate_up_proj": ("feed_forward.linear_1", "feed_forward.linear_3")}),
    ignore=("*norm1*", "x_embedder*", "ref_image_patch_embedder*", "time_caption_embed*", "norm_out*"),
    formats=MappingProxyType({"modelopt": ("fp8", "fp8-dynamic"), "fp8": ("fp8", "fp8-tensor")}),
    padded=True,
)
