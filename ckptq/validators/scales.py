"""Scales: what a tensor's name says it scales, what shape tells of its granularity, and its values."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ckptq.checkpoint import Reader, SourceTensor

if TYPE_CHECKING:
    import numpy as np

    F32 = np.ndarray[Any, np.dtype[np.float32]]

Kind = Literal["weight", "input", "k", "v", "other"]
DTYPES = ("F32", "F16", "BF16", "F64")
"""In which scales are stored that are not codes themselves."""
BLOCK = (128, 128)
READ_AT_ONCE = 1 << 24
"""Bytes of one scale tensor; a channel scale of the largest vocabulary takes 1 MB."""

# vLLM 0.32.0 layers/quantization/base_config.py get_cache_scale_mapper and fp8.py name K's and V's; `other` are those of formats
# in which the value means something else: 1 / scale, or a scale of scales.
_NAMES = re.compile(
    r"(?:.*[._])?(?:(?P<weight>weight_scale(?:_inv)?)|(?P<input>input_scale|activation_scale)"
    r"|(?P<other>weight_scale_2|(?:weight|input)_global_scale|(?:q|prob)_scale))"
    r"|(?:.*\.)?(?:(?P<k>k_scale|kv_scale|k_cache\.scale|k_proj\.output_scale)|(?P<v>v_scale|v_cache\.scale|v_proj\.output_scale))"
)


def scale_kind(name: str) -> Kind | None:
    """What the tensor scales, by its name, or None where it is no scale."""
    if "scale" not in name:
        return None
    match = _NAMES.fullmatch(name)
    kind: Any = match.lastgroup if match else None
    return kind  # type: ignore[no-any-return]


def scale_of(weight: str, tensors: Mapping[str, SourceTensor]) -> SourceTensor | None:
    """The stored scale of a weight: `x.weight_scale`, or `x.weight_scale_inv`, which multiplies all the same."""
    base = weight.removesuffix("weight") if weight.endswith(".weight") else f"{weight}_"
    return next((tensors[n] for n in (f"{base}weight_scale", f"{base}weight_scale_inv") if n in tensors), None)


def block_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """[rows, columns] of a weight's blocks, as config.json says it in either way, or 128 by 128."""
    section = config.get("quantization_config")
    if not isinstance(section, Mapping):
        return BLOCK
    groups = section.get("config_groups")
    weights = [g.get("weights") for g in groups.values() if isinstance(g, Mapping)] if isinstance(groups, Mapping) else []
    said = [section.get("weight_block_size"), *(w.get("block_structure") for w in weights if isinstance(w, Mapping))]
    for value in said:
        if isinstance(value, list) and len(value) == 2 and all(type(n) is int and n > 0 for n in value):
            return value[0], value[1]
    return BLOCK


@dataclass(frozen=True, slots=True)
class Grid:
    """How a scale lies over a weight, seen as [rows, columns]: one value for each `high` rows by `wide` columns."""

    rows: int
    columns: int
    high: int
    wide: int

    @property
    def shape(self) -> tuple[int, int]:
        """Of the scale: [ceil(rows / high), ceil(columns / wide)]."""
        return -(-self.rows // self.high), -(-self.columns // self.wide)


def find_grid(weight: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int]) -> Grid | None:
    """The granularity that the shapes tell, or None where they do not fit.

    weight  [..., n, k]; leading dimensions (experts) count as rows
    scale   one value in any shape; [n] or [n, 1]; [ceil(n / block), ceil(k / block)], or that as [nb, 1, kb, 1]; [e] for [e, n, k]
    """
    if not weight or min(weight) < 1:
        return None
    columns, rows = weight[-1], 1
    for n in weight[:-1]:
        rows *= n
    if all(n == 1 for n in scale):
        return Grid(rows, columns, rows, columns)
    flat = (scale[0], scale[2]) if len(scale) == 4 and scale[1] == scale[3] == 1 else scale
    if flat in ((rows,), (rows, 1)):
        return Grid(rows, columns, 1, columns)
    if len(weight) == 3 and flat == weight[:1]:
        return Grid(rows, columns, weight[1], columns)
    high, wide = (min(size, limit) for size, limit in zip(block, (rows, columns), strict=True))
    blocks = Grid(rows, columns, high, wide)
    return blocks if flat == blocks.shape and len(weight) == 2 else None


def as_float(bits: int, dtype: str) -> float:
    """The number that these bits are in F64, F32, F16 or BF16."""
    if dtype in ("F64", "F16"):
        form, size = ("<d", 8) if dtype == "F64" else ("<e", 2)
        return float(struct.unpack(form, bits.to_bytes(size, "little"))[0])
    return float(struct.unpack("<f", (bits << 16 if dtype == "BF16" else bits).to_bytes(4, "little"))[0])


def read_scales(reader: Reader, tensor: SourceTensor) -> F32 | None:
    """All values of a scale tensor, F32 [numel], or None for another dtype or one too large to be a scale."""
    import numpy as np

    from ckptq.validators.rounding import as_float32

    if tensor.spec.dtype not in DTYPES or tensor.spec.nbytes > READ_AT_ONCE:
        return None
    raw = memoryview(bytearray(tensor.spec.nbytes))
    reader.read_into(tensor, 0, raw)
    values = np.empty(tensor.spec.numel, np.float32)
    as_float32(raw, tensor.spec.dtype, values)
    return values
