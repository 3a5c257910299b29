"""How one quantized linear is stored: which scales lie beside the weight, in which shapes. One value for each way vLLM reads.

Shapes are in words: n rows and k columns of the unfused weight [n, k], nb = ceil(n / block rows), kb = ceil(k / block columns);
"" is a scalar. Read in vLLM 0.32.0 model_executor/layers/quantization, with the file at each value, and tried on the real loader.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Granularity = Literal["tensor", "channel", "block"]


@dataclass(frozen=True, slots=True)
class Format:
    """A weight in F8_E4M3 [n, k] and its scales. `scale` multiplies: value = code * scale.

    weight_scale  name of the weight's scale, after the module's
    shapes        the shapes in which the server takes it, as words; others make it raise
    input_scale   whether each linear has a static scale for its input, a scalar
    block         [rows, columns] of a block, for granularity "block"
    """

    name: str
    granularity: Granularity
    weight_scale: str
    shapes: tuple[str, ...]
    input_scale: bool = False
    block: tuple[int, int] | None = None

    @property
    def scales(self) -> tuple[str, ...]:
        """The kinds of scale that every unfused linear has."""
        return (self.weight_scale, "input_scale") if self.input_scale else (self.weight_scale,)

    def weight_scale_shapes(self, weight: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """The accepted shapes for a weight of this shape [n, k]."""
        n, k = weight
        rows, columns = self.block or (1, 1)
        sizes = {"n": n, "k": k, "nb": -(-n // rows), "kb": -(-k // columns), "1": 1}
        return tuple(tuple(sizes[word] for word in shape.split()) for shape in self.shapes)


SCALAR = ("", "1")
"""A scalar, as both `[]` and `[1]` load: parameter.py PerTensorScaleParameter, fp8_utils.py create_fp8_input_scale."""

BLOCK = (128, 128)

# modelopt.py ModelOptFp8LinearMethod and the QuantSpec table; ModelOpt writes [] and the server creates one slot a shard.
MODELOPT_FP8 = Format("ModelOpt FP8", "tensor", "weight_scale", SCALAR, input_scale=True)
# [n, 1] raises there, and so does any input_scale: the parameter does not exist.
MODELOPT_PER_CHANNEL = Format("ModelOpt FP8_PER_CHANNEL_PER_TOKEN", "channel", "weight_scale", ("n",))
MODELOPT_BLOCK = Format("ModelOpt FP8_PB_WO", "block", "weight_scale", ("nb 1 kb 1",), block=BLOCK)

# fp8.py Fp8LinearMethod.create_weights.
NATIVE_STATIC = Format("fp8, static activations", "tensor", "weight_scale", SCALAR, input_scale=True)
NATIVE_DYNAMIC = Format("fp8, dynamic activations", "tensor", "weight_scale", SCALAR)


def native_block(block: tuple[int, int]) -> Format:
    """fp8.py with weight_block_size: the scale is called weight_scale_inv, and multiplies all the same."""
    return Format("fp8, blocks", "block", "weight_scale_inv", ("nb kb",), block=block)


def compressed_tensors(granularity: Granularity, *, static: bool, block: tuple[int, int] | None) -> Format:
    """compressed_tensors/schemes/compressed_tensors_w8a8_fp8.py create_weights."""
    shapes: dict[Granularity, tuple[str, ...]] = {"tensor": SCALAR, "channel": ("n 1",), "block": ("nb kb",)}
    name = f"compressed-tensors FP8, weight {granularity}, {'static' if static else 'dynamic'} activations"
    return Format(name, granularity, "weight_scale", shapes[granularity], static, block)
