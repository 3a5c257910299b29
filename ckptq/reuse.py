"""Amaxes of an earlier run, out of its ckptq.json: another static format of the same source needs no calibration of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptq.errors import DataError, RecipeError
from ckptq.folder import printable
from ckptq.journal import RECORD
from ckptq.json_file import read_json
from ckptq.plan import Plan

if TYPE_CHECKING:
    from ckptq.prepare import Part

_AGAIN = "leave --amax out to calibrate"
_LARGEST = (2 - 2.0**-23) * 2.0**127
"""Of float32, in which scales are made of amaxes."""


@dataclass(frozen=True, slots=True)
class Reused:
    """What an earlier run measured, {component's folder: {observer name: amax}}, and the job that it was."""

    path: Path
    amax: Mapping[str, Mapping[str, float]]
    job: Mapping[str, Any]

    def table(self, folder: str, plan: Plan) -> dict[str, float]:
        """{observer: amax} of the inputs, K and V that the plan observes. Weights are measured again: it costs next to nothing."""
        return {o.name: self.amax[folder][o.name] for o in plan.observers if o.kind != "weight"}

    def origin(self, parts: Sequence[Part]) -> dict[str, Any]:
        """What the new job's record says: which amaxes, and the calibration that they come from, however many runs ago."""
        tables = {part.folder: self.table(part.folder, part.plan) for part in parts if part.plan.calibrated}
        told = json.dumps(tables.get("", tables), sort_keys=True)
        known = self.job.get("amax")
        recipe = self.job.get("recipe")
        before = {
            "samples": self.job.get("samples"),
            "calibration": recipe.get("calibration") if isinstance(recipe, Mapping) else None,
            **{key: self.job.get(key) for key in ("device", "threads", "versions")},
        }
        return {**(known if isinstance(known, Mapping) else before), "digest": hashlib.sha256(told.encode()).hexdigest()}


def read_amax(path: Path) -> Reused:
    """The amaxes in a ckptq.json, or in that of a folder.

    Raises RecipeError for a file that is none, SourceError for one that can't be read, DataError for an impossible amax.
    """
    file = path / RECORD if path.is_dir() else path
    try:
        body = read_json(file)
    except FileNotFoundError:
        raise RecipeError(
            f"--amax {path}: no such file", hint=f"give a folder that ckptq has written, or the {RECORD} in it"
        ) from None
    job = body.get("job") if isinstance(body, dict) else None
    found = _amaxes(body) if isinstance(job, dict) else {}
    if not isinstance(job, dict) or not found:
        raise RecipeError(
            f"--amax {path}: expected a {RECORD} with job and amax", hint="give a folder that `ckptq convert` has written"
        )
    for name, value in (pair for amax in found.values() for pair in amax.items()):
        if type(value) not in (int, float) or not 0 <= value <= _LARGEST:
            raise DataError(f"--amax {path}: {printable(name)}: expected a finite number from 0 on, found {value!r}", hint=_AGAIN)
    return Reused(path, {folder: {name: float(v) for name, v in amax.items()} for folder, amax in found.items()}, job)


def _amaxes(body: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """{component's folder: its amaxes}; {} where there are none."""
    components = body.get("components", {"": body})
    if not isinstance(components, Mapping):
        return {}
    pairs = ((folder, part.get("amax") if isinstance(part, Mapping) else None) for folder, part in components.items())
    return {folder: amax for folder, amax in pairs if isinstance(amax, Mapping)}


def refuse_missing(reused: Reused, parts: Sequence[Part]) -> None:
    """Raises RecipeError listing the observers that the earlier run lacks. Those of weights do not count."""
    observers = ((o, reused.amax.get(part.folder, {})) for part in parts for o in part.plan.observers)
    missing = [o for o, known in observers if o.kind != "weight" and o.name not in known]
    if not missing:
        return
    names = ", ".join(o.name for o in missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    only_cache = all(o.kind in ("k", "v") for o in missing)
    raise RecipeError(
        f"--amax {reused.path}: the recipe needs {len(missing)} amaxes that are not in it: {names}",
        hint=f"that run had no FP8 KV cache: add --set kv_cache=null, or {_AGAIN}" if only_cache else _AGAIN,
    )


def refuse_other_source(reused: Reused, record: Mapping[str, Any]) -> None:
    """Raises RecipeError where the amaxes are those of another checkpoint than the one of this job's `record`."""
    then, now = (str(job.get("source_fingerprint")) for job in (reused.job, record))
    if then == now:
        return
    settings = [job.get("recipe") for job in (reused.job, record)]
    fp8 = [bool(recipe.get("from_fp8")) if isinstance(recipe, Mapping) else False for recipe in settings]
    names = [f"{job.get('source')}, fingerprint {str(job.get('source_fingerprint'))[:12]}" for job in (reused.job, record)]
    what = f"; one of them with from_fp8: {fp8[0]} then, {fp8[1]} now" if fp8[0] != fp8[1] else ""
    raise RecipeError(
        f"--amax {reused.path}: measured on another checkpoint: {printable(names[0])} then, {names[1]} now{what}",
        hint=f"give the source of that run, or {_AGAIN}",
    )


def refuse_other_weights(reused: Reused, folder: str, measured: Mapping[str, float]) -> None:
    """Raises DataError where a weight's amax is another than in the earlier run: a fingerprint looks at few of the bytes."""
    known = reused.amax.get(folder, {})
    changed = [name for name, value in measured.items() if name.endswith(".weight_amax") and known.get(name, value) != value]
    if changed:
        raise DataError(
            f"--amax {reused.path}: {changed[0]}: {known[changed[0]]} then, {measured[changed[0]]} now "
            f"({len(changed)} such weights): the checkpoint has changed since",
            hint=_AGAIN,
        )
