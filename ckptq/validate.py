"""Runs the validators over a plan or a folder, and joins findings that are one fault at many places."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ckptq.checkpoint import STAGING, Inventory, read_inventory
from ckptq.console import Console, number_runs
from ckptq.errors import SourceError
from ckptq.plan import Plan
from ckptq.scopes import Scope, find_scope
from ckptq.validators import Finding, Stored, configs, layout

_SHOWN = 3
"""Names in one finding's subject; the rest is counted."""
_FIRST = " (in the first)"


def validate_plan(plan: Plan, scope: Scope) -> list[Finding]:
    """What the server would find wrong with the output of this plan: names, dtypes, shapes, configs. Pure, no torch."""
    other = plan.files.get(configs.OTHER)
    stored = Stored(json.loads(plan.files["config.json"]), json.loads(other) if other else None, plan.tensors)
    return group(_layout(stored, scope))


def validate_folder(
    folder: Path,
    *,
    source: Path | None = None,
    values: bool = True,
    passthrough: bool = True,
    staged: bool = False,
    progress: Console | None = None,
) -> list[Finding]:
    """What is wrong with the checkpoint in `folder`, errors first.

    `source` is the checkpoint that it was made from; without it passthrough is left out. `staged`: the folder is the inside of an
    unfinished job, looked at before it is published.
    Raises SourceError for a folder that can't be read or is an unfinished conversion, UnsupportedError where no scope fits.
    """
    refuse_unfinished(folder, staged=staged)
    inventory = read_inventory(folder)
    main = inventory.main
    scope = find_scope(main.config)
    tensors = {name: tensor.spec for name, tensor in main.tensors.items()}
    findings = list(_layout(Stored(main.config, _other_config(folder), tensors), scope))
    findings += configs.check_files(folder, main)
    talk = progress or Console(quiet=True)
    if values:
        findings += _values(inventory, scope, talk)
    if source is not None and passthrough:
        findings += _passthrough(inventory, read_inventory(source), talk)
    return group(findings)


def refuse_unfinished(folder: Path, *, staged: bool = False) -> None:
    """Raises SourceError for the folder of a conversion that has not published its output."""
    inside = STAGING in folder.resolve().parts and not staged
    halfway = folder.is_dir() and not (folder / "config.json").is_file() and any(folder.glob("*.safetensors*"))
    if inside or halfway or (folder / STAGING).exists():
        what = (
            f"it holds {STAGING}"
            if (folder / STAGING).exists()
            else "it is what a job works in"
            if inside
            else "it has no config.json"
        )
        raise SourceError(
            f"{folder}: an unfinished conversion: {what}",
            hint="finish it with the command that began it and --resume: `ckptq convert ... --resume`",
        )


def _layout(stored: Stored, scope: Scope) -> Iterator[Finding]:
    yield from configs.check(stored, scope)
    settings = configs.settings(stored, scope)
    if settings is not None and configs.checkable(settings):
        yield from layout.check(stored, scope, settings)


def _other_config(folder: Path) -> Mapping[str, Any] | None:
    path = folder / configs.OTHER
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: can't be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise SourceError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def _values(inventory: Inventory, scope: Scope, talk: Console) -> list[Finding]:
    from ckptq.validators import values

    with talk.stage("values", inventory.main.nbytes, "bytes") as advance:
        return list(values.check(inventory.root, inventory.main, scope, advance))


def _passthrough(output: Inventory, source: Inventory, talk: Console) -> list[Finding]:
    from ckptq.validators import passthrough

    with talk.stage("passthrough", output.main.nbytes, "bytes") as advance:
        return list(passthrough.check(output, source, advance))


def group(findings: Iterable[Finding]) -> list[Finding]:
    """One finding for one fault: layers as `{0..27}`, and other names with the same story beside them. Errors come first.

    Where the places differ in what was found, the first one's is shown.
    """
    by_layer: dict[tuple[str, ...], list[tuple[int, Finding]]] = {}
    for finding in findings:
        template, number = _template(finding.subject)
        by_layer.setdefault((finding.code, finding.severity, template, finding.expected, finding.mend), []).append(
            (number, finding)
        )
    by_story: dict[tuple[str, ...], list[Finding]] = {}
    for (code, severity, template, expected, mend), places in by_layer.items():
        joined = _join_layers(template, places)
        story = re.sub(r"[\d.]+(e[+-]?\d+)?", "#", joined.found.removesuffix(_FIRST))
        by_story.setdefault((code, severity, expected, mend, story), []).append(joined)
    joined_all = [_join_names(same) for same in by_story.values()]
    return sorted(joined_all, key=lambda f: f.severity != "error")


def has_errors(findings: Iterable[Finding]) -> bool:
    """Whether any finding says that the server would refuse the checkpoint or answer wrongly."""
    return any(f.severity == "error" for f in findings)


def _template(subject: str) -> tuple[str, int]:
    """`a.layers.3.b` -> (`a.layers.#.b`, 3): the number of a layer or block, or -1 where there is none."""
    match = re.search(r"(?<=(?:layers|blocks)\.)\d+(?=\.)", subject)
    return (subject[: match.start()] + "#" + subject[match.end() :], int(match[0])) if match else (subject, -1)


def _join_layers(template: str, places: Sequence[tuple[int, Finding]]) -> Finding:
    if len(places) == 1:
        return places[0][1]
    return _join([f for _, f in places], template.replace("#", number_runs(number for number, _ in places)))


def _join(same: Sequence[Finding], subject: str) -> Finding:
    """The first of `same`, for all of them. What was found may differ: the first text stands for all, and says so."""
    differ = len({f.found for f in same}) > 1 and not same[0].found.endswith(_FIRST)
    return dataclasses.replace(
        same[0], subject=subject, found=same[0].found + (_FIRST if differ else ""), count=sum(f.count for f in same)
    )


def _join_names(same: Sequence[Finding]) -> Finding:
    if len(same) == 1:
        return same[0]
    more = f" and {len(same) - _SHOWN} more" if len(same) > _SHOWN else ""
    return _join(same, ", ".join(f.subject for f in same[:_SHOWN]) + more)
