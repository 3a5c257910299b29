"""Weights of a VAE or a text encoder kept as FP8: a storage format, which no server and no library reads.

    <linear or convolution>.weight        F8_E4M3, of the weight's own shape
    <linear or convolution>.weight_scale  F32: fp8-storage [], fp8-storage-channel [o, 1, ..., 1], as many dimensions as the weight

value ~ code * scale. Everything else is as the source has it: embeddings, norms, biases, transposed convolutions, integers.
`ckptq restore` makes a BF16 checkpoint of it, and `ckptq.loading` a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ckptq import quantized
from ckptq.assemble import sealed
from ckptq.checkpoint import FLOATS, Component, SourceTensor, TensorSpec
from ckptq.config_text import insert_section, remove_section
from ckptq.errors import RecipeError, UnsupportedError
from ckptq.folder import printable
from ckptq.foreign import HINT
from ckptq.plan import Copy, Decision, Encode, Observer, Op, Plan, Scale, module_of
from ckptq.schemes import Scheme
from ckptq.shards import fill_files, index_text

KINDS = ("Linear", "Conv1d", "Conv2d", "Conv3d")
"""Whose weights become FP8. A transposed convolution has its output channels in its second dimension, so it stays."""
_SOURCES = ("BF16", "F16", "F32")


@dataclass(frozen=True, slots=True)
class Storage:
    """How a component is stored: the action that a recipe names, and the arithmetic."""

    action: str
    scheme: Scheme


STORAGES: Mapping[str, Storage] = MappingProxyType(
    {
        name: Storage(name, Scheme(name, "fp8", "F8_E4M3", 1, rows, None, scale, limit, "none", title))  # type: ignore[arg-type]
        for name, rows, scale, limit, title in (
            ("fp8-storage", None, None, 448.0, "FP8 a tensor, for storage alone"),
            ("fp8-storage-channel", 1, "F32", None, "FP8 an output channel, for storage alone"),
        )
    }
)


def plan_storage(component: Component, action: str, shard_size: int) -> Plan:
    """The plan for a component whose linears and convolutions are stored as FP8. `action`: one of STORAGES.

    Imports torch and the library that has the component's class. Raises UnsupportedError for a class that neither has, and for a
    component that is quantized already, RecipeError for one without anything to store.
    """
    from ckptq.classes import kinds

    quantized.refuse(component)
    storage, kind_of = STORAGES[action], kinds(component)
    units: list[tuple[Op, ...]] = []
    decisions: list[Decision] = []
    for name, tensor in sorted(component.tensors.items(), key=lambda item: (item[1].file, item[1].offset)):
        kind = kind_of.get(name, "")
        if kind in KINDS and tensor.spec.dtype not in FLOATS:
            raise UnsupportedError(f"{printable(name)} is {tensor.spec.dtype}: the source is quantized already", hint=HINT)
        stays = "" if kind in KINDS and tensor.spec.dtype in _SOURCES and tensor.spec.numel else "keep"
        if kind:
            decisions.append(Decision(module_of(name), stays or action, f"{component.folder}: {action}", kind))
        units.append((Copy(name, tensor.spec),) if stays else _stored(tensor, storage.scheme))
    if all(d.action == "keep" for d in decisions):
        raise RecipeError(f"{component.folder}: {action}: there is no linear and no convolution in it", hint="name it `keep`")
    shards = tuple(fill_files(units, shard_size, component.stem))
    text = component.config_text
    if "quantization_config" in component.config:  # null: an object is refused, as of a quantized source
        text = remove_section(text, ("quantization_config",))
    files = {"config.json": insert_section(text, "quantization_config", section(action))}
    if len(shards) > 1:
        files[component.index] = index_text(shards)
    plan = Plan(
        digest="",
        shards=shards,
        decisions=tuple(decisions),
        observers=tuple(dict.fromkeys(o for shard in shards for op in shard.ops if isinstance(op, Scale) for o in op.amax)),
        files=MappingProxyType(files),
        config_changes=("quantization_config: added",),
        sidecars=tuple(s for s in component.sidecars if s not in files),
        left_out=component.left_out,
        layer_count=0,
        carried=tuple(name for name, kind in kind_of.items() if kind.startswith("not in ")),
    )
    return sealed(plan)


def _stored(tensor: SourceTensor, scheme: Scheme) -> tuple[Op, ...]:
    weight, module = tensor.spec, module_of(tensor.spec.name)
    codes = scheme.codes_spec(weight.name, weight.shape)
    name = f"{module}.weight_scale"
    if scheme.limit is None:
        return (
            Encode(weight.name, scheme, codes, None, TensorSpec(name, "F32", (weight.shape[0], *[1] * (len(weight.shape) - 1)))),
        )
    whole = Scale((Observer(module, "weight", 0),), scheme.limit, TensorSpec(name, "F32", ()))
    return Encode(weight.name, scheme, codes, whole), whole


def section(action: str) -> dict[str, Any]:
    """config.json's section.

    It has no quant_method on purpose. Without one diffusers 0.42.1 (quantizers/auto.py from_dict) and transformers 5.17.0
    (quantizers/auto.py supports_quant_method) refuse to load the files. At a quant_method that it does not know transformers warns,
    and at no section both take the codes for weights.
    """
    return {
        "ckptq": action,
        "weights": "F8_E4M3",
        "read_by": "no library: `ckptq restore` makes a BF16 checkpoint of this one, ckptq.loading.load_component a model",
    }


def is_stored(section: object) -> bool:
    """Whether that is the section of such a component."""
    return isinstance(section, Mapping) and section.get("ckptq") in STORAGES
