"""A ranking as data for machines and as tables for people; both from the same values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ckptq import __version__
from ckptq.compare import settings_of, versions
from ckptq.compare.render import number
from ckptq.console import Console, amount, size
from ckptq.reports import safe_text
from ckptq.reports.json import plain
from ckptq.sensitivity import Asked, Counted, Part, Point, Sensitivity
from ckptq.sensitivity.choose import Kl, Ranked

SCHEMA = 1
"""Raised when a key changes its meaning or goes: docs/sensitivity.schema.json."""
_SHOWN = 20
"""Units that people are shown; JSON has them all."""


def data(asked: Asked, counted: Counted, found: Sensitivity | None, command: str | None = None) -> dict[str, Any]:
    """One object, described by docs/sensitivity.schema.json. `found` is None of a dry run."""
    body: dict[str, Any] = {
        "schema": SCHEMA,
        "tool": {"name": "ckptq", "version": __version__},
        "reference": asked.reference,
        "candidate": asked.candidate,
        "dry_run": found is None,
        "ok": found is None or found.exit_code == 0,
        "exit_code": found.exit_code if found else 0,
        "asked": {key: getattr(asked, key) for key in ("keep", "limit", "exact", "budget", "recipe")},
        "work": {
            "units": len(counted.units),
            "layers": counted.work.layers,
            "samples": counted.samples,
            "tokens": counted.tokens,
            "checkpoint_bytes": counted.work.nbytes,
            "planned": _parts(counted.parts),
            "expected": _parts(found.expected) if found else None,
            "spent": _parts(found.spent) if found else None,
        },
        "notes": list(found.notes) if found else [],
        "whole": asdict(found.whole) if found else None,
        "kv_cache": asdict(found.cache) if found and found.cache else None,
        "units": [_unit(counted, unit) for unit in found.ranking] if found else None,
        "curve": [_point(counted, point) for point in found.curve] if found else None,
        "chosen": _point(counted, found.chosen) if found and found.chosen else None,
        "recipe": found.recipe if found else None,
        "output": found.output if found else None,
        "command": command,
        "settings": settings_of(asked.samples),
        "versions": versions(),
    }
    said: dict[str, Any] = plain(body)
    return said


def _unit(counted: Counted, ranked: Ranked) -> dict[str, Any]:
    unit = counted.units[ranked.name]
    return {
        "name": unit.name,
        "layer": unit.layer,
        "patterns": unit.patterns,
        "saved_bytes": unit.saved,
        "local_error": ranked.local,
        "kl": ranked.kl,
        "exact": ranked.exact is not None,
        "kl_low": ranked.exact.low if ranked.exact else None,
        "kl_high": ranked.exact.high if ranked.exact else None,
        "places": ranked.places,
    }


def _point(counted: Counted, point: Point) -> dict[str, Any]:
    return {
        "kept": point.kept,
        "kl": asdict(point.kl),
        "bytes": point.nbytes,
        "of_candidate": point.nbytes / counted.stored,
    }


def _parts(parts: Sequence[Part]) -> list[dict[str, Any]]:
    keys = {"name": "name", "forwards": "forwards", "passes": "passes", "nbytes": "bytes", "seconds": "seconds"}
    return [{said: getattr(part, key) for key, said in keys.items()} for part in parts]


def show_cost(console: Console, counted: Counted) -> None:
    """What there is, and what it takes, before any of it is done."""
    rows = [(part.name, f"{part.forwards:.1f}", part.passes, size(part.nbytes)) for part in counted.parts]
    console.table("Work, at most", ("part", "forwards", "passes", "reads"), rows, right=(1, 2, 3))
    console.show(cost_line(counted))


def cost_line(counted: Counted) -> str:
    """The same in a line."""
    forwards, nbytes = sum(part.forwards for part in counted.parts), sum(part.nbytes for part in counted.parts)
    return (
        f"{amount(len(counted.units), 'units')} in {amount(counted.work.layers, 'layers')}, {amount(counted.samples, 'samples')} "
        f"of {counted.tokens:,} tokens: at most {forwards:.1f} forwards of them all through one model, {size(nbytes)} to be read"
    )


def show(console: Console, found: Sensitivity, output: Path | None, command: str | None) -> None:
    """For people: units worst first, the curve, and what to do next. `output`: where the recipe was written; None for nowhere."""
    counted = found.counted
    rows = [_row(counted, unit) for unit in found.ranking[:_SHOWN]]
    left = f" ({_SHOWN} of {len(found.ranking)})" if len(found.ranking) > _SHOWN else ""
    columns = ("place", "unit", "KL", "95 % interval", "local error", "saves")
    console.table(f"What quantizing a unit alone costs{left}", columns, rows, right=(2, 4, 5), whole=(0, 2, 4, 5))
    for line in _remarks(found):
        console.show(line)

    def mark(point: Point) -> str:
        return "chosen" if point is found.chosen else ""

    title = "Keeping the worst" if found.asked.limit is None else "Keeping those that cost most KL a byte"
    points = [
        (len(p.kept), number(p.kl.mean), _interval(p.kl), size(p.nbytes), f"{p.nbytes / counted.stored:.1%}", mark(p))
        for p in found.curve
    ]
    console.show("")
    console.table(title, ("units kept", "KL", "95 % interval", "size", "of the candidate", ""), points, right=(0, 1, 3, 4))
    for line in (*_verdict(found), *(f"note: {note}" for note in found.notes)):
        console.show(line)
    if found.recipe is not None and command is not None:
        console.show(f"written to {output}" if output else f"\n{safe_text(found.recipe, lines=True)}")
        file = f"{Path(found.output or '').name}.yaml"
        console.show(f"convert by it: {command}" if output else f"save it as {file} (--output does), then: {command}")


def _row(counted: Counted, unit: Ranked) -> tuple[object, ...]:
    first, last = unit.places
    place = f"{first}" if first == last else f"{first} to {last}"
    kl = number(unit.kl) if unit.exact else f"~ {number(unit.kl)}"
    interval = _interval(unit.exact) if unit.exact else "estimated"
    return place, safe_text(unit.name), kl, interval, number(unit.local), size(counted.units[unit.name].saved)


def _interval(kl: Kl) -> str:
    return "-" if kl.low is None or kl.high is None else f"{number(kl.low)} to {number(kl.high)}"


def _remarks(found: Sensitivity) -> Iterator[str]:
    if found.cache is not None:
        yield f"The FP8 KV cache alone: KL {number(found.cache.mean)}, {_interval(found.cache)}. No unit that stays changes it."
    if any(unit.places[0] != unit.places[1] for unit in found.ranking):
        yield "Units that share places are not told apart by these samples: their intervals overlap."


def _verdict(found: Sensitivity) -> Iterator[str]:
    """What was chosen, or how to choose."""
    point, limit = found.chosen, found.asked.limit
    if point is not None and not point.kept:
        yield f"the candidate meets a KL of {limit:g} as it is: nothing needs to stay"
    elif point is not None:
        count, one = amount(len(point.kept), "units"), len(point.kept) == 1
        of = f"that cost{'s' * one} the most" if limit is None else f"meets a KL of {limit:g}"
        yield f"keeping {count} {of}: KL {number(point.kl.mean)}, {size(point.nbytes)}, {point.nbytes / found.counted.stored:.1%}"
    elif limit is not None:
        best = min(found.curve, key=lambda p: p.kl.mean)
        least = f"{number(best.kl.mean)}, keeping {amount(len(best.kept), 'units')}"
        yield f"FAILED: a KL of {limit:g} can't be met; the least that was found is {least}"
        if found.cache is not None and found.cache.mean > limit:
            yield "the FP8 KV cache alone costs more: `kv_cache: null` in the recipe does without"
    else:
        yield "`--keep N` prints the recipe that keeps the worst N, `--kl LIMIT` the smallest found that meets a KL"
