"""Good exports are good: the validator has no error for any of them, and the real vLLM loads all of each.

Ours are clean. What other exporters write may get the warnings named here, and no other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from corpus import derived
from corpus.bases import BASES, Base, folder
from peers.answers import trace

from ckptq.validate import validate_folder

FUSED_APART = "values.weight-scale-split"
"""One weight scale a tensor, as all exporters but ours write them: the server encodes fused linears again."""

ALLOWED: Mapping[str, set[str]] = {
    "vl-modelopt-fp8kv-peer": {FUSED_APART},
    "vl-modelopt-fp8cast-peer": {FUSED_APART, "layout.kv-absent"},
    "vl-modelopt-fp8-peer-tied": {FUSED_APART},
    "vl-modelopt-mixedkv-peer": {FUSED_APART},
    "moe-modelopt-fp8kv-peer": {FUSED_APART},
    "moe-modelopt-fp8-peer-mixed": {FUSED_APART},
    "vl-ct-fp8-peer": {FUSED_APART},
    "vl-ct-fp8kv-peer": {FUSED_APART},
    "vl-fp8-static-relabeled": {FUSED_APART},
    "vl-fp8-dynamic-relabeled": {FUSED_APART},
    "moe-fp8-dynamic-relabeled": {FUSED_APART},
    "moe-fp8-block-relabeled": {"layout.scale-dtype"},
    "vl-quark-fp8-relabeled": {FUSED_APART},
    "vl-quark-kept": {FUSED_APART},
    "vl-kept-o": {FUSED_APART},
    "vl-kept-qkv": {FUSED_APART},
    "vl-no-kv": {FUSED_APART},
    "vl-fp8-kept": {FUSED_APART},
    "moe-kept-o": {FUSED_APART},
    "vl-one-config": {FUSED_APART, "config.section-missing"},
}
"""Warnings of a base; one that is not here is clean. Beside its source, a peer's may have config keys of another transformers."""
UNBUILT = (
    *("talker.", "token2wav.", "code2wav."),
    *(f"vision_tower.vision_model.{part}" for part in ("encoder.layers.2.", "post_layernorm.")),  # LLaVA's
)
"""Parts of a checkpoint that vLLM passes over."""


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """{name: folder} of every base, and of what is derived from them."""
    work = tmp_path_factory.mktemp("derived")
    return {name: folder(name) for name in BASES} | {name: derived.make(name, work / name) for name in derived.DERIVED}


def warned(name: str, path: Path, **settings: Any) -> set[str]:
    """The codes of the warnings, where there is no error."""
    findings = validate_folder(path, **settings)
    assert [f for f in findings if f.severity == "error"] == [], f"{name} is served well by vLLM"
    return {f.code for f in findings}


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_validates(base: Base) -> None:
    assert warned(base.name, folder(base.name)) == ALLOWED.get(base.name, set())


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_validates_beside_its_source(base: Base) -> None:
    found = warned(base.name, folder(base.name), source=base.source) - ALLOWED.get(base.name, set())
    assert found <= (set() if base.origin == "ckptq" else {"passthrough.config"})


@pytest.mark.parametrize("name", derived.DERIVED)
def test_a_derived_one_validates(good: Mapping[str, Path], name: str) -> None:
    assert warned(name, good[name]) == ALLOWED.get(name, set())


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_a_base_is_what_it_says(base: Base) -> None:
    config = json.loads((folder(base.name) / "config.json").read_text(encoding="utf-8"))
    section = config["quantization_config"]
    assert section["quant_method"] == base.method
    assert (base.family == "moe") == (config["architectures"] == ["Qwen3MoeForCausalLM"])
    assert (base.kv != "none") == bool(section.get("kv_cache_scheme"))


# --- the server ---


@pytest.mark.server
@pytest.mark.parametrize("name", [*BASES, *derived.DERIVED])
def test_the_server_loads_all_of_it(good: Mapping[str, Path], name: str) -> None:
    seen = trace(good[name])
    assert (seen["stage"], seen["error"], seen["problems"]) == ("done", None, [])
    assert seen["quantization"].startswith(BASES[name if name in BASES else derived.origin(name)].method), "modelopt_fp4, too"
    assert {key: spec["missing"] for key, spec in seen["parameters"].items() if spec["missing"] and not spec["exempt"]} == {}
    assert [key for key, spec in seen["keys"].items() if spec["unread"] and not key.startswith(UNBUILT)] == []
    codes = {"torch.float8_e4m3fn", "torch.int8", "torch.uint8"}
    assert codes & {spec["dtype"] for spec in seen["parameters"].values()}, "nothing is quantized"


@pytest.mark.server
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_the_servers_cache_is_as_the_base_says(base: Base) -> None:
    seen = trace(folder(base.name))
    assert seen["kv_cache_dtype"].startswith("auto" if base.kv == "none" else "fp8")
    scales = [spec for key, spec in seen["parameters"].items() if key.endswith((".attn.k_scale", ".attn.v_scale"))]
    assert [spec["written"] for spec in scales] == [int(base.kv == "scales")] * len(scales)
