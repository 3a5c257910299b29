"""Results as data for machines and as tables for people; both from the same values."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from ckptq.checkpoint import Component, Inventory
from ckptq.console import Console, size
from ckptq.decisions import decide
from ckptq.errors import CkptqError, UnsupportedError
from ckptq.exporters import all_formats, find_exporter
from ckptq.linears import LanguageModel, find_linears
from ckptq.plan import module_of
from ckptq.planner import subjects
from ckptq.quantized import describe
from ckptq.recipe import Recipe, load_recipe, parse_recipe, shipped
from ckptq.reports import safe_text
from ckptq.schemes import SCHEMES
from ckptq.scopes import Scope, all_scopes
from ckptq.spelled import choose_scope
from ckptq.unstack import unstack


def inspect_data(inventory: Inventory, recipe: str | None) -> dict[str, Any]:
    """What `inspect` knows: components, parts, and what each rule of a recipe, or of every shipped one, touches.

    An architecture without a scope, or a checkpoint that a recipe does not fit, is shown all the same, with the reason.
    """
    component = inventory.main
    recipes = {recipe: load_recipe(recipe)} if recipe else _for_plain_models()
    spelled = recipes[recipe].scope if recipe else None
    proposal, unproposed = "", ""
    try:
        scope, reason = choose_scope(component.config, spelled), ""
    except UnsupportedError as error:
        scope, reason = None, str(error)
        proposal, unproposed = _proposal(inventory)
    proposal = proposal or (_extended(scope, component) if scope and not spelled else "")
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


def _for_plain_models() -> dict[str, Recipe]:
    parsed = {name: parse_recipe(text, name) for name, text in shipped().items()}
    return {name: recipe for name, recipe in parsed.items() if not recipe.components}


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


def _extended(scope: Scope, component: Component) -> str:
    """The family's scope as YAML, with what is stored beside the model under `skipped`; "" where nothing is."""
    from ckptq.proposals import as_yaml, with_skipped

    proposal = with_skipped(scope, component)
    return as_yaml(proposal) if proposal else ""


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
        decisions = decide(recipe, subjects(component, scope, model))
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
