"""A Quark export, made of ModelOpt's by giving it Quark's section: clean here and in the real vLLM, its traps found."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus.bases import folder
from corpus.edit import both, drop, edit_json, put
from corpus.relabeled import SPEC, quark_section
from peers.answers import trace

from ckptq.validate import validate_folder
from ckptq.validators.vllm_load import served

LAYER = quark_section("static")["global_quant_config"]
O = "model.layers.1.self_attn.o_proj"  # noqa: E741
Section = dict[str, Any]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """Static, per tensor, without KV scales."""
    return Path(shutil.copytree(folder("vl-quark-fp8-relabeled"), tmp_path / "quark"))


def change(where: Path, edit: Callable[[Section], object]) -> None:
    edit_json(where / "config.json", lambda config: edit(config["quantization_config"]))


def codes(where: Path) -> list[str]:
    """Without what ModelOpt's scales are warned of: the server encodes fused linears again."""
    return [f"{f.severity} {f.code}" for f in validate_folder(where) if f.code != "values.weight-scale-split"]


def test_the_export_is_clean(copied: Path) -> None:
    assert codes(copied) == []


NEAR: dict[str, Callable[[Section], object]] = {
    "an expression": lambda s: s.update(exclude=["re:.*visual.*"]),
    "no lm_head": lambda s: s["exclude"].remove("lm_head"),
    "a list of one": lambda s: s["global_quant_config"].update(weight=[SPEC]),
    "settings of a type": lambda s: s.update(layer_type_quant_config={"Linear": {"weight": None}}),
    "the same for a layer": lambda s: s.update(layer_quant_config={"*o_proj": LAYER}),
    "no settings of layers": lambda s: s.pop("layer_quant_config"),
}
TRAPS: dict[str, tuple[Callable[[Section], object], str]] = {
    "a glob": (lambda s: s.update(exclude=["*visual*"]), "layout.not-excluded"),
    "a parent": (lambda s: s.update(exclude=["visual"]), "layout.not-excluded"),
    "one shard": (lambda s: s["exclude"].append("model.layers.0.self_attn.q_proj"), "layout.split-exclude"),
    "dynamic": (lambda s: s["global_quant_config"].update(input_tensors={**SPEC, "is_dynamic": True}), "layout.stray-scale"),
    "channels": (lambda s: s["global_quant_config"].update(weight={**SPEC, "qscheme": "per_channel"}), "layout.scale-shape"),
    "weights alone": (lambda s: s["global_quant_config"].update(input_tensors=None), "config.quark-scheme"),
    "no scheme for a layer": (lambda s: s.update(layer_quant_config={"*o_proj": {**LAYER, "bias": SPEC}}), "layout.no-scheme"),
    "KV settings": (lambda s: s["export"].update(kv_cache_group=["*k_proj"]), "config.quark-kv"),
    "no export": (lambda s: s.pop("export"), "config.quark-section"),
    "no list": (lambda s: s.pop("exclude"), "config.quark-section"),
    "no settings of types": (lambda s: s.pop("layer_type_quant_config"), "config.quark-section"),
}


@pytest.mark.parametrize("name", NEAR)
def test_what_looks_like_a_fault_and_is_none(name: str, copied: Path) -> None:
    change(copied, NEAR[name])
    assert codes(copied) == []


@pytest.mark.parametrize("name", TRAPS)
def test_its_traps_are_found(name: str, copied: Path) -> None:
    edit, code = TRAPS[name]
    change(copied, edit)
    assert f"error {code}" in codes(copied)


@pytest.mark.parametrize("kind", ["weight_scale", "input_scale"])
def test_a_scale_that_is_missing_is_found(kind: str, copied: Path) -> None:
    drop(f"{O}.{kind}")(copied)
    assert codes(copied) == ["error layout.missing-scale"]


def test_scales_under_quarks_names_are_those_of_the_cache(copied: Path) -> None:
    scales = {f"model.layers.{i}.self_attn.{s}_proj.output_scale": torch.tensor(0.01) for i in range(2) for s in "qkv"}
    both(put(scales), put({"model.layers.0.self_attn.prob_output_scale": torch.tensor(0.01)}))(copied)
    assert codes(copied) == ["warning layout.kv-undeclared"]


@pytest.mark.server
@pytest.mark.parametrize("name", ["", "a list of one"])
def test_the_real_vllm_loads_it(name: str, copied: Path) -> None:
    if name:
        change(copied, NEAR[name])
    found = served(trace(copied), copied)
    assert found.quantization == "quark"
    assert found.findings == ()


@pytest.mark.server
@pytest.mark.parametrize("name", ["a glob", "no settings of types"])
def test_the_real_vllm_stumbles_over_its_traps(name: str, copied: Path) -> None:
    change(copied, TRAPS[name][0])
    assert any(f.severity == "error" for f in served(trace(copied), copied).findings)
