"""Names, dtypes and shapes: is every tensor there that the server will look for, in the form in which it will read it?

The rule behind all others: what vLLM will build quantized is stored quantized, and nothing else is. vLLM 0.32.0 checks no
quantized checkpoint for completeness (model_executor/model_loader/default_loader.py load_weights), so most of these load silently.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator

from ckptq.checkpoint import FLOATS, TensorSpec
from ckptq.validators import Code, Finding, error, linears
from ckptq.validators.expected import Expected, absent_layers, idle_entries
from ckptq.validators.formats import SCALE_KINDS, WEIGHT_KINDS, Format
from ckptq.validators.linears import stray
from ckptq.validators.methods import MIXED, as_json
from ckptq.validators.parallel import split_of
from ckptq.validators.vllm_rules import Parameter, ServerLinear

_QUANT = "vLLM 0.32.0 model_executor/layers/quantization"
_LOADER = "vLLM 0.32.0 model_executor/model_loader/default_loader.py load_weights"
CODES = {
    "layout.not-excluded": Code(
        "built quantized, stored in the source's dtype", f"{_QUANT}/modelopt.py, fp8.py, compressed_tensors.py get_quant_method"
    ),
    "layout.excluded": Code(
        "excluded, yet stored as codes", f"{_QUANT}/modelopt.py, fp8.py, compressed_tensors.py get_quant_method"
    ),
    "layout.split-exclude": Code(
        "the exclude list names some shards of a fused linear",
        f"{_QUANT}/utils/quant_utils.py is_layer_skipped, compressed_tensors/utils.py should_ignore_layer",
    ),
    "layout.no-scheme": Code(
        "settings for which the server has no method, for a linear or for routed experts",
        f"{_QUANT}/quark/quark.py, compressed_tensors/compressed_tensors_moe get_moe_method",
    ),
    "layout.missing-layer": Code("nothing of a layer is stored that config.json counts", _LOADER),
    "layout.missing-tensor": Code("a tensor that the server reads is not stored", _LOADER),
    "layout.weight-dtype": Code("a weight in a dtype that the server would misread", "vLLM 0.32.0 model_executor/parameter.py"),
    "layout.shape": Code(
        "a shape that config.json contradicts", "vLLM 0.32.0 model_executor/parameter.py load_column_parallel_weight"
    ),
    "layout.shard-width": Code("shards of one fused linear with different inputs", "vLLM 0.32.0 model_executor/layers/linear.py"),
}

_NUMBERS = {"F8_E4M3": "FP8", "I8": "INT8", "U8": "bytes"}
_SHOWN = 5


def check(at: Expected) -> Iterator[Finding]:
    """All findings on linears and parameters, one for each place; `ckptq.validators.grouping` joins them."""
    idle = functools.cache(functools.partial(_idle, at))
    absent = absent_layers(at)

    def stored(name: str) -> bool:
        layer = at.scope.layer_of(name)
        return layer is None or layer[0] not in absent

    if absent:
        inside = [(place[0], name) for name in at.parameters if (place := at.scope.layer_of(name)) is not None]
        first = dict(reversed(inside))
        yield from (_missing_layer(layer, first[layer]) for layer in sorted(absent))
    for linear in dict.fromkeys(at.linears.values()):
        if stored(f"{linear.shards[0]}.weight"):
            yield from _linear(linear, at, idle)
    for parameter in at.parameters.values():
        if stored(parameter.name):
            yield from _parameter(parameter, at)


def _missing_layer(layer: int, name: str) -> Finding:
    """`name`: the first of its parameters."""
    return error(
        "layout.missing-layer", name[: name.index(f".{layer}.")] + f".{layer}", "every layer that num_hidden_layers counts",
        "nothing of it is stored", "vLLM would leave the layer's memory as it found it, silently",
        "store the layer, or mend num_hidden_layers in config.json",
    )  # fmt: skip


def _idle(at: Expected) -> str:
    """What to say of entries of the exclude list that reach nothing; those for embeddings never do."""
    entries = [entry for entry in idle_entries(at) if "embed" not in entry]
    more = f" and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
    return f"; its entries {', '.join(map(as_json, entries[:_SHOWN]))}{more} reach no linear" if entries else ""


def _linear(linear: ServerLinear, at: Expected, idle: Callable[[], str]) -> Iterator[Finding]:
    built = at.built[linear.prefix]
    codes = [spec for module in linear.shards for spec in _codes(module, at)]
    scales = [name for m in linear.shards for kind in SCALE_KINDS if (name := f"{m}.{kind}") in at.tensors]
    if isinstance(built, Format):
        if _unconverted(linear.shards[0], at) or (linear.part == "head" and not codes and not scales):
            yield from (_not_excluded(module, linear, built, at, idle()) for module in linear.shards)
            return
        for module in linear.shards:
            yield from linears.check(module, linear, built, at)
        yield from _shard_width(linear, at)
    elif built == "refused":
        yield _refused(linear, at)
    else:
        yield from (_excluded(spec, at) for spec in codes)
        if not codes:
            yield from (stray(name, "this module is not quantized") for name in scales)


def _codes(module: str, at: Expected) -> Iterator[TensorSpec]:
    """What is stored of a linear's weight and is no weight as the source has it."""
    specs = (at.tensors.get(f"{module}.{kind}") for kind in WEIGHT_KINDS)
    yield from (spec for spec in specs if spec is not None and spec.dtype not in FLOATS)


def _excluded(spec: TensorSpec, at: Expected) -> Finding:
    reads = spec.name.endswith(".weight")
    return error(
        "layout.excluded", spec.name, "the source's dtype: the configuration keeps this module as it was", spec.dtype,
        "vLLM would read the codes as if they were weights" if reads else "vLLM raises: it has no parameter of that name",
        f"{_include(at)}, or store the weight unquantized",
    )  # fmt: skip


def _refused(linear: ServerLinear, at: Expected) -> Finding:
    if len(linear.shards) == 1 or linear.part == "experts":
        return error(
            "layout.no-scheme", linear.prefix, "settings that vLLM has a method for, the same for all that it builds as one",
            f"others, in {at.settings.file}", "vLLM raises when it builds this linear",
            "quantize it in a way that vLLM serves, or exclude it",
        )  # fmt: skip
    return error(
        "layout.split-exclude", linear.prefix,
        f"all shards of a fused linear in {at.settings.key}, or none, and the same settings for them",
        "some of " + ", ".join(m.rpartition(".")[2] for m in linear.shards),
        "vLLM raises: the shards of one linear would be built in different ways", "list every shard, or none",
    )  # fmt: skip


def _unconverted(module: str, at: Expected) -> bool:
    """Whether a linear that is built quantized is stored as the source had it, which layout.not-excluded says."""
    if at.format_of(module) is None:
        return False
    shards = at.linears[module].shards
    weights = [spec for m in shards if (spec := at.tensors.get(f"{m}.weight")) is not None]
    stored = any(True for m in shards for _ in _codes(m, at)) or any(
        f"{m}.{kind}" in at.tensors for m in shards for kind in SCALE_KINDS
    )
    return bool(weights) and not stored


def otherwise_stored(module: str, at: Expected) -> bool:
    """Whether the linear is quantized here and not there, so that its weight's name and shape are no further fault."""
    if module not in at.linears:
        return False
    return _unconverted(module, at) if at.format_of(module) else any(True for _ in _codes(module, at))


def _include(at: Expected) -> str:
    """How a module is quantized by the configuration."""
    key = at.settings.key
    if at.settings.format == MIXED:
        return f"name the module in quantized_layers with its quant_algo, and not in {key}"
    return f"take the module off {key}, mind that a pattern may also match inside longer names (layers.1 in layers.10)"


def _not_excluded(module: str, linear: ServerLinear, form: Format, at: Expected, idle: str) -> Finding:
    spec = at.tensors.get(f"{module}.weight")
    part = "only answers to images change" if linear.part == "tower" else "the answers are garbage"
    how = {
        "modelopt": "What works ends in `*` (`visual*`), names every shard, or is part of the server's name; `re:` and globs on "
        "shards of a fused linear do nothing",
        "fp8": "Only exact names work, one for each linear and each shard of a fused one: no glob, no parent",
        "compressed-tensors": "Names count whole; `re:.*visual.*` reaches a module and all inside it, by the server's name",
        "quark": "Names count whole, globs do nothing; `re:.*visual.*` reaches a module and all inside it, by the server's name",
    }[at.settings.method]
    key, both = at.settings.key, at.settings.method == "modelopt" and at.settings.file.startswith("config.json")
    lists = f"{key} in config.json and exclude_modules in hf_quant_config.json" if both else key
    mend = f"add it to {lists}. {how}"
    if not linear.prefix:
        mend = "vLLM builds it without a name, so no entry reaches it: write quant_algo MIXED_PRECISION with quantized_layers"
    if at.settings.format == MIXED:
        mend = "take it off quantized_layers in both files; of a fused linear one shard on the list is enough to quantize all of it"
    if form.weight != "weight" or form.packed > 1:
        effect = f"vLLM raises: it wants {form.weight} in {form.codes} with {form.packed} codes an element, and scales"
    else:
        effect = f"vLLM would cast it to {_NUMBERS[form.codes]} without a scale, silently, and {part}"
    return error(
        "layout.not-excluded",
        f"{module}.weight",
        f"a module that is kept as it was is listed in {at.settings.key}; this one is not",
        f"{spec.dtype}, without scales{idle}" if spec else f"not stored (tied to the embeddings), without scales{idle}",
        effect,
        mend,
    )


def _shard_width(linear: ServerLinear, at: Expected) -> Iterator[Finding]:
    """Only where config.json does not tell the width; else layout.shape has said it."""
    specs = [spec for module in linear.shards if (spec := at.codes_of(module)) is not None]
    known = all((p := at.parameters.get(s.name)) is not None and None not in p.shape for s in specs)
    widths = {spec.shape[1] for spec in specs if len(spec.shape) == 2}
    if not known and len(widths) > 1:
        yield error(
            "layout.shard-width", linear.prefix, "shards with one number of columns", f"{sorted(widths)}",
            "vLLM raises: they read one input, so their weights [out, in] must agree in `in`", "export again",
        )  # fmt: skip


def _parameter(parameter: Parameter, at: Expected) -> Iterator[Finding]:
    spec = at.tensors.get(parameter.name)
    module, _, kind = parameter.name.rpartition(".")
    said = kind in WEIGHT_KINDS and otherwise_stored(module, at)
    if spec is None:
        if parameter.required and not said:
            form = at.format_of(module)
            codes = form is not None and kind == form.weight
            yield error(
                "layout.missing-tensor", parameter.name,
                f"{form.codes if form and codes else 'a tensor'} {_shape(parameter.shape)}",
                "not stored", "vLLM would leave the memory as it found it, silently",
                "export again: the codes belong to the scales" if codes else "take the tensor over from the source",
            )  # fmt: skip
        return
    fits = len(spec.shape) == len(parameter.shape) and all(
        want in (None, have) for want, have in zip(parameter.shape, spec.shape, strict=True)
    )
    if not fits and not said:
        yield error(
            "layout.shape", parameter.name, f"{_shape(parameter.shape)}, from config.json", str(list(spec.shape)),
            _shape_effect(parameter, spec, at), "export again, or mend the sizes in config.json",
        )  # fmt: skip
    if spec.dtype not in FLOATS and (why := _why_unquantized(parameter.name, at)):
        yield error(
            "layout.weight-dtype", parameter.name, f"the source's dtype: {why}", spec.dtype,
            "vLLM would convert the codes as if they were values, silently", "take the tensor over from the source unchanged",
        )  # fmt: skip


def _shape_effect(parameter: Parameter, spec: TensorSpec, at: Expected) -> str:
    """Loaders narrow what they read along the dimension that tensor parallelism cuts, and compare the rest."""
    linear = at.linears.get(parameter.name.rpartition(".")[0])
    if linear is not None and linear.part == "experts":
        return "vLLM raises, or loads a part of it, silently"
    cut = {"heads": 0, "rows": 0, "columns": 1}.get(split_of(at.scope)(linear)) if linear is not None else None
    sizes = list(itertools.zip_longest(parameter.shape, spec.shape))
    differ = [i for i, (want, have) in enumerate(sizes) if want not in (None, have)]
    if differ == [cut] and len(sizes) == len(spec.shape) and spec.shape[differ[0]] > (parameter.shape[differ[0]] or 0):
        return "vLLM cuts off what is too much, silently"
    return "vLLM raises"


def _why_unquantized(name: str, at: Expected) -> str:
    """Why this tensor should have the source's dtype; "" where it need not, or where layout.excluded says it."""
    module, _, kind = name.rpartition(".")
    if module not in at.linears:
        return "this is no linear"
    return "a bias is never quantized" if kind == "bias" else ""


def _shape(shape: Iterable[int | None]) -> str:
    return "[" + ", ".join("?" if n is None else str(n) for n in shape) + "]"
