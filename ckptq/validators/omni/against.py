"""A pipeline against its source: what stayed is the same file by file, and what was quantized still says the same."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from ckptq import digest
from ckptq.checkpoint import Component, Inventory
from ckptq.errors import SourceError
from ckptq.folder import open_regular, printable
from ckptq.join import join
from ckptq.quantized import dense_if_fp8
from ckptq.scopes.denoisers import Denoiser
from ckptq.validators import Code, Finding, error, passthrough, record, sidecars, warning
from ckptq.validators.omni.pipeline import class_of, denoisers_of

CODES = {
    "passthrough.component": Code("a component of the source is not in the output, or the other way round"),
    "passthrough.file": Code("a file of what stays of a pipeline is absent, or not the source's byte for byte"),
}
CHUNK, SPOTS = 1 << 20, 64
"""Bytes compared at a time, and of a file that was copied a moment ago how many such pieces."""
GENERATED = ("ckptq.json", "hf_quant_config.json")


def check(
    output: Inventory, source: Inventory, advance: Callable[[int], None], *, copied: Collection[str] | None = None
) -> Iterator[Finding]:
    """All findings against the source. `advance` is told the bytes of the output's components.

    copied  tensors, as `transformer/x`, that a job has copied, and a digest says so; given, of all else large a sample is compared
    """
    if class_of(output) != class_of(source):
        yield error(
            "passthrough.source", "model_index.json", "the pipeline that --source names",
            f"{class_of(output)}, there {class_of(source)}", "nothing further was compared",
            "name the pipeline that it was made from",
        )  # fmt: skip
        return
    theirs = {c.folder: c for c in source.components}
    dense = {c.folder: c for c in dense_if_fp8(source).components}
    found, again = denoisers_of(output), _dequantized(record.body(output.root))
    for component in output.components:
        if component.folder not in theirs:
            yield _other(component.folder, "not in the source")
        elif component.folder not in again and _as_stored(component, theirs[component.folder]):
            yield from _same(output.root, component, source.root, theirs[component.folder], sample=copied is not None)
            advance(component.nbytes)
        else:
            at = (source.root, dense[component.folder])
            yield from _converted((output.root, component), at, found.get(component.folder), advance, copied)
    yield from (_other(folder, "not in the output") for folder in theirs if folder not in {c.folder for c in output.components})
    yield from _files(output.root, source.root, source.files, there={*output.files}, sample=copied is not None)


def _other(folder: str, what: str) -> Finding:
    return error(
        "passthrough.component", folder, "the source's components", what, "this is another pipeline, or a part of it is gone",
        "convert again, or name the source that it was made from",
    )  # fmt: skip


def _dequantized(body: Any) -> set[str]:
    """Folders of components that were dequantized on the way and coded anew, by a ckptq.json: to the same form, it may be."""
    parts = body.get("components", {"": body}) if isinstance(body, dict) else {}
    items = parts.items() if isinstance(parts, dict) else ()
    return {folder for folder, part in items if isinstance(part, dict) and part.get("dequantized")}


def _as_stored(ours: Component, theirs: Component) -> bool:
    """Whether nothing was converted in it: its tensors have the source's names and dtypes."""
    mine = {(t.spec.name, t.spec.dtype) for t in ours.tensors.values()}
    return mine == {(t.spec.name, t.spec.dtype) for t in theirs.tensors.values()}


def _converted(
    output: tuple[Path, Component],
    source: tuple[Path, Component],
    denoiser: Denoiser | None,
    advance: Callable[[int], None],
    copied: Collection[str] | None,
) -> Iterator[Finding]:
    (root, ours), (origin, theirs) = output, source
    folder = f"{ours.folder}/" if ours.folder else ""
    if denoiser is not None and any(f".{whole}.weight" in name for name in ours.tensors for whole in denoiser.joined):
        theirs = join(theirs, denoiser)
    sample = copied is not None
    findings = [*sidecars.check_config(ours.config, theirs.config)]
    called = _called(theirs, denoiser)
    proved = [name.removeprefix(folder) for name in copied or () if name.startswith(folder)]
    findings += passthrough.check_component(output, (origin, theirs), called, advance, sample=sample, proved=proved)
    for finding in findings:
        yield _inside(folder, finding)
    names = [f"{folder}{name}" for name in theirs.sidecars]
    yield from _files(root, origin, names, there={f"{folder}{name}" for name in ours.sidecars}, sample=sample)


def _inside(folder: str, finding: Finding) -> Finding:
    from dataclasses import replace

    return replace(finding, subject=f"{folder}{finding.subject}")


def _called(theirs: Component, denoiser: Denoiser | None) -> Callable[[str], str]:
    """Turns a name that the server's adapter wants into the source's."""
    renamed = denoiser.renamed if denoiser is not None else {}

    def called(name: str) -> str:
        if name not in theirs.tensors:
            for old, new in renamed.items():
                name = f".{name}.".replace(f".{new}.", f".{old}.")[1:-1]
        return name

    return called


def _same(root: Path, ours: Component, origin: Path, theirs: Component, *, sample: bool) -> Iterator[Finding]:
    """A component that stayed, file by file; where weights differ, tensor by tensor."""
    folder = f"{ours.folder}/" if ours.folder else ""
    weights = [*theirs.weight_files, *([theirs.index] if theirs.indexed else [])]
    there = {*ours.weight_files, *([ours.index] if ours.indexed else [])}
    odd = [name for name in weights if name not in there or not _equal(root, origin, f"{folder}{name}", sample)]
    if odd:
        findings = list(passthrough.check_component((root, ours), (origin, theirs)))
        yield from (_inside(folder, f) for f in findings)
        if not findings:
            yield from (_changed(f"{folder}{name}", "the same tensors in other files") for name in odd[:1])
    names = [f"{folder}{name}" for name in ("config.json", *theirs.sidecars)]
    yield from _files(root, origin, names, there={f"{folder}{n}" for n in ("config.json", *ours.sidecars)}, sample=sample)


def _files(root: Path, origin: Path, names: Collection[str], *, there: Collection[str], sample: bool) -> Iterator[Finding]:
    for name in names:
        if name.rpartition("/")[2] in GENERATED or digest.is_document(name):
            continue
        if name not in there:
            yield error(
                "passthrough.file", printable(name), "the source's file", "absent",
                "whoever loads the pipeline does without it, or does not start", "copy it from the source",
            )  # fmt: skip
        elif not _equal(root, origin, name, sample):
            yield _changed(name, "another content")


def _changed(name: str, found: str) -> Finding:
    return warning(
        "passthrough.file", name, "the source's file, byte for byte", found, "whoever loads the pipeline goes by the new content",
        "copy it from the source",
    )  # fmt: skip


def _equal(root: Path, origin: Path, name: str, sample: bool) -> bool:
    """Byte for byte; of a `sample` some pieces alone. Raises SourceError for a file that can't be read."""
    one = two = -1
    try:
        one, two = open_regular(root / name), open_regular(origin / name)
        nbytes = os.fstat(one).st_size
        if nbytes != os.fstat(two).st_size:
            return False
        places = range(0, nbytes, CHUNK)
        if sample and len(places) > SPOTS:
            places = range(0, nbytes, nbytes // SPOTS)
        return all(os.pread(one, CHUNK, at) == os.pread(two, CHUNK, at) for at in places)
    except OSError as problem:
        raise SourceError(f"{printable(name)}: can't be read: {problem.strerror}") from problem
    finally:
        for fd in (one, two):
            if fd >= 0:
                os.close(fd)
