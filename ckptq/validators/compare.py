"""Scales against one another: shards of a fused linear, experts of a layer, one linear over all layers, and what norms allow."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from statistics import median

from ckptq.checkpoint import Component
from ckptq.scopes import Scope
from ckptq.validators import Code, Finding, compare_experts, error, warning
from ckptq.validators.amaxes import meaning_of
from ckptq.validators.coding import FP8, number_of
from ckptq.validators.compare_experts import braced
from ckptq.validators.scales import scale_kind
from ckptq.validators.vllm_rules import ServerLinear, server_linears

_LAYERS_OF = "vLLM 0.32.0 model_executor/layers/quantization"
CODES = {
    "values.weight-scale-split": Code(
        "shards of one fused linear with different scales of their whole weights",
        f"{_LAYERS_OF}/utils/w8a8_utils.py requantize_with_max_scale; modelopt.py KNvfp4Static, ModelOptNvFp4FusedMoE; "
        "compressed_tensors/schemes/compressed_tensors_w4a4_nvfp4.py",
    ),
    "values.scale-outlier": Code("a scale far from those of its like, or beyond what the norm before it lets through"),
}

EQUAL = 1.004
"""Scales that are this near to one another, as BF16 leaves them, change no code by more than its rounding does."""
# An amax where amax / 448 belongs is 448 times too large. Shards of one linear, and one linear over the layers, have amaxes within
# a factor of ten or so in trained models, outliers included; smaller ones are not compared: layers that learned little are real.
SHARDS_APART = 50.0
LAYERS_APART = 100.0
_LAYERS = 3
"""Fewer have no median worth the name."""
USUAL = (0.002, 8.0)
"""Of the median amax of weights. Half of all linears with weights above 8, or none above 0.002 in them: no training leads there."""
_MARGIN = 1.1
"""Norms, products and RoPE are computed in BF16."""
_YARN = 1.5
"""The same, and its factor on K, which is 0.1 ln(how much longer) + 1."""
FROM_V = 100.0
"""V's scale over that of o_proj's input, which is made of averages of V, and at the first token of a sample is V itself."""
_UNSET = 1.0
"""What exporters write for a scale that nothing was calibrated for, and vLLM takes where none is stored."""
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)", re.ASCII)
_READS_NORM = re.compile(
    r"(?P<layer>.*\.layers\.\d+)\.(?:(?P<attention>self_attn\.(?:[qkv]|qkv)_proj)|mlp\.(?:experts\.\d+\.)?(?:gate|up|gate_up)_proj"
    r"|block_sparse_moe\.experts\.\d+\.w[13])"
)
_WRONG = "an amax, or one divided by a scale, may stand where the scale belongs"
_COMPARE = "compare with --source, or calibrate and export again"


@dataclass(frozen=True, slots=True)
class Values:
    """What the pass over the values brought.

    scales  {name: its largest value} of scales with which nothing is wrong by themselves
    amaxes  {name: the amax that this means}
    tops    {name: the largest magnitude} of unquantized tensors
    codes   {name: the largest code's value} of quantized weights
    added   what the server adds to the weights of norms
    """

    scales: Mapping[str, float]
    amaxes: Mapping[str, float]
    tops: Mapping[str, float]
    codes: Mapping[str, float]
    component: Component
    added: float = 0.0

    def one(self, name: str) -> float | None:
        """A scale's value, where it has one."""
        tensor = self.component.tensors.get(name)
        return self.scales.get(name) if tensor is not None and tensor.spec.numel == 1 else None


def check(found: Values, scope: Scope) -> Iterator[Finding]:
    """Findings on scales beside one another, one for each scale."""
    found = replace(found, added=scope.norm_offset)
    linears = server_linears(scope, found.component.config, found.component.tensors)
    mend = "harmless but lossy: requantize from the source with one scale for q, k and v, and one for gate and up"
    if scope.experts is None:
        mend += ", as `ckptq convert` does"
    said: set[str] = set()
    usual = tuple(_usual(found))
    for finding in _beyond(found, by_weights=not usual):
        if finding.subject not in said:
            said.add(finding.subject)
            yield finding
    for linear in linears:
        yield from _shards(linear, found, mend, said)
    for finding in (*_layers(found), *usual):
        if finding.subject not in said:
            yield finding
    yield from compare_experts.check(linears, found)


def check_linears(found: Values, linears: Sequence[ServerLinear]) -> Iterator[Finding]:
    """The same of a model that is no language model, of which no more is known than its linears."""
    said: set[str] = set()
    mend = "harmless but lossy: requantize from the source with one scale for the fused linear, as `ckptq convert` does"
    for linear in linears:
        yield from _shards(linear, found, mend, said)
    yield from (finding for finding in (*_layers(found), *_usual(found)) if finding.subject not in said)


def _outlier(subject: str, expected: str, shown: str) -> Finding:
    return warning("values.scale-outlier", subject, expected, shown, _WRONG, _COMPARE)


def _shards(linear: ServerLinear, found: Values, mend: str, said: set[str]) -> Iterator[Finding]:
    for kind in ("weight_scale", "weight_scale_2", "weight_global_scale", "input_scale", "input_global_scale"):
        if linear.part == "experts" and kind.startswith("input"):
            continue
        known = {name: v for m in linear.shards if (v := found.one(name := f"{m}.{kind}")) is not None}
        if len(set(known.values())) < 2:
            continue
        low, high = min(known.values()), max(known.values())
        amaxes = {name: found.amaxes[name] for name in known}
        largest = max(amaxes, key=lambda name: amaxes[name])
        if kind == "weight_scale" and high > SHARDS_APART * low:
            if largest not in said:
                yield _outlier(
                    largest, f"at most {SHARDS_APART:g} times those of the linears that it is fused with",
                    f"{high:g}, {high / low:.0f} times {low:g}",
                )  # fmt: skip
            said.add(largest)
        else:
            yield _split(linear, kind, low, high, mend)


def _split(linear: ServerLinear, kind: str, low: float, high: float, mend: str) -> Finding:
    """Scales of which the server takes one for all shards. Only FP8 codes of weights are encoded again under it."""
    apart, divides = high / low, kind.endswith("global_scale")
    report, shown = warning, f"values from {low:g} to {high:g}"
    if kind == "weight_scale":
        effect, advice = "vLLM decodes the shards and encodes them again under the largest scale, rounding twice", mend
    elif kind.startswith("weight"):
        shown = f"{shown}, {apart:.4g} times as large"
        taken = "the first shard's" if linear.part == "experts" else f"the largest {'divisor' if divides else 'scale'}"
        off = "wrong" if linear.part == "experts" else "too small" if divides else "too large"
        effect = f"vLLM takes {taken} for all: the others' weights come out {off} by as much"
        advice = "give q, k and v one scale, and gate and up one, of their common amax: encode them again from the source"
        report = error if apart > EQUAL else warning
    else:
        effect = "the shards read one input, and vLLM takes the largest scale for all"
        if divides:
            effect = "the shards read one input, and vLLM takes the largest divisor for all, which cuts larger inputs off"
        advice = "calibrate them as one"
    return report(
        f"values.{'weight' if kind.startswith('weight') else 'input'}-scale-split", braced(linear.shards, kind),
        "one value for the fused linear", shown, effect, advice,
    )  # fmt: skip


def _layers(found: Values) -> Iterator[Finding]:
    """Weight scales far above the median of their like in other layers. Inputs may be that far apart: massive activations."""
    alike: dict[str, list[str]] = {}
    for name in found.scales:
        if scale_kind(name) in ("weight", "whole"):
            alike.setdefault(_NUMBER.sub("{i}", name), []).append(name)
    for names in alike.values():
        if len(names) < _LAYERS:
            continue
        usual = median(found.amaxes[name] for name in names)
        for name in names:
            if (amax := found.amaxes[name]) > LAYERS_APART * usual:
                value = found.scales[name]
                yield _outlier(
                    name, f"at most {LAYERS_APART:g} times the median over the layers",
                    f"{value:g}, {amax / usual:.0f} times {value * usual / amax:g}",
                )  # fmt: skip


def _usual(found: Values) -> Iterator[Finding]:
    weights = [name for name in found.scales if scale_kind(name) in ("weight", "whole")]
    if len(weights) < _LAYERS or USUAL[0] <= (usual := median(found.amaxes[name] for name in weights)) <= USUAL[1]:
        return
    at = min(weights, key=lambda name: abs(found.amaxes[name] - usual))
    meaning = meaning_of(found.component.tensors[at], found.component.tensors)
    if meaning is not None:
        low, high = sorted(meaning.value(amax) for amax in USUAL)
        yield _outlier(
            "all weight scales", f"a median between {low:.2g} and {high:.2g}, as {meaning.text} is",
            f"a median of {meaning.value(usual):g}",
        )  # fmt: skip


def _beyond(found: Values, *, by_weights: bool) -> Iterator[Finding]:
    """Scales larger than the model lets their tensors become, whatever it is fed. K's and V's where weights can be believed."""
    for name, value in found.scales.items():
        kind, module = scale_kind(name), name.rpartition(".")[0]
        meaning = meaning_of(found.component.tensors[name], found.component.tensors)
        if meaning is None:
            continue
        if kind == "input":
            limit = _input_limit(module, found)
            what = "what the norm before it lets through: sqrt(hidden) * its largest weight"
            what = f"{meaning.limit:g} / {what.replace(': ', ': (')})" if meaning.inverse else f"{what} / {meaning.limit:g}"
        elif by_weights and kind in ("k", "v") and name.endswith((".k_scale", ".v_scale")) and value != _UNSET:
            module = module if module.endswith("_proj") else f"{module}.{kind}_proj"
            limit = _cache_limit(module, kind == "k", found)
            what = "what the norm, the weight and the bias before it let through"
        else:
            continue
        if limit is not None and found.amaxes[name] > limit:
            least = f"{'at least' if meaning.inverse else 'at most'} {what}"
            yield _outlier(name, least, f"{value:g}, {'under' if meaning.inverse else 'over'} {meaning.value(limit):g}")
        elif (
            kind == "v" and (o := _input_amax(f"{module.removesuffix('v_proj')}o_proj", found)) and found.amaxes[name] > FROM_V * o
        ):
            apart = found.amaxes[name] / o
            yield _outlier(
                name, f"at most {FROM_V:g} times o_proj's input_scale", f"{value:g}, {apart:.0f} times {value / apart:g}"
            )


def _reach(module: str, found: Values) -> float | None:
    """The largest L2 norm of a row of the module's input, where an RMS norm made it: sqrt(n) * its largest weight.

    x / rms(x) has the norm sqrt(n). Holds for norms that multiply by their weight and add nothing, as all scopes' decoders have.
    Where four norms are in a layer, the one before the MLP is `pre_feedforward_layernorm`: models/gemma3.py.
    """
    match = _READS_NORM.fullmatch(module)
    if match is None:
        return None
    before = ("input",) if match["attention"] else ("pre_feedforward", "post_attention")
    names = (f"{match['layer']}.{name}_layernorm" for name in before)
    norm = next((name for name in names if f"{name}.weight" in found.tops), "")
    top = found.tops.get(f"{norm}.weight")
    if top is None or {f"{norm}.bias", f"{module}.pre_quant_scale"} & found.component.tensors.keys():
        return None
    return float((found.added + top) * sqrt(found.component.tensors[f"{norm}.weight"].spec.numel))


def _input_amax(module: str, found: Values) -> float | None:
    names = (f"{module}.{leaf}" for leaf in ("input_scale", "input_global_scale"))
    return next((found.amaxes[name] for name in names if found.one(name) is not None), None)


def _input_limit(module: str, found: Values) -> float | None:
    """The largest amax."""
    reach = _reach(module, found)
    return None if reach is None else _MARGIN * reach


def _cache_limit(module: str, turned: bool, found: Values) -> float | None:
    """The largest amax of K or V: |x| * |row of W| + |bias|, or what K's own norm lets through.

    RoPE turns pairs, so that one of two may become sqrt(2) times as large, and YaRN makes all larger.
    """
    attention = module.rpartition(".")[0]
    norm = f"{attention}.k_norm.weight"
    if turned and norm in found.component.tensors:
        top = found.tops.get(norm)
        return None if top is None else _YARN * (found.added + top) * sqrt(found.component.tensors[norm].spec.numel)
    reach, columns = _reach(module, found), _columns(module, found)
    largest = _largest_weight(module, found)
    bias = found.tops.get(f"{module}.bias", 0.0 if f"{module}.bias" not in found.component.tensors else None)
    if reach is None or not columns or largest is None or bias is None:
        return None
    return float((_YARN * sqrt(2) if turned else _MARGIN) * (reach * largest * sqrt(columns) + bias))


def _columns(module: str, found: Values) -> int:
    """Of the module's weight [n, k], in codes of any size; 0 where there is none."""
    tensors = found.component.tensors
    weight = tensors.get(f"{module}.weight", tensors.get(f"{module}.weight_packed"))
    if weight is None or not weight.spec.shape:
        return 0
    number = number_of(weight)
    return number.shape(weight.spec.shape)[-1] if number else weight.spec.shape[-1]


def _largest_weight(module: str, found: Values) -> float | None:
    if (top := found.tops.get(f"{module}.weight")) is not None:
        return top
    whole = [found.amaxes.get(f"{module}.{leaf}") for leaf in ("weight_scale_2", "weight_global_scale")]
    if any(whole):
        return whole[0] or whole[1]
    name = next((n for end in ("", "_inv") if (n := f"{module}.weight_scale{end}") in found.scales), None)
    tensor = found.component.tensors.get(f"{module}.weight", found.component.tensors.get(f"{module}.weight_packed"))
    number = number_of(tensor) if tensor else None
    if name is None or tensor is None or number is None:
        return None
    code = found.codes.get(tensor.spec.name) if number is FP8 else number.top
    return None if code is None else found.scales[name] * code
