"""ModelOpt's own resident flow on CPU: the peer that ckptq is measured against.

    python tests/peers/modelopt_export.py --jobs JOBS.json

JOBS.json: `[{"source": DIR, "output": DIR, "format": key of PRESETS or `mixed`, "kv": key of KV or null}, ...]`, calibrated on some
held-out text; or on the samples of a ckptq recipe, with `"recipe": NAME, "settings": ["KEY=VALUE", ...]` in place of `source`.

The model is whole in memory, and its full forward runs on each sample by itself, so that the vision tower takes part and no
pad token reaches an observer. Run it in a process of its own: ModelOpt patches transformers and torch for good.
"""

from __future__ import annotations

import argparse
import contextlib
import json
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
TEXT = Path(__file__).parents[1] / "data" / "heldout.txt"

# The names of ModelOpt's presets, as attributes of modelopt.torch.quantization.
PRESETS = {
    "fp8": "FP8_DEFAULT_CFG",
    "fp8_per_channel_per_token": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "fp8_pb_wo": "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
    "nvfp4": "NVFP4_DEFAULT_CFG",
    "w4a16_nvfp4": "W4A16_NVFP4_CFG",
    "mxfp8": "MXFP8_DEFAULT_CFG",
}
MIXED = {"*self_attn*": "fp8", "*mlp*": "nvfp4"}
"""What the format `mixed` takes for whom."""
# What its preset FP8_KV_CFG sets, and the same with a constant in place of an amax: `--kv_cache_qformat fp8_cast`, the default of
# its script hf_ptq.py.
KV = {"fp8": {}, "fp8_cast": {"use_constant_amax": True}}


def quant_cfg(format: str = "fp8", kv: str | None = "fp8") -> list[dict[str, Any]]:
    """A preset, FP8 static per tensor as it stands, and an FP8 KV cache, for the language model.

    Later entries win, and the KV entry matches the vision tower's attention too: what stays is disabled after it
    (ModelOpt 0.47.0 torch/quantization/conversion.py set_quantizer_by_cfg).
    """
    import modelopt.torch.quantization as mtq

    kept = [{"quantizer_name": pattern, "enable": False} for pattern in ("*visual*", "*lm_head*")]
    cache = [{**entry, "cfg": {**entry["cfg"], **KV[kv]}} for entry in mtq.FP8_KV_CFG["quant_cfg"]] if kv else []
    if format != "mixed":
        return [*getattr(mtq, PRESETS[format])["quant_cfg"], *cache, *kept]
    off = [{"quantizer_name": "*", "enable": False}]
    parts = [
        {**entry, "quantizer_name": f"{where}{entry['quantizer_name'].removeprefix('*')}"}
        for where, part in MIXED.items()
        for entry in getattr(mtq, PRESETS[part])["quant_cfg"]
        if entry["quantizer_name"] in ("*weight_quantizer", "*input_quantizer")
    ]
    return [*off, *parts, *cache, *kept]


def export(
    source: Path,
    output: Path,
    samples: Sequence[Mapping[str, torch.Tensor]],
    format: str = "fp8",
    kv: str | None = "fp8",
    device: str = "cpu",
) -> None:
    """Quantizes `source`, the folder of a VLM or a causal language model, and writes ModelOpt's export with the source's other
    files to `output`.

    Each sample is what the model's forward takes (`input_ids` int64 [batch, length], `pixel_values`, ...), unpadded.
    """
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint

    model = load(source).to(device)

    def forward_loop(model: torch.nn.Module) -> None:
        with torch.inference_mode():
            for sample in samples:
                model(**{name: tensor.to(device) for name, tensor in sample.items()}, use_cache=False)

    with contextlib.redirect_stdout(sys.stderr):
        model = mtq.quantize(model, {"quant_cfg": quant_cfg(format, kv), "algorithm": "max"}, forward_loop)
        export_hf_checkpoint(model, export_dir=output)
    copy_sidecars(source, output)


def load(source: Path) -> torch.nn.Module:
    """The whole model in BF16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    vision = hasattr(AutoConfig.from_pretrained(source), "vision_config")
    model = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    return model.from_pretrained(source, dtype=torch.bfloat16).eval()


def text_samples(source: Path, count: int = 8, length: int = 64) -> list[dict[str, torch.Tensor]]:
    """`count` pieces of the held-out text, int64 [1, length] each."""
    import torch
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(source)(TEXT.read_text(encoding="utf-8"))["input_ids"]
    return [{"input_ids": torch.tensor([ids[i * length : (i + 1) * length]])} for i in range(count)]


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
    parser.add_argument("--jobs", required=True, type=Path)
    jobs = parser.parse_args().jobs
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    for job in json.loads(jobs.read_text(encoding="utf-8")):
        samples: Sequence[Mapping[str, torch.Tensor]]
        if "recipe" in job:
            source, samples = encoded_samples(job["recipe"], job["settings"])
        else:
            source = Path(job["source"])
            samples = text_samples(source)
        export(source, Path(job["output"]), samples, job["format"], job["kv"])


if __name__ == "__main__":
    main()
