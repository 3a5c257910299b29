"""The one loop: plan -> validate the plan -> amax -> encode -> write -> validate the output -> publish."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ckptq import cost, hub, reuse, routing, validate
from ckptq.calibration import load_samples
from ckptq.checkpoint import INDEX, PIPELINE
from ckptq.console import Console
from ckptq.errors import CalibrationError, DataError, OutputError, RecipeError, SourceError, UnsupportedError
from ckptq.exporters import find_exporter
from ckptq.job import job_record
from ckptq.journal import RECORD, Journal, refuse_inside
from ckptq.prepare import Prepared as Prepared
from ckptq.prepare import prepare as prepare
from ckptq.produce import listed, produce
from ckptq.scopes import Scope
from ckptq.scopes.denoisers import Denoiser
from ckptq.validators import Finding

LAST = (RECORD, INDEX, "hf_quant_config.json", "config.json", PIPELINE)
"""Published after everything else, in this order: the last of them that there is makes a folder a checkpoint."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a finished run did. Sizes are in bytes, times in seconds.

    carried  see Plan
    notes    who reads the output, and what else its user should know
    serve    the command that serves it; "" where no server reads what was converted
    """

    output: Path
    format: str
    source_bytes: int
    output_bytes: int
    seconds: dict[str, float]
    peak_rss: int
    peak_gpu: int
    tensors: dict[str, int]
    findings: tuple[Finding, ...]
    carried: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    serve: str = ""


def convert(job: Prepared, *, resume: bool, device: str, memory: int | None, console: Console) -> Report:
    """Runs a prepared job to the published output. Raises a CkptqError; what was done until then stays for `resume`."""
    if job.recipe.output is None:
        raise RecipeError("the recipe names no output", hint="add `output:` to it, or give --output OUT")
    if errors := [f for f in job.findings if f.severity == "error"]:
        raise DataError(
            f"the planned output would not be served right:\n{listed(errors)}",
            hint="nothing was computed or written; mend the source or the recipe",
        )
    for finding in job.findings:
        console.warn(f"of the planned output: {finding.code}: {finding.subject}: {finding.found}: {finding.effect}")
    if getattr(job.recipe.calibration, "all_experts", False) and (idle := routing.idle(part.scope for part in job.parts)):
        console.warn(idle)
    output = Path(job.recipe.output)
    refuse_inside(output, job.source.root)
    if job.reused is not None and not job.calibrated:
        console.note(f"--amax {job.reused.path} is not used: the recipe needs no calibration")
    elif job.reused is not None and "calibration" in job.recipe.model_fields_set:
        console.note(f"the recipe's calibration is not used: the amaxes are those in {job.reused.path}")
    samples = load_samples(job.recipe.calibration) if job.calibrates else []
    if len(samples) < job.recipe.calibration.samples and job.calibrates:
        console.warn(f"calibration has {len(samples)} of the {job.recipe.calibration.samples} samples that the recipe asks for")
    journal = Journal(output, "config.json" if job.inventory.pipeline is None else PIPELINE)
    journal.refuse_existing(resume=resume)
    cost.check_space(output, job.output_bytes - journal.written_bytes())
    device = resolve_device(device)
    job, waiting = _fit(job, memory, device) if job.calibrates and job.cost.samples else (job, 0)
    if job.source.label is not None:  # all that is cheap to check has been checked; the label pins the commit that was planned
        job = dataclasses.replace(job, source=hub.fetch(job.source.label, weights=True))
    record = job_record(job, samples, device)
    if job.reused is not None:
        reuse.refuse_other_source(job.reused, record)
    if journal.open(record, resume=resume):
        try:
            findings = None if journal.publishing else produce(job, samples, journal, record, waiting, console, memory)
            journal.publish(LAST)
        except (CalibrationError, DataError, RecipeError, SourceError, UnsupportedError):
            journal.forget_start()  # the input is at fault: mended, it is another job
            raise
        finally:
            journal.release()
    else:
        findings = None
    if findings is None:  # an earlier run had checked and begun to publish
        scope = job.parts[0].scope
        findings = validate.examine(output, progress=console, scope=scope if isinstance(scope, Scope) else None).findings
    return _report(job, output, findings, console)


def _fit(job: Prepared, memory: int | None, device: str) -> tuple[Prepared, int]:
    """(the job with a cost that fits, what waiting samples may hold) on the device that calibrates."""
    if device == "cpu":
        free, imports = cost.available_memory(), cost.IMPORTS
    else:
        import torch

        free, imports = torch.cuda.mem_get_info(device)[0], cost.GPU_WRITER
    needs = cost.fitting(job.cost, memory, free, imports)
    return dataclasses.replace(job, cost=needs), cost.waiting_budget(needs, memory, free, imports)


def resolve_device(device: str) -> str:
    """`auto` -> "cuda:0" where there is one, else "cpu". Raises OutputError for a device that is not there."""
    import torch

    if device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = "cuda:0"
    kind, _, number = device.partition(":")
    if kind == "cpu" and not number:
        return device
    if kind != "cuda" or not number.isdigit() or int(number) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise OutputError(f"--device {device}: no such device; there are {found} CUDA devices", hint="use auto, cpu or cuda:N")
    return device


def _report(job: Prepared, output: Path, findings: tuple[Finding, ...], console: Console) -> Report:
    import torch

    kinds: dict[str, int] = {}
    for spec in (spec for part in job.parts for spec in part.plan.tensors.values()):
        kinds[spec.dtype] = kinds.get(spec.dtype, 0) + 1
    return Report(
        output=output,
        format=job.recipe.export.format,
        source_bytes=sum(component.stored_bytes for component in job.inventory.components),
        output_bytes=job.output_bytes,
        seconds=dict(console.seconds),
        peak_rss=cost.peak_rss(),
        peak_gpu=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        tensors=dict(sorted(kinds.items())),
        findings=findings,
        carried=tuple(name for part in job.parts for name in part.plan.carried),
        notes=tuple(_notes(job)),
        serve=_serve(job, output),
    )


_DENOISERS = {name: find_exporter(name).READERS for name in ("int8", "mxfp8", "mxfp4-dualscale")}


def _notes(job: Prepared) -> Iterator[str]:
    scopes = [part.scope for part in job.parts]
    if any(isinstance(scope, Scope) for scope in scopes):
        yield find_exporter(job.recipe.export.format).READERS
    for part in job.parts:
        if isinstance(part.scope, Denoiser):
            names = f"; {len(part.plan.renamed)} tensors have the server's names" if part.plan.renamed else ""
            reads = _DENOISERS.get(job.recipe.export.format, "vLLM-Omni reads it; diffusers' from_pretrained does not")
            yield f"{part.folder or 'the denoiser'}: {reads}{names}"
        elif part.scope is None:
            yield f"{part.folder}: no server reads it: `ckptq restore` bakes it back to BF16, ckptq.loading loads it for diffusers"


def _serve(job: Prepared, output: Path) -> str:
    denoisers = [part.scope for part in job.parts if isinstance(part.scope, Denoiser)]
    if any(part.scope is None for part in job.parts):
        return ""
    if not denoisers:
        return f"vllm serve {shlex.quote(str(output))}"
    option = denoisers[0].options.get(job.recipe.export.format, "")
    return f"vllm serve {shlex.quote(str(output))} --omni {option}".rstrip()
