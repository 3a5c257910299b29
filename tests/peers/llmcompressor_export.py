"""llm-compressor's own exports on CPU, several in one process.

    python tests/peers/llmcompressor_export.py --jobs JOBS.json

JOBS.json: `[{"source": DIR, "output": DIR, "format": scheme, "kv": bool, "ignore": [...], "weights_only": bool}, ...]`,
calibrated on some held-out text. `weights_only` takes its entry point that reads files and builds no model: for experts, which
it leaves as one tensor each, and to keep files and names as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

TEXT = Path(__file__).parents[1] / "data" / "heldout.txt"
SAMPLES, LENGTH = 8, 64
CALIBRATED = ("FP8", "NVFP4", "mixed")
MIXED = {"FP8_DYNAMIC": ["re:.*self_attn.*"], "NVFP4": ["re:.*mlp.*"]}
"""What the format `mixed` takes for whom."""
FP8_KV = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def export(job: dict[str, Any]) -> None:
    """Quantizes the VLM in job["source"] by `oneshot`, as its examples do, with the source's other files beside the result."""
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    source, output = Path(job["source"]), Path(job["output"])
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.bfloat16).eval()
    scheme = FP8_KV if job["kv"] else None
    which = MIXED if job["format"] == "mixed" else {job["format"]: ["Linear"]}
    modifier = QuantizationModifier(scheme={**which}, ignore=job["ignore"], kv_cache_scheme=scheme)
    tokenizer = AutoTokenizer.from_pretrained(source)
    # The tokenizer in the processor's place: loading that one needs torchvision, and text is all that is shown here.
    settings: dict[str, Any] = {"processor": tokenizer, "pipeline": "datafree"}
    if job["format"] in CALIBRATED or job["kv"]:
        data = torch.utils.data.DataLoader(pieces(tokenizer), batch_size=None)
        settings |= {"dataset": data, "num_calibration_samples": SAMPLES, "pipeline": "basic"}
    oneshot(model=model, recipe=modifier, **settings)
    model.save_pretrained(output, save_compressed=True)
    copy_sidecars(source, output)


def pieces(tokenizer: Any) -> list[dict[str, Any]]:
    """The held-out text's first tokens, int64 [1, LENGTH] each."""
    import torch

    ids = tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"]
    return [{"input_ids": torch.tensor([ids[i * LENGTH : (i + 1) * LENGTH]])} for i in range(SAMPLES)]


def export_files(job: dict[str, Any]) -> None:
    """Quantizes the weights file by file."""
    from llmcompressor import model_free_ptq

    model_free_ptq(job["source"], job["output"], scheme=job["format"], ignore=job["ignore"], device="cpu", max_workers=1)


def copy_sidecars(source: Path, output: Path) -> None:
    for file in source.iterdir():
        if ".safetensors" not in file.name and not (output / file.name).exists():
            shutil.copyfile(file, output / file.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", required=True, type=Path)
    jobs = parser.parse_args().jobs
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    for job in json.loads(jobs.read_text(encoding="utf-8")):
        (export_files if job["weights_only"] else export)(job)


if __name__ == "__main__":
    main()
