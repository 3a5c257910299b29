"""What a server can leave unquantized by itself: the shards of a fused linear, or all routed experts of a layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ckptq.checkpoint import SourceTensor
from ckptq.compare.sides import Side
from ckptq.errors import RecipeError, UnsupportedError
from ckptq.plan import module_of
from ckptq.scopes import Scope
from ckptq.validators.vllm_rules import ServerLinear

_LAYERS = ("layers", "experts")
"""Parts of a model whose linears are units."""
_OF_CACHE = (".k_scale", ".v_scale")
"""These stay where the projection beside them does, for the cache is another choice."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One of them, as the candidate quantizes it.

    name      as servers fuse it: model.layers.3.self_attn.qkv_proj
    modules   in transformers' layer: self_attn.q_proj, or of routed experts the module that holds those of all
    patterns  what a recipe's `keep` names for it to stay
    saved     bytes by which the candidate's is smaller than the reference's
    """

    layer: int
    name: str
    modules: tuple[str, ...]
    patterns: tuple[str, ...]
    saved: int


def find_units(reference: Side, candidate: Side) -> tuple[Unit, ...]:
    """The units that the candidate quantizes, by layer. Raises RecipeError where there are none. See also `elsewhere`."""
    at, scope = candidate.expected, candidate.scope
    grouped: dict[str, list[ServerLinear]] = {}
    for linear in dict.fromkeys(at.linears.values() if at else ()):
        if at and linear.part in _LAYERS and at.format_of(linear.shards[0]) is not None:
            grouped.setdefault(linear.prefix, []).append(linear)
    if not grouped:
        raise RecipeError("the candidate quantizes no linear of a decoder layer: there is nothing to rank")
    before, after = (_module_bytes(scope, side.stored.tensors.values()) for side in (reference, candidate))
    found = (_unit(candidate, linears, before, after) for linears in grouped.values())
    return tuple(sorted(found, key=lambda unit: unit.layer))


def elsewhere(candidate: Side) -> tuple[str, ...]:
    """What it quantizes outside of the decoder layers, which are no units: of an output head, of towers. No conversion does so."""
    at, stored = candidate.expected, candidate.stored.tensors
    odd = (name for name, linear in at.linears.items() if linear.part not in _LAYERS) if at else ()
    return tuple(n for n in odd if at and at.format_of(n) and (f"{n}.weight" in stored or f"{n}.weight_packed" in stored))


def refuse_changed_norms(reference: Side, candidate: Side) -> None:
    """Raises UnsupportedError where a norm of the language model is another: SmoothQuant and AWQ move factors from norms into
    linears, and such a linear is not what it stands for beside the reference's norm.
    """
    theirs, ours = _norms(reference), _norms(candidate)
    for name in sorted(theirs.keys() & ours.keys()):
        same = theirs[name].spec.dtype == ours[name].spec.dtype  # or else a cast is all that may be between them
        if same and _whole(reference, theirs[name]) != _whole(candidate, ours[name]):
            raise UnsupportedError(
                f"{name}: the candidate's is another: what it quantizes was changed with it and can't be judged piece by piece",
                hint="`ckptq compare` measures the candidate as a whole",
            )


def _norms(side: Side) -> dict[str, SourceTensor]:
    """{canonical name: its weight}, of the decoder layers and beside them."""
    scope = side.scope
    found = ((scope.canonical(name), tensor) for name, tensor in side.component.tensors.items() if len(tensor.spec.shape) == 1)
    beside, towers = f"{scope.layers.rpartition('.')[0]}.", tuple(f"{tower.prefix}." for tower in scope.towers)
    return {
        name: tensor
        for name, tensor in found
        if name.endswith(".weight") and name.startswith(beside) and not name.startswith(towers)
    }


def _whole(side: Side, tensor: SourceTensor) -> bytearray:
    read = bytearray(tensor.spec.nbytes)
    side.reader.read_into(tensor, 0, memoryview(read))
    return read


def _unit(side: Side, linears: list[ServerLinear], before: Counter[str], after: Counter[str]) -> Unit:
    scope, model = side.scope, side.model
    shards = [shard for linear in linears for shard in linear.shards if f"{shard}.weight" in model.names]
    place = scope.layer_of(f"{shards[0]}.weight")
    assert place is not None  # it is a linear of a layer
    layer, runtime = place[0], linears[0].prefix.removeprefix(f"{scope.server_layers}.{place[0]}.")
    names = {id(module): name for name, module in model.layers[layer].named_modules()}
    canonical = [scope.canonical(shard) for shard in shards]
    patterns = canonical if linears[0].part == "layers" else [module_of(module_of(name)) for name in canonical]
    return Unit(
        layer,
        f"{scope.layers}.{layer}.{runtime}",
        tuple(dict.fromkeys(names[id(model.module(shard))] for shard in shards)),
        tuple(dict.fromkeys(patterns)),
        sum(before[name] - after[name] for name in canonical),
    )


def _module_bytes(scope: Scope, tensors: Iterable[SourceTensor]) -> Counter[str]:
    """{canonical module: bytes of what it stores}."""
    found: Counter[str] = Counter()
    for tensor in tensors:
        name = scope.canonical(tensor.spec.name)
        if not name.endswith(_OF_CACHE):
            found[module_of(name)] += tensor.spec.nbytes
    return found
