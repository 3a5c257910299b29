"""A denoiser's linears against how vLLM-Omni builds them. What is built quantized must be stored so, with scales that arrive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ckptq.checkpoint import FLOATS, TensorSpec
from ckptq.validators import Code, Finding, error, warning
from ckptq.validators.formats import Format, Scales
from ckptq.validators.linears import scale_dtype, scale_shape
from ckptq.validators.omni.built import Built, Linear
from ckptq.validators.omni.server import KINDS, OMNI

_ADAPTER = f"{OMNI} diffusion/model_loader/checkpoint_adapters/modelopt.py ModelOptFp8CheckpointAdapter"
_LOADER = f"{OMNI} diffusion/model_loader/diffusers_loader.py load_weights"
_LINEARS = "vLLM 0.32.0 model_executor/layers/linear.py"
_METHODS = "vLLM 0.32.0 model_executor/layers/quantization/modelopt.py, fp8.py get_quant_method"
CODES = {
    "layout.omni-not-ignored": Code("built quantized, stored in the source's dtype", f"{_METHODS}; {_LOADER}"),
    "layout.omni-ignored": Code("built unquantized, stored as codes that nothing decodes", f"{_METHODS}; {_ADAPTER}"),
    "layout.omni-dequantized": Code("codes that the server decodes while it loads", f"{_ADAPTER}._dequantize_weight"),
    "layout.omni-dropped-scale": Code(
        "a scale under a name that the server's adapter can't map, and drops", f"{_ADAPTER}._resolve_target_and_output_names"
    ),
    "layout.omni-missing-scale": Code("a quantized linear lacks a scale", _LOADER),
    "layout.omni-missing-weight": Code("a linear's weight is not stored", _LOADER),
    "layout.omni-stray-scale": Code("a scale that the format has not, or of a linear that is not quantized", _ADAPTER),
    "layout.omni-weight-dtype": Code(
        "a weight in a dtype that the server would misread", "vLLM 0.32.0 model_executor/parameter.py"
    ),
    "layout.omni-shard-width": Code(
        "shards of one fused linear with different inputs", "vLLM 0.32.0 model_executor/layers/linear.py"
    ),
    "layout.omni-alignment": Code(
        "rows or columns that are no multiple of 16, which fewer kernels take",
        "vLLM 0.32.0 model_executor/kernels/linear/scaled_mm/cutlass.py, pytorch.py",
    ),
}
_PLACEHOLDER = "vLLM-Omni loads without it, warns at most, and computes with a placeholder (-3.4e38): the images are noise"


def check(at: Built) -> Iterator[Finding]:
    """Findings on all linears that are built with the quantization config."""
    for linear in at.linears:
        built = at.treatment[linear.prefix]
        for names in at.units(linear):
            weight = at.find(names, "weight")
            if weight is None:
                yield from () if linear.optional else (_missing_weight(names[0], built),)
            elif isinstance(built, Format):
                yield from _quantized(names, weight, built, at)
            else:
                yield from kept(weight, at)
        yield from _shard_width(linear, at)


def _missing_weight(module: str, built: object) -> Finding:
    return error(
        "layout.omni-missing-weight", f"{module}.weight", "codes" if isinstance(built, Format) else "the weight", "not stored",
        "vLLM-Omni raises, or leaves the memory of one shard of a fused linear as it found it, silently", "export again",
    )  # fmt: skip


def _quantized(names: Sequence[str], weight: TensorSpec, form: Format, at: Built) -> Iterator[Finding]:
    """One stored part of a linear that is built quantized."""
    scales = [spec for name in names for kind in KINDS if (spec := at.tensors.get(f"{name}.{kind}")) is not None]
    if weight.dtype in FLOATS and not scales:
        yield not_ignored(weight, at)
        return
    if weight.dtype != form.codes:
        yield error(
            "layout.omni-weight-dtype", weight.name, f"{form.codes}: {form.name}", weight.dtype,
            "the values would be converted as numbers, silently",
            "store the codes that the scales belong to, or put it on the list",
        )  # fmt: skip
    matrix = (weight.shape[0], weight.shape[1]) if len(weight.shape) == 2 else None
    if matrix is not None and form.aligned > 1 and any(size % form.aligned for size in matrix):
        yield _unaligned(weight, form, at)
    for kind in form.scales:
        yield from _scale(names, kind, matrix, form, at)
    for also in at.section.also:
        spec = at.find(names, also.kind)
        if spec is None:
            raises = f"{OMNI} raises: it was never loaded"
            yield error("layout.omni-missing-scale", f"{names[0]}.{also.kind}", "F32", "not stored", raises, "export again")
        elif matrix is not None:
            yield from scale_shape(spec, (also.shape(*matrix),), form.name)
    known = {f"{name}.{kind}" for name in names for kind in (*form.kinds, *(also.kind for also in at.section.also))}
    yield from (_stray(spec, f"{form.name} has none of that name", at) for spec in scales if spec.name not in known)


def not_ignored(weight: TensorSpec, at: Built) -> Finding:
    """For a weight in the source's dtype that is built quantized."""
    exact = "Only the server's exact names count, one for each linear: no pattern, no part of a name"
    fits = "The server's names count (`to_qkv`, `add_kv_proj`, `w13`), whole, as a part of a longer one, or with `*`"
    shared = at.section.method in at.denoiser.options and len(at.denoiser.folders) > 1
    first = "; of two transformers the first one's list counts" if shared else ""
    return error(
        "layout.omni-not-ignored", weight.name, f"what stays unquantized is on the list {at.section.key}; this linear is not",
        f"{weight.dtype}, without scales",
        f"vLLM-Omni casts it to {at.section.form.codes} without a scale, silently: the images are noise",
        f"add it to {at.section.key}{first}. {fits if at.section.method == 'modelopt' else exact}",
    )  # fmt: skip


def _unaligned(weight: TensorSpec, form: Format, at: Built) -> Finding:
    pads = "vLLM-Omni pads it whenever it runs" if at.denoiser.padded else "vLLM's CUTLASS kernel pads it whenever it runs"
    return warning(
        "layout.omni-alignment", weight.name, f"rows and columns that are multiples of {form.aligned}", str(list(weight.shape)),
        f"{pads}; the kernels of PyTorch, which other devices take, refuse it", "keep it unquantized where that costs too much",
    )  # fmt: skip


def _scale(names: Sequence[str], scales: Scales, matrix: tuple[int, int] | None, form: Format, at: Built) -> Iterator[Finding]:
    spec = at.find(names, scales.kind)
    wanted = f"{scales.dtype} {'[]' if not scales.shapes[0] else 'one a row' if form.granularity == 'channel' else 'one a block'}"
    if spec is not None:
        if scales.of_input:
            yield from scale_shape(spec, ((), (1,)), "one scale for the input")
        elif matrix is not None:
            yield from scale_shape(spec, form.shapes_of(scales, matrix), form.name)
        yield from scale_dtype(spec, scales.dtype)
        return
    under = next((name for name in names if f"{name}.{scales.kind}" in at.tensors), None)
    if under is None:
        effect = (
            _PLACEHOLDER if scales.unset == "placeholder" else "vLLM-Omni loads without it and computes with what the memory held"
        )
        yield error("layout.omni-missing-scale", f"{names[0]}.{scales.kind}", wanted, "not stored", effect, "export again")
        return
    other = next((name for name in names if not at.loses(name)), None)
    how = f"under {_last(other)}" if other else "the fused linear's weight and scales under the server's name"
    yield error(
        "layout.omni-dropped-scale", f"{under}.{scales.kind}", "a name that the server's adapter can map: its weight arrives, the "
        "scale does not", "the source's name", f"the adapter drops it. {_PLACEHOLDER}",
        f"store {how}, which plain diffusers no longer loads; or keep it unquantized; or write quant_method fp8, which has no "
        "adapter",
    )  # fmt: skip


def _last(name: str) -> str:
    return ".".join(part for part in name.split(".")[-3:] if not part.isdigit())


def kept(weight: TensorSpec, at: Built) -> Iterator[Finding]:
    """Findings on a weight that is built unquantized, and on the scales beside it."""
    module = weight.name.rpartition(".")[0]
    scales = [spec for kind in KINDS if (spec := at.tensors.get(f"{module}.{kind}")) is not None]
    if weight.dtype in FLOATS:
        yield from (_stray(spec, "this linear is not quantized", at) for spec in scales)
        return
    decodes = at.adapted and weight.dtype.startswith("F8_E")
    scale = at.tensors.get(f"{module}.weight_scale")
    if decodes and not at.loses(module) and scale is not None and weight.name.endswith(".weight") and _fits(scale, weight):
        yield warning(
            "layout.omni-dequantized", weight.name, "the source's dtype: vLLM-Omni builds this one unquantized", weight.dtype,
            "it decodes the codes while it loads, with the scale rounded to BF16: smaller on disk, not in memory, and lossy",
            "keep it unquantized when you convert",
        )  # fmt: skip
        return
    raises = decodes and not at.loses(module)
    yield error(
        "layout.omni-ignored", weight.name, "the source's dtype: vLLM-Omni builds this one unquantized",
        f"{weight.dtype}{'' if scale else ' without weight_scale'}",
        "vLLM-Omni raises: it can't decode it without a scale that fits" if raises else
        "vLLM-Omni casts the codes to values without their scale, silently: the images are noise",
        f"store it unquantized, or take it off {at.section.key} if the server can build it quantized",
    )  # fmt: skip
    if not at.adapted:
        yield from (_stray(spec, "this linear is not quantized", at) for spec in scales)


def _fits(scale: TensorSpec, weight: TensorSpec) -> bool:
    """_reshape_weight_scale."""
    n, *rest = weight.shape or (1,)
    blocks = len(scale.shape) == 4 and len(weight.shape) == 2 and scale.shape[1] == scale.shape[3] == 1
    if blocks and n % scale.shape[0] == 0 and rest[0] % scale.shape[2] == 0:
        return True
    return scale.numel == 1 or (len(weight.shape) == 2 and scale.shape == (n,)) or scale.shape == weight.shape


def _stray(spec: TensorSpec, why: str, at: Built) -> Finding:
    raises = at.facts.refuses and not at.adapted
    say = error if raises else warning
    effect = "vLLM-Omni raises at such a key" if raises else "vLLM-Omni drops it"
    return say("layout.omni-stray-scale", spec.name, f"no scale: {why}", "stored", effect, "remove it, or quantize the linear")


def _shard_width(linear: Linear, at: Built) -> Iterator[Finding]:
    weights = [spec for names in at.units(linear) if (spec := at.find(names, "weight")) is not None and len(spec.shape) == 2]
    if len({spec.shape[1] for spec in weights}) > 1:
        yield error(
            "layout.omni-shard-width", linear.prefix, "shards with one number of columns",
            str(sorted({spec.shape[1] for spec in weights})), "vLLM-Omni raises: they read one input", "export again",
        )  # fmt: skip
