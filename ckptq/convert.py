"""The one loop: plan -> validate the plan -> amax -> encode -> write -> validate the output -> publish."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from ckptq import cost, hub, quantized, reuse, validate
from ckptq.calibration import load_samples
from ckptq.checkpoint import INDEX, Inventory, read_inventory
from ckptq.console import Console
from ckptq.cost import Cost
from ckptq.errors import CalibrationError, DataError, OutputError, RecipeError, SourceError
from ckptq.exporters import find_exporter
from ckptq.job import job_record
from ckptq.journal import RECORD, Journal
from ckptq.plan import Plan
from ckptq.planner import build_plan
from ckptq.produce import listed, produce
from ckptq.recipe import Recipe
from ckptq.reuse import Reused
from ckptq.scopes import Scope
from ckptq.spelled import choose_scope
from ckptq.unstack import unstack
from ckptq.validators import Finding

LAST = (RECORD, INDEX, "hf_quant_config.json", "config.json")
"""Published after everything else, in this order: config.json is what makes a folder a checkpoint."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job that has been planned and found sound, before any arithmetic."""

    recipe: Recipe
    source: hub.Source
    inventory: Inventory
    scope: Scope
    plan: Plan
    cost: Cost
    findings: tuple[Finding, ...]
    reused: Reused | None = None

    @property
    def calibrates(self) -> bool:
        """Whether samples run through the model: scales come from activations, and no earlier run has measured them."""
        return self.plan.calibrated and self.reused is None


@dataclass(frozen=True, slots=True)
class Report:
    """What a finished run did. Sizes are in bytes, times in seconds. `carried`: see Plan."""

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


def prepare(recipe: Recipe, amax: Path | None = None) -> Prepared:
    """Reads headers and plans. Of a Hub source's weights nothing else is fetched yet.

    amax   the ckptq.json of an earlier run, or its folder: what it measured stands for a calibration
    """
    if recipe.model is None:
        raise RecipeError("the recipe names no model", hint="add `model:` to it, or give --model SRC")
    source = hub.fetch(recipe.model, weights=False)
    inventory = read_inventory(source.root, source.header)
    if recipe.from_fp8:
        inventory = quantized.dense(inventory)
    scope = choose_scope(inventory.main.config, recipe.scope)
    inventory = unstack(inventory, scope)
    plan = build_plan(recipe, inventory.main, scope, find_exporter(recipe.export.format))
    reused = reuse.read_amax(amax) if amax is not None else None
    if reused is not None:
        reuse.refuse_missing(reused, plan)
    findings = validate.validate_plan(plan, scope)
    needs = cost.estimate(plan, inventory.main, scope, recipe, calibrates=plan.calibrated and reused is None)
    return Prepared(recipe, source, inventory, scope, plan, needs, tuple(findings), reused)


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
    output = Path(job.recipe.output)
    if job.reused is not None and not job.plan.calibrated:
        console.note(f"--amax {job.reused.path} is not used: the recipe needs no calibration")
    elif job.reused is not None and "calibration" in job.recipe.model_fields_set:
        console.note(f"the recipe's calibration is not used: the amaxes are those in {job.reused.path}")
    samples = load_samples(job.recipe.calibration) if job.calibrates else []
    if len(samples) < job.recipe.calibration.samples and job.calibrates:
        console.warn(f"calibration has {len(samples)} of the {job.recipe.calibration.samples} samples that the recipe asks for")
    journal = Journal(output)
    journal.refuse_existing(resume=resume)
    cost.check_space(output, job.plan.nbytes - journal.written_bytes())
    device = resolve_device(device)
    job, waiting = _fit(job, memory, device) if job.calibrates else (job, 0)
    if job.recipe.model is not None and job.source.label is not None:  # all that is cheap to check has been checked
        job = dataclasses.replace(job, source=hub.fetch(job.recipe.model, weights=True))
    record = job_record(job, samples, device)
    if job.reused is not None:
        reuse.refuse_other_source(job.reused, record)
    if journal.open(record, resume=resume):
        try:
            findings = None if journal.publishing else produce(job, samples, journal, record, waiting, console)
            journal.publish(LAST)
        except (CalibrationError, DataError, SourceError):
            journal.forget_start()  # the input is at fault: mended, it is another job
            raise
        finally:
            journal.release()
    else:
        findings = None
    if findings is None:  # an earlier run had checked and begun to publish
        findings = validate.examine(output, progress=console, scope=job.scope).findings
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
    for spec in job.plan.tensors.values():
        kinds[spec.dtype] = kinds.get(spec.dtype, 0) + 1
    return Report(
        output=output,
        format=job.recipe.export.format,
        source_bytes=job.inventory.main.stored_bytes,
        output_bytes=job.plan.nbytes,
        seconds=dict(console.seconds),
        peak_rss=cost.peak_rss(),
        peak_gpu=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        tensors=dict(sorted(kinds.items())),
        findings=findings,
        carried=job.plan.carried,
    )
