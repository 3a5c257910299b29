"""Scales: what a tensor's name says it scales, what shape tells of its granularity, and its values."""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from ckptq.checkpoint import Reader, SourceTensor

if TYPE_CHECKING:
    import numpy as np

    F32 = np.ndarray[Any, np.dtype[np.float32]]

Kind = Literal["weight", "whole", "input", "k", "v", "other"]
DTYPES = ("F32", "F16", "BF16", "F64")
"""In which scales are stored that are not codes themselves."""
EXPONENTS = ("U8", "F8_E8M0")
"""In which E8M0 is stored: 2 ** (byte - 127), and 255 is NaN."""
SCALE_DTYPES = (*DTYPES, "F8_E4M3", *EXPONENTS)
BLOCK = (128, 128)
GROUPS: Mapping[str, int] = MappingProxyType({"F8_E4M3": 16, "U8": 32, "F8_E8M0": 32})
"""Columns under one scale of a dtype: NVFP4's, and those of MXFP8 and MXFP4."""
DUAL_COLUMNS = 512
"""Columns under one scale over MXFP4's own, in vLLM-Omni's form of it."""
READ_AT_ONCE = 1 << 24
"""Bytes of one scale tensor that are held at most; a channel scale of the largest vocabulary takes 1 MB."""

# vLLM 0.32.0 layers/quantization/base_config.py get_cache_scale_mapper and fp8.py name K's and V's; modelopt.py KNvfp4Static and
# compressed_tensors_w4a4_nvfp4.py the scales of scales, `whole`; `other` are those of which nothing is known.
_NAMES = re.compile(
    r"(?:.*[._])?(?:(?P<weight>weight_scale(?:_inv)?)|(?P<whole>weight_scale_2|weight_global_scale)"
    r"|(?P<input>input_scale|activation_scale|input_global_scale)|(?P<other>(?:q|prob|dual|mul)_scale))"
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
    base = _base(weight)
    return next((tensors[n] for n in (f"{base}weight_scale", f"{base}weight_scale_inv") if n in tensors), None)


def whole_of(weight: str, tensors: Mapping[str, SourceTensor]) -> tuple[SourceTensor | None, bool]:
    """(the one scale over a weight's local ones, whether it divides): ModelOpt multiplies, compressed-tensors divides."""
    base = _base(weight)
    found = [tensors.get(f"{base}{name}") for name in ("weight_scale_2", "weight_global_scale")]
    return found[0] or found[1], found[0] is None and found[1] is not None


def coarse_of(weight: str, tensors: Mapping[str, SourceTensor]) -> SourceTensor | None:
    """The scales over a weight's scales, one for 512 columns: vLLM-Omni 0.30.0 mxfp4_config.py NPUMxfp4DualScaleLinearMethod."""
    return tensors.get(f"{_base(weight)}weight_dual_scale")


def weight_of(scale: str, tensors: Mapping[str, SourceTensor]) -> SourceTensor | None:
    """The weight that a `weight_scale` lies over: of `x.weight_scale` it is `x.weight` or `x.weight_packed`."""
    base = scale.removesuffix("_inv").removesuffix("_scale")
    return next((tensors[n] for n in (base, f"{base}_packed", base.removesuffix("_weight")) if n in tensors), None)


def _base(weight: str) -> str:
    """What the names of a weight's scales begin with."""
    name = weight.removesuffix("_packed")
    return name.removesuffix("weight") if name.endswith(".weight") else f"{name}_"


def group_of(dtype: str) -> int | None:
    """Columns under one value of a scale stored in `dtype`, or None where its shape tells."""
    return GROUPS.get(dtype)


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


def find_grid(weight: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int], group: int | None = None) -> Grid | None:
    """The granularity that the shapes tell, or None where they do not fit.

    weight  [..., n, k]; leading dimensions (experts) count as rows
    scale   one value in any shape; [n] or [n, 1]; [ceil(n / block), ceil(k / block)], or that as [nb, 1, kb, 1]; [e] for [e, n, k];
            [o, 1, ..., 1] for [o, ...] of as many dimensions; with a `group` [..., n, ceil(k / group)] alone
    """
    if not weight or min(weight) < 1:
        return None
    columns, rows = weight[-1], 1
    for n in weight[:-1]:
        rows *= n
    if group is not None:
        return Grid(rows, columns, 1, group) if scale == (*weight[:-1], -(-columns // group)) else None
    if all(n == 1 for n in scale):
        return Grid(rows, columns, rows, columns)
    if len(weight) > 2 and scale == (weight[0], *[1] * (len(weight) - 1)):
        return Grid(rows, columns, rows // weight[0], columns)
    flat = (scale[0], scale[2]) if len(scale) == 4 and scale[1] == scale[3] == 1 else scale
    if flat in ((rows,), (rows, 1)):
        return Grid(rows, columns, 1, columns)
    if len(weight) == 3 and flat == weight[:1]:
        return Grid(rows, columns, weight[1], columns)
    high, wide = (min(size, limit) for size, limit in zip(block, (rows, columns), strict=True))
    blocks = Grid(rows, columns, high, wide)
    return blocks if flat == blocks.shape and len(weight) == 2 else None


def as_float(bits: int, dtype: str) -> float:
    """The number that these bits are, in any dtype of scales. An E8M0 NaN is 2 ** 128."""
    if dtype in EXPONENTS:
        return float(2.0 ** (bits - 127))
    if dtype == "F8_E4M3":
        code = bits & 0x7F
        value = (8 + code % 8) * 2.0 ** (code // 8 - 10) if code >= 8 else code * 2.0**-9
        return -value if bits & 0x80 else value
    if dtype in ("F64", "F16"):
        form, size = ("<d", 8) if dtype == "F64" else ("<e", 2)
        return float(struct.unpack(form, bits.to_bytes(size, "little"))[0])
    return float(struct.unpack("<f", (bits << 16 if dtype == "BF16" else bits).to_bytes(4, "little"))[0])


@functools.cache
def _table(dtype: str) -> F32:
    """The values of the 256 codes of a scale of one byte; NaN for those that are."""
    import numpy as np

    nan = (0x7F, 0xFF) if dtype == "F8_E4M3" else (0xFF,)
    return np.array([np.nan if code in nan else as_float(code, dtype) for code in range(256)], np.float32)


def read_part(reader: Reader, tensor: SourceTensor, start: int, count: int) -> F32:
    """`count` values of a scale tensor from the `start`-th on, F32; of a dtype in SCALE_DTYPES."""
    import numpy as np

    from ckptq.validators.rounding import as_float32

    width = tensor.spec.nbytes // tensor.spec.numel
    raw = memoryview(bytearray(count * width))
    reader.read_into(tensor, start * width, raw)
    if width == 1:
        return _table(tensor.spec.dtype)[np.frombuffer(raw, np.uint8)]
    values = np.empty(count, np.float32)
    as_float32(raw, tensor.spec.dtype, values)
    return values


def read_scales(reader: Reader, tensor: SourceTensor) -> F32 | None:
    """All values of a scale tensor, F32 [numel], or None for another dtype or one too large to hold."""
    if tensor.spec.dtype not in SCALE_DTYPES or tensor.spec.nbytes > READ_AT_ONCE or not tensor.spec.numel:
        return None
    return read_part(reader, tensor, 0, tensor.spec.numel)


def spread_over(fine: F32, coarse: F32 | None, grid: Grid) -> F32 | None:
    """MXFP4's two scales as one for each of the fine ones, F32 [numel], or None where there are no coarse ones."""
    import numpy as np

    if coarse is None:
        return None
    rows, columns = grid.shape
    return fine * np.repeat(coarse.reshape(rows, -1), DUAL_COLUMNS // grid.wide, axis=1)[:, :columns].reshape(-1)


def read_in_parts(reader: Reader, tensor: SourceTensor) -> Iterator[tuple[int, F32]]:
    """(place of the first, values) of a scale tensor of any size."""
    step = 1 << 18
    for at in range(0, tensor.spec.numel, step):
        yield at, read_part(reader, tensor, at, min(step, tensor.spec.numel - at))
