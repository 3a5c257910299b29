"""Configs and exclude lists of INT8, NVFP4, MXFP8 and MXFP4, and of exports that mix formats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from corpus.derived import O1, QKV0
from corpus.edit import Edit, both
from corpus.edit_files import groups, ignoring, other, remove, section, setting
from corpus.mutants import fault
from corpus.mutants_configs import NO_SECTION, OTHER
from corpus.mutants_excludes import TOWER_NAMES, also, instead, tower, without
from corpus.mutants_formats import weights
from corpus.places import DOWN, L0, OUT, K, Q

Layers = dict[str, dict[str, Any]]
FP8, NVFP4 = {"quant_algo": "FP8"}, {"quant_algo": "NVFP4", "group_size": 16}
LOCAL = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16, "dynamic": "local"}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
"""Settings of activations that another format has."""


def layers(change: Callable[[Layers], object]) -> Edit:
    """Edits quantized_layers in place."""
    return section(lambda s: change(s["quantized_layers"]))


def renamed(old: str, new: str) -> Edit:
    """quantized_layers whose names begin otherwise."""
    return section(
        lambda s: s.update(quantized_layers={name.replace(old, new, 1): value for name, value in s["quantized_layers"].items()})
    )


def activations(**values: Any) -> Edit:
    return groups(lambda g: g["input_activations"].update(values))


def group(number: int, change: Callable[[dict[str, Any]], object]) -> Edit:
    """One of several config groups."""
    return section(lambda s: change(s["config_groups"][f"group_{number}"]))


CONFIGS = (
    *fault(
        "quant_algo of another format",
        bad={
            "vl-nvfp4": {name: setting(quant_algo=name) for name in ("FP8", "W4A16_NVFP4", "MXFP8", "MIXED_PRECISION")},
            "vl-w4a16": {name: setting(quant_algo=name, config_groups=None) for name in ("NVFP4", "FP8_PB_WO")},
            "vl-mxfp8": {name: setting(quant_algo=name) for name in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4")},
            "vl-mixed": {"NVFP4": setting(quant_algo="NVFP4"), "FP8": setting(quant_algo="FP8")},
        },
        near={
            "vl-w4a16": {"NVFP4, whose groups have no activations": setting(quant_algo="NVFP4")},
            "vl-nvfp4": {"in small letters": setting(quant_algo="nvfp4")},
            "vl-mxfp8": {"in small letters": setting(quant_algo="mxfp8")},
            "vl-mixed": {"in small letters": setting(quant_algo="mixed_precision")},
        },
    ),
    *fault(
        "config groups that say weights alone",
        bad={"vl-nvfp4 our-nvfp4": {"no activations": groups(lambda g: g.update(input_activations=None))}},
        near={
            "vl-nvfp4": {
                "no groups": setting(config_groups=None),
                "other numbers": groups(lambda g: g["weights"].update(num_bits=8)),
            }
        },
    ),
    *fault(
        "group size",
        bad={
            "vl-nvfp4 vl-w4a16": {"32": setting(group_size=32), "8": setting(group_size=8)},
            "vl-nvfp4": {"a word": setting(group_size="sixteen")},
            "vl-mixed": {
                "32 in every layer's": layers(lambda q: [v.update(group_size=32) for v in q.values() if v["quant_algo"] == "NVFP4"])
            },
            "vl-ct-nvfp4 vl-ct-nvfp4a16": {"32": weights(group_size=32)},
            "vl-ct-mxfp8 vl-ct-mxfp4": {"16": weights(group_size=16), "64": weights(group_size=64)},
        },
        near={
            "vl-nvfp4": {"16, at the top": setting(group_size=16), "in a group that nobody reads": weights(group_size=32)},
            "vl-mxfp8": {"64": setting(group_size=64)},
            "vl-mixed": {"absent": layers(lambda q: [v.pop("group_size", None) for v in q.values()])},
        },
    ),
    *fault(
        "hf_quant_config.json alone",
        bad={
            "vl-nvfp4": {
                "without group_size": both(NO_SECTION, other(lambda q: q.pop("group_size"))),
                "without excludes": both(NO_SECTION, other(lambda q: q.pop("exclude_modules"))),
                "without a word of the cache": both(NO_SECTION, other(lambda q: q.pop("kv_cache_quant_algo"))),
            },
            "vl-w4a16 vl-mxfp8 our-mxfp8 our-mixed": {"of a format that is not looked for": NO_SECTION},
        },
        near={
            "vl-nvfp4 our-nvfp4": {"whole": NO_SECTION},
            "vl-mxfp8 vl-w4a16 vl-mixed": {"the other one alone": remove(OTHER)},
        },
    ),
    *fault(
        "another method's name",
        bad={
            "vl-nvfp4 vl-mxfp8": {"compressed-tensors": setting(quant_method="compressed-tensors")},
            "vl-ct-nvfp4 vl-ct-mxfp8": {"modelopt": setting(quant_method="modelopt", quant_algo="NVFP4")},
        },
        near={
            "vl-nvfp4": {"of its own for it": setting(quant_method="modelopt_fp4")},
            "vl-mxfp8": {"of its own for it": setting(quant_method="modelopt_mxfp8")},
            "vl-mixed": {"of its own for it": setting(quant_method="modelopt_mixed")},
        },
    ),
    *fault(
        "quantized_layers",
        bad={
            "vl-mixed": {
                "absent": both(setting(quantized_layers=None), other(lambda q: q.pop("quantized_layers"))),
                "empty": setting(quantized_layers={}),
                "without o": layers(lambda q: q.pop(OUT)),
                "without qkv": layers(lambda q: [q.pop(name) for name in QKV0]),
                "without a layer's MLP": layers(lambda q: [q.pop(f"{L0}mlp.{s}_proj") for s in ("gate", "up", "down")]),
                "a shard of another format": layers(lambda q: q.update({Q: NVFP4})),
                "MLP in FP8": layers(lambda q: q.update({DOWN: FP8})),
                "o in NVFP4": layers(lambda q: q.update({OUT: NVFP4})),
                "weights alone": layers(
                    lambda q: [v.update(quant_algo="W4A16_NVFP4") for v in q.values() if v["quant_algo"] == "NVFP4"]
                ),
                "of an algorithm that nobody knows": layers(lambda q: q.update({OUT: {"quant_algo": "INT4_AWQ"}})),
                "of no algorithm": layers(lambda q: q.update({OUT: {}})),
                "a tower's linear": layers(lambda q: q.update({TOWER_NAMES[1]: FP8})),
                "lm_head": layers(lambda q: q.update({"lm_head": FP8})),
            },
            "vl-mixed our-mixed": {
                "without model": renamed("model.layers", "layers"),
                "by the server's name, doubled": renamed("model.layers", "language_model.layers"),
            },
        },
        near={
            "vl-mixed": {
                "in the other file alone": setting(quantized_layers=None),
                "without k, whose neighbors are there": layers(lambda q: q.pop(K)),
                "of a layer that is not there": layers(lambda q: q.update({"model.layers.9.mlp.down_proj": NVFP4})),
                "in small letters": layers(lambda q: [v.update(quant_algo=v["quant_algo"].lower()) for v in q.values()]),
                "in another order": section(lambda s: s.update(quantized_layers=dict(reversed(s["quantized_layers"].items())))),
            },
            "vl-mixed our-mixed": {
                "by the nested name": renamed("model.layers", "model.language_model.layers"),
                "by the server's name": renamed("model.layers", "language_model.model.layers"),
            },
            "our-mixed": {"without excludes": ignoring(lambda _: [])},
        },
    ),
    *fault(
        "kv scheme",
        bad={
            "vl-nvfp4 our-mixed vl-ct-nvfp4": {"absent": setting(kv_cache_scheme=None)},
            "vl-nvfp4": {"4 bits": section(lambda s: s["kv_cache_scheme"].update(num_bits=4))},
        },
        near={"vl-nvfp4": {"absent from the file that does not count": other(lambda q: q.update(kv_cache_quant_algo=None))}},
    ),
)

COMPRESSED = (
    *fault(
        "compression format",
        bad={
            "vl-ct-int8": {
                "packed": both(setting(format="pack-quantized"), groups(lambda g: g.update(format="pack-quantized"))),
                "dense": both(setting(format="dense"), groups(lambda g: g.update(format="dense"))),
            },
        },
        near={
            "vl-ct-int8": {"of the groups alone": section(lambda s: s.pop("format"))},
            "vl-ct-nvfp4": {
                "packed integers'": both(setting(format="pack-quantized"), groups(lambda g: g.update(format="pack-quantized"))),
                "float": groups(lambda g: g.update(format="float-quantized")),
            },
            "vl-ct-mixed": {
                "of all, another": setting(format="nvfp4-pack-quantized"),
                "of the MLP, float": group(1, lambda g: g.update(format="float-quantized")),
            },
            "vl-ct-mxfp4": {"that of NVFP4": groups(lambda g: g.update(format="nvfp4-pack-quantized"))},
            "vl-ct-mxfp8": {"that of FP8": groups(lambda g: g.update(format="float-quantized"))},
        },
    ),
    *fault(
        "strategy",
        bad={
            "vl-ct-int8": {"tensor": weights(strategy="tensor"), "group": weights(strategy="group", group_size=128)},
            "vl-ct-nvfp4": {"group": weights(strategy="group"), "channel": weights(strategy="channel", group_size=None)},
            "vl-ct-mxfp8 vl-ct-mxfp4": {"tensor_group": weights(strategy="tensor_group")},
        },
        near={"vl-ct-int8": {"with an observer": weights(observer="mse")}},
    ),
    *fault(
        "what is said of activations",
        bad={
            "vl-ct-int8": {
                "static": activations(dynamic=False, strategy="tensor"),
                "nothing": groups(lambda g: g.update(input_activations=None)),
            },
            "vl-ct-nvfp4": {"nothing": groups(lambda g: g.update(input_activations=None))},
            "vl-ct-nvfp4a16": {"those of NVFP4": groups(lambda g: g.update(input_activations=LOCAL))},
        },
        near={
            "vl-ct-int8": {"asymmetric": activations(symmetric=False)},
            "vl-ct-nvfp4": {"dynamic in all": activations(dynamic=True)},
            "vl-ct-mxfp8 vl-ct-mxfp4": {"nothing": groups(lambda g: g.update(input_activations=None))},
            "vl-ct-mxfp4": {"INT8 a token": groups(lambda g: g.update(input_activations=INT8))},
        },
    ),
    *fault(
        "number type",
        bad={
            "vl-ct-int8": {"float": weights(type="float"), "asymmetric": weights(symmetric=False)},
            "vl-ct-nvfp4": {"int": weights(type="int"), "8 bits": weights(num_bits=8)},
            "vl-ct-mxfp4": {"8 bits": weights(num_bits=8)},
            "vl-ct-mxfp8": {"4 bits": weights(num_bits=4), "without the scales' type": weights(scale_dtype=None)},
        },
        near={"vl-ct-mxfp4 vl-ct-nvfp4": {"without the scales' type": weights(scale_dtype=None)}},
    ),
    *fault(
        "targets",
        bad={
            "vl-ct-mixed": {
                "none of the MLP": group(1, lambda g: g.update(targets=["re:.*gate_proj$"])),
                "MLP as attention": section(
                    lambda s: s["config_groups"].update(
                        group_0={**s["config_groups"]["group_0"], "targets": ["Linear"]},
                        group_1={**s["config_groups"]["group_1"], "targets": []},
                    )
                ),
                "traded": section(
                    lambda s: s["config_groups"].update(
                        group_0={**s["config_groups"]["group_0"], "targets": ["re:.*mlp.*"]},
                        group_1={**s["config_groups"]["group_1"], "targets": ["re:.*self_attn.*"]},
                    )
                ),
                "a shard in each": both(
                    group(0, lambda g: g.update(targets=["re:.*o_proj$", "re:.*q_proj$"])),
                    group(1, lambda g: g.update(targets=["re:.*mlp.*", "re:.*[kv]_proj$"])),
                ),
                "no group of the MLP": section(lambda s: s["config_groups"].pop("group_1")),
            },
            "vl-ct-nvfp4 vl-ct-int8": {"attention alone": groups(lambda g: g.update(targets=["re:.*self_attn.*"]))},
        },
        near={
            "vl-ct-mixed": {
                "attention as all the rest": group(0, lambda g: g.update(targets=["Linear"])),
                "by single names": group(1, lambda g: g.update(targets=[f"re:.*{s}_proj$" for s in ("gate", "up", "down")])),
            },
            "vl-ct-mxfp4": {"by expression": groups(lambda g: g.update(targets=["re:.*_proj$"]))},
        },
    ),
)

EXCLUDES = (
    *fault(
        "tower not excluded",
        bad={
            "vl-nvfp4": {"no entry": tower(), "model.visual": tower("model.visual")},
            "vl-mxfp8 vl-w4a16 our-pcpt": {"no entry": tower()},
        },
        near={
            "vl-nvfp4": {"*visual*": tower("*visual*")},
            "vl-mixed": {"excluded though not listed": both(other(lambda q: q.update(exclude_modules=[])), also("visual*"))},
        },
    ),
    *fault(
        "names that compressed-tensors does not match",
        bad={
            "vl-ct-int8": {"without the merger": without("merger")},
            "vl-ct-nvfp4 our-ct-mxfp8": {"visual": tower("visual")},
            "vl-ct-mxfp4": {"visual*": tower("visual*")},
        },
        near={"vl-ct-nvfp4 our-ct-int8": {"re:.*visual.*": tower("re:.*visual.*"), "every name": tower(*TOWER_NAMES)}},
    ),
    *fault(
        "names that the native method does not match",
        bad={"our-fp8-static our-fp8-block": {"visual*": tower("visual*")}},
        near={"our-fp8-dynamic": {"every name, nested": tower(*(f"model.{name}" for name in TOWER_NAMES))}},
    ),
    *fault(
        "lm_head not excluded",
        bad={"vl-nvfp4 vl-mxfp8": {"no entry": without("lm_head")}},
        near={"vl-nvfp4": {"lm_head*": instead("lm_head", "lm_head*")}},
    ),
    *fault(
        "kept module not excluded",
        bad={
            "vl-nvfp4-kept vl-ct-nvfp4-kept": {"no entry": without("self_attn")},
            "vl-ct-int8-kept": {"no entry": without("o_proj"), "another layer": instead(O1, OUT)},
        },
        near={"vl-ct-int8-kept": {"by expression": instead(O1, r"re:.*layers\.1\.self_attn\.o_proj$")}},
    ),
    *fault(
        "some shards of a fused linear excluded",
        bad={
            "vl-nvfp4 vl-ct-int8": {"q": also(Q)},
            "vl-nvfp4-kept vl-ct-nvfp4-kept": {"without v": without("v_proj")},
        },
        near={"vl-nvfp4-kept vl-ct-nvfp4-kept": {"in another order": ignoring(lambda old: list(reversed(old)))}},
    ),
    *fault(
        "excluded, yet quantized",
        bad={"vl-nvfp4 vl-w4a16 vl-mxfp8 vl-mixed vl-ct-int8 vl-ct-nvfp4 vl-ct-mxfp4": {"o": also(OUT)}},
        near={"vl-nvfp4 vl-ct-mxfp4": {"a layer that is not there": also("model.layers.9.self_attn.o_proj")}},
    ),
)

MUTANTS = (*CONFIGS, *COMPRESSED, *EXCLUDES)
