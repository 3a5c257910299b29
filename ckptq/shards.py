"""Lays the planned tensors out in files: which file, which offset, and the index of it all. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from types import MappingProxyType

from ckptq.plan import Op, ShardSpec


def fill_files(units: Sequence[tuple[Op, ...]], limit: int, stem: str = "model") -> Iterator[ShardSpec]:
    """Fills files called `stem` in order up to `limit` data bytes; a unit larger than that gets a file of its own."""
    files: list[list[Op]] = [[]]
    size = 0
    for unit in units:
        nbytes = sum(spec.nbytes for op in unit for spec in op.outputs)
        if files[-1] and size + nbytes > limit:
            files.append([])
            size = 0
        files[-1] += unit
        size += nbytes
    for i, ops in enumerate(files, 1):
        file = f"{stem}.safetensors" if len(files) == 1 else f"{stem}-{i:05}-of-{len(files):05}.safetensors"
        yield _lay_out(file, ops)


def _lay_out(file: str, ops: Sequence[Op]) -> ShardSpec:
    """Wide dtypes first, so that every tensor is aligned to its own size whatever stands before it."""
    specs = sorted((spec for op in ops for spec in op.outputs), key=lambda s: -(s.nbytes // s.numel if s.numel else 1))
    offsets, at = {}, 0
    for spec in specs:
        if spec.name in offsets:
            raise AssertionError(f"{spec.name} is planned twice")
        offsets[spec.name] = at
        at += spec.nbytes
    return ShardSpec(file, tuple(ops), MappingProxyType(offsets), at)


def index_text(shards: Sequence[ShardSpec]) -> str:
    """The index: `model.safetensors.index.json`, or of another stem."""
    weight_map = {spec.name: shard.file for shard in shards for op in shard.ops for spec in op.outputs}
    total = sum(shard.data_bytes for shard in shards)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"
