"""Torch's side of safetensors: dtypes by their safetensors names, and tensors as plain bytes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import cast

import torch

from ckptq.checkpoint import TensorSpec

TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)
SAFETENSORS_DTYPES: Mapping[torch.dtype, str] = MappingProxyType({dtype: name for name, dtype in TORCH_DTYPES.items()})


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous host tensor of any shape and dtype, shared, as a flat view."""
    return memoryview(cast("bytearray", tensor.reshape(-1).view(torch.uint8).numpy()))


def typed(buffer: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """The tensor that `spec` describes, as a view of the start of a byte buffer (uint8 [n], n >= spec.nbytes)."""
    return buffer[: spec.nbytes].view(TORCH_DTYPES[spec.dtype]).view(spec.shape)


def blank(spec: TensorSpec, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of the shape that `spec` describes, on `meta`: without memory."""
    return torch.empty(spec.shape, dtype=dtype, device="meta")
