"""Exports of vLLM's own `fp8` method, which no exporter at hand writes: a few lines of torch.

    python -m corpus.relabeled --jobs JOBS.json

JOBS.json: `[{"source": DIR, "output": DIR, "format": "static" | "dynamic" | "block", "ignored": KEY, ...}, ...]`. `ignored` is
the key of config.json under which the linears that stay as they are are listed; the server reads two. A static export has
`scales`, the folder of a ModelOpt export of the same source, and takes codes and scales from it: the tensors of the two methods
are the same (vLLM 0.32.0 model_executor/layers/quantization/fp8.py Fp8LinearMethod.create_weights). `scale_dtype` is that of a
block's scale, `shards` the number of files.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from corpus.sources import save, write_json

BLOCK = 128
E4M3_MAX = 448.0
Tensors = dict[str, torch.Tensor]


def export(job: Mapping[str, Any]) -> None:
    source, output = Path(job["source"]), Path(job["output"])
    output.mkdir()
    stored = read(source)
    linears = [name.removesuffix(".weight") for name in stored if is_linear(name, stored[name])]
    kept = {name for name in linears if not name.startswith("model.layers.") or name.endswith("mlp.gate")}
    encoded = read(Path(job["scales"])) if job["scales"] else {}
    tensors: Tensors = {}
    for name, tensor in stored.items():
        module = name.removesuffix(".weight")
        if module not in linears or module in kept:
            tensors[name] = tensor
        elif encoded:
            tensors |= {key: encoded[key] for key in (name, f"{module}.weight_scale", f"{module}.input_scale")}
        elif job["format"] == "block":
            tensors[name], tensors[f"{module}.weight_scale_inv"] = block_codes(tensor, getattr(torch, job["scale_dtype"]))
        else:
            tensors[name], tensors[f"{module}.weight_scale"] = tensor_codes(tensor)
    save(tensors, output, job["shards"])
    section: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "static" if job["format"] == "static" else "dynamic"}
    if job["format"] == "block":
        section |= {"fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    write_json(output / "config.json", {**config, "quantization_config": {**section, job["ignored"]: sorted(kept)}})
    for file in source.iterdir():
        if ".safetensors" not in file.name and file.name != "config.json":
            shutil.copyfile(file, output / file.name)


def read(folder: Path) -> Tensors:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def is_linear(name: str, tensor: torch.Tensor) -> bool:
    """All matrices but the embeddings."""
    return name.endswith(".weight") and tensor.ndim == 2 and "embed_tokens" not in name


def tensor_codes(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(F8_E4M3 [out, in], scale F32 [])."""
    scale = weight.float().abs().max() / E4M3_MAX
    return (weight.float() / scale).to(torch.float8_e4m3fn), scale


def block_codes(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(F8_E4M3 [out, in], scales `dtype` [ceil(out/128), ceil(in/128)]), under the scales as they are stored."""
    rows, columns = weight.shape
    padded = torch.zeros(-(-rows // BLOCK) * BLOCK, -(-columns // BLOCK) * BLOCK)
    padded[:rows, :columns] = weight.float()
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    scales = (blocks.abs().amax((1, 3)) / E4M3_MAX).to(dtype)
    codes = (blocks / scales.float()[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX).view(padded.shape)
    return codes[:rows, :columns].contiguous().to(torch.float8_e4m3fn), scales


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", required=True, type=Path)
    for job in json.loads(parser.parse_args().jobs.read_text(encoding="utf-8")):
        export(job)


if __name__ == "__main__":
    main()
