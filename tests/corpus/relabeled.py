"""Exports of vLLM's own `fp8` method and of AMD Quark, which no exporter at hand writes: a few lines of torch.

    python -m corpus.relabeled --jobs JOBS.json

JOBS.json: `[{"source": DIR, "output": DIR, "format": "static" | "dynamic" | "block" | "channel", "ignored": KEY, ...}, ...]`.
`ignored` is the key of config.json under which the linears that stay as they are are listed; of the fp8 method the server reads
two, and Quark's is `exclude`. A static export and one by channel have `scales`, the folder of a ModelOpt export of the same source,
and take codes and scales from it: the tensors are the same (vLLM 0.32.0 model_executor/layers/quantization/fp8.py
Fp8LinearMethod.create_weights, quark/schemes/quark_w8a8_fp8.py QuarkW8A8Fp8.create_weights). `scale_dtype` is that of a block's
scale, `shards` the number of files.
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
SPEC: Mapping[str, Any] = {
    "dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False, "symmetric": True, "ch_axis": None, "group_size": None,
    "scale_type": "float", "round_method": "half_even",
}  # fmt: skip
"""Quark's settings of one kind of tensors."""
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
            keys = (name, f"{module}.weight_scale", f"{module}.input_scale")
            tensors |= {key: encoded[key] for key in keys if key in encoded}
        elif job["format"] == "block":
            tensors[name], tensors[f"{module}.weight_scale_inv"] = block_codes(tensor, getattr(torch, job["scale_dtype"]))
        else:
            tensors[name], tensors[f"{module}.weight_scale"] = tensor_codes(tensor)
    save(tensors, output, job["shards"])
    section = quark_section(job["format"]) if job["method"] == "quark" else native_section(job["format"])
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    write_json(output / "config.json", {**config, "quantization_config": {**section, job["ignored"]: sorted(kept)}})
    for file in source.iterdir():
        if ".safetensors" not in file.name and file.name != "config.json":
            shutil.copyfile(file, output / file.name)


def native_section(format: str) -> dict[str, Any]:
    section = {"quant_method": "fp8", "activation_scheme": "static" if format == "static" else "dynamic"}
    return section | ({"fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]} if format == "block" else {})


def quark_section(format: str) -> dict[str, Any]:
    """Without KV scales: their settings would be in layer_quant_config."""
    by_row = format == "channel"
    weight = {**SPEC, "qscheme": "per_channel", "ch_axis": 0} if by_row else SPEC
    inputs = {**SPEC, "qscheme": "per_channel", "ch_axis": 1, "is_dynamic": True} if by_row else SPEC
    return {
        "quant_method": "quark", "quant_mode": "eager_mode", "version": "0.9", "algo_config": None,
        "export": {"kv_cache_group": [], "pack_method": "reorder", "weight_format": "real_quantized"},
        "global_quant_config": {"weight": weight, "input_tensors": inputs, "output_tensors": None, "bias": None,
                                "target_device": None},
        "layer_quant_config": {}, "layer_type_quant_config": {},
    }  # fmt: skip


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
