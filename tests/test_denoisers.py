"""Denoisers' scopes against tiny pipelines of the real classes, and against what the real vLLM-Omni builds of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from ckptq.checkpoint import Component, Inventory, read_inventory
from ckptq.plan import module_of
from ckptq.scopes import Fused
from ckptq.scopes.denoisers import Denoiser, all_denoisers, find_denoiser
from pipelines import pipelines
from server import omni

PIPELINES = pipelines()
EMBEDDINGS = ("prior_token_embedding", "time_text_embed.addition_t_embedding")
"""Matrices that no linear multiplies by."""
NOTHING_IGNORED = {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": []}

Made = Callable[[str], Path]


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """source(pipeline) -> its folder, made once."""
    root = tmp_path_factory.mktemp("pipelines")

    def made(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            PIPELINES[name].make(folder)
        return folder

    return made


@pytest.fixture(scope="session")
def built(source: Made, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, omni.Loaded]:
    """What the server makes of each pipeline's own weights under a config that quantizes all it can."""
    root = tmp_path_factory.mktemp("built")
    for name, pipeline in PIPELINES.items():
        shutil.copytree(source(name), root / name)
        for folder in pipeline.denoisers:
            config = root / name / folder / "config.json"
            config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": NOTHING_IGNORED}))
    return {folder.name: loaded for folder, loaded in omni.load([root / name for name in PIPELINES]).items()}


def found(folder: Path, component: str) -> tuple[Denoiser, Component, Inventory]:
    inventory = read_inventory(folder)
    of = next(c for c in inventory.components if c.folder == component)
    denoiser = find_denoiser(of.config, (inventory.pipeline or {}).get("_class_name"))
    assert denoiser is not None
    return denoiser, of, inventory


def linears(denoiser: Denoiser, config: Mapping[str, Any]) -> dict[str, set[str]]:
    """{what becomes of them: stored names of linears}, whether this checkpoint has them or not."""
    names: dict[str, set[str]] = {"linears": set(), "stays": set(), "kept": shards(denoiser.kept, "")}
    for stack in denoiser.stacks:
        experts = range(config[stack.experts]) if stack.experts else range(1)
        for i in range(stack.count(config)):
            at = f"{stack.prefix}.{i}."
            names["linears"] |= {name.replace("{e}", str(e)) for name in shards(stack.linears, at) for e in experts}
            names["stays"] |= {at + name for name in stack.stays}
            names["kept"] |= shards(stack.kept, at)
    return names


def shards(fused: tuple[Fused, ...], at: str) -> set[str]:
    return {at + shard for one in fused for shard in one.shards}


def runtime(denoiser: Denoiser, config: Mapping[str, Any]) -> set[str]:
    """All that the server builds with the quantization config, as its lists know them."""
    blocks = {
        f"{stack.called(i)}.{one.runtime}"
        for stack in denoiser.stacks
        for i in range(stack.count(config))
        for one in (*stack.linears, *stack.kept)
    }
    return blocks | {one.runtime for one in denoiser.kept}


def test_every_denoiser_has_a_pipeline() -> None:
    assert {d.name for d in all_denoisers()} <= PIPELINES.keys()


PARTS = [(name, folder) for name, pipeline in PIPELINES.items() for folder in pipeline.denoisers]


@pytest.mark.parametrize(("name", "folder"), PARTS)
def test_every_linear_has_one_place(name: str, folder: str, source: Made) -> None:
    denoiser, component, _ = found(source(name), folder)
    assert name.startswith(denoiser.name)
    named = linears(denoiser, component.config)
    assert not named["linears"] & named["stays"] | named["linears"] & named["kept"] | named["stays"] & named["kept"]
    stored = {module_of(n) for n, t in component.tensors.items() if n.endswith(".weight") and len(t.spec.shape) == 2}
    rest = stored - named["linears"] - named["stays"] - named["kept"] - {*EMBEDDINGS}
    assert [n for n in sorted(rest) if sum(fnmatchcase(n, pattern) for pattern in denoiser.stays) != 1] == []
    missing = {n for n in named["linears"] | named["stays"] | named["kept"] if n not in stored}
    optional = {f"{s.prefix}.{i}.{o}" for s in denoiser.stacks for i in range(s.count(component.config)) for o in s.optional}
    assert missing <= optional


@pytest.mark.parametrize(("name", "folder"), PARTS)
def test_blocks_are_counted_as_they_are_stored(name: str, folder: str, source: Made) -> None:
    denoiser, component, _ = found(source(name), folder)
    for stack in denoiser.stacks:
        numbers = {
            n.removeprefix(stack.prefix + ".").partition(".")[0] for n in component.tensors if n.startswith(stack.prefix + ".")
        }
        assert numbers == {str(i) for i in range(stack.count(component.config))}


@pytest.mark.parametrize(("name", "folder"), PARTS)
def test_the_server_builds_what_the_scope_says(name: str, folder: str, source: Made, built: Mapping[str, omni.Loaded]) -> None:
    denoiser, component, _ = found(source(name), folder)
    loaded = built[name]
    assert loaded.error is None
    assert loaded.pipeline == PIPELINES[name].server
    theirs = loaded.components[folder]
    there = {linear.prefix: module for module, linear in theirs.quantized.items()}
    optional = {f"{s.called(i)}.{o}" for s in denoiser.stacks for i in range(s.count(component.config)) for o in s.optional}
    assert there.keys() <= (said := runtime(denoiser, component.config))
    assert said - there.keys() <= optional
    for prefix, module in there.items():
        end = next((end for end in denoiser.modules if prefix.endswith("." + end)), None)
        assert module == (prefix if end is None else prefix.removesuffix(end) + denoiser.modules[end])


@pytest.mark.parametrize("name", PIPELINES)
def test_the_server_builds_text_encoders_so_as_the_scope_says(name: str, source: Made, built: Mapping[str, omni.Loaded]) -> None:
    denoiser, _, inventory = found(source(name), PIPELINES[name].denoisers[0])
    others = {f: c for f, c in built[name].components.items() if f not in PIPELINES[name].denoisers}
    there = {linear.prefix for component in others.values() for linear in component.quantized.values()}
    encoder = (
        denoiser.encoder
        if denoiser.encoder and (inventory.pipeline or {}).get("_class_name") in denoiser.encoder.pipelines
        else None
    )
    assert there == ({*encoder.names(config_of(source(name), encoder.folder))} if encoder else set())
    if encoder:
        assert all(any(fnmatchcase(linear, pattern) for pattern in encoder.patterns) for linear in there)


def config_of(folder: Path, component: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / component / "config.json").read_text())
    return found
