"""Phi-3, Phi-3.5 and Phi-4. Their files hold q, k and v as one matrix, gate and up as another, with one scale each."""

from types import MappingProxyType

from ckptq.scopes import Fused, Scope, _decoder

# vLLM 0.32.0 models/phi3.py (Phi3ForCausalLM derives from LlamaForCausalLM); layers/linear.py QKVParallelLinear and
# MergedColumnParallelLinear weight_loader_v2 take such a matrix apart, and give each part the one scale.
ATTENTION = {"self_attn.qkv_proj.weight": "qkv hidden", "self_attn.o_proj.weight": "hidden q"}
ATTENTION_BIAS = {"self_attn.qkv_proj.bias": "qkv", **_decoder.O_BIAS}
MLP = {"mlp.gate_up_proj.weight": "gate_up hidden", "mlp.down_proj.weight": "hidden intermediate"}
MLP_BIAS = {"mlp.gate_up_proj.bias": "gate_up", "mlp.down_proj.bias": "hidden"}
PARAMETERS = _decoder.parameters(
    _decoder.NORMS,
    ATTENTION,
    _decoder.given("attention_bias or bias", ATTENTION_BIAS),
    MLP,
    _decoder.given("mlp_bias", MLP_BIAS),
)

SCOPE = Scope(
    name="phi3",
    architectures=("Phi3ForCausalLM",),
    source="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/model_executor/models/phi3.py",
    auto_class="AutoModelForCausalLM",
    text_config="",
    generations=(),
    layers="model.layers",
    linears=(
        Fused("self_attn.qkv_proj", ("self_attn.qkv_proj",), "heads"),
        Fused("self_attn.o_proj", ("self_attn.o_proj",), "columns"),
        Fused("mlp.gate_up_proj", ("mlp.gate_up_proj",), "rows"),
        Fused("mlp.down_proj", ("mlp.down_proj",), "columns"),
    ),
    kv=("self_attn.qkv_proj", "self_attn.qkv_proj"),
    towers=(),
    parameters=MappingProxyType(PARAMETERS),
    kept=_decoder.KEPT,
    server_prefix=(),
    server_layers="model.layers",
    server_kept=("lm_head",),
    explicit_head_dim=True,
)
