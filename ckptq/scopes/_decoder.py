"""What Llama-like decoders share: the linears of a layer, and the names of its parameters with their dimensions.

vLLM 0.32.0 model_executor/models/llama.py (LlamaAttention, LlamaMLP, LlamaDecoderLayer), whose names most families took over. A
family that departs from them says so in its own file. Not a scope: modules beginning with an underscore are none.
"""

from collections.abc import Mapping
from types import MappingProxyType

from ckptq.scopes import Fused

KV = ("self_attn.k_proj", "self_attn.v_proj")
KEPT = ("lm_head", "model.embed_tokens")

ATTENTION_LINEARS = (
    Fused("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "heads"),
    Fused("self_attn.o_proj", ("self_attn.o_proj",), "columns"),
)
MLP_LINEARS = (
    Fused("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"), "rows"),
    Fused("mlp.down_proj", ("mlp.down_proj",), "columns"),
)
LINEARS = (*ATTENTION_LINEARS, *MLP_LINEARS)

# Parts of a layer: name relative to it -> dimensions.
NORMS = MappingProxyType({"input_layernorm.weight": "hidden", "post_attention_layernorm.weight": "hidden"})
ATTENTION = MappingProxyType(
    {
        "self_attn.q_proj.weight": "q hidden",
        "self_attn.k_proj.weight": "kv hidden",
        "self_attn.v_proj.weight": "kv hidden",
        "self_attn.o_proj.weight": "hidden q",
    }
)
QKV_BIAS = MappingProxyType({"self_attn.q_proj.bias": "q", "self_attn.k_proj.bias": "kv", "self_attn.v_proj.bias": "kv"})
O_BIAS = MappingProxyType({"self_attn.o_proj.bias": "hidden"})
QK_NORMS = MappingProxyType({"self_attn.q_norm.weight": "head", "self_attn.k_norm.weight": "head"})
MLP = MappingProxyType(
    {
        "mlp.gate_proj.weight": "intermediate hidden",
        "mlp.up_proj.weight": "intermediate hidden",
        "mlp.down_proj.weight": "hidden intermediate",
    }
)
MLP_BIAS = MappingProxyType(
    {"mlp.gate_proj.bias": "intermediate", "mlp.up_proj.bias": "intermediate", "mlp.down_proj.bias": "hidden"}
)


def parameters(*parts: Mapping[str, str], model: str = "model", head: str = "lm_head") -> dict[str, str]:
    """`Scope.parameters` of a decoder whose layers have these parts: embeddings, final norm, head, then the layers'.

    `model` and `head` are canonical: where the embeddings, the norm and `layers` are, and the output head.
    """
    whole = {f"{model}.embed_tokens.weight": "vocab hidden", f"{model}.norm.weight": "hidden", f"{head}.weight": "vocab hidden"}
    return whole | {f"{model}.layers.{{i}}.{name}": dims for part in parts for name, dims in part.items()}


def given(flag: str, part: Mapping[str, str]) -> dict[str, str]:
    """The same names for a layer that has them only where the language model's config sets `flag`: `attention_bias`."""
    return {name: f"{dims} if {flag}" for name, dims in part.items()}


# Of the class that vLLM has for Llama, and for what it serves by deriving from it. A config's `bias` is an older word for
# attention_bias (LlamaDecoderLayer).
LLAMA = MappingProxyType(
    parameters(
        NORMS, ATTENTION, given("attention_bias or bias", QKV_BIAS), given("attention_bias or bias", O_BIAS), MLP,
        given("mlp_bias", MLP_BIAS),
    )
)  # fmt: skip
