"""A checkpoint folder, known by its headers: which tensors lie where, which files come along.

Nothing here imports torch or maps a file. Weights are read with `preadv` into buffers of the caller's, because pages of a
mapping count as resident memory. The folder may be anybody's: no name, size or link in it is trusted.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any

from ckptq.errors import SourceError
from ckptq.folder import open_regular, printable, refuse_outside, walk
from ckptq.index import INDEX, Disagreement, compare_index, natural, read_index, refuse_differences
from ckptq.json_file import read_text_and_json
from ckptq.safetensors_header import DTYPE_BYTES, FLOATS, Codes, Header, SourceTensor, TensorSpec, check_header, read_header

if TYPE_CHECKING:
    from ckptq.dequantize import Dequantizer
    from ckptq.transpose import Transposer

__all__ = [  # what other modules import from here, wherever it is defined
    "DTYPE_BYTES", "FLOATS", "INDEX", "SINGLE", "SPEAKERS", "STAGING", "WEIGHT_COPIES", "Codes", "Component", "Disagreement",
    "Header", "Inventory", "Reader", "SourceTensor", "TensorSpec", "check_header", "fingerprint", "is_consolidated",
    "is_weight_copy", "read_config", "read_header", "read_index", "read_inventory",
]  # fmt: skip

SINGLE = "model.safetensors"
STAGING = ".ckptq-partial"
"""The folder inside an output in which everything is written before it is published; its presence means: not finished."""

TENSOR_LIMIT = 1_000_000
WEIGHT_FILE_LIMIT = 4096

# Further copies of the weights. vLLM 0.32.0 model_loader/default_loader.py: a consolidated*.safetensors switches `auto` to the
# Mistral loader, which then reads that file alone; stray *.safetensors are read too where no index filters them.
WEIGHT_COPIES = (
    "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.onnx", "*.onnx_data", "*.h5", "*.msgpack", "*.safetensors",
    "consolidated*", "original/*", "*.bin.index.json", "*.safetensors.index.json",
)  # fmt: skip
_COPIES = re.compile("|".join(fnmatch.translate(pattern) for pattern in WEIGHT_COPIES))
SPEAKERS = "spk_dict.pt"
"""Voices of Qwen2.5-Omni, no copy of its weights: transformers 5.17 and vLLM-Omni 0.30.0 read it from beside them."""


@dataclass(frozen=True, slots=True)
class Component:
    """One model of a pipeline: its tensors, its config.json (text and parsed) and the files that travel with it.

    left_out       further copies of the weights, also hidden ones that a server would take for the model
    indexed        whether there is an index
    disagreements  empty where the inventory was read strictly
    dequantized    what was done to a quantized checkpoint to see it as this one, in sentences; empty for one that is as stored
    """

    folder: str
    config_text: str
    config: Mapping[str, Any]
    tensors: Mapping[str, SourceTensor]
    weight_files: tuple[str, ...]
    sidecars: tuple[str, ...]
    left_out: tuple[str, ...]
    indexed: bool = True
    disagreements: tuple[Disagreement, ...] = ()
    dequantized: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(t.spec.nbytes for t in self.tensors.values())

    @property
    def stored_bytes(self) -> int:
        return sum(t.stored_bytes for t in self.tensors.values())


@dataclass(frozen=True, slots=True)
class Inventory:
    """A checkpoint as its headers describe it. A plain model is a pipeline with one component, whose folder is ""."""

    root: Path
    components: tuple[Component, ...]

    @property
    def main(self) -> Component:
        return self.components[0]


def read_inventory(root: Path, header: Callable[[Path], Header] = read_header, *, strict: bool = True) -> Inventory:
    """The checkpoint in `root`. `header` reads one weight file's header; a Hub source passes one that asks the Hub.

    Raises SourceError where a file is missing or is none, and, if `strict`, where index and shards disagree. Otherwise what
    vLLM 0.32 would load is read (without an index every *.safetensors), and `Component.disagreements` says what is wrong.
    """
    try:
        if not root.is_dir():
            raise SourceError(f"{root}: no such folder", hint="give a folder, or a Hub id as org/name[@revision]")
        return Inventory(root, (_read_component(root, "", header, strict),))
    except OSError as error:
        raise SourceError(f"{printable(str(error.filename or root))}: can't be read: {error.strerror}") from error


def _read_component(root: Path, folder: str, header: Callable[[Path], Header], strict: bool) -> Component:
    base = root / folder
    text, config = read_config(base)
    weight_map = read_index(base)
    files = _weight_files(base, weight_map, strict)
    tensors: dict[str, SourceTensor] = {}
    noted: list[Disagreement] = []
    for file in files:
        if header is read_header:
            _refuse_absent(base, file, weight_map is not None)
        for name, entry in header(base / file).items():
            tensor = SourceTensor(TensorSpec(name, entry["dtype"], entry["shape"]), file, entry["offset"])
            if name in tensors:
                noted.append(Disagreement("stored-twice", name, file, tensors[name].file, tensors[name]))
                if strict:
                    raise SourceError(f"{printable(name)}: stored twice, in {tensors[name].file} and in {file}")
            tensors[name] = tensor
        if len(tensors) + len(noted) > TENSOR_LIMIT:
            raise SourceError(f"{base}: expected at most {TENSOR_LIMIT} tensors, found more")
    if weight_map is not None:
        differences = compare_index(weight_map, tensors, twice={d.name for d in noted})
        if strict:
            refuse_differences(differences)
        noted += differences
    sidecars, left_out = _other_files(base, files)
    return Component(
        folder,
        text,
        MappingProxyType(config),
        MappingProxyType(tensors),
        tuple(files),
        tuple(sidecars),
        tuple(left_out),
        weight_map is not None,
        tuple(noted),
    )


def _weight_files(base: Path, weight_map: Mapping[str, str] | None, strict: bool) -> list[str]:
    """The files that hold the model, in the order in which vLLM reads them, so that of two equal names the later counts.

    vLLM 0.32.0 model_loader/default_loader.py _prepare_weights; the order: weight_utils.py safetensors_weights_iterator.
    """
    names: Collection[str] = [SINGLE]
    if weight_map is not None:
        names = set(weight_map.values())
    elif not strict:
        found = [path.name for path in base.iterdir() if path.name.endswith(".safetensors")]
        names = [name for name in found if not name.startswith(".") and not is_consolidated(name)] or [SINGLE]
    if len(names) > WEIGHT_FILE_LIMIT:
        raise SourceError(f"{base}: expected at most {WEIGHT_FILE_LIMIT} weight files, found {len(names)}")
    return sorted(names, key=natural)


def _refuse_absent(base: Path, file: str, indexed: bool) -> None:
    refuse_outside(base / file, base)
    if not (base / file).exists():
        found = [printable(p.name) for p in sorted(base.glob("*.safetensors"))]
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        named = f"named by {INDEX}" if indexed else f"expected where there is no {INDEX}"
        raise SourceError(
            f"{file}: missing, {named}; found {', '.join(found[:8]) or 'no *.safetensors'}{more} in {base}",
            hint="fetch the checkpoint again" if found else "ckptq reads safetensors checkpoints only",
        )


def read_config(base: Path) -> tuple[str, dict[str, Any]]:
    """config.json as text, line ends as they are, and parsed."""
    try:
        text, config = read_text_and_json(base / "config.json")
    except FileNotFoundError:
        raise SourceError(f"{base}: has no config.json, so it is no Hugging Face checkpoint") from None
    if not isinstance(config, dict):
        raise SourceError(f"{base / 'config.json'}: expected a JSON object, found {type(config).__name__}")
    return text, config


def _other_files(base: Path, weights: Collection[str]) -> tuple[list[str], list[str]]:
    """Files that travel along, and further copies of the weights, which are left out; both relative to `base`.

    Of hidden folders vLLM sees one thing: a consolidated*.safetensors (transformers_utils/repo_utils.py list_repo_files).
    """
    kept: list[str] = []
    left: list[str] = []
    own = {*weights, "config.json", INDEX}
    for name, hidden in walk(base):
        if hidden and not is_consolidated(name):
            continue
        if name not in own:
            (left if is_weight_copy(name) else kept).append(name)
    return kept, left


def is_weight_copy(name: str) -> bool:
    """Whether the file holds, or indexes, another copy of the weights."""
    return name != SPEAKERS and bool(_COPIES.match(name) or _COPIES.match(name.rpartition("/")[2]))


def is_consolidated(name: str) -> bool:
    """Whether vLLM takes a folder with this file in it, at any depth, for one in Mistral's own format."""
    return fnmatch.fnmatchcase(name.rpartition("/")[2], "consolidated*.safetensors")


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
        if any(tensor.stride for tensor in component.tensors.values()):
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
        elif tensor.codes is None:
            assert self._transposer is not None
            self._transposer.read_into(tensor, start, buffer)
        else:
            assert self._dequantizer is not None
            self._dequantizer.read_into(tensor, start, buffer)

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
