"""Makes the plan of a language model from headers, config and recipe. Pure: no torch, no I/O."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator, Mapping

from ckptq.assemble import assemble, sealed
from ckptq.checkpoint import Component
from ckptq.decisions import UNMATCHED, Subjects, decide, quantized_groups
from ckptq.errors import RecipeError
from ckptq.linears import LanguageModel, find_linears
from ckptq.plan import CARRIED, Exporter, Layout, Observer, Plan, module_of
from ckptq.recipe import Recipe
from ckptq.scopes import Scope
from ckptq.validators.vllm_rules import parameters


def build_plan(recipe: Recipe, component: Component, scope: Scope, exporter: Exporter) -> Plan:
    """The plan for a checkpoint with a language model in it.

    Raises RecipeError for patterns that match nothing or split a fused group, SourceError for tensors that the config calls
    for and the files lack, UnsupportedError for a source that is quantized already.
    """
    layers = scope.layer_count(component.config)
    model = find_linears(component, scope)
    linears = model.linears
    unknown = carried(component, scope)
    decisions = decide(recipe, subjects(component, scope, model))
    action = {d.module: d.action for d in decisions}
    groups = quantized_groups(model.fused, decisions)
    layout = Layout(
        groups,
        _kept_parts(component, scope),
        (*(m for f in model.fused if not f.routed for m in f.modules if action[m] == "keep"), *model.routers),
        tuple(d.module for d in decisions if d.module not in linears and _is_other_linear(d.module, scope))
        + tuple(module_of(n) for n in unknown if n.endswith(".weight") and len(component.tensors[n].spec.shape) == 2),
        recipe.kv_cache,
        scope.stage,
        tuple(_kept_fused(scope, model, action)) if scope.stage else (),
        "" in scope.server_kept,
        tuple(_kept_experts(scope, model, action)),
    )
    kv = _kv_observers(scope, linears, layers) if recipe.kv_cache else {}
    plan = assemble(component, layout, kv, exporter, recipe.export, decisions)
    return sealed(dataclasses.replace(plan, layer_count=layers, carried=unknown))


def carried(component: Component, scope: Scope) -> tuple[str, ...]:
    """The stored tensors that the scope does not know, or that the server passes over: MTP heads, layers after the last."""
    known = {p.name for p in parameters(scope, component.config, component.tensors)}
    return tuple(name for name in component.tensors if name not in known or scope.skips(name))


def subjects(component: Component, scope: Scope, model: LanguageModel) -> Subjects:
    """What the patterns of a recipe may name in this checkpoint."""
    modules = dict.fromkeys(module_of(n) for n in component.tensors if n.endswith(".weight"))
    canonical = {scope.canonical(m) for m in modules}
    modules |= dict.fromkeys(k for k in scope.kept if k not in canonical)  # a tied lm_head has no tensor of its own
    outside = {m: _part_of(m, scope) for m in modules if m not in model.linears and _is_other_linear(m, scope)}

    def why(module: str) -> str:
        if module in model.routers:
            return "a router stays"
        if scope.skips(f"{module}."):
            return CARRIED
        return UNMATCHED if module in model.linears or module in outside else "not a linear"

    return Subjects(
        stays={module: why(module) for module in modules},
        linears={module: f"linear of layer {layer}" for module, layer in model.linears.items()},
        outside=outside,
        spellings=scope.spellings,
        whole="the language model",
        inner="layers",
        inside=f"{scope.layers}.*",
        scope=scope.name,
    )


def _part_of(module: str, scope: Scope) -> str:
    """The tower that a module is in, or the module itself: the output head."""
    name = scope.canonical(module)
    return next((tower.prefix for tower in scope.towers if name.startswith(tower.prefix + ".")), name)


def _is_other_linear(module: str, scope: Scope) -> bool:
    """Whether the module is a linear of a tower, or an output head: something a user could mean to quantize."""
    name = scope.canonical(module)
    towers = ((tower.prefix, shard) for tower in scope.towers for fused in tower.linears for shard in fused.shards)
    return name == scope.head or any(fnmatch.fnmatchcase(name, f"{p}.{s.replace('{i}', '*')}") for p, s in towers)


def _kept_parts(component: Component, scope: Scope) -> tuple[str, ...]:
    """The roots that stay, as this source spells them: `lm_head`, `model.embed_tokens`, `visual`."""
    roots = [*scope.kept]
    for tower in scope.towers:
        spelled = (n for n in component.tensors if scope.canonical(n).startswith(tower.prefix + "."))
        name = next(spelled, None)
        if name is not None:
            rest = len(scope.canonical(name)) - len(tower.prefix)
            roots.append(name[: len(name) - rest])
    roots += (skipped.rstrip(".") for skipped in scope.skipped if any(n.startswith(skipped) for n in component.tensors))
    spelled_kept = {scope.canonical(module_of(n)): module_of(n) for n in component.tensors}
    return tuple(spelled_kept.get(root, root) for root in roots)


def _kept_fused(scope: Scope, model: LanguageModel, action: Mapping[str, str]) -> Iterator[str]:
    """The linears of the layers that stay as the server fuses them, after the layers' canonical name."""
    yield from dict.fromkeys(f"{scope.layers}.{f.layer}.{f.runtime}" for f in model.fused if action[f.modules[0]] == "keep")
    more = scope.experts.linears if scope.experts else ()
    yield from (f"{scope.layers}.{layer}.{linear.runtime}" for layer in dict.fromkeys(model.routers.values()) for linear in more)


def _kept_experts(scope: Scope, model: LanguageModel, action: Mapping[str, str]) -> Iterator[str]:
    """Layers' routed experts that stay, each by the name around them."""
    seen: set[int] = set()
    for fused in model.fused:
        if fused.routed and fused.layer not in seen and action[fused.modules[0]] == "keep":
            seen.add(fused.layer)
            at = scope.layer_of(f"{fused.observed}.weight")
            yield f"{fused.observed}.weight".removesuffix(at[1] if at else "") + fused.runtime


def _kv_observers(scope: Scope, linears: Mapping[str, int], layers: int) -> dict[str, tuple[Observer, Observer]]:
    """{K module: (K observer, V observer)} for every layer: the server wants all of them or none."""
    if not all(scope.kv):
        raise RecipeError(
            f"kv_cache: the scope {scope.name} names no modules that make K and V", hint="add them as `kv`, or drop kv_cache"
        )
    by_place = {scope.canonical(module): module for module in linears}
    found = {}
    for layer in range(layers):
        k, v = (by_place[f"{scope.layers}.{layer}.{part}"] for part in scope.kv)
        found[k] = (Observer(k, "k", layer), Observer(v, "v", layer))
    return found
