"""From a recipe to a job that is planned and found sound, before any arithmetic."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptq import cost, hub, quantized, reuse, validate
from ckptq.checkpoint import Component, Inventory, SourceTensor, component_names, is_weight_copy, read_inventory
from ckptq.cost import Cost
from ckptq.denoise_cost import Reads, reads, refuse_unrunnable
from ckptq.errors import RecipeError, UnsupportedError
from ckptq.exporters import find_exporter
from ckptq.foreign import refuse_foreign
from ckptq.mistakes import close
from ckptq.plan import Plan
from ckptq.plan_denoiser import build_denoiser_plan, written_component
from ckptq.planner import build_plan
from ckptq.recipe import Recipe
from ckptq.reuse import Reused
from ckptq.scopes import Scope
from ckptq.scopes.denoisers import Denoiser, find_denoiser
from ckptq.sections import PromptCalibration, Treatment
from ckptq.spelled import choose_scope
from ckptq.storage import is_stored
from ckptq.unstack import unstack
from ckptq.validators import Finding, Stored, omni
from ckptq.validators.grouping import group
from ckptq.validators.omni import pipeline


@dataclass(frozen=True, slots=True)
class Part:
    """A component that is converted.

    component  as the plan reads it: routed experts one by one, what a file must hold as one joined
    scope      of a language model or a denoiser; None where weights are stored in FP8 and no server reads them
    """

    component: Component
    scope: Scope | Denoiser | None
    plan: Plan

    @property
    def folder(self) -> str:
        return self.component.folder


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job that has been planned and found sound, before any arithmetic.

    parts  the components that are converted; of a plain model there is one, in the folder ""
    reads  what calibrating its denoisers reads and holds, where it is a pipeline that needs that
    """

    recipe: Recipe
    source: hub.Source
    inventory: Inventory
    parts: tuple[Part, ...]
    cost: Cost
    findings: tuple[Finding, ...]
    reused: Reused | None = None
    reads: Reads | None = None

    @property
    def calibrates(self) -> bool:
        """Whether samples run through the model: scales come from activations, and no earlier run has measured them."""
        return self.calibrated and self.reused is None

    @property
    def calibrated(self) -> bool:
        """Whether any scale comes from activations."""
        return any(part.plan.calibrated for part in self.parts)

    @property
    def plan(self) -> Plan:
        """Of a plain model."""
        (part,) = self.parts
        return part.plan

    @property
    def scope(self) -> Scope:
        """Of a plain language model."""
        (part,) = self.parts
        assert isinstance(part.scope, Scope)
        return part.scope

    @property
    def kept(self) -> tuple[str, ...]:
        """A pipeline's files that are copied as they are, relative to the root: those of its other components, and of none."""
        converted = {part.folder for part in self.parts}
        others = (component for component in self.inventory.components if component.folder not in converted)
        return (*self.inventory.files, *(file for component in others for file in files_of(component)))

    @property
    def output_bytes(self) -> int:
        """What the output takes, without small files."""
        converted = {part.folder for part in self.parts}
        stay = [c for c in self.inventory.components if c.folder not in converted]
        copies = (*self.inventory.files, *(f"{c.folder}/{name}" for c in stay for name in c.left_out))  # a VAE's .bin, say
        beside = sum((self.source.root / name).stat().st_size for name in copies if is_weight_copy(name))
        return beside + sum(c.stored_bytes for c in stay) + sum(part.plan.nbytes for part in self.parts)


def prepare(recipe: Recipe, amax: Path | None = None) -> Prepared:
    """Reads headers and plans. Of a Hub source's weights nothing else is fetched yet.

    amax   the ckptq.json of an earlier run, or its folder: what it measured stands for a calibration
    """
    if recipe.model is None:
        raise RecipeError("the recipe names no model", hint="add `model:` to it, or give --model SRC")
    source = hub.fetch(recipe.model, weights=False)
    inventory = read_inventory(source.root, source.header)
    _refuse_other_kind(recipe, inventory)
    if recipe.from_fp8:
        inventory = _dense(recipe, inventory)
    if inventory.pipeline is None and find_denoiser(inventory.main.config, None) is None:
        scope = choose_scope(inventory.main.config, recipe.scope)
        inventory = unstack(inventory, scope)
        plan = build_plan(recipe, inventory.main, scope, find_exporter(recipe.export.format))
        parts: tuple[Part, ...] = (Part(inventory.main, scope, plan),)
        findings = validate.validate_plan(plan, scope)
    else:
        parts = plan_parts(recipe, inventory)
        findings = _findings(_planned(inventory, parts))
    reused = reuse.read_amax(amax) if amax is not None else None
    if reused is not None:
        reuse.refuse_missing(reused, parts)
    calibrates = reused is None and any(part.plan.calibrated for part in parts)
    if calibrates and not isinstance(parts[0].scope, Scope) and "calibration" not in recipe.model_fields_set:
        recipe = recipe.model_copy(update={"calibration": PromptCalibration(source="prompts")})
    told = None
    if isinstance(parts[0].scope, Scope):
        needs = cost.estimate(parts[0].plan, inventory.main, parts[0].scope, recipe, calibrates=calibrates)
    else:
        needs = Cost(resident=0, layer=0, sample=0, passing=0, samples=0, tokens=0, flops=0.0)
        if calibrates:
            told = _reads(recipe, inventory, parts)
    return Prepared(recipe, source, inventory, parts, needs, tuple(findings), reused, told)


def _reads(recipe: Recipe, inventory: Inventory, parts: tuple[Part, ...]) -> Reads:
    """What running the denoisers takes. Raises RecipeError for samples that are no prompts, UnsupportedError for what can't run."""
    for part in parts:
        if part.plan.calibrated and isinstance(part.scope, Denoiser):
            refuse_unrunnable(inventory.pipeline, part.scope)
    if not isinstance(recipe.calibration, PromptCalibration):
        raise RecipeError(
            f"calibration.source {recipe.calibration.source}: a denoiser is calibrated on prompts",
            hint="add `calibration: {source: prompts}`, or take a scheme with dynamic activations",
        )
    settings = recipe.calibration
    idle = {part.folder for part in parts} | ({"vae"} if not settings.images and not settings.files else set())
    for component in inventory.components:  # prompts run through what stays, too, and codes are no values
        if component.folder not in idle and (what := quantized.describe(component)):
            raise UnsupportedError(
                f"{component.folder}, which prompts run through, is quantized: {what}",
                hint="give the pipeline with that component in BF16, or take a scheme with dynamic activations",
            )
    return reads(inventory, recipe.calibration)


def _refuse_other_kind(recipe: Recipe, inventory: Inventory) -> None:
    """Raises RecipeError for a recipe of pipelines and a plain model, or the other way round, and for components that are not."""
    if inventory.pipeline is None:
        if recipe.components:
            raise RecipeError(
                f"components: {inventory.root} is no pipeline: it has no model_index.json",
                hint="write `quantize:` with rules for a plain model, or give the pipeline's folder",
            )
        if (denoiser := find_denoiser(inventory.main.config, None)) is not None:
            _refuse_settings(denoiser.name, kv_cache=recipe.kv_cache, scope=recipe.scope)
        return
    name, folders = inventory.pipeline["_class_name"], [c.folder for c in inventory.components]
    if not recipe.components:
        raise RecipeError(
            f"the source is a pipeline, {name}: the recipe's rules are for a plain model",
            hint=f"write `components:` with what becomes of {', '.join(folders)}; `ckptq recipes` lists recipes for pipelines",
        )
    for component, treatment in recipe.components.items():
        known = component_names(inventory.pipeline)
        if component not in known:
            raise RecipeError(
                f"components.{component}: {name} has no such component{close(component, known, near_only=True)}",
                hint=f"it has {', '.join(known)}",
            )
        if component not in folders and treatment.action != "keep":
            refuse_foreign(inventory.root / component)
            raise RecipeError(
                f"components.{component}: it has no weights in safetensors", hint=f"those that have: {', '.join(folders)}"
            )
    _refuse_settings(f"a pipeline, {name}", kv_cache=recipe.kv_cache, scope=recipe.scope, keep=recipe.keep)


def _refuse_settings(what: str, **settings: object) -> None:
    if given := next((setting for setting, value in settings.items() if value), None):
        raise RecipeError(f"{given}: belongs to a plain language model; the source is {what}")


def _dense(recipe: Recipe, inventory: Inventory) -> Inventory:
    """With the components that are converted seen as BF16."""
    if inventory.pipeline is None:
        return quantized.dense(inventory)
    converted = {name for name, treatment in recipe.components.items() if treatment.action != "keep"}
    if not any(quantized.describe(c) for c in inventory.components if c.folder in converted):
        raise RecipeError(
            "--from-fp8: no component that the recipe converts is quantized, so there is nothing to dequantize",
            hint="leave --from-fp8 out",
        )
    one = (dataclasses.replace(inventory, components=(c,)) for c in inventory.components)
    components = (quantized.dense(i).main if i.main.folder in converted and quantized.describe(i.main) else i.main for i in one)
    return dataclasses.replace(inventory, components=tuple(components))


def plan_parts(recipe: Recipe, inventory: Inventory) -> tuple[Part, ...]:
    """The components that a recipe converts, or a root checkpoint's denoiser. Raises a CkptqError for what can't be."""
    _refuse_other_kind(recipe, inventory)
    parts = tuple(_parts(recipe, inventory))
    if not parts:
        raise RecipeError("the recipe converts nothing: every component that it names stays")
    converted = {part.folder for part in parts}
    others = (component for component in inventory.components if component.folder not in converted)
    stored = [component.folder for component in others if is_stored(component.config.get("quantization_config"))]
    if stored and any(part.scope for part in parts):
        raise UnsupportedError(
            f"{', '.join(stored)}: in ckptq's form for storage, which no server reads beside {parts[0].folder}",
            hint="`ckptq restore SRC BF16_DIR` makes a pipeline of it that can be served, and converted",
        )
    return parts


def _parts(recipe: Recipe, inventory: Inventory) -> Iterator[Part]:
    if inventory.pipeline is None:
        yield _denoiser(recipe, Treatment(quantize=recipe.quantize, keep=recipe.keep), inventory, inventory.main)
        return
    for component in inventory.components:
        treatment = recipe.components.get(component.folder, Treatment(action="keep"))
        if treatment.action is None:
            yield _denoiser(recipe, treatment, inventory, component)
        elif treatment.action != "keep":
            from ckptq.storage import plan_storage

            yield Part(component, None, plan_storage(component, treatment.action, recipe.export.shard_size))


def _denoiser(recipe: Recipe, treatment: Treatment, inventory: Inventory, component: Component) -> Part:
    name = inventory.pipeline["_class_name"] if inventory.pipeline else None
    denoiser = find_denoiser(component.config, name)
    if denoiser is None or component.folder not in denoiser.folders:
        said = component.config.get("architectures") or [component.config.get("_class_name") or component.folder]
        raise UnsupportedError(
            f"components.{component.folder}: no server is known that takes a quantized {said[0]} in {name}",
            hint=f"write `{component.folder}: keep`, or `fp8-storage` for files that a loader turns back to BF16",
        )
    seen = written_component(component, denoiser, recipe.export.format)
    exporter = find_exporter(recipe.export.format)
    return Part(seen, denoiser, build_denoiser_plan(recipe, treatment, inventory, seen, denoiser, exporter))


def _planned(inventory: Inventory, parts: Sequence[Part]) -> Inventory:
    """The output as its headers will describe it."""
    written = {part.folder: _written(part) for part in parts}
    components = tuple(written.get(component.folder, component) for component in inventory.components)
    return dataclasses.replace(inventory, components=components, left_out=())


def _written(part: Part) -> Component:
    config, plan = part.plan.files["config.json"], part.plan
    tensors = {name: SourceTensor(spec, "", 0) for name, spec in plan.tensors.items()}
    told = {"config_text": config, "config": json.loads(config), "tensors": tensors}
    return dataclasses.replace(part.component, **told, sidecars=plan.sidecars, left_out=())


def _findings(planned: Inventory) -> list[Finding]:
    """What the server would find wrong with the output, and one component's configuration do to another, as far as headers tell."""
    found = [f for f in omni.check_pipeline(planned) if f.code != "layout.omni-storage"]  # that was asked for
    for folder, denoiser in pipeline.denoisers_of(planned).items():
        component = planned.component(folder)
        config = {**component.config, "quantization_config": pipeline.section_in_force(planned, folder)}
        specs = {name: tensor.spec for name, tensor in component.tensors.items()}
        found += omni.examine(folder, Stored(config, None, specs), denoiser)[0]
    return group(found)


def files_of(component: Component) -> Iterator[str]:
    """Everything in a component's folder: it stays byte for byte."""
    own = (*component.weight_files, *([component.index] if component.indexed else []), "config.json")
    for name in (*own, *component.sidecars, *component.left_out):
        yield f"{component.folder}/{name}"
