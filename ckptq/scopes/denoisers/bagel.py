"""BAGEL, a root checkpoint: a language model whose linears have twins, `_moe_gen`, for the tokens of the image in the making."""

from types import MappingProxyType

from ckptq.scopes.denoisers import Denoiser, Stack, _linears

QKV = ("q_proj", "k_proj", "v_proj")

DENOISER = Denoiser(
    name="bagel",
    classes=("BagelForConditionalGeneration",),
    pipelines=(),
    source="vLLM-Omni 0.30.0 diffusion/models/bagel/bagel_transformer.py, Qwen2MoTForCausalLM and Bagel",
    builder="",
    folders=("",),
    adapted=(),
    stacks=(
        Stack(
            prefix="language_model.model.layers",
            depth="llm_config.num_hidden_layers",
            linears=(
                # One module holds both twins of an attention's linear: mot/mot_qkv_parallel_linear.py, mot_row_parallel_linear.py.
                _linears.qkv("self_attn", "qkv_proj", QKV),
                _linears.qkv("self_attn", "qkv_proj", tuple(f"{name}_moe_gen" for name in QKV)),
                _linears.columns("self_attn.o_proj"),
                _linears.columns("self_attn.o_proj_moe_gen", "self_attn.o_proj"),
                _linears.fused("mlp.gate_up_proj", "gate_proj", "up_proj"),
                _linears.columns("mlp.down_proj"),
                _linears.fused("mlp_moe_gen.gate_up_proj", "gate_proj", "up_proj"),
                _linears.columns("mlp_moe_gen.down_proj"),
            ),
            server="bagel.language_model.model.layers",
        ),
    ),
    stays=(
        "language_model.lm_head",
        "language_model.model.embed_tokens",
        "vit_model.*",
        "time_embedder.mlp.*",
        "vae2llm",
        "llm2vae",
        "encoder.*",
        "decoder.*",
    ),
    kept=(_linears.rows("connector.fc1", "bagel.connector.fc1"), _linears.columns("connector.fc2", "bagel.connector.fc2")),
    ignore=("*connector*", "lm_head", "*.lm_head", "*vit_model*", "*vae2llm*", "*llm2vae*", "*time_embedder*"),
    # The kernel that multiplies both twins at once knows one scale a weight: mot/mot_qkv_parallel_linear.py _mot_gemm_fp8_w8a8.
    formats=MappingProxyType({"modelopt": ("fp8",), "fp8": ("fp8", "fp8-tensor")}),
)
