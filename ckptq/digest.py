"""Digests of what a conversion wrote, so that a change can be seen later. They tell accidents, and protect from no attacker.

A tensor's digest covers its dtype and its bytes, not its file or its shape: splitting a checkpoint into other files, or writing a
scalar as `[1]`, is no change. A small JSON file's digest covers what it says, not its spaces and the order of its keys.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from ckptq.checkpoint import INDEX, Component, SourceTensor, TensorSpec, read_header

if TYPE_CHECKING:
    import xxhash

PART = 1 << 26
"""Bytes of a tensor that are hashed in one go, so that threads share a large one. Part of the definition: never change it."""
PARSED = 1 << 20
"""A JSON file up to this size is compared as parsed. Part of the definition too."""
DOCUMENTS = ("*.md", "LICENSE*", "NOTICE*", ".*", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.pdf", "*.mp4")
"""Files for people, which no server reads."""


def hasher(dtype: str) -> xxhash.xxh3_128:
    """What a part of a tensor of this dtype goes through. XXH3 runs at the speed of memory; SHA-256 would not."""
    import xxhash

    return xxhash.xxh3_128(dtype.encode())


def join(parts: Sequence[bytes]) -> str:
    """The digest of a tensor, as hexadecimal digits, from those of its parts in order."""
    import xxhash

    return parts[0].hex() if len(parts) == 1 else xxhash.xxh3_128_hexdigest(b"".join(parts))


def of_bytes(dtype: str, data: memoryview) -> bytes:
    """The digest of a part, whole in memory."""
    total = hasher(dtype)
    total.update(data)
    return total.digest()


class Running:
    """The digest of a tensor whose bytes come piece by piece, in order."""

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype
        self._parts: list[bytes] = []
        self._part = hasher(dtype)
        self.nbytes = 0

    def update(self, data: memoryview) -> None:
        """Takes the next bytes."""
        at = 0
        while at < len(data):
            if self.nbytes and self.nbytes % PART == 0:
                self._parts.append(self._part.digest())
                self._part = hasher(self._dtype)
            piece = data[at : at + PART - self.nbytes % PART]
            self._part.update(piece)
            self.nbytes += len(piece)
            at += len(piece)

    def hexdigest(self) -> str:
        """The digest of what came so far."""
        return join([*self._parts, self._part.digest()])


def of_shard(path: Path) -> dict[str, str]:
    """{name: digest} of the tensors in one weight file. Raises as `read_header` does."""
    from ckptq.validators.scan import scan

    entries = read_header(path).items()
    tensors = {n: SourceTensor(TensorSpec(n, e["dtype"], e["shape"]), path.name, e["offset"]) for n, e in entries}
    component = Component("", "", {}, tensors, (path.name,), (), ())
    return {tensor.spec.name: seen.digest for tensor, seen in scan(path.parent, component, digests=True)}


def recorded(names: Iterable[str]) -> list[str]:
    """Of these files those that a record covers: all but the weights' index, the record itself and what is for people."""
    return [name for name in names if name not in (INDEX, "ckptq.json") and not is_document(name)]


def is_document(name: str) -> bool:
    """Whether the file is for people alone."""
    return any(fnmatchcase(Path(name).name, pattern) for pattern in DOCUMENTS)


def of_files(root: Path, names: Iterable[str]) -> dict[str, str]:
    """{name: digest} of files in `root`. Raises OSError for one that can't be read."""
    return {name: _of_file(root / name) for name in sorted(names)}


def _of_file(path: Path) -> str:
    import xxhash

    total = xxhash.xxh3_128()
    if path.suffix == ".json" and path.stat().st_size <= PARSED:
        data = path.read_bytes()
        with contextlib.suppress(ValueError, RecursionError):  # what is no JSON counts as it stands
            data = json.dumps(json.loads(data), sort_keys=True, separators=(",", ":")).encode()
        return xxhash.xxh3_128_hexdigest(data)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()
