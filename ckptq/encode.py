"""What one worker does with a piece of a tensor: its amax, its codes and scales, or a copy of it.

Pieces stream through a bench's buffers of fixed size, so no tensor is ever whole in memory (a 72B model's gate and up are 969 MB).
Every float is looked at on its way: a NaN or an infinity would spread through every later layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from ckptq import digest
from ckptq.checkpoint import FLOATS, Reader, SourceTensor, TensorSpec
from ckptq.errors import DataError
from ckptq.numerics import Desk, find_numerics, fp8
from ckptq.plan import Encode, Observer, Scale
from ckptq.tensors import TORCH_DTYPES, raw
from ckptq.writer import BLOCK, TensorFile

BAND = 1 << 20
"""Values a worker has in hand: with what becomes of them they stay in the processor's cache, and Python's share is small."""
GPU_BAND, GPU_WORKERS = 1 << 21, 6
"""On a GPU, for less than 2 GB of its memory: NVFP4, which has the most intermediate values, took 0.29 GB a worker on an H200."""


class Bench:
    """One worker's buffers, and on a GPU a stream of its own, so that one copies while another computes.

    Values are read into host memory and computed with on `device`; on a CPU these are the same memory, on a GPU the host's is
    pinned.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.desk = Desk(device)
        self.on_gpu = device.type == "cuda"
        self.band = GPU_BAND if self.on_gpu else BAND
        self._stream = torch.cuda.Stream(device) if self.on_gpu else None  # type: ignore[no-untyped-call]
        self._held: dict[str, torch.Tensor] = {}

    def at_work(self) -> AbstractContextManager[object]:
        """What is computed in this context is computed on the bench's stream."""
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()

    def read(self, reader: Reader, tensor: SourceTensor, start: int, nbytes: int) -> memoryview:
        """The tensor's bytes from `start` on, on the host. They stay until the next read."""
        view = raw(self._buffer("read", nbytes, host=True))
        reader.read_into(tensor, start, view)
        return view

    def load(self, reader: Reader, tensor: SourceTensor, start: int, count: int) -> torch.Tensor:
        """`count` values from the one numbered `start` on, flat, on the device, in the dtype that is stored."""
        dtype = TORCH_DTYPES[tensor.spec.dtype]
        nbytes = count * dtype.itemsize
        self.read(reader, tensor, start * dtype.itemsize, nbytes)
        values = self._buffer("values" if self.on_gpu else "read", nbytes)
        if self.on_gpu:
            values.copy_(self._buffer("read", nbytes, host=True), non_blocking=True)
        return values.view(dtype)

    def blank(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor on the device to be filled; the same memory whenever `name` is the same."""
        return self._buffer(name, shape[0] * shape[1] * dtype.itemsize).view(dtype).view(shape)

    def fetch(self, name: str, result: torch.Tensor) -> memoryview:
        """The bytes of what was computed, once it is."""
        if self._stream is None:
            return raw(result)
        host = self._buffer(f"{name} on the host", result.nbytes, host=True)
        host.copy_(result.reshape(-1).view(torch.uint8), non_blocking=True)
        self._stream.synchronize()
        return raw(host)

    def _buffer(self, name: str, nbytes: int, *, host: bool = False) -> torch.Tensor:
        held = self._held.get(name)
        if held is None or held.numel() < nbytes:
            pinned, device = (self.on_gpu, "cpu") if host else (False, self.device)
            held = self._held[name] = torch.empty(nbytes, dtype=torch.uint8, device=device, pin_memory=pinned)
        return held[:nbytes]


def refuse_odd(name: str, file: str, amax: float) -> None:
    """Raises DataError for the amax of values that are not all finite."""
    if not math.isfinite(amax):
        raise DataError(
            f"{name}: holds {'NaN' if math.isnan(amax) else 'infinite'} values (in {file}); expected finite weights",
            hint="the source is damaged or diverged in training; fetch it again or take another",
        )


def measure(source: SourceTensor, reader: Reader, values: range, bench: Bench) -> float:
    """The amax of these values of a tensor. Raises DataError naming it where one is NaN or infinite."""
    largest = 0.0
    with bench.at_work():
        for at in range(values.start, values.stop, bench.band):
            piece = fp8.amax(bench.load(reader, source, at, min(bench.band, values.stop - at)))
            refuse_odd(source.spec.name, source.file, piece)
            largest = max(largest, piece)
    return largest


def copy(source: SourceTensor, output: str, reader: Reader, file: TensorFile, part: range, bench: Bench) -> bytes:
    """Copies these bytes of a tensor. Returns their digest, taken of what the source holds."""
    total = digest.hasher(source.spec.dtype)
    dtype = TORCH_DTYPES[source.spec.dtype] if source.spec.dtype in FLOATS else None
    for at in range(part.start, part.stop, BLOCK):
        data = bench.read(reader, source, at, min(BLOCK, part.stop - at))
        total.update(data)
        if dtype is not None:
            refuse_odd(source.spec.name, source.file, fp8.amax(torch.frombuffer(data, dtype=dtype)))
        if not source.as_stored:  # no file holds these bytes
            file.write(output, at, data)
    if source.as_stored:
        fd, offset = reader.place(source)
        file.copy(output, part.start, fd, offset + part.start, len(part))
    return total.digest()


@dataclass(frozen=True, slots=True)
class Encoded:
    """What came of a part of a weight: the digest of its codes, and the bytes of the local scales of rows that begin in it."""

    digest: bytes
    scales: bytes


def encode(
    op: Encode, source: SourceTensor, reader: Reader, whole: float | None, file: TensorFile, part: range, bench: Bench
) -> Encoded:
    """Writes these bytes of the codes. Rows that lie across an end of the part are encoded for both parts."""
    row = op.codes.nbytes // source.spec.shape[0]
    total, scales = digest.hasher(op.codes.dtype), bytearray()
    with bench.at_work():
        for band in _bands(op, source, part, bench.band):
            codes, local = _encode_band(op, source, reader, whole, band, bench)
            if local is not None:
                scales += _owned(bench.fetch("scales", local), band, row, op.scheme.rows or 1, part)
            start, stop = max(part.start, band.start * row), min(part.stop, band.stop * row)
            data = bench.fetch("codes", codes)[start - band.start * row : stop - band.start * row]
            total.update(data)
            file.write(op.codes.name, start, data)
    return Encoded(total.digest(), bytes(scales))


def _bands(op: Encode, source: SourceTensor, part: range, values: int) -> Iterator[range]:
    """The rows that have codes in the part, as many at a time as `values` are in hand; whole groups of rows that share scales."""
    n, k = _matrix(source.spec)
    high, row = op.scheme.rows or 1, op.codes.nbytes // n
    step = max(values // k // high, 1) * high
    end = min(-(-part.stop // (row * high)) * high, n)
    for top in range(part.start // (row * high) * high, end, step):
        yield range(top, min(top + step, end))


def _encode_band(
    op: Encode, source: SourceTensor, reader: Reader, whole: float | None, band: range, bench: Bench
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(codes, local scales) of these rows, on the device."""
    scheme, shape = op.scheme, (len(band), _matrix(source.spec)[1])
    values = bench.load(reader, source, band.start * shape[1], shape[0] * shape[1]).view(shape)
    codes = bench.blank("codes", (shape[0], shape[1] // scheme.packed), TORCH_DTYPES[op.codes.dtype])
    scales = bench.blank("scales", scheme.scale_shape(shape), TORCH_DTYPES[op.local.dtype]) if op.local else None
    find_numerics(scheme).encode(values, scheme, whole, codes, scales, bench.desk)
    if scales is not None:  # under F32 scales of their own, odd values make odd scales; others can't hold them
        refuse_odd(source.spec.name, source.file, fp8.amax(scales if scheme.scale == "F32" else values))
    return codes, scales


def _matrix(spec: TensorSpec) -> tuple[int, int]:
    """[n, k] of a weight [n, ...]: a convolution's kernels, one for each output channel, are its rows."""
    return spec.shape[0], spec.numel // spec.shape[0]


def _owned(scales: memoryview, band: range, row: int, high: int, part: range) -> memoryview:
    """Of the scales of a band, those of the groups of `high` rows that begin in the part."""
    groups = -(-len(band) // high)
    width = len(scales) // groups
    first, last = (-(-max(edge - band.start * row, 0) // (row * high)) for edge in (part.start, part.stop))
    return scales[first * width : min(last, groups) * width]


def stored_value(scale: Scale, amax: Mapping[Observer, float]) -> float:
    """What a Scale op stores: amax / limit, or its inverse. Raises DataError for an observer that nothing reached."""
    for observer in scale.amax:
        if observer not in amax:
            raise DataError(
                f"{observer.name}: no calibration sample reached {observer.module}",
                hint="add samples that use it, or keep the module in the recipe",
            )
    value = fp8.scale(max((amax[o] for o in scale.amax), default=0.0), scale.limit)
    return _inverse(value) if scale.inverse else value


def multiplier(scale: Scale, amax: Mapping[Observer, float]) -> float:
    """What the server multiplies with: the stored number, or float32 1 / it."""
    value = stored_value(scale, amax)
    return _inverse(value) if scale.inverse else value


def _inverse(value: float) -> float:
    """float32 1 / value; at most the largest number, so that weights below 8e-36 have a finite one too.

    The dtype is told, because transformers changes torch's default one, for all threads, while it builds the model that calibrates.
    """
    return min(float(1 / torch.tensor(value, dtype=torch.float32)), torch.finfo(torch.float32).max)


def parts(spec: TensorSpec) -> list[range]:
    """The bytes of a tensor in the pieces that its digest is made of; one empty piece where there are none."""
    return [range(at, min(at + digest.PART, spec.nbytes)) for at in range(0, spec.nbytes, digest.PART)] or [range(0)]
