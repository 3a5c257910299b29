"""Runs the validators over a plan or a folder, and joins findings that are one fault at many places."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ckptq.checkpoint import STAGING, Header, Inventory, read_header, read_inventory
from ckptq.console import Console
from ckptq.errors import SourceError
from ckptq.json_file import read_json
from ckptq.plan import Plan, module_of
from ckptq.scopes import Scope, find_scope
from ckptq.validators import Finding, Stored, configs, dtypes, files, kv, layout, parallel, record, strays
from ckptq.validators.expected import Expected, expect
from ckptq.validators.grouping import group, has_errors
from ckptq.validators.servers import DEFAULT, Server

__all__ = ["group", "has_errors", "refuse_unfinished", "validate_folder", "validate_plan"]


def validate_plan(plan: Plan, scope: Scope) -> list[Finding]:
    """What the server would find wrong with the output of this plan: names, dtypes, shapes, configs. Pure, no torch."""
    other = plan.files.get(configs.OTHER)
    stored = Stored(json.loads(plan.files["config.json"]), json.loads(other) if other else None, plan.tensors)
    return group(_layout(stored, scope, DEFAULT, 1, False, {}))


def validate_folder(
    folder: Path,
    *,
    source: Path | None = None,
    values: bool = True,
    passthrough: bool = True,
    staged: bool = False,
    progress: Console | None = None,
    header: Callable[[Path], Header] = read_header,
    server: Server = DEFAULT,
    tp: int = 1,
    ep: bool = False,
) -> list[Finding]:
    """What is wrong with the checkpoint in `folder`, errors first.

    `source` is the checkpoint that it was made from; without it passthrough is left out. `staged`: the folder is the inside of an
    unfinished job, looked at before it is published. `header` reads the header of a weight file, where it may lie elsewhere.
    Raises SourceError for a folder that can't be read or is an unfinished conversion, UnsupportedError where no scope fits.
    """
    refuse_unfinished(folder, staged=staged)
    inventory = read_inventory(folder, header, strict=False)
    main = inventory.main
    scope = find_scope(main.config)
    tensors = {name: tensor.spec for name, tensor in main.tensors.items()}
    talk = progress or Console(quiet=True)
    with talk.stage("layout", len(tensors), "tensors") as advance:
        other, unreadable = _other_config(folder, idle=isinstance(main.config.get("quantization_config"), dict))
        stored = Stored(main.config, other, tensors, unreadable)
        findings = list(_layout(stored, scope, server, tp, ep, talk.facts))
        findings += files.check(folder, main, values=values)
        advance(len(tensors))
    written, odd = record.read(folder)
    digests: dict[str, str] | None = {} if values and written and written.tensors is not None else None
    if values:
        findings += _values(inventory, scope, talk, digests)
    findings += odd
    if written and digests is None:
        findings += record.check(written, folder, main, None)
    elif written and digests is not None:
        with talk.stage("record", len(digests), "tensors") as advance:
            findings += record.check(written, folder, main, digests)
            advance(len(digests))
    if source is not None and passthrough:
        findings += _passthrough(inventory, read_inventory(source), scope, talk)
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


def _layout(stored: Stored, scope: Scope, server: Server, tp: int, ep: bool, facts: dict[str, Any]) -> Iterator[Finding]:
    """Findings without values; `facts` gets what the server will build."""
    yield from configs.check(stored, scope, server)
    settings = configs.settings(stored, scope, server)
    if settings is None:
        return
    at = expect(stored, scope, settings)
    facts |= figures(at)
    for validator in (layout, strays, kv):
        yield from validator.check(at)
    yield from dtypes.check(at, stored)
    if tp > 1 or ep:
        shapes = {module_of(name): spec.shape for name, spec in stored.tensors.items() if name.endswith(".weight")}
        linears = dict.fromkeys(at.linears.values())
        built = ((linear, at.format_of(linear.shards[0])) for linear in linears)
        yield from parallel.check(scope, stored.config, built, shapes, tp, ep=ep, server=server)


def _other_config(folder: Path, idle: bool) -> tuple[Mapping[str, Any] | None, str]:
    """(hf_quant_config.json, why it can't be read). Raises SourceError for that, unless the file is `idle`."""
    path = folder / configs.OTHER
    if not path.exists():
        return None, ""
    try:
        data = read_json(path)
        if not isinstance(data, dict):
            raise SourceError(f"{path}: expected a JSON object, found {type(data).__name__}")
    except SourceError as problem:
        if idle:
            return None, str(problem).removeprefix(f"{path}: ")
        raise
    return data, ""


def _values(inventory: Inventory, scope: Scope, talk: Console, digests: dict[str, str] | None) -> list[Finding]:
    from ckptq.validators import values

    with talk.stage("values", inventory.main.nbytes, "bytes") as advance:
        return list(values.check(inventory.root, inventory.main, scope, advance, digests))


def _passthrough(output: Inventory, source: Inventory, scope: Scope, talk: Console) -> list[Finding]:
    from ckptq.validators import passthrough

    with talk.stage("passthrough", output.main.nbytes, "bytes") as advance:
        return list(passthrough.check(output, source, scope, advance))


def figures(at: Expected) -> dict[str, Any]:
    """What the server will build, in figures: `linears` by the format it stores them in, counted as the checkpoint names them."""
    formats = Counter(form.name for module in at.linears if (form := at.format_of(module)))
    return {
        "method": at.settings.method,
        "format": at.settings.format,
        "kv_cache": "fp8" if at.settings.kv_fp8 else "auto",
        "linears": dict(formats),
        "kept": len(at.linears) - formats.total(),
    }
