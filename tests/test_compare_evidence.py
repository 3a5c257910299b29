"""compare as evidence: each fault that is planted is told by name, and which of two calibrations is nearer to the source.

A user sees what is asserted here: which part of the weights is off, the first module of the first layer that is, what enters the
layers, and how the KL of one candidate is to another's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from corpus.edit import Edit, Tensors, alter, both, drop, edit_json, put, swap, tensors, times
from test_compare_behavior import SCENES, SOURCE, TEXT, mean, measure, scenes
from test_compare_cli import Run, compare, conforms

from ckptq.calibration import Sample
from ckptq.calibration.encode import Encoder
from ckptq.checkpoint import read_inventory
from ckptq.compare.behavior import Behavior
from ckptq.compare.matched import match
from ckptq.compare.quality import refuse_unmeasured_limits
from ckptq.compare.weights import WeightError, by_part, weight_errors
from ckptq.console import Console
from ckptq.convert import convert
from ckptq.errors import DataError, RecipeError
from ckptq.prepare import prepare
from ckptq.recipe import load_recipe

__all__ = ["compare"]  # a fixture
CAPTIONS = SCENES / "annotations/captions_calib.json"
COCO = (str(SCENES / "eval"), str(SCENES / "annotations/captions_eval.json"))
TEXTS = [Sample(f"text {i}", TEXT[i * 400 : (i + 1) * 400]) for i in range(2)]
SAMPLES = [*TEXTS, *scenes(2)]


def converted(folder: Path, calibration: str) -> Path:
    recipe = load_recipe("demo.yaml", [f"calibration={{{calibration}, samples: 64}}"], model=str(SOURCE), output=str(folder))
    convert(prepare(recipe), resume=False, device="cpu", memory=None, console=Console(quiet=True))
    return folder


@pytest.fixture(scope="module")
def by_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "out"
    return converted(folder, f"source: coco, images: {SCENES}/calib, annotations: {CAPTIONS}")


@pytest.fixture(scope="module")
def by_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same captions as text."""
    return converted(tmp_path_factory.mktemp("text") / "out", f"source: text, files: {CAPTIONS}")


@pytest.fixture(scope="module")
def good(by_images: Path) -> Behavior:
    return measure(by_images, SAMPLES)


def spoiled(base: Path, folder: Path, change: Edit) -> Path:
    shutil.copytree(base, folder)
    change(folder)
    return folder


def weights(candidate: Path) -> list[WeightError]:
    return list(weight_errors(match(read_inventory(SOURCE), read_inventory(candidate))))


def rows(found: Behavior) -> dict[tuple[int, str], float]:
    """{(layer, module): its relative L2}, in the order in which they compute."""
    return {(layer.layer, module): error for layer in found.layers for module, error in layer.modules.items()}


@dataclass(frozen=True)
class Trace:
    """What must be found of a fault.

    weights  whose tensors are off    first  the first row that is off, beside the same without the fault
    worst    the largest row of all, which a user sees without anything beside it; None where it is no trace
    """

    change: Edit
    weights: tuple[str, ...]
    first: tuple[int, str]
    worst: tuple[int, str] | None


LINEARS = tuple(f"self_attn.{x}_proj" for x in "qkvo") + tuple(f"mlp.{x}_proj" for x in ("gate", "up", "down"))
OUT = "model.layers.2.self_attn.o_proj"
FAULTS = {
    "a transposed weight": Trace(
        alter(lambda t: t.t().contiguous(), f"{OUT}.weight"), (OUT,), (2, "self_attn.o_proj"), (2, "self_attn.o_proj")
    ),
    "a reciprocal scale": Trace(
        alter(lambda t: 1 / t, f"{OUT}.weight_scale"), (OUT,), (2, "self_attn.o_proj"), (2, "self_attn.o_proj")
    ),
    "a reciprocal input scale": Trace(
        alter(lambda t: 1 / t, f"{OUT}.input_scale"), (), (2, "self_attn.o_proj"), (2, "self_attn.o_proj")
    ),
    "one layer's scales doubled": Trace(
        alter(times(2), "model.layers.2.*.weight_scale"),
        tuple(f"model.layers.2.{linear}" for linear in LINEARS),
        (2, "self_attn.q_proj"),
        (2, "mlp.down_proj"),
    ),
    # No weight is off, and K is right as it is projected, not as it is cached.
    "K's and V's scales swapped": Trace(
        swap("k_proj.k_scale", "v_proj.v_scale", "model.layers.3.*.k_scale"), (), (3, "self_attn.k_cache"), None
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_singled_out(fault: str, by_images: Path, good: Behavior, tmp_path: Path) -> None:
    wanted = FAULTS[fault]
    folder = spoiled(by_images, tmp_path / "faulty", wanted.change)
    off = [error.name.removesuffix(".weight") for error in weights(folder) if error.relative_l2 > 0.1]
    assert sorted(off) == sorted(wanted.weights)
    found = measure(folder, SAMPLES)
    assert mean(found.kl) > 1.2 * mean(good.kl)
    before, after = rows(good), rows(found)
    leaps = {row: error / before[row] for row, error in after.items()}
    assert next(row for row, leap in leaps.items() if leap > 1.5) == wanted.first
    assert all(leap == 1 for (layer, _), leap in leaps.items() if layer < wanted.first[0])
    if wanted.worst is not None:
        assert max(after, key=lambda row: after[row]) == wanted.worst
    # Without a good candidate beside it, too: what the cache adds to K's error.
    added = [after[layer, "self_attn.k_cache"] / after[layer, "self_attn.k_proj"] for layer in range(6)]
    assert [layer for layer, times in enumerate(added) if times > 2] == ([3] if "swapped" in fault else [])


@pytest.fixture(scope="module")
def largest_inputs() -> dict[str, float]:
    """{linear outside of the layers: amax of what flows into it}, of a few scenes."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(SOURCE, dtype=torch.bfloat16)
    found: dict[str, float] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: object, args: tuple[torch.Tensor]) -> None:
            found[name] = max(found.get(name, 0.0), float(args[0].abs().max()))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "language_model" not in name:
            module.register_forward_pre_hook(note(name.removeprefix("model.")))
    encoder = Encoder(SOURCE, None, 512)
    with torch.inference_mode():
        for sample in scenes(8):
            model(**encoder.encode(sample), use_cache=False)
    return found


def listed(*gone: str) -> Edit:
    """Takes entries out of the lists of what is not quantized."""

    def apply(folder: Path) -> None:
        def cut(entries: list[str]) -> None:
            entries[:] = [entry for entry in entries if entry not in gone]

        edit_json(folder / "config.json", lambda data: cut(data["quantization_config"]["ignore"]))
        edit_json(folder / "hf_quant_config.json", lambda data: cut(data["quantization"]["exclude_modules"]))

    return apply


def as_fp8(inputs: Mapping[str, float], prefix: str) -> Edit:
    """The linears whose names begin so in ModelOpt's FP8: codes, a scale, an input scale. gate and up, one linear, share theirs."""

    def change(stored: Tensors) -> None:
        modules = [name for name in inputs if name.startswith(prefix)]
        largest = {name: float(stored[f"{name}.weight"].abs().max()) for name in modules}
        for name in modules:
            fused = (name, name.replace("gate_proj", "up_proj"), name.replace("up_proj", "gate_proj"))
            scale = torch.tensor(max(largest[shard] for shard in fused) / 448)
            stored[f"{name}.weight"] = (stored[f"{name}.weight"].float() / scale).to(torch.float8_e4m3fn)
            stored[f"{name}.weight_scale"] = scale
            stored[f"{name}.input_scale"] = torch.tensor(inputs[name] / 448)

    return tensors(change)


def codings(candidate: Path, part: str) -> dict[str, int]:
    """{how it is stored: tensors that differ} of a part of the model, as the report's table has it."""
    found = by_part(weights(candidate))
    return {form: sum(e.relative_l2 > 0 for e in errors) for (place, form), errors in found.items() if place == part}


def test_a_tower_quantized_by_mistake_shows(
    by_images: Path, good: Behavior, largest_inputs: dict[str, float], tmp_path: Path
) -> None:
    """By weights in the tower, and by what it hands to the layers; texts don't meet it."""
    change = both(listed("visual*"), as_fp8(largest_inputs, "visual."))
    folder = spoiled(by_images, tmp_path / "tower", change)
    assert codings(by_images, "visual.blocks") == {"BF16": 0}
    assert codings(folder, "visual.blocks") == {"BF16": 0, "FP8 tensor": 20}
    assert codings(folder, "visual.merger") == {"BF16": 0, "FP8 tensor": 2}
    found = measure(folder, SAMPLES)
    assert good.entering.relative_l2 == 0
    assert 0.005 < found.entering.relative_l2 < 0.05
    assert found.samples[: len(TEXTS)] == good.samples[: len(TEXTS)]
    assert measure(folder, TEXTS).entering.relative_l2 == 0
    # Its inputs are cast, by the stored scales: where these are of nothing like an image, little is left of one.
    alter(times(1 / 64), "visual.*.input_scale")(folder)
    assert measure(folder, SAMPLES).entering.relative_l2 > 5 * found.entering.relative_l2


def test_a_head_quantized_by_mistake_shows(
    by_images: Path, good: Behavior, largest_inputs: dict[str, float], tmp_path: Path
) -> None:
    """By its weight and the KL, while no hidden state is any further off. Its input is cast as those of linears are."""
    change = both(listed("lm_head"), as_fp8(largest_inputs, "lm_head"))
    folder = spoiled(by_images, tmp_path / "head", change)
    assert codings(folder, "lm_head") == {"FP8 tensor": 1}
    found = measure(folder, SAMPLES)
    assert found.layers == good.layers
    assert 1.01 * mean(good.kl) < mean(found.kl) < 2 * mean(good.kl)
    alter(times(1 / 64), "lm_head.input_scale")(folder)
    assert mean(measure(folder, SAMPLES).kl) > 10 * mean(good.kl)


UNTOLD = {
    "a tower without input scales, as text calibration leaves it": (
        ("visual*",),
        drop("visual.*.input_scale"),
        r"visual\.blocks\.0\.\S+\.input_scale: not stored: what the server would compute can't be told",
    ),
    "a tower that the list does not keep": (
        ("visual*",),
        put({}),
        r"visual\.blocks\.0\.\S+\.weight: stored not quantized, and the server builds it in codes",
    ),
    "a tower in codes that the list keeps": (
        (),
        put({}),
        r"visual\.blocks\.0\.\S+\.weight: stored in codes, and the server builds it not quantized",
    ),
    "a head that the list does not keep": (
        ("lm_head",),
        put({}),
        r"lm_head\.weight: stored not quantized, and the server builds it in codes",
    ),
}


@pytest.mark.parametrize("fault", UNTOLD)
def test_what_no_server_computes_is_refused_by_name(
    fault: str, by_images: Path, largest_inputs: dict[str, float], tmp_path: Path
) -> None:
    """vLLM serves these with scales that were never set, or not at all: figures for them would be made up."""
    gone, change, said = UNTOLD[fault]
    stored = not fault.endswith("does not keep")
    coded = (as_fp8(largest_inputs, "visual."),) if stored else ()
    folder = spoiled(by_images, tmp_path / "faulty", both(*coded, listed(*gone), change))
    with pytest.raises(DataError, match=said):
        measure(folder, TEXTS[:1])


def test_calibration_on_images_beats_text_on_image_prompts(by_images: Path, by_text: Path, compare: Run, tmp_path: Path) -> None:
    """Nearer to the source on nearly every scene, which a few tens of them tell; and the policy gates on it, either way."""
    arguments = (SOURCE, by_images, "--baseline", by_text, "--coco", *COCO, "--samples", "24")
    done = compare(*arguments, "--fail-on", "kl_nearer_low<=0.5", "--report", f"json={tmp_path / 'r.json'}")
    assert done.code == 0
    said = conforms((tmp_path / "r.json").read_text(encoding="utf-8"))
    figures = said["figures"]
    assert said["baseline"] == str(by_text)
    assert 0.7 < figures["kl_nearer_low"] <= figures["kl_nearer"] <= figures["kl_nearer_high"] <= 1
    assert figures["kl_baseline"] == pytest.approx(figures["kl_mean"] - figures["kl_difference"])
    assert figures["hidden_relative_l2_last"] < 0.1
    assert f"nearer to the reference on {figures['kl_nearer']:.0%} of samples" in " ".join(done.out.split())
    swapped = compare(SOURCE, by_text, "--baseline", by_images, *arguments[4:-1], "12", "--fail-on", "kl_nearer_high<0.5")
    assert swapped.code == 1
    assert "BROKEN: kl_nearer_high is 0." in swapped.out


def test_a_candidate_is_as_near_as_itself(by_images: Path, compare: Run) -> None:
    done = compare(SOURCE, by_images, "--baseline", by_images, "--coco", *COCO, "--samples", "4", "--format", "json")
    figures = json.loads(done.out)["figures"]
    assert [figures[f"kl_difference{end}"] for end in ("", "_low", "_high")] == [0, 0, 0]
    assert [figures[f"kl_nearer{end}"] for end in ("", "_low", "_high")] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--baseline", "B", "--weights-only"), "--baseline is for samples, which --weights-only leaves out"),
        (("--fail-on", "kl_nearer<0.5"), "kl_nearer is not measured: it takes --baseline, another candidate"),
    ],
)
def test_a_baseline_is_asked_for_where_it_can_be_had(options: Sequence[str], said: str, by_images: Path, compare: Run) -> None:
    done = compare(SOURCE, by_images, *options)
    assert done.code == 2
    assert said in " ".join(done.err.split())


def test_a_baseline_of_another_model_is_refused_before_anything_runs(by_images: Path, compare: Run, tmp_path: Path) -> None:
    def shorten(config: dict[str, Any]) -> None:
        config["text_config"]["num_hidden_layers"] -= 1
        config["text_config"]["layer_types"].pop()

    folder = spoiled(SOURCE, tmp_path / "short", lambda folder: edit_json(folder / "config.json", shorten))
    done = compare(SOURCE, by_images, "--baseline", folder, "--samples", "1")
    assert done.code == 2
    assert "differ in their number of layers: 6 and 5" in done.err
    assert "enter" not in done.err


def test_a_recipe_sets_no_limit_on_a_baseline(tmp_path: Path) -> None:
    """A conversion that ended so would tell it after hours."""
    recipe = load_recipe("demo.yaml", ["quality={fail_on: ['kl_nearer<0.5']}"], model=str(SOURCE), output=str(tmp_path / "out"))
    with pytest.raises(RecipeError, match="kl_nearer is not measured: a conversion has none beside its output"):
        refuse_unmeasured_limits(prepare(recipe))
