"""What ModelOpt's own calibration of a resident pipeline's denoisers measures on the prompts of a recipe's calibration.

    PYTHONPATH=tests python tests/peers/resident_pipeline.py PIPELINE_DIR SETTINGS.json OUTPUT.json

SETTINGS.json holds the recipe's section `calibration`. OUTPUT.json gets {folder: {module: amax of its input}}. Run it in a
process of its own: ModelOpt patches diffusers and torch for good.
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ckptq.calibration import load_samples
from ckptq.denoise_pipeline import arguments
from ckptq.sections import PromptCalibration


def load(folder: Path) -> Any:
    """The whole pipeline in BF16, as anybody loads it."""
    import diffusers

    cls = getattr(diffusers, json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"])
    pipeline = cls.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(pipeline: Any, settings: PromptCalibration) -> list[torch.Tensor]:
    """All prompts, one after another; the latents of each."""
    latents = []
    for number, sample in enumerate(load_samples(settings)):
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
        latents.append(pipeline(**arguments(pipeline, settings, sample, number))[0])
    return latents


def by_modelopt(pipeline: Any, folders: Sequence[str], settings: PromptCalibration) -> dict[str, dict[str, float]]:
    """ModelOpt's preset for FP8 on each denoiser."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.nn import TensorQuantizer

    found: dict[str, dict[str, float]] = {}
    for folder in folders:
        with contextlib.redirect_stdout(sys.stderr):
            model = mtq.quantize(getattr(pipeline, folder), mtq.FP8_DEFAULT_CFG, lambda model: run(pipeline, settings))
        for name, module in model.named_modules():
            if isinstance(module, TensorQuantizer) and name.endswith(".input_quantizer") and module.amax is not None:
                found.setdefault(folder, {})[name.removesuffix(".input_quantizer")] = float(module.amax)
    return found


def main() -> None:
    folder, given, output = map(Path, sys.argv[1:])
    warnings.simplefilter("ignore")
    settings = PromptCalibration(**json.loads(given.read_text(encoding="utf-8")))
    found = by_modelopt(load(folder), ("transformer",), settings)
    output.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
