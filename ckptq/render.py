"""Results as data for machines and as tables for people; both from the same values."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ckptq.checkpoint import Component, Inventory
from ckptq.console import Console, duration, number_runs, size
from ckptq.convert import Prepared, Report
from ckptq.cost import RATES
from ckptq.errors import CkptqError, UnsupportedError
from ckptq.exporters import all_formats, find_exporter
from ckptq.linears import LanguageModel, find_linears
from ckptq.plan import CARRIED, Decision, module_of
from ckptq.planner import decide
from ckptq.quantized import describe
from ckptq.recipe import Recipe, load_recipe, parse_recipe, shipped
from ckptq.reports import safe_text, verdict
from ckptq.reports.human import show_findings
from ckptq.schemes import SCHEMES
from ckptq.scopes import Scope, all_scopes
from ckptq.spelled import choose_scope
from ckptq.unstack import unstack


def plan_data(job: Prepared) -> dict[str, Any]:
    """`--dry-run --format json`."""
    plan, cost = job.plan, job.cost
    return {
        "plan": plan.digest,
        "scope": job.scope.name,
        "format": job.recipe.export.format,
        "source_bytes": job.inventory.main.stored_bytes,
        "dequantized": list(job.inventory.main.dequantized),
        "output_bytes": plan.nbytes,
        "decisions": [asdict(d) for d in plan.decisions],
        "shards": [{"file": s.file, "bytes": s.data_bytes, "tensors": len(s.offsets)} for s in plan.shards],
        "carried": list(plan.carried),
        "config_changes": list(plan.config_changes),
        "files_copied": list(plan.sidecars),
        "files_left_out": list(plan.left_out),
        "calibration": {
            "needed": job.calibrates,
            "amaxes_from": str(job.reused.path) if job.reused else None,
            "source": job.recipe.calibration.source if job.calibrates else None,
            "samples": cost.samples,
            "tokens_at_most": cost.tokens,
            "flops_at_most": cost.flops,
        },
        "peak_memory_bytes": cost.peak,
        "peak_memory_one_sample_a_wave_bytes": cost.least,
        "findings": [asdict(f) for f in job.findings],
    }


def show_plan(console: Console, job: Prepared) -> None:
    """`--dry-run`: what becomes what, by which rule, and what it takes."""
    plan, cost, source = job.plan, job.cost, job.inventory.main
    console.table("What becomes what", ("modules", "become", "because of", "count"), grouped(plan.decisions), right=(3,))
    facts = [
        (
            "source",
            f"{size(source.stored_bytes)} in {_files(len(source.weight_files))}, scope {job.scope.name}",
        ),
        ("output", f"{size(plan.nbytes)} in {_files(len(plan.shards))}, format {job.recipe.export.format}"),
        ("config.json", "; ".join(plan.config_changes) + "; otherwise as it is"),
        *([("carried over", carried(plan.carried))] if plan.carried else []),
        ("files copied", ", ".join(plan.sidecars) or "none"),
        ("left out", ", ".join(plan.left_out) or "nothing"),
        ("peak memory", f"about {size(cost.peak)}" + (f"; {size(cost.least)} at the least, with --memory" * job.calibrates)),
    ]
    if source.dequantized:
        facts.insert(1, ("from FP8", "; ".join(source.dequantized)))
    if job.calibrates:
        times = ", ".join(f"{duration(cost.flops / rate)} on {name}" for name, rate in RATES)
        samples = f"{cost.samples} samples of {job.recipe.calibration.source}"
        work = f"{samples}, at most {cost.tokens} tokens, {cost.flops:.3g} FLOPs without towers"
        facts.append(("calibration", f"{work}: {times}"))
    else:
        taken = job.reused is not None and plan.calibrated
        facts.append(("calibration", f"none, amaxes from {job.reused.path}" if taken and job.reused else "not needed"))
    facts.append(("layout check", verdict(job.findings)))
    console.table("", ("", ""), facts)
    show_findings(console, job.findings)


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


def report_data(report: Report) -> dict[str, Any]:
    """`convert --format json`."""
    return {**asdict(report), "output": str(report.output), "serve": _serve(report.output)}


def show_report(console: Console, report: Report) -> None:
    """The table at the end of a conversion."""
    ratio = report.output_bytes / report.source_bytes
    rows = [
        ("output", str(report.output)),
        ("size", f"{size(report.source_bytes)} -> {size(report.output_bytes)} ({ratio:.1%})"),
        ("tensors", ", ".join(f"{count} {dtype}" for dtype, count in report.tensors.items())),
        ("time", ", ".join(f"{name} {duration(seconds)}" for name, seconds in report.seconds.items()) or "-"),
        ("peak memory", size(report.peak_rss) + (f", {size(report.peak_gpu)} on the GPU" if report.peak_gpu else "")),
        *([("carried over", carried(report.carried))] if report.carried else []),
        ("verdict", verdict(report.findings)),
        ("note", find_exporter(report.format).READERS),
    ]
    console.table("Done", ("", ""), rows)
    console.show(f"serve it: {_serve(report.output)}")  # a line of its own: a table would fold a long path
    if report.findings:
        console.show("")
    show_findings(console, report.findings)


def _serve(folder: Path) -> str:
    return f"vllm serve {shlex.quote(str(folder))}"


def inspect_data(inventory: Inventory, recipe: str | None) -> dict[str, Any]:
    """What `inspect` knows: components, parts, and what each rule of a recipe, or of every shipped one, touches.

    An architecture without a scope, or a checkpoint that a recipe does not fit, is shown all the same, with the reason.
    """
    component = inventory.main
    recipes = {recipe: load_recipe(recipe)} if recipe else {name: parse_recipe(text, name) for name, text in shipped().items()}
    spelled = recipes[recipe].scope if recipe else None
    proposal, unproposed = "", ""
    try:
        scope, reason = choose_scope(component.config, spelled), ""
    except UnsupportedError as error:
        scope, reason = None, str(error)
        proposal, unproposed = _proposal(inventory)
    parts: dict[str, dict[str, Any]] = {}
    for name, tensor in component.tensors.items():
        part = parts.setdefault(_part(scope, name), {"tensors": 0, "parameters": 0, "bytes": 0, "dtypes": {}})
        part["tensors"] += 1
        part["parameters"] += tensor.spec.numel
        part["bytes"] += tensor.spec.nbytes
        part["dtypes"][tensor.spec.dtype] = part["dtypes"].get(tensor.spec.dtype, 0) + 1
    recipes_touch = _touched_by_all(inventory, scope, recipes) if scope else {}
    fitting = [name for name, touched in recipes_touch.items() if not touched["error"]]
    return {
        "checkpoint": str(inventory.root),
        "architectures": component.config.get("architectures"),
        "scope": scope.name if scope else None,
        "scope_source": scope.source if scope else None,
        "no_scope": reason or None,
        "proposal": proposal or None,
        "no_proposal": unproposed or None,
        "quantized": describe(component) or None,
        "layers": scope.layer_count(component.config) if scope else None,
        "parts": parts,
        "files_left_out": list(component.left_out),
        "recipes": recipes_touch,
        "suggested": [name for name in fitting if scope and _family(name) == scope.name and not recipe],
    }


def _family(recipe: str) -> str | None:
    """The scope that a shipped recipe is for: the one whose name begins most like the recipe's, `qwen3_moe` of `qwen3-moe-fp8`.

    Patterns can't tell: `model.layers.*` and `lm_head` suit half of the families.
    """

    def alike(scope: Scope) -> tuple[int, int]:
        pairs = zip(recipe.replace("-", ""), scope.name.replace("_", ""), strict=False)
        return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))), -len(scope.name)

    best = max(all_scopes(), key=alike)
    return best.name if alike(best)[0] else None


def _proposal(inventory: Inventory) -> tuple[str, str]:
    """(a scope as YAML, "") for an architecture that has none, or ("", why there is no proposal)."""
    from ckptq.proposals import as_yaml, propose

    if what := describe(inventory.main):
        return "", f"no scope can be proposed from a quantized checkpoint: {what}"
    try:
        return as_yaml(propose(inventory.root / inventory.main.folder, inventory.main)), ""
    except UnsupportedError as error:
        return "", str(error)


def _part(scope: Scope | None, tensor: str) -> str:
    if scope is None:
        return tensor.partition(".")[0]
    name = scope.canonical(tensor)
    if skipped := next((s for s in scope.skipped if name.startswith(s)), None):
        return skipped.rstrip(".")
    if scope.layer_of(tensor):
        return "language model layers"
    tower = next((t.prefix for t in scope.towers if name.startswith(t.prefix + ".")), None)
    return tower or next((k for k in scope.kept if name.startswith(k + ".")), module_of(name))


def _touched_by_all(inventory: Inventory, scope: Scope, recipes: Mapping[str, Recipe]) -> dict[str, dict[str, Any]]:
    try:
        component = unstack(inventory, scope).main
        model = find_linears(component, scope)
    except CkptqError as error:
        return {name: {"rules": {}, "error": str(error)} for name in recipes}
    return {name: _touched(component, scope, recipe, model) for name, recipe in recipes.items()}


def _touched(component: Component, scope: Scope, recipe: Recipe, model: LanguageModel) -> dict[str, Any]:
    """{rule: number of modules it decides}, or why the recipe does not fit."""
    try:
        decisions = decide(recipe, component, scope, model)
    except CkptqError as error:
        return {"rules": {}, "error": str(error)}
    rules = [f"keep: {p}" for p in recipe.keep] + [f"quantize: {p}" for rule in recipe.quantize for p in rule.modules]
    touched = {rule: sum(d.rule == rule and (d.action != "keep" or rule.startswith("keep")) for d in decisions) for rule in rules}
    return {"rules": touched, "error": None}


def show_inspect(console: Console, data: Mapping[str, Any]) -> None:
    """`inspect` for people."""
    console.show(
        f"{data['checkpoint']}: {', '.join(data['architectures'] or ['no architecture in config.json'])}"
        + (f", {data['layers']} layers" if data["layers"] else "")
    )
    if data["quantized"]:
        console.show(f"quantized: {data['quantized']}")
    console.show(f"scope {data['scope']} ({data['scope_source']})" if data["scope"] else f"no scope: {data['no_scope']}")
    rows = [
        (name, part["tensors"], f"{part['parameters']:,}", size(part["bytes"]), ", ".join(part["dtypes"]))
        for name, part in data["parts"].items()
    ]
    total = [sum(part[key] for part in data["parts"].values()) for key in ("tensors", "parameters", "bytes")]
    rows.append(("total", total[0], f"{total[1]:,}", size(total[2]), ""))
    console.table("Parts", ("part", "tensors", "parameters", "size", "dtypes"), rows, right=(1, 2, 3))
    _show_recipes_that_fit(console, data)
    if data["files_left_out"]:
        console.show("left out of an output: " + ", ".join(data["files_left_out"]))
    if data["no_proposal"]:
        console.show(data["no_proposal"])
    if data["proposal"]:  # not by rich, which would wrap it
        print("\n".join(map(safe_text, data["proposal"].split("\n"))), end="")


def _show_recipes_that_fit(console: Console, data: Mapping[str, Any]) -> None:
    """Those of the family rule by rule, others by name; of one recipe, or where all fail alike, why it does not fit."""
    touched = data["recipes"]
    fitting = [name for name, found in touched.items() if not found["error"]]
    told = data["suggested"] or fitting
    if rules := [(name, rule, count) for name in told for rule, count in touched[name]["rules"].items()]:
        console.table("What recipes would touch", ("recipe", "rule", "modules"), rules, right=(2,))
    if others := [name for name in fitting if name not in told]:
        console.show("recipes of other families whose patterns match, too: " + ", ".join(others))
    errors = {found["error"] for found in touched.values() if found["error"]}
    if errors and not fitting and len(errors) == 1:
        console.show(f"{next(iter(touched)) if len(touched) == 1 else 'no recipe fits'}: {errors.pop()}")
    elif errors:
        console.show(f"{len(touched) - len(fitting)} recipes don't fit: `ckptq inspect SRC --recipe NAME` says why")
    if data["suggested"] and not data["quantized"]:
        console.show(f"next: ckptq convert --recipe {data['suggested'][0]} --model SRC --output OUT --dry-run")


def schemes_data() -> dict[str, dict[str, Any]]:
    """{scheme: title and, by format, the format's own word for it}."""
    words = {name: find_exporter(name).SCHEMES for name in all_formats()}
    return {
        name: {"title": scheme.title, "formats": {form: known[name] for form, known in words.items() if name in known}}
        for name, scheme in SCHEMES.items()
    }


def show_schemes(console: Console, data: Mapping[str, Any]) -> None:
    """`recipes --schemes` for people."""
    rows = [(name, scheme["title"], *(scheme["formats"].get(form, "-") for form in all_formats())) for name, scheme in data.items()]
    console.table("", ("scheme", "what becomes of a linear", *all_formats()), rows)
    console.show("A recipe's `scheme` is one of the rows, its `export.format` one of the columns; - is refused.")


def recipes_data(known: Mapping[str, str]) -> dict[str, Any]:
    """{name: description} of the shipped recipes."""
    return {name: parse_recipe(text, name).description for name, text in known.items()}


def show_recipes(console: Console, data: Mapping[str, Any]) -> None:
    """`recipes` for people."""
    console.table("", ("recipe", "what it does"), list(data.items()), whole=(0,))
    console.show("`ckptq recipes NAME` prints one; `ckptq convert --recipe NAME` runs it.")
