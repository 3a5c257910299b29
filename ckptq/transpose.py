"""Reads matrices that lie transposed in their file, any range of bytes at a time, for `Reader`: blocks of rows, held a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ckptq.checkpoint import SourceTensor
from ckptq.tensors import TORCH_DTYPES, raw

BLOCK = 1 << 24
"""Bytes of a matrix that a thread has turned at a time, and keeps for the next read: an expert's matrix of a 235B takes 12.6 MB."""
CHUNK = 1 << 21
"""Bytes that it reads for that at a time. They lie next to one another in the file, those of columns between as well."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
ReadStored = Callable[[SourceTensor, int, memoryview], None]


@dataclass(slots=True)
class _Held:
    """The rows of a matrix from `top` on, flat bytes in `values`."""

    tensor: SourceTensor | None
    top: int
    values: torch.Tensor
    scratch: torch.Tensor


class Transposer:
    """Reads such matrices, from any thread."""

    def __init__(self, read: ReadStored) -> None:
        self._read = read
        self._local = threading.local()

    def read_into(self, tensor: SourceTensor, start: int, buffer: memoryview) -> None:
        """Fills `buffer` with bytes of the matrix [n, k], rows one behind another, from byte `start` on."""
        n, k = tensor.spec.shape
        row = k * TORCH_DTYPES[tensor.spec.dtype].itemsize
        high = min(max(BLOCK // row, 1), n)
        view, done = buffer.cast("B"), 0
        while done < len(view):
            top = (start + done) // row // high * high
            held = self._rows(tensor, top, min(high, n - top))
            first = start + done - top * row
            count = min(len(view) - done, len(held) - first)
            view[done : done + count] = held[first : first + count]
            done += count

    def _rows(self, tensor: SourceTensor, top: int, count: int) -> memoryview:
        """The bytes of `count` rows from `top` on."""
        k, dtype = tensor.spec.shape[1], _BITS[TORCH_DTYPES[tensor.spec.dtype].itemsize]
        held = self._held()
        nbytes = count * k * dtype.itemsize
        if (held.tensor, held.top) != (tensor, top):
            step = max(CHUNK // (tensor.stride * dtype.itemsize), 1)
            held.tensor = None
            held.values = _grown(held.values, nbytes)
            held.scratch = _grown(held.scratch, step * tensor.stride * dtype.itemsize)
            rows, stored = held.values[:nbytes].view(dtype).view(count, k), held.scratch.view(dtype)
            for j in range(0, k, step):
                columns = min(step, k - j)
                piece = stored[: (columns - 1) * tensor.stride + count]
                self._read(tensor, (j * tensor.stride + top) * dtype.itemsize, raw(piece))
                rows[:, j : j + columns].copy_(piece.as_strided((columns, count), (tensor.stride, 1)).T)
            held.tensor, held.top = tensor, top
        return raw(held.values[:nbytes])

    def _held(self) -> _Held:
        if not hasattr(self._local, "held"):
            self._local.held = _Held(None, 0, torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8))
        held: _Held = self._local.held
        return held


def _grown(buffer: torch.Tensor, nbytes: int) -> torch.Tensor:
    """A buffer of at least that many bytes, a multiple of 8."""
    return buffer if buffer.numel() >= nbytes else torch.empty(-(-nbytes // 8) * 8, dtype=torch.uint8)
