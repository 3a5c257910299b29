"""The candidate's recipe, and the one that keeps more: written as YAML, read back and planned before anybody sees it."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ckptq.compare import recorded_recipe
from ckptq.errors import RecipeError
from ckptq.journal import RECORD
from ckptq.prepare import Prepared, prepare
from ckptq.recipe import Recipe, load_recipe, parse_recipe
from ckptq.sections import SOURCES
from ckptq.sensitivity import Sensitivity
from ckptq.sensitivity.choose import Kl


@dataclass(frozen=True, slots=True)
class Base:
    """What the candidate was made by.

    settings   the recipe without its defaults, in its own order
    amax       the candidate's folder, where its ckptq.json has the amaxes that this recipe needs; None for no calibration at all,
               and for another tool's export
    own        whether the candidate is ckptq's
    quantized  canonical names of the modules that the recipe quantizes
    """

    settings: Mapping[str, Any]
    reference: str
    candidate: str
    amax: Path | None
    own: bool
    quantized: frozenset[str]


def find_base(reference: str, candidate: str, folder: Path, named: str | None, *, needed: bool) -> Base | None:
    """The recipe that ckptq.json in `folder`, the candidate, records, or the one that is named.

    Raises RecipeError for one that does not fit the reference, and where there is none and one is needed.
    """
    told = recorded_recipe(folder)
    if named:
        recipe = load_recipe(named, model=reference)
    elif told is not None:
        recipe = parse_recipe(yaml.safe_dump(_complete(told)), f"the recipe in {candidate}/{RECORD}", model=reference)
    elif needed:
        raise RecipeError(
            f"{candidate}: no {RECORD} with a recipe, so what it was made by is not known",
            hint="name a recipe that makes such a checkpoint with --recipe",
        )
    else:
        return None
    job = prepare(recipe)
    amax = folder if job.calibrated and told is not None else None
    return Base(_settings(recipe), reference, candidate, amax, told is not None, quantized(job))


def _complete(told: Mapping[str, Any]) -> dict[str, Any]:
    """A record's recipe as a recipe: without a calibration whose paths it does not tell."""
    calibration = told.get("calibration")
    source = SOURCES.get(str(calibration.get("source"))) if isinstance(calibration, Mapping) else None
    needed = {key for key, setting in source.model_fields.items() if setting.is_required()} if source else set()
    return {key: value for key, value in told.items() if key != "calibration" or not needed - {*value}}


def _settings(recipe: Recipe) -> dict[str, Any]:
    """What differs from the defaults: these say nothing."""
    body = recipe.model_dump(mode="json", exclude_defaults=True)
    return {key: value for key, value in body.items() if value not in ({}, [])}


def quantized(job: Prepared) -> frozenset[str]:
    """Canonical names of the modules that a job quantizes."""
    return frozenset(job.scope.canonical(d.module) for d in job.plan.decisions if d.action != "keep")


def reached(patterns: Sequence[str], modules: Collection[str]) -> frozenset[str]:
    """Those that are one of these modules, or in one."""
    return frozenset(m for m in modules if any(m == p or m.startswith(f"{p}.") for p in patterns))


def keeping(base: Base, patterns: Sequence[str], output: str, comment: str) -> str:
    """The recipe as YAML, in which `patterns` stay, too.

    Raises RecipeError where it would not do exactly that: it is read and planned as `ckptq convert` will.
    """
    settings = {
        **{key: value for key, value in base.settings.items() if key == "description"},
        "model": base.reference,
        "output": output,
        **{key: value for key, value in base.settings.items() if key not in ("description", "model", "output")},
    }
    settings["keep"] = [*settings.get("keep", ()), *patterns]
    body = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=120)
    text = "".join(f"# {line}\n" for line in comment.splitlines()) + body
    wanted = base.quantized - reached(patterns, base.quantized)
    found = quantized(planned(text, base))
    if found != wanted:
        odd = sorted(found ^ wanted)
        raise RecipeError(f"the recipe that keeps {', '.join(patterns[:3])} would quantize other modules: {', '.join(odd[:3])}")
    return text


def planned(text: str, base: Base) -> Prepared:
    """The job that a printed recipe is. Raises as `ckptq convert --dry-run` does."""
    return prepare(parse_recipe(text, "the recipe that keeps more"), base.amax)


def command(base: Base, file: str) -> str:
    """What converts by a recipe in `file`: with the amaxes of the candidate where it needs any."""
    amax = base.candidate if Path(base.candidate).is_dir() else str(base.amax)  # of a Hub id the folder that it was fetched to
    return shlex.join(["ckptq", "convert", "--recipe", file, *(["--amax", amax] if base.amax else [])])


def output_name(candidate: str, kept: int) -> str:
    """OUT -> OUT-keep3; of a Hub id the model's name alone, in the folder that ckptq is started in."""
    name = candidate.rstrip("/")
    if not Path(name).is_dir():
        name = name.partition("@")[0].rpartition("/")[2]
    return f"{name}-keep{kept}"


def answer(found: Sensitivity) -> Sensitivity:
    """With the recipe that keeps what was chosen, and the size that its plan has."""
    point, base, units = found.chosen, found.counted.base, found.counted.units
    if point is None or base is None or not point.kept:
        return found
    output = output_name(base.candidate, len(point.kept))
    comment = f"ckptq sensitivity: keeps {len(point.kept)} of the {len(units)} units of {base.candidate}, {_expected(point.kl)}."
    text = keeping(base, [pattern for name in point.kept for pattern in units[name].patterns], output, comment)
    notes = found.notes if base.own else (*found.notes, _FOREIGN)
    return replace(found, recipe=text, output=output, notes=notes)


_FOREIGN = "the candidate is not ckptq's: what ckptq makes of the recipe is like it, not the same"


def _expected(kl: Kl) -> str:
    between = "" if kl.low is None or kl.high is None else f", 95 % interval {kl.low:.4g} to {kl.high:.4g}"
    return f"KL {kl.mean:.4g}{between}"
