"""Names, dtypes and shapes: is every tensor there that the server will look for, in the form in which it will read it?

The rule behind all others: what vLLM will build quantized is stored quantized, and nothing else is. vLLM 0.32.0 checks no
quantized checkpoint for completeness (model_executor/model_loader/default_loader.py load_weights), so most of these load silently.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ckptq.checkpoint import FLOATS, TensorSpec
from ckptq.scopes import Scope
from ckptq.validators import Code, Finding, Stored, error, warning
from ckptq.validators.configs import Settings
from ckptq.validators.vllm_rules import (
    KVSlot,
    Parameter,
    ServerLinear,
    Treatment,
    idle_patterns,
    kv_slot,
    packed_modules,
    parameters,
    server_linears,
    server_patterns,
    treatment,
)

CODES = {
    "layout.not-excluded": Code("built quantized, stored in the source's dtype"),
    "layout.excluded": Code("excluded, yet stored in FP8"),
    "layout.split-exclude": Code("the exclude list names some shards of a fused linear"),
    "layout.missing-tensor": Code("a tensor that the server reads is not stored"),
    "layout.unknown-tensor": Code("a stored tensor that the server has no place for"),
    "layout.missing-scale": Code("a quantized linear lacks weight_scale or input_scale"),
    "layout.stray-scale": Code("a scale where nothing is quantized"),
    "layout.scale-dtype": Code("a scale that is not F32"),
    "layout.scale-shape": Code("a scale that is neither [] nor [1]"),
    "layout.weight-dtype": Code("a weight in a dtype that the server would misread"),
    "layout.shape": Code("a shape that config.json contradicts"),
    "layout.shard-width": Code("shards of one fused linear with different inputs"),
    "layout.kv-missing": Code("some attention layers have KV scales, this one lacks one"),
    "layout.kv-absent": Code("an FP8 KV cache is declared, and no layer has a scale"),
    "layout.kv-undeclared": Code("KV scales are stored, and no FP8 KV cache is declared"),
    "layout.kv-misplaced": Code("a K scale beside v_proj, or a V scale beside k_proj"),
    "layout.kv-on-tower": Code("KV scales outside the language model"),
}

SCALES = ("weight_scale", "input_scale")
KV_SCALES = ("k_scale", "v_scale")


@dataclass(frozen=True, slots=True)
class Expected:
    """The server's side of the comparison, made once for a checkpoint."""

    scope: Scope
    settings: Settings
    tensors: Mapping[str, TensorSpec]
    parameters: Mapping[str, Parameter]
    linears: Mapping[str, ServerLinear]
    """By checkpoint module: each shard of a fused linear points at the whole."""
    built: Mapping[str, Treatment]
    """By server prefix."""

    def quantized(self, module: str) -> bool:
        linear = self.linears.get(module)
        return linear is not None and self.built[linear.prefix] == "quantized"


def expect(stored: Stored, scope: Scope, settings: Settings) -> Expected:
    """What vLLM will look for. Raises as `vllm_rules.parameters` does."""
    linears = server_linears(scope, stored.config, stored.tensors)
    patterns, packed = server_patterns(settings.exclude_modules, scope), packed_modules(scope)
    return Expected(
        scope,
        settings,
        stored.tensors,
        {p.name: p for p in parameters(scope, stored.config, stored.tensors)},
        {module: linear for linear in linears for module in linear.shards},
        {linear.prefix: treatment(linear.prefix, patterns, packed) for linear in linears},
    )


def check(stored: Stored, scope: Scope, settings: Settings) -> Iterator[Finding]:
    """All findings on names, dtypes and shapes, one for each place; `ckptq.validate.group` joins them."""
    at = expect(stored, scope, settings)
    for linear in dict.fromkeys(at.linears.values()):
        yield from _linear(linear, at)
    for parameter in at.parameters.values():
        yield from _parameter(parameter, at)
    yield from _unknown(at)
    yield from _kv(at)


def _linear(linear: ServerLinear, at: Expected) -> Iterator[Finding]:
    built = at.built[linear.prefix]
    if built == "refused":
        yield error(
            "layout.split-exclude", f"{linear.prefix}", "all shards of a fused linear in the exclude list, or none",
            "some of " + ", ".join(m.rpartition(".")[2] for m in linear.shards),
            "vLLM raises `Detected some but not all shards ... are quantized`", "list every shard, or none",
        )  # fmt: skip
        return
    narrow = {module: _is_fp8(at.tensors.get(f"{module}.weight")) for module in linear.shards}
    scales = [f"{m}.{s}" for m in linear.shards for s in SCALES if f"{m}.{s}" in at.tensors]
    if built == "kept":
        for module in (m for m in linear.shards if narrow[m]):
            yield error(
                "layout.excluded", f"{module}.weight", "the source's dtype: the exclude list keeps this module as it was",
                at.tensors[f"{module}.weight"].dtype,
                "vLLM would read the codes as if they were weights",
                "take the module off the exclude list, mind that a pattern also matches inside longer names (layers.1 in "
                "layers.10), or store the weight unquantized",
            )  # fmt: skip
        if not any(narrow.values()):
            yield from (_stray(name, "this module is excluded") for name in scales)
    elif not any(narrow.values()) and not scales and (linear.part == "head" or any(f"{m}.weight" in at.tensors for m in narrow)):
        yield from (_not_excluded(module, linear, at) for module in linear.shards)
    else:
        for module in linear.shards:
            yield from _quantized_shard(module, linear, at)
        yield from _shard_width(linear, at)


def _is_fp8(spec: TensorSpec | None) -> bool:
    return spec is not None and spec.dtype.startswith("F8")


def _not_excluded(module: str, linear: ServerLinear, at: Expected) -> Finding:
    spec = at.tensors.get(f"{module}.weight")
    part = "only answers to images change" if linear.part == "tower" else "the answers are garbage"
    idle = [p for p in idle_patterns(at.settings.exclude_modules, dict.fromkeys(at.linears.values()), at.scope) if "embed" not in p]
    reach = f"; its entries {', '.join(map(repr, idle))} reach no linear" if idle else ""
    return error(
        "layout.not-excluded", f"{module}.weight", "F8_E4M3 with scales: nothing on the exclude list keeps this module",
        f"{spec.dtype}, without scales{reach}" if spec else f"not stored (tied to the embeddings), without scales{reach}",
        f"vLLM would cast it to FP8 without a scale, silently, and {part}", "add it to the exclude list. What works ends in `*` "
        "(`visual*`), name every shard, or are part of the server's name; `re:` and globs on shards of a fused linear do nothing",
    )  # fmt: skip


def _quantized_shard(module: str, linear: ServerLinear, at: Expected) -> Iterator[Finding]:
    weight = at.tensors.get(f"{module}.weight")
    if weight is not None and weight.dtype != "F8_E4M3":
        if weight.dtype in FLOATS:
            actual, effect = weight.dtype, "cast to FP8 codes as if they had no scale"
        else:
            actual, effect = weight.dtype, "converted as numbers, not taken as E4M3 codes"
        yield error(
            "layout.weight-dtype", weight.name, "F8_E4M3: vLLM builds this linear quantized", actual,
            f"the values would be {effect}, silently", "quantize it and store F8_E4M3 codes, or exclude the whole fused linear",
        )  # fmt: skip
    for kind in SCALES:
        name = f"{module}.{kind}"
        spec = at.tensors.get(name)
        if spec is not None:
            yield from _scalar(spec)
            continue
        # A fused linear's parameter has one slot a shard, and for activations the largest counts: one shard's is enough to run.
        if kind == "input_scale" and any(f"{m}.{kind}" in at.tensors for m in linear.shards):
            yield warning("layout.missing-scale", name, "F32 []", "not stored", "vLLM takes another shard's", "store it for each")
        else:
            yield error(
                "layout.missing-scale", name, "F32 []", "not stored",
                "vLLM loads without it and computes with -3.4e38 instead", "export again, with calibration if it is an input_scale",
            )  # fmt: skip


def _scalar(spec: TensorSpec) -> Iterator[Finding]:
    if spec.shape not in ((), (1,)):
        yield error(
            "layout.scale-shape", spec.name, "[] or [1]: one scale for the tensor", str(list(spec.shape)),
            "vLLM raises a bare AssertionError", "store one value, or declare the algorithm whose scales these are",
        )  # fmt: skip
    if spec.dtype in ("BF16", "F16"):
        yield warning(
            "layout.scale-dtype", spec.name, "F32", spec.dtype,
            f"vLLM widens it, but it was rounded to {spec.dtype} before", "store it as F32",
        )  # fmt: skip
    elif spec.dtype != "F32":
        yield error(
            "layout.scale-dtype",
            spec.name,
            "F32",
            spec.dtype,
            "vLLM would convert the number and not see a fault",
            "store it as F32",
        )


def _shard_width(linear: ServerLinear, at: Expected) -> Iterator[Finding]:
    """Only where config.json does not tell the width; else layout.shape has said it."""
    specs = [at.tensors[f"{m}.weight"] for m in linear.shards if f"{m}.weight" in at.tensors]
    known = all((p := at.parameters.get(s.name)) is not None and None not in p.shape for s in specs)
    widths = {spec.shape[1] for spec in specs if len(spec.shape) == 2}
    if not known and len(widths) > 1:
        yield error(
            "layout.shard-width", linear.prefix, "shards with one number of columns", f"{sorted(widths)}",
            "they read one input, so their weights [out, in] must agree in `in`", "export again",
        )  # fmt: skip


def _parameter(parameter: Parameter, at: Expected) -> Iterator[Finding]:
    spec = at.tensors.get(parameter.name)
    if spec is None:
        if parameter.required:
            yield error(
                "layout.missing-tensor", parameter.name, f"a tensor {_shape(parameter.shape)}", "not stored",
                "vLLM would leave the memory as it found it, silently", "take the tensor over from the source",
            )  # fmt: skip
        return
    fits = len(spec.shape) == len(parameter.shape) and all(
        want in (None, have) for want, have in zip(parameter.shape, spec.shape, strict=True)
    )
    if not fits:
        yield error(
            "layout.shape", parameter.name, f"{_shape(parameter.shape)}, from config.json", str(list(spec.shape)),
            "vLLM raises, or cuts surplus rows off silently", "export again, or mend the sizes in config.json",
        )  # fmt: skip
    module = parameter.name.rpartition(".")[0]
    if module not in at.linears and spec.dtype not in FLOATS:
        yield error(
            "layout.weight-dtype", parameter.name, "the source's dtype: this is no linear", spec.dtype,
            "vLLM would read the codes as if they were values", "take the tensor over from the source unchanged",
        )  # fmt: skip
    elif module in at.linears and not at.quantized(module) and spec.dtype not in FLOATS and not _is_fp8(spec):
        yield error(
            "layout.weight-dtype", parameter.name, "the source's dtype: this linear is not quantized", spec.dtype,
            "vLLM would convert the numbers, silently", "take the tensor over from the source unchanged",
        )  # fmt: skip
    elif module in at.linears and parameter.name.endswith(".bias") and _is_fp8(spec):
        yield error(
            "layout.weight-dtype", parameter.name, "the source's dtype: a bias is never quantized", spec.dtype,
            "vLLM would read the codes as if they were values", "take the bias over from the source unchanged",
        )  # fmt: skip


def _shape(shape: Iterable[int | None]) -> str:
    return "[" + ", ".join("?" if n is None else str(n) for n in shape) + "]"


def _unknown(at: Expected) -> Iterator[Finding]:
    """Stored tensors that are no parameter and no scale of a quantized linear. KV scales of the layers are `_kv`'s."""
    on_towers = [n for n in at.tensors if n.endswith(KV_SCALES) and _tower(n, at.scope) is not None]
    yield from _kv_on_tower(on_towers, at.scope)
    for name in at.tensors:
        module, _, kind = name.rpartition(".")
        if name in at.parameters or name in on_towers or (kind in SCALES and module in at.linears) or _layer_slot(name, at.scope):
            continue
        if kind in SCALES or name.endswith(KV_SCALES):
            yield _stray(name, "no quantized linear or attention of the server has this name")
        elif kind == "bias":
            yield warning(
                "layout.unknown-tensor", name, "no such tensor", "stored",
                "vLLM has no place for this bias and drops it silently, so the linear computes something else", "check config.json",
            )  # fmt: skip
        elif not name.endswith("rotary_emb.inv_freq"):
            yield error(
                "layout.unknown-tensor", name, "no such tensor, by config.json and the server's names", "stored",
                "vLLM raises `There is no module or parameter named ...`", "rename it (ModelOpt's FP8 has weight, weight_scale, "
                "input_scale, k_scale, v_scale), remove it, or mend config.json",
            )  # fmt: skip


def _tower(name: str, scope: Scope) -> str | None:
    return next((t.prefix for t in scope.towers if scope.canonical(name).startswith(f"{t.prefix}.")), None)


def _layer_slot(name: str, scope: Scope) -> KVSlot | None:
    """The slot of a KV scale inside the decoder layers."""
    return kv_slot(name) if scope.layer_of(name) is not None else None


def _kv_on_tower(names: Sequence[str], scope: Scope) -> Iterator[Finding]:
    for name in names:
        tower = _tower(name, scope)
        first = scope.canonical(names[0]).removeprefix(f"{tower}.")
        yield error(
            "layout.kv-on-tower", name, f"no KV scale in {tower}: only the language model has a KV cache", "stored",
            f"vLLM raises at such a key; older ones say no more than `KeyError: '{first}'`. `{tower}*` on the exclude list is no "
            "help: it speaks of weights",
            "ModelOpt writes these scales where its KV settings come after the line that disables the tower: "
            "drop the tensors, or disable the tower last and export again",
        )  # fmt: skip


def _stray(name: str, why: str) -> Finding:
    return error(
        "layout.stray-scale", name, f"no scale: {why}", "stored",
        "vLLM raises at such a key, and some of its models drop it silently",
        "remove it, or quantize the module and take it off the exclude list",
    )  # fmt: skip


def _kv(at: Expected) -> Iterator[Finding]:
    slots = {name: slot for name in at.tensors if (slot := _layer_slot(name, at.scope)) is not None}
    have = {(slot.attention, slot.kind) for slot in slots.values()}
    owners = {m: m.rpartition(".")[0] for m in at.linears if (layer := at.scope.layer_of(f"{m}.")) and layer[1][:-1] in at.scope.kv}
    for name, slot in slots.items():
        yield from _scalar(at.tensors[name])
        if slot.attention not in owners.values():
            yield _stray(name, "config.json has no such layer")
        if slot.misplaced:
            yield error(
                "layout.kv-misplaced", name, f"{slot.kind}_scale beside {slot.kind}_proj", "beside the other projection",
                "vLLM goes by the last part of the name, so K and V would trade scales, silently", "export again",
            )  # fmt: skip
        if not at.settings.kv_fp8:
            yield error(
                "layout.kv-undeclared", name, f"none: {at.settings.file} declares no FP8 KV cache", "stored",
                "vLLM would keep the cache in the model's dtype and drop the scales silently", "declare kv_cache_scheme with "
                "dynamic false, num_bits 8, type float, or remove the scales",
            )  # fmt: skip
    if not at.settings.kv_fp8:
        return
    if not have:
        yield warning(
            "layout.kv-absent", "k_scale and v_scale", "one of each in every layer: an FP8 KV cache is declared", "none",
            "vLLM quantizes the cache with scale 1.0: good enough where keys and values are moderate", "calibrate the KV cache",
        )  # fmt: skip
        return
    for module, attention in owners.items():
        kind = "k" if module.endswith(at.scope.kv[0]) else "v"
        if (attention, kind) not in have:
            yield error(
                "layout.kv-missing", f"{module}.{kind}_scale", "F32 []: the KV cache is FP8, other layers have it", "not stored",
                ("vLLM stops with a bare AssertionError" if kind == "k" and (attention, "v") in have
                else "vLLM uses the other one's scale, or 1.0, silently"), "calibrate and export again",
            )  # fmt: skip
