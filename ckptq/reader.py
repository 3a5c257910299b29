"""Bounded reads of a component's weights, and what tells one checkpoint from another."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ckptq.errors import SourceError
from ckptq.folder import open_regular, printable
from ckptq.safetensors_header import SourceTensor

if TYPE_CHECKING:
    from ckptq.checkpoint import Component
    from ckptq.dequantize import Dequantizer
    from ckptq.transpose import Transposer


def fingerprint(root: Path, component: Component) -> str:
    """SHA-256 over config.json, every header entry and 64 spots of 4 KiB in each weight file.

    Two fine-tunes of one model have equal headers and sizes, so bytes of the weights must count; all of them would cost a
    pass over the disk.
    """
    digest = hashlib.sha256(component.config_text.encode())
    for name, tensor in sorted(component.tensors.items()):
        digest.update(f"{name}|{tensor.spec.dtype}|{tensor.spec.shape}|{tensor.file}|{tensor.offset}\n".encode())
        if tensor.codes is not None:
            digest.update(f"{tensor.codes}\n".encode())
        if tensor.stride:
            digest.update(f"{tensor.stride}\n".encode())
        for part in tensor.parts:
            digest.update(f"{part.spec}|{part.file}|{part.offset}\n".encode())
    for file in component.weight_files:
        fd = _open(root / component.folder / file)
        try:
            size = os.fstat(fd).st_size
            for spot in range(64):
                digest.update(os.pread(fd, 4096, size * spot // 64))
        finally:
            os.close(fd)
    return digest.hexdigest()


def _open(path: Path) -> int:
    try:
        return open_regular(path)
    except OSError as error:
        hint = "raise the limit of open files: `ulimit -n 8192`" if error.errno == errno.EMFILE else None
        raise SourceError(f"{printable(path.name)}: can't be read: {error.strerror}", hint=hint) from error


class Reader:
    """Bounded reads from a component's weight files, from any thread. Holds one descriptor a file; use it as a context."""

    def __init__(self, root: Path, component: Component) -> None:
        self._files: dict[str, int] = {}
        self._dequantizer: Dequantizer | None = None
        self._transposer: Transposer | None = None
        if component.dequantized:
            from ckptq.dequantize import Dequantizer  # which imports torch

            self._dequantizer = Dequantizer(self.read_stored)
        if any(part.stride for tensor in component.tensors.values() for part in (tensor, *tensor.parts)):
            from ckptq.transpose import Transposer

            self._transposer = Transposer(self.read_stored)
        try:
            for file in component.weight_files:
                self._files[file] = _open(root / component.folder / file)
        except SourceError:
            self.close()
            raise

    def read_into(self, tensor: SourceTensor, start: int, buffer: memoryview) -> None:
        """Fills `buffer` with the tensor's bytes from `start` on (bytes from the tensor's own start).

        Raises SourceError for a file that ends early, DataError for scales of codes that are not finite.
        """
        if tensor.as_stored:
            self.read_stored(tensor, start, buffer)
        elif tensor.parts:
            self._read_parts(tensor, start, buffer)
        elif tensor.codes is None:
            assert self._transposer is not None
            self._transposer.read_into(tensor, start, buffer)
        else:
            assert self._dequantizer is not None
            self._dequantizer.read_into(tensor, start, buffer)

    def _read_parts(self, tensor: SourceTensor, start: int, buffer: memoryview) -> None:
        at = done = 0
        for part in tensor.parts:
            first = max(start + done - at, 0)
            if first < part.spec.nbytes and done < len(buffer):
                count = min(part.spec.nbytes - first, len(buffer) - done)
                self.read_into(part, first, buffer[done : done + count])
                done += count
            at += part.spec.nbytes

    def read_stored(self, tensor: SourceTensor, start: int, buffer: memoryview) -> None:
        """The same of the bytes that lie in the file."""
        done = 0
        while done < len(buffer):
            count = os.preadv(self._files[tensor.file], [buffer[done:]], tensor.offset + start + done)
            if count == 0:
                raise SourceError(f"{tensor.file}: ended while {printable(tensor.spec.name)} was read; was it changed meanwhile?")
            done += count

    def place(self, tensor: SourceTensor) -> tuple[int, int]:
        """(descriptor, offset) of a tensor's bytes as they are stored, for the kernel to copy."""
        return self._files[tensor.file], tensor.offset

    def close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
