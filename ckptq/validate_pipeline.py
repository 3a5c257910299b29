"""Runs the validators over a diffusion pipeline, component by component, or over a root checkpoint that is a denoiser's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ckptq.checkpoint import Component, Header, Inventory, read_header, read_inventory
from ckptq.console import Advance, Console
from ckptq.errors import UnsupportedError
from ckptq.validate import Stages, Validation, refuse_unfinished
from ckptq.validators import Finding, Stored, error, files, omni, record
from ckptq.validators.formats import Format
from ckptq.validators.grouping import group
from ckptq.validators.omni import int8, pipeline
from ckptq.validators.omni.built import Built
from ckptq.validators.servers import OMNI
from ckptq.validators.vllm_rules import ServerLinear


def examine_pipeline(
    folder: Path,
    *,
    source: Path | None = None,
    values: bool = True,
    passthrough: bool = True,
    staged: bool = False,
    copied: Collection[str] | None = None,
    progress: Console | None = None,
    header: Callable[[Path], Header] = read_header,
) -> Validation:
    """Looks for what is wrong with the pipeline in `folder`, as `validate.examine` does, which has the same options.

    `copied` names tensors as `transformer/x`.
    Raises SourceError for a folder that can't be read, UnsupportedError for one with nothing quantized in it, or with something
    that ckptq does not know.
    """
    refuse_unfinished(folder, staged=staged)
    inventory = read_inventory(folder, header, strict=False)
    stages = Stages(progress or Console(quiet=True))
    nbytes = sum(c.nbytes for c in inventory.components)
    with stages.run("layout", count := sum(len(c.tensors) for c in inventory.components), "tensors") as advance:
        findings, built = _layout(inventory, values, staged=staged)
        advance(count)
    written, odd = record.read_pipeline(folder)
    recorded = bool(written) and any(r.tensors is not None for r in written.values()) and values
    digests: dict[str, dict[str, str]] = {c.folder: {} for c in inventory.components}
    if values:
        with stages.run("values", nbytes, "bytes") as advance:
            for component in inventory.components:
                findings += _values(inventory, component, built.get(component.folder), advance, digests[component.folder])
    findings += odd
    if recorded:
        with stages.run("record", count, "tensors") as advance:
            findings += _record(written, inventory, digests)
            advance(count)
    else:
        findings += _record(written, inventory, None)
    if source is not None and passthrough:
        with stages.run("passthrough", nbytes, "bytes") as advance:
            proved = copied if copied is None else [name for name in copied if _proved(name, written, digests)]
            findings += _passthrough(inventory, source, proved, advance)
    skipped = {
        "kv": "a denoiser has no KV cache",
        "values": "" if values else "left out by --no-values",
        "record": "" if recorded else _unrecorded(written, bool(odd), values),
        "passthrough": "" if source is not None and passthrough else "needs --source SRC",
        "parallel": "not known of diffusion pipelines",
    }
    names = ", ".join(dict.fromkeys(at.denoiser.name for at in built.values())) or "vllm-omni"
    said = {what: why for what, why in skipped.items() if why}
    return Validation(tuple(group(findings)), tuple(stages.ended), said, figures(built), (names, "ckptq"), OMNI)


def _proved(name: str, written: Mapping[str, record.Record], digests: Mapping[str, Mapping[str, str]]) -> bool:
    """Whether a copied tensor still has the digest that was taken of the source's bytes."""
    folder, _, tensor = name.rpartition("/")
    said = written[folder].tensors if folder in written else None
    return said is not None and digests.get(folder, {}).get(tensor, "") == said.get(tensor)


def _unrecorded(written: Mapping[str, record.Record], odd: bool, values: bool) -> str:
    if not written:
        return f"{record.RECORD} can't be read" if odd else f"no {record.RECORD}"
    return "left out by --no-values" if not values else f"no digests in {record.RECORD}"


def _layout(inventory: Inventory, values: bool, *, staged: bool) -> tuple[list[Finding], dict[str, Built]]:
    """(findings without values, {folder: what the server builds quantized}).

    A component that was stored as FP8 for storage is what a job was asked for: of a `staged` one nothing is said.
    """
    findings = [f for f in omni.check_pipeline(inventory) if not (staged and f.code == "layout.omni-storage")]
    built: dict[str, Built] = {}
    for folder, denoiser in pipeline.denoisers_of(inventory).items():
        component = inventory.component(folder)
        section = pipeline.section_in_force(inventory, folder)
        config = {**component.config, "quantization_config": section}
        found, at = omni.examine(folder, Stored(config, None, _specs(component)), denoiser)
        findings += found
        built |= {folder: at} if at is not None else {}
    for component in inventory.components:
        findings += (omni.inside(component.folder, f) for f in files.check_weights(inventory.root, component, values=values))
    if not built and not any(f.severity == "error" for f in findings) and not staged:
        raise UnsupportedError(
            "not a quantized pipeline: no denoiser has a quantization_config or a quantized weight; vLLM-Omni serves it as it is",
            hint="`ckptq convert` quantizes it",
        )
    return findings, built


def _specs(component: Component) -> dict[str, Any]:
    return {name: tensor.spec for name, tensor in component.tensors.items()}


def _values(
    inventory: Inventory, component: Component, at: Built | None, advance: Advance, digests: dict[str, str]
) -> Iterator[Finding]:
    from ckptq.validators import values

    found = [] if at is None else [*int8.check(inventory.root, component, at)]
    linears = [ServerLinear(x.prefix, tuple(names[0] for names in at.units(x)), "layers") for x in at.linears] if at else []
    for finding in (*found, *values.check(inventory.root, component, linears, advance, digests)):
        yield omni.inside(component.folder, finding)


def _record(
    written: Mapping[str, record.Record], inventory: Inventory, digests: Mapping[str, Mapping[str, str]] | None
) -> Iterator[Finding]:
    """The folder against ckptq.json. Without `digests` names alone are compared, and no file of weights is read."""
    there = {c.folder: c for c in inventory.components}
    for folder, said in written.items():
        if folder in there:
            found = record.check(said, inventory.root / folder, there[folder], digests[folder] if digests is not None else None)
            yield from (omni.inside(folder, finding) for finding in found)
        elif not folder and said.files is not None:
            yield from _files(said.files, inventory, weights=digests is not None)
        elif folder:
            yield error(
                "record.file-missing", folder, "the component that the conversion wrote", "absent",
                "vLLM-Omni raises", "convert again, or take it from a copy that you trust",
            )  # fmt: skip


def _files(written: Mapping[str, str], inventory: Inventory, *, weights: bool) -> Iterator[Finding]:
    """What stayed of the pipeline, file by file."""
    there = {*inventory.files}
    for component in inventory.components:
        there |= {f"{component.folder}/{name}" for name in ("config.json", component.index, *component.sidecars)}
        there |= {f"{component.folder}/{name}" for name in component.weight_files} if weights else set()
    large = {f"{c.folder}/{name}" for c in inventory.components for name in c.weight_files}
    yield from record.check_files({n: d for n, d in written.items() if weights or n not in large}, inventory.root, there)


def _passthrough(inventory: Inventory, source: Path, copied: Collection[str] | None, advance: Advance) -> Iterator[Finding]:
    from ckptq.validators.omni import against

    return against.check(inventory, read_inventory(source), advance, copied=copied)


def figures(built: Mapping[str, Built]) -> dict[str, Any] | None:
    """What the server will build quantized, in figures, as `validate.figures` of a language model."""
    if not built:
        return None
    units = ((at.treatment[x.prefix], len(at.units(x))) for at in built.values() for x in at.linears)
    forms = Counter[str]()
    for form, parts in units:
        forms.update({form.name: parts} if isinstance(form, Format) else {})
    count = sum(len(at.units(x)) for at in built.values() for x in at.linears)
    first = next(iter(built.values()))
    return {
        "method": first.section.method,
        "format": first.section.form.name,
        "kv_cache": "auto",
        "linears": dict(forms),
        "kept": count - forms.total(),
    }
