"""The linears of a checkpoint's language model, fused as its server fuses them, found among what is stored. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ckptq import quantized
from ckptq.checkpoint import Component
from ckptq.errors import SourceError
from ckptq.plan import module_of
from ckptq.scopes import Scope


@dataclass(frozen=True, slots=True)
class FusedLinear:
    """One linear as the server builds it, and the modules that it stacks, as the source spells them.

    runtime   the server's name, relative to the layer; of routed experts that of all
    observed  the module whose input is measured for all of these: the first; of routed experts that of the first expert
    routed    whether it is one expert's
    """

    layer: int
    runtime: str
    modules: tuple[str, ...]
    observed: str
    routed: bool = False


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """All quantizable linears, layer by layer, and the further linears of layers with experts, which stay: {module: layer}."""

    fused: tuple[FusedLinear, ...]
    routers: dict[str, int]

    @property
    def linears(self) -> dict[str, int]:
        """{module: layer} of the quantizable ones."""
        return {module: fused.layer for fused in self.fused for module in fused.modules}


def find_linears(component: Component, scope: Scope) -> LanguageModel:
    """Raises SourceError where a linear is missing, or no matrix in BF16, F16 or F32; UnsupportedError for a source that is
    quantized already.
    """
    quantized.refuse(component)
    layers = scope.layer_count(component.config)
    found: dict[tuple[int, str], str] = {}
    for name in component.tensors:
        at = None if scope.skips(name) else scope.layer_of(name)
        if at is None:
            continue
        if at[0] >= layers:
            raise SourceError(
                f"{name}: stored, but config.json has num_hidden_layers {layers}",
                hint="where the server passes it over, an MTP head say, a scope that says so under `skipped` carries it over: "
                "`ckptq inspect SRC` prints one, a recipe takes it under `scope:`",
            )
        if at[1].endswith(".weight"):
            found[at[0], module_of(at[1])] = module_of(name)
    fused = tuple(_all(found, component, scope, layers))
    more = scope.experts.linears if scope.experts else ()
    places = ((layer, shard) for layer in range(layers) for linear in more for shard in linear.shards)
    routers = {found[at]: at[0] for at in places if at in found and scope.expert_count(component.config, at[0])}
    _refuse_more_experts(fused, found, component, scope)
    return LanguageModel(fused, routers)


def _all(found: dict[tuple[int, str], str], component: Component, scope: Scope, layers: int) -> Iterator[FusedLinear]:
    def module(layer: int, shard: str) -> str:
        source = found.get((layer, shard))
        if source is None:
            raise SourceError(
                f"{scope.layers}.{layer}.{shard}.weight: missing; config.json calls for {layers} layers"
                + (f" with {count} experts" if count and scope.experts and shard.startswith(scope.experts.runtime) else ""),
                hint="fetch the checkpoint again",
            )
        spec = component.tensors[f"{source}.weight"].spec
        if len(spec.shape) != 2 or not spec.numel or spec.dtype not in ("BF16", "F16", "F32"):
            raise SourceError(f"{spec.name}: expected a matrix in BF16, F16 or F32, found {spec.dtype} {list(spec.shape)}")
        return source

    for layer in range(layers):
        count = scope.expert_count(component.config, layer)
        experts = scope.experts if count else None
        for fused in scope.linears:
            if experts is None or not fused.runtime.startswith(experts.dense):
                modules = tuple(module(layer, shard) for shard in fused.shards)
                yield FusedLinear(layer, fused.runtime, modules, modules[0])
        if experts is None:
            continue
        first = [module(layer, group[0].replace("{e}", "0")) for group in experts.groups]
        for expert in map(str, range(count)):
            for group, observed in zip(experts.groups, first, strict=True):
                modules = tuple(module(layer, shard.replace("{e}", expert)) for shard in group)
                yield FusedLinear(layer, experts.runtime, modules, observed, routed=True)


def _refuse_more_experts(
    fused: tuple[FusedLinear, ...], found: dict[tuple[int, str], str], component: Component, scope: Scope
) -> None:
    """Raises SourceError for an expert that config.json does not count: no rule would speak of it."""
    if scope.experts is None:
        return
    known = {module for linear in fused for module in linear.modules}
    for (layer, place), module in found.items():
        if place.startswith(scope.experts.runtime + ".") and module not in known:
            key, count = scope.experts_key(component.config), scope.expert_count(component.config, layer)
            raise SourceError(f"{module}.weight: stored, but config.json has {key} {count}{'' if count else ' for this layer'}")
