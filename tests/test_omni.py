"""Checkpoints of several stages: the thinker's language model is quantized, and no server takes anything else for quantized.

vLLM builds the thinker alone; tests/test_families.py has what it makes of these checkpoints. vLLM-Omni 0.30.0 builds each with
the one quantization_config; names of its linears below are those of its model_executor/models/qwen2_5_omni and qwen3_omni.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import families

from ckptq.checkpoint import SPEAKERS, read_inventory
from ckptq.console import Console
from ckptq.convert import convert, prepare
from ckptq.errors import RecipeError, UnsupportedError
from ckptq.exporters import find_exporter
from ckptq.plan import Copy, Plan
from ckptq.planner import build_plan
from ckptq.recipe import load_recipe
from ckptq.scopes import find_scope
from ckptq.validators.methods.modelopt import excluded
from ckptq.validators.servers import DEFAULT
from ckptq.validators.vllm_rules import packed_modules

PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj"), "qkv": ("q", "k", "v")}
"""vLLM-Omni's packed_modules_mapping."""
LAYER = "thinker.language_model.model.layers.0"
STAY = (
    "talker.language_model.model.layers.0.self_attn.qkv_proj",
    "talker.language_model.model.layers.0.mlp.down_proj",
    "talker.language_model.lm_head",
    "thinker.language_model.lm_head",
    "thinker.visual.blocks.0.attn.qkv",
    "thinker.visual.merger.mlp.0",
    "thinker.audio_tower.layers.0.fc1",
)
BECOME = (f"{LAYER}.self_attn.qkv_proj", f"{LAYER}.self_attn.o_proj", f"{LAYER}.mlp.gate_up_proj", f"{LAYER}.mlp.down_proj")
MODELOPT = ("qwen25omni-fp8", "qwen25omni-fp8-dynamic", "qwen25omni-nvfp4")

Made = Callable[[str], Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Made:
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            families()[name].make(made[name])
        return made[name]

    return of


def plan(folder: Path, recipe: str, *settings: str) -> Plan:
    job = load_recipe(recipe, [f"model={folder}", "output=/nowhere", *settings])
    component = read_inventory(folder).main
    return build_plan(job, component, find_scope(component.config), find_exporter(job.export.format))


def section(made: Plan) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(made.files["config.json"])["quantization_config"]
    return found


@pytest.mark.parametrize("recipe", MODELOPT)
def test_vllm_omni_takes_no_other_stage_for_quantized(source: Made, recipe: str) -> None:
    """Its Qwen2.5-Omni maps no names, so that the list counts as it is written."""
    names = section(plan(source("qwen2_5_omni"), recipe))["ignore"]
    assert {prefix: excluded(prefix, names, PACKED, DEFAULT) for prefix in STAY} == dict.fromkeys(STAY, "kept")
    assert {prefix: excluded(prefix, names, PACKED, DEFAULT) for prefix in BECOME} == dict.fromkeys(BECOME)


def test_both_servers_keep_what_the_recipe_keeps(source: Made) -> None:
    keep = '["thinker.visual*", "thinker.audio_tower*", "*.layers.0.self_attn.*", "*.layers.1.mlp.down_proj"]'
    names = section(plan(source("qwen2_5_omni"), "qwen25omni-fp8", f"keep={keep}"))["ignore"]
    layers = "thinker.language_model.model.layers"
    kept = (f"{layers}.0.self_attn.qkv_proj", f"{layers}.0.self_attn.o_proj", f"{layers}.1.mlp.down_proj")
    others = (f"{layers}.1.self_attn.qkv_proj", f"{layers}.0.mlp.down_proj", f"{layers}.1.mlp.gate_up_proj")
    assert {prefix: excluded(prefix, names, PACKED, DEFAULT) for prefix in kept} == dict.fromkeys(kept, "kept")
    assert {prefix: excluded(prefix, names, PACKED, DEFAULT) for prefix in others} == dict.fromkeys(others)


def test_compressed_tensors_for_both_servers(source: Made) -> None:
    """Expressions are matched from the start of the server's name, and of a fused linear's shards one by one."""
    settings = ("export.format=compressed-tensors", 'keep=["thinker.visual*", "*.layers.1.mlp.down_proj"]')
    names = section(plan(source("qwen2_5_omni"), "qwen25omni-fp8-dynamic", *settings))["ignore"]
    found = [re.compile(name.removeprefix("re:")) for name in names if name.startswith("re:")]

    def ignored(prefix: str) -> bool:
        return any(expression.match(prefix) for expression in found)

    for stage in ("", "thinker."):
        assert ignored(f"{stage}language_model.model.layers.1.mlp.down_proj")
        assert ignored(f"{stage}visual.blocks.0.attn.qkv")
        assert not ignored(f"{stage}language_model.model.layers.0.mlp.down_proj")
        assert not ignored(f"{stage}language_model.model.layers.1.mlp.gate_proj")
    assert ignored("talker.language_model.model.layers.1.mlp.up_proj")


def test_a_method_with_exact_names_is_refused(source: Made) -> None:
    with pytest.raises(RecipeError, match="quant_method fp8 excludes by exact names alone"):
        plan(source("qwen2_5_omni"), "qwen25omni-fp8", "export.format=fp8", "kv_cache=null")


def test_qwen3_omni_lists_what_is_quantized(source: Made) -> None:
    """No list of what stays reaches its lm_head in vLLM; a list of what is quantized needs none."""
    made = plan(source("qwen3_omni_moe"), "qwen3omni-fp8")
    said = section(made)
    assert said["quant_algo"] == "MIXED_PRECISION"
    quantized = {d.module for d in made.decisions if d.action == "fp8"}
    assert said["quantized_layers"] == {module: {"quant_algo": "FP8"} for module in quantized}
    assert all(module.startswith("thinker.model.layers.") for module in quantized)
    assert json.loads(made.files["hf_quant_config.json"])["quantization"]["quantized_layers"] == said["quantized_layers"]
    assert "config_groups" not in said


@pytest.mark.parametrize("name", ["qwen2_5_omni", "qwen3_omni_moe"])
def test_other_stages_are_copied(source: Made, name: str) -> None:
    made = plan(source(name), families()[name].recipes[0])
    component = read_inventory(source(name)).main
    others = {n for n in component.tensors if n.startswith(("talker.", "token2wav.", "code2wav."))}
    assert {n.partition(".")[0] for n in others} == {"talker", "token2wav" if name == "qwen2_5_omni" else "code2wav"}
    assert others <= {op.source for op in made.ops if isinstance(op, Copy)}
    assert others == set(made.carried)


def test_a_pattern_that_reaches_another_stage_alone(source: Made) -> None:
    with pytest.raises(RecipeError, match=r"'talker\.model\.layers\.\*' matches no linear of the language model"):
        plan(source("qwen2_5_omni"), "qwen25omni-fp8", 'quantize.0.modules=["talker.model.layers.*"]')


def test_speakers_come_along(source: Made, tmp_path: Path) -> None:
    folder, output = source("qwen2_5_omni"), tmp_path / "out"
    job = load_recipe("qwen25omni-fp8-dynamic", [f"model={folder}", f"output={output}"])
    convert(prepare(job), resume=False, device="cpu", memory=None, console=Console(quiet=True))
    assert (output / SPEAKERS).read_bytes() == (folder / SPEAKERS).read_bytes()


def test_vllm_does_not_know_the_shards_of_the_vision_towers_attention(source: Made) -> None:
    """Its packed_modules_mapping says `attn.qkv`, and is asked for `qkv`."""
    scope = find_scope(read_inventory(source("qwen2_5_omni")).main.config)
    assert "qkv" not in packed_modules(scope)
    assert packed_modules(scope)["qkv_proj"] == ("q_proj", "k_proj", "v_proj")


@pytest.mark.parametrize("architecture", ["Qwen3TTSForConditionalGeneration", "Qwen3TTSTalkerForConditionalGeneration"])
def test_qwen3_tts_is_refused_with_the_reason(architecture: str) -> None:
    with pytest.raises(UnsupportedError, match=r"neither calibrated nor checked.*transformers 5\.17 has no class.*vLLM-Omni"):
        find_scope({"architectures": [architecture]})
