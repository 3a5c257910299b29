"""What other architectures have of their own: a deepstack, experts and a router under other names, linears fused in the file, parts
that the server does not build. Each export is ckptq's, of a tiny checkpoint of tests/families.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from corpus.edit import Edit, alter, both, drop, rename, swap, times
from corpus.edit_files import config, elsewhere, ignoring, other, section
from corpus.mutants import fault

V0, V1 = "model.language_model.layers.0.", "model.language_model.layers.1."
"""Layers of Qwen3-VL."""
T0 = "thinker.model.layers.0."
"""A layer of both Omni thinkers."""
M0 = "model.layers.0."
FP8 = {"quant_algo": "FP8"}
X0 = f"{M0}block_sparse_moe.experts.0."
"""An expert of Mixtral."""


def without(part: str, *entries: str) -> Edit:
    """The list without entries that hold `part`, and with these."""
    return ignoring(lambda old: [*(e for e in old if part not in e), *entries])


def also(*entries: str) -> Edit:
    return ignoring(lambda old: [*old, *entries])


def listing(change: Callable[[dict[str, Any]], object]) -> Edit:
    """Edits the list of what is quantized, in both files."""
    return both(section(lambda s: change(s["quantized_layers"])), other(lambda s: change(s["quantized_layers"])))


def plain(body: dict[str, Any]) -> None:
    """FP8 for all that is not excluded, where the good export lists what is quantized."""
    del body["quantized_layers"]
    body["quant_algo"] = "FP8"


def halves(t: torch.Tensor) -> torch.Tensor:
    """The first and the second half of the rows, traded."""
    return torch.cat(t.view(torch.uint8).chunk(2)[::-1]).view(t.dtype)


DENSE = (
    *fault(
        "weight_scale missing",
        bad={
            "qwen3vl": {"down": drop(f"{V0}mlp.down_proj.weight_scale"), "q": drop(f"{V0}self_attn.q_proj.weight_scale")},
            "phi3": {
                "o": drop(f"{M0}self_attn.o_proj.weight_scale"),
                "of q, k and v as one": drop(f"{M0}self_attn.qkv_proj.weight_scale"),
                "of gate and up as one": drop(f"{M0}mlp.gate_up_proj.weight_scale"),
            },
            "omni": {"down": drop(f"{T0}mlp.down_proj.weight_scale")},
        },
        near={"qwen3vl phi3 omni": {"in a file of its own": elsewhere("*.weight_scale")}},
    ),
    *fault(
        "input_scale missing",
        bad={
            "qwen3vl": {"q, k and v": drop(f"{V0}self_attn.[qkv]_proj.input_scale")},
            "phi3": {"of q, k and v as one": drop(f"{M0}self_attn.qkv_proj.input_scale")},
            "omni": {"all": drop("*.input_scale")},
        },
        near={"qwen3vl": {"of one shard": drop(f"{V0}self_attn.q_proj.input_scale")}},
    ),
    *fault(
        "some kv scales missing",
        bad={
            "qwen3vl": {"v of a layer": drop(f"{V0}self_attn.v_proj.v_scale")},
            "phi3": {"v of a layer": drop(f"{M0}self_attn.*v_scale"), "k of a layer": drop(f"{M0}self_attn.*k_scale")},
            "omni": {"a layer's": drop(f"{T0}self_attn.k_proj.k_scale", f"{T0}self_attn.v_proj.v_scale")},
        },
        near={"phi3 omni": {"in a file of its own": elsewhere("*.k_scale", "*.v_scale")}},
    ),
    *fault(
        "scales of two modules traded",
        bad={
            "qwen3vl": {"two layers'": swap("layers.0", "layers.1", f"{V0}mlp.down_proj.weight_scale")},
            "phi3": {"those of o and down": swap("self_attn.o_proj", "mlp.down_proj", f"{M0}self_attn.o_proj.weight_scale")},
            "omni": {"two layers'": swap("layers.0", "layers.1", f"{T0}self_attn.o_proj.weight_scale")},
        },
        near={"phi3": {"forth and back": both(*[swap("layers.0", "layers.1", f"{M0}*.weight_scale")] * 2)}},
        needs="source",
    ),
    *fault(
        "gate and up traded",
        bad={"phi3": {"halves of the one weight": alter(halves, f"{M0}mlp.gate_up_proj.weight")}},
        near={"phi3": {"twice": alter(lambda t: halves(halves(t)), f"{M0}mlp.gate_up_proj.weight")}},
        needs="source",
    ),
    *fault(
        "excluded, yet quantized",
        bad={
            "phi3": {"q, k and v as one": also(f"{M0}self_attn.qkv_proj")},
            "qwen3vl": {"o": also(f"{V0}self_attn.o_proj")},
            "omni": {"o": also(f"{T0}self_attn.o_proj"), "a layer, by part of its name": also("model.layers.1.")},
        },
        near={"phi3": {"a shard that the file has not": also(f"{M0}self_attn.q_proj")}},
    ),
    *fault(
        "norm missing",
        bad={
            "qwen3vl": {"of the keys": drop(f"{V0}self_attn.k_norm.weight"), "of the tower": drop("*visual.blocks.0.norm2.weight")},
            "omni": {"of the audio tower": drop("thinker.audio_tower.ln_post.weight")},
        },
        near={"qwen3vl": {"in a file of its own": elsewhere(f"{V0}self_attn.k_norm.weight")}},
    ),
)

PARTS = (
    *fault(
        "tower not excluded",
        bad={
            "qwen3vl": {
                "no entry": without("visual"),
                "model.visual": without("visual", "model.visual"),
                "blocks alone": without("visual", "model.visual.blocks*"),
            },
            "omni": {
                "vision": without("visual"),
                "both": ignoring(lambda old: [e for e in old if "tower" not in e and "visual" not in e]),
            },
        },
        near={
            "qwen3vl": {name: without("visual", name) for name in ("visual*", "model.visual.*", "*visual*")},
            "omni": {name: without("visual", name) for name in ("visual*", "thinker.visual*")},
        },
    ),
    *fault(
        "lm_head not excluded",
        bad={"qwen3vl phi3 omni mixtral": {"no entry": without("lm_head")}},
        near={"omni": {"lm_head": without("lm_head", "lm_head")}},
    ),
    *fault(
        "lm_head not excluded",
        bad={"omni-moe": {"by any list, for it has no name there": both(section(plain), other(plain))}},
        near={"omni-moe": {"where what is quantized is listed": without("lm_head")}},
    ),
    *fault(
        "tower not excluded",
        bad={
            "omni-moe": {
                "but listed": both(
                    without("visual"),
                    listing(lambda each: each.update({f"thinker.visual.blocks.0.attn.{m}": FP8 for m in ("qkv", "proj")})),
                )
            }
        },
        near={
            "omni-moe": {
                "where what is quantized is listed": without("visual"),
                "both": listing(lambda each: each.update({"thinker.visual.blocks.0.attn.proj": FP8})),
            },
            "omni": {"talker": without("talker")},
        },
    ),
    *fault(
        "tower's tensor missing",
        bad={
            "qwen3vl": {
                "deepstack merger": drop("*visual.deepstack_merger_list.0.linear_fc1.weight"),
                "positions": drop("*visual.pos_embed.weight"),
            },
            "omni": {"audio": drop("thinker.audio_tower.layers.0.fc1.weight")},
        },
        near={"qwen3vl": {"in a file of its own": elsewhere("*visual.deepstack_merger_list.0.*")}},
    ),
    *fault(
        "thinker's layers under another prefix",
        bad={"omni": {"none": rename("thinker.model.", "model."), "twice": rename("thinker.model.", "thinker.thinker.model.")}},
        near={"omni": {"and back": both(rename("thinker.", "zzz."), rename("zzz.", "thinker."))}},
    ),
)

EXPERTS = (
    *fault(
        "excluded, yet quantized",
        bad={
            "omni-moe": {
                "o is not listed": listing(lambda each: each.pop(f"{T0}self_attn.o_proj")),
                "experts are not": listing(lambda each: [each.pop(name) for name in [*each] if f"{T0}mlp.experts." in name]),
            }
        },
        near={"omni-moe": {"listed twice": listing(lambda each: each.update({"model.layers.9.self_attn.o_proj": FP8}))}},
    ),
    *fault(
        "router not excluded",
        bad={"omni-moe": {"but listed": both(without("gate"), listing(lambda each: each.update({f"{T0}mlp.gate": FP8})))}},
        near={"omni-moe": {"where what is quantized is listed": without("gate")}},
    ),
    *fault(
        "expert's input_scale missing",
        bad={"omni-moe": {"an expert's": drop(f"{T0}mlp.experts.1.*.input_scale")}},
        near={"omni-moe": {"in a file of its own": elsewhere("*experts*.input_scale")}},
    ),
    *fault(
        "expert's weight_scale missing",
        bad={"omni-moe": {"up": drop(f"{T0}mlp.experts.1.up_proj.weight_scale")}},
        near={"omni-moe": {"in a file of its own": elsewhere("*experts*.weight_scale")}},
    ),
    *fault(
        "expert's weight_scale missing",
        bad={"mixtral": {"w2": drop(f"{X0}w2.weight_scale"), "w1": drop(f"{X0}w1.weight_scale")}},
        near={"mixtral": {"in a file of its own": elsewhere("*experts*.weight_scale")}},
    ),
    *fault(
        "expert's input_scale missing",
        bad={"mixtral": {"an expert's": drop(f"{X0}*.input_scale"), "all": drop("*experts*.input_scale")}},
        near={"mixtral": {"in a file of its own": elsewhere("*experts*.input_scale")}},
    ),
    *fault(
        "expert's scale of another value",
        bad={
            "mixtral": {
                "two experts' traded": swap("experts.0", "experts.1", f"{X0}w2.weight_scale"),
                "one of w1 and w3": alter(times(2), f"{X0}w3.weight_scale"),
            }
        },
        near={"mixtral": {"forth and back": both(*[swap("experts.0", "experts.1", f"{X0}w2.weight_scale")] * 2)}},
        needs="source",
    ),
    *fault(
        "router not excluded",
        bad={},  # there it never gets the quantization config: models/mixtral.py MixtralMoE
        near={"mixtral": {"no entry": without("gate"), "router": without("gate", "*router*")}},
    ),
    *fault(
        "experts excluded, yet quantized",
        bad={"mixtral": {"*experts*": also("*experts*"), "one expert": also(f"{X0}w2")}},
        near={"mixtral": {"those of a layer that is not there": also("model.layers.9.block_sparse_moe.experts*")}},
    ),
    *fault(
        "expert under another name",
        bad={"mixtral": {"beyond the last": rename("experts.3.", "experts.19.", "*experts.3.*")}},
        near={
            "mixtral": {
                "Qwen's": both(rename(".w1.", ".gate_proj."), rename(".w3.", ".up_proj."), rename(".w2.", ".down_proj.")),
            }
        },
    ),
    *fault(
        "module excluded, its scales dropped silently",
        bad={"mixtral": {"o": also(f"{M0}self_attn.o_proj")}},
        near={"mixtral": {"of a layer that is not there": also("model.layers.9.self_attn.o_proj")}},
    ),
    *fault(
        "experts, of another number",
        bad={
            "mixtral": {
                "fewer": config(lambda c: c.update(num_local_experts=2)),
                "more": config(lambda c: c.update(num_local_experts=16)),
            }
        },
        near={"mixtral": {"a loss of training": config(lambda c: c.update(router_aux_loss_coef=0.5))}},
    ),
)

MUTANTS = (*DENSE, *PARTS, *EXPERTS)
