"""Writes what `ckptq convert` would, without converting: a plan's headers and configs over made-up values, or over holes.

    python tests/make_quantized.py SOURCE DIR [--sparse]

Codes repeat one block of normal values, each tensor with one at 448: right for sizes, speed and memory, worthless as a model.
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
from ckptq.checkpoint import read_inventory
from ckptq.exporters import find_exporter
from ckptq.plan import Plan, ShardSpec
from ckptq.planner import build_plan
from ckptq.recipe import load_recipe
from ckptq.scopes import find_scope
from ckptq.writer import TensorFile

BLOCK = 1 << 24
"""Values in the block that all tensors repeat."""


def make_quantized(source: Path, folder: Path, *settings: str, sparse: bool = False) -> Path:
    """The demo recipe's output for the checkpoint in `source`, with digests in ckptq.json unless `sparse`. Returns `folder`."""
    main = read_inventory(source).main
    recipe = load_recipe("demo", settings, model=str(source))
    plan = build_plan(recipe, main, find_scope(main.config), find_exporter("modelopt"))
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
    values = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))
    codes = values.mul(448 / 6).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    blocks = {"F8_E4M3": codes, "BF16": values.mul(0.02).bfloat16().view(torch.uint8).numpy()}
    blocks["F32"] = np.full(BLOCK // 4, 2e-4, np.float32).view(np.uint8)
    found: dict[str, str] = {}
    for shard in plan.shards:
        with TensorFile(folder / shard.file, [spec for op in shard.ops for spec in op.outputs], shard.offsets) as file:
            for spec in (spec for op in shard.ops for spec in op.outputs):
                block, size = blocks[spec.dtype], spec.nbytes
                first = np.full(int(spec.dtype == "F8_E4M3"), 0x7E, np.uint8)
                file.write(spec.name, 0, memoryview(first))
                for at in range(len(first), size, len(block)):
                    file.write(spec.name, at, memoryview(block[: min(len(block), size - at)]))
            file.finish()
        found |= digest.of_shard(folder / shard.file)
    files = digest.recorded([*plan.sidecars, *plan.files])
    return {"tensors": found, "files": digest.of_files(folder, files)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sparse", action="store_true")
    given = parser.parse_args()
    make_quantized(given.source, given.folder, sparse=given.sparse)
