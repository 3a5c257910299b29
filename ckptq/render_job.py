"""A conversion for its reader: the plan of `--dry-run`, and the table at the end."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ckptq.compare import Comparison
from ckptq.console import Console, duration, number_runs, size
from ckptq.convert import Report
from ckptq.cost import RATES
from ckptq.plan import CARRIED, Decision
from ckptq.prepare import Part, Prepared
from ckptq.reports import verdict
from ckptq.reports.human import show_findings


def plan_data(job: Prepared) -> dict[str, Any]:
    """`--dry-run --format json`. Of a pipeline: each converted component's part under `components`."""
    cost = job.cost
    parts = {part.folder: _part_data(part) for part in job.parts}
    return {
        **(parts[""] if job.inventory.pipeline is None else {"components": parts, "kept": list(job.kept)}),
        "format": job.recipe.export.format,
        "source_bytes": sum(component.stored_bytes for component in job.inventory.components),
        "output_bytes": job.output_bytes,
        "calibration": {
            "needed": job.calibrates,
            "amaxes_from": str(job.reused.path) if job.reused else None,
            "source": job.recipe.calibration.source if job.calibrates else None,
            "samples": job.recipe.calibration.samples if job.reads else cost.samples,
            "tokens_at_most": cost.tokens,
            "flops_at_most": cost.flops,
            **({"reads": asdict(job.reads)} if job.reads else {}),
        },
        "peak_memory_bytes": job.reads.peak if job.reads else cost.peak,
        "peak_memory_one_sample_a_wave_bytes": job.reads.peak if job.reads else cost.least,
        "findings": [asdict(f) for f in job.findings],
    }


def _part_data(part: Part) -> dict[str, Any]:
    plan = part.plan
    return {
        "plan": plan.digest,
        "scope": _scope(part),
        "dequantized": list(part.component.dequantized),
        "decisions": [asdict(d) for d in plan.decisions],
        "shards": [{"file": s.file, "bytes": s.data_bytes, "tensors": len(s.offsets)} for s in plan.shards],
        "carried": list(plan.carried),
        "renamed": plan.renamed,
        "config_changes": list(plan.config_changes),
        "files_copied": list(plan.sidecars),
        "files_left_out": list(plan.left_out),
    }


def _scope(part: Part) -> str | None:
    return part.scope.name if part.scope else None


def show_plan(console: Console, job: Prepared) -> None:
    """`--dry-run`: what becomes what, by which rule, and what it takes."""
    facts: list[tuple[str, str]] = []
    for part in job.parts:
        title = "What becomes what" + (f" in {part.folder}" if part.folder else "")
        console.table(title, ("modules", "become", "because of", "count"), grouped(part.plan.decisions), right=(3,))
        facts = _part_facts(part, job)
        if job.inventory.pipeline is not None:
            console.table("", ("", ""), facts)
    if job.inventory.pipeline is not None:
        facts = [("stays", kept(job)), ("output", f"{size(job.output_bytes)} in all")]
        if job.inventory.left_out:
            facts.append(("left out", ", ".join(job.inventory.left_out)))
    facts += _cost_facts(job)
    facts.append(("layout check", verdict(job.findings)))
    console.table("", ("", ""), facts)
    show_findings(console, job.findings)


def _part_facts(part: Part, job: Prepared) -> list[tuple[str, str]]:
    plan, source = part.plan, part.component
    scope = f", scope {part.scope.name}" if part.scope else ""
    form = f", format {job.recipe.export.format}" if part.scope else ""
    return [
        ("source", f"{size(source.stored_bytes)} in {_files(len(source.weight_files))}{scope}"),
        *([("from FP8", "; ".join(source.dequantized))] if source.dequantized else []),
        ("output", f"{size(plan.nbytes)} in {_files(len(plan.shards))}{form}"),
        ("config.json", "; ".join(plan.config_changes) + "; otherwise as it is"),
        *([("carried over", carried(plan.carried))] if plan.carried else []),
        *([("renamed", renamed(plan.renamed))] if plan.renamed else []),
        ("files copied", ", ".join(plan.sidecars) or "none"),
        ("left out", ", ".join(plan.left_out) or "nothing"),
    ]


def _cost_facts(job: Prepared) -> list[tuple[str, str]]:
    cost = job.cost
    if job.calibrates and job.reads:
        reads, steps = job.reads, job.reads.steps
        work = (
            f"{steps} steps, each reads {size(reads.step)} of the disk: {size(reads.total)} in all, whatever the number of prompts"
        )
        return [("peak memory", f"about {size(reads.peak)}, and what prompts hold while they wait"), ("calibration", work)]
    memory = ("peak memory", f"about {size(cost.peak)}" + (f"; {size(cost.least)} at the least, with --memory" * job.calibrates))
    if job.calibrates:
        times = ", ".join(f"{duration(cost.flops / rate)} on {name}" for name, rate in RATES)
        samples = f"{cost.samples} samples of {job.recipe.calibration.source}"
        work = f"{samples}, at most {cost.tokens} tokens, {cost.flops:.3g} FLOPs without towers"
        return [memory, ("calibration", f"{work}: {times}")]
    taken = job.reused is not None and job.calibrated
    return [memory, ("calibration", f"none, amaxes from {job.reused.path}" if taken and job.reused else "not needed")]


def kept(job: Prepared) -> str:
    """`text_encoder (16.6 GB), vae (254 MB), and 12 files beside them, byte for byte`."""
    converted = {part.folder for part in job.parts}
    told = [f"{c.folder} ({size(c.nbytes)})" for c in job.inventory.components if c.folder not in converted]
    beside = f"{_files(len(job.inventory.files))} beside them"
    return f"{', '.join([*told, beside])}: byte for byte"


def renamed(names: dict[str, str]) -> str:
    """`24 tensors, blocks.0.ffn.net.2.weight -> blocks.0.ffn.net_2.weight say: plain diffusers no longer loads the files`."""
    first, then = next(iter(names.items()))
    return f"{len(names)} tensors, {first} -> {then} say: the server finds every scale, plain diffusers no longer loads the files"


def carried(names: Sequence[str]) -> str:
    """`12 tensors as they are, which the scope does not know or the server passes over: model.layers.2.* (11), mtp.weight`."""
    roots: dict[str, int] = {}
    for name in names:
        numbered = re.match(r".*?\.\d+(?=\.)", name)
        root = f"{numbered[0] if numbered else name.partition('.')[0]}.*"
        roots[root] = roots.get(root, 0) + 1
    told = [f"{root} ({count})" for root, count in roots.items()]
    more = f" and {len(told) - 8} more" if len(told) > 8 else ""
    tensors = "1 tensor as it is, which" if len(names) == 1 else f"{len(names)} tensors as they are, which"
    return f"{tensors} the scope does not know or the server passes over: {', '.join(told[:8])}{more}"


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def grouped(decisions: Sequence[Decision]) -> list[tuple[str, str, str, int]]:
    """(modules, what they become, why, how many): one row for modules that differ in numbers alone, `model.layers.{0..27}.x`.

    And one for all of a part that is carried over whole: `talker.*`.
    """
    numbers: dict[tuple[str, str, str], list[list[int]]] = {}
    own = {d.module.partition(".")[0] for d in decisions if d.reason != CARRIED}
    for d in decisions:
        if d.reason == CARRIED and (root := d.module.partition(".")[0]) not in own:
            numbers.setdefault((f"{root}.*", d.action, d.reason), []).append([])
            continue
        kind, _, pattern = d.rule.partition(": ")
        why = pattern if kind == "keep" or d.action != "keep" else d.reason
        key = (re.sub(r"\.\d+(?=\.|$)", ".{}", d.module), d.action, why)
        numbers.setdefault(key, []).append([int(n) for n in re.findall(r"\.(\d+)(?=\.|$)", d.module)])
    return [(_numbered(name, found), action, why, len(found)) for (name, action, why), found in numbers.items()]


def _numbered(name: str, found: Sequence[Sequence[int]]) -> str:
    """The name with the numbers that occur at each of its places."""
    pieces = name.split("{}")
    runs = (number_runs(sorted({numbers[i] for numbers in found})) for i in range(len(pieces) - 1))
    return "".join(itertools.chain.from_iterable(itertools.zip_longest(pieces, runs, fillvalue="")))


def report_data(report: Report, quality: Comparison | None) -> dict[str, Any]:
    """`convert --format json`."""
    from ckptq.compare.render import data

    return {**asdict(report), "output": str(report.output), **({"quality": data(quality)} if quality else {})}


def show_report(console: Console, report: Report, quality: Comparison | None) -> None:
    """The table at the end of a conversion, and what a comparison with the source came to."""
    ratio = report.output_bytes / report.source_bytes
    rows = [
        ("output", str(report.output)),
        ("size", f"{size(report.source_bytes)} -> {size(report.output_bytes)} ({ratio:.1%})"),
        ("tensors", ", ".join(f"{count} {dtype}" for dtype, count in report.tensors.items())),
        ("time", ", ".join(f"{name} {duration(seconds)}" for name, seconds in report.seconds.items()) or "-"),
        ("peak memory", size(report.peak_rss) + (f", {size(report.peak_gpu)} on the GPU" if report.peak_gpu else "")),
        *([("carried over", carried(report.carried))] if report.carried else []),
        ("verdict", verdict(report.findings)),
        *(("note", note) for note in report.notes),
    ]
    console.table("Done", ("", ""), rows)
    if report.serve and not (quality and quality.exit_code):
        console.show(f"serve it: {report.serve}")  # a line of its own: a table would fold a long path
    if report.findings:
        console.show("")
    show_findings(console, report.findings)
    if quality is not None:
        from ckptq.compare.render import show

        console.show("")
        show(console, quality)
