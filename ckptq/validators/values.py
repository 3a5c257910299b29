"""The numbers: scales and codes of every quantized tensor, and what is not finite anywhere. Reads every byte once."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptq.checkpoint import Component, Reader, SourceTensor
from ckptq.scopes import Scope
from ckptq.validators import Code, Finding, compare, error, warning
from ckptq.validators.scales import DTYPES, Grid, Kind, as_float, block_of, find_grid, read_scales, scale_kind, scale_of
from ckptq.validators.scan import NUMBERS, Seen, scan

CODES = {
    "values.not-finite": Code("a NaN or an infinity: a scale, a code, or an unquantized weight"),
    "values.not-positive": Code("a scale that is zero or negative"),
    "values.scale-range": Code("a scale that no sensible model leads to"),
    "values.all-zero": Code("codes that are all zero"),
    "values.saturated": Code("more codes at the largest value than a scale of amax / 448 leaves there"),
    "values.small-codes": Code("codes that stay far below 448: a scale larger than amax / 448"),
}

# Ranges of scale = amax / 448. Weights of language models stay below 128, K and V below 4,480; inputs of down_proj reach 1e5.
PLAUSIBLE: Mapping[Kind, tuple[float, float]] = {
    "weight": (1e-8, 128 / 448),
    "input": (1e-7, 1e4),
    "k": (1e-6, 10.0),
    "v": (1e-6, 10.0),
}
IMPOSSIBLE = 1.0
"""A weight's scale above this would mean weights above 448."""
SATURATED_SHARE = 0.05
"""Under amax / 448 only weights within 3.6 % of the largest get the code 448: even evenly spread weights leave no more there."""
FULL = 0x76
"""The code of 224. Under amax / 448 the largest code is 448; under the power of two above that, at least this."""
_LOOKED_AT = 16
"""Odd values of one scale tensor whose weights are read."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """What the pass brought: scales and FP8 weights by name, and the largest magnitude of what is neither."""

    scales: dict[str, tuple[SourceTensor, Seen]]
    codes: dict[str, tuple[SourceTensor, Seen]]
    tops: dict[str, float]

    def one(self, name: str) -> float | None:
        """The value of a scale that has one, and that is finite."""
        tensor, seen = self.scales.get(name, (None, None))
        if tensor is None or seen is None or tensor.spec.numel != 1:
            return None
        value = as_float(seen.low, tensor.spec.dtype)
        return value if math.isfinite(value) else None

    def summary(self, component: Component, reported: Collection[str]) -> compare.Values:
        """The same in numbers, without the scales that were reported."""
        scales = {n: as_float(seen.top, tensor.spec.dtype) for n, (tensor, seen) in self.scales.items() if n not in reported}
        codes = {name: _value(seen.top) for name, (_, seen) in self.codes.items()}
        return compare.Values({n: v for n, v in scales.items() if v > 0}, self.tops, codes, component)


def check(
    root: Path,
    component: Component,
    scope: Scope,
    advance: Callable[[int], None] = lambda _: None,
    digests: dict[str, str] | None = None,
) -> Iterator[Finding]:
    """All findings on values. `advance` is told the bytes that were looked at; `digests`, where given, gets each tensor's."""
    found, reported = _Pass({}, {}, {}), set[str]()
    for tensor, seen in scan(root, component, advance, digests=digests is not None):
        name, dtype = tensor.spec.name, tensor.spec.dtype
        if digests is not None:
            digests[name] = seen.digest
        if not tensor.spec.numel:
            continue
        if scale_kind(name) and dtype in DTYPES:
            found.scales[name] = tensor, seen
        elif dtype == "F8_E4M3" and not scale_kind(name):
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
    yield from _codes_findings(found, component, block)
    with Reader(root, component) as reader:
        for tensor, seen in found.scales.values():
            for finding in _scale_findings(tensor, seen, component, reader, block):
                reported.add(tensor.spec.name)
                yield finding
    yield from compare.check(found.summary(component, reported), scope)


def _codes_findings(found: _Pass, component: Component, block: tuple[int, int]) -> Iterator[Finding]:
    """Shards of a fused linear, and whatever else has the same scale, may share the largest code among them."""
    tops: dict[float, int] = {}
    places = {name: scale_of(name, component.tensors) for name in found.codes}
    for name, scale in places.items():
        value = found.one(scale.spec.name) if scale else None
        if value is not None:
            tops[value] = max(tops.get(value, 0), found.codes[name][1].top)
    for name, (tensor, seen) in found.codes.items():
        scale = places[name]
        value = found.one(scale.spec.name) if scale else None
        grid = find_grid(tensor.spec.shape, scale.spec.shape, block) if scale else None
        yield from _code_findings(tensor, seen, grid, seen.top if value is None else tops[value])


def _code_findings(tensor: SourceTensor, seen: Seen, grid: Grid | None, top: int) -> Iterator[Finding]:
    name, count = tensor.spec.name, tensor.spec.numel
    if seen.nan:
        yield error(
            "values.not-finite", name, "no NaN code (0x7F, 0xFF)", f"NaN among {count} codes: {seen.nan}",
            "every answer that passes here becomes NaN",
            "the weight was divided by zero or held NaN: look at its amax in the source, then convert again",
        )  # fmt: skip
    if not seen.top:
        yield warning(
            "values.all-zero", name, "codes other than zero", "all zero", "the linear answers with its bias alone",
            "right only where the source's weight is all zero: compare with --source",
        )  # fmt: skip
    elif _saturated(seen, count, math.prod(grid.shape) if grid else 1):
        yield warning(
            "values.saturated", name, "few codes at the largest value, 448", f"{seen.largest / count:.2%} of them",
            "the scale is too small and cut the largest weights off", "weight_scale must be amax / 448: convert again",
        )  # fmt: skip
    elif top < FULL and grid is not None:
        yield warning(
            "values.small-codes", name, "codes up to 448", f"codes up to {_value(top):g}",
            "the scale is larger than the weights need, and the smallest ones lose their bits or vanish",
            "weight_scale must be amax / 448: convert again",
        )  # fmt: skip


def _saturated(seen: Seen, count: int, groups: int) -> bool:
    """Whether weights were cut off. Each group under one scale has its amax at 448, and so may have ties; `next` tells the tail.

    The code 448 takes what grid within 3.6 % of the amax, the next one the 7.1 % below that. Where weights thin out towards the
    amax, or are spread evenly, the first gets at most half of the second.
    """
    more = seen.largest - groups
    return count > 64 and (more > SATURATED_SHARE * count or more > 64 + 1.5 * seen.next)


def _value(code: int) -> float:
    return (8 + code % 8) * 2.0 ** (code // 8 - 10) if code >= 8 else code * 2.0**-9


def _scale_findings(
    tensor: SourceTensor, seen: Seen, component: Component, reader: Reader, block: tuple[int, int]
) -> Iterator[Finding]:
    name, dtype, kind = tensor.spec.name, tensor.spec.dtype, scale_kind(tensor.spec.name)
    if seen.top >= NUMBERS[dtype][1]:
        what = str(as_float(seen.low, dtype)) if tensor.spec.numel == 1 else "NaN or infinity"
        yield error(
            "values.not-finite", name, "a finite scale", what, "everything it touches becomes NaN", "calibrate and export again"
        )
        return
    lowest = -as_float(seen.top, dtype) if seen.signed else as_float(seen.low, dtype)
    low, high = PLAUSIBLE.get(kind or "other", (0.0, math.inf))
    largest = as_float(seen.top, dtype)
    if low <= lowest and largest <= high and lowest > 0:
        return
    odd = _odd(tensor, low, high, component, reader, block) if kind == "weight" else None
    if odd == ():
        if lowest <= 0:
            yield warning(
                "values.not-positive", name, "a scale above zero", "zero, over weights that are all zero",
                "they stay zero; a server that divides by the scale would make them NaN", "store a scale of 1 there",
            )  # fmt: skip
        return
    shown = _shown(odd or (lowest if lowest <= 0 or lowest < low else largest,), tensor.spec.numel)
    if lowest <= 0:
        yield error(
            "values.not-positive", name, "a scale above zero", shown,
            "vLLM takes a KV scale that is not positive for a missing one, silently" if kind in ("k", "v") else
            "vLLM divides or multiplies by it: NaN, zeros or the other sign", "calibrate and export again",
        )  # fmt: skip
    else:
        yield (error if kind == "weight" and max(odd or (largest,)) > IMPOSSIBLE else warning)(
            "values.scale-range", name, f"between {low:g} and {high:.3g}, as amax / 448 is", shown,
            "an amax, or one divided by a scale, may stand where amax / 448 belongs", "compare with --source",
        )  # fmt: skip


def _shown(odd: Sequence[float], numel: int) -> str:
    return f"{odd[0]:g}" if numel == 1 else f"{odd[0]:g} among {numel}"


def _odd(
    tensor: SourceTensor, low: float, high: float, component: Component, reader: Reader, block: tuple[int, int]
) -> tuple[float, ...] | None:
    """Values of a weight's scale outside the range over weights that are not all zero; None where that can't be told."""
    import numpy as np

    base = tensor.spec.name.removesuffix("_inv").removesuffix("_scale")
    weight = component.tensors.get(base, component.tensors.get(base.removesuffix("_weight")))
    grid = find_grid(weight.spec.shape, tensor.spec.shape, block) if weight else None
    values = read_scales(reader, tensor)
    if weight is None or grid is None or values is None or weight.spec.dtype != "F8_E4M3":
        return None
    places = np.flatnonzero(~((values >= low) & (values <= high) & (values > 0)))
    across = grid.shape[1]
    over = (int(i) for i in places[:_LOOKED_AT])
    return tuple(float(values[i]) for i in over if not _zeros(reader, weight, grid, *divmod(i, across)))


def _zeros(reader: Reader, weight: SourceTensor, grid: Grid, down: int, across: int) -> bool:
    """Whether all codes under one scale are zero, of either sign."""
    import numpy as np

    left, right = across * grid.wide, min((across + 1) * grid.wide, grid.columns)
    top, bottom = down * grid.high, min((down + 1) * grid.high, grid.rows)
    spans = [(row * grid.columns + left, row * grid.columns + right) for row in range(top, bottom)]
    if right - left == grid.columns:
        spans = [(top * grid.columns, bottom * grid.columns)]
    buffer = memoryview(bytearray(min(1 << 20, max(end - at for at, end in spans))))
    for at, end in spans:
        for start in range(at, end, len(buffer)):
            piece = buffer[: min(len(buffer), end - start)]
            reader.read_into(weight, start, piece)
            if (np.frombuffer(piece, np.uint8) & 0x7F).any():
                return False
    return True
