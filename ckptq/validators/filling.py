"""Whether codes, and scales that are codes themselves, use the range that the scales over them give: they do under amax / limit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from ckptq.checkpoint import SourceTensor
from ckptq.validators import Code, Finding, error, warning
from ckptq.validators.coding import FP4, FP8, INT8, Coding, Number, find_coding
from ckptq.validators.scales import as_float
from ckptq.validators.scan import Seen

CODES = {
    "values.all-zero": Code("codes that are all zero"),
    "values.saturated": Code("more codes at the largest value than a scale of amax / limit leaves there"),
    "values.small-codes": Code("codes that stay far below the largest value: a scale larger than amax / limit"),
    "values.group-scales": Code(
        "scales of groups that stay far below 448, or are cut off there: the tensor's own scale does not fit"
    ),
}

SATURATED_SHARE = 0.05
"""Under amax / 448 only weights within 3.6 % of the largest get the code 448: even evenly spread weights leave no more there."""
PACKED_SATURATED_SHARE = 0.3
"""Of 16 weights under amax / 6 one gets the code 6, and every sixth if they are spread evenly; under half of that scale, half."""
PACKED_SMALL_SHARE = 0.5
"""Codes from 4 on, for each group that is not all zero: its amax has one, even where an exponent was rounded up."""
FULL: Mapping[str, int] = {"FP8": 0x76, "INT8": 64, "E2M1": 0x44}
"""The code of half the largest value. Under amax / limit the largest is there; under the power of two above that, at least this."""


def check(
    codes: Mapping[str, tuple[SourceTensor, Seen]],
    scales: Mapping[str, tuple[SourceTensor, Seen]],
    tensors: Mapping[str, SourceTensor],
    block: tuple[int, int],
) -> Iterator[Finding]:
    """Findings on codes and on NVFP4's scales of groups, from what a pass saw in them.

    Shards of a fused linear, and whatever else has the same scale, may share the largest code among them.
    """
    codings = {name: find_coding(tensor, tensors, block) for name, (tensor, _) in codes.items()}
    shared: dict[str, tuple[int, float]] = {}
    tops: dict[tuple[int, float], int] = {}
    for name, coding in codings.items():
        if coding is None:
            continue
        one = coding.whole or coding.local
        filled = coding.local.spec.name if coding.whole else name
        value, found = one_value(scales, one.spec.name), (scales if coding.whole else codes).get(filled)
        if value is not None and found is not None and (not coding.whole or coding.local.spec.dtype == FP8.dtype):
            shared[filled] = key = coding.number.packed, value
            tops[key] = max(tops.get(key, 0), found[1].top)
    for name, (tensor, seen) in codes.items():
        coding = codings[name]
        if coding is not None or tensor.spec.dtype == FP8.dtype:
            yield from _code_findings(tensor, seen, coding, tops[shared[name]] if name in shared else seen.top)
    for name, (_, seen) in scales.items():
        if name in shared:
            yield from _group_findings(name, seen, tops[shared[name]])


def one_value(scales: Mapping[str, tuple[SourceTensor, Seen]], name: str) -> float | None:
    """The value of a scale that has one, and that is finite."""
    tensor, seen = scales.get(name, (None, None))
    if tensor is None or seen is None or tensor.spec.numel != 1:
        return None
    value = as_float(seen.low, tensor.spec.dtype)
    return value if math.isfinite(value) else None


def _code_findings(tensor: SourceTensor, seen: Seen, coding: Coding | None, top: int) -> Iterator[Finding]:
    name, number = tensor.spec.name, coding.number if coding else FP8
    count = tensor.spec.numel * number.packed
    groups = math.prod(coding.grid.shape) if coding else 1
    belongs = _belongs(coding)
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
    elif _packed_saturated(seen, count) if number is FP4 else saturated(seen, count, groups):
        yield warning(
            "values.saturated", name, f"few codes at the largest value, {number.top:g}", f"{seen.largest / count:.2%} of them",
            "the scale is too small and cut the largest weights off", f"{belongs}: convert again",
        )  # fmt: skip
    elif coding is not None and (_packed_small(seen, coding) if number is FP4 else top < FULL[number.name]):
        yield warning(
            "values.small-codes", name, f"codes up to {number.top:g}", f"codes up to {code_value(top, number):g}",
            "the scale is larger than the weights need, and the smallest ones lose their bits or vanish",
            f"{belongs}: convert again",
        )  # fmt: skip


def _belongs(coding: Coding | None) -> str:
    if coding is None or coding.group is None:
        return f"weight_scale must be amax / {(coding.number if coding else FP8).limit:g}"
    return f"weight_scale must be what {coding.number.limit:g} makes of the amax of each {coding.group} columns"


def _group_findings(name: str, seen: Seen, top: int) -> Iterator[Finding]:
    mend = "weight_scale_2 must be amax / 2688, weight_global_scale 2688 / amax: convert again"
    if saturated(seen, 1 << 62, 1):
        yield warning(
            "values.group-scales", name, "few scales at the largest value, 448", f"{seen.largest} of them",
            "the scale of the whole tensor is too small, and the groups of the largest weights are cut off", mend,
        )  # fmt: skip
    elif 0 < top < FULL["FP8"]:
        yield warning(
            "values.group-scales", name, "scales up to 448", f"scales up to {code_value(top, FP8):g}",
            "the scale of the whole tensor is larger than it needs, and the scales of small weights lose their bits", mend,
        )  # fmt: skip


def saturated(seen: Seen, count: int, groups: int) -> bool:
    """Whether weights were cut off. Each group under one scale has its amax at the top, and so may have ties; `next` tells the
    tail.

    The code 448 takes what is within 3.6 % of the amax, the next one the 7.1 % below that. Where weights thin out towards the
    amax, or are spread evenly, the first gets at most half of the second; of INT8, as much.
    """
    more = seen.largest - groups
    return count > 64 and (more > SATURATED_SHARE * count or more > 64 + 1.5 * seen.next)


def _packed_saturated(seen: Seen, count: int) -> bool:
    return count > 64 and seen.largest > PACKED_SATURATED_SHARE * count


def _packed_small(seen: Seen, coding: Coding) -> bool:
    return seen.largest + seen.next < PACKED_SMALL_SHARE * seen.filled / coding.grid.wide


def code_value(code: int, number: Number) -> float:
    """The magnitude that a code without its sign stands for."""
    if number is INT8:
        return code
    if number is FP4:
        return (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)[code]
    return as_float(code, "F8_E4M3")
