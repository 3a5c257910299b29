"""Writes what `ckptq convert` would, without converting: a plan's headers and configs over made-up values, or over holes.

    python tests/make_quantized.py SOURCE DIR [--recipe NAME] [--sparse]

Codes repeat one block of normal values, each tensor with one at the top: right for sizes, speed and memory, worthless as a model.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from ckptq import digest
from ckptq.checkpoint import TensorSpec, read_inventory
from ckptq.exporters import find_exporter
from ckptq.plan import Encode, Op, Plan, Scale, ShardSpec
from ckptq.planner import build_plan
from ckptq.recipe import load_recipe
from ckptq.scopes import find_scope
from ckptq.writer import TensorFile

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]
BLOCK = 1 << 24
"""Values in the block that all tensors repeat."""


def make_quantized(source: Path, folder: Path, *settings: str, sparse: bool = False, name: str = "demo") -> Path:
    """What a shipped recipe makes of the checkpoint in `source`, with digests in ckptq.json unless `sparse`. Returns `folder`."""
    main = read_inventory(source).main
    recipe = load_recipe(name, settings, model=str(source))
    plan = build_plan(recipe, main, find_scope(main.config), find_exporter(recipe.export.format))
    folder.mkdir(parents=True)
    for name in plan.sidecars:
        shutil.copyfile(source / name, folder / name)
    for name, text in plan.files.items():
        (folder / name).write_text(text, encoding="utf-8")
    if sparse:
        for shard in plan.shards:
            write_hole(folder / shard.file, shard)
        return folder
    (folder / "ckptq.json").write_text(json.dumps({"digests": _fill(folder, plan)}), encoding="utf-8")
    return folder


def write_hole(path: Path, shard: ShardSpec) -> None:
    """A weight file of which the header alone takes room on the disk. It reads as zeros."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for spec in (spec for op in shard.ops for spec in op.outputs):
        begin = shard.offsets[spec.name]
        header[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [begin, begin + spec.nbytes]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + shard.data_bytes)


def _fill(folder: Path, plan: Plan) -> dict[str, Mapping[str, str]]:
    blocks = _blocks()
    found: dict[str, str] = {}
    for shard in plan.shards:
        with TensorFile(folder / shard.file, [spec for op in shard.ops for spec in op.outputs], shard.offsets) as file:
            for kind, spec in ((_kind(op, spec), spec) for op in shard.ops for spec in op.outputs):
                (first, block), size = blocks[kind], spec.nbytes
                file.write(spec.name, 0, memoryview(first))
                for at in range(len(first), size, len(block)):
                    file.write(spec.name, at, memoryview(block[: min(len(block), size - at)]))
            file.finish()
        found |= digest.of_shard(folder / shard.file)
    files = digest.recorded([*plan.sidecars, *plan.files])
    return {"tensors": found, "files": digest.of_files(folder, files)}


def _kind(op: Op, spec: TensorSpec) -> str:
    if isinstance(op, Scale) and op.inverse:
        return "divisor"
    return f"{spec.dtype} scale" if isinstance(op, Encode) and op.local is spec and spec.dtype != "F32" else spec.dtype


def _blocks() -> dict[str, tuple[Bytes, Bytes]]:
    """{what is stored: (a tensor's first byte where that must be one, the bytes that follow)}."""
    values = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))
    fp4 = torch.bucketize(values.abs().mul(2), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])).to(torch.uint8)
    fp4 += torch.signbit(values).to(torch.uint8) * 8
    tensors = {
        "F8_E4M3": (0x7E, values.mul(448 / 6).to(torch.float8_e4m3fn)),
        "I8": (0x7F, values.mul(30).clamp(-127, 127).to(torch.int8)),
        "U8": (0x77, fp4[::2] | fp4[1::2] << 4),
        "F8_E4M3 scale": (0x7E, values.abs().mul(60).clamp(1, 448).to(torch.float8_e4m3fn)),
        "U8 scale": (118, values.abs().neg().clamp(-9).add(118).to(torch.uint8)),
        "BF16": (None, values.mul(0.02).bfloat16()),
        "F32": (None, torch.full((BLOCK // 4,), 2e-4)),
        "divisor": (None, torch.full((4,), 1e4)),
    }
    return {
        kind: (np.array([] if first is None else [first], np.uint8), t.view(torch.uint8).numpy())
        for kind, (first, t) in tensors.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--sparse", action="store_true")
    given = parser.parse_args()
    make_quantized(given.source, given.folder, sparse=given.sparse, name=given.recipe)
