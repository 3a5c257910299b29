"""The real vLLM serves ckptq's output with no patch, and as well as ModelOpt's own export calibrated on the same samples.

One run of the server each for the BF16 source, ours and ModelOpt's, one after the other. The figures are shown at the end.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peers.pair import ROOT, SOURCE, Pair
from peers.served import read, served

from ckptq.calibration import Sample
from ckptq.calibration.encode import Encoder
from ckptq.compare import served as served_arithmetic
from ckptq.compare.behavior import measure_behavior
from ckptq.console import Console
from ckptq.scopes.qwen2_5_vl import SCOPE

pytestmark = pytest.mark.server

PYTHON = ROOT / ".venv-vllm/bin/python"
RESAMPLES = 10_000
SCENES = 256


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
        return float(sum(self.figures["text_nll"]) / sum(self.figures["text_tokens"]))

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
    reference = work / "log_probabilities.npy"
    source = evaluate(SOURCE, work / "source", "--log-probabilities", reference)
    try:
        ours = evaluate(image_pair.ours, work / "ours", "--reference", reference)
        modelopt = evaluate(image_pair.modelopt, work / "modelopt", "--reference", reference, "--patch-requantize")
    finally:
        reference.unlink()  # 180 MB, which pytest would keep
    return Trial(source, ours, modelopt)


def ratio_interval(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of mean(ours) / mean(theirs) over scenes, which are drawn as pairs. Arrays float64 [scenes]."""
    drawn = np.random.default_rng(0).integers(0, len(ours), size=(RESAMPLES, len(ours)))
    low, high = np.percentile(ours[drawn].mean(1) / theirs[drawn].mean(1), [2.5, 97.5])
    return float(low), float(high)


def table(trial: Trial) -> str:
    rows = [f"{'':10} {'captions exact':>14} {'caption NLL':>12} {'text NLL':>9} {'KL captions':>12} {'KL text':>8} {'KL all':>8}"]
    for name, found in (("BF16", trial.source), ("ckptq", trial.ours), ("ModelOpt", trial.modelopt)):
        row = f"{name:10} {f'{found.exact}/{SCENES}':>14} {found.caption_nll.mean():12.3e} {found.text_nll:9.4f}"
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


def test_compare_says_what_the_server_measures(trial: Trial, image_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and KL of held-out text by `compare`, against those of the server's own log-probabilities for the same tokens.

    The losses within 1 %, the KL within 10 %: the two compute BF16 in other orders. A cache that cuts off doubles K's and V's
    error, so compare is shown one here; without it the KL is a quarter less.
    """
    tokenizer = Encoder(SOURCE, None, 512)
    ids = tokenizer.tokens((ROOT / "tests/data/heldout.txt").read_text(encoding="utf-8"))
    chunks = [ids[at : at + 128] for at in range(0, len(ids) - 127, 128)]
    samples = [Sample(f"chunk {i}", tokenizer.text(chunk)) for i, chunk in enumerate(chunks)]
    assert [tokenizer.tokens(sample.text) for sample in samples] == chunks
    monkeypatch.setattr(served_arithmetic, "cached", toward_zero)
    found = measure_behavior(
        SOURCE,
        image_pair.ours,
        samples,
        sequence_length=512,
        max_pixels=None,
        device=torch.device("cpu"),
        memory=10**9,
        console=Console(quiet=True),
    )
    assert len(found.kl) == sum(trial.ours.figures["text_tokens"])
    assert np.mean(found.nll_reference) == pytest.approx(trial.source.text_nll, rel=0.005)
    assert np.mean(found.nll_candidate) == pytest.approx(trial.ours.text_nll, rel=0.01)
    assert np.mean(found.kl) == pytest.approx(trial.ours.kl("text"), rel=0.1)
