"""Everything between an open journal and a checked, complete model/ folder.

On a GPU the weights are written while the samples run: codes need no activations, only the scales of what flows wait for them. On a
CPU both would want the same processors, so there the samples run first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from ckptq import digest, reuse, routing, validate
from ckptq.calibration import Sample
from ckptq.checkpoint import FLOATS, Reader
from ckptq.console import Advance, Console, size
from ckptq.errors import DataError
from ckptq.finish import in_folder, part_folder, write_files
from ckptq.journal import Journal, ProgressFile
from ckptq.plan import Copy, Observer, Scale, ShardSpec
from ckptq.prepare import Part, Prepared
from ckptq.scopes import Scope
from ckptq.scopes.denoisers import Denoiser
from ckptq.sections import PromptCalibration, of_models
from ckptq.validators import Finding

Table = dict[str, float]
"""{observer: amax}."""
_SOURCES_OWN = ("values.bias-dropped",)
"""Codes of faults that a source has before anything is converted, and that only its values show: of these a conversion warns."""


def produce(
    job: Prepared,
    samples: list[Sample],
    journal: Journal,
    record: dict[str, Any],
    waiting: int,
    console: Console,
    memory: int | None = None,
) -> tuple[Finding, ...]:
    """Calibrates, writes, and checks what is written. Raises DataError where that would not be served right.

    waiting  bytes that samples may hold between decoder layers; `memory` the limit of all, which denoisers calibrate under
    """
    device = record["device"]
    if job.calibrates and not isinstance(job.parts[0].scope, Scope):
        _calibrate_denoisers(job, samples, journal, device, console, memory)
    tables: dict[str, Table] = {}
    digests: dict[str, dict[str, str]] = {}
    for part in job.parts:
        with Reader(job.source.root, part.component) as reader:
            table = _known(job, part, journal)
            if table is None and at_once(device):
                table, written = _calibrate_and_write(job, part, samples, journal, reader, device, waiting, console)
            else:
                if table is None:
                    table = _calibrate(job, part, samples, journal, reader, device, waiting, console)
                with console.stage(_named("write", part), part.component.nbytes, "bytes") as advance:
                    written = _write(part, journal, reader, table, device, advance)
        if job.reused is not None:
            reuse.refuse_other_weights(job.reused, part.folder, table)
        tables[part.folder], digests[part.folder] = table, written
    if told := routing.warning(journal.load("experts") or {}, all_experts=getattr(job.recipe.calibration, "all_experts", False)):
        console.warn(told)
    write_files(job, journal, record, tables, digests, console)
    return _checked(job, journal, console)


def _checked(job: Prepared, journal: Journal, console: Console) -> tuple[Finding, ...]:
    scope = job.parts[0].scope
    found = validate.examine(
        journal.model,
        source=job.source.root if job.recipe.validation.passthrough else None,
        values=job.recipe.validation.values,
        staged=True,
        copied=[in_folder(part.folder, op.output.name) for part in job.parts for op in part.plan.ops if isinstance(op, Copy)],
        progress=console,
        scope=scope if isinstance(scope, Scope) else None,
    )
    findings = tuple(dataclasses.replace(f, severity="warning") if f.code in _SOURCES_OWN else f for f in found.findings)
    if errors := [f for f in findings if f.severity == "error"]:
        raise DataError(
            f"the output failed validation and was not published:\n{listed(errors)}",
            hint="mend the source where the fault is its own; otherwise please report this with the recipe",
        )
    return findings


def _named(stage: str, part: Part) -> str:
    return f"{stage} {part.folder}".rstrip()


def _key(part: Part, stage: str) -> str:
    """What the journal calls a part's table."""
    return f"{part.folder}--{stage}" if part.folder else stage


def at_once(device: str) -> bool:
    """Whether samples run on other processors than those that read and write."""
    return device != "cpu"


def listed(findings: Sequence[Finding]) -> str:
    """Findings as lines of an error."""
    return "\n".join(
        f"  - {f.code}: {f.subject}: expected {f.expected}, found {f.found}\n    {f.effect}; {f.mend}" for f in findings
    )


def _known(job: Prepared, part: Part, journal: Journal) -> Table | None:
    """Amaxes of inputs, K and V that need no calibration: none at all, those of --amax, or of an earlier run of this job."""
    if not part.plan.calibrated:
        return {}
    return journal.load(_key(part, "activations")) if job.reused is None else job.reused.table(part.folder, part.plan)


def _calibrate_denoisers(
    job: Prepared, samples: list[Sample], journal: Journal, device: str, console: Console, memory: int | None
) -> None:
    """All denoisers of the pipeline together, since they share its steps: Wan 2.2 has two, each for some of them."""
    import torch

    from ckptq.denoise import DenoiserPart, measure

    wanted = [part for part in job.parts if part.plan.calibrated]
    if all(journal.load(_key(part, "activations")) is not None for part in wanted):
        return
    parts = []
    with ExitStack() as readers:
        for part in wanted:
            assert isinstance(part.scope, Denoiser)
            component = job.inventory.component(part.folder)
            reader = readers.enter_context(Reader(job.source.root, component))
            observers = tuple(o for o in part.plan.observers if o.kind == "input")
            parts.append(DenoiserPart(component, part.scope, observers, reader))
        settings = job.recipe.calibration
        assert isinstance(settings, PromptCalibration)
        found = measure(
            job.source.root,
            parts,
            settings,
            torch.device(device),
            console,
            memory=memory,
            samples=samples,
            inventory=job.inventory,
        )
    for part in wanted:
        journal.save(_key(part, "activations"), found[part.folder])


def _calibrate_and_write(
    job: Prepared, part: Part, samples: list[Sample], journal: Journal, reader: Reader, device: str, waiting: int, console: Console
) -> tuple[Table, dict[str, str]]:
    """Both at once. What fails in one ends the other."""
    table: Table = {}
    tally = _Tally()
    calibrated: Future[Table] = Future()

    def activations() -> Mapping[Observer, float]:
        found = calibrated.result()
        return {o: found[o.name] for o in part.plan.observers if o.kind != "weight"}

    def watch() -> None:
        if writer.done():
            writer.result()

    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(_write, part, journal, reader, table, device, tally.advance, activations)
        try:
            found = _calibrate(job, part, samples, journal, reader, device, waiting, console, watch)
            calibrated.set_result(found)
            total = part.component.nbytes
            console.note(f"write: {size(tally.done)} of {size(total)} while the samples ran")
            with console.stage("write", total - tally.done, "bytes") as advance:
                tally.show(advance)
                digests = writer.result()
        except BaseException as error:
            tally.stop()
            if not calibrated.done():
                calibrated.set_exception(error)
            raise
    return found | table, digests


class _Tally:
    """Counts what another thread has done, shows it once there is a bar, and can stop that thread."""

    def __init__(self) -> None:
        self.done = 0
        self._shown: Advance | None = None
        self._stopped = False

    def advance(self, count: int) -> None:
        """Called by the other thread. Raises CancelledError in it after `stop`."""
        if self._stopped:
            raise CancelledError
        self.done += count
        if self._shown is not None:
            self._shown(count)

    def show(self, advance: Advance) -> None:
        self._shown = advance

    def stop(self) -> None:
        self._stopped = True


def _write(
    part: Part,
    journal: Journal,
    reader: Reader,
    table: Table,
    device: str,
    advance: Advance,
    activations: Callable[[], Mapping[Observer, float]] | None = None,
) -> dict[str, str]:
    """All weight files, less those that an interrupted run has finished. Returns the digests of the tensors in them.

    table        what is known of amaxes; gains those of the weights that calibration has not measured
    activations  those of inputs, K and V where they are not in the table: asked for when all else is written
    """
    from ckptq.pipeline import write_shards

    component, plan, folder = part.component, part.plan, part_folder(part, journal)
    amax = {o: table[o.name] for o in plan.observers if o.name in table}
    digests: dict[str, str] = {}

    def finished(shard: ShardSpec, found: Mapping[str, str]) -> None:
        journal.save(_key(part, shard.file), found)
        digests.update(found)

    kept = [shard for shard in plan.shards if (folder / shard.file).is_file()]
    for shard in kept:  # a kill may have struck between the file and its digests
        digests |= journal.load(_key(part, shard.file)) or digest.of_shard(folder / shard.file)
        advance(sum(component.tensors[op.source].spec.nbytes for op in shard.ops if not isinstance(op, Scale)))
    left = [shard for shard in plan.shards if shard not in kept]
    write_shards(folder, plan, left, component, reader, amax, finished, advance, activations=activations, device=device)
    table |= {o.name: value for o, value in amax.items()}
    return digests


def _calibrate(
    job: Prepared,
    part: Part,
    samples: list[Sample],
    journal: Journal,
    reader: Reader,
    device: str,
    waiting: int,
    console: Console,
    watch: Callable[[], None] | None = None,
) -> Table:
    """Amaxes by calibration. `watch` looks after who writes meanwhile; without it the weights that no sample meets are checked."""
    import torch

    from ckptq.calibrate import calibrate
    from ckptq.calibration.encode import Encoder
    from ckptq.encode import Bench, measure
    from ckptq.streamed import StreamedModel

    settings = of_models(job.recipe.calibration)
    component = part.component
    assert isinstance(part.scope, Scope)
    folder = job.source.root / component.folder
    encoder = Encoder(folder, getattr(settings, "max_pixels", None), settings.sequence_length)
    streamed = StreamedModel(job.source.root, component, part.scope, reader, torch.device(device), ahead=job.cost.ahead)
    unused = [t for t in streamed.unused if t.spec.dtype in FLOATS] if watch is None else ()
    for source in unused:  # what is odd must be known before hours of calibration
        measure(source, reader, range(source.spec.numel), Bench(torch.device("cpu")))
    tokens: dict[str, list[int]] = {}
    table = calibrate(
        streamed,
        part.plan.observers,
        [sample.name for sample in samples],
        lambda number: encoder.encode(samples[number]),
        waiting,
        ProgressFile(journal.staging / "calibration.safetensors", settings.save_every),
        console,
        watch or (lambda: None),
        all_experts=settings.all_experts,
        tokens=tokens,
    )
    if tokens:
        journal.save("experts", tokens)
    named = {observer.name: value for observer, value in table.items()}
    journal.save("activations", named)
    return named
