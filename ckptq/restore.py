"""`ckptq restore`: a checkpoint of FP8 weights turned back into a plain BF16 one, which everything loads.

The plan copies every tensor of the source as `quantized.dense` sees it. Weights are code * scale, rounded once to BF16: as near to
the original as the format is. Components that are not quantized are copied byte for byte.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ckptq import __version__, cost, hub, quantized
from ckptq.assemble import sealed
from ckptq.checkpoint import PIPELINE, Component, Inventory, Reader, fingerprint, read_inventory
from ckptq.console import Console, size
from ckptq.errors import DataError, RecipeError, SourceError
from ckptq.journal import Journal
from ckptq.plan import Copy, Plan
from ckptq.prepare import files_of
from ckptq.scopes import all_scopes
from ckptq.shards import fill_files, index_text
from ckptq.writer import copy_file, sync_folder, write_text

SHARD_SIZE = 5_000_000_000


@dataclass(frozen=True, slots=True)
class Restoration:
    """A restoration that has been planned, before any weight is read.

    inventory  the checkpoint as its BF16 self
    plans      {folder of a component: what is written of it}
    copied     files that stay as they are, relative to the root
    notes      what else a reader of the output must know
    """

    label: str
    source: hub.Source
    inventory: Inventory
    plans: Mapping[str, Plan]
    copied: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def components(self) -> tuple[Component, ...]:
        """Those that are restored."""
        return tuple(c for c in self.inventory.components if c.folder in self.plans)

    @property
    def nbytes(self) -> int:
        """Of the weights that are written."""
        return sum(plan.nbytes for plan in self.plans.values())

    @property
    def output_bytes(self) -> int:
        """What the output takes, without small files."""
        return self.nbytes + sum(c.stored_bytes for c in self.inventory.components if c.folder not in self.plans)


@dataclass(frozen=True, slots=True)
class Restored:
    """What a finished run did. Sizes are in bytes, times in seconds."""

    output: Path
    weights: Mapping[str, int]
    source_bytes: int
    output_bytes: int
    seconds: dict[str, float]
    peak_rss: int


def prepare(checkpoint: str, shard_size: int = SHARD_SIZE) -> Restoration:
    """Reads headers and plans. Of a Hub source's weights nothing else is fetched yet.

    Raises RecipeError for a checkpoint that is not quantized, UnsupportedError for one whose codes are not FP8.
    """
    source = hub.fetch(checkpoint, weights=False)
    stored = read_inventory(source.root, source.header)
    if not any(quantized.describe(component) for component in stored.components):
        raise RecipeError(f"{checkpoint}: is not quantized, so there is nothing to restore", hint="use it as it is")
    inventory = quantized.dense(stored)
    plans = {c.folder: plan_restore(c, shard_size) for c in inventory.components if c.dequantized}
    files = (name for c in inventory.components if not c.dequantized for name in files_of(c))
    notes = tuple(_notes(inventory))
    return Restoration(checkpoint, source, inventory, MappingProxyType(plans), (*files, *inventory.files), notes)


def _notes(inventory: Inventory) -> Iterator[str]:
    said = inventory.main.config.get("architectures")
    names = said if isinstance(said, list) else []
    if any(s.experts and s.experts.stored and set(s.architectures) & set(names) for s in all_scopes()):
        yield "routed experts stay one by one: the original has a layer's in one tensor, and transformers reads no other form"


def plan_restore(component: Component, shard_size: int) -> Plan:
    """The plan that writes a component as `quantized.dense` sees it."""
    found = sorted(component.tensors.values(), key=lambda t: (t.file, t.offset))
    shards = tuple(fill_files([(Copy(t.spec.name, t.spec),) for t in found], shard_size, component.stem))
    files = {"config.json": component.config_text}
    if len(shards) > 1:
        files[component.index] = index_text(shards)
    return sealed(
        Plan(
            digest="",
            shards=shards,
            decisions=(),
            observers=(),
            files=MappingProxyType(files),
            config_changes=tuple(done for done in component.dequantized if "config.json" in done),
            sidecars=component.sidecars,
            left_out=component.left_out,
            layer_count=0,
        )
    )


def restore(job: Restoration, output: Path, console: Console, *, resume: bool = False) -> Restored:
    """Writes the BF16 checkpoint. Raises a CkptqError; the files that were finished until then stay for `resume`."""
    journal = Journal(output, "config.json" if job.inventory.pipeline is None else PIPELINE)
    journal.refuse_existing(resume=resume)
    for note in job.notes:
        console.note(note)
    cost.check_space(output, job.output_bytes - journal.written_bytes())
    if job.source.label is not None:
        job = dataclasses.replace(job, source=hub.fetch(job.source.label, weights=True))  # it pins the commit that was planned
    if journal.open(_record(job), resume=resume):
        try:
            if not journal.publishing:
                _write(job, journal, console)
            journal.publish(_last(job))
        except (DataError, SourceError):
            journal.forget_start()  # the input is at fault: mended, it is another job
            raise
        finally:
            journal.release()
    return Restored(
        output=output,
        weights={c.folder: _weights(c) for c in job.components},
        source_bytes=sum(c.stored_bytes for c in job.inventory.components),
        output_bytes=job.output_bytes,
        seconds=dict(console.seconds),
        peak_rss=cost.peak_rss(),
    )


def _record(job: Restoration) -> dict[str, Any]:
    """What makes two runs the same job: see job.py."""
    return {
        "restore": {folder: plan.digest for folder, plan in job.plans.items()},
        "source": job.source.label or "local folder",
        "source_fingerprints": {c.folder: fingerprint(job.source.root, c) for c in job.inventory.components},
        "version": __version__,
    }


def _last(job: Restoration) -> tuple[str, ...]:
    """Published after everything else, in this order: what makes a folder a checkpoint."""
    folders = [f"{folder}/" if folder else "" for folder in job.plans]
    indexes = [f"{folder}{c.index}" for folder, c in zip(folders, job.components, strict=True)]
    return (*indexes, *(f"{folder}config.json" for folder in folders), PIPELINE)


def _write(job: Restoration, journal: Journal, console: Console) -> None:
    from ckptq.pipeline import write_shards

    with console.stage("write", job.nbytes, "bytes") as advance:
        for component in job.components:
            folder, plan = journal.model / component.folder, job.plans[component.folder]
            folder.mkdir(parents=True, exist_ok=True)
            left = [shard for shard in plan.shards if not (folder / shard.file).is_file()]
            advance(sum(shard.data_bytes for shard in plan.shards if shard not in left))
            with Reader(job.source.root, component) as reader:
                write_shards(folder, plan, left, component, reader, {}, lambda shard, digests: None, advance)
            for name in plan.sidecars:
                copy_file(job.source.root / component.folder / name, folder / name)
            for name, text in plan.files.items():
                write_text(folder / name, text)
            sync_folder(folder)
    for name in job.copied:
        copy_file(job.source.root / name, journal.model / name)
    sync_folder(journal.model)
    _check(job, journal.model)


def _check(job: Restoration, model: Path) -> None:
    """Raises AssertionError where what is written is not what was planned."""
    written = {c.folder: c for c in read_inventory(model).components}
    for component in job.inventory.components:
        found = {name: tensor.spec for name, tensor in written[component.folder].tensors.items()}
        if found != {name: tensor.spec for name, tensor in component.tensors.items()} or quantized.describe(
            written[component.folder]
        ):
            raise AssertionError(f"{component.folder}: what was written is not what was planned")


def _weights(component: Component) -> int:
    return sum(tensor.codes is not None for tensor in component.tensors.values())


def plan_data(job: Restoration) -> dict[str, Any]:
    """What is planned, for --dry-run."""
    parts = {
        c.folder: {
            "weights": _weights(c),
            "changes": list(c.dequantized),
            "shards": [shard.file for shard in job.plans[c.folder].shards],
            "output_bytes": job.plans[c.folder].nbytes,
        }
        for c in job.components
    }
    kept = [c.folder for c in job.inventory.components if c.folder not in job.plans]
    return {"restored": parts, "kept": kept, "copied": list(job.copied), "notes": list(job.notes), "output_bytes": job.output_bytes}


def show_plan(console: Console, job: Restoration) -> None:
    """The same as tables."""
    rows = [(c.folder or "the model", "; ".join(c.dequantized), size(job.plans[c.folder].nbytes)) for c in job.components]
    rows += [(c.folder, "copied as it is", size(c.stored_bytes)) for c in job.inventory.components if c.folder not in job.plans]
    console.table(f"Plan for {job.label}", ("component", "what is done", "size"), rows, right=(2,))
    for note in job.notes:
        console.show(note)


def report_data(report: Restored) -> dict[str, Any]:
    """What was done, as JSON."""
    return {**dataclasses.asdict(report), "output": str(report.output), "weights": dict(report.weights)}


def show_report(console: Console, report: Restored) -> None:
    """The same as text."""
    count = sum(report.weights.values())
    times = math.ceil(report.output_bytes / max(report.source_bytes, 1) * 100) / 100
    console.show(f"{report.output}: {count} weights are BF16 again; {size(report.output_bytes)}, {times:.2f} times the source's")
    console.show(f"peak memory {size(report.peak_rss)}")
