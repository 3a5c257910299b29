"""The index of a checkpoint, model.safetensors.index.json: which tensor is said to lie in which file.

vLLM 0.32.0 takes from it which files to load and nothing else (model_loader/weight_utils.py
filter_duplicate_safetensors_files): what those files hold is loaded, whether the index names it or not.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ckptq.errors import SourceError
from ckptq.folder import printable
from ckptq.json_file import read_json, short
from ckptq.safetensors_header import SourceTensor

INDEX = "model.safetensors.index.json"
INDEX_LIMIT = 64_000_000
"""Bytes. The index of a model with 200,000 tensors takes 20 MB."""
_NAME_LIMIT = 255


@dataclass(frozen=True, slots=True)
class Disagreement:
    """A point at which the index and the weight files contradict each other, and which vLLM tolerates.

    index-stale  the index puts `name` into `file`, which does not hold it, and no other file does
    index-other  the index puts `name` into `other`; it lies in `file`
    index-lacks  `name` lies in `file`, and the index does not name it
    stored-twice `name` lies in `file`, which counts because it is read later, and as `replaced` in another
    """

    kind: Literal["index-stale", "index-other", "index-lacks", "stored-twice"]
    name: str
    file: str
    other: str = ""
    replaced: SourceTensor | None = None


def index_name(stem: str) -> str:
    """The index's file for weights called `stem`: `model`, or of diffusers' own models `diffusion_pytorch_model`."""
    return f"{stem}.safetensors.index.json"


def read_index(base: Path, stem: str = "model") -> dict[str, str] | None:
    """The weight_map of the index, {tensor: file}, or None where there is no index."""
    path = base / index_name(stem)
    try:
        data = read_json(path, INDEX_LIMIT)
    except FileNotFoundError:
        return None
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{path}: can't be read as an index: expected a weight_map that is not empty, found {short(data)}")
    for name, file in weight_map.items():
        if not _is_plain(file):
            raise SourceError(
                f"{path}: {printable(name)} is said to lie in {short(file)}, expected a *.safetensors file of this folder"
            )
    return {name: sys.intern(file) for name, file in weight_map.items()}


def _is_plain(file: Any) -> bool:
    """Whether it names a weight file of the folder itself. vLLM finds no hidden ones: it lists the folder with `glob`."""
    return (
        isinstance(file, str)
        and file.endswith(".safetensors")
        and not file.startswith(".")
        and file.isprintable()
        and not set(file) & {"/", "\\"}
        and len(file.encode()) <= _NAME_LIMIT
    )


def compare_index(
    weight_map: Mapping[str, str], tensors: Mapping[str, SourceTensor], twice: Collection[str] = ()
) -> list[Disagreement]:
    """Where the index and what is stored disagree. Names in `twice` lie in several files, and each of them is right."""
    found = []
    for name, file in weight_map.items():
        if name not in tensors:
            found.append(Disagreement("index-stale", name, file))
        elif tensors[name].file != file and name not in twice:
            found.append(Disagreement("index-other", name, tensors[name].file, file))
    return found + [Disagreement("index-lacks", name, tensors[name].file) for name in sorted(set(tensors) - set(weight_map))]


def refuse_differences(differences: Sequence[Disagreement]) -> None:
    for first in differences[:1]:
        name = printable(first.name)
        if first.kind == "index-stale":
            raise SourceError(
                f"{name}: the index says it is in {first.file}, which does not hold it", hint="fetch the checkpoint again"
            )
        if first.kind == "index-other":
            raise SourceError(f"{name}: the index says it is in {first.other}, it is in {first.file}")
        raise SourceError(
            f"{name}: stored in {first.file} but not in the index ({len(differences)} such tensors); "
            "a server would load it all the same",
            hint="mend the index, or remove the tensor",
        )


def natural(name: str) -> tuple[int | str, ...]:
    """The key by which vLLM sorts files: weight_utils.py _natural_sort_key. Of two equal tensors the later file's counts."""
    return tuple(int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name)))
