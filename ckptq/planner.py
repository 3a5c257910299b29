"""Makes the plan from headers, config and recipe. Pure: no torch, no I/O."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

from ckptq.checkpoint import INDEX, Component, SourceTensor
from ckptq.config_text import insert_section, remove_section
from ckptq.errors import RecipeError
from ckptq.linears import FusedLinear, LanguageModel, find_linears
from ckptq.mistakes import close
from ckptq.plan import CARRIED, Copy, Decision, Exporter, Layout, Observer, Op, Plan, QuantizedGroup, Scale, module_of
from ckptq.recipe import Recipe
from ckptq.schemes import SCHEMES
from ckptq.scopes import Scope
from ckptq.shards import fill_files, index_text
from ckptq.validators.vllm_rules import parameters


def build_plan(recipe: Recipe, component: Component, scope: Scope, exporter: Exporter) -> Plan:
    """The plan for one component.

    Raises RecipeError for patterns that match nothing or split a fused group, SourceError for tensors that the config calls
    for and the files lack, UnsupportedError for a source that is quantized already.
    """
    layers = scope.layer_count(component.config)
    model = find_linears(component, scope)
    linears = model.linears
    unknown = carried(component, scope)
    decisions = decide(recipe, component, scope, model)
    action = {d.module: d.action for d in decisions}
    groups = tuple(_groups(model, action, decisions))
    if not groups:
        raise RecipeError("the recipe quantizes nothing: every linear that a rule matches is also in keep")
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
    _refuse_schemes(layout, recipe.export.format, exporter)
    _refuse_sizes(groups, component)
    kv = _kv_observers(scope, linears, layers) if recipe.kv_cache else {}
    shards = tuple(fill_files(_units(component, groups, kv, exporter), recipe.export.shard_size))
    section = exporter.quantization_config(layout)
    text = component.config_text
    if "quantization_config" in component.config:  # null: an object is refused, as of a quantized source
        text = remove_section(text, ("quantization_config",))
    files = {"config.json": insert_section(text, "quantization_config", section)}
    files |= {name: json.dumps(body, indent=4) + "\n" for name, body in exporter.extra_files(layout).items()}
    if len(shards) > 1:
        files[INDEX] = index_text(shards)
    observers = tuple(dict.fromkeys(o for shard in shards for op in shard.ops if isinstance(op, Scale) for o in op.amax))
    plan = Plan(
        digest="",
        shards=shards,
        decisions=decisions,
        observers=observers,
        files=MappingProxyType(files),
        config_changes=("quantization_config: added",),
        sidecars=tuple(s for s in component.sidecars if s not in files),
        left_out=component.left_out,
        layer_count=layers,
        carried=unknown,
    )
    # Two plans of one digest write the same bytes, given the same amaxes: every field is frozen and shows in its repr.
    # What is left out does not count: a Hub cache may hold further copies of the weights or not.
    written = repr(dataclasses.replace(plan, left_out=()))
    return dataclasses.replace(plan, digest=hashlib.sha256(written.encode()).hexdigest())


def matches(pattern: str, module: str, scope: Scope) -> bool:
    """Whether a recipe's pattern names the module, or a module around it, in any generation of names."""
    return any(fnmatch.fnmatchcase(s, pattern) or s.startswith(pattern + ".") for s in scope.spellings(module))


def carried(component: Component, scope: Scope) -> tuple[str, ...]:
    """The stored tensors that the scope does not know, or that the server passes over: MTP heads, layers after the last."""
    known = {p.name for p in parameters(scope, component.config, component.tensors)}
    return tuple(name for name in component.tensors if name not in known or scope.skips(name))


def decide(recipe: Recipe, component: Component, scope: Scope, model: LanguageModel) -> tuple[Decision, ...]:
    """What becomes of every module. Raises RecipeError for a pattern that matches nothing or reaches outside the scope."""
    linears = model.linears
    modules = dict.fromkeys(module_of(n) for n in component.tensors if n.endswith(".weight"))
    canonical = {scope.canonical(m) for m in modules}
    modules |= dict.fromkeys(k for k in scope.kept if k not in canonical)  # a tied lm_head has no tensor of its own
    _refuse_idle_patterns(recipe, scope, modules, linears)
    return tuple(_decision(module, recipe, scope, linears, model.routers) for module in modules)


def _decision(module: str, recipe: Recipe, scope: Scope, linears: Mapping[str, int], routers: Mapping[str, int]) -> Decision:
    stays = "a router stays" if module in routers else CARRIED if scope.skips(f"{module}.") else "not a linear"
    for pattern in recipe.keep:
        if matches(pattern, module, scope):
            return Decision(module, "keep", f"keep: {pattern}", "kept by the recipe")
    for rule in recipe.quantize:
        for pattern in rule.modules:
            if not matches(pattern, module, scope):
                continue
            if module in linears:
                return Decision(module, rule.scheme, f"quantize: {pattern}", f"linear of layer {linears[module]}")
            if _is_other_linear(module, scope):
                raise RecipeError(
                    f"quantize pattern {pattern!r} matches {module}, which is outside the language model's layers; "
                    f"the scope {scope.name} quantizes those only",
                    hint=f"add {_part_of(module, scope)!r} to keep, or narrow the pattern to {scope.layers + '.*'!r}",
                )
            return Decision(module, "keep", f"quantize: {pattern}", stays)
    return Decision(module, "keep", "", "no rule matches" if module in linears or _is_other_linear(module, scope) else stays)


def _part_of(module: str, scope: Scope) -> str:
    """The tower that a module is in, or the module itself: the output head."""
    name = scope.canonical(module)
    return next((tower.prefix for tower in scope.towers if name.startswith(tower.prefix + ".")), name)


def _is_other_linear(module: str, scope: Scope) -> bool:
    """Whether the module is a linear of a tower, or an output head: something a user could mean to quantize."""
    name = scope.canonical(module)
    towers = ((tower.prefix, shard) for tower in scope.towers for fused in tower.linears for shard in fused.shards)
    return name == scope.head or any(fnmatch.fnmatchcase(name, f"{p}.{s.replace('{i}', '*')}") for p, s in towers)


def _refuse_idle_patterns(recipe: Recipe, scope: Scope, modules: Iterable[str], linears: Mapping[str, int]) -> None:
    named = list(modules)
    lines = [("keep", p) for p in recipe.keep] + [("quantize", p) for rule in recipe.quantize for p in rule.modules]
    idle = [
        f"{kind} pattern {p!r} matches no module{_close_module(p, named, scope)}" for kind, p in lines if not _any(p, named, scope)
    ]
    idle += [
        f"quantize pattern {p!r} matches no linear of the language model"
        for p in (p for rule in recipe.quantize for p in rule.modules)
        if _any(p, named, scope) and not _any(p, linears, scope)
    ]
    if idle:
        raise RecipeError("\n".join(idle), hint="`ckptq inspect SRC` shows the parts of the checkpoint, and the recipes that fit")


def _any(pattern: str, modules: Iterable[str], scope: Scope) -> bool:
    return any(matches(pattern, m, scope) for m in modules)


def _close_module(pattern: str, modules: Sequence[str], scope: Scope) -> str:
    spelled = {s for m in modules for s in scope.spellings(m)}
    prefixes = {".".join(s.split(".")[:n]) for s in spelled for n in range(1, s.count(".") + 2)}
    return close(pattern.strip("*."), prefixes, near_only=True)


def _groups(model: LanguageModel, action: Mapping[str, str], decisions: Sequence[Decision]) -> Iterator[QuantizedGroup]:
    rule_of = {d.module: d.rule or "no rule" for d in decisions}
    built: dict[tuple[int, str], str] = {}  # where the server builds one module of what follows: its first shard
    for fused in model.fused:
        first = built.setdefault((fused.layer, fused.runtime), fused.modules[0])
        if any(action[m] != action[first] for m in fused.modules):
            raise _split(fused, first, action, rule_of)
        if action[first] != "keep":
            yield QuantizedGroup(fused.layer, fused.modules, SCHEMES[action[first]], fused.observed, fused.routed)


def _split(fused: FusedLinear, first: str, action: Mapping[str, str], rule_of: Mapping[str, str]) -> RecipeError:
    """What a rule splits: the shards of a linear, or the experts of a layer."""
    modules = dict.fromkeys((first, *fused.modules))
    told = "; ".join(f"{m}: {action[m]} ({rule_of[m]})" for m in modules)
    what = "fuses all routed experts of a layer" if fused.routed else f"fuses {', '.join(modules)}"
    return RecipeError(
        f"the server {what} into {fused.runtime}: they must get one scheme; the recipe says {told}",
        hint="give all of them to one rule, or keep all of them",
    )


def _refuse_schemes(layout: Layout, name: str, exporter: Exporter) -> None:
    """Raises RecipeError for what the format has no form for."""
    if other := [scheme for scheme in layout.schemes if scheme not in exporter.SCHEMES]:
        raise RecipeError(
            f"scheme {other[0]}: the format {name} has none like it; it has {', '.join(exporter.SCHEMES)}",
            hint="choose one of those, or another export.format: `ckptq recipes --schemes` shows what goes together",
        )
    exporter.check(layout)


def _refuse_sizes(groups: Sequence[QuantizedGroup], component: Component) -> None:
    """Raises RecipeError for a weight that the scheme's blocks or groups do not fit.

    vLLM 0.32.0: group sizes divide k (modelopt.py KNvfp4Static, KMxfp8Static; FP8_PB_WO wants whole blocks, too); of a fused
    linear in blocks every shard but the last must end with a block (utils/fp8_utils.py validate_fp8_block_shape).
    """
    for group in groups:
        rows, columns = group.scheme.rows or 1, group.scheme.columns or 1
        for module in group.modules:
            n, k = component.tensors[f"{module}.weight"].spec.shape
            wanted = f"columns in multiples of {columns}" if k % columns else f"rows in multiples of {rows} before the last shard"
            if k % columns or (n % rows and module != group.modules[-1]):
                raise RecipeError(
                    f"{module}: scheme {group.scheme.name} needs {wanted}, the weight is [{n}, {k}]",
                    hint="keep the module, or choose another scheme for it",
                )


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


def _units(
    component: Component, groups: Sequence[QuantizedGroup], kv: Mapping[str, tuple[Observer, Observer]], exporter: Exporter
) -> list[tuple[Op, ...]]:
    """The operations that belong in one file together, in the source's order. A fused group is one unit."""
    group_of = {f"{m}.weight": group for group in groups for m in group.modules}
    done: set[str] = set()
    units: list[tuple[Op, ...]] = []
    for name, _tensor in sorted(component.tensors.items(), key=lambda item: (item[1].file, item[1].offset)):
        if name in done:
            continue
        unit: list[Op] = []
        for weight in _members(name, group_of):
            done.add(weight)
            unit += _tensor_ops(component.tensors[weight], group_of.get(weight), exporter)
            if weight == f"{module_of(weight)}.weight" and module_of(weight) in kv:
                unit += exporter.kv_ops(*kv[module_of(weight)])
        units.append(tuple(unit))
    return units


def _members(name: str, group_of: Mapping[str, QuantizedGroup]) -> tuple[str, ...]:
    return tuple(f"{m}.weight" for m in group_of[name].modules) if name in group_of else (name,)


def _tensor_ops(tensor: SourceTensor, group: QuantizedGroup | None, exporter: Exporter) -> tuple[Op, ...]:
    if group is None:
        return (Copy(tensor.spec.name, tensor.spec),)
    return exporter.linear_ops(module_of(tensor.spec.name), tensor.spec, group)
