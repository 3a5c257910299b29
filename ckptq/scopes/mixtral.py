"""Mixtral: experts in every layer, called w1, w2 and w3 in the hub's files."""

from types import MappingProxyType

from ckptq.scopes import Experts, Scope, _decoder

# vLLM 0.32.0 models/mixtral.py (MixtralAttention, MixtralMoE, MixtralDecoderLayer).
PARAMETERS = _decoder.parameters(
    _decoder.NORMS,
    _decoder.ATTENTION,
    {
        "block_sparse_moe.gate.weight": "experts hidden",
        "block_sparse_moe.experts.{e}.w1.weight": "intermediate hidden",
        "block_sparse_moe.experts.{e}.w2.weight": "hidden intermediate",
        "block_sparse_moe.experts.{e}.w3.weight": "intermediate hidden",
    },
)

SCOPE = Scope(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    source="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/model_executor/models/mixtral.py",
    auto_class="AutoModelForCausalLM",
    text_config="",
    generations=(),
    layers="model.layers",
    linears=_decoder.ATTENTION_LINEARS,
    kv=_decoder.KV,
    towers=(),
    parameters=MappingProxyType(PARAMETERS),
    kept=_decoder.KEPT,
    server_prefix=(),
    server_layers="model.layers",
    server_kept=("lm_head",),
    experts=Experts(
        runtime="block_sparse_moe.experts",
        groups=(
            ("block_sparse_moe.experts.{e}.w1", "block_sparse_moe.experts.{e}.w3"),  # gate and up
            ("block_sparse_moe.experts.{e}.w2",),
        ),
        linears=(),  # MixtralMoE builds its router without the quantization config
        dense="mlp.",  # which no layer has
        counts=("num_local_experts",),
    ),
    explicit_head_dim=True,
    # MixtralModel.hf_to_vllm_mapper, since vLLM 0.30: what llm-compressor makes of experts that it has taken apart.
    aliases=((".gate_proj.", ".w1."), (".up_proj.", ".w3."), (".down_proj.", ".w2.")),
    # transformers 5.17.0 models/mixtral/configuration_mixtral.py.
    assumed=MappingProxyType({"num_key_value_heads": 8, "num_local_experts": 8}),
)
