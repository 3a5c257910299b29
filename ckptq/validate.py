"""Runs the validators over a plan or a folder, and joins findings that are one fault at many places."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ckptq.checkpoint import PIPELINE, STAGING, Header, Inventory, read_config, read_header, read_inventory
from ckptq.console import Advance, Console, Unit
from ckptq.errors import SourceError, UnsupportedError
from ckptq.json_file import read_json
from ckptq.plan import Plan
from ckptq.quantized import dense_if_fp8
from ckptq.scopes import Scope
from ckptq.scopes.denoisers import find_denoiser
from ckptq.spelled import scope_to_validate
from ckptq.unstack import refuse_stacked, unstack
from ckptq.validators import Finding, Stored, configs, dtypes, files, kv, layout, one_rank, parallel, record, strays
from ckptq.validators.expected import Expected, expect
from ckptq.validators.grouping import group
from ckptq.validators.servers import DEFAULT, Rules, Server

Target = Literal["auto", "vllm", "vllm-omni"]


@dataclass(frozen=True, slots=True)
class Checked:
    """One stage that ran to its end, with how much it looked at."""

    what: str
    amount: int
    unit: Unit
    seconds: float


@dataclass(frozen=True, slots=True)
class Validation:
    """What a run of the validators came to.

    findings  joined over layers, errors first
    checked   the stages, in their order
    skipped   {group of checks that did not run: why}. The groups are what codes begin with
    built     what the server will build (`figures`), or None where the configs don't say
    scope     (name of the scope that it was judged by, where that comes from: "ckptq", "--scope", "ckptq.json")
    rules     whose, where they are not those of the vLLM that was asked for
    """

    findings: tuple[Finding, ...]
    checked: tuple[Checked, ...]
    skipped: Mapping[str, str]
    built: Mapping[str, Any] | None
    scope: tuple[str, str] | None = None
    rules: Rules | None = None


def validate_plan(plan: Plan, scope: Scope) -> list[Finding]:
    """What the server would find wrong with the output of this plan: names, dtypes, shapes, configs. Pure, no torch."""
    other = plan.files.get(configs.OTHER)
    stored = Stored(json.loads(plan.files["config.json"]), json.loads(other) if other else None, plan.tensors)
    findings, _ = _layout(stored, scope)
    return group(findings)


def validate_folder(folder: Path, **options: Any) -> list[Finding]:
    """The findings of `examine` alone, which has the same options."""
    return list(examine(folder, **options).findings)


def examine(
    folder: Path,
    *,
    source: Path | None = None,
    values: bool = True,
    passthrough: bool = True,
    staged: bool = False,
    copied: Collection[str] | None = None,
    progress: Console | None = None,
    header: Callable[[Path], Header] = read_header,
    server: Server = DEFAULT,
    tp: int = 1,
    ep: bool = False,
    scope: Scope | None = None,
    target: Target = "auto",
) -> Validation:
    """Looks for what is wrong with the checkpoint in `folder`.

    `source` is the checkpoint that it was made from; without it passthrough is left out. `staged`: the folder is the inside of an
    unfinished job, looked at before it is published. `copied`: tensors whose digest in ckptq.json was taken of the source's bytes;
    where it is the file's, too, nothing is left to compare, and of quantized tensors a sample is. `header` reads the header of a
    weight file, where it may lie elsewhere. `scope`: one that is spelled out, in place of ckptq's own. `target`: who is to serve
    it; `auto` is vLLM-Omni for a diffusion pipeline and vLLM for all else.
    Raises SourceError for a folder that can't be read or is an unfinished conversion, UnsupportedError where no scope fits, routed
    experts are stored together, or the target serves no such thing.
    """
    if is_diffusion(folder):
        from ckptq.validate_pipeline import examine_pipeline

        if target == "vllm":
            raise UnsupportedError("--target vllm: this is a diffusion pipeline, which vLLM-Omni serves", hint="leave --target out")
        options: dict[str, Any] = {"values": values, "passthrough": passthrough, "staged": staged, "copied": copied}
        return examine_pipeline(folder, source=source, progress=progress, header=header, **options)
    refuse_unfinished(folder, staged=staged)
    inventory = read_inventory(folder, header, strict=False)
    main = inventory.main
    scope, whence = scope_to_validate(main.config, scope, lambda: record.body(folder))
    refuse_stacked(main, scope)
    tensors = {name: tensor.spec for name, tensor in main.tensors.items()}
    stages = Stages(progress or Console(quiet=True))
    with stages.run("layout", len(tensors), "tensors") as advance:
        other, unreadable = other_config(folder, idle=isinstance(main.config.get("quantization_config"), dict))
        findings, at = _layout(Stored(main.config, other, tensors, unreadable), scope, server=server, tp=tp, ep=ep)
        findings += files.check(folder, main, values=values)
        advance(len(tensors))
    written, odd = record.read(folder)
    unrecorded = _unrecorded(written, bool(odd), values)
    digests: dict[str, str] | None = None if unrecorded else {}
    if values:
        with stages.run("values", main.nbytes, "bytes") as advance:
            findings += _values(inventory, scope, advance, digests)
    findings += odd
    if written and digests is None:
        findings += record.check(written, folder, main, None)
    elif written and digests is not None:
        with stages.run("record", len(digests), "tensors") as advance:
            findings += record.check(written, folder, main, digests)
            advance(len(digests))
    if source is not None and passthrough:
        with stages.run("passthrough", main.nbytes, "bytes") as advance:
            proved = [name for name in copied or () if digests and written and digests[name] == (written.tensors or {}).get(name)]
            original = unstack(dense_if_fp8(read_inventory(source)), scope)
            findings += _passthrough(inventory, original, scope, advance, sample=copied is not None, proved=proved)
    unbuilt = "" if at else "the configs don't say what will be built"
    skipped = {
        "layout": unbuilt,
        "kv": unbuilt,
        "values": "" if values else "left out by --no-values",
        "record": unrecorded,
        "passthrough": "" if source is not None and passthrough else "needs --source SRC",
        "parallel": unbuilt if tp > 1 or ep else "needs --tp N or --ep",
    }
    skipped = {what: why for what, why in skipped.items() if why}
    if target == "vllm-omni":
        from ckptq.validators import omni

        findings = [omni.of_talker(f) for f in findings]
    built = figures(at) if at else None
    return Validation(tuple(group(findings)), tuple(stages.ended), skipped, built, (scope.name, whence))


def is_diffusion(folder: Path) -> bool:
    """Whether it is a diffusion pipeline, or a root checkpoint that vLLM-Omni takes for one."""
    if (folder / PIPELINE).is_file():
        return True
    try:
        return find_denoiser(read_config(folder)[1], None) is not None
    except (SourceError, OSError):
        return False


@dataclass(slots=True)
class Stages:
    """Stages as the user sees them, and those that ended."""

    console: Console
    ended: list[Checked] = field(default_factory=list)

    @contextmanager
    def run(self, what: str, total: int, unit: Unit) -> Iterator[Advance]:
        start = time.monotonic()
        with self.console.stage(what, total, unit) as advance:
            yield advance
        self.ended.append(Checked(what, total, unit, time.monotonic() - start))


def refuse_unfinished(folder: Path, *, staged: bool = False) -> None:
    """Raises SourceError for the folder of a conversion that has not published its output."""
    if (folder / STAGING).exists():
        what = f"it holds {STAGING}"
    elif STAGING in folder.resolve().parts and not staged:
        what = "it is what a job works in"
    elif folder.is_dir() and not (folder / "config.json").is_file() and any(folder.glob("*.safetensors*")):
        what = "it has no config.json"
    else:
        return
    raise SourceError(
        f"{folder}: an unfinished conversion: {what}",
        hint="finish it with the command that began it and --resume: `ckptq convert ... --resume`",
    )


def _layout(
    stored: Stored, scope: Scope, *, server: Server = DEFAULT, tp: int = 1, ep: bool = False
) -> tuple[list[Finding], Expected | None]:
    """(findings without values, what the server will build or None where the configs don't say)."""
    settings, findings = configs.read(stored, scope, server)
    if settings is None:
        return findings, None
    at = expect(stored, scope, settings)
    for validator in (layout, strays, kv):
        findings += validator.check(at)
    findings += dtypes.check(at, stored)
    if tp > 1 or ep:
        findings += parallel.check(scope, stored.config, one_rank.built(at), one_rank.shapes(at), tp, ep=ep, server=server)
    else:
        findings += one_rank.check(at, stored.config)
    return findings, at


def _unrecorded(written: record.Record | None, odd: bool, values: bool) -> str:
    """Why the bytes can't be compared with ckptq.json, or ""."""
    if written is None:
        return f"{record.RECORD} can't be read" if odd else f"no {record.RECORD}"
    if written.tensors is None:
        return f"no digests in {record.RECORD}"
    return "" if values else "left out by --no-values"


def other_config(folder: Path, idle: bool) -> tuple[Mapping[str, Any] | None, str]:
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


def _values(inventory: Inventory, scope: Scope, advance: Advance, digests: dict[str, str] | None) -> Iterator[Finding]:
    from ckptq.validators import values

    return values.check(inventory.root, inventory.main, scope, advance, digests)


def _passthrough(output: Inventory, source: Inventory, scope: Scope, advance: Advance, **options: Any) -> Iterator[Finding]:
    from ckptq.validators import passthrough

    return passthrough.check(output, source, scope, advance, **options)


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
