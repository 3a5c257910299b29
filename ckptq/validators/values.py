"""The numbers: scales and codes of every quantized tensor, and what is not finite anywhere. Reads every byte once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptq.checkpoint import Component, Reader, SourceTensor
from ckptq.scopes import Scope
from ckptq.validators import Code, Finding, compare, error, filling, warning
from ckptq.validators.amaxes import Meaning, meaning_of
from ckptq.validators.coding import Coding, find_coding, number_of
from ckptq.validators.scales import (
    DTYPES,
    EXPONENTS,
    SCALE_DTYPES,
    Grid,
    Kind,
    as_float,
    block_of,
    read_in_parts,
    scale_kind,
    weight_of,
)  # fmt: skip
from ckptq.validators.scan import NUMBERS, Seen, scan
from ckptq.validators.vllm_rules import ServerLinear, parameters

CODES = {
    "values.not-finite": Code("a NaN or an infinity: a scale, a code, or an unquantized weight"),
    "values.not-positive": Code("a scale that is zero or negative"),
    "values.scale-range": Code("a scale that no sensible model leads to"),
    "values.bias-dropped": Code(
        "a bias other than zero that the server has no place for", "vLLM 0.32.0 models/utils.py AutoWeightsLoader._load_module"
    ),
}

# Of amaxes. Weights of language models stay below 128, K and V below 4,480; inputs of down_proj reach 1e5.
PLAUSIBLE: Mapping[Kind, tuple[float, float]] = {
    "weight": (448e-8, 128.0),
    "whole": (448e-8, 128.0),
    "input": (448e-7, 448e4),
    "k": (448e-6, 4480.0),
    "v": (448e-6, 4480.0),
}
IMPOSSIBLE = 448.0
"""Weights are never above this, let alone the largest one of each layer."""
_NOT_FINITE = {**{dtype: bits for dtype, (_, bits) in NUMBERS.items()}, **dict.fromkeys(EXPONENTS, 255)}
"""From which bits on a scale is no finite number."""
_LOOKED_AT = 64
"""Odd values of one scale tensor whose weights are read."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """What the pass brought: scales and codes by name, and the largest magnitude of what is neither."""

    scales: dict[str, tuple[SourceTensor, Seen]]
    codes: dict[str, tuple[SourceTensor, Seen]]
    tops: dict[str, float]

    def summary(self, component: Component, left_out: Collection[str]) -> compare.Values:
        """The same in numbers, without the scales that were reported, and without those that have no meaning by themselves."""
        values: dict[str, float] = {}
        amaxes: dict[str, float] = {}
        for name, (tensor, seen) in self.scales.items():
            value = as_float(seen.top, tensor.spec.dtype)
            meaning = meaning_of(tensor, component.tensors)
            if name not in left_out and value > 0 and meaning is not None:
                values[name], amaxes[name] = value, meaning.amax(value)
        codes = {n: filling.code_value(seen.top, number) for n, (t, seen) in self.codes.items() if (number := number_of(t))}
        return compare.Values(values, amaxes, self.tops, codes, component)


def check(
    root: Path,
    component: Component,
    scope: Scope | Sequence[ServerLinear],
    advance: Callable[[int], None] = lambda _: None,
    digests: dict[str, str] | None = None,
) -> Iterator[Finding]:
    """All findings on values. `advance` is told the bytes that were looked at; `digests`, where given, gets each tensor's.

    scope   of no language model: the linears that the server fuses
    """
    found, left_out = _Pass({}, {}, {}), set[str]()
    for tensor, seen in scan(root, component, advance, digests=digests is not None):
        name, dtype = tensor.spec.name, tensor.spec.dtype
        if digests is not None:
            digests[name] = seen.digest
        if not tensor.spec.numel:
            continue
        if scale_kind(name) and dtype in SCALE_DTYPES:
            found.scales[name] = tensor, seen
        elif number_of(tensor) and not scale_kind(name):
            found.codes[name] = tensor, seen
        elif dtype in NUMBERS and seen.top < NUMBERS[dtype][1]:
            if dtype in DTYPES:
                found.tops[name] = as_float(seen.top, dtype)
        elif dtype in NUMBERS:
            yield error(
                "values.not-finite", name, "finite values", "NaN or infinity",
                "every answer that passes here becomes NaN",
                "the source holds them too, or the copy went wrong: compare with --source",
            )  # fmt: skip
    block = block_of(component.config)
    yield from filling.check(found.codes, found.scales, component.tensors, block)
    with Reader(root, component) as reader:
        for tensor, seen in found.scales.values():
            odd, findings = _look(tensor, seen, component, reader, block)
            left_out |= {tensor.spec.name} if odd else set()
            yield from findings
    if isinstance(scope, Scope):
        yield from compare.check(found.summary(component, left_out), scope)
        yield from _dropped_biases(found.tops, component, scope)
    else:
        yield from compare.check_linears(found.summary(component, left_out), scope)


def _dropped_biases(tops: Mapping[str, float], component: Component, scope: Scope) -> Iterator[Finding]:
    """Biases that do something in the source's model and nothing in the server's. One of zeros is left to strays.py."""
    biases = [name for name, top in tops.items() if name.endswith(".bias") and top > 0 and not scope.skips(name)]
    known = {p.name for p in parameters(scope, component.config, component.tensors)} if biases else set()
    for name in biases:
        if name not in known:
            yield error(
                "values.bias-dropped", name, "zeros: by config.json this linear has no bias", f"up to {tops[name]:.3g}",
                "vLLM drops it silently, so the linear computes something else",
                "mend config.json (attention_bias, mlp_bias, architectures), or remove the bias if it does not belong there",
            )  # fmt: skip


def _look(
    tensor: SourceTensor, seen: Seen, component: Component, reader: Reader, block: tuple[int, int]
) -> tuple[bool, list[Finding]]:
    """(whether any of its values is beyond what is plausible, findings); over weights that are all zero a scale may be any."""
    name, dtype, kind = tensor.spec.name, tensor.spec.dtype, scale_kind(tensor.spec.name)
    if seen.top >= _NOT_FINITE[dtype]:
        what = str(as_float(seen.low, dtype)) if tensor.spec.numel == 1 and dtype not in EXPONENTS else "NaN or infinity"
        return True, [
            error(
                "values.not-finite", name, "a finite scale", what, "everything it touches becomes NaN", "calibrate and export again"
            )
        ]  # fmt: skip
    lowest = -as_float(seen.top, dtype) if seen.signed else as_float(seen.low, dtype)
    largest = as_float(seen.top, dtype)
    meaning = meaning_of(tensor, component.tensors)
    low, high = _plausible(meaning, dtype)
    if low <= lowest and largest <= high and lowest > 0:
        return False, []
    odd = _odd(tensor, low, high, component, reader, block) if kind in ("weight", "whole") else None
    if odd == ():
        found = warning(
            "values.not-positive", name, "a scale above zero", "zero, over weights that are all zero",
            "they stay zero; a server that divides by the scale would make them NaN", "store a scale of 1 there",
        )  # fmt: skip
        return True, [found] if lowest <= 0 else []
    values = odd or (lowest if lowest <= 0 or lowest < low else largest,)
    shown = f"{values[0]:g}" if tensor.spec.numel == 1 else f"{values[0]:g} among {tensor.spec.numel}"
    if lowest <= 0:
        found = error(
            "values.not-positive", name, "a scale above zero", shown,
            "vLLM takes a KV scale that is not positive for a missing one, silently" if kind in ("k", "v") else
            "vLLM divides or multiplies by it: NaN, zeros or the other sign", "calibrate and export again",
        )  # fmt: skip
        return True, [found]
    return True, [_out_of_range(name, meaning, low, high, shown, values)] if meaning else []


def _plausible(meaning: Meaning | None, dtype: str) -> tuple[float, float]:
    """Between what a stored scale may be. Exponents may be as low as they like: groups of 32 are all zero here and there."""
    if meaning is None:
        return 0.0, math.inf
    low, high = sorted(meaning.value(amax) for amax in PLAUSIBLE[meaning.kind])
    return (0.0 if dtype in EXPONENTS else low), high


def _out_of_range(name: str, meaning: Meaning, low: float, high: float, shown: str, values: Sequence[float]) -> Finding:
    impossible = meaning.kind in ("weight", "whole") and max(meaning.amax(value) for value in values) > IMPOSSIBLE
    effect = f"an amax, or one divided by a scale, may stand where {meaning.text} belongs"
    if meaning.kind == "whole":
        effect = f"another exporter's value may stand where {meaning.text} belongs: ModelOpt multiplies, compressed-tensors divides"
    return (error if impossible else warning)(
        "values.scale-range", name, f"between {low:g} and {high:.3g}, as {meaning.text} is", shown, effect, "compare with --source",
    )  # fmt: skip


def _odd(
    tensor: SourceTensor, low: float, high: float, component: Component, reader: Reader, block: tuple[int, int]
) -> tuple[float, ...] | None:
    """Values of a weight's scale outside the range over weights that are not all zero; None where that can't be told."""
    import numpy as np

    name = tensor.spec.name
    is_whole = scale_kind(name) == "whole"
    weight = weight_of(f"{name.rpartition('.')[0]}.weight_scale" if is_whole else name, component.tensors)
    coding = find_coding(weight, component.tensors, block) if weight else None
    if coding is None or tensor is not (coding.whole if is_whole else coding.local):
        return None
    if is_whole:  # it lies over all of the weight
        n, k = coding.grid.rows, coding.grid.columns
        coding = dataclasses.replace(coding, grid=Grid(n, k, n, k))
    found: list[float] = []
    looked = 0
    for start, values in read_in_parts(reader, tensor):
        for i in np.flatnonzero(~((values >= low) & (values <= high) & (values > 0))):
            if looked == _LOOKED_AT:
                return tuple(found)
            looked += 1
            if not _zeros(reader, coding, *divmod(start + int(i), coding.grid.shape[1])):
                found.append(float(values[i]))
    return tuple(found)


def _zeros(reader: Reader, coding: Coding, down: int, across: int) -> bool:
    """Whether all codes under one scale are zero, of either sign."""
    import numpy as np

    grid, packed = coding.grid, coding.number.packed
    left, right = across * grid.wide, min((across + 1) * grid.wide, grid.columns)
    top, bottom = down * grid.high, min((down + 1) * grid.high, grid.rows)
    spans = [(row * grid.columns + left, row * grid.columns + right) for row in range(top, bottom)]
    if right - left == grid.columns:
        spans = [(top * grid.columns, bottom * grid.columns)]
    spans = [(at // packed, end // packed) for at, end in spans]
    buffer = memoryview(bytearray(min(1 << 20, max(end - at for at, end in spans))))
    mask = {"FP8": 0x7F, "INT8": 0xFF, "FP4": 0x77, "E2M1": 0x7F}[coding.number.name]
    for at, end in spans:
        for start in range(at, end, len(buffer)):
            piece = buffer[: min(len(buffer), end - start)]
            reader.read_into(coding.codes, start, piece)
            if (np.frombuffer(piece, np.uint8) & mask).any():
                return False
    return True
