"""Recipes run twice: by ckptq's command line, each in a process of its own, and by ModelOpt's resident flow, all in another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "examples/tiny-qwen2.5-vl"

# Recipe, then settings that override it. Samples are read by ckptq for both sides, and encoded one by one.
IMAGES = ("demo.yaml",)
TEXT = (
    "qwen25vl-lm-fp8-text.yaml",
    "model=examples/tiny-qwen2.5-vl",
    "calibration.files=examples/scenes/annotations/captions_calib.json",
    "calibration.samples=64",
)


@dataclass(frozen=True, slots=True)
class Pair:
    """The folders of a source checkpoint and of the two made from it."""

    source: Path
    ours: Path
    modelopt: Path


def make_pairs(jobs: Sequence[Sequence[str]], folder: Path) -> list[Pair]:
    """Runs each job both ways into `folder`. Raises AssertionError with what the failing side printed."""
    pairs, theirs = [], []
    for number, (recipe, *overrides) in enumerate(jobs):
        pair = Pair(SOURCE, folder / f"ours-{number}", folder / f"modelopt-{number}")
        settings = [part for override in overrides for part in ("--set", override)]
        run("-m", "ckptq", "convert", "--recipe", recipe, "--output", str(pair.ours), *settings)
        pairs.append(pair)
        theirs.append({"recipe": recipe, "settings": overrides, "output": str(pair.modelopt), "format": "fp8", "kv": "fp8"})
    (folder / "jobs.json").write_text(json.dumps(theirs), encoding="utf-8")
    run("tests/peers/modelopt_export.py", "--jobs", str(folder / "jobs.json"))
    return pairs


def run(*arguments: str) -> None:
    # One thread for both: how a sum is split among threads is allowed to change its last bit.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-4000:]}"
