"""A checkpoint folder, known by its headers: which tensors lie where, which files come along.

Nothing here imports torch or maps a file. Weights are read with `preadv` into buffers of the caller's, because pages of a
mapping count as resident memory. The folder may be anybody's: no name, size or link in it is trusted.
"""

from __future__ import annotations

import contextlib
import fnmatch
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ckptq.errors import SourceError
from ckptq.folder import printable, refuse_outside, walk
from ckptq.foreign import refuse_foreign
from ckptq.index import INDEX, Disagreement, compare_index, index_name, natural, read_index, refuse_differences
from ckptq.json_file import read_json, read_text_and_json, short
from ckptq.reader import Reader, fingerprint
from ckptq.safetensors_header import DTYPE_BYTES, FLOATS, Codes, Header, SourceTensor, TensorSpec, check_header, read_header

__all__ = [  # what other modules import from here, wherever it is defined
    "DTYPE_BYTES", "FLOATS", "INDEX", "PIPELINE", "SINGLE", "SPEAKERS", "STAGING", "WEIGHT_COPIES", "Codes", "Component",
    "Disagreement", "Header", "Inventory", "Reader", "SourceTensor", "TensorSpec", "check_header", "fingerprint",
    "is_consolidated", "is_weight_copy", "read_config", "read_header", "read_index", "read_inventory",
]  # fmt: skip

SINGLE = "model.safetensors"
PIPELINE = "model_index.json"
"""What makes a folder a diffusers pipeline: {component: [library, class]}."""
STEMS = ("diffusion_pytorch_model", "model")
"""What weight files of a pipeline's component are called: by diffusers, by transformers."""
STAGING = ".ckptq-partial"
"""The folder inside an output in which everything is written before it is published; its presence means: not finished."""

_ONLY = "ckptq reads safetensors checkpoints only"
_FOLDER = "name the folder that holds config.json beside the weights"
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
    stem           what its weight files are called, before a number and `.safetensors`
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
    stem: str = "model"

    @property
    def index(self) -> str:
        """The name of its index, whether there is one or not."""
        return index_name(self.stem)

    @property
    def nbytes(self) -> int:
        return sum(t.spec.nbytes for t in self.tensors.values())

    @property
    def stored_bytes(self) -> int:
        return sum(t.stored_bytes for t in self.tensors.values())


@dataclass(frozen=True, slots=True)
class Inventory:
    """A checkpoint as its headers describe it. A plain model is a pipeline with one component, whose folder is "".

    components  those with weights in safetensors
    pipeline    model_index.json; None of a plain model
    files       a pipeline's files outside of `components`, relative to the root: schedulers, tokenizers, the index itself
    left_out    further copies of the weights among them
    """

    root: Path
    components: tuple[Component, ...]
    pipeline: Mapping[str, Any] | None = None
    files: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def main(self) -> Component:
        """The one component of a plain model."""
        return self.components[0]

    def component(self, folder: str) -> Component:
        """The component in that folder."""
        return next(component for component in self.components if component.folder == folder)


def read_inventory(root: Path, header: Callable[[Path], Header] = read_header, *, strict: bool = True) -> Inventory:
    """The checkpoint in `root`. `header` reads one weight file's header; a Hub source passes one that asks the Hub.

    Raises SourceError where a file is missing or is none, and, if `strict`, where index and shards disagree. Otherwise what
    vLLM 0.32 would load is read (without an index every *.safetensors), and `Component.disagreements` says what is wrong.
    """
    try:
        if not root.is_dir():
            raise SourceError(f"{root}: no such folder", hint="give a folder, or a Hub id as org/name[@revision]")
        if (root / PIPELINE).is_file():
            return _read_pipeline(root, header, strict)
        named = (root / SINGLE).exists() or (root / INDEX).is_file()  # a component by itself may have diffusers' name for it
        stem = "model" if named else _stem_of(root, header) or "model"
        return Inventory(root, (_read_component(root, "", header, strict, stem),))
    except OSError as error:
        raise SourceError(f"{printable(str(error.filename or root))}: can't be read: {error.strerror}") from error


def _read_pipeline(root: Path, header: Callable[[Path], Header], strict: bool) -> Inventory:
    index = read_json(root / PIPELINE)
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise SourceError(f"{root / PIPELINE}: expected the index of a pipeline, with a _class_name", hint="fetch it again")
    listed = component_names(index)
    for name, entry in index.items():
        if not isinstance(entry, list) and name.isidentifier() and (root / name).is_dir():
            raise SourceError(
                f"{PIPELINE}: {printable(name)}: expected [library, class], found {short(entry)}", hint="fetch it again"
            )
    if strict and (absent := [name for name in listed if not (root / name).is_dir()]):
        raise SourceError(f"{PIPELINE} names the component {printable(absent[0])}: no such folder", hint="fetch the pipeline again")
    stems = {name: stem for name in listed if (stem := _stem_of(root / name, header))}
    if strict and (linked := next((name for name in listed if name not in stems and (root / name).is_symlink()), None)):
        raise SourceError(
            f"{printable(linked)}: a link to a folder, whose files would not travel along",
            hint="put the folder itself there: `cp -rL FOLDER COPY` copies a folder with what its links lead to",
        )
    if not stems:
        raise SourceError(f"{root}: no component of this pipeline has weights in safetensors", hint=_ONLY)
    components = tuple(_read_named(root, name, header, strict, stem) for name, stem in stems.items())
    names = [n for n, hidden in walk(root) if not hidden and n.partition("/")[0] not in stems]
    copies = tuple(n for n in names if n.partition("/")[0] not in listed and is_weight_copy(n))
    return Inventory(root, components, MappingProxyType(index), tuple(n for n in names if n not in copies), copies)


def component_names(index: Mapping[str, Any]) -> tuple[str, ...]:
    """The components of a model_index.json that are there: one that a pipeline does without is [null, null]."""
    found = (name for name, what in index.items() if isinstance(what, list) and len(what) == 2 and what[1] is not None)
    return tuple(name for name in found if name.isidentifier() and not name.startswith("_"))


def _read_named(root: Path, name: str, header: Callable[[Path], Header], strict: bool, stem: str) -> Component:
    """A component, its name in all errors: several have files of one name."""
    try:
        return _read_component(root, name, header, strict, stem)
    except SourceError as error:
        raise SourceError(f"{name}: {str(error).removeprefix(f'{root / name}: ')}", hint=error.hint) from error


def _stem_of(base: Path, header: Callable[[Path], Header]) -> str:
    """What the component's weight files are called; "" where it has none in safetensors."""
    for stem in STEMS:
        single = base / f"{stem}.safetensors"
        if (base / index_name(stem)).is_file() or single.exists():
            return stem
        if header is not read_header:  # of a file that is still on the Hub
            with contextlib.suppress(FileNotFoundError):
                header(single)
                return stem
    return ""


def _read_component(root: Path, folder: str, header: Callable[[Path], Header], strict: bool, stem: str = "model") -> Component:
    base = root / folder
    text, config = read_config(base)
    weight_map = read_index(base, stem)
    files = _weight_files(base, weight_map, strict, f"{stem}.safetensors")
    tensors: dict[str, SourceTensor] = {}
    noted: list[Disagreement] = []
    for file in files:
        if header is read_header:
            _refuse_absent(base, file, index_name(stem), indexed=weight_map is not None)
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
    sidecars, left_out = _other_files(base, {*files, "config.json", index_name(stem)})
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
        stem=stem,
    )


def _weight_files(base: Path, weight_map: Mapping[str, str] | None, strict: bool, single: str) -> list[str]:
    """The files that hold the model, in the order in which vLLM reads them, so that of two equal names the later counts.

    vLLM 0.32.0 model_loader/default_loader.py _prepare_weights; the order: weight_utils.py safetensors_weights_iterator.
    """
    names: Collection[str] = [single]
    if weight_map is not None:
        names = set(weight_map.values())
    elif not strict:
        found = [path.name for path in base.iterdir() if path.name.endswith(".safetensors")]
        names = [name for name in found if not name.startswith(".") and not is_consolidated(name)] or [single]
    if len(names) > WEIGHT_FILE_LIMIT:
        raise SourceError(f"{base}: expected at most {WEIGHT_FILE_LIMIT} weight files, found {len(names)}")
    return sorted(names, key=natural)


def _refuse_absent(base: Path, file: str, index: str, *, indexed: bool) -> None:
    refuse_outside(base / file, base)
    if not (base / file).exists():
        refuse_foreign(base)
        found = [printable(p.name) for p in sorted(base.glob("*.safetensors"))]
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        named = f"named by {index}" if indexed else f"expected where there is no {index}"
        raise SourceError(
            f"{file}: missing, {named}; found {', '.join(found[:8]) or 'no *.safetensors'}{more} in {base}",
            hint="fetch the checkpoint again" if found else _ONLY,
        )


def read_config(base: Path) -> tuple[str, dict[str, Any]]:
    """config.json as text, line ends as they are, and parsed."""
    try:
        text, config = read_text_and_json(base / "config.json")
    except FileNotFoundError:
        refuse_foreign(base)
        raise SourceError(f"{base}: has no config.json, so it is no Hugging Face checkpoint", hint=_FOLDER) from None
    if not isinstance(config, dict):
        raise SourceError(f"{base / 'config.json'}: expected a JSON object, found {type(config).__name__}")
    return text, config


def _other_files(base: Path, own: Collection[str]) -> tuple[list[str], list[str]]:
    """Files that travel along, and further copies of the weights, which are left out; both relative to `base`.

    Of hidden folders vLLM sees one thing: a consolidated*.safetensors (transformers_utils/repo_utils.py list_repo_files).
    """
    kept: list[str] = []
    left: list[str] = []
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
