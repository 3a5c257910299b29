"""Makes the plan of a denoiser from headers, config and the recipe's rules for its component. Pure: no torch, no I/O."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptq import quantized
from ckptq.assemble import assemble, sealed
from ckptq.checkpoint import Component, Inventory
from ckptq.decisions import UNMATCHED, Rules, Subjects, decide, quantized_groups
from ckptq.errors import RecipeError, SourceError
from ckptq.join import join
from ckptq.linears import FusedLinear
from ckptq.plan import Exporter, Layout, Plan, module_of
from ckptq.scopes import Fused
from ckptq.scopes.denoisers import Denoiser, Stack
from ckptq.sections import Rule

if TYPE_CHECKING:
    from ckptq.recipe import Recipe
    from ckptq.sections import Treatment


@dataclass(frozen=True, slots=True)
class _Rules:
    quantize: tuple[Rule, ...]
    keep: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Blocks:
    """The linears of a denoiser's blocks, by their stored names.

    linears  those that can be quantized, fused as the server fuses them; `runtime` is the server's whole name
    stays    those that it builds without the quantization config, or that stay all the same -> why
    count    blocks of all stacks; their running number is a linear's `layer`
    """

    linears: tuple[FusedLinear, ...]
    stays: Mapping[str, str]
    count: int


def written_component(component: Component, denoiser: Denoiser, form: str) -> Component:
    """The component with the linears that a file of this format joins seen as one."""
    return join(component, denoiser) if _is_renamed(component, denoiser, form) else component


def build_denoiser_plan(
    recipe: Recipe, treatment: Treatment, inventory: Inventory, component: Component, denoiser: Denoiser, exporter: Exporter
) -> Plan:
    """The plan for one component of a pipeline, or for a root checkpoint; `component` is what `written_component` returns.

    Raises RecipeError for rules that match nothing, split a fused linear, or ask for what the server has no form for, SourceError
    for linears that the config calls for and the files lack, UnsupportedError for a source that is quantized already.
    """
    quantized.refuse(component)
    blocks = find_blocks(component, denoiser)
    rules = _rules(treatment, denoiser)
    decisions = decide(rules, _subjects(component, denoiser, blocks))
    groups = quantized_groups(blocks.linears, decisions)
    form = recipe.export.format
    if other := [scheme for scheme in dict.fromkeys(g.scheme.name for g in groups) if scheme not in denoiser.formats.get(form, ())]:
        known = "; ".join(f"{name}: {', '.join(schemes)}" for name, schemes in denoiser.formats.items())
        raise RecipeError(
            f"{_named(component)}: vLLM-Omni has no {other[0]} in the format {form} for {denoiser.name}; it has {known}",
            hint="choose another scheme, or another export.format",
        )
    if len(schemes := dict.fromkeys(g.scheme.name for g in groups)) > 1:
        raise RecipeError(
            f"{_named(component)}: schemes {', '.join(schemes)}: vLLM-Omni builds all linears of a denoiser in one",
            hint="give all of them one scheme, or keep some",
        )
    quantized_names = {module for group in groups for module in group.modules}
    kept = tuple(f.runtime for f in blocks.linears if not quantized_names & set(f.modules))
    if exporter.PATTERNS:
        kept = tuple(_alone(name, blocks) for name in kept)
    layout = Layout(
        groups,
        kept_parts=(),
        kept_linears=_listed(inventory, component, denoiser, exporter.PATTERNS, kept),
        kept_outside=(),
        kv_cache=None,
        server="vllm-omni",
    )
    renamed = denoiser.renamed if _is_renamed(component, denoiser, form) else {}
    plan = assemble(component, layout, {}, exporter, recipe.export, decisions, lambda name: _written(name, renamed))
    return sealed(dataclasses.replace(plan, layer_count=blocks.count))


def find_blocks(component: Component, denoiser: Denoiser) -> Blocks:
    """Raises SourceError where a linear is missing, or no matrix in BF16, F16 or F32."""
    linears: list[FusedLinear] = []
    stays = {shard: _KEPT for fused in denoiser.kept for shard in fused.shards}
    count = 0
    for stack in denoiser.stacks:
        for i in range(stack.count(component.config)):
            at = f"{stack.prefix}.{i}"
            linears += _of_block(component, denoiser, stack, i, count)
            stays |= {f"{at}.{name}": _STAYS for name in stack.stays}
            stays |= {f"{at}.{shard}": _KEPT for fused in stack.kept for shard in fused.shards}
            count += 1
    for name in component.tensors:
        if (place := _block_of(name, denoiser)) and place[1] >= place[0].count(component.config):
            stack = place[0]
            raise SourceError(f"{name}: stored, but config.json has {stack.depth} {stack.count(component.config)}")
        module = module_of(name)
        if name.endswith(".weight") and any(fnmatch.fnmatchcase(module, pattern) for pattern in denoiser.stays):
            stays[module] = _STAYS
    return Blocks(tuple(linears), {name: why for name, why in stays.items() if f"{name}.weight" in component.tensors}, count)


_STAYS = "the server computes it unquantized, whatever is stored"
_KEPT = "it stays: see the scope"


def _of_block(component: Component, denoiser: Denoiser, stack: Stack, i: int, number: int) -> Iterator[FusedLinear]:
    at = f"{stack.prefix}.{i}"
    for fused in stack.linears:
        experts = range(_experts(component, stack)) if "{e}" in fused.shards[0] else range(1)
        for expert in experts:
            shards = tuple(f"{at}.{shard.replace('{e}', str(expert))}" for shard in _shards(fused, component, at, denoiser))
            _refuse_odd(shards, component, optional=fused.runtime in stack.optional)
            if all(f"{shard}.weight" in component.tensors for shard in shards):
                first = f"{at}.{_shards(fused, component, at, denoiser)[0].replace('{e}', '0')}"
                yield FusedLinear(number, f"{stack.called(i)}.{fused.runtime}", shards, first, routed="{e}" in fused.shards[0])


def _shards(fused: Fused, component: Component, at: str, denoiser: Denoiser) -> tuple[str, ...]:
    """The linear's shards, or the one that stands for them in a component that `join` has looked through."""
    whole = next((name for name, parts in denoiser.joined.items() if parts == fused.shards), None)
    return (whole,) if whole is not None and f"{at}.{whole}.weight" in component.tensors else fused.shards


def _experts(component: Component, stack: Stack) -> int:
    return Stack("", stack.experts, ()).count(component.config)


def _refuse_odd(shards: tuple[str, ...], component: Component, *, optional: bool) -> None:
    there = [f"{shard}.weight" in component.tensors for shard in shards]
    if not all(there) and (any(there) or not optional):
        raise SourceError(f"{shards[there.index(False)]}.weight: missing", hint="fetch the checkpoint again")
    for shard in shards if all(there) else ():
        spec = component.tensors[f"{shard}.weight"].spec
        if len(spec.shape) != 2 or not spec.numel or spec.dtype not in ("BF16", "F16", "F32"):
            raise SourceError(f"{spec.name}: expected a matrix in BF16, F16 or F32, found {spec.dtype} {list(spec.shape)}")


def _block_of(name: str, denoiser: Denoiser) -> tuple[Stack, int] | None:
    for stack in denoiser.stacks:
        if name.startswith(stack.prefix + "."):
            number = name[len(stack.prefix) + 1 :].partition(".")[0]
            return (stack, int(number)) if number.isdecimal() else None
    return None


def _rules(treatment: Treatment, denoiser: Denoiser) -> Rules:
    """A scheme for all is one for every stack."""
    if treatment.scheme is None:
        return _Rules(tuple(treatment.quantize), tuple(treatment.keep))
    patterns = [stack.prefix for stack in denoiser.stacks]
    return _Rules((Rule(modules=patterns, scheme=treatment.scheme),), tuple(treatment.keep))


def _subjects(component: Component, denoiser: Denoiser, blocks: Blocks) -> Subjects:
    modules = [module_of(name) for name in component.tensors if name.endswith(".weight")]
    linears = {module: f"linear of {_block_name(module, denoiser)}" for fused in blocks.linears for module in fused.modules}
    inside = {name for name in blocks.stays if _block_of(name, denoiser)}
    return Subjects(
        stays={m: UNMATCHED if m in linears else blocks.stays.get(m, "not a linear") for m in modules},
        linears=linears,
        outside={m: m for m in blocks.stays if m not in inside},
        spellings=lambda module: _spellings(module, denoiser),
        whole="the denoiser",
        inner="blocks",
        inside=f"{denoiser.stacks[0].prefix}.*",
        scope=denoiser.name,
    )


def _spellings(module: str, denoiser: Denoiser) -> tuple[str, ...]:
    """The name itself, and of a linear that stands for several their names, as the source has them."""
    parts = (
        module.removesuffix(whole) + part
        for whole, names in denoiser.joined.items()
        if module.endswith(f".{whole}")
        for part in names
    )
    return (module, *parts)


def _block_name(module: str, denoiser: Denoiser) -> str:
    at = _block_of(module, denoiser)
    return f"{at[0].prefix}.{at[1]}" if at else module


def _listed(inventory: Inventory, component: Component, denoiser: Denoiser, patterns: bool, kept: Iterable[str]) -> tuple[str, ...]:
    """The list of what stays: what the recipe keeps, and what no recipe can quantize.

    Raises SourceError where a text encoder's config.json does not say how many layers it has.
    """
    encoder = denoiser.encoder
    if encoder and (inventory.pipeline or {}).get("_class_name") not in encoder.pipelines:
        encoder = None
    if patterns:
        return (*denoiser.ignore, *(encoder.patterns if encoder else ()), *dict.fromkeys(kept))
    config = next((c.config for c in inventory.components if encoder and c.folder == encoder.folder), {})
    places = ((stack, stack.called(i)) for stack in denoiser.stacks for i in range(stack.count(component.config)))
    inside = (f"{at}.{fused.runtime}" for stack, at in places for fused in stack.kept)
    outside = (fused.runtime for fused in denoiser.kept)
    return (*inside, *outside, *(encoder.names(config) if encoder else ()), *dict.fromkeys(kept))


def _alone(name: str, blocks: Blocks) -> str:
    """The entry that reaches this linear and no other. A plain name also reaches those that it is a part of.

    vLLM 0.32.0 layers/quantization/modelopt.py ModelOptQuantConfigBase.is_layer_excluded.
    """
    part = any(name in fused.runtime and name != fused.runtime for fused in blocks.linears)
    return f"{name[:-1]}[{name[-1]}]" if part else name


def _is_renamed(component: Component, denoiser: Denoiser, form: str) -> bool:
    return form == "modelopt" and component.folder in denoiser.adapted


def _written(name: str, renamed: Mapping[str, str]) -> str:
    """What the output calls a tensor: a stored one, or one that is added."""
    for theirs, ours in renamed.items():
        name = f".{name}.".replace(f".{theirs}.", f".{ours}.").strip(".")
    return name


def _named(component: Component) -> str:
    return component.folder or "the checkpoint"
