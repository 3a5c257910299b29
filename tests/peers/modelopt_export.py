"""ModelOpt's own resident flow on CPU: the peer that ckptq is measured against.

    python tests/peers/modelopt_export.py --recipe demo.yaml --output DIR [--set KEY=VALUE]...

The model is whole in memory, and its full forward runs on each sample by itself, so that the vision tower takes part and no
pad token reaches an observer. Run it in a process of its own: ModelOpt patches transformers and torch for good.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

WEIGHTS = (".safetensors", ".safetensors.index.json")


def quant_cfg() -> list[dict[str, Any]]:
    """FP8 static per tensor and FP8 KV for the language model.

    Later entries win, and the KV entry matches the vision tower's attention too: what stays is disabled after it
    (ModelOpt 0.47.0 torch/quantization/conversion.py set_quantizer_by_cfg).
    """
    import modelopt.torch.quantization as mtq

    kept = [{"quantizer_name": pattern, "enable": False} for pattern in ("*visual*", "*lm_head*")]
    return [*mtq.FP8_DEFAULT_CFG["quant_cfg"], *mtq.FP8_KV_CFG["quant_cfg"], *kept]


def export(source: Path, output: Path, samples: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Quantizes `source`, a Qwen2.5-VL folder, and writes ModelOpt's export with the source's other files to `output`.

    Each sample is what the model's forward takes (`input_ids` int64 [1, length], `pixel_values`, ...), unpadded.
    """
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.bfloat16).eval()

    def forward_loop(model: torch.nn.Module) -> None:
        with torch.inference_mode():
            for sample in samples:
                model(**sample, use_cache=False)

    with contextlib.redirect_stdout(sys.stderr):
        model = mtq.quantize(model, {"quant_cfg": quant_cfg(), "algorithm": "max"}, forward_loop)
        export_hf_checkpoint(model, export_dir=output)
    copy_sidecars(source, output)


def copy_sidecars(source: Path, output: Path) -> None:
    """Tokenizer, processor and chat template, which export_hf_checkpoint leaves out. What it wrote itself stays."""
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(WEIGHTS) and not (output / file.name).exists():
            shutil.copyfile(file, output / file.name)


def encoded_samples(recipe: str, overrides: Sequence[str]) -> tuple[Path, list[Mapping[str, torch.Tensor]]]:
    """(source folder, samples) of a recipe, through ckptq's own sources and encoder: the samples that ckptq calibrates on."""
    from ckptq.calibration import load_samples
    from ckptq.calibration.encode import Encoder
    from ckptq.recipe import load_recipe

    job = load_recipe(recipe, overrides)
    if job.model is None:
        raise SystemExit(f"{recipe}: expected a recipe that names a model")
    source = Path(job.model)
    settings = job.calibration
    encoder = Encoder(source, getattr(settings, "max_pixels", None), settings.sequence_length)
    return source, [encoder.encode(sample) for sample in load_samples(settings)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    source, samples = encoded_samples(options.recipe, options.overrides)
    export(source, options.output, samples)


if __name__ == "__main__":
    main()
