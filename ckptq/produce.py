"""Everything between an open journal and a checked, complete model/ folder.

On a GPU the weights are written while the samples run: codes need no activations, only the scales of what flows wait for them. On a
CPU both would want the same processors, so there the samples run first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ckptq import digest, reuse, routing, validate
from ckptq.calibration import Sample
from ckptq.checkpoint import FLOATS, Reader
from ckptq.console import Advance, Console, size
from ckptq.errors import DataError
from ckptq.journal import RECORD, Journal, ProgressFile
from ckptq.plan import Copy, Observer, Scale, ShardSpec
from ckptq.validators import Finding
from ckptq.writer import copy_file, sync_folder, write_text

if TYPE_CHECKING:
    from ckptq.convert import Prepared

Table = dict[str, float]
"""{observer: amax}."""


def produce(
    job: Prepared, samples: list[Sample], journal: Journal, record: dict[str, Any], waiting: int, console: Console
) -> tuple[Finding, ...]:
    """Calibrates, writes, and checks what is written. Raises DataError where that would not be served right."""
    device = record["device"]
    with Reader(job.source.root, job.inventory.main) as reader:
        table = _known(job, journal)
        if table is None and at_once(device):
            table, digests = _calibrate_and_write(job, samples, journal, reader, device, waiting, console)
        else:
            if table is None:
                table = _calibrate(job, samples, journal, reader, device, waiting, console)
            with console.stage("write", job.inventory.main.nbytes, "bytes") as advance:
                digests = _write(job, journal, reader, table, device, advance)
    if told := routing.warning(journal.load("experts") or {}, all_experts=job.recipe.calibration.all_experts):
        console.warn(told)
    if job.reused is not None:
        reuse.refuse_other_weights(job.reused, table)
    _write_files(job, journal, record, table, digests)
    source = job.source.root if job.recipe.validation.passthrough else None
    copied = [op.output.name for op in job.plan.ops if isinstance(op, Copy)]
    values = job.recipe.validation.values
    found = validate.examine(
        journal.model, source=source, values=values, staged=True, copied=copied, progress=console, scope=job.scope
    )
    if errors := [f for f in found.findings if f.severity == "error"]:
        raise DataError(
            f"the output failed validation and was not published:\n{listed(errors)}",
            hint="please report this with the recipe",
        )
    return found.findings


def at_once(device: str) -> bool:
    """Whether samples run on other processors than those that read and write."""
    return device != "cpu"


def listed(findings: Sequence[Finding]) -> str:
    """Findings as lines of an error."""
    return "\n".join(
        f"  - {f.code}: {f.subject}: expected {f.expected}, found {f.found}\n    {f.effect}; {f.mend}" for f in findings
    )


def _known(job: Prepared, journal: Journal) -> Table | None:
    """Amaxes of inputs, K and V that need no calibration: none at all, those of --amax, or of an earlier run of this job."""
    if not job.plan.calibrated:
        return {}
    return journal.load("activations") if job.reused is None else job.reused.table(job.plan)


def _calibrate_and_write(
    job: Prepared, samples: list[Sample], journal: Journal, reader: Reader, device: str, waiting: int, console: Console
) -> tuple[Table, dict[str, str]]:
    """Both at once. What fails in one ends the other."""
    table: Table = {}
    tally = _Tally()
    calibrated: Future[Table] = Future()

    def activations() -> Mapping[Observer, float]:
        found = calibrated.result()
        return {o: found[o.name] for o in job.plan.observers if o.kind != "weight"}

    def watch() -> None:
        if writing.done():
            writing.result()

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(_write, job, journal, reader, table, device, tally.advance, activations)
        try:
            found = _calibrate(job, samples, journal, reader, device, waiting, console, watch)
            calibrated.set_result(found)
            total = job.inventory.main.nbytes
            console.note(f"write: {size(tally.done)} of {size(total)} while the samples ran")
            with console.stage("write", total - tally.done, "bytes") as advance:
                tally.show(advance)
                digests = writing.result()
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
    job: Prepared,
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

    component, plan = job.inventory.main, job.plan
    amax = {o: table[o.name] for o in plan.observers if o.name in table}
    digests: dict[str, str] = {}

    def finished(shard: ShardSpec, found: Mapping[str, str]) -> None:
        journal.save(shard.file, found)
        digests.update(found)

    kept = [shard for shard in plan.shards if (journal.model / shard.file).is_file()]
    for shard in kept:  # a kill may have struck between the file and its digests
        digests |= journal.load(shard.file) or digest.of_shard(journal.model / shard.file)
        advance(sum(component.tensors[op.source].spec.nbytes for op in shard.ops if not isinstance(op, Scale)))
    left = [shard for shard in plan.shards if shard not in kept]
    write_shards(journal.model, plan, left, component, reader, amax, finished, advance, activations=activations, device=device)
    table |= {o.name: value for o, value in amax.items()}
    return digests


def _calibrate(
    job: Prepared,
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

    settings = job.recipe.calibration
    component = job.inventory.main
    folder = job.source.root / component.folder
    encoder = Encoder(folder, getattr(settings, "max_pixels", None), settings.sequence_length)
    streamed = StreamedModel(job.source.root, component, job.scope, reader, torch.device(device), ahead=job.cost.ahead)
    unused = [t for t in streamed.unused if t.spec.dtype in FLOATS] if watch is None else ()
    for source in unused:  # what is odd must be known before hours of calibration
        measure(source, reader, range(source.spec.numel), Bench(torch.device("cpu")))
    tokens: dict[str, list[int]] = {}
    table = calibrate(
        streamed,
        job.plan.observers,
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


def _write_files(job: Prepared, journal: Journal, record: dict[str, Any], table: dict[str, float], digests: dict[str, str]) -> None:
    """Sidecars, the generated configs and index, and ckptq.json."""
    base = job.source.root / job.inventory.main.folder
    for name in job.plan.sidecars:
        copy_file(base / name, journal.model / name)
    for name, text in job.plan.files.items():
        write_text(journal.model / name, text)
    body = {
        "job": record,
        "amax": {o.name: table[o.name] for o in job.plan.observers},
        **({"experts": routing.recorded(tokens)} if (tokens := journal.load("experts")) else {}),
        "decisions": [asdict(d) for d in job.plan.decisions],
        "carried": list(job.plan.carried),
        "dequantized": list(job.inventory.main.dequantized),
        "config_changes": list(job.plan.config_changes),
        "digests": {
            "tensors": dict(sorted(digests.items())),
            "files": digest.of_files(journal.model, digest.recorded([*job.plan.sidecars, *job.plan.files])),
        },
    }
    write_text(journal.model / RECORD, json.dumps(body, indent=1) + "\n")
    sync_folder(journal.model)
