"""Digests of what a conversion wrote, so that a change can be seen later. They tell accidents, and protect from no attacker.

A tensor's digest covers its dtype and its bytes, not its file or its shape: splitting a checkpoint into other files, or writing a
scalar as `[1]`, is no change. A small JSON file's digest covers what it says, not its spaces and the order of its keys.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from ckptq.checkpoint import INDEX, Component, read_inventory

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


def of_folder(root: Path, advance: Callable[[int], None] = lambda _: None) -> dict[str, dict[str, str]]:
    """{"tensors": {name: digest}, "files": {name: digest}} of the checkpoint in `root`, as it lies on the disk."""
    component = read_inventory(root).main
    return {"tensors": of_tensors(root, component, advance), "files": of_files(root, recorded_files(component))}


def of_tensors(root: Path, component: Component, advance: Callable[[int], None]) -> dict[str, str]:
    """{name: digest} of every tensor, by name."""
    from ckptq.validators.scan import scan

    return dict(sorted((tensor.spec.name, seen.digest) for tensor, seen in scan(root, component, advance, digests=True)))


def recorded_files(component: Component) -> Iterator[str]:
    """The files that a record covers: all but the weights, their index, the record itself and what is for people."""
    for name in ("config.json", *component.sidecars):
        if name not in (INDEX, "ckptq.json") and not is_document(name):
            yield name


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
        try:
            data = json.dumps(json.loads(data), sort_keys=True, separators=(",", ":")).encode()
        except (ValueError, RecursionError):
            pass  # as it stands, then
        return xxhash.xxh3_128_hexdigest(data)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()
