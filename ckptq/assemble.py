"""From decided groups to a plan: operations, files, offsets, configs. The same for language models and denoisers. Pure."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from ckptq.checkpoint import Component, SourceTensor, TensorSpec
from ckptq.config_text import insert_section, remove_section
from ckptq.errors import RecipeError
from ckptq.plan import Copy, Decision, Encode, Exporter, Layout, Observer, Op, Plan, QuantizedGroup, Scale, module_of
from ckptq.shards import fill_files, index_text

if TYPE_CHECKING:
    from ckptq.sections import Export

KV = Mapping[str, tuple[Observer, Observer]]
"""{module whose output becomes K: (K observer, V observer)}."""


def assemble(
    component: Component,
    layout: Layout,
    kv: KV,
    exporter: Exporter,
    export: Export,
    decisions: tuple[Decision, ...],
    written: Callable[[str], str] = str,
) -> Plan:
    """The plan of a component, which `sealed` completes. `written` is a stored name -> the name in the output.

    Raises RecipeError for schemes that the format has no form for, or that do not fit a weight.
    """
    _refuse_schemes(layout, export.format, exporter)
    _refuse_sizes(layout.groups, component)
    units = [tuple(renamed(op, written) for op in unit) for unit in _units(component, layout.groups, kv, exporter)]
    shards = tuple(fill_files(units, export.shard_size, component.stem))
    section = exporter.quantization_config(layout)
    text = component.config_text
    if "quantization_config" in component.config:  # null: an object is refused, as of a quantized source
        text = remove_section(text, ("quantization_config",))
    files = {"config.json": insert_section(text, "quantization_config", section)}
    files |= {name: json.dumps(body, indent=4) + "\n" for name, body in exporter.extra_files(layout).items()}
    if len(shards) > 1:
        files[component.index] = index_text(shards)
    observers = tuple(dict.fromkeys(o for shard in shards for op in shard.ops if isinstance(op, Scale) for o in op.amax))
    return Plan(
        digest="",
        shards=shards,
        decisions=decisions,
        observers=observers,
        files=MappingProxyType(files),
        config_changes=("quantization_config: added",),
        sidecars=tuple(s for s in component.sidecars if s not in files),
        left_out=component.left_out,
        layer_count=0,
    )


def sealed(plan: Plan) -> Plan:
    """The plan with its digest.

    Two plans of one digest write the same bytes, given the same amaxes: every field is frozen and shows in its repr. What is left
    out does not count: a Hub cache may hold further copies of the weights or not.
    """
    written = repr(dataclasses.replace(plan, left_out=()))
    return dataclasses.replace(plan, digest=hashlib.sha256(written.encode()).hexdigest())


def renamed(op: Op, written: Callable[[str], str]) -> Op:
    """The operation with outputs called as they are written. What it reads has the source's names."""

    def called(spec: TensorSpec) -> TensorSpec:
        return spec if (name := written(spec.name)) == spec.name else dataclasses.replace(spec, name=name)

    if not isinstance(op, Encode):
        return dataclasses.replace(op, output=called(op.output))
    whole = None if op.whole is None else dataclasses.replace(op.whole, output=called(op.whole.output))
    return dataclasses.replace(op, codes=called(op.codes), whole=whole, local=None if op.local is None else called(op.local))


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


def _units(component: Component, groups: Sequence[QuantizedGroup], kv: KV, exporter: Exporter) -> list[tuple[Op, ...]]:
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
