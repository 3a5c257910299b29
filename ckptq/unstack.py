"""Routed experts that files hold together, seen one by one, as every format here stores them. Pure: headers and config alone.

Qwen3-VL-MoE on the hub: gate_up_proj [E, hidden, 2 * moe] and down_proj [E, moe, hidden], each expert transposed, which is how vLLM
0.32.0 reads them (models/qwen3_vl_moe.py is_fused_checkpoint_transposed). What transformers 5.17 saves lies the other way round:
[E, 2 * moe, hidden] and [E, hidden, moe], as it has them in memory (conversion_mapping.py "qwen3_vl_moe").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from ckptq.checkpoint import DTYPE_BYTES, FLOATS, Component, Inventory, SourceTensor, TensorSpec
from ckptq.errors import SourceError, UnsupportedError
from ckptq.folder import printable
from ckptq.scopes import MOST_EXPERTS, MOST_IN_ALL, Scope


def unstack(inventory: Inventory, scope: Scope) -> Inventory:
    """The same checkpoint with a matrix for each expert and projection, where it holds them together; else itself.

    Raises SourceError for a tensor that holds no experts of this config.json's sizes, UnsupportedError for one that is no BF16, F16
    or F32.
    """
    main = inventory.main
    found = _stacked(main, scope)
    if not found:
        return inventory
    transposed = _is_transposed(main, scope, found)
    if (count := sum(main.tensors[name].spec.shape[0] * len(group) for name, group in found.items())) > 3 * MOST_IN_ALL:
        raise SourceError(f"expected the linears of {MOST_IN_ALL} experts at most, found {count} in {len(found)} tensors")
    tensors: dict[str, SourceTensor] = {}
    for name, tensor in main.tensors.items():
        if name in found:
            tensors |= {one.spec.name: one for one in _experts(tensor, found[name], scope, transposed)}
        else:
            tensors[name] = tensor
    if len(tensors) != len(main.tensors) + sum(main.tensors[n].spec.shape[0] * len(group) - 1 for n, group in found.items()):
        raise SourceError("experts are stored both together and one by one", hint="fetch the checkpoint again")
    seen = dataclasses.replace(main, tensors=MappingProxyType(tensors))
    return dataclasses.replace(inventory, components=(seen, *inventory.components[1:]))


def refuse_stacked(component: Component, scope: Scope) -> None:
    """Raises UnsupportedError for a quantized checkpoint that holds experts together: whose a scale is nobody says here."""
    if (found := next(iter(_stacked(component, scope)), None)) and component.config.get("quantization_config") is not None:
        raise UnsupportedError(
            f"{printable(found)}: routed experts that are stored together can't be checked; what can: each by itself",
            hint="`--load` asks the real vLLM, which loads faulty checkpoints, too",
        )


def _stacked(component: Component, scope: Scope) -> dict[str, tuple[str, ...]]:
    """{stored tensor that holds a layer's experts together: the linears of one expert in it}."""
    if scope.experts is None or not scope.experts.stored:
        return {}
    groups = dict(zip(scope.experts.stored, scope.experts.groups, strict=True))
    places = ((name, scope.layer_of(name)) for name in component.tensors)
    return {name: groups[at[1]] for name, at in places if at is not None and at[1] in groups}


def _is_transposed(component: Component, scope: Scope, found: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether each expert is [in, out]. A square one does not tell, but not all of them can be square."""
    hidden = scope.text(component.config).get("hidden_size")
    ways = {False, True}
    for name, group in found.items():
        spec = component.tensors[name].spec
        stored = spec if (codes := component.tensors[name].codes) is None else codes.stored.spec
        if stored.dtype not in FLOATS:
            raise UnsupportedError(
                f"{printable(name)}: {stored.dtype}: experts that are stored together must be BF16, F16 or F32",
                hint="start from the BF16 checkpoint",
            )
        if len(spec.shape) != 3 or not 0 < spec.shape[0] <= MOST_EXPERTS or hidden not in spec.shape[1:]:
            raise SourceError(f"{printable(name)}: expected experts in [E, n, k], {hidden} wide, found {list(spec.shape)}")
        _, rows, columns = spec.shape
        first = len(group) > 1  # gate and up read what down writes
        ways &= {way for way in ways if hidden == ((rows if way else columns) if first else (columns if way else rows))}
    if len(ways) != 1:
        raise SourceError(
            "experts that are stored together are neither all [E, out, in] nor all [E, in, out]", hint="fetch the checkpoint again"
        )
    return ways.pop()


def _experts(tensor: SourceTensor, group: tuple[str, ...], scope: Scope, transposed: bool) -> Iterator[SourceTensor]:
    """One matrix [n, k] after another. What lies row by row is a tensor like any other, from its own offset on."""
    spec = tensor.spec
    at = scope.layer_of(spec.name)
    assert at is not None
    around = spec.name.removesuffix(at[1])
    experts, *shape = spec.shape
    out, wide = reversed(shape) if transposed else shape
    if out % len(group):
        raise SourceError(f"{printable(spec.name)}: expected rows for {len(group)} linears, found {out}")
    rows, size = out // len(group), DTYPE_BYTES[spec.dtype]
    for expert in range(experts):
        for i, linear in enumerate(group):
            one = TensorSpec(f"{around}{linear.replace('{e}', str(expert))}.weight", spec.dtype, (rows, wide))
            skipped = i * rows if transposed else i * rows * wide
            offset = tensor.offset + (expert * out * wide + skipped) * size
            yield SourceTensor(one, tensor.file, offset, None, out if transposed else 0)
