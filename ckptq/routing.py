"""How many calibration tokens the routers sent each expert, and what is said of those that got none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Tokens = Mapping[str, Sequence[int]]
"""{module around a layer's routed experts: tokens of each}."""


def unreached(tokens: Tokens) -> dict[str, list[int]]:
    """{module: numbers of the experts without a token}, of the layers that have some."""
    found = {name: [expert for expert, count in enumerate(counts) if not count] for name, counts in tokens.items()}
    return {name: experts for name, experts in found.items() if experts}


def recorded(tokens: Tokens) -> dict[str, Any]:
    """What ckptq.json keeps."""
    return {"tokens": {name: list(counts) for name, counts in tokens.items()}, "unreached": unreached(tokens)}


def idle(job_scopes: Iterable[object]) -> str:
    """What to say of `calibration.all_experts`, which is set; "" where any of these scopes has routed experts."""
    if any(getattr(scope, "experts", None) is not None for scope in job_scopes):
        return ""
    return "calibration.all_experts does nothing here: this model has no routed experts"


def warning(tokens: Tokens, *, all_experts: bool) -> str:
    """One sentence on the experts that no token reached; "" where there are none, or where all saw every token."""
    missed = unreached(tokens)
    if not missed or all_experts:
        return ""
    count, total = sum(map(len, missed.values())), sum(map(len, tokens.values()))
    name, experts = next(iter(missed.items()))
    shown = f"{name}: {', '.join(map(str, experts[:8]))}{f' and {len(experts) - 8} more' if len(experts) > 8 else ''}"
    others = len(missed) - 1
    more = f"; and in {others} more layer{'s' * (others > 1)}" if others else ""
    return (
        f"no calibration token reached {count} of {total} routed experts ({shown}{more}): they get the input scales of their "
        "layer, measured on its other experts; add samples, or set calibration.all_experts: true"
    )
