"""sensitivity's engine: branches of a model in one pass, against `compare` of checkpoints that were converted so."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import families

from ckptq.calibration import Sample
from ckptq.checkpoint import read_inventory
from ckptq.compare.behavior import measure_behavior
from ckptq.console import Console
from ckptq.convert import convert
from ckptq.prepare import prepare
from ckptq.recipe import load_recipe
from ckptq.sensitivity.branches import Branch, Runner, forwards, running

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "tests/data/heldout.txt").read_text()
SAMPLES = [Sample(f"text {i}", TEXT[i * 300 : (i + 1) * 300]) for i in range(3)]
SCENE = next((ROOT / "examples/scenes/eval").iterdir())
SHOWN = Sample("scene", "A red square above a blue circle.", "Describe the image.", SCENE)
FAMILIES = {"qwen2_5_vl": "qwen25vl-lm-fp8", "qwen3_vl": "qwen3vl-fp8", "qwen3_moe": "qwen3-moe-fp8"}
"""A dense one, one that adds images' features to hidden states between layers, and one with routed experts."""

Settings = dict[str, Any]
SETTINGS: Settings = {
    "sequence_length": 512,
    "max_pixels": None,
    "device": torch.device("cpu"),
    "memory": 10**9,
    "console": Console(quiet=True),
}


def kl(reference: Path, candidate: Path, samples: list[Sample] = SAMPLES) -> float:
    found = measure_behavior(reference, candidate, samples, **SETTINGS).kl
    return math.fsum(found) / len(found)


Pair = tuple[Path, Path]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    """converted(family, *settings) -> (a checkpoint of it, what the recipe makes of it). Sources are made once."""
    work = tmp_path_factory.mktemp("branches")

    def made(family: str, *overrides: str) -> Pair:
        source = ROOT / "examples/tiny-qwen2.5-vl" if family == "qwen2_5_vl" else work / family
        if not source.exists():
            source.mkdir()
            families()[family].make(source)
        out = work / f"{family}-{len(list(work.iterdir()))}"
        samples = ["calibration={source: builtin, samples: 4, sequence_length: 64}"]
        recipe = load_recipe(FAMILIES[family], [*samples, *overrides], model=str(source), output=str(out))
        convert(prepare(recipe), resume=False, device="cpu", memory=None, console=Console(quiet=True))
        return source, out

    return made


@pytest.fixture(params=list(FAMILIES), scope="module")
def pair(request: pytest.FixtureRequest, converted: Callable[..., Pair]) -> tuple[str, Pair]:
    return request.param, converted(request.param)


def run(pair: Pair, samples: list[Sample] = SAMPLES, **changed: Any) -> AbstractContextManager[Runner]:
    return running(*pair, samples, **{**SETTINGS, **changed})


def test_all_units_are_the_candidate(pair: tuple[str, Pair]) -> None:
    """With its FP8 cache: the very KL that `compare` measures. None of them are the reference."""
    samples = SAMPLES if pair[0] == "qwen3_moe" else [*SAMPLES, SHOWN]
    with run(pair[1], samples) as runner:
        whole = Branch(frozenset(runner.layer_of), runner.has_kv)
        everything, nothing = runner.exact([whole, Branch(frozenset())])
    # What Qwen3-VL adds between layers is found as a difference, in BF16.
    assert everything.mean == pytest.approx(kl(*pair[1], samples), rel=1e-3 if pair[0] == "qwen3_vl" else 1e-9)
    assert everything.low is not None
    assert everything.high is not None
    assert everything.low < everything.mean < everything.high
    assert (nothing.mean, nothing.low, nothing.high) == (0, 0, 0)


def test_a_unit_alone_is_a_conversion_that_keeps_all_others(pair: tuple[str, Pair], converted: Callable[..., Pair]) -> None:
    family, (source, out) = pair
    with run((source, out)) as runner:
        unit = runner.units[-2]  # of the last layer, the first of its MLP, or all routed experts
        branches = [Branch(frozenset({unit.name}), runner.has_kv), Branch(frozenset({unit.name}))]
        cached, bare = runner.exact(branches)
    kept = "kv_cache" if runner.has_kv else "description"
    patterns = ", ".join(f'"{pattern}"' for pattern in unit.patterns)
    alone = converted(family, f"quantize=[{{modules: [{patterns}], scheme: fp8}}]", f"{kept}=fp8")
    assert cached.mean == pytest.approx(kl(*alone), rel=1e-6)
    assert 0 < bare.mean != cached.mean


def test_units_are_what_the_recipe_quantizes(pair: tuple[str, Pair]) -> None:
    """All bytes that the conversion saves are some unit's, but for the K's and V's scales that it adds."""
    _, (source, out) = pair
    with run((source, out)) as runner:
        units = runner.units
    before, after = (read_inventory(folder).main.nbytes for folder in (source, out))
    of_cache = 4 * sum(name.endswith(("k_scale", "v_scale")) for name in read_inventory(out).main.tensors)
    assert sum(unit.saved for unit in units) == before - after + of_cache
    assert len({pattern for unit in units for pattern in unit.patterns}) == sum(len(unit.patterns) for unit in units)


def test_what_branches_share_is_computed_once(converted: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each distinct prefix once a layer and sample, as `forwards` says. Nothing depends on what else is measured, or on waves."""
    pair = converted("qwen2_5_vl")
    calls: list[int] = []
    before = Runner._forward

    def counted(self: Runner, branch: Branch, layer: int, *rest: Any) -> torch.Tensor:
        calls.append(layer)
        return before(self, branch, layer, *rest)

    monkeypatch.setattr(Runner, "_forward", counted)
    with run(pair) as runner:
        names = [unit.name for unit in runner.units]
        late = frozenset(name for name, layer in runner.layer_of.items() if layer == 4)
        branches = [
            Branch(frozenset(names)),
            Branch(frozenset(names) - late),  # as the first, up to layer 4
            Branch(frozenset(names[:4]) | late),  # of layer 0, as both before it
            Branch(frozenset(names[:1])),
            Branch(frozenset(names[-1:])),  # of the last layer
        ]
        found = runner.exact(branches)
        # 6 + 2 of the second's layers 4 and 5 + 5 of the third's from 1 on + 6 of the fourth + 1 of the last
        assert len(calls) == (6 + 2 + 5 + 6 + 1) * len(SAMPLES)
        assert forwards(branches, runner.layer_of, 6) == pytest.approx(1 + 20 / 6)
        assert [runner.exact([branch])[0] for branch in branches] == found
    with run(pair, memory=1) as runner:  # a sample at a time
        assert runner.exact(branches) == found


def test_local_errors_are_of_the_layer_that_the_unit_is_in(converted: Callable[..., Pair]) -> None:
    """The last layer's units give the model's last hidden states: their errors are what `compare` says of a checkpoint so made."""
    source, out = converted("qwen2_5_vl")
    alone = converted("qwen2_5_vl", "quantize=[{modules: model.layers.5.mlp.down_proj, scheme: fp8}]", "kv_cache=null")
    with run((source, out)) as runner:
        errors = runner.local_errors()
    wanted = measure_behavior(source, alone[1], SAMPLES, **SETTINGS).layers[-1].hidden.relative_l2
    assert errors["model.layers.5.mlp.down_proj"] == pytest.approx(wanted, rel=1e-5)
    assert all(0 < error < 0.2 for error in errors.values())
