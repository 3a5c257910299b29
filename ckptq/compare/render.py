"""A comparison as data for machines and as tables for people; both from the same values."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import TYPE_CHECKING, Any

from ckptq import __version__
from ckptq.compare import Comparison
from ckptq.compare.images import grade
from ckptq.compare.policy import METRICS
from ckptq.compare.weights import WeightError, by_part
from ckptq.console import Console, size
from ckptq.reports import safe_text
from ckptq.reports.json import plain

if TYPE_CHECKING:
    from ckptq.compare.behavior import Behavior, SampleGap

SCHEMA = 1
"""Raised when a key changes its meaning or goes: docs/compare.schema.json."""
_SHOWN, _WORST = 10, 3
"""Tensors, outputs and names that people are shown; JSON has them all."""


def data(found: Comparison) -> dict[str, Any]:
    """One object, described by docs/compare.schema.json. Infinities and NaN are texts: "inf", "-inf", "nan"."""
    body: dict[str, Any] = {
        "schema": SCHEMA,
        "tool": {"name": "ckptq", "version": __version__},
        "reference": found.reference,
        "candidate": found.candidate,
        "ok": found.exit_code == 0,
        "exit_code": found.exit_code,
        "figures": dict(found.figures),
        "limits": [{**asdict(j.limit), "limit": str(j.limit), "found": j.found, "broken": j.broken} for j in found.limits],
        "weights": None if found.weights is None else [asdict(error) for error in found.weights],
        "unmatched": [asdict(one) for one in found.unmatched],
        "behavior": None if found.behavior is None else _behavior(found.behavior),
        "images": None if found.images is None else found.images.data(),
        "sizes": dict(found.sizes),
        "versions": dict(found.versions),
        "settings": dict(found.settings),
        "recipe": found.recipe,
        "skipped": dict(found.skipped),
        "baseline": found.baseline or None,
    }
    said: dict[str, Any] = plain(body)
    return said


def _behavior(found: Behavior) -> dict[str, Any]:
    """Of files their names: paths are nobody else's business."""
    said = asdict(found)
    for sample in said["worst"]:
        sample |= {kind: path.name if (path := sample[kind]) else None for kind in ("image", "audio")}
    return said


def text(found: Comparison) -> str:
    """The same as text, plain ASCII."""
    return json.dumps(data(found), indent=2, allow_nan=False) + "\n"


def show(console: Console, found: Comparison) -> None:
    """For people: what was measured, worst first, the limits, and the verdict."""
    if found.weights is not None:
        _show_weights(console, found, found.weights)
    if found.images is not None:
        _show_outputs(console, found)
    if found.behavior is not None:
        _show_behavior(console, found.behavior)
    measured = [(name, value) for name, value in found.figures.items() if found.weights is None or name not in METRICS["weights"]]
    meanings = {name: meaning for metrics in METRICS.values() for name, meaning in metrics.items()}
    if measured:
        rows = [(name, number(value), grade(name, value), meanings.get(name, "")) for name, value in measured]
        graded = found.images is not None
        columns = ("figure", "value", *(("vLLM-Omni's threshold",) if graded else ()), "")
        console.table("Figures", columns, [r if graded else (*r[:2], r[3]) for r in rows], right=(1,), whole=(0,))
    if found.baseline:
        console.show(nearer(found))
    if found.weights is not None and "behavior" in found.skipped:
        console.show(f"behavior was not measured: {found.skipped['behavior']}")
    for judged in found.limits:
        console.show(("BROKEN: " if judged.broken else "kept: ") + str(judged))
    count = sum(judged.broken for judged in found.limits)
    said = f"FAILED: {count} of {len(found.limits)} limits broken" if count else "OK"
    if found.undefined:
        console.show(f"{safe_text(found.undefined)}: `ckptq validate` and the weights above say why")
    example = "psnr_db_min<25" if found.images else "kl_mean>0.02" if found.behavior else "weight_relative_l2_max>0.05"
    said = said if found.limits else f"measured; no limit was given: --fail-on '{example}' sets one"
    said = "FAILED: no figures of what it does" if found.undefined and not count else said
    console.show(f"{safe_text(found.candidate)} against {safe_text(found.reference)}: {said}")


def _show_weights(console: Console, found: Comparison, errors: Sequence[WeightError]) -> None:
    rows = [
        (safe_text(e.name), e.coding or e.dtype, *map(number, (e.cosine, e.relative_l2, e.max_abs, e.sqnr_db)))
        for e in errors
        if e.relative_l2 != 0 and not e.note
    ]
    columns = ("tensor", "stored as", "cosine", "relative L2", "max abs", "SQNR dB")
    if rows:
        left = f" ({_SHOWN} of {len(rows)} that differ)" if len(rows) > _SHOWN else ""
        console.table(f"Worst tensors{left}", columns, rows[:_SHOWN], right=(2, 3, 4, 5))
    summary = [(safe_text(part), form, *_summary(some)) for (part, form), some in by_part(errors).items()]
    console.table(
        "Weights by part, and by what the candidate stores",
        ("part", "stored as", "tensors", "equal", "median relative L2", "worst"),
        summary,
        right=(2, 3, 4, 5),
    )
    for line in (*_notes(errors), *_unmatched(found)):
        console.show(line)
    if found.sizes:
        a, b = found.sizes["reference"], found.sizes["candidate"]
        console.show(f"weights: {size(a)}, of the candidate {size(b)}" + (f", {b / a:.1%}" if a else ""))


def _summary(errors: Sequence[WeightError]) -> tuple[object, ...]:
    values = [e.relative_l2 for e in errors]
    odd = any(map(math.isnan, values))
    return len(values), values.count(0.0), *("nan" if odd else number(v) for v in (median(values), max(values)))


def _notes(errors: Sequence[WeightError]) -> Iterator[str]:
    odd = [e for e in errors if e.note]
    yield from (f"can't be compared: {safe_text(e.name)}: {safe_text(e.note)}" for e in odd[:_SHOWN])
    if len(odd) > _SHOWN:
        yield f"and {len(odd) - _SHOWN} more can't be compared"


def _unmatched(found: Comparison) -> Iterator[str]:
    for what, count in Counter(one.found for one in found.unmatched).items():
        names = [safe_text(one.name) for one in found.unmatched if one.found == what]
        more = f" and {count - _SHOWN} more" if count > _SHOWN else ""
        yield f"{what}: {', '.join(names[:_SHOWN])}{more}"


def _show_behavior(console: Console, behavior: Behavior) -> None:
    """Hidden states after each layer, with the module in it that is furthest off, and the samples that are."""
    first = behavior.entering
    rows: list[tuple[object, ...]] = [("in", number(first.relative_l2), number(first.cosine), number(first.sqnr_db), "-", "-")]
    for gap in behavior.layers:
        worst = max(gap.modules.items(), key=lambda item: item[1], default=("-", math.nan))
        rows.append((gap.layer, *map(number, (gap.hidden.relative_l2, gap.hidden.cosine, gap.hidden.sqnr_db, worst[1])), worst[0]))
    columns = ("layer", "relative L2", "cosine", "SQNR dB", "its worst", "module")
    console.table("Hidden states", columns, rows, right=(0, 1, 2, 3, 4))
    samples = sorted(behavior.samples, key=lambda s: (not math.isnan(s.kl_mean), -s.kl_mean))[:_WORST]
    told = [(safe_text(s.name), s.tokens, *map(number, _losses(s)), safe_text(s.worst)) for s in samples]
    columns = ("sample", "tokens", "KL", "NLL reference", "candidate", "up to the token that is furthest off")
    console.table(f"Worst samples ({len(told)} of {len(behavior.samples)})", columns, told, right=(1, 2, 3, 4))


def nearer(found: Comparison) -> str:
    """A candidate beside its baseline, with what the intervals allow to say."""
    figures = {name: found.figures.get(name, math.nan) for name in METRICS["baseline"]}
    share, low, high = (figures[f"kl_nearer{end}"] for end in ("", "_low", "_high"))
    below, above = figures["kl_difference_high"] < 0, figures["kl_difference_low"] > 0
    told = "which is less" if below else "which is more" if above else "which can't be told apart on these samples"
    return (
        f"{safe_text(found.candidate)} against the baseline {safe_text(found.baseline)}: nearer to the reference on {share:.0%} of "
        f"samples (95 % interval {low:.0%} to {high:.0%}); mean KL {number(found.figures['kl_mean'])} to "
        f"{number(figures['kl_baseline'])}, {told}"
    )


def _losses(sample: SampleGap) -> tuple[float, float, float]:
    return sample.kl_mean, sample.nll_reference, sample.nll_candidate


def _show_outputs(console: Console, found: Comparison) -> None:
    assert found.images is not None
    outputs = list(found.images.outputs.items())
    metrics = ("psnr_db", "mae", "cosine_similarity", "relative_l2", "max_abs")
    rows = [(safe_text(name), frames.num_frames, *_cells(frames.all_frames_metrics, metrics)) for name, frames in outputs[:_SHOWN]]
    left = f" ({_SHOWN} of {len(outputs)})" if len(outputs) > _SHOWN else ""
    console.table(f"Outputs, worst first{left}", ("output", "frames", *metrics), rows, right=tuple(range(1, 7)))


def _cells(values: Mapping[str, float], names: Sequence[str]) -> list[str]:
    return [number(values[name]) if name in values else "-" for name in names]


def number(value: float) -> str:
    """Four digits, of what is near 1 six decimals: cosines, agreements, perplexities and their ratios."""
    return f"{value:.6f}" if 0.9 < abs(value) < 1.1 and abs(value) != 1 else f"{value:.4g}"
