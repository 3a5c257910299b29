"""The two passes over the weights: the amax of every group, then codes, scales and copies into the output's files.

Both stream through buffers of fixed size, so no tensor is ever whole in memory (a 72B model's gate and up are 969 MB).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from ckptq.checkpoint import FLOATS, Component, Reader, SourceTensor
from ckptq.console import Advance
from ckptq.errors import DataError
from ckptq.numerics import Desk, find_numerics, fp8
from ckptq.plan import Copy, Encode, Observer, Plan, Scale, ShardSpec
from ckptq.tensors import TORCH_DTYPES, raw
from ckptq.writer import TensorFile

CHUNK = 1 << 20
"""Elements a buffer holds: the three of `encode` take 7 MiB together, which stays in the cache."""


class Chunks:
    """Reads a tensor piece by piece into one buffer, which each piece overwrites."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._buffer = torch.empty(CHUNK * 8, dtype=torch.uint8)
        self._view = raw(self._buffer)

    def read(self, tensor: SourceTensor) -> Iterator[tuple[int, torch.Tensor]]:
        """(byte offset in the tensor, the bytes there as uint8 [n]), up to CHUNK elements at a time."""
        nbytes = tensor.spec.nbytes
        step = CHUNK * (nbytes // tensor.spec.numel) if nbytes else 1
        for start in range(0, nbytes, step):
            count = min(step, nbytes - start)
            self._reader.read_into(tensor, start, self._view[:count])
            yield start, self._buffer[:count]


def scan_weights(component: Component, reader: Reader, plan: Plan, advance: Advance) -> dict[Observer, float]:
    """The amax of every weight the plan quantizes, after looking at every float of the source.

    Raises DataError naming the first tensor with a NaN or an infinity: it would spread through every later layer.
    """
    chunks = Chunks(reader)
    observers = {f"{o.module}.weight": o for o in plan.observers if o.kind == "weight"}
    found: dict[Observer, float] = {}
    for name, tensor in sorted(component.tensors.items(), key=lambda item: (item[1].file, item[1].offset)):
        if tensor.spec.dtype in FLOATS:
            largest = 0.0
            for _, data in chunks.read(tensor):
                piece = fp8.amax(data.view(TORCH_DTYPES[tensor.spec.dtype]))
                if not math.isfinite(piece):
                    what = "NaN" if math.isnan(piece) else "infinite"
                    raise DataError(
                        f"{name}: holds {what} values (in {tensor.file}); expected finite weights",
                        hint="the source is damaged or diverged in training; fetch it again or take another",
                    )
                largest = max(largest, piece)
            if name in observers:
                found[observers[name]] = largest
        advance(tensor.spec.nbytes)
    return found


def stored_value(scale: Scale, amax: Mapping[Observer, float]) -> float:
    """What a Scale op stores: amax / limit, or its inverse. Raises DataError for an observer that nothing reached."""
    for observer in scale.amax:
        if observer not in amax:
            raise DataError(
                f"{observer.name}: no calibration sample reached {observer.module}",
                hint="add samples that use it, or keep the module in the recipe",
            )
    value = fp8.scale(max(amax[o] for o in scale.amax), scale.limit)
    return float(1 / torch.tensor(value)) if scale.inverse else value


def multiplier(scale: Scale, amax: Mapping[Observer, float]) -> float:
    """What the server multiplies with: the stored number, or float32 1 / it."""
    value = stored_value(scale, amax)
    return float(1 / torch.tensor(value)) if scale.inverse else value


def write_shard(
    folder: Path, shard: ShardSpec, component: Component, reader: Reader, amax: Mapping[Observer, float], advance: Advance
) -> dict[str, str]:
    """One output file, complete and on the disk when this returns. Returns its tensors' digests, by name."""
    chunks = Chunks(reader)
    desk = Desk()
    with TensorFile(folder / shard.file, [s for op in shard.ops for s in op.outputs], shard.offsets, digests=True) as file:
        for op in shard.ops:
            if isinstance(op, Scale):
                file.write(op.output.name, 0, raw(torch.tensor([stored_value(op, amax)], dtype=torch.float32)))
                continue
            source = component.tensors[op.source]
            if isinstance(op, Copy):
                for start, data in chunks.read(source):
                    file.write(op.output.name, start, raw(data))
            else:
                _encode(op, source, reader, amax, file, desk)
            advance(source.spec.nbytes)
        return file.finish()


def _encode(op: Encode, source: SourceTensor, reader: Reader, amax: Mapping[Observer, float], file: TensorFile, desk: Desk) -> None:
    n, k = source.spec.shape
    rows = op.scheme.rows or 1
    band = max(rows, CHUNK // k // rows * rows)
    numerics = find_numerics(op.scheme)
    whole = multiplier(op.whole, amax) if op.whole else None
    size = source.spec.nbytes // (n * k)
    buffer = torch.empty(band * k * size, dtype=torch.uint8)
    for top in range(0, n, band):
        count = min(band, n - top)
        piece = buffer[: count * k * size]
        reader.read_into(source, top * k * size, raw(piece))
        codes = torch.empty(op.scheme.codes_spec("", (count, k)).shape, dtype=TORCH_DTYPES[op.codes.dtype])
        shape = op.scheme.scale_shape((count, k))
        scales = torch.empty(shape, dtype=TORCH_DTYPES[op.local.dtype]) if op.local else None
        numerics.encode(piece.view(TORCH_DTYPES[source.spec.dtype]).view(count, k), op.scheme, whole, codes, scales, desk)
        file.write(op.codes.name, top * k // op.scheme.packed * codes.element_size(), raw(codes))
        if op.local and scales is not None:
            file.write(op.local.name, top // rows * shape[1] * scales.element_size(), raw(scales))
