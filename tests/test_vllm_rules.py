"""The simulation of vLLM's rules, against the rules as read and, where marked, against the real functions."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptq.checkpoint import read_inventory
from ckptq.scopes import find_scope
from ckptq.scopes.qwen2_5_vl import SCOPE
from ckptq.validators.vllm_rules import (
    idle_patterns,
    kv_slot,
    packed_modules,
    parameters,
    server_linears,
    server_name,
    server_patterns,
    treatment,
)

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "tiny-qwen2.5-vl"
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
PACKED = packed_modules(SCOPE)
QKV = "language_model.model.layers.0.self_attn.qkv_proj"
VISUAL = "visual.blocks.0.attn.qkv"


def built(prefix: str, *patterns: str) -> str:
    return treatment(prefix, server_patterns(patterns, SCOPE), PACKED)


@pytest.mark.parametrize("pattern", ["visual*", "visual", "model.visual*", "model.visual.*", "*visual*"])
def test_patterns_that_keep_the_tower(pattern: str) -> None:
    assert built(VISUAL, pattern) == "kept"


@pytest.mark.parametrize("pattern", ["model.visual", "re:visual.*", "re:.*visual.*", "vision*", "Visual*"])
def test_patterns_that_do_nothing_for_the_tower(pattern: str) -> None:
    assert built(VISUAL, pattern) == "quantized"


def test_the_list_is_searched_for_substrings() -> None:
    assert built("language_model.model.layers.10.mlp.down_proj", "model.layers.1") == "kept"
    assert built("language_model.model.layers.10.mlp.down_proj", "model.layers.1.") == "quantized"
    assert built("language_model.lm_head", "lm_head") == "kept"


def test_a_fused_linear_wants_all_shards_or_none() -> None:
    shards = [f"model.layers.0.self_attn.{s}_proj" for s in "qkv"]
    assert built(QKV, *shards) == "kept"
    assert built(QKV, *shards[:2]) == "refused"
    assert built(QKV, "model.layers.0.self_attn.qkv_proj") == "kept"
    assert built(QKV) == "quantized"


@pytest.mark.parametrize("pattern", ["*q_proj*", "*layers.0.self_attn.q_proj", "*.k_proj"])
def test_globs_on_shards_do_nothing(pattern: str) -> None:
    assert built(QKV, pattern) == "quantized"


def test_prefix_rules_need_their_dot() -> None:
    assert server_name("model.language_model.layers.0", SCOPE) == "language_model.model.layers.0"
    assert server_name("lm_head", SCOPE) == "lm_head"
    assert server_name("lm_head.weight", SCOPE) == "language_model.lm_head.weight"
    assert server_name("model.visual.blocks.0", SCOPE) == "visual.blocks.0"
    assert server_name("model.visual", SCOPE) == "language_model.model.visual"


def test_every_linear_of_the_example_is_known() -> None:
    main = read_inventory(EXAMPLE).main
    linears = server_linears(SCOPE, main.config, main.tensors)
    shards = [module for linear in linears for module in linear.shards]
    two_dimensional = {n.removesuffix(".weight") for n, t in main.tensors.items() if len(t.spec.shape) == 2}
    assert len(shards) == len(set(shards)) == 6 * 7 + 4 * 5 + 2 + 1
    assert set(shards) == two_dimensional - {"model.embed_tokens"}
    assert {linear.prefix for linear in linears if linear.part == "head"} == {"language_model.lm_head"}


@pytest.mark.parametrize("renamed", [False, True])
def test_parameters_are_exactly_the_tensors_of_the_example(renamed: bool) -> None:
    main = read_inventory(EXAMPLE).main
    shapes = {second_generation(n) if renamed else n: t.spec.shape for n, t in main.tensors.items()}
    assert {p.name: p.shape for p in parameters(SCOPE, main.config, shapes)} == shapes


def second_generation(name: str) -> str:
    """A name as files written since transformers 4.52 may have it."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name if name.startswith("lm_head") else name.replace("model.", "model.language_model.", 1)


def test_a_tensor_that_is_absent_is_spelled_like_its_neighbors() -> None:
    main = read_inventory(EXAMPLE).main
    names = [second_generation(n) for n in main.tensors if "layers.3." not in n]
    wanted = {p.name for p in parameters(SCOPE, main.config, names)} - set(names)
    assert wanted == {second_generation(n) for n in main.tensors if "layers.3." in n}


def test_a_tied_head_is_optional_and_a_linear_all_the_same() -> None:
    main = read_inventory(EXAMPLE).main
    config = {**main.config, "tie_word_embeddings": True}
    assert [p.name for p in parameters(SCOPE, config, main.tensors) if not p.required] == ["lm_head.weight"]
    names = [n for n in main.tensors if n != "lm_head.weight"]
    assert server_linears(SCOPE, config, names)[-1].shards == ("lm_head",)


def test_idle_patterns_are_those_that_keep_nothing() -> None:
    main = read_inventory(EXAMPLE).main
    linears = server_linears(SCOPE, main.config, main.tensors)
    given_patterns = ["visual*", "model.visual", "re:visual.*", "lm_head", "*q_proj*"]
    assert idle_patterns(given_patterns, linears, SCOPE) == ("model.visual", "re:visual.*", "*q_proj*")


@pytest.mark.parametrize(
    ("name", "kind", "misplaced"),
    [
        ("self_attn.k_proj.k_scale", "k", False),
        ("self_attn.v_proj.v_scale", "v", False),
        ("self_attn.k_proj.v_scale", "v", True),
        ("self_attn.v_proj.k_scale", "k", True),
        ("self_attn.k_scale", "k", False),
        ("self_attn.attn.v_scale", "v", False),
        ("self_attn.qkv_proj.v_scale", "v", False),
        ("self_attn.v_cache.scale", "v", False),
        ("self_attn.kv_scale", "k", False),
    ],
)
def test_names_of_kv_scales(name: str, kind: str, misplaced: bool) -> None:
    slot = kv_slot(f"model.layers.0.{name}")
    assert slot is not None
    assert (slot.attention, slot.kind, slot.misplaced) == ("model.layers.0.self_attn", kind, misplaced)


@pytest.mark.parametrize(
    "name", ["self_attn.k_proj.weight", "self_attn.q_proj.k_scale", "self_attn.k_proj.weight_scale", "attn.k_scale"]
)
def test_other_tensors_are_no_kv_scales(name: str) -> None:
    assert kv_slot(f"model.layers.0.{name}") is None


@given(st.lists(st.text("modelvisua.*012", max_size=12), max_size=5))
def test_any_list_of_patterns_has_an_answer(patterns: list[str]) -> None:
    for prefix in (QKV, VISUAL, "language_model.lm_head"):
        assert built(prefix, *patterns) in ("quantized", "kept", "refused")


# --- against the real thing ---

ASK_VLLM = """
import json, sys
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.modelopt import ModelOptFp8Config
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration as Model

def ask(patterns, prefixes):
    config = ModelOptFp8Config.from_config({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": list(patterns)})
    for part in (Model, Qwen2ForCausalLM):  # in the order in which vLLM makes them
        config.apply_vllm_mapper(part.hf_to_vllm_mapper.get_rename_mapper())
        config.packed_modules_mapping.update(part.packed_modules_mapping)
    answers = []
    for prefix in prefixes:
        try:
            answers.append("kept" if config.is_layer_excluded(prefix) else "quantized")
        except ValueError:
            answers.append("refused")
    return {"patterns": config.exclude_modules, "answers": answers}

case = json.load(open(sys.argv[1]))
names = [Model.hf_to_vllm_mapper.map_name(name) for name in case["names"]]
scales = case["scales"]
mapper = ModelOptFp8Config.get_cache_scale_mapper()
packed = {key: list(value) for key, value in Model.packed_modules_mapping.items()}
json.dump({"lists": [ask(p, case["prefixes"]) for p in case["lists"]], "names": names, "packed": packed,
           "scales": [mapper.map_name(name) for name in scales]}, open(sys.argv[2], "w"))
"""


def real_vllm(case: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The answers of the real functions, from one process of vLLM's own environment."""
    question, answer, script = folder / "case.json", folder / "answer.json", folder / "ask.py"
    question.write_text(json.dumps(case), encoding="utf-8")
    script.write_text(ASK_VLLM, encoding="utf-8")
    shim = str(ROOT / "tests" / "server" / "shim")
    environment = {**os.environ, "PYTHONPATH": shim, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run([VLLM_PYTHON, script, question, answer], env=environment, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return found


def pattern_lists(shards: list[str], prefixes: list[str], count: int) -> list[list[str]]:
    """Lists of patterns as people write them, and pieces of real names bent in every way that the rules look at."""
    random_source = random.Random(0)
    known = [
        [], ["lm_head", "model.embed_tokens", "visual*"], ["lm_head", "model.visual*"], ["model.visual"], ["re:visual.*"],
        ["visual"],
        ["model.visual.*"], ["*visual*"], ["model.language_model.layers.1*"], ["model.layers.1"], ["*q_proj*"],
        ["language_model*"],
        ["model.layers.0.self_attn.q_proj"], ["*"], [""], [".*"], ["a*"], ["model.*"], ["lm_head.*"], ["lm_head*"], ["*lm_head"],
        ["model.layers.0.self_attn.qkv_proj"], ["language_model.model.layers.0.self_attn.qkv_proj"], ["[a-z]*"],
        ["visual.blocks.?.attn*"],
        [f"model.layers.0.self_attn.{s}_proj" for s in "qkv"], [f"*layers.0.self_attn.{s}_proj" for s in "qkv"],
        ["visual.blocks.0.mlp.gate_proj"], ["visual.blocks.0.mlp.gate_proj", "visual.blocks.0.mlp.up_proj"], ["model.experts*"],
    ]  # fmt: skip

    def bent() -> str:
        parts = random_source.choice(shards + prefixes).split(".")
        start = random_source.choice([0, 0, 0, random_source.randrange(len(parts))])
        name = ".".join(parts[start : random_source.randint(start + 1, len(parts))])
        head = random_source.choice(["", "", "", "*", "model.", "model.language_model.", "language_model.", "re:", "."])
        tail = random_source.choice(["", "", "", "*", ".*", ".", "?", "*.weight"])
        return head + name + tail

    drawn = [[bent() for _ in range(random_source.randint(1, 4))] for _ in range(count)]
    # Whole fused groups and all but one of their shards, which random draws hardly ever hit.
    for _ in range(count // 4):
        at = random_source.randrange(len(shards) - 3)
        drawn.append(shards[at : at + random_source.randint(2, 4)])
    return known + drawn


@pytest.mark.server
def test_the_simulation_answers_as_the_real_vllm_does(tmp_path: Path) -> None:
    main = read_inventory(EXAMPLE).main
    assert find_scope(main.config) is SCOPE
    linears = server_linears(SCOPE, main.config, main.tensors)
    shards = [module for linear in linears for module in linear.shards]
    prefixes = [linear.prefix for linear in linears] + [f"language_model.model.layers.{n}.mlp.down_proj" for n in (10, 11, 27)]
    lists = pattern_lists(shards, prefixes, 600)
    names = [*main.tensors, *map(second_generation, main.tensors), "model.visual", "lm_head", "model", "visual.model.x"]
    endings = (
        "k_proj.k_scale",
        "v_proj.k_scale",
        "kv_scale",
        "k_cache.scale",
        "attn.v_scale",
        "qkv_proj.v_scale",
        "v_scale",
        "k_proj.bias",
    )
    scales = [f"model.layers.0.self_attn.{ending}" for ending in endings]
    real = real_vllm({"lists": lists, "prefixes": prefixes, "names": names, "scales": scales}, tmp_path)

    assert real["names"] == [server_name(name, SCOPE) for name in names]
    assert {name: list(found) for name, found in PACKED.items()}.items() <= real["packed"].items()
    for name, mapped in zip(scales, real["scales"], strict=True):
        slot = kv_slot(name)
        assert mapped == (name if slot is None else f"{slot.attention}.attn.{slot.kind}_scale")
    seen = set()
    for patterns, answer in zip(lists, real["lists"], strict=True):
        mapped = server_patterns(patterns, SCOPE)
        assert answer["answers"] == [treatment(prefix, mapped, PACKED) for prefix in prefixes], patterns
        seen.update(answer["answers"])
    assert seen == {"quantized", "kept", "refused"}
