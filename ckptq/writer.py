"""Safetensors files written at planned offsets, and files that appear whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from ckptq.checkpoint import TensorSpec
from ckptq.errors import OutputError

PARTIAL = ".partial"
BLOCK = 1 << 20
"""Bytes that a copy by hand takes at a time."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CAN_NOT = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ETXTBSY,
            errno.ENOENT, errno.EACCES)  # fmt: skip
"""The kernel does not copy between these files: other file systems, other kinds of file, an older kernel, a sandbox, no /proc."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the system says about a write into an OutputError that names the path and the way out."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise OutputError(
                f"{path}: no room left: {error.strerror}", hint="free some space, then run the same command with --resume"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise OutputError(f"{path}: can't be written: {error.strerror}", hint="choose an --output you may write to") from error
        raise OutputError(f"{path}: can't be written: {error.strerror or error}") from error


class TensorFile:
    """A safetensors file of known layout. Bytes go straight to their place, from any thread, in any order.

    `finish` publishes it under its name; until then it is called <name>.partial. Every byte must be written once: `finish` counts.
    """

    def __init__(
        self, path: Path, specs: Iterable[TensorSpec], offsets: Mapping[str, int], metadata: Mapping[str, str] | None = None
    ) -> None:
        self._path = path
        self._partial = path.with_name(path.name + PARTIAL)
        self._offsets = offsets
        self._specs = {spec.name: spec for spec in specs}
        self._left = {name: spec.nbytes for name, spec in self._specs.items()}
        self._counting = threading.Lock()
        head = _header(self._specs, offsets, metadata or {"format": "pt"})
        self._start = len(head)
        with writing(self._partial):
            # 0o666 less the umask: safetensors 0.8 makes files 0600, which a server under another user can't read.
            self._fd = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                reserve(self._fd, len(head) + max((offsets[s.name] + s.nbytes for s in self._specs.values()), default=0))
                _write_all(self._fd, memoryview(head), 0)
            except OSError:
                self.close()
                raise

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Writes bytes of tensor `name`, `start` bytes into it."""
        with writing(self._path):
            _write_all(self._fd, data, self._start + self._offsets[name] + start)
        self._count(name, len(data))

    def copy(self, name: str, start: int, source: int, at: int, count: int) -> None:
        """Copies `count` bytes from `at` on of an open file to `start` bytes into tensor `name`, by the kernel where it can."""
        with writing(self._path):
            copy_bytes(source, at, self._fd, self._start + self._offsets[name] + start, count)
        self._count(name, count)

    def flush(self) -> None:
        """What is written so far is on the disk when this returns, so that `finish` has less to wait for."""
        with writing(self._path):
            os.fdatasync(self._fd)

    def finish(self) -> None:
        """Checks that every tensor is complete, flushes to the disk and gives the file its name."""
        if wrong := [name for name, left in self._left.items() if left]:
            raise AssertionError(f"{self._path.name}: {wrong[0]} has {self._left[wrong[0]]} bytes left to write")
        with writing(self._path):
            os.fsync(self._fd)
            self.close()
            self._partial.replace(self._path)

    def _count(self, name: str, written: int) -> None:
        with self._counting:
            self._left[name] -= written

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def reserve(fd: int, nbytes: int) -> None:
    """Takes the room for a file where its file system can do so at once: a lack of it shows now, and writes cost a third less.

    Not os.posix_fallocate, which writes to every block where the file system can't. Raises OSError.
    """
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    while fallocate(fd, 0, 0, nbytes):
        if (number := ctypes.get_errno()) in _CAN_NOT:
            return
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def copy_bytes(source: int, at: int, target: int, to: int, count: int) -> None:
    """Copies bytes between open files. The kernel does it where it can, without a way through this process: copy_file_range,
    which shares the blocks on some file systems, or sendfile; else they are read and written. Raises OSError.
    """
    done = 0
    for way in (_by_range, _by_sendfile):
        try:
            while done < count and (moved := way(source, at + done, target, to + done, count - done)):
                done += moved
        except OSError as error:
            if error.errno not in _CAN_NOT:
                raise
    while done < count:
        data = os.pread(source, min(BLOCK, count - done), at + done)
        if not data:
            raise OSError(errno.EIO, "the source ended while it was copied")
        _write_all(target, memoryview(data), to + done)
        done += len(data)


def _by_range(source: int, at: int, target: int, to: int, count: int) -> int:
    return os.copy_file_range(source, target, count, at, to)


def _by_sendfile(source: int, at: int, target: int, to: int, count: int) -> int:
    """It writes where the descriptor stands, so it takes one of its own: threads share `target`."""
    own = os.open(f"/proc/self/fd/{target}", os.O_WRONLY)
    try:
        os.lseek(own, to, os.SEEK_SET)
        return os.sendfile(own, source, at, count)
    finally:
        os.close(own)


def write_text(path: Path, text: str) -> None:
    """The whole file or none of it, on the disk when this returns. Line ends are written as they are."""
    partial = path.with_name(path.name + PARTIAL)
    with writing(path), partial.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    with writing(path):
        partial.replace(path)


def write_report(path: Path, text: str) -> None:
    """A file that the user named: the whole of it or none, links followed. What is no regular file, such as /dev/stdout, gets it as
    it comes. Raises OutputError, and leaves nothing behind.
    """
    if path.exists() and not path.is_file():
        with _reporting(path):
            path.write_text(text, encoding="utf-8")
        return
    path = path.resolve()
    partial = path.with_name(path.name + PARTIAL)
    with _reporting(path):
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def _reporting(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        way = "free some space, or name a file elsewhere" if error.errno in _FULL else "name a file that you may write to"
        raise OutputError(f"{path}: can't be written: {error.strerror or error}", hint=way) from error


def copy_file(source: Path, target: Path) -> None:
    """The source's bytes under the umask's mode, copied by the kernel where it can; links are followed."""
    partial = target.with_name(target.name + PARTIAL)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as reader, writing(target):
        with partial.open("wb") as writer:
            copy_bytes(reader.fileno(), 0, writer.fileno(), 0, os.fstat(reader.fileno()).st_size)
            os.fsync(writer.fileno())
        partial.replace(target)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _header(specs: Mapping[str, TensorSpec], offsets: Mapping[str, int], metadata: Mapping[str, str]) -> bytes:
    """Length field and JSON, padded with spaces so that the data begins at a multiple of 8."""
    body: dict[str, object] = {"__metadata__": dict(metadata)}
    for name in sorted(specs, key=offsets.__getitem__):
        spec, at = specs[name], offsets[name]
        body[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [at, at + spec.nbytes]}
    text = json.dumps(body, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_all(fd: int, data: memoryview, at: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], at + done)
