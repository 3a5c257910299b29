"""A checkpoint folder, known by its headers: which tensors lie where, which files come along.

Nothing here imports torch or maps a file. Weights are read with `preadv` into buffers of the caller's, because pages of a
mapping count as resident memory.

Header layout: 8 bytes little-endian length N, N bytes of JSON {name: {dtype, shape, data_offsets}}, then the data without
gaps (safetensors 0.8 format description).
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from ckptq.errors import SourceError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
STAGING = ".ckptq-partial"
"""The folder inside an output in which everything is written before it is published; its presence means: not finished."""

DTYPE_BYTES: Mapping[str, int] = MappingProxyType(
    {
        **dict.fromkeys(("F64", "I64", "U64"), 8),
        **dict.fromkeys(("F32", "I32", "U32"), 4),
        **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
        **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1),
    }
)
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})

# Further copies of the weights. vLLM 0.32.0 model_loader/default_loader.py: a consolidated*.safetensors switches `auto` to the
# Mistral loader, which then reads that file alone; stray *.safetensors are read too where no index filters them.
WEIGHT_COPIES = (
    "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.onnx", "*.onnx_data", "*.h5", "*.msgpack", "*.safetensors",
    "consolidated*", "original/*", "*.bin.index.json", "*.safetensors.index.json",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a safetensors header says of a tensor. `dtype` is safetensors' own word, for example "BF16" or "F8_E4M3"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A stored tensor: `offset` is in bytes from the start of `file`, which is relative to the checkpoint's folder."""

    spec: TensorSpec
    file: str
    offset: int


@dataclass(frozen=True, slots=True)
class Component:
    """One model of a pipeline: its tensors, its config.json (text and parsed) and the files that travel with it."""

    folder: str
    config_text: str
    config: Mapping[str, Any]
    tensors: Mapping[str, SourceTensor]
    weight_files: tuple[str, ...]
    sidecars: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(t.spec.nbytes for t in self.tensors.values())


@dataclass(frozen=True, slots=True)
class Inventory:
    """A checkpoint as its headers describe it. A plain model is a pipeline with one component, whose folder is ""."""

    root: Path
    components: tuple[Component, ...]

    @property
    def main(self) -> Component:
        return self.components[0]


Header = Mapping[str, Any]


def read_header(path: Path) -> Header:
    """The JSON header of a safetensors file, with absolute `data_offsets`, checked against the file's size.

    Raises SourceError for a file that is too short, is no safetensors file, or whose tensors leave gaps or overlap.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise SourceError(
                    f"{path.name}: truncated or not a safetensors file: the header should be {length} bytes long, "
                    f"the file has {max(size - 8, 0)} after its length field",
                    hint="fetch the file again",
                )
            raw = json.loads(file.read(length))
    except OSError as error:
        raise SourceError(f"{path.name}: can't be read: {error.strerror}", hint="fetch the file again") from error
    except ValueError as error:
        raise SourceError(f"{path.name}: its header is not JSON: {error}", hint="fetch the file again") from error
    return check_header(path.name, raw, start=8 + length, size=size)


def check_header(name: str, raw: Any, *, start: int, size: int) -> Header:
    """`raw` with offsets made absolute, after checking every dtype, shape and range. Pure but for its errors."""
    if not isinstance(raw, dict):
        raise SourceError(f"{name}: its header is not a JSON object")
    entries: dict[str, Any] = {}
    spans: list[tuple[int, int, str]] = []
    for key, value in raw.items():
        if key == "__metadata__":
            continue
        try:
            spec = TensorSpec(key, value["dtype"], tuple(int(n) for n in value["shape"]))
            begin, end = (int(n) for n in value["data_offsets"])
            nbytes = spec.nbytes
        except (KeyError, TypeError, ValueError) as error:
            raise SourceError(f"{name}: the header entry of {key} can't be understood: {value}") from error
        if end - begin != nbytes or begin < 0 or min(spec.shape, default=0) < 0:
            raise SourceError(
                f"{name}: {key} should take {nbytes} bytes ({spec.dtype} {list(spec.shape)}), the header gives it {end - begin}"
            )
        entries[key] = {"dtype": spec.dtype, "shape": spec.shape, "offset": start + begin}
        spans.append((begin, end, key))
    at = 0
    for begin, end, key in sorted(spans):
        if begin != at:
            raise SourceError(f"{name}: {key} starts at byte {begin} of the data, expected {at}: a gap or an overlap")
        at = end
    if start + at != size:
        raise SourceError(
            f"{name}: truncated or overlong: the header describes {start + at} bytes, the file has {size}",
            hint="fetch the file again",
        )
    return entries


def read_inventory(root: Path, header: Callable[[Path], Header] = read_header) -> Inventory:
    """The checkpoint in `root`. `header` reads one weight file's header; a Hub source passes one that asks the Hub.

    Raises SourceError where a file is missing or index and shards disagree.
    """
    if not root.is_dir():
        raise SourceError(f"{root}: no such folder", hint="give a folder, or a Hub id as org/name[@revision]")
    return Inventory(root, (_read_component(root, "", header),))


def _read_component(root: Path, folder: str, header: Callable[[Path], Header]) -> Component:
    base = root / folder
    text, config = read_config(base)
    weight_map = read_index(base)
    files = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]
    tensors: dict[str, SourceTensor] = {}
    for file in files:
        if header is read_header and not (base / file).is_file():
            found = sorted(p.name for p in base.glob("*.safetensors"))
            named = f"named by {INDEX}" if weight_map is not None else f"expected where there is no {INDEX}"
            raise SourceError(
                f"{file}: missing, {named}; found {', '.join(found) or 'no *.safetensors'} in {base}",
                hint="fetch the checkpoint again" if found else "ckptq reads safetensors checkpoints only",
            )
        for name, entry in header(base / file).items():
            if name in tensors:
                raise SourceError(f"{name}: stored twice, in {tensors[name].file} and in {file}")
            tensors[name] = SourceTensor(TensorSpec(name, entry["dtype"], entry["shape"]), file, entry["offset"])
    if weight_map is not None:
        _compare_index(weight_map, tensors)
    sidecars, left_out = _other_files(base, files)
    return Component(
        folder, text, MappingProxyType(config), MappingProxyType(tensors), tuple(files), tuple(sidecars), tuple(left_out)
    )


def read_config(base: Path) -> tuple[str, dict[str, Any]]:
    """config.json as text and parsed."""
    try:
        text = (base / "config.json").read_bytes().decode()  # line ends as they are
        config = json.loads(text)
    except FileNotFoundError:
        raise SourceError(f"{base}: has no config.json, so it is no Hugging Face checkpoint") from None
    except (OSError, ValueError) as error:
        raise SourceError(f"{base / 'config.json'}: can't be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise SourceError(f"{base / 'config.json'}: expected a JSON object, found {type(config).__name__}")
    return text, config


def read_index(base: Path) -> dict[str, str] | None:
    """The weight_map of the index, {tensor: file}, or None where there is no index."""
    path = base / INDEX
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{path}: can't be read as an index with a weight_map: {error!r}") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{path}: its weight_map is empty or no JSON object")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise SourceError(f"{path}: {name} is said to lie in {file!r}, expected a *.safetensors file of this folder")
    return weight_map


def _compare_index(weight_map: Mapping[str, str], tensors: Mapping[str, SourceTensor]) -> None:
    for name, file in weight_map.items():
        if name not in tensors:
            raise SourceError(f"{name}: the index says it is in {file}, which does not hold it", hint="fetch the checkpoint again")
        if tensors[name].file != file:
            raise SourceError(f"{name}: the index says it is in {file}, it is in {tensors[name].file}")
    if extra := sorted(set(tensors) - set(weight_map)):
        raise SourceError(
            f"{extra[0]}: stored in {tensors[extra[0]].file} but not in the index ({len(extra)} such tensors); "
            "a server would load it all the same",
            hint="mend the index, or remove the tensor",
        )


def _other_files(base: Path, weights: list[str]) -> tuple[list[str], list[str]]:
    """Files that travel along, and further copies of the weights, which are left out; both relative to `base`."""
    kept: list[str] = []
    left: list[str] = []
    for path in _walk(base):
        name = path.relative_to(base).as_posix()
        if name in weights or name in ("config.json", INDEX):
            continue
        (left if is_weight_copy(name) else kept).append(name)
    return kept, left


def is_weight_copy(name: str) -> bool:
    """Whether the file holds, or indexes, another copy of the weights."""
    return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(Path(name).name, p) for p in WEIGHT_COPIES)


def _walk(base: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(base):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
        for file in sorted(files):
            path = Path(folder) / file
            if not path.is_file():
                raise SourceError(f"{path}: not a readable file (a dangling link?)", hint="fetch the checkpoint again")
            yield path


def fingerprint(root: Path, component: Component) -> str:
    """SHA-256 over config.json, every header entry and 64 spots of 4 KiB in each weight file.

    Two fine-tunes of one model have equal headers and sizes, so bytes of the weights must count; all of them would cost a
    pass over the disk.
    """
    digest = hashlib.sha256(component.config_text.encode())
    for name, tensor in sorted(component.tensors.items()):
        digest.update(f"{name}|{tensor.spec.dtype}|{tensor.spec.shape}|{tensor.file}|{tensor.offset}\n".encode())
    for file in component.weight_files:
        fd = os.open(root / component.folder / file, os.O_RDONLY)
        try:
            size = os.fstat(fd).st_size
            for spot in range(64):
                digest.update(os.pread(fd, 4096, size * spot // 64))
        finally:
            os.close(fd)
    return digest.hexdigest()


class Reader:
    """Bounded reads from a component's weight files, from any thread. Holds one descriptor a file; use it as a context."""

    def __init__(self, root: Path, component: Component) -> None:
        base = root / component.folder
        self._files = {file: os.open(base / file, os.O_RDONLY) for file in component.weight_files}

    def read_into(self, tensor: SourceTensor, start: int, buffer: memoryview) -> None:
        """Fills `buffer` with the tensor's bytes from `start` on (bytes from the tensor's own start)."""
        done = 0
        while done < len(buffer):
            count = os.preadv(self._files[tensor.file], [buffer[done:]], tensor.offset + start + done)
            if count == 0:
                raise SourceError(f"{tensor.file}: ended while {tensor.spec.name} was read; was it changed meanwhile?")
            done += count

    def close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
