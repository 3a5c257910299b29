"""Weights of a trained model in every format that a peer has too: equal, or nearer to the source, as the server holds them.

ModelOpt 0.47.0 and llm-compressor 0.14.0.1 quantize the same tensors by their own code (tests/peers/quantized_weights.py). What is
compared is what vLLM 0.32.0 computes with after the load, in float64: code * scale, where per-tensor FP8 shards of a fused linear
are first brought under the largest of their scales. Run with -s for a table.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ckptq.numerics import Desk, find_numerics, fp8
from ckptq.schemes import SCHEMES, Scheme
from ckptq.tensors import TORCH_DTYPES

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-qwen2.5-vl"
SCRIPT = Path(__file__).parent / "peers" / "quantized_weights.py"
LAYERS = (3,)
FUSED = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))
SINGLE = (("self_attn.o_proj",), ("mlp.down_proj",))
GROUPS = tuple(tuple(f"model.layers.{i}.{shard}" for shard in group) for i in LAYERS for group in (*FUSED, *SINGLE))
E2M1 = torch.tensor([s * v for s in (1, -1) for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)], dtype=torch.float64)

CASES = [
    ("modelopt", "fp8", "fp8"),
    ("modelopt", "fp8_per_channel_per_token", "fp8-dynamic"),
    ("modelopt", "fp8_pb_wo", "fp8-block"),
    ("modelopt", "nvfp4", "nvfp4"),
    ("modelopt", "w4a16_nvfp4", "nvfp4a16"),
    ("modelopt", "mxfp8", "mxfp8"),
    ("llm-compressor", "FP8", "fp8"),
    ("llm-compressor", "FP8_DYNAMIC", "fp8-dynamic"),
    ("llm-compressor", "FP8_BLOCK", "fp8-block"),
    ("llm-compressor", "INT8", "int8"),
    ("llm-compressor", "NVFP4A16", "nvfp4a16"),
    ("llm-compressor", "MXFP8", "mxfp8"),
    ("llm-compressor", "MXFP4", "mxfp4"),
]


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """{module: weight BF16 [n, k]} of a layer."""
    files = json.loads((EXAMPLE / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    found = {}
    for module in (module for group in GROUPS for module in group):
        with safe_open(EXAMPLE / files[f"{module}.weight"], "pt") as file:
            found[module] = file.get_tensor(f"{module}.weight")
    return found


@pytest.fixture(scope="module")
def peers(weights: Mapping[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a folder for each peer, with a file for each format."""
    folder = tmp_path_factory.mktemp("peers")
    save_file({f"{module}.weight": weight for module, weight in weights.items()}, folder / "weights.safetensors")
    for peer in ("modelopt", "llm-compressor"):
        (folder / peer).mkdir()
        command = [sys.executable, str(SCRIPT), peer, str(folder / "weights.safetensors"), str(folder / peer)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
    return folder


Held = dict[str, torch.Tensor]
"""{module: what the server multiplies activations with, float64 [n, k]}."""


def held(tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> Held:
    """What the server makes of one group's stored tensors, whichever format's names they have.

    vLLM 0.32.0 model_executor/layers/quantization: modelopt.py; compressed_tensors/schemes, where global scales divide.
    """
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in tensors))
    codes = {m: tensors.get(f"{m}.weight_packed", tensors.get(f"{m}.weight")) for m in modules}
    scales = {m: tensors[f"{m}.weight_scale"] for m in modules}
    if scheme.name == "fp8":
        return requantized({m: codes[m] for m in modules}, {m: scales[m].float().reshape(1) for m in modules})
    found = {}
    for m in modules:
        whole = 1.0
        if f"{m}.weight_scale_2" in tensors:
            whole = max(float(tensors[f"{other}.weight_scale_2"]) for other in modules)
        elif f"{m}.weight_global_scale" in tensors:
            whole = 1 / max(float(tensors[f"{other}.weight_global_scale"]) for other in modules)
        numbers = E2M1[nibbles(codes[m])] if scheme.packed == 2 else codes[m].float().double()
        n, k = numbers.shape
        down, across = scheme.scale_shape((n, k))
        local = scales[m].reshape(down, across)
        multipliers = torch.exp2(local.double() - 127) if scheme.scale == "U8" else local.float().double()
        wide = multipliers.repeat_interleave(scheme.rows or n, 0)[:n].repeat_interleave(scheme.columns or k, 1)[:, :k]
        found[m] = numbers * wide * whole
    return found


def nibbles(codes: torch.Tensor) -> torch.Tensor:
    return torch.stack([codes & 15, codes >> 4], -1).flatten(1).long()


def requantized(codes: Mapping[str, torch.Tensor], scales: Mapping[str, torch.Tensor]) -> Held:
    """vLLM 0.32.0 quantization/utils/w8a8_utils.py requantize_with_max_scale, float16 between the two included."""
    largest = torch.stack(list(scales.values())).max()
    found = {}
    for m in codes:
        between = codes[m].to(torch.float16) * scales[m][0]
        again = (between.float() * (1 / largest)).clamp(-448, 448).to(torch.float8_e4m3fn)
        found[m] = again.double() * largest.double()
    return found


def ours(group: tuple[str, ...], weights: Mapping[str, torch.Tensor], scheme: Scheme, *, inverse: bool) -> dict[str, torch.Tensor]:
    """One group's tensors by ckptq, under ModelOpt's names or, where the global scale is the inverse, compressed-tensors'."""
    stored = {}
    desk = Desk()
    for module in group:
        weight = weights[module]
        whole = None
        if scheme.limit is not None:
            whole = fp8.scale(max(fp8.amax(weights[m]) for m in group), scheme.limit)
            name = "weight_scale" if scheme.scale is None else "weight_global_scale" if inverse else "weight_scale_2"
            divided = torch.tensor([whole]).reciprocal()
            stored[f"{module}.{name}"] = divided if name == "weight_global_scale" else torch.tensor([whole])
            whole = float(divided.reciprocal()) if name == "weight_global_scale" else whole
        spec = scheme.codes_spec("", tuple(weight.shape))
        codes = torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype])
        scales = torch.empty(scheme.scale_shape(tuple(weight.shape)), dtype=TORCH_DTYPES[scheme.scale]) if scheme.scale else None
        find_numerics(scheme).encode(weight, scheme, whole, codes, scales, desk)
        stored[f"{module}.weight"] = codes
        if scales is not None:
            stored[f"{module}.weight_scale"] = scales
    return stored


@pytest.mark.parametrize(("peer", "format", "name"), CASES)
def test_equal_or_nearer_to_the_source(peer: str, format: str, name: str, weights: Mapping[str, torch.Tensor], peers: Path) -> None:
    scheme = SCHEMES[name]
    theirs = load_file(peers / peer / f"{format}.safetensors")
    rows = []
    for group in GROUPS:
        mine = held(ours(group, weights, scheme, inverse=peer == "llm-compressor"), scheme)
        other = held({n: t for n, t in theirs.items() if n.rpartition(".")[0] in group}, scheme)
        for module in group:
            source = weights[module].double()
            error, their_error = (float(((values[module] - source) ** 2).sum()) for values in (mine, other))
            rows.append((module, torch.equal(mine[module], other[module]), error, their_error))
    print(f"\nckptq {name} / {peer} {format}: squared errors to the source")
    for module, equal, error, their_error in rows:
        ratio = "equal" if equal else f"{error / their_error:.4f}"
        print(f"  {module.removeprefix('model.'):28} {error:10.3e} {their_error:10.3e}  {ratio}")
    assert len(rows) == len(weights)
    assert [row for row in rows if not row[1] and row[2] > row[3]] == []
