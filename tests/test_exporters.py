"""The formats: each shipped recipe's tensors and configuration against tests/data/golden.json, and against what ModelOpt 0.47 and
llm-compressor 0.14 write for the same source; and what no format has a form for.

    PYTHONPATH=tests python tests/test_exporters.py     # writes golden.json again: read the difference before it is committed
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from corpus.bases import BASES, folder

from ckptq import __version__
from ckptq.checkpoint import read_inventory
from ckptq.errors import RecipeError
from ckptq.exporters import find_exporter
from ckptq.plan import Copy, Encode, Plan, module_of
from ckptq.planner import build_plan
from ckptq.recipe import Recipe, load_recipe, shipped
from ckptq.scopes import find_scope

EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny-qwen2.5-vl"
GOLDEN = Path(__file__).parent / "data" / "golden.json"
QUANT_CONFIG = "hf_quant_config.json"
RECIPES = sorted(name for name in shipped() if name.startswith("qwen25vl-lm") and not name.endswith("-text"))

Tensors = dict[str, tuple[str, list[int]]]


def plan(recipe: Recipe, source: Path) -> Plan:
    component = read_inventory(source).main
    return build_plan(recipe, component, find_scope(component.config), find_exporter(recipe.export.format))


@cache
def golden() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(GOLDEN.read_text())
    return found


def described(name: str) -> dict[str, Any]:
    """What golden.json has of a recipe: the tensors that it adds or changes, and the configuration, with layers folded."""
    made = plan(load_recipe(name), EXAMPLE)
    new = {spec.name: [spec.dtype, list(spec.shape)] for op in made.ops if not isinstance(op, Copy) for spec in op.outputs}
    found = {"tensors": folded(new), "quantization_config": json.loads(made.files["config.json"])["quantization_config"]}
    if QUANT_CONFIG in made.files:
        found[QUANT_CONFIG] = json.loads(made.files[QUANT_CONFIG])
    text = json.dumps(folded(found))
    return dict(json.loads(text.replace(f"ckptq-{__version__}", "ckptq-VERSION")))


def copied(name: str) -> dict[str, Any]:
    """{tensor: [dtype, shape]} of what stays as it is, with layers folded."""
    made = plan(load_recipe(name), EXAMPLE)
    kept = {op.output.name: [op.output.dtype, list(op.output.shape)] for op in made.ops if isinstance(op, Copy)}
    return dict(sorted(folded(kept).items()))


def folded(value: Any) -> Any:
    """Names in keys and lists with the numbers of layers joined: `layers.{0..5}.`. What differs between layers raises."""
    if isinstance(value, dict):
        groups: dict[str, dict[int, Any]] = {}
        for key, inner in value.items():
            pattern, number = split(key)
            groups.setdefault(pattern, {})[number] = folded(inner)
        for pattern, inner in groups.items():
            assert all(other == next(iter(inner.values())) for other in inner.values()), pattern
        return {join(pattern, list(inner)): next(iter(inner.values())) for pattern, inner in groups.items()}
    if isinstance(value, list) and all(isinstance(inner, str) for inner in value):
        found: dict[str, list[int]] = {}
        for pattern, number in map(split, value):
            found.setdefault(pattern, []).append(number)
        return [join(pattern, numbers) for pattern, numbers in found.items()]
    return value


def split(name: str) -> tuple[str, int]:
    match = re.search(r"\.(layers|blocks)\.(\d+)\.", name)
    return (name, -1) if match is None else (name[: match.start(2)] + "{}" + name[match.end(2) :], int(match[2]))


def join(pattern: str, numbers: list[int]) -> str:
    numbers = sorted(numbers)
    assert numbers == list(range(numbers[0], numbers[-1] + 1)), pattern
    return pattern.replace("{}", f"{{{numbers[0]}..{numbers[-1]}}}") if numbers[0] >= 0 else pattern


@pytest.mark.parametrize("name", RECIPES)
def test_golden(name: str) -> None:
    assert described(name) == golden()["recipes"][name]
    assert copied(name) == golden()["kept"]


def test_golden_speaks_of_every_recipe() -> None:
    assert sorted(golden()["recipes"]) == RECIPES


# --- the exporters people use ---

PEERS = {
    "vl-modelopt-fp8kv-peer": "qwen25vl-lm-fp8",
    "vl-modelopt-pcpt-peer": "qwen25vl-lm-fp8-dynamic-modelopt",
    "vl-modelopt-pbwo-peer": "qwen25vl-lm-fp8-block-modelopt",
    "vl-modelopt-nvfp4kv-peer": "qwen25vl-lm-nvfp4-modelopt",
    "vl-modelopt-w4a16-peer": "qwen25vl-lm-nvfp4a16-modelopt",
    "vl-modelopt-mxfp8-peer": "qwen25vl-lm-mxfp8-modelopt",
    "vl-modelopt-mixedkv-peer": "qwen25vl-lm-mixed-modelopt",
    "moe-modelopt-fp8kv-peer": "qwen3-moe-fp8",
    "moe-modelopt-nvfp4kv-peer": "qwen3-moe-nvfp4",
    "vl-ct-fp8kv-peer": "qwen25vl-lm-fp8-compressed-tensors",
    "vl-ct-dynamic-peer": "qwen25vl-lm-fp8-dynamic-compressed-tensors",
    "vl-ct-block-peer": "qwen25vl-lm-fp8-block-compressed-tensors",
    "vl-ct-int8-peer": "qwen25vl-lm-int8-compressed-tensors",
    "vl-ct-nvfp4kv-peer": "qwen25vl-lm-nvfp4-compressed-tensors",
    "vl-ct-nvfp4a16-peer-files": "qwen25vl-lm-nvfp4a16-compressed-tensors",
    "vl-ct-mxfp8-peer-files": "qwen25vl-lm-mxfp8-compressed-tensors",
    "vl-ct-mxfp4-peer-files": "qwen25vl-lm-mxfp4-compressed-tensors",
    "vl-ct-mixed-peer": "qwen25vl-lm-mixed-compressed-tensors",
}
"""{export of ModelOpt or llm-compressor: the recipe for the same}."""


def both(base: str) -> tuple[Plan, Path]:
    """Our plan for the peer's source, with an FP8 KV cache where the peer wrote one, and the peer's folder."""
    kv_cache = "fp8" if BASES[base].kv == "scales" else "null"
    return plan(load_recipe(PEERS[base], [f"kv_cache={kv_cache}"]), BASES[base].source), folder(base)


@pytest.mark.parametrize("base", PEERS)
def test_the_tensors_are_those_of_the_peer(base: str) -> None:
    """Deliberate: scales are F32 where llm-compressor rounds them to the model's BF16."""
    made, peer = both(base)
    ours = {spec.name: (spec.dtype, spec.shape) for spec in made.tensors.values()}
    theirs = {name: (t.spec.dtype, t.spec.shape) for name, t in read_inventory(peer).main.tensors.items()}
    rounded = {name for name, (dtype, _) in theirs.items() if dtype == "BF16" and ours.get(name, ("",))[0] == "F32"}
    assert not rounded or BASES[base].method == "compressed-tensors"
    assert all(re.search(r"\.(weight|input|k|v)_scale$", name) for name in rounded)
    assert ours == {name: ("F32" if name in rounded else dtype, shape) for name, (dtype, shape) in theirs.items()}


@pytest.mark.parametrize("base", PEERS)
def test_the_section_says_what_the_peers_says(base: str) -> None:
    """Deliberate: what stays and what a group takes is said in fewer words, and what a reader assumes anyway is left out.

    ModelOpt 0.47.0 has group_size in hf_quant_config.json alone, and config_groups that vLLM 0.32.0 reads for plain NVFP4 alone.
    """
    made, peer = both(base)
    ours = json.loads(made.files["config.json"])["quantization_config"]
    theirs = json.loads((peer / "config.json").read_text())["quantization_config"]
    linears = [module_of(op.source) for op in made.ops if isinstance(op, Encode)]
    for section in (ours, theirs):
        for otherwise in ("ignore", "producer", "version"):
            section.pop(otherwise, None)
        if section["quant_method"] == "modelopt":
            section.pop("group_size", None)
            section["quant_algo"] = section["quant_algo"].upper()
        if section.get("quant_algo") in ("W4A16_NVFP4", "MIXED_PRECISION"):
            section.pop("config_groups", None)
        groups = [
            {**group, "targets": [m for m in linears if any(targets(t, m) for t in group["targets"])]}
            for group in section.pop("config_groups", {}).values()
        ]
        section["groups"] = sorted((meaning(group) for group in groups), key=str)
    assert meaning(ours) == meaning(theirs)


def targets(target: str, module: str) -> bool:
    """Whether a group's target takes the linear (compressed-tensors 0.17 utils/match.py)."""
    return target in ("Linear", module) or (target.startswith("re:") and re.match(target[3:], module) is not None)


def meaning(section: Any) -> Any:
    """The section less what says nothing: null, empty, and how a maker looked for its scales."""
    if isinstance(section, Mapping):
        inner = {key: meaning(section[key]) for key in sorted(section) if key != "observer"}
        return {key: value for key, value in inner.items() if value not in (None, {}, [])}
    return section


# --- refusals ---


def recipe(scheme: str, form: str, **changes: Any) -> Recipe:
    rules = [{"modules": "model.layers.*", "scheme": scheme}]
    return Recipe.model_validate({"quantize": rules, "keep": ["visual*", "lm_head"], "export": {"format": form}, **changes})


MIXED = [{"modules": "*.self_attn.*", "scheme": "fp8-tensor"}, {"modules": "*.mlp.*", "scheme": "fp8-block"}]
SPLIT = [{"modules": "*.k_proj", "scheme": "fp8-dynamic"}, {"modules": "model.layers.*", "scheme": "nvfp4a16"}]


@pytest.mark.parametrize(
    ("scheme", "form", "changes", "words"),
    [
        ("fp8", "fp8", {"kv_cache": "fp8"}, r"kv_cache: .*can't declare.*remove kv_cache"),
        ("int8", "fp8", {}, r"scheme int8: the format fp8 has none.*fp8, fp8-tensor, fp8-block.*another export\.format"),
        ("fp8", "fp8", {"quantize": MIXED}, r"schemes fp8-tensor, fp8-block: .*one activation_scheme.*give all of them one scheme"),
        ("int8", "modelopt", {}, r"scheme int8: the format modelopt has none.*choose one of those"),
        ("mxfp4", "modelopt", {}, r"scheme mxfp4: the format modelopt has none.*choose one of those"),
        ("fp8-tensor", "modelopt", {}, r"scheme fp8-tensor: the format modelopt has none.*choose one of those"),
        ("fp8-tensor", "compressed-tensors", {}, r"scheme fp8-tensor: the format compressed-tensors has none.*choose one of those"),
        (
            "nvfp4a16",
            "compressed-tensors",
            {"quantize": SPLIT},
            r"fuses .*one scheme.*k_proj: fp8-dynamic \(quantize: \*\.k_proj\)",
        ),
    ],
)
def test_what_no_form_exists_for(scheme: str, form: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        plan(recipe(scheme, form, **changes), EXAMPLE)
    assert re.search(words, f"{caught.value}\n{caught.value.hint}", re.DOTALL)


if __name__ == "__main__":
    found = {"kept": copied(RECIPES[0]), "recipes": {name: described(name) for name in RECIPES}}
    text = re.sub(
        r"\[\s+(\"\w+\"),\s+(\[[^]]*\])\s+\]", lambda m: f"[{m[1]}, {''.join(m[2].split())}]", json.dumps(found, indent=1)
    )
    GOLDEN.write_text(text + "\n")
