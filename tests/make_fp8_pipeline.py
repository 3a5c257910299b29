"""Quantizes a component of a pipeline's folder by hand, as a peer of ckptq that knows no server would: names as they are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

MODELOPT: Mapping[str, Any] = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": [], "producer": {"name": "modelopt"}}
LIMIT = torch.finfo(torch.float8_e4m3fn).max

Tensors = dict[str, torch.Tensor]


def per_tensor(name: str, weight: torch.Tensor) -> Tensors:
    """{name}.weight FP8, .weight_scale and .input_scale F32 scalars."""
    scale = weight.float().abs().max() / LIMIT
    codes = (weight.float() / scale).clamp(-LIMIT, LIMIT).to(torch.float8_e4m3fn)
    return {f"{name}.weight": codes, f"{name}.weight_scale": scale, f"{name}.input_scale": torch.tensor(0.02)}


def per_channel(name: str, weight: torch.Tensor) -> Tensors:
    """{name}.weight FP8, .weight_scale F32 [out]; activations a token, with no scale on disk."""
    scale = weight.float().abs().amax(1) / LIMIT
    return {f"{name}.weight": (weight.float() / scale[:, None]).to(torch.float8_e4m3fn), f"{name}.weight_scale": scale}


def int8(name: str, weight: torch.Tensor) -> Tensors:
    """{name}.weight I8, .weight_scale F32 [out, 1]."""
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    return {f"{name}.weight": (weight.float() / scale).round().to(torch.int8), f"{name}.weight_scale": scale}


def int8_of_one_scale(name: str, weight: torch.Tensor) -> Tensors:
    """The same with one scale for all rows, and for all linears."""
    codes = (weight.float() / 0.01).round().clamp(-127, 127).to(torch.int8)
    return {f"{name}.weight": codes, f"{name}.weight_scale": torch.full((len(weight), 1), 0.01)}


def quantize(
    folder: Path,
    linears: str,
    config: Mapping[str, Any],
    scheme: Callable[[str, torch.Tensor], Tensors] = per_tensor,
    rename: Callable[[str], str] = lambda name: name,
) -> list[str]:
    """In place, every linear of the component that the regular expression `linears` matches whole; their written names."""
    path = max(folder.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    done: list[str] = []
    out: Tensors = {}
    for name, tensor in load_file(path).items():
        linear = name.removesuffix(".weight")
        if name.endswith(".weight") and tensor.dim() == 2 and re.fullmatch(linears, linear):
            done.append(rename(linear))
            out |= scheme(rename(linear), tensor)
        else:
            out[f"{rename(name.rpartition('.')[0])}.{name.rpartition('.')[2]}" if "." in name else name] = tensor
    save_file(out, path, metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": dict(config)}, indent=2))
    return done
