"""Wan 2.2: text to video and image to video, with two experts (A14B) or one transformer (TI2V-5B). Wan 2.1 is alike."""

from types import MappingProxyType

from ckptq.scopes.denoisers import Denoiser, Stack, _linears

DENOISER = Denoiser(
    name="wan22",
    classes=("WanTransformer3DModel",),
    pipelines=("WanPipeline", "WanImageToVideoPipeline", "WanDMDPipeline", "WanT2VDMD2Pipeline", "WanI2VDMD2Pipeline"),
    source="vLLM-Omni 0.30.0 diffusion/models/wan2_2/wan2_2_transformer.py, WanTransformer3DModel",
    builder="WanTransformer3DModel",
    folders=("transformer", "transformer_2"),
    stacks=(
        Stack(
            prefix="blocks",
            depth="num_layers",
            linears=(
                _linears.qkv("attn1"),
                _linears.columns("attn1.to_out.0", "attn1.to_out"),
                # Keys and values come from the prompt here, so that these are three. Wan 2.1's image to video has two more.
                *(_linears.rows(f"attn2.{name}") for name in ("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj")),
                _linears.columns("attn2.to_out.0", "attn2.to_out"),
                _linears.rows("ffn.net.0.proj", "ffn.net_0.proj"),
                _linears.columns("ffn.net.2", "ffn.net_2"),
            ),
            optional=("attn2.add_k_proj", "attn2.add_v_proj"),
        ),
    ),
    stays=(
        *(f"condition_embedder.{kind}_embedder.linear_{i}" for kind in ("time", "text") for i in (1, 2)),
        "condition_embedder.time_proj",
        "condition_embedder.image_embedder.ff.net.0.proj",
        "condition_embedder.image_embedder.ff.net.2",
        "proj_out",
    ),
    renamed=MappingProxyType({"ffn.net.0.proj": "ffn.net_0.proj", "ffn.net.2": "ffn.net_2"}),
    ignore=("condition_embedder*", "patch_embedding*", "norm_out*", "proj_out*"),
    formats=MappingProxyType(
        {
            "modelopt": ("fp8", "fp8-dynamic"),
            "fp8": ("fp8", "fp8-tensor", "fp8-block"),
            "mxfp8": ("mxfp8",),
            "mxfp4-dualscale": ("mxfp4-dualscale",),
        }
    ),
    # quantization/factory.py resolve_quant_config_from_disk hands a section that it finds itself to ModelOptFp8Config key by key.
    # That raises TypeError. With the option, the first transformer's section holds for both.
    options=MappingProxyType({"modelopt": "--quantization fp8"}),
)
