"""Files in the folder that lead a server astray, and weight files that contradict their index or one another."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from ckptq.checkpoint import SINGLE, Component, Disagreement, Reader, SourceTensor, TensorSpec, is_consolidated, read_header
from ckptq.errors import SourceError
from ckptq.folder import printable
from ckptq.validators import Code, Finding, error, warning

_LOADER = "vLLM 0.32.0 model_executor/model_loader/default_loader.py _prepare_weights"
_INDEX = "vLLM 0.32.0 model_executor/model_loader/weight_utils.py filter_duplicate_safetensors_files"
_ORDER = "vLLM 0.32.0 model_executor/model_loader/weight_utils.py safetensors_weights_iterator"

CODES = {
    "files.consolidated": Code("a file that makes the server take the folder for another format", _LOADER),
    "files.stray-safetensors": Code("without an index the server loads this file over the others", _LOADER),
    "files.no-index": Code("the weights lie in files that only a server which lists the folder finds", _LOADER),
    "files.index-stale": Code("the index names a tensor that is stored nowhere", _INDEX),
    "files.index-lacks": Code("a stored tensor that the index does not name", _INDEX),
    "files.index-other": Code("the index puts a tensor into another file than the one it lies in", _INDEX),
    "files.stored-twice": Code("one tensor in two of the files that are loaded", _ORDER),
    "files.weight-copy": Code("a further copy of the weights, never loaded", _LOADER),
}
CHUNK = 1 << 20


def check(folder: Path, component: Component, *, values: bool = True) -> Iterator[Finding]:
    """Findings on the files of `component`, read with `strict=False`.

    With `values` tensors that are stored twice are compared: equal ones do no harm. Raises SourceError where that reading
    fails.
    """
    yield from _left_out(folder, component, values)
    yield from check_weights(folder, component, values=values)


def check_weights(folder: Path, component: Component, *, values: bool = True) -> Iterator[Finding]:
    """Those on the files of the weights alone, of a pipeline's component too."""
    single = f"{component.stem}.safetensors"
    if not component.indexed and component.weight_files != (single,):
        yield warning(
            "files.no-index", ", ".join(printable(name) for name in component.weight_files[:3]),
            f"{single}, or an index that names the files", f"{len(component.weight_files)} weight files and no index",
            "vLLM loads every *.safetensors in the folder, other programs find no weights", "write an index",
        )  # fmt: skip
    twice = [d for d in component.disagreements if d.kind == "stored-twice"]
    yield from _twice(folder, component, twice, values)
    for found in component.disagreements:
        if found.kind != "stored-twice":
            yield _index_finding(found)


def _left_out(folder: Path, component: Component, values: bool) -> Iterator[Finding]:
    mistral = "params.json" in component.sidecars
    instead = [name for name in component.left_out if is_consolidated(name) and "/" not in name]
    equal = bool(instead) and values and not mistral and _equal(folder, component, instead)
    for name in component.left_out:
        if is_consolidated(name):
            effect = "vLLM takes the folder for a Mistral checkpoint and then finds no weights: it does not start"
            found = "there is one"
            if name in instead:
                effect = "vLLM loads this file alone, as a Mistral checkpoint" + (", by params.json" if mistral else "")
                found = "an equal copy of the weights" if equal else found
            say = warning if equal and name in instead else error
            yield say("files.consolidated", name, "no consolidated*.safetensors at any depth", found, effect, "remove it")
        else:
            yield warning(
                "files.weight-copy", name, "the weights once", "a further copy or index of weights",
                "vLLM does not load it, whoever fetches the folder pays for it", "remove it",
            )  # fmt: skip


def _equal(folder: Path, component: Component, files: Sequence[str]) -> bool:
    """Whether these files hold just what the component's do. Reads them where their headers agree."""
    copies: dict[str, SourceTensor] = {}
    try:
        for file in files:
            for name, entry in read_header(folder / file).items():
                copies[name] = SourceTensor(TensorSpec(name, entry["dtype"], entry["shape"]), file, entry["offset"])
            if len(copies) > len(component.tensors):  # before further headers take memory
                return False
    except SourceError:
        return False
    if {t.spec for t in copies.values()} != {t.spec for t in component.tensors.values()}:
        return False
    with Reader(folder, dataclasses.replace(component, weight_files=(*component.weight_files, *files))) as reader:
        return all(_same(reader, component.tensors[name], copy) for name, copy in copies.items())


def _twice(folder: Path, component: Component, twice: list[Disagreement], values: bool) -> Iterator[Finding]:
    if not twice:
        return
    strays: dict[tuple[str, str], int] = {}
    with Reader(folder, component) as reader:
        for found in twice:
            assert found.replaced is not None
            if values and _same(reader, component.tensors[found.name], found.replaced):
                yield warning(
                    "files.stored-twice", found.name, "one copy", f"equal ones in {found.other} and {found.file}",
                    "vLLM loads both, one over the other", "remove one of them",
                )  # fmt: skip
            elif component.indexed:
                yield error(
                    "files.stored-twice", found.name, "one copy", f"different ones in {found.other} and {found.file}",
                    "vLLM loads both and keeps the one in the later file, whatever the index says", "remove the one that is wrong",
                )  # fmt: skip
            else:
                strays[found.other, found.file] = strays.get((found.other, found.file), 0) + 1
    for (first, later), count in strays.items():
        stray, own, say = (first, later, warning) if later == SINGLE else (later, first, error)
        yield say(
            "files.stray-safetensors", stray, f"{SINGLE} alone, or an index", f"{count} of the tensors in {own} once more",
            f"without an index vLLM loads every *.safetensors, and what lies in {later} silently replaces the rest",
            "remove the file that is no part of the model",
        )  # fmt: skip


def _same(reader: Reader, one: SourceTensor, other: SourceTensor) -> bool:
    if one.spec != other.spec:
        return False
    buffers = memoryview(bytearray(CHUNK)), memoryview(bytearray(CHUNK))
    for start in range(0, one.spec.nbytes, CHUNK):
        a, b = (buffer[: min(CHUNK, one.spec.nbytes - start)] for buffer in buffers)
        reader.read_into(one, start, a)
        reader.read_into(other, start, b)
        if bytes(a) != bytes(b):  # memoryviews are compared element by element
            return False
    return True


def _index_finding(found: Disagreement) -> Finding:
    harmless = "vLLM reads file names from the index and no more; a program that loads by the index"
    if found.kind == "index-stale":
        return warning(
            "files.index-stale", found.name, "stored, or not in the index", f"named for {found.file}, stored nowhere",
            f"{harmless} fails", "write the index again from the files",
        )  # fmt: skip
    if found.kind == "index-other":
        return warning(
            "files.index-other", found.name, "in the file that the index names", f"in {found.file}, the index says {found.other}",
            f"{harmless} fails", "write the index again from the files",
        )  # fmt: skip
    return warning(
        "files.index-lacks", found.name, "in the index too", f"in {found.file} alone",
        f"{harmless} leaves the tensor out", "write the index again from the files, or remove the tensor",
    )  # fmt: skip
