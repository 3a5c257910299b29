"""Writes FP8 checkpoints in the forms that are published, from a BF16 one, and says what their codes stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ckptq.checkpoint import INDEX, TensorSpec
from ckptq.config_text import insert_section
from ckptq.tensors import SAFETENSORS_DTYPES, raw
from ckptq.writer import TensorFile

Tensors = dict[str, torch.Tensor]
SINGLE = "model.safetensors"
OTHER = "hf_quant_config.json"


@dataclass(frozen=True, slots=True)
class Form:
    """How a weight is stored.

    leaf        what the scale's name ends with
    high, wide  rows and columns under one scale; None for all
    shape       from a grid of scales to what is stored
    static      with scales of inputs, K and V
    file        a further file that says that it is quantized
    """

    section: Mapping[str, Any]
    leaf: str = "weight_scale"
    high: int | None = None
    wide: int | None = None
    shape: Callable[[torch.Tensor], torch.Tensor] = lambda scale: scale
    dtype: torch.dtype = torch.float32
    static: bool = False
    file: str = ""


def _groups(strategy: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": strategy, **more}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}, "ignore": []}


FORMS = MappingProxyType(
    {
        "native block": Form({"quant_method": "fp8", "weight_block_size": [128, 128]}, "weight_scale_inv", 128, 128),
        "native block 64 x 96": Form({"quant_method": "fp8", "weight_block_size": [64, 96]}, "weight_scale_inv", 64, 96),
        "native tensor": Form({"quant_method": "fp8"}, shape=lambda s: s.view(()), static=True),
        "modelopt": Form(
            {"quant_method": "modelopt", "quant_algo": "FP8"}, shape=lambda s: s.view(()), static=True, file=OTHER
        ),
        "modelopt channel": Form(
            {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, high=1, shape=lambda s: s.view(-1)
        ),
        "modelopt block": Form(
            {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}, high=128, wide=128, shape=lambda s: s[:, None, :, None]
        ),
        "compressed tensor": Form(_groups("tensor"), shape=lambda s: s.view(1), dtype=torch.bfloat16, static=True),
        "compressed channel": Form(_groups("channel"), high=1, dtype=torch.bfloat16),
        "compressed block": Form(_groups("block", block_structure=[128, 128]), high=128, wide=128, dtype=torch.bfloat16),
    }
)  # fmt: skip


def read(folder: Path) -> Tensors:
    """All tensors of a checkpoint."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def is_coded(name: str) -> bool:
    """Which weights these checkpoints have in FP8: the linears of the layers, and the output head."""
    return name == "lm_head.weight" or (".layers." in name and name.endswith("_proj.weight"))


def encoded(weight: torch.Tensor, form: Form) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scales as a grid [rows / high, columns / wide]): the scale is stored first, then codes are taken under it."""
    n, k = weight.shape
    high, wide = form.high or n, form.wide or k
    padded = torch.zeros(-(-n // high) * high, -(-k // wide) * wide)
    padded[:n, :k] = weight.float()
    amax = padded.view(padded.shape[0] // high, high, -1, wide).abs().amax((1, 3))
    scale = (amax / 448).clamp(min=1e-12).to(form.dtype)
    codes = (weight.float() / spread(scale, high, wide, weight.shape)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, scale


def spread(scale: torch.Tensor, high: int, wide: int, shape: torch.Size) -> torch.Tensor:
    """The grid's values over the weight, F32."""
    return scale.float().repeat_interleave(high, 0)[: shape[0]].repeat_interleave(wide, 1)[:, : shape[1]]


def make_fp8(source: Path, folder: Path, form: Form) -> tuple[Path, Tensors]:
    """(an FP8 checkpoint in one file in `folder`, its dequantized weights: float32 code * scale, rounded once)."""
    folder.mkdir(parents=True)
    copy_others(source, folder)
    tensors, stands_for = read(source), {}
    for name in [name for name in tensors if is_coded(name)]:
        base, weight = name.removesuffix("weight"), tensors[name]
        codes, scale = encoded(weight, form)
        wide = spread(scale, form.high or len(codes), form.wide or codes.shape[1], codes.shape)
        stands_for[name] = (codes.float() * wide).bfloat16()
        tensors |= {name: codes, base + form.leaf: form.shape(scale).contiguous()}
        if form.static:
            tensors[f"{base}input_scale"] = torch.tensor(0.5)
        if form.static and name.endswith(("k_proj.weight", "v_proj.weight")):
            tensors[f"{base}{name.split('.')[-2][0]}_scale"] = torch.tensor(0.25)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    text = (source / "config.json").read_text()
    (folder / "config.json").write_text(insert_section(text, "quantization_config", form.section))
    if form.file:
        (folder / form.file).write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": dict(form.section)}))
    return folder, stands_for


def copy_others(source: Path, folder: Path) -> None:
    """Everything but weights and their index."""
    for path in source.iterdir():
        if path.suffix != ".safetensors" and path.name != INDEX:
            shutil.copyfile(path, folder / path.name)


def write_dense(source: Path, folder: Path, order: list[str], stands_for: Tensors, fp8: Path) -> Path:
    """The BF16 checkpoint that the FP8 one stands for, its tensors in `order`."""
    folder.mkdir(parents=True)
    copy_others(source, folder)
    stored = read(fp8)
    offsets, at, specs = {}, 0, []
    for name in order:
        tensor = stands_for.get(name, stored[name])
        specs.append(TensorSpec(name, SAFETENSORS_DTYPES[tensor.dtype], tuple(tensor.shape)))
        offsets[name] = at
        at += specs[-1].nbytes
    with TensorFile(folder / SINGLE, specs, offsets) as file:
        for name in order:
            file.write(name, 0, raw(stands_for.get(name, stored[name]).contiguous()))
        file.finish()
    return folder
