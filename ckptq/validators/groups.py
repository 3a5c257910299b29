"""Config groups of compressed-tensors: in which format the server builds the linears of a group.

Read in vLLM 0.32.0 model_executor/layers/quantization/compressed_tensors/compressed_tensors.py _get_scheme_from_parts; what a group
may say at all, in compressed-tensors 0.17 quantization/quant_args.py QuantizationArgs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckptq.validators import formats
from ckptq.validators.formats import MX_GROUP, NVFP4_GROUP, Format, Granularity
from ckptq.validators.servers import Server

# utils.py is_activation_quantization_format. Only there does _get_scheme_from_parts look for FP8 and INT8 with activations.
FORMATS = ("float-quantized", "naive-quantized", "int-quantized", "nvfp4-pack-quantized")
_PACKED = "pack-quantized"
_STRATEGIES: tuple[Granularity, ...] = ("tensor", "channel", "block")
_STATIC = ("channel", "block", "attn_head")
_ALL_STRATEGIES = (*_STRATEGIES, "token", "group", "tensor_group", "attn_head")
# quant_args.py QuantizationArgs, which forbids others.
ARGUMENTS = frozenset(
    ("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder", "scale_dtype", "zp_dtype",
     "observer", "observer_kwargs")
)  # fmt: skip
Arguments = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Why the server has no scheme: what it would take instead, and for which key of the group (None for several)."""

    key: str | None
    what: str


@dataclass(frozen=True, slots=True)
class Unknown:
    """A scheme that vLLM may have and ckptq does not know, in words."""

    what: str


def scheme(group: Mapping[str, Any], top_format: Any, server: Server) -> Format | Wanted | Unknown:
    """What the server builds of a group whose arguments `fault` finds nothing wrong with. In the server's own order."""
    weights, inputs = group["weights"], group.get("input_activations")
    if not isinstance(inputs, Mapping) or not inputs:  # of other types `check` has told
        inputs = None
    said = group.get("format") or top_format
    if _is_nvfp4(weights):
        if inputs is None:
            return formats.CT_NVFP4_A16
        if not _is_nvfp4(inputs):
            return Wanted("input_activations", 'the same numbers as the weights\' (dynamic "local"), or null')
        return formats.CT_NVFP4 if server.nvfp4_any_format or said in FORMATS else _FORMAT
    if _is_group_of(weights, MX_GROUP, 4):
        return formats.CT_MXFP4
    if _is_group_of(weights, MX_GROUP, 8) and weights.get("scale_dtype") in ("torch.uint8", "uint8"):
        return formats.CT_MXFP8
    number, bits = _type(weights), weights.get("num_bits", 8)
    if (number, bits) == ("float", 4) and strategy(weights) in ("group", "tensor_group") and said != _PACKED:
        return Wanted("weights", _GROUPS)
    if bits != 8 or said == _PACKED or (number == "int" and group.get("output_activations")):
        return Unknown(f"weights of {bits} bits, type {number}, strategy {strategy(weights)}, format {said}")
    if said not in FORMATS:
        return _FORMAT
    return _fp8(weights, inputs) if number == "float" else _int8(weights, inputs)


_FORMAT = Wanted("format", '"float-quantized" for FP8, "int-quantized" for INT8, here or for the whole section')
_GROUPS = (
    f"MX numbers have strategy group and group_size {MX_GROUP}, MXFP8 also scale_dtype torch.uint8; "
    f"NVFP4 strategy tensor_group and group_size {NVFP4_GROUP}"
)


def _fp8(weights: Arguments, inputs: Arguments | None) -> Format | Wanted:
    """_is_fp8_w8a8 and _is_fp8_w8a16."""
    granularity = _granularity(weights, _STRATEGIES)
    if granularity is None:
        return Wanted("weights", f"static, symmetric, strategy tensor, channel or block; {_GROUPS}")
    block = block_of(weights)
    if granularity == "block" and (_is_static(inputs) or block is None):
        return Wanted(None, "block_structure [rows, columns], and dynamic input_activations")
    return formats.compressed_tensors(granularity, static=_is_static(inputs), block=block if granularity == "block" else None)


def _int8(weights: Arguments, inputs: Arguments | None) -> Format | Wanted | Unknown:
    """_is_static_tensor_w8a8 and _is_dynamic_token_w8a8."""
    granularity = _granularity(weights, ("tensor", "channel"))
    if granularity is None:
        return Wanted("weights", "static, symmetric, strategy tensor or channel")
    static = _is_static(inputs)
    if inputs is None or inputs.get("num_bits", 8) != 8 or strategy(inputs) != ("tensor" if static else "token"):
        return Wanted("input_activations", "8 bits: static with strategy tensor, or dynamic with strategy token")
    if static and not inputs.get("symmetric", True):
        return Unknown("INT8 activations with a stored zero point")
    return formats.compressed_tensors_int8(granularity, static=static)


def is_fp8(form: Format) -> bool:
    """Whether it is F8_E4M3 with F32 scales."""
    return form.codes == "F8_E4M3" and form.granularity != "group"


def _granularity(weights: Arguments, known: tuple[Granularity, ...]) -> Granularity | None:
    found = next((g for g in known if g == strategy(weights)), None)
    return found if weights.get("symmetric", True) and not weights.get("dynamic", False) else None


def _is_static(inputs: Arguments | None) -> bool:
    return inputs is not None and not inputs.get("dynamic", False)


def _type(arguments: Arguments) -> str:
    return str(arguments.get("type") or "int").lower()


def _is_nvfp4(arguments: Arguments) -> bool:
    return strategy(arguments) == "tensor_group" and _is_numbers(arguments, NVFP4_GROUP, 4)


def _is_group_of(arguments: Arguments, size: int, bits: int) -> bool:
    return strategy(arguments) == "group" and _is_numbers(arguments, size, bits)


def _is_numbers(arguments: Arguments, size: int, bits: int) -> bool:
    same = (_type(arguments), arguments.get("num_bits", 8), arguments.get("group_size")) == ("float", bits, size)
    return same and bool(arguments.get("symmetric", True))


def fault(arguments: Arguments) -> str | None:
    """What QuantizationArgs would take instead; None where it takes them."""
    said, size = strategy(arguments), arguments.get("group_size")
    if said not in _ALL_STRATEGIES or (size is not None and type(size) is not int):
        return "a strategy and a group_size that compressed-tensors knows"
    if _type(arguments) not in ("int", "float"):
        return "type int or float"
    if arguments.get("dynamic") == "local" and said != "tensor_group":
        return 'dynamic "local" for strategy tensor_group alone'
    if (said == "token") > bool(arguments.get("dynamic")) or (said in _STATIC and arguments.get("dynamic")):
        return "dynamic true for strategy token, false for channel and block"
    if (said in ("group", "tensor_group")) != (size is not None and size > 0):
        return "a positive group_size for strategy group, and for no other"
    if (said == "block") != (arguments.get("block_structure") is not None) or (said == "block" and not block_of(arguments)):
        return "block_structure [rows, columns] for strategy block, and for no other"
    return None


def strategy(arguments: Arguments) -> str:
    """The strategy, or what follows from group_size where it is left out."""
    size = arguments.get("group_size")
    return str(arguments.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")).lower()


def block_of(arguments: Arguments) -> tuple[int, int] | None:
    """block_structure as [128, 128] or "128x128"."""
    said = arguments.get("block_structure")
    if isinstance(said, str):
        said = [int(n) if n.isdecimal() else n for n in said.split("x")]
    if isinstance(said, list) and len(said) == 2 and all(type(n) is int and n > 0 for n in said):
        return said[0], said[1]
    return None
