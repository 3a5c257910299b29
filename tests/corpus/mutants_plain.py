"""What Llama-like decoders have of their own: biases, tied heads, heads of another width, windows, norms on heads and after blocks.
Each export is ckptq's, of a tiny checkpoint of tests/families.
"""

from __future__ import annotations

import torch

from corpus.edit import (
    Edit,
    Tensors,
    alter,
    both,
    copy,
    dequantized,
    drop,
    matching,
    put,
    requantized,
    scalar,
    swap,
    tensors,
    times,
    to,
)
from corpus.edit_files import config, elsewhere
from corpus.mutants import fault
from corpus.mutants_families import without
from corpus.places import DOWN, GATE, L0, L1, OUT, K, Q, V

PLAIN = "llama mistral qwen2 qwen3 gemma3text"
FAMILIES = f"{PLAIN} phi3 vl-modelopt qwen2vl qwen3vl gemma3 llava moe-modelopt mixtral qwen3vl-moe omni omni-moe"
BF16 = torch.bfloat16


def says(**values: object) -> Edit:
    """Keys of config.json; None takes one away."""

    def apply(data: dict[str, object]) -> None:
        for key, value in values.items():
            data.pop(key, None)
            if value is not None:
                data[key] = value

    return config(apply)


def as_one(layer: str, name: str, *shards: str) -> Edit:
    """Matrices of a layer in one tensor, as Phi-3's files have them, with the first one's scales."""

    def apply(stored: Tensors) -> None:
        found = [stored.pop(f"{layer}{shard}.weight") for shard in shards]
        stored[f"{layer}{name}.weight"] = torch.cat([t.view(torch.uint8) for t in found]).view(found[0].dtype)
        for scale in ("weight_scale", "input_scale"):
            stored[f"{layer}{name}.{scale}"], *_ = [stored.pop(f"{layer}{shard}.{scale}") for shard in shards]

    return tensors(apply)


def copied(end: str, old: str, new: str) -> Edit:
    """The tensors whose names end so again, under another number."""

    def apply(stored: Tensors) -> None:
        stored |= {name.replace(old, new, 1): stored[name].clone() for name in matching(stored, f"*{old}*{end}")}

    return tensors(apply)


def head(*, spread: float = 1.0) -> Edit:
    """An output head of its own beside tied embeddings: theirs, times `spread`."""

    def apply(stored: Tensors) -> None:
        (name,) = matching(stored, "*embed_tokens.weight")
        stored["lm_head.weight"] = (stored[name].float() * spread).to(BF16)

    return tensors(apply)


SCALES = (
    *fault(
        "weight_scale missing",
        bad={
            "llama": {"gate": drop(f"{GATE}.weight_scale")},
            "mistral": {"o": drop(f"{OUT}.weight_scale")},
            "qwen2": {"k": drop(f"{K}.weight_scale")},
            "qwen3": {"down": drop(f"{DOWN}.weight_scale")},
            "gemma3text": {"v of the layer that sees all": drop(f"{L1}self_attn.v_proj.weight_scale")},
        },
        near={PLAIN: {"in a file of its own": elsewhere(f"{DOWN}.weight_scale")}},
    ),
    *fault(
        "input_scale missing",
        bad={
            "llama": {"down": drop(f"{DOWN}.input_scale")},
            "gemma3text": {"q, k and v": drop(f"{L0}self_attn.[qkv]_proj.input_scale")},
        },
        near={"mistral": {"of one shard": drop(f"{Q}.input_scale")}},
    ),
    *fault(
        "some kv scales missing",
        bad={
            "mistral": {"k of a layer": drop(f"{K}.k_scale")},
            "gemma3text": {"a layer's with a window": drop(f"{K}.k_scale", f"{V}.v_scale")},
        },
        near={"qwen3": {"in a file of its own": elsewhere("*.k_scale")}},
    ),
    *fault(
        "kv scales under each other's name",
        bad={
            "llama qwen3": {"all": swap("k_proj.k_scale", "v_proj.v_scale", "*.k_proj.k_scale")},
            "gemma3text": {"the layers'": swap("layers.0", "layers.1", f"{K}.k_scale")},
        },
        near={"mistral": {"twice": both(*[swap("k_proj.k_scale", "v_proj.v_scale", "*.k_proj.k_scale")] * 2)}},
        needs="record",
    ),
    *fault(
        "scales a row in another shape",
        bad={"mistral": {"for heads of hidden_size": alter(lambda t: t.expand(64), f"{Q}.weight_scale")}},
        near={"qwen3": {"in a list": alter(lambda t: t.reshape(1), "*.weight_scale")}},
    ),
    *fault(
        "scales of two modules traded",
        bad={
            "llama": {"two layers'": swap("layers.0", "layers.1", f"{OUT}.weight_scale")},
            "qwen2": {"those of o and down": swap("self_attn.o_proj", "mlp.down_proj", f"{OUT}.weight_scale")},
        },
        near={"qwen2": {"forth and back": both(*[swap("layers.0", "layers.1", f"{L0}*.weight_scale")] * 2)}},
        needs="source",
    ),
    *fault(
        "weight's scale of another size",
        bad={
            "mistral": {"of q alone, doubled": alter(times(2), f"{Q}.weight_scale")},
            "qwen3": {"of k alone, halved": alter(times(0.5), f"{K}.weight_scale")},
            "gemma3text": {"of v alone, doubled": alter(times(2), f"{V}.weight_scale")},
        },
        near={"llama qwen2": {"of q alone, doubled, over codes of half the size": requantized(2, Q)}},
        needs="source",
    ),
    *fault(
        "weight of a quantized module in BF16",
        bad={"qwen3": {"o, with its scales": dequantized(f"{OUT}.weight")}},
        near={"gemma3text": {"a norm in F32": alter(to(torch.float32), f"{L0}input_layernorm.weight")}},
    ),
)

OWN = (
    *fault(
        "bias missing",
        bad={
            "llama": {"of o": drop(f"{OUT}.bias"), "of down": drop(f"{DOWN}.bias"), "all": drop("*.bias")},
            "qwen2": {"of v": drop(f"{V}.bias"), "of q, k and v": drop(f"{L0}*.bias")},
        },
        near={
            "qwen2 qwen3 mistral": {"one that q has not or that is there": elsewhere(f"{Q}.*")},
            "qwen3 gemma3text": {"one that down has not": put({f"{DOWN}.bias": torch.zeros(64, dtype=BF16)})},
        },
    ),
    *fault(
        "biases that config.json denies",
        bad={
            "llama": {
                "of the attention": says(attention_bias=False),
                "of the MLP": says(mlp_bias=False),
            },
            "mistral qwen3 gemma3text": {"there are none, but config.json has them": says(attention_bias=True)},
        },
        near={
            "llama": {"in an older word": says(attention_bias=None, bias=True)},
            "qwen2": {"which Qwen2 does not read": says(attention_bias=False)},
        },
    ),
    *fault(
        "norm missing",
        bad={
            "qwen3": {"of the keys": drop(f"{L1}self_attn.k_norm.weight")},
            "gemma3text": {
                "of the queries": drop(f"{L0}self_attn.q_norm.weight"),
                "before the MLP": drop(f"{L0}pre_feedforward_layernorm.weight"),
                "after the attention": drop(f"{L1}post_attention_layernorm.weight"),
            },
        },
        near={"gemma3text": {"in a file of its own": elsewhere("*layernorm.weight")}},
    ),
    *fault(
        "norms as another family stores them",
        bad={
            "gemma3text": {
                "1 added": alter(lambda t: t + 1, f"{L0}*norm.weight"),
                "those before and after the MLP traded": swap("pre_", "post_", f"{L0}pre_feedforward_layernorm.weight"),
            },
            "qwen3": {
                "1 taken off": alter(lambda t: t - 1, f"{L0}self_attn.q_norm.weight"),
                "those of queries and keys traded": swap("q_norm", "k_norm", f"{L0}self_attn.q_norm.weight"),
            },
        },
        near={"gemma3text qwen3": {"in F32": alter(to(torch.float32), "*norm.weight")}},
        needs="source",
    ),
    *fault(
        "norms of another width",
        bad={"qwen3": {"of all heads": alter(lambda t: t.repeat(4), f"{L0}self_attn.q_norm.weight")}},
        near={"qwen3": {"in one dimension more": alter(lambda t: t.reshape(1, -1).flatten(), f"{L0}self_attn.q_norm.weight")}},
    ),
    *fault(
        "lm_head not excluded",
        bad={PLAIN: {"no entry": without("lm_head")}},
        near={"qwen2 gemma3text": {"lm_head*": without("lm_head", "lm_head*")}},
    ),
    *fault(
        "embeddings not excluded",
        bad={"llama gemma3text": {"codes in their place": alter(to(torch.float8_e4m3fn), "model.embed_tokens.weight")}},
        near={PLAIN: {"no entry": without("embed_tokens")}},
    ),
    *fault(
        "lm_head missing",
        bad={"llama mistral": {"untied": drop("lm_head.weight")}},
        near={"qwen2 qwen3 gemma3text": {"stored though tied": copy("model.embed_tokens.weight", "lm_head.weight")}},
    ),
    *fault(
        "tied embeddings",
        bad={"qwen2 qwen3 gemma3text": {"said not to be": says(tie_word_embeddings=False)}},
        near={
            "llama": {"said to be, head of its own": says(tie_word_embeddings=True)},
            "gemma3text": {"not said": says(tie_word_embeddings=None)},
            "qwen2": {"said not to be, a head stored": both(head(), says(tie_word_embeddings=False))},
        },
    ),
    *fault(
        "head beside tied embeddings",
        bad={"qwen2 gemma3text": {"of other values": head(spread=2)}},
        near={"qwen3 gemma3text": {"the embeddings again": head()}},
        needs="source",
    ),
)

CONFIGS = (
    *fault(
        "widths and heads",
        bad={
            "mistral": {
                "no head_dim": says(head_dim=None),
                "head_dim of half the width": says(head_dim=16),
                "more KV heads": says(num_key_value_heads=4),
            },
            "qwen3": {"no head_dim, where 128 is taken": says(head_dim=None)},
            "gemma3text": {"no head_dim, where 256 is taken": says(head_dim=None), "no heads": says(num_attention_heads=None)},
            "llama": {"heads of half the width": says(head_dim=16)},
            "qwen2": {"more heads": says(num_attention_heads=8)},
        },
        near={
            "llama": {"no head_dim, which follows": says(head_dim=None)},
            "qwen2": {"a head_dim, which is not read": says(head_dim=64)},
        },
    ),
    *fault(
        "norms on heads that config.json does not name",
        bad={"qwen2": {"named, and not there": says(qk_norm=True)}},
        near={"qwen2": {"denied": says(qk_norm=False)}},
    ),
    *fault(
        "layers, of another number",
        bad={
            "llama": {"more": says(num_hidden_layers=3)},
            "mistral": {"fewer": says(num_hidden_layers=1)},
            "gemma3text": {"more, and no word what they see": says(num_hidden_layers=3)},
        },
        near={"mistral": {"a cache of training": says(use_cache=False)}},
    ),
    *fault(
        "window of another length",
        bad={
            "mistral": {"none": says(sliding_window=None), "longer": says(sliding_window=256)},
            "gemma3text": {
                "longer": says(sliding_window=256),
                "in the other layer": says(layer_types=["full_attention", "sliding_attention"]),
            },
        },
        near={"qwen2": {"that is not used": says(sliding_window=16, use_sliding_window=False)}},
        needs="source",
    ),
    *fault(
        "architecture",
        bad={
            "qwen3": {"of the generation before": says(architectures=["Qwen2ForCausalLM"])},
            "qwen2": {"Llama's": says(architectures=["LlamaForCausalLM"])},
            "mistral": {"of the vision-language model": says(architectures=["LlavaForConditionalGeneration"])},
        },
        near={"mistral": {"Llama's, which it is": says(architectures=["LlamaForCausalLM"])}},
    ),
    *fault(
        "tensor that no module has",
        bad={
            "llama": {"a norm of the queries": put({f"{L0}self_attn.q_norm.weight": torch.ones(32, dtype=BF16)})},
            "gemma3text": {"a fifth norm": copy(f"{L1}input_layernorm.weight", f"{L1}ffn_layernorm.weight")},
        },
        near={"llama mistral": {"rotary buffers": put({f"{L0}self_attn.rotary_emb.inv_freq": torch.ones(16)})}},
    ),
    *fault(
        "weight missing",
        bad={
            "mistral": {
                "q": drop(f"{Q}.weight"),
                "gate and up are one": as_one(L0, "mlp.gate_up_proj", "mlp.gate_proj", "mlp.up_proj"),
            }
        },
        near={"mistral": {"in a file of its own": elsewhere(f"{OUT}.weight")}},
    ),
    *fault(
        "tensor of a draft model",
        bad={
            FAMILIES: {"mtp": put({"mtp.layers.0.input_layernorm.weight": torch.ones(64, dtype=BF16)})},
            PLAIN: {"in a layer after the last": copy(f"{L1}input_layernorm.weight", "model.layers.2.input_layernorm.weight")},
            "mixtral moe-modelopt": {"a router after the last layer": copied("gate.weight", ".1.", ".2.")},
        },
        near={"omni omni-moe": {"of another stage": put({"talker.mtp.weight": torch.ones(64, dtype=BF16)})}},
    ),
    *fault(
        "codes and values changed",
        bad={
            "llama": {"bias of o zeroed": alter(scalar(0, BF16), f"{OUT}.bias")},
            "qwen2": {"bias of k zeroed": alter(scalar(0, BF16), f"{K}.bias")},
            "qwen2 gemma3text": {"tied embeddings": alter(times(1.1), "model.embed_tokens.weight")},
        },
        near={"mistral": {"rewritten": alter(lambda t: t.clone(), "*")}},
        needs="source",
    ),
)

MUTANTS = (*SCALES, *OWN, *CONFIGS)
