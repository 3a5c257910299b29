"""What a server does to what flows: inputs of quantized linears in codes, K and V in FP8. By hooks on a transformers model.

Weights are decoded beforehand (decoded.py), so a linear here is its input, rounded to codes, times its weight, rounded to codes, in
BF16. A server multiplies codes and scales the sums in float32: beside the rounding to 8 bits and less the difference is small.
Where shards of a fused linear, or routed experts of a layer, have different input scales, the largest counts, as vLLM 0.32.0 has
it; weights that it rounds a second time at load, since their shards' scales differ, are decoded so (again.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from ckptq.checkpoint import Component, Reader
from ckptq.compare.attended import Attention, replaced
from ckptq.compare.casts import through_fp8
from ckptq.compare.decoded import is_coded
from ckptq.errors import DataError, UnsupportedError
from ckptq.numerics import Desk, find_numerics
from ckptq.observe_experts import watching
from ckptq.plan import module_of
from ckptq.schemes import SCHEMES, Scheme
from ckptq.streamed import StreamedModel
from ckptq.validators.expected import Expected
from ckptq.validators.formats import Format
from ckptq.validators.scales import read_scales

Cast = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def serving(streamed: StreamedModel, stored: Component, at: Expected, reader: Reader, kv: tuple[str, str]) -> Iterator[None]:
    """While in this context, the model computes as a server does with the checkpoint `stored`, of which `reader` reads scales.

    at  what the server builds    kv  names of the modules whose outputs become K and V, relative to the layer

    Raises DataError for a scale that is missing or no number and for weights stored otherwise than the server builds them,
    UnsupportedError where an attention can't be reached.
    """
    _refuse_unlike(stored, at)
    with ExitStack() as hooks:
        experts: dict[Any, dict[str, list[str]]] = {}
        last: list[Any] = [None, None, None]
        for linear in dict.fromkeys(at.linears.values()):
            form, there = at.format_of(linear.shards[0]), [m for m in linear.shards if f"{m}.weight" in streamed.names]
            if form is None or not there:
                continue
            if (parameter := streamed.parameter(there[0])) != "weight":
                experts.setdefault(streamed.module(there[0]), {}).setdefault(parameter, []).extend(there)
            elif cast := _cast(form, _input_scale(form, linear.shards, stored, reader)):
                shared = last if len(there) > 1 else None
                for module in there:
                    hook = streamed.module(module).register_forward_pre_hook(partial(_cast_input, cast, shared))
                    hooks.callback(hook.remove)
        for owner, parameters in experts.items():
            places: dict[str, tuple[str, Cast]] = {}
            for parameter, modules in parameters.items():
                form = at.format_of(modules[0])
                if form and (cast := _cast(form, _input_scale(form, modules, stored, reader, experts=True))):
                    places[parameter] = modules[0], cast
            if places:
                hooks.enter_context(_experts(owner, places))
        if at.settings.kv_fp8:
            hooks.enter_context(_kv(streamed, stored, reader, kv, at))
        yield


def head_cast(stored: Component, at: Expected, reader: Reader) -> Cast | None:
    """What the server makes of what enters the output head; None where that takes it as it is. Raises DataError as `serving`."""
    for linear in at.linears.values():
        module, form = linear.shards[0], at.format_of(linear.shards[0])
        if form and at.scope.canonical(f"{module}.weight") == f"{at.scope.head}.weight" and f"{module}.weight" in stored.tensors:
            return _cast(form, _input_scale(form, linear.shards, stored, reader))
    return None


def _refuse_unlike(stored: Component, at: Expected) -> None:
    """A server casts BF16 to codes without a scale, or codes to BF16, or raises: compare has no figures for that."""
    for module in at.linears:
        codes = stored.tensors.get(f"{module}.weight", stored.tensors.get(f"{module}.weight_packed"))
        built = at.format_of(module) is not None
        if codes is not None and is_coded(codes, stored) is not built:
            how = ("in codes", "not quantized")
            raise DataError(f"{codes.spec.name}: stored {how[built]}, and the server builds it {how[not built]}", hint=_HINT)


def _input_scale(form: Format, shards: Sequence[str], stored: Component, reader: Reader, *, experts: bool = False) -> float | None:
    """The scale by which inputs are multiplied back, of fused shards the largest; None where the server takes none.

    experts  `shards` are those of all routed experts of a layer: they share what the server makes of it. vLLM 0.32.0
             quantization/utils/fp8_utils.py process_fp8_input_tensor_strategy_moe; of NVFP4 some kernels let each have its own
    """
    kinds = [scales.kind for scales in form.scales if scales.of_input and scales.kind not in form.dropped]
    if not kinds:
        return None
    found = [stored.tensors.get(f"{module}.{kinds[0]}") for module in shards]
    if missing := [module for module, tensor in zip(shards, found, strict=True) if tensor is None]:
        raise DataError(f"{missing[0]}.{kinds[0]}: not stored: what the server would compute can't be told", hint=_HINT)
    values = [float(scale[0]) for tensor in found if tensor and (scale := read_scales(reader, tensor)) is not None]
    if len(values) != len(shards) or not all(0 < value < float("inf") for value in values):
        raise DataError(f"{shards[0]}.{kinds[0]}: expected a positive number", hint=_HINT)
    if kinds[0] != "input_global_scale":
        return max(values)
    # Divisors: compressed_tensors_w4a4_nvfp4.py takes the largest of shards, its MoE method the largest reciprocal.
    return 1 / (min(values) if experts else max(values))


_HINT = "`ckptq validate` says all that is wrong with it"


def _cast(form: Format, scale: float | None) -> Cast | None:
    """What becomes of an input [..., k]; None where it stays as it is."""
    if form.codes == "I8":
        return partial(_int8, scale=scale)
    group = form.block[1] if form.block and form.granularity == "group" else None
    if form.packed == 2 and group == 16:
        return None if scale is None else partial(_nvfp4, whole=scale)
    if group == 32:
        return partial(_through, SCHEMES["mxfp8" if form.packed == 1 else "mxfp4"])
    if form.granularity == "block":
        return _by_groups
    return partial(through_fp8, scale=scale)


def _through(scheme: Scheme, values: torch.Tensor) -> torch.Tensor:
    """Values [..., k] to codes of a scheme with local scales and back, each row as a row of a weight."""
    assert scheme.scale is not None
    rows = values.reshape(-1, values.shape[-1]).contiguous()
    desk, numerics = Desk(values.device), find_numerics(scheme)
    codes = torch.empty((len(rows), rows.shape[1] // scheme.packed), dtype=_DTYPES[scheme.codes], device=rows.device)
    scales = torch.empty(scheme.scale_shape((len(rows), rows.shape[1])), dtype=_DTYPES[scheme.scale], device=rows.device)
    numerics.encode(rows, scheme, None, codes, scales, desk)
    return numerics.decode(codes, scheme, None, scales).to(values.dtype).view(values.shape)


def _by_groups(values: torch.Tensor) -> torch.Tensor:
    """FP8 under a scale for each 128 columns of a token, the last of which may be fewer."""
    columns = values.shape[-1]
    padded = torch.nn.functional.pad(values, (0, -columns % 128))
    return through_fp8(padded.reshape(-1, 128), None).view(padded.shape)[..., :columns]


_DTYPES: Mapping[str, torch.dtype] = {
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F32": torch.float32,
}


def _int8(values: torch.Tensor, scale: float | None) -> torch.Tensor:
    """vLLM 0.32.0 csrc/quantization/w8a8/int8: amax / 127 of a token, or the stored scale; to nearest even."""
    wide = values.float()
    steps = wide.abs().amax(-1, keepdim=True) / 127 if scale is None else torch.full((), scale, device=values.device)
    steps = torch.where(steps == 0, torch.ones_like(steps), steps)
    return (wide / steps).round().clamp(-128, 127).mul(steps).to(values.dtype)


def _nvfp4(values: torch.Tensor, whole: float) -> torch.Tensor:
    """Groups of 16 under the E4M3 number nearest to amax / 6, over the stored scale of all."""
    groups = values.float().view(-1, 16)
    local = (groups.abs().amax(1, keepdim=True) / (6 * whole)).clamp(max=448).to(torch.float8_e4m3fn).float() * whole
    steps = torch.where(local == 0, torch.ones_like(local), local)
    near = (groups / steps).clamp(-6, 6)
    size = near.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return ((near / step).round() * step * local).to(values.dtype).view(values.shape)


def _cast_input(cast: Cast, last: list[Any] | None, module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """`last` is the input that was cast last, by what, and what became of it: shards of a fused linear read the same one."""
    if last is None:
        return (cast(args[0]), *args[1:])
    if last[0] is not args[0] or last[1] is not cast:
        last[:] = args[0], cast, cast(args[0])
    return (last[2], *args[1:])


@contextmanager
def _experts(owner: Any, places: Mapping[str, tuple[str, Cast]]) -> Iterator[None]:
    def changed(parameter: str, values: torch.Tensor) -> torch.Tensor:
        return places[parameter][1](values)

    names = {parameter: module for parameter, (module, _) in places.items()}
    with watching(owner, names, changed, lambda tokens: None, all_experts=False):
        yield


def cached(scale: float) -> Cast:
    """What an FP8 cache makes of K or V: the nearest codes, as GPUs have it. vLLM 0.32.0's CPU kernel rounds toward zero."""
    return partial(through_fp8, scale=scale)


@contextmanager
def _kv(streamed: StreamedModel, stored: Component, reader: Reader, kv: tuple[str, str], at: Expected) -> Iterator[None]:
    """K and V in FP8, as the cache holds them, where the attention function gets them."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    casts: dict[tuple[Any, str], Cast] = {}
    for name in streamed.names:
        place = at.scope.layer_of(name)
        for kind, module in zip(("k", "v"), kv, strict=True):
            if place is not None and module and place[1] == f"{module}.weight":
                scale = _cache_scale(module_of(name), kind, stored, reader)
                casts[streamed.around(module_of(name)), kind] = cached(scale)
    names = {module.config._attn_implementation for module, _ in casts}
    if missing := sorted(name for name in names if name not in ALL_ATTENTION_FUNCTIONS):
        raise UnsupportedError(f"K and V can't be reached under the attention implementation {missing[0]!r}")

    def through_cache(function: Attention) -> Attention:
        def attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if (module, "k") in casts:
                key, value = casts[module, "k"](key), casts[module, "v"](value)
            return function(module, query, key, value, *args, **kwargs)

        return attention

    with replaced(names, through_cache):
        yield


def _cache_scale(module: str, kind: str, stored: Component, reader: Reader) -> float:
    """k_scale or v_scale, beside the projection (ModelOpt) or beside the attention (compressed-tensors); 1 where there is none."""
    for name in (f"{module}.{kind}_scale", f"{module_of(module)}.{kind}_scale"):
        if (tensor := stored.tensors.get(name)) and (found := read_scales(reader, tensor)) is not None:
            return float(found[0])
    return 1.0
