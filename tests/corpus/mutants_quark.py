"""Quark's exports: a section of many parts that the server all wants, a list without globs, scales of other shapes."""

from __future__ import annotations

from typing import Any

import torch

from corpus.derived import QKV0
from corpus.edit import alter, drop, requantized, scalar, shape, times, to
from corpus.edit_files import elsewhere, ignoring, section, setting
from corpus.mutants import fault
from corpus.mutants_excludes import TOWER_NAMES, also, instead, tower, without
from corpus.places import DOWN, OUT, K, Q
from corpus.relabeled import SPEC, quark_section

LAYER = quark_section("static")["global_quant_config"]
BY_ROW = quark_section("channel")["global_quant_config"]


def of_all(part: str, **values: Any) -> Any:
    """Settings of `weight` or `input_tensors`, for all layers."""
    return section(lambda s: s["global_quant_config"][part].update(values))


def export(**values: Any) -> Any:
    return section(lambda s: s["export"].update(values))


def layers(group: list[str], **outputs: Any) -> Any:
    """Settings of keys and values whose outputs are these, and the names of the cache."""
    settings = {f"*{s}_proj": {**LAYER, "output_tensors": {**SPEC, **outputs}} for s in "kv"}
    return section(lambda s: (s["export"].update(kv_cache_group=group), s.update(layer_quant_config=settings)))


SECTION = (
    *fault(
        "part of Quark's section",
        bad={
            "vl-quark": {
                "no export": setting(export=None),
                "no names of the cache": section(lambda s: s["export"].pop("kv_cache_group")),
                "null in their place": export(kv_cache_group=None),
                "no settings for all": setting(global_quant_config=None),
                "no settings of types": setting(layer_type_quant_config=None),
                "null for types": section(lambda s: s.update(layer_type_quant_config=None)),
            }
        },
        near={
            "vl-quark": {
                "settings of a type": setting(layer_type_quant_config={"Linear": BY_ROW}),
                "what nobody reads, left out": section(lambda s: [s.pop(key) for key in ("algo_config", "version", "quant_mode")]),
                "another way of packing": export(pack_method="order"),
            }
        },
    ),
    *fault(
        "what Quark's settings say of tensors",
        bad={
            "vl-quark": {
                "activations dynamic": of_all("input_tensors", is_dynamic=True),
                "activations by row": of_all("input_tensors", qscheme="per_channel"),
                "no activations": section(lambda s: s["global_quant_config"].update(input_tensors=None)),
                "outputs, too": section(lambda s: s["global_quant_config"].update(output_tensors=SPEC)),
                "weights dynamic": of_all("weight", is_dynamic=True),
                "weights by row": of_all("weight", qscheme="per_channel"),
                "weights by block, of no size": of_all("weight", qscheme="per_block"),
            },
            "vl-quark-channel": {
                "weights as one": of_all("weight", qscheme="per_tensor"),
                "activations static": of_all("input_tensors", is_dynamic=False),
            },
        },
        near={
            "vl-quark": {
                "with an observer": of_all("weight", observer_cls="PerTensorMinMaxObserver"),
                "of another rounding": of_all("input_tensors", round_method="floor"),
            },
            "vl-quark-channel": {"on another axis": of_all("weight", ch_axis=1)},
        },
    ),
    *fault(
        "Quark's settings of some layers",
        bad={
            "vl-quark": {
                "queries alone": setting(layer_quant_config={"*q_proj": BY_ROW}),
                "outputs of o": setting(layer_quant_config={"*o_proj": {**LAYER, "output_tensors": SPEC}}),
                "down by row": setting(layer_quant_config={"*down_proj": BY_ROW}),
            }
        },
        near={
            "vl-quark": {
                "as those for all": setting(layer_quant_config={"*o_proj": LAYER, "*q_proj": LAYER}),
                "of a layer that is not there": setting(layer_quant_config={"*layers.9.*": BY_ROW}),
            }
        },
    ),
    *fault(
        "Quark's names of the cache",
        bad={
            "vl-quark": {
                "without settings": export(kv_cache_group=["*k_proj", "*v_proj"]),
                "of another type": layers(["*k_proj", "*v_proj"], dtype="int8"),
                "of keys alone": layers(["*k_proj"]),
            }
        },
        near={"vl-quark": {"and their settings": layers(["*k_proj", "*v_proj"])}},
    ),
)

EXCLUDES = (
    *fault(
        "names that Quark does not match",
        bad={
            "vl-quark": {
                name: tower(name) for name in ("visual", "visual*", "*visual*", "model.visual", "visual.blocks", "re:blocks.*")
            },
            "vl-quark-channel": {"no entry": tower(), "without the merger": without("merger")},
        },
        near={
            "vl-quark": {
                "re:.*visual.*": tower("re:.*visual.*"),
                "re:visual": tower("re:visual"),
                "every name, nested": tower(*(f"model.{name}" for name in TOWER_NAMES)),
                "without lm_head": without("lm_head"),
            },
            "vl-quark-kept": {"the fused name's expression": instead("layers.0.self_attn", "re:.*layers.0.self_attn.qkv_proj")},
        },
    ),
    *fault(
        "some shards of a fused linear excluded",
        bad={"vl-quark": {"q": also(QKV0[0])}, "vl-quark-kept": {"without v": without("v_proj")}},
        near={"vl-quark-kept": {"in another order": ignoring(lambda old: list(reversed(old)))}},
    ),
    *fault(
        "excluded, yet quantized",
        bad={"vl-quark": {"o": also(OUT)}},
        near={"vl-quark": {"a layer that is not there": also("model.layers.9.self_attn.o_proj")}},
    ),
    *fault(
        "exclude list that is no list",
        bad={"vl-quark": {"null": section(lambda s: s.update(exclude=None)), "absent": setting(exclude=None)}},
        near={"vl-quark": {"one entry twice": also("lm_head")}},
    ),
    *fault(
        "exclude list under another key",
        bad={"vl-quark": {"ignore": section(lambda s: s.update(ignore=s.pop("exclude")))}},
        near={"vl-quark": {"a second key, too": section(lambda s: s.update(ignore=s["exclude"]))}},
    ),
)

SCALES = (
    *fault(
        "weight_scale missing",
        bad={"vl-quark vl-quark-channel": {"down": drop(f"{DOWN}.weight_scale"), "k": drop(f"{K}.weight_scale")}},
        near={"vl-quark": {"in a file of its own": elsewhere("*.weight_scale")}},
    ),
    *fault(
        "input_scale missing",
        bad={"vl-quark": {"o": drop(f"{OUT}.input_scale"), "all": drop("*.input_scale")}},
        near={"vl-quark": {"of one shard": drop(f"{Q}.input_scale")}},
    ),
    *fault(
        "one scale in two dimensions",
        bad={"vl-quark": {"o": alter(shape(1, 1), f"{OUT}.weight_scale")}},
        near={"vl-quark": {"in a list": alter(shape(1), "*.weight_scale", "*.input_scale")}},
    ),
    *fault(
        "scales a row in another shape",
        bad={
            "vl-quark-channel": {
                "[N, 1]": alter(lambda t: t.reshape(-1, 1), "*.weight_scale"),
                "one": alter(lambda t: t[0].reshape(()), f"{OUT}.weight_scale"),
                "a row short": alter(lambda t: t[1:], f"{OUT}.weight_scale"),
            }
        },
        near={"vl-quark-channel": {"in F64": alter(to(torch.float64), "*.weight_scale")}},
    ),
    *fault(
        "scale zero",
        bad={"vl-quark": {"weight": alter(scalar(0), f"{OUT}.weight_scale"), "input": alter(scalar(0), f"{DOWN}.input_scale")}},
        near={},
    ),
    *fault(
        "weight's scale of another size",
        bad={"vl-quark vl-quark-channel": {"doubled": alter(times(2), f"{OUT}.weight_scale")}},
        near={"vl-quark": {"doubled, over codes of half the size": requantized(2, OUT)}},
        needs="source",
    ),
)

MUTANTS = (*SECTION, *EXCLUDES, *SCALES)
