"""HunyuanImage-3.0, a root checkpoint: one transformer with routed experts, which writes text and denoises images."""

from types import MappingProxyType

from ckptq.scopes.denoisers import Denoiser, Stack, _linears

DENOISER = Denoiser(
    name="hunyuan_image3",
    classes=("HunyuanImage3ForCausalMM",),
    pipelines=(),
    source="vLLM-Omni 0.30.0 diffusion/models/hunyuan_image3/hunyuan_image3_transformer.py, HunyuanImage3Model",
    builder="",
    folders=("",),
    adapted=(),
    stacks=(
        Stack(
            prefix="model.layers",
            depth="num_hidden_layers",
            linears=(
                _linears.heads("self_attn.qkv_proj"),
                _linears.columns("self_attn.o_proj"),
                _linears.rows("mlp.shared_mlp.gate_and_up_proj", "mlp.shared_mlp.gate_up_proj"),
                _linears.columns("mlp.shared_mlp.down_proj"),
                _linears.rows("mlp.experts.{e}.gate_and_up_proj", "mlp.experts"),
                _linears.columns("mlp.experts.{e}.down_proj", "mlp.experts"),
            ),
            kept=(_linears.whole("mlp.gate.wg", "mlp.gate"),),
            experts="num_experts",
            optional=("mlp.shared_mlp.gate_up_proj", "mlp.shared_mlp.down_proj"),
            server="layers",
        ),
    ),
    stays=(
        "lm_head",
        "model.wte",
        "vae.*",
        "vision_model.*",
        "vision_aligner.*",
        "patch_embed.*",
        "final_layer.*",
        "time_embed.*",
        "time_embed_2.*",
        "timestep_emb.*",
        "timestep_r_emb.*",
        "guidance_emb.*",
    ),
    modules=MappingProxyType({"mlp.experts": "mlp.experts.routed_experts"}),
    ignore=(
        "*.mlp.gate",
        "lm_head",
        "vae*",
        "vision_*",
        "patch_embed*",
        "final_layer*",
        "time_embed*",
        "timestep_*",
        "guidance_emb*",
    ),
    # Rows of qkv_proj come in groups of heads, which load_weights takes apart; it can do so with one scale, not with one a row.
    formats=MappingProxyType({"modelopt": ("fp8",), "fp8": ("fp8", "fp8-tensor")}),
    # model_executor/models/hunyuan_image3/hunyuan_image3.py HunyuanModel.load_weights, of the stage that writes text, splits scales
    # as it splits weights, and fails on one scale.
    options=MappingProxyType(dict.fromkeys(("modelopt", "fp8"), "--deploy-config vllm_omni/deploy/hunyuan_image3_dit.yaml")),
)
