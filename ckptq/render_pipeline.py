"""`inspect` of a pipeline, or of another checkpoint with a denoiser in it: components, denoisers, and the recipes that fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ckptq.checkpoint import Component, Inventory
from ckptq.console import Console, size
from ckptq.errors import CkptqError
from ckptq.prepare import plan_parts
from ckptq.quantized import describe
from ckptq.recipe import Recipe, load_recipe, parse_recipe, shipped
from ckptq.scopes.denoisers import Denoiser, find_denoiser


def holds_denoiser(inventory: Inventory) -> bool:
    """Whether it is a pipeline, or a root checkpoint that vLLM-Omni serves."""
    return inventory.pipeline is not None or find_denoiser(inventory.main.config, None) is not None


def pipeline_data(inventory: Inventory, recipe: str | None) -> dict[str, Any]:
    """What `inspect` knows: components, and what a recipe, or each shipped one for such a pipeline, makes of them."""
    pipeline = inventory.pipeline["_class_name"] if inventory.pipeline else None
    found = {component.folder: find_denoiser(component.config, pipeline) for component in inventory.components}
    if recipe:
        recipes = {recipe: load_recipe(recipe)}
    else:
        names = tuple(denoiser.name.replace("_", "-") for denoiser in found.values() if denoiser)
        recipes = {name: parse_recipe(text, name) for name, text in shipped().items() if name.startswith(names)}
    touched = {name: _touched(inventory, parsed) for name, parsed in recipes.items()}
    return {
        "checkpoint": str(inventory.root),
        "pipeline": pipeline,
        "components": {c.folder: _component(c, found[c.folder]) for c in inventory.components},
        "other_files": list(inventory.files),
        "files_left_out": [*inventory.left_out, *(f"{c.folder}/{name}" for c in inventory.components for name in c.left_out)],
        "recipes": touched,
        "suggested": [name for name, result in touched.items() if not result["error"] and not recipe],
    }


def _component(component: Component, denoiser: Denoiser | None) -> dict[str, Any]:
    specs = [tensor.spec for tensor in component.tensors.values()]
    classes = component.config.get("architectures") or [component.config.get("_class_name")]
    return {
        "class": classes[0] if isinstance(classes, list) else None,
        "denoiser": denoiser.name if denoiser else None,
        "denoiser_source": denoiser.source if denoiser else None,
        "formats": {form: list(schemes) for form, schemes in denoiser.formats.items()} if denoiser else {},
        "quantized": describe(component) or None,
        "tensors": len(specs),
        "parameters": sum(spec.numel for spec in specs),
        "bytes": component.stored_bytes,
        "dtypes": dict(Counter(spec.dtype for spec in specs)),
    }


def _touched(inventory: Inventory, recipe: Recipe) -> dict[str, Any]:
    """{component: {action: modules}}, or why the recipe does not fit."""
    try:
        parts = plan_parts(recipe, inventory)
    except CkptqError as error:
        return {"components": {}, "error": str(error)}
    return {"components": {p.folder: dict(Counter(d.action for d in p.plan.decisions)) for p in parts}, "error": None}


def show_pipeline(console: Console, data: Mapping[str, Any]) -> None:
    """The same for people."""
    console.show(f"{data['checkpoint']}: {data['pipeline'] or 'no pipeline, and with a denoiser in it'}")
    rows = [
        (name or "(root)", c["class"], c["tensors"], f"{c['parameters']:,}", size(c["bytes"]), ", ".join(c["dtypes"]))
        for name, c in data["components"].items()
    ]
    console.table("Components", ("component", "class", "tensors", "parameters", "size", "dtypes"), rows, right=(2, 3, 4))
    for name, c in data["components"].items():
        if c["quantized"]:
            console.show(f"{name or 'it'} is quantized: {c['quantized']}")
        if c["denoiser"]:
            formats = "; ".join(f"{form}: {', '.join(schemes)}" for form, schemes in c["formats"].items())
            console.show(f"{name or 'it'}: denoiser {c['denoiser']} ({c['denoiser_source']}); formats {formats}")
    if rules := [
        (name, folder or "(root)", action, count)
        for name, result in data["recipes"].items()
        for folder, actions in result["components"].items()
        for action, count in actions.items()
    ]:
        console.show("")
        console.table("What recipes would make of it", ("recipe", "component", "becomes", "modules"), rules, right=(3,))
    for name, result in data["recipes"].items():
        if result["error"]:
            console.show(f"{name}: {result['error']}")
    if data["files_left_out"]:
        console.show("left out of an output: " + ", ".join(data["files_left_out"]))
    if data["suggested"]:
        console.show(f"next: ckptq convert --recipe {data['suggested'][0]} --model SRC --output OUT --dry-run")
