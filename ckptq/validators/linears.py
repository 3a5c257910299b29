"""A quantized linear's codes and scales against its format: are they there, in the dtypes and shapes that the server reads?"""

from __future__ import annotations

from collections.abc import Iterator

from ckptq.checkpoint import FLOATS, TensorSpec
from ckptq.validators import Code, Finding, error, warning
from ckptq.validators.expected import Expected
from ckptq.validators.formats import SCALE_KINDS, Format, Scales
from ckptq.validators.vllm_rules import ServerLinear

_QUANT = "vLLM 0.32.0 model_executor/layers/quantization"
CODES = {
    "layout.missing-scale": Code(
        "a quantized linear lacks a scale",
        f"{_QUANT}/utils/fp8_utils.py create_fp8_scale_parameter; modelopt.py ModelOptFp8MoEMethod, ModelOptNvFp4FusedMoE",
    ),
    "layout.stray-scale": Code(
        "a scale where nothing is quantized, or none that this format has",
        "vLLM 0.32.0 model_executor/models/utils.py AutoWeightsLoader; models/qwen3_moe.py load_weights drops it",
    ),
    "layout.scale-dtype": Code("a scale in another dtype than its format has", "vLLM 0.32.0 model_executor/parameter.py"),
    "layout.scale-shape": Code(
        "a scale of a shape that the server does not take for this format", "vLLM 0.32.0 model_executor/parameter.py"
    ),
    "layout.columns": Code(
        "columns that are no whole blocks or groups under one scale",
        f"{_QUANT}/modelopt.py KNvfp4Static, KMxfp8Static, KFp8Block128",
    ),
}
_BITS = {("I8", "U8"), ("U8", "I8")}
"""Dtypes of which one is copied into the other without a change of bits."""
_SIZES = {"n": "rows", "k": "columns", "nb": "blocks of rows", "kb": "blocks of columns"}
"""What a `Format` calls the sizes in a shape of scales, in words."""


def check(module: str, linear: ServerLinear, form: Format, at: Expected) -> Iterator[Finding]:
    """Findings on one unfused linear that the server builds in this format."""
    weight = at.codes_of(module)
    if weight is not None:
        yield from _codes_dtype(weight, form)
    shape = at.weight_shape(module)
    matrix = (shape[0], shape[1]) if shape is not None and len(shape) == 2 else None
    if matrix is not None:
        yield from _whole_columns(f"{module}.{form.weight}", matrix, form)
    for scales in form.scales:
        spec = at.tensors.get(f"{module}.{scales.kind}")
        if spec is None:
            yield _missing_scale(f"{module}.{scales.kind}", scales, linear, at)
            continue
        if scales.of_input:
            yield from scale_shape(spec, ((), (1,)), "one scale for the input")
        elif matrix is not None:
            yield from scale_shape(spec, form.shapes_of(scales, matrix), f"{form.name} has {_in_words(scales)}")
        # llm-compressor makes its codes with the scale in the model's dtype, so nothing is lost there.
        yield from scale_dtype(spec, scales.dtype, rounded=at.settings.method != "compressed-tensors")
    for kind in SCALE_KINDS:
        if kind not in (*form.kinds, *form.dropped) and f"{module}.{kind}" in at.tensors:
            yield stray(f"{module}.{kind}", f"{form.name} has none")
    for kind in form.dropped:
        if f"{module}.{kind}" in at.tensors:
            yield warning(
                "layout.stray-scale", f"{module}.{kind}", f"none: {form.name} quantizes weights alone", "stored",
                "vLLM drops it and leaves activations as they are: no harm, unless the checkpoint was made to quantize them",
                "leave it out, or let the config say that activations are quantized",
            )  # fmt: skip


def _in_words(scales: Scales) -> str:
    words = scales.shapes[0].split()
    return f"[{', '.join(_SIZES.get(word, word) for word in words)}]" if words else "one"


def _codes_dtype(weight: TensorSpec, form: Format) -> Iterator[Finding]:
    if weight.dtype == form.codes:
        return
    if (weight.dtype, form.codes) in _BITS:
        yield warning(
            "layout.weight-dtype", weight.name, f"{form.codes}: vLLM builds this linear quantized", weight.dtype,
            "vLLM copies one into the other, and the bits stay the same", f"store it as {form.codes}",
        )  # fmt: skip
        return
    floats = weight.dtype in FLOATS
    yield error(
        "layout.weight-dtype", weight.name, f"{form.codes}: vLLM builds this linear quantized", weight.dtype,
        f"the values would be {'cast to codes as if they had no scale' if floats else 'converted as numbers'}, silently",
        f"store {form.codes} codes, declare the format whose codes these are, or exclude the whole fused linear",
    )  # fmt: skip


def _whole_columns(name: str, matrix: tuple[int, int], form: Format) -> Iterator[Finding]:
    columns = form.block[1] if form.block and form.whole_columns else 1
    if matrix[1] % columns:
        silent = ", or loads the scales of whole groups alone, silently"
        yield error(
            "layout.columns", name, f"columns that are a multiple of {columns}: {form.name}", str(matrix[1]),
            f"vLLM raises{'' if form.unchecked == 'nowhere' else silent}", "exclude it, or quantize it per tensor or per channel",
        )  # fmt: skip


def _missing_scale(name: str, scales: Scales, linear: ServerLinear, at: Expected) -> Finding:
    wanted = f"{scales.dtype} {_in_words(scales) if scales.shapes[0] else '[]'}"
    # A fused linear's parameter has one slot a shard, and for activations the largest counts: one shard's is enough to run.
    shared = scales.of_input and scales.unset in ("placeholder", "one")
    if shared and any(f"{m}.{scales.kind}" in at.tensors for m in linear.shards):
        return warning("layout.missing-scale", name, wanted, "not stored", "vLLM takes another shard's", "store it for each")
    first = f"{linear.shards[0]}.{scales.kind}"
    if scales.unset == "first" and name != first and first in at.tensors:
        return warning("layout.missing-scale", name, wanted, "not stored", "vLLM takes the first shard's", "store it for each")
    if linear.part == "experts" and scales.unset == "placeholder":
        effect = "vLLM computes with 1.0, silently" + (", for all experts of the layer" if scales.of_input else "")
    elif scales.unset == "placeholder":
        effect = "vLLM loads without it and computes with a placeholder (-3.4e38), silently"
    elif scales.unset == "noticed" and at.settings.server.unset_noticed:
        effect = "vLLM raises: it was never loaded"
    else:
        effect = "vLLM loads without it and computes with what the memory held, silently"
    calibrate = ", with samples that reach it" if scales.of_input else ""
    return error("layout.missing-scale", name, wanted, "not stored", effect, f"export again{calibrate}")


def scale_shape(spec: TensorSpec, shapes: tuple[tuple[int, ...], ...], what: str) -> Iterator[Finding]:
    """A finding where a scale has none of the shapes."""
    if spec.shape not in shapes:
        yield error(
            "layout.scale-shape", spec.name, " or ".join(str(list(s)) for s in shapes) + f": {what}", str(list(spec.shape)),
            "vLLM raises an error that does not name the tensor", "store that shape, or declare the format whose scales these are",
        )  # fmt: skip


def scale_dtype(spec: TensorSpec, wanted: str = "F32", *, rounded: bool = True) -> Iterator[Finding]:
    """A finding where a scale is not in the dtype of its format. `rounded`: whether an F32 in a narrower float has lost digits."""
    if spec.dtype == wanted or (wanted == "F32" and spec.dtype in ("BF16", "F16") and not rounded):
        return
    if (spec.dtype, wanted) in _BITS:
        effect = "vLLM copies one into the other, and the bits stay the same"
    elif wanted == "F32" and spec.dtype in ("BF16", "F16"):
        effect = f"vLLM widens it, but it was rounded to {spec.dtype} before"
    elif wanted != "U8" and spec.dtype in FLOATS:
        effect = f"vLLM rounds it to {wanted}"
    else:
        yield error(
            "layout.scale-dtype", spec.name, wanted, spec.dtype, "vLLM would convert the number and not see a fault",
            f"store it as {wanted}",
        )  # fmt: skip
        return
    yield warning("layout.scale-dtype", spec.name, wanted, spec.dtype, effect, f"store it as {wanted}")


def stray(name: str, why: str) -> Finding:
    """A finding for a scale that nobody asks for."""
    return error(
        "layout.stray-scale",
        name,
        f"no scale: {why}",
        "stored",
        "vLLM raises at such a key, and some of its models drop it silently",
        "remove it, or quantize the module and declare it so",
    )
