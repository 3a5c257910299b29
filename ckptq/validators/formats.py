"""How one quantized linear is stored: its codes and the scales beside them. One value for each way vLLM reads.

Shapes are in words: n rows and k columns of the unfused weight [n, k], nb = ceil(n / block rows), kb = ceil(k / block columns);
"" is a scalar. Read in vLLM 0.32.0 model_executor/layers/quantization, with the file at each value.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Granularity = Literal["tensor", "channel", "block", "group"]
Unset = Literal["placeholder", "one", "first", "noticed", "memory"]


@dataclass(frozen=True, slots=True)
class Scales:
    """One kind of scale that every unfused linear has.

    kind    its name, after the module's
    shapes  the shapes in which the server takes it, as words; others make it raise
    dtype   as which it is stored
    unset   what the server computes with where it is not stored.
            placeholder: -3.4e38, and of a fused linear's scales for the input the largest counts
            one: whatever the memory held, but one place for all shards of a fused linear, which any shard's fills
            first: whatever the memory held, but of a fused linear the first shard's counts alone
            noticed: nothing; it raises
            memory: whatever the memory held
    """

    kind: str
    shapes: tuple[str, ...]
    dtype: Literal["F32", "F8_E4M3", "U8"] = "F32"
    unset: Unset = "memory"

    @property
    def of_input(self) -> bool:
        """Whether it is a scale for what flows into the linear."""
        return self.kind.startswith("input_")


@dataclass(frozen=True, slots=True)
class Format:
    """A linear's codes and scales.

    granularity     what has one local scale; group: `block` is a part of one row
    scales          all of them, the local one first
    weight          name of the codes, after the module's
    codes           the dtype in which codes are stored
    packed          codes in one stored element: [n, k / packed] is stored
    block           [rows, columns] under one local scale, for granularities block and group
    dropped         kinds of scale that the server takes and leaves unused
    whole_columns   columns (per rank) have to be whole blocks with one rank, too
    unchecked       where nothing refuses a cut through a block, so that some codes come to lie beside other scales
    refined         experts' blocks are cut finer where a rank's share is no whole block
    aligned         what rows and columns per rank should be multiples of
    """

    name: str
    granularity: Granularity
    scales: tuple[Scales, ...]
    weight: str = "weight"
    codes: Literal["F8_E4M3", "I8", "U8"] = "F8_E4M3"
    packed: int = 1
    block: tuple[int, int] | None = None
    dropped: tuple[str, ...] = ()
    whole_columns: bool = False
    unchecked: Literal["nowhere", "rows", "columns"] = "nowhere"
    refined: bool = False
    aligned: int = 1

    @property
    def kinds(self) -> tuple[str, ...]:
        """The names of all scales."""
        return tuple(scales.kind for scales in self.scales)

    def weight_shape(self, stored: tuple[int, ...]) -> tuple[int, int]:
        """[n, k] of the weight whose codes are stored in this shape of two dimensions."""
        n, columns = stored
        return n, columns * self.packed

    def shapes_of(self, scales: Scales, weight: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
        """The accepted shapes of these scales for a weight [n, k]."""
        n, k = weight
        rows, columns = self.block or (1, 1)
        sizes = {"n": n, "k": k, "nb": -(-n // rows), "kb": -(-k // columns), "1": 1}
        return tuple(tuple(sizes[word] for word in shape.split()) for shape in scales.shapes)


SCALAR = ("", "1")
"""A scalar, as both `[]` and `[1]` load: parameter.py PerTensorScaleParameter, fp8_utils.py create_fp8_input_scale."""
BLOCK = (128, 128)
NVFP4_GROUP = 16
MX_GROUP = 32
_GROUPS = ("n kb",)
_FP8_INPUT = Scales("input_scale", SCALAR, unset="placeholder")


def fp8(
    name: str,
    granularity: Granularity,
    shapes: tuple[str, ...],
    *,
    kind: str = "weight_scale",
    static: bool = False,
    block: tuple[int, int] | None = None,
    whole_columns: bool = False,
    unchecked: Literal["nowhere", "rows"] = "nowhere",
) -> Format:
    """F8_E4M3 [n, k] with F32 scales for a tensor, its rows or its blocks. utils/fp8_utils.py create_fp8_scale_parameter.

    Alignment: kernels/linear/scaled_mm/cutlass.py pads what is no multiple of 16, pytorch.py refuses it; neither sees blocks.
    """
    scales = (Scales(kind, shapes, unset="placeholder"), *((_FP8_INPUT,) if static else ()))
    return Format(
        name,
        granularity,
        scales,
        block=block,
        whole_columns=whole_columns,
        unchecked=unchecked,
        refined=kind == "weight_scale_inv",
        aligned=1 if block else 16,
    )


# modelopt.py KFp8StaticTensor, KFp8StaticChannel, KFp8Block128; ModelOpt writes [] and the server creates one slot a shard.
MODELOPT_FP8 = fp8("ModelOpt FP8", "tensor", SCALAR, static=True)
# [n, 1] raises there, and so does any input_scale: the parameter does not exist.
MODELOPT_PER_CHANNEL = fp8("ModelOpt FP8_PER_CHANNEL_PER_TOKEN", "channel", ("n",))
MODELOPT_BLOCK = fp8(
    "ModelOpt FP8_PB_WO", "block", ("nb 1 kb 1",), block=BLOCK, whole_columns=True, unchecked="rows",
)  # fmt: skip

# modelopt.py KNvfp4Static, KNvfp4Dynamic, _DropInputScale. The largest weight_scale_2 and input_scale of a fused linear counts.
_NVFP4 = (Scales("weight_scale", _GROUPS, "F8_E4M3", "noticed"), Scales("weight_scale_2", SCALAR))
MODELOPT_NVFP4 = Format(
    "ModelOpt NVFP4", "group", (*_NVFP4, Scales("input_scale", SCALAR)), codes="U8", packed=2, block=(1, NVFP4_GROUP),
    whole_columns=True,
)  # fmt: skip
MODELOPT_NVFP4_A16 = Format(
    "ModelOpt W4A16_NVFP4", "group", _NVFP4, codes="U8", packed=2, block=(1, NVFP4_GROUP), dropped=("input_scale",),
    whole_columns=True,
)  # fmt: skip
# modelopt.py KMxfp8Static.
MODELOPT_MXFP8 = Format(
    "ModelOpt MXFP8", "group", (Scales("weight_scale", _GROUPS, "U8"),), block=(1, MX_GROUP), whole_columns=True
)  # fmt: skip

# fp8.py Fp8LinearMethod.create_weights.
NATIVE_STATIC = fp8("fp8, static activations", "tensor", SCALAR, static=True)
NATIVE_DYNAMIC = fp8("fp8, dynamic activations", "tensor", SCALAR)


def native_block(block: tuple[int, int]) -> Format:
    """fp8.py with weight_block_size: the scale is called weight_scale_inv, and multiplies all the same."""
    return fp8("fp8, blocks", "block", ("nb kb",), kind="weight_scale_inv", block=block)


_CT_SHAPES: dict[Granularity, tuple[str, ...]] = {"tensor": SCALAR, "channel": ("n 1",), "block": ("nb kb",)}


def compressed_tensors(granularity: Granularity, *, static: bool, block: tuple[int, int] | None) -> Format:
    """compressed_tensors/schemes/compressed_tensors_w8a8_fp8.py create_weights."""
    name = f"compressed-tensors FP8, weight {granularity}, {'static' if static else 'dynamic'} activations"
    return fp8(name, granularity, _CT_SHAPES[granularity], static=static, block=block)


def compressed_tensors_int8(granularity: Granularity, *, static: bool) -> Format:
    """compressed_tensors/schemes/compressed_tensors_w8a8_int8.py create_weights: one input_scale, whichever shard's came last."""
    name = f"compressed-tensors INT8, weight {granularity}, {'static' if static else 'dynamic'} activations"
    inputs = (Scales("input_scale", SCALAR, unset="one"),) if static else ()
    return Format(name, granularity, (Scales("weight_scale", _CT_SHAPES[granularity]), *inputs), codes="I8")


# compressed_tensors/schemes/compressed_tensors_w4a4_nvfp4.py. Global scales divide; of a fused linear the largest counts.
_CT_NVFP4 = (Scales("weight_scale", _GROUPS, "F8_E4M3"), Scales("weight_global_scale", SCALAR))
CT_NVFP4 = Format(
    "compressed-tensors NVFP4", "group", (*_CT_NVFP4, Scales("input_global_scale", SCALAR)), "weight_packed", "U8", 2,
    (1, NVFP4_GROUP), whole_columns=True, unchecked="columns",
)  # fmt: skip
CT_NVFP4_A16 = Format(
    "compressed-tensors NVFP4A16", "group", _CT_NVFP4, "weight_packed", "U8", 2, (1, NVFP4_GROUP), whole_columns=True,
    unchecked="columns",
)  # fmt: skip
# compressed_tensors/schemes/compressed_tensors_w4a4_mxfp4.py and w8a8_mxfp8.py.
CT_MXFP4 = Format(
    "compressed-tensors MXFP4", "group", (Scales("weight_scale", _GROUPS, "U8"),), "weight_packed", "U8", 2, (1, MX_GROUP),
    whole_columns=True, unchecked="columns",
)  # fmt: skip
CT_MXFP8 = Format(
    "compressed-tensors MXFP8", "group", (Scales("weight_scale", _GROUPS, "U8"),), block=(1, MX_GROUP), whole_columns=True,
    unchecked="columns",
)  # fmt: skip


def of_experts(form: Format) -> Format:
    """Routed experts in NVFP4: nothing looks whether a scale was loaded or columns are whole groups; gate's scale of the whole
    tensor is up's, too; those of weights alone have a place for the input's scale all the same, which their kernels leave unused.

    modelopt.py ModelOptNvFp4FusedMoE, compressed_tensors_moe/compressed_tensors_moe_w4a4_nvfp4.py.
    """
    whole = ("weight_scale_2", "weight_global_scale")
    unset = tuple(replace(scales, unset="first" if scales.kind in whole else "memory") for scales in form.scales)
    dropped = form.dropped or (() if any(scales.of_input for scales in form.scales) else ("input_global_scale",))
    return replace(form, scales=unset, dropped=dropped, unchecked="columns")


WEIGHT_KINDS = ("weight", "weight_packed")
"""Names under which a format keeps its codes."""
SCALE_KINDS = (
    "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale", "input_scale", "input_global_scale",
)  # fmt: skip
"""Names of all scales that a format keeps beside its codes."""
