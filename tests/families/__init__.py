"""Families: one file per scope that makes a tiny checkpoint of it, for tests/test_families.py and for benchmarks/architectures.py.

A file in this folder holds one `FAMILY`; it is found by its being here, and named as the scope's file. Nothing heavy is imported
before `make` is called.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "tiny-qwen2.5-vl"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
"""The example's: 4096 tokens, the last eight special ones; it has a chat template."""
IMAGES = ("preprocessor_config.json", "chat_template.json")
"""Beside TOKENIZER, for the families whose image processor is Qwen2-VL's."""
VOCAB, END = 4096, 4090

TEXT_SAMPLES: Mapping[str, Any] = {
    "source": "text",
    "files": str(ROOT / "tests/data/heldout.txt"),
    "samples": 4,
    "sequence_length": 64,
}
IMAGE_SAMPLES: Mapping[str, Any] = {
    "source": "coco",
    "images": str(ROOT / "examples/scenes/calib"),
    "annotations": str(ROOT / "examples/scenes/annotations/captions_calib.json"),
    "samples": 3,
    "sequence_length": 512,
}


@dataclass(frozen=True, slots=True)
class Mutant:
    """A change to the converted checkpoint (of the first recipe) that the validator must find, and the code of what it says."""

    what: str
    edit: Callable[[Path], None]
    code: str


@dataclass(frozen=True, slots=True)
class Family:
    """A scope's tiny checkpoint and what to do with it.

    make         writes the checkpoint into an empty folder: weights under the names of the hub's files, config.json, tokenizer and
                 processor. The same every time. `write` below does most of it
    recipes      shipped recipes to convert it with, by name: the one with static scales and KV cache first
    calibration  the recipe's section `calibration` for the tests: TEXT_SAMPLES, IMAGE_SAMPLES or one's own
    overrides    further `KEY=VALUE` for every recipe, as `--set` takes them
    hooks        why ModelOpt 0.47 can't calibrate the resident model, "" where it can: plain hooks stand in for it then
    resident     loads the whole model for ModelOpt or the hooks, where transformers' auto class of the scope does not do it. Its
                 modules have the names that they have in ckptq's streamed model
    off          patterns of ModelOpt's quantizers to disable: what the scope keeps. Matched as ModelOpt does: `*visual*`
    others       patterns (fnmatch) of stored tensors that the server does not read, and that the scope therefore does not name
    mutants      what is peculiar to the family; tests/test_families.py has those that suit all
    harmless     which of those do this family's first output no harm
    engine       what vLLM's LLM() wants beside the folder, for benchmarks/architectures.py
    """

    make: Callable[[Path], None]
    recipes: tuple[str, ...]
    calibration: Mapping[str, Any] = field(default_factory=lambda: TEXT_SAMPLES)
    overrides: tuple[str, ...] = ()
    hooks: str = ""
    resident: Callable[[Path], Any] | None = None
    off: tuple[str, ...] = ("*lm_head*",)
    others: tuple[str, ...] = ()
    mutants: tuple[Mutant, ...] = ()
    harmless: tuple[str, ...] = ()
    engine: Mapping[str, Any] = field(default_factory=dict)

    def settings(self, recipe: str, source: Path, output: Path) -> list[str]:
        """The arguments of `--set` that turn a shipped recipe into the test's job."""
        from ckptq.recipe import load_recipe

        calibrates = "calibration" in load_recipe(recipe).model_fields_set
        calibration = [f"calibration={json.dumps(dict(self.calibration))}"] if calibrates else []
        return [f"model={source}", f"output={output}", "export.shard_size=1MB", *calibration, *self.overrides]


def families() -> dict[str, Family]:
    """{scope's file: family} of every file in this folder."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}").FAMILY for name in names}


def write(folder: Path, model_class: str, config: Any, files: tuple[str, ...] = TOKENIZER, seed: int = 0) -> None:
    """A checkpoint of transformers' `model_class` with this config: seeded random weights in BF16, and the example's `files`.

    transformers 5.17 saves under the names of the hub's files (core_model_loading.py revert_weight_conversion).
    """
    import torch
    import transformers

    torch.manual_seed(seed)
    model = getattr(transformers, model_class)._from_config(config, dtype=torch.bfloat16)
    fill(model)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    for name in files:
        shutil.copyfile(EXAMPLE / name, folder / name)


def fill(model: Any, deviation: float = 0.1) -> None:
    """Normal values for every matrix; vectors (norms, biases) vary around what transformers starts them with."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape) * deviation
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
