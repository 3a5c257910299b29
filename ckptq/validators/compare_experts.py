"""Input scales of a layer's routed experts, of which the server takes one for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptq.validators import Code, Finding, error, warning
from ckptq.validators.vllm_rules import ServerLinear

if TYPE_CHECKING:
    from ckptq.validators.compare import Values

_QUANT = "vLLM 0.32.0 model_executor/layers/quantization"
_MAXIMA = f"{_QUANT}/utils/fp8_utils.py process_fp8_input_tensor_strategy_moe; utils/flashinfer_fp4_moe.py"
CODES = {
    "values.input-scale-split": Code("linears that read one input with different input scales", _MAXIMA),
    "values.input-scale-spread": Code("one expert's input scale far above the others', which all take it", _MAXIMA),
}

SPREAD = 100.0
"""An expert's input scale over the median one. E4M3 keeps 4 bits down to 1 / 28,672 of the scale's range, 1 bit to 1 / 229,376: as
codes in FP8, as scales of groups in NVFP4."""
_ROUNDED = 1.01


@dataclass(frozen=True, slots=True)
class _Input:
    """A stored scale for an input: its name, its value, and the amax that it means."""

    name: str
    value: float
    amax: float


@dataclass(frozen=True, slots=True)
class _Expert:
    """An expert's linears that read one input, their scales in the order of loading, and whether each of these is kept."""

    shards: tuple[str, ...]
    inputs: tuple[_Input, ...]
    kept: bool

    @property
    def top(self) -> _Input:
        return max(self.inputs, key=lambda scale: scale.amax)

    @property
    def taken(self) -> _Input:
        """In FP8 gate and up have one place, and the one loaded last stays (ModelOptFp8MoEMethod); in NVFP4 each has its own."""
        return self.top if self.kept else self.inputs[-1]


def check(linears: Sequence[ServerLinear], found: Values) -> Iterator[Finding]:
    """Findings on gate and up with different scales, and on an expert far from the others of its layer."""
    layers: dict[tuple[str, tuple[str, ...]], list[_Expert]] = {}
    for linear in linears:
        if linear.part == "experts" and (expert := _expert(linear.shards, found)) is not None:
            layers.setdefault((linear.prefix, tuple(m.rpartition(".")[2] for m in linear.shards)), []).append(expert)
    for experts in layers.values():
        served = max((e.taken for e in experts), key=lambda scale: scale.amax)
        yield from (f for e in experts for f in _split(e, served))
        usual = sorted((e.taken for e in experts), key=lambda scale: scale.amax)[len(experts) // 2]
        if max(e.top.amax for e in experts) > SPREAD * usual.amax:
            yield warning(
                "values.input-scale-spread", served.name, f"at most {SPREAD:g} times the median of its layer",
                f"{served.value:g}, {served.amax / usual.amax:.0f} times {usual.value:g}",
                "vLLM takes the largest for all experts of the layer, and the others' inputs lose their small values",
                "calibrate with more samples, or look for outliers",
            )  # fmt: skip


def _split(expert: _Expert, served: _Input) -> Iterator[Finding]:
    values = [scale.value for scale in expert.inputs]
    if len(set(values)) < 2:
        return
    cut = expert.top.amax > served.amax * _ROUNDED
    effect = f"vLLM keeps the one loaded last, {'and cuts larger inputs off' if cut else 'another expert covers the rest'}"
    yield (error if cut else warning)(
        "values.input-scale-split", braced(expert.shards, expert.top.name.rpartition(".")[2]), "one value for gate and up",
        f"{values[0]:g} and {values[-1]:g}" if expert.kept else f"{values[-1]:g} loaded after {values[0]:g}",
        "they read one input, and vLLM takes the largest of the layer for all" if expert.kept else effect,
        "give both the larger one",
    )  # fmt: skip


def _expert(shards: tuple[str, ...], found: Values) -> _Expert | None:
    """None where no scale of theirs is stored, or none with a sense. Loading goes by files and, in a file, by names."""
    names = [n for m in shards for leaf in ("input_scale", "input_global_scale") if (n := f"{m}.{leaf}") in found.scales]
    names.sort(key=lambda n: (found.component.tensors[n].file, n))
    inputs = tuple(_Input(n, value, found.amaxes[n]) for n in names if (value := found.one(n)) is not None and value > 0)
    fp4 = any(f"{shards[0]}.{leaf}" in found.component.tensors for leaf in ("weight_scale_2", "weight_global_scale"))
    return _Expert(shards, inputs, fp4) if inputs else None


def braced(shards: Sequence[str], kind: str) -> str:
    """The shards' scales of this kind in one name: `mlp.{gate_proj,up_proj}.input_scale`."""
    names = ",".join(m.rpartition(".")[2] for m in shards)
    return f"{shards[0].rpartition('.')[0]}.{{{names}}}.{kind}"
