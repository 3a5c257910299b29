"""The list of modules that stay unquantized: each method matches it in its own way, and no way is what one expects."""

from __future__ import annotations

from corpus.edit import Edit
from corpus.edit_files import ignoring, section
from corpus.mutants import fault
from corpus.places import OUT

TOWER_NAMES = [
    *(f"visual.blocks.{n}.{m}" for n in (0, 1) for m in ("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),
    *("visual.merger.mlp.0", "visual.merger.mlp.2"),
]  # fmt: skip
ATTENTION = "model.layers.0.self_attn."


def tower(*entries: str) -> Edit:
    """These entries in the place of those for the tower."""
    return ignoring(lambda old: [*(e for e in old if "visual" not in e), *entries])


def also(*entries: str) -> Edit:
    return ignoring(lambda old: [*old, *entries])


def without(part: str) -> Edit:
    """The list without entries that hold `part`."""
    return ignoring(lambda old: [e for e in old if part not in e])


def instead(part: str, *entries: str) -> Edit:
    return ignoring(lambda old: [*(e for e in old if part not in e), *entries])


MODELOPT = (
    *fault(
        "tower not excluded",
        bad={
            "vl-modelopt": {
                "no entry": tower(),
                "no list": ignoring(lambda _: []),
                "model.visual": tower("model.visual"),
                "re:": tower("re:visual.*"),
                "vision": tower("vision*"),
                "blocks alone": tower("visual.blocks*"),
                "shards of what the server fuses": tower(*(name for name in TOWER_NAMES if "gate_proj" not in name)),
                "weights' names": tower(*(f"{name}.weight" for name in TOWER_NAMES)),
            },
            "vl-nested": {"model.visual": tower("model.visual"), "no entry": tower()},
            "vl-pcpt": {"model.visual": tower("model.visual")},
            "vl-pb-wo": {"no entry": tower()},
        },
        near={
            "vl-modelopt": {
                name: tower(name) for name in ("visual", "*visual*", "model.visual*", "model.visual.*", "visual.*", "isual")
            },
            "vl-pcpt": {"every name": tower(*TOWER_NAMES)},
        },
    ),
    *fault(
        "lm_head not excluded",
        bad={"vl-modelopt vl-tied vl-pcpt moe-modelopt": {"no entry": without("lm_head")}},
        near={"vl-modelopt": {name: instead("lm_head", name) for name in ("*lm_head*", "lm_head*", "head")}},
    ),
    *fault(
        "kept module not excluded",
        bad={
            "vl-kept-o": {
                "no entry": without("o_proj"),
                "the weight's name": instead("o_proj", "model.layers.1.self_attn.o_proj.weight"),
                "re:": instead("o_proj", "re:model.layers.1.self_attn.o_proj"),
                "without model": instead("o_proj", "language_model.layers.1.self_attn.o_proj"),
                "another layer": instead("o_proj", OUT),
            },
            "moe-kept-o": {"no entry": without("o_proj")},
            "vl-kept-qkv": {"no entry": without("self_attn")},
        },
        near={
            "vl-kept-o": {
                name: instead("o_proj", name)
                for name in (
                    "model.language_model.layers.1.self_attn.o_proj",
                    "language_model.model.layers.1.self_attn.o_proj",
                    "*layers.1.self_attn.o_proj",
                    "layers.1.self_attn.o_proj",
                    "*.1.*o_proj",
                )
            },
        },
    ),
    *fault(
        "some shards of a fused linear excluded",
        bad={
            "vl-modelopt": {"q": also(f"{ATTENTION}q_proj"), "gate": also("model.layers.0.mlp.gate_proj")},
            "vl-kept-qkv": {"without v": without("v_proj")},
            "vl-ct-kept": {"without v": without("v_proj")},
            "vl-fp8-kept": {"without q": without("q_proj")},
        },
        near={"vl-kept-qkv vl-ct-kept vl-fp8-kept": {"in another order": ignoring(lambda old: list(reversed(old)))}},
    ),
    *fault(
        "glob on a shard of a fused linear",
        bad={
            "vl-kept-qkv": {
                "stars before": instead("self_attn", *(f"*layers.0.self_attn.{s}_proj" for s in "qkv")),
                "stars after": instead("self_attn", *(f"{ATTENTION}{s}_pro?" for s in "qkv")),
                "a star after part of the fused name": instead("self_attn", "*layers.0.self_attn.qkv*"),
                "one for three": instead("self_attn", "*layers.0.self_attn.[qkv]_proj"),
            }
        },
        near={
            "vl-kept-qkv": {
                "the fused name": instead("self_attn", f"{ATTENTION}qkv_proj"),
                "part of the fused name": instead("self_attn", "layers.0.self_attn.qkv"),
            }
        },
    ),
    *fault(
        "excluded, yet quantized",
        bad={
            "vl-modelopt": {
                "o": also(OUT),
                "a layer": also("model.layers.1*"),
                "a layer's attention": also("model.layers.0.self_attn.*"),
                "by one letter": also("q"),
            },
            "vl-pcpt vl-ct-dynamic vl-fp8-dynamic moe-modelopt moe-ct": {"o": also(OUT)},
        },
        near={
            "vl-modelopt": {"a layer that is not there": also("model.layers.9*"), "an empty glob": also("audio_tower*")},
            "vl-ct-dynamic vl-fp8-dynamic": {"a layer that is not there": also("model.layers.9.self_attn.o_proj")},
        },
    ),
    *fault(
        "layer 1 excludes layers 10 and 11",
        bad={"vl-deep-kept": {name: instead("layers.1", name) for name in ("model.layers.1", "model.layers.1*", "layers.1")}},
        near={"vl-deep-kept": {name: instead("layers.1", name) for name in ("model.layers.1.", "*.layers.1.*", "*layers.1*")}},
    ),
    *fault(
        "exclude list under another key",
        bad={
            "vl-modelopt": {
                "modules_to_not_convert": section(lambda s: s.update(modules_to_not_convert=s.pop("ignore"))),
                "ignored_layers": section(lambda s: s.update(ignored_layers=s.pop("ignore"))),
            },
            "vl-ct-dynamic": {"exclude_modules": section(lambda s: s.update(exclude_modules=s.pop("ignore")))},
            "vl-fp8-dynamic": {"ignore": section(lambda s: s.update(ignore=s.pop("ignored_layers")))},
        },
        near={
            "vl-modelopt": {"a second key, too": section(lambda s: s.update(exclude_modules=s["ignore"]))},
            "vl-fp8-dynamic": {"transformers' key": section(lambda s: s.update(modules_to_not_convert=s.pop("ignored_layers")))},
        },
    ),
    *fault(
        "exclude list that is no list",
        bad={
            "vl-modelopt": {
                "a text": section(lambda s: s.update(ignore="lm_head, visual*")),
                "null": section(lambda s: s.update(ignore=None)),
                "numbers": section(lambda s: s.update(ignore=[1, 2])),
            },
            "vl-ct-dynamic": {"a text": section(lambda s: s.update(ignore="re:.*visual.*"))},
            "vl-fp8-dynamic": {"null": section(lambda s: s.update(ignored_layers=None))},
        },
        near={"vl-modelopt": {"one entry twice": also("visual*")}},
    ),
)

OTHERS = (
    *fault(
        "names that the native method does not match",
        bad={
            "vl-fp8-static vl-fp8-block": {
                "visual*": tower("visual*"),
                "visual": tower("visual"),
                "re:": tower("re:visual.*"),
            },
            "vl-fp8-dynamic": {"without the merger": without("merger"), "model.visual": tower("model.visual")},
        },
        near={
            "vl-fp8-dynamic": {
                "every name": tower(*TOWER_NAMES),
                "every name, nested": tower(*(f"model.{name}" for name in TOWER_NAMES)),
                "without lm_head": without("lm_head"),
            }
        },
    ),
    *fault(
        "names that compressed-tensors does not match",
        bad={
            "vl-ct-dynamic": {
                "visual": tower("visual"),
                "visual*": tower("visual*"),
                "by the hub's nested name": tower("re:^model[.]visual[.].*"),
                "without the merger": without("merger"),
            },
            "vl-ct-block": {"none": tower()},
        },
        near={
            "vl-ct-dynamic": {
                "re:.*visual.*": tower("re:.*visual.*"),
                "re:visual.*": tower("re:visual.*"),
                "every name, nested": tower(*(f"model.{name}" for name in TOWER_NAMES)),
                "without lm_head, which is no Linear there": without("lm_head"),
            }
        },
    ),
)

MUTANTS = (*MODELOPT, *OTHERS)
