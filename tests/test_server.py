"""The real vLLM serves ckptq's output with no patch, and as well as ModelOpt's own export calibrated on the same samples.

One run of the server each for the BF16 source, ours, ModelOpt's and ours in FP8 with dynamic activations, one after the other. The
figures are shown at the end. What `compare` says of ours is held against them.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peers.pair import ROOT, SOURCE, Pair, run
from peers.served import read, served

from ckptq.calibration import Sample, load_samples
from ckptq.calibration.encode import Encoder
from ckptq.compare import served as served_arithmetic
from ckptq.compare.behavior import measure_behavior
from ckptq.console import Console
from ckptq.scopes.qwen2_5_vl import SCOPE
from ckptq.sections import CocoCalibration

pytestmark = pytest.mark.server

PYTHON = ROOT / ".venv-vllm/bin/python"
RESAMPLES = 10_000
SCENES = 256
FEWER, PROSE, PIECE = 64, 32, 300
"""Scenes on which `compare` is held against the server; of these with prose for a caption, too, of so many characters."""


@dataclass(frozen=True)
class Verdict:
    """What tests/server/evaluate.py found of one checkpoint."""

    figures: dict[str, Any]
    weights: Path

    @property
    def exact(self) -> int:
        return sum(self.figures["exact"])

    @cached_property
    def caption_nll(self) -> np.ndarray:
        """Mean NLL of the right caption, float64 [scenes]."""
        return np.array(self.figures["caption_nll"])

    @property
    def text_nll(self) -> float:
        return self.nll("text")

    def nll(self, kind: str) -> float:
        """Mean NLL of the tokens of `kind`, of which evaluate.py gives sums."""
        return float(sum(self.figures[f"{kind}_nll"]) / sum(self.figures[f"{kind}_tokens"]))

    def kl(self, *kinds: str) -> float:
        """Mean KL(BF16 source || this) over the positions of `kinds`, nats."""
        return float(
            sum(sum(self.figures[f"{kind}_kl"]) for kind in kinds) / sum(sum(self.figures[f"{kind}_tokens"]) for kind in kinds)
        )


@dataclass(frozen=True)
class Trial:
    source: Verdict
    ours: Verdict
    modelopt: Verdict
    dynamic: Verdict
    dynamic_folder: Path


def evaluate(model: Path, work: Path, *options: str | Path) -> Verdict:
    assert PYTHON.exists(), f"{PYTHON} is not there: `make test` sets it up"
    work.mkdir()
    inputs = ["--model", model, "--scenes", "examples/scenes", "--text", "tests/data/heldout.txt"]
    outputs = ["--out", work / "figures.json", "--weights", work / "weights.npz"]
    command = [str(part) for part in (PYTHON, "tests/server/evaluate.py", *inputs, *outputs, *options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests/server/shim")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"vLLM with {model.name} ended with {done.returncode}:\n{done.stderr[-6000:]}"
    return Verdict(json.loads((work / "figures.json").read_text()), work / "weights.npz")


@pytest.fixture(scope="session")
def trial(image_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Trial:
    work = tmp_path_factory.mktemp("server")
    reference, dynamic_folder = work / "log_probabilities.npy", work / "dynamic-folder"
    run(
        "-m",
        "ckptq",
        "convert",
        "--recipe",
        "qwen25vl-lm-fp8-dynamic-modelopt",
        "--set",
        f"model={SOURCE}",
        "--output",
        str(dynamic_folder),
    )
    source = evaluate(SOURCE, work / "source", "--log-probabilities", reference)
    try:
        ours = evaluate(image_pair.ours, work / "ours", "--reference", reference)
        modelopt = evaluate(image_pair.modelopt, work / "modelopt", "--reference", reference, "--patch-requantize")
        dynamic = evaluate(dynamic_folder, work / "dynamic", "--reference", reference, "--first", str(FEWER))
    finally:
        reference.unlink()  # 180 MB, which pytest would keep
    return Trial(source, ours, modelopt, dynamic, dynamic_folder)


def ratio_interval(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of mean(ours) / mean(theirs) over scenes, which are drawn as pairs. Arrays float64 [scenes]."""
    drawn = np.random.default_rng(0).integers(0, len(ours), size=(RESAMPLES, len(ours)))
    low, high = np.percentile(ours[drawn].mean(1) / theirs[drawn].mean(1), [2.5, 97.5])
    return float(low), float(high)


def table(trial: Trial) -> str:
    rows = [f"{'':10} {'captions exact':>14} {'caption NLL':>12} {'text NLL':>9} {'KL captions':>12} {'KL text':>8} {'KL all':>8}"]
    runs = {"BF16": trial.source, "ckptq": trial.ours, "ModelOpt": trial.modelopt, "dynamic": trial.dynamic}
    for name, found in runs.items():
        count = len(found.figures["exact"])
        row = f"{name:10} {f'{found.exact}/{count}':>14} {found.caption_nll.mean():12.3e} {found.text_nll:9.4f}"
        if found is not trial.source:
            row += f" {found.kl('caption'):12.3e} {found.kl('text'):8.5f} {found.kl('caption', 'text'):8.5f}"
        rows.append(row)
    low, high = ratio_interval(trial.ours.caption_nll, trial.modelopt.caption_nll)
    ratio = trial.ours.caption_nll.mean() / trial.modelopt.caption_nll.mean()
    rows.append(f"ckptq / ModelOpt: caption NLL {ratio:.3f} (95 % interval {low:.3f} to {high:.3f})")
    return "\n".join(rows)


def test_captions_are_as_exact_as_the_sources(trial: Trial, record_property: Callable[[str, object], None]) -> None:
    record_property("table", table(trial))
    assert len(trial.ours.figures["exact"]) == SCENES
    assert trial.source.exact >= 0.95 * SCENES, "the BF16 source itself should caption the scenes"
    assert trial.ours.exact >= trial.source.exact - 0.01 * SCENES


def test_caption_nll_is_not_above_modelopts(trial: Trial) -> None:
    low, _ = ratio_interval(trial.ours.caption_nll, trial.modelopt.caption_nll)
    assert low <= 1.05


def test_heldout_text_nll_is_not_above_modelopts(trial: Trial) -> None:
    assert trial.ours.text_nll <= 1.02 * trial.modelopt.text_nll


def test_kl_to_the_source_is_not_above_modelopts(trial: Trial) -> None:
    assert 0 < trial.ours.kl("caption", "text") <= 1.02 * trial.modelopt.kl("caption", "text")


def test_ours_is_served_from_image_and_text_without_a_patch(trial: Trial) -> None:
    """The trial's `ours` ran with nothing of vLLM changed; ModelOpt's can't (the next test)."""
    assert all(caption.startswith(("A ", "An ")) for caption in trial.ours.figures["captions"])
    assert len(trial.ours.figures["text_continuation"]) == 4
    assert all(len(set(text.split())) > 3 for text in trial.ours.figures["text_continuation"]), "NaN gives one token for ever"


def test_modelopts_export_needs_the_patch(image_pair: Pair, tmp_path: Path) -> None:
    """Else the patch is of no use any more and should go."""
    with pytest.raises(AssertionError, match="static_scaled_fp8_quant"):
        evaluate(image_pair.modelopt, tmp_path / "unpatched")


def test_the_server_computes_with_the_weights_we_wrote(trial: Trial, image_pair: Pair) -> None:
    """Every linear of the language model, and no other, is FP8 in the running server, with our codes and scale.

    The same of ModelOpt's export proves `served`, on which tests/test_parity.py rests.
    """
    for found, folder in ((trial.ours, image_pair.ours), (trial.modelopt, image_pair.modelopt)):
        tensors = read(folder)
        expected = {}
        for layer in range(6):
            for fused in SCOPE.linears:
                codes, scale = served(tensors, [f"{SCOPE.layers}.{layer}.{shard}" for shard in fused.shards])
                expected[f"{SCOPE.server_layers}.{layer}.{fused.runtime}"] = (torch.cat([c.float() for c in codes]) * scale).numpy()
        loaded = np.load(found.weights)
        assert set(loaded) == set(expected)
        assert [name for name, rows in expected.items() if not np.array_equal(loaded[name], rows)] == []


def toward_zero(scale: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """What vLLM 0.32.0's cache on a CPU makes of K and V (csrc/cpu, seen in its bytes): codes cut off, not rounded."""

    def cast(values: torch.Tensor) -> torch.Tensor:
        exact = (values.float() / scale).clamp(-448, 448)
        codes = exact.to(torch.float8_e4m3fn)
        further = codes.float().abs() > exact.abs()
        cut = codes.view(torch.uint8) - further.to(torch.uint8)
        return (cut.view(torch.float8_e4m3fn).float() * scale).to(values.dtype)

    return cast


@pytest.mark.parametrize("kind", ["ours", "dynamic"])
def test_compare_says_what_the_server_measures(
    kind: str, trial: Trial, image_pair: Pair, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    """Losses and KL by `compare`, of held-out text and of captions of images, are those of the server's own log-probabilities.

    FP8 static with FP8 KV, FP8 dynamic, and BF16, which is the reference of both. Of text, and of prose that follows an image, mean
    losses are within 1 % and the mean KL within 10 %. Of right captions a few scenes carry the mean, and BF16 logits of 8 and more
    step by 1/16: there the ratio's geometric mean over scenes is within 3 %, and scenes correlate.
    A cache that cuts off doubles K's and V's error, so compare is shown one here; without it the KL is a quarter less.
    """
    folder, told = (image_pair.ours, trial.ours) if kind == "ours" else (trial.dynamic_folder, trial.dynamic)
    texts, prose, right = text_samples(), *scene_samples()
    monkeypatch.setattr(served_arithmetic, "cached", toward_zero)
    found = measure_behavior(
        SOURCE,
        folder,
        [*texts, *prose, *right],
        sequence_length=512,
        max_pixels=None,
        device=torch.device("cpu"),
        memory=10**9,
        console=Console(quiet=True),
    )
    rows: list[tuple[str, float, float, float]] = []
    for part, gaps in (("text", found.samples[: len(texts)]), ("prose", found.samples[len(texts) : -len(right)])):
        tokens = [gap.tokens for gap in gaps]
        assert tokens == told.figures[f"{part}_tokens"]
        means = np.average([(g.nll_reference, g.nll_candidate, g.kl_mean) for g in gaps], axis=0, weights=tokens)
        servers = (trial.source.nll(part), told.nll(part), told.kl(part))
        names = (f"{part}, NLL in BF16", f"{part}, NLL", f"{part}, KL")
        rows += zip(names, map(float, means), servers, (0.01, 0.01, 0.1), strict=True)
    gaps = found.samples[-len(right) :]
    assert [gap.tokens for gap in gaps] == told.figures["caption_tokens"][: len(gaps)]
    for what, mine, theirs in (
        ("captions, NLL in BF16", [gap.nll_reference for gap in gaps], trial.source.caption_nll[: len(gaps)]),
        ("captions, NLL", [gap.nll_candidate for gap in gaps], told.caption_nll[: len(gaps)]),
    ):
        rows.append((what, float(np.exp(np.log(mine).mean())), float(np.exp(np.log(theirs).mean())), 0.03))
        assert np.corrcoef(np.log(mine), np.log(theirs))[0, 1] > 0.98, what
    head = f"{'':22} {'compare':>10} {'vLLM':>10}"
    record_property("table", "\n".join((head, *(f"{what:22} {ours:10.4g} {theirs:10.4g}" for what, ours, theirs, _ in rows))))
    for what, ours, server, within in rows:
        assert ours == pytest.approx(server, rel=within), what


def text_samples() -> list[Sample]:
    """The chunks that the server was given."""
    tokenizer = Encoder(SOURCE, None, 512)
    ids = tokenizer.tokens((ROOT / "tests/data/heldout.txt").read_text(encoding="utf-8"))
    chunks = [ids[at : at + 128] for at in range(0, len(ids) - 127, 128)]
    samples = [Sample(f"chunk {i}", tokenizer.text(chunk)) for i, chunk in enumerate(chunks)]
    assert [tokenizer.tokens(sample.text) for sample in samples] == chunks
    return samples


def scene_samples() -> tuple[list[Sample], list[Sample]]:
    """(the first scenes with prose for a caption, scenes with their own), as `--coco` reads them, in the server's order."""
    annotations = ROOT / "examples/scenes/annotations/captions_eval.json"
    read = CocoCalibration(source="coco", images=str(ROOT / "examples/scenes/eval"), annotations=str(annotations), samples=SCENES)
    by_file = {sample.image.name: sample for sample in load_samples(read) if sample.image}
    data = json.loads(annotations.read_text())
    files = {image["id"]: image["file_name"] for image in data["images"]}
    right = [by_file[files[a["image_id"]]] for a in data["annotations"][:FEWER]]
    text = (ROOT / "tests/data/heldout.txt").read_text(encoding="utf-8")
    pieces = [text[i * PIECE : (i + 1) * PIECE].strip() for i in range(PROSE)]
    return [replace(scene, text=piece) for scene, piece in zip(right, pieces, strict=False)], right
