"""Sources that are quantized already: what they are, and an FP8 one seen as the BF16 checkpoint that it stands for.

Pure: headers and config alone. `ckptq.dequantize` does the arithmetic when a reader is asked for the weights.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from ckptq import foreign, json_file
from ckptq.checkpoint import FLOATS, Codes, Component, Inventory, SourceTensor, TensorSpec
from ckptq.config_text import remove_section
from ckptq.errors import CkptqError, RecipeError, SourceError, UnsupportedError
from ckptq.folder import printable
from ckptq.unjoin import unjoin
from ckptq.validators.scales import DTYPES, block_of, find_grid

FP8 = "F8_E4M3"
SCALE_LIMIT = 1 << 24
"""Bytes of one scale tensor, which is held while its weight is read; a block scale of a 72B's largest weight takes 60 kB."""
_SECTIONS = ("quantization_config", "compression_config")
_FILES = ("hf_quant_config.json", "ckptq.json")
_WEIGHT_SCALES = ("weight_scale", "weight_scale_inv")
# vLLM 0.32.0 layers/quantization/base_config.py get_cache_scale_mapper, quark.py, compressed_tensors.py: scales of what flows.
_INPUT_SCALES = ("input_scale", "activation_scale", "input_zero_point")
_CACHE_SCALES = ("q_scale", "k_scale", "v_scale", "kv_scale", "prob_scale", "output_scale", "k_zero_point", "v_zero_point", "scale")
# What NVFP4, AWQ, GPTQ, bitsandbytes and packed compressed-tensors store beside or instead of a weight.
_OTHERS = frozenset(
    ("weight_packed", "weight_scale_2", "weight_global_scale", "input_global_scale", "weight_zero_point", "weight_shape", "qweight",
     "qzeros", "scales", "g_idx", "weight_g_idx", "absmax", "quant_map", "nested_absmax", "SCB", "pre_quant_scale")
)  # fmt: skip


def describe(component: Component) -> str:
    """What says that the checkpoint is quantized, and how many of its weights are FP8; "" for one that is not."""
    fp8 = [name for name in component.tensors if _is_fp8_weight(component.tensors[name].spec)]
    count = f"{len(fp8)} FP8 weights" if len(fp8) > 1 else "one FP8 weight"
    said = _said(component)
    if said:
        return f"{said}; {count}" if fp8 else said
    for name in component.tensors:
        if (leaf := name.rpartition(".")[2]) in foreign.TENSORS:
            return f"{printable(name)} is stored; it is {foreign.TENSORS[leaf]}"
    narrow = next((t.spec for t in component.tensors.values() if t.spec.dtype.startswith("F8")), None)
    return f"{printable(narrow.name)} is {narrow.dtype}" if narrow else ""


def _said(component: Component) -> str:
    for path, section in _sections(component.config):
        if isinstance(section, Mapping):
            if "ckptq" in section and "quant_method" not in section:  # see storage.py
                return f"config.json says {json_file.short(section['ckptq'])}, which is for storage"
            inner = section.get("quantization")
            algo = section.get("quant_algo") or (inner.get("quant_algo") if isinstance(inner, Mapping) else section.get("format"))
            where = "" if path == _SECTIONS[:1] else f" in {'.'.join(path)}"
            told = foreign.METHODS.get(str(section.get("quant_method")), "")
            known = f"quant_method {section.get('quant_method')!r}" + (f", {algo}" if algo else "") + where
            return f"config.json says {known}" + (f"; it is {told}" if told else "")
    if found := foreign.whose(component.sidecars):
        return found
    return f"there is a {_FILES[0]}" if _FILES[0] in component.sidecars else ""


def refuse(component: Component) -> None:
    """Raises UnsupportedError for a quantized checkpoint, with the way on that there is from it."""
    if not (what := describe(component)):
        return
    hint = "start from the BF16 checkpoint"
    try:
        _find_codes(component)
    except CkptqError:
        pass
    else:
        hint = "add --from-fp8 to dequantize it on the way, or better " + hint
    raise UnsupportedError(f"the source is quantized already: {what}", hint=hint)


def dense(inventory: Inventory) -> Inventory:
    """An FP8 checkpoint, of native, ModelOpt's or compressed-tensors' form, seen as its BF16 self.

    Components of a pipeline that are not quantized stay as they are.

    Its weights are code * scale in float32, rounded once to BF16. Scales of activations and of the KV cache are gone: they belong
    to the old codes' measurements, not to the weights. config.json loses its section and no other byte.

    Raises RecipeError for a checkpoint that is not quantized, UnsupportedError for one that is not FP8, SourceError for codes
    without a scale that fits them.
    """
    if not any(describe(component) for component in inventory.components):
        raise RecipeError("--from-fp8: the source is not quantized, so there is nothing to dequantize", hint="leave --from-fp8 out")
    components = tuple(unjoin(_dense(component)) if describe(component) else component for component in inventory.components)
    return dataclasses.replace(inventory, components=components, files=tuple(f for f in inventory.files if f not in _FILES))


def dense_if_fp8(inventory: Inventory) -> Inventory:
    """The same, or the checkpoint as it is stored where there is no such view of it."""
    try:
        return dense(inventory)
    except CkptqError:
        return inventory


def _dense(component: Component) -> Component:
    found = _find_codes(component)
    scales = {codes.scale.spec.name for codes in found.values()}
    tensors: dict[str, SourceTensor] = {}
    gone: Counter[str] = Counter()
    for name, tensor in component.tensors.items():
        if (codes := found.get(name)) is not None:
            tensors[name] = SourceTensor(TensorSpec(name, "BF16", tensor.spec.shape), tensor.file, tensor.offset, codes)
        elif name not in scales:
            kind = _flow_scale(name)
            gone[kind] += bool(kind)
            if not kind:
                tensors[name] = tensor
    text, cut = component.config_text, [path for path, _ in _sections(component.config)]
    for path in cut:
        text = remove_section(text, path)
    count = f"{len(found)} FP8 weights are" if len(found) > 1 else "one FP8 weight is"
    done = [f"{count} dequantized to BF16"]
    done += [f"{number} {kind} scale{'s' * (number > 1)} of the source left out" for kind, number in gone.items() if number]
    done += [f"{'.'.join(path)} taken out of config.json" for path in cut]
    done += [f"{name} left out" for name in _FILES if name in component.sidecars]
    return dataclasses.replace(
        component,
        config_text=text,
        config=MappingProxyType(json_file.parse(text.encode())),
        tensors=MappingProxyType(tensors),
        sidecars=tuple(name for name in component.sidecars if name not in _FILES),
        dequantized=tuple(done),
    )


def _sections(config: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, value) of every section on quantization: at the top, or in a part's own config, where transformers puts some."""
    for key in _SECTIONS:
        if config.get(key) is not None:
            yield (key,), config[key]
    for part, inner in config.items():
        if isinstance(inner, Mapping) and part not in _SECTIONS and inner.get(_SECTIONS[0]) is not None:
            yield (part, _SECTIONS[0]), inner[_SECTIONS[0]]


def _is_fp8_weight(spec: TensorSpec) -> bool:
    return spec.dtype == FP8 and spec.name.endswith(".weight")


def _flow_scale(name: str) -> str:
    """Whose scale it is where that is of what flows through the model, "input" or "KV"; "" for any other tensor."""
    around, _, leaf = name.rpartition(".")
    if leaf in _INPUT_SCALES:
        return "input"
    return "KV" if leaf in _CACHE_SCALES and (leaf != "scale" or around.endswith(("k_cache", "v_cache"))) else ""


def _find_codes(component: Component) -> dict[str, Codes]:
    """{weight: how it is stored}. Raises as `dense` does."""
    _refuse_others(component)
    tensors = component.tensors
    section = next((section for _, section in _sections(component.config)), None)
    if isinstance(section, Mapping) and section.get("transform_config"):  # rotated weights, which the server turns back
        raise _only_fp8("config.json has a transform_config")
    block = block_of({_SECTIONS[0]: section})
    found = {name: _codes(tensor, tensors, block) for name, tensor in tensors.items() if _is_fp8_weight(tensor.spec)}
    if not found:
        raise _only_fp8("no FP8 weight is stored")
    used = {codes.scale.spec.name for codes in found.values()}
    stray = next((n for n in tensors if n.rpartition(".")[2] in _WEIGHT_SCALES and n not in used), None)
    if stray is not None:
        raise SourceError(f"{printable(stray)}: scales no FP8 weight", hint="fetch the checkpoint again")
    return found


def _refuse_others(component: Component) -> None:
    for name, tensor in component.tensors.items():
        dtype, leaf = tensor.spec.dtype, name.rpartition(".")[2]
        if leaf in _OTHERS:
            raise _only_fp8(f"{printable(name)} is stored")
        is_scale = leaf in _WEIGHT_SCALES or _flow_scale(name)
        odd = (dtype not in FLOATS and leaf == "weight") or (dtype.startswith("F8") and not is_scale)
        if odd and not _is_fp8_weight(tensor.spec):
            raise _only_fp8(f"{printable(name)} is {dtype}")


def _codes(weight: SourceTensor, tensors: Mapping[str, SourceTensor], block: tuple[int, int]) -> Codes:
    name = printable(weight.spec.name)
    base = weight.spec.name.removesuffix("weight")
    scales = [tensors[base + leaf] for leaf in _WEIGHT_SCALES if base + leaf in tensors]
    if len(scales) != 1:
        what = "with both" if scales else "without"
        raise SourceError(
            f"{name}: FP8 codes {what} {' and '.join(_WEIGHT_SCALES)}: nothing says what they stand for",
            hint="fetch the checkpoint again",
        )
    spec = scales[0].spec
    if spec.dtype not in DTYPES:
        raise _only_fp8(f"{printable(spec.name)} is {spec.dtype}, as in MXFP8")
    grid = find_grid(weight.spec.shape, spec.shape, block)
    if grid is None or spec.nbytes > SCALE_LIMIT:
        raise SourceError(
            f"{printable(spec.name)}: shape {list(spec.shape)} fits no weight of {list(weight.spec.shape)}: expected one value, "
            f"one for each row, or one for each block of {block[0]} x {block[1]}"
        )
    return Codes(weight, scales[0], grid.high, grid.wide)


def _only_fp8(found: str) -> UnsupportedError:
    return UnsupportedError(
        f"only FP8 (E4M3, with float scales) can be dequantized; of this source {found}", hint="start from the BF16 checkpoint"
    )
