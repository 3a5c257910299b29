"""Which parameter of a transformers model each tensor of a checkpoint fills: alone, or one behind another with those beside it.

transformers 5 holds the routed experts of a layer as one parameter, files hold them one by one. Its own mapping says which belong
together and how (5.17.0 conversion_mapping.py; core_model_loading.py `rename_source_key`, `WeightConverter`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptq.checkpoint import Component, SourceTensor, TensorSpec
from ckptq.errors import SourceError, UnsupportedError
from ckptq.scopes import Scope

ONE_BY_ONE = "qwen2_moe"
"""transformers' name of the mapping from gate_proj, up_proj and down_proj of single experts to the parameters of all."""
_STACKED = ("MergeModulelist(0)",)
_JOINED = ("MergeModulelist(0)", "Concatenate(1)")


@dataclass(frozen=True, slots=True)
class Placement:
    """{stored name: parameter}, and for a parameter that several tensors fill, their names in the order of its memory."""

    parameters: Mapping[str, str]
    order: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Filling:
    """What fills a parameter: tensors of one dtype, each right behind the one before. `spec` is the whole, as it is stored."""

    spec: TensorSpec
    sources: tuple[SourceTensor, ...]


def place(model: Any, component: Component, scope: Scope | None) -> Placement:
    """Where transformers would put every stored tensor. Raises UnsupportedError where it would compute with them on the way."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    if (
        scope is not None and scope.experts is not None and scope.experts.stored
    ):  # seen one by one here, which its own mapping does not know
        mapping = [*mapping, *get_checkpoint_conversion_mapping(ONE_BY_ONE)]
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    parameters: dict[str, str] = {}
    merged: dict[str, dict[str, list[str]]] = {}
    for name in component.tensors:
        parameters[name], pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if pattern is not None:
            merged.setdefault(parameters[name], {}).setdefault(pattern, []).append(name)
    order = {}
    for parameter, by_pattern in merged.items():
        converter = next(c for c in converters if next(iter(by_pattern)) in c.source_patterns)
        order[parameter] = _in_order(parameter, [by_pattern.get(p, []) for p in converter.source_patterns], converter.operations)
    return Placement(parameters, order)


def _in_order(parameter: str, stacks: Sequence[list[str]], operations: Iterable[Any]) -> tuple[str, ...]:
    """The names in the order of memory: expert after expert, of each what is joined."""
    from transformers.core_model_loading import dot_natural_key

    done = tuple(f"{type(op).__name__}({getattr(op, 'dim', '')})" for op in operations)
    if done not in (_STACKED, _JOINED):
        name = next(name for stack in stacks for name in stack)
        raise UnsupportedError(f"{name}: transformers makes {parameter} of it by {', '.join(done)}; ckptq can't calibrate that yet")
    if len({len(stack) for stack in stacks}) > 1:
        counts = ", ".join(f"{len(stack)} like {stack[0] if stack else 'nothing'}" for stack in stacks)
        raise SourceError(f"{parameter}: made of {counts}: expected as many of each", hint="fetch the checkpoint again")
    ordered = [sorted(stack, key=dot_natural_key) for stack in stacks]
    return tuple(name for together in zip(*ordered, strict=True) for name in together)


def fill(parameter: str, shape: tuple[int, ...], sources: Sequence[SourceTensor]) -> Filling:
    """What fills a parameter of this shape: one tensor, or matrices that are stacked, those of an expert joined by their rows.

    Raises SourceError where they do not make that shape, or have not one dtype.
    """
    first = sources[0].spec
    spec = TensorSpec(parameter, first.dtype, shape)
    if len(sources) == 1 and len(first.shape) == len(shape):
        if first.shape != shape:
            raise SourceError(f"{first.name}: shape {list(first.shape)}, config.json calls for {list(shape)}")
        return Filling(spec, tuple(sources))
    if other := next((s.spec for s in sources if s.spec.dtype != first.dtype), None):
        raise SourceError(f"{other.name}: {other.dtype}, beside {first.dtype} of {first.name}: expected one dtype for all experts")
    experts, rows, columns = shape if len(shape) == 3 else (0, 0, 0)
    count = max(len(sources) // max(experts, 1), 1)  # joined of each expert
    matrices = all(s.spec.shape[1:] == (columns,) for s in sources)
    pieces = [sum(s.spec.shape[0] for s in sources[i : i + count]) for i in range(0, len(sources), count)] if matrices else []
    if len(sources) != count * experts or set(pieces) != {rows}:
        found = f"{len(sources)} tensors such as {list(first.shape)}"
        raise SourceError(f"{first.name}: one of {found} for {parameter}, for which config.json calls for {list(shape)}")
    return Filling(spec, tuple(sources))
