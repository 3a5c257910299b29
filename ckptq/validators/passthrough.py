"""The output against its source: what was to stay is byte for byte the same, and what was quantized still says the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ckptq.checkpoint import DTYPE_BYTES, FLOATS, Component, Inventory, Reader, SourceTensor
from ckptq.scopes import Scope
from ckptq.validators import Code, Finding, error, warning
from ckptq.validators.likeness import Likeness
from ckptq.validators.rounding import Desk, Off, compare, same_values
from ckptq.validators.scales import Grid, block_of, grid, read_scales, scale_kind, scale_of
from ckptq.validators.scan import in_order
from ckptq.validators.vllm_rules import is_tied, parameters

CODES = {
    "passthrough.missing": Code("a tensor of the source is not in the output"),
    "passthrough.extra": Code("a tensor that is neither the source's nor a scale"),
    "passthrough.form": Code("a tensor with another shape, or another dtype than FP8 or the source's"),
    "passthrough.cast": Code("an unquantized tensor with the source's values in another dtype"),
    "passthrough.bytes": Code("an unquantized tensor whose values differ"),
    "passthrough.weight-error": Code("a quantized weight further from the source than FP8 rounds"),
}

PART = 1 << 25
"""Codes, or bytes, that one thread compares in one go."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A stored tensor and the source's of the same name. `scales` and `grid` are there for codes whose source is floats."""

    ours: SourceTensor
    theirs: SourceTensor
    scales: Any = None
    grid: Grid | None = None


@dataclass(frozen=True, slots=True)
class _Job:
    """Rows of codes, or bytes of a copy; `last` is the pair's last part."""

    pair: Pair
    part: range
    last: bool


def check(
    output: Inventory, source: Inventory, scope: Scope, advance: Callable[[int], None] = lambda _: None
) -> Iterator[Finding]:
    """All findings against the source. Reads both through fixed buffers; `advance` is told the output's bytes compared.

    The two may spell names after different generations of the architecture.
    """
    ours, theirs = output.main, source.main
    originals = _counterparts(ours, theirs, scope)
    with Reader(output.root, ours) as reader, Reader(source.root, theirs) as original:
        yield from _name_findings(output, source, scope, originals, reader, original)
        advance(sum(t.spec.nbytes for name, t in ours.tensors.items() if name not in originals))
        pairs: list[Pair] = []
        for name, before in sorted(originals.items(), key=lambda item: (ours.tensors[item[0]].file, ours.tensors[item[0]].offset)):
            tensor = ours.tensors[name]
            form = _form_finding(tensor, before)
            if form is None:
                pairs.append(_pair(tensor, before, ours, reader))
            else:
                yield form
                advance(tensor.spec.nbytes)
        yield from _value_findings(pairs, theirs, reader, original, advance)


def _counterparts(ours: Component, theirs: Component, scope: Scope) -> dict[str, SourceTensor]:
    """{our name: the source's tensor}, by name, or else by canonical name."""
    canonical = {scope.canonical(name): tensor for name, tensor in theirs.tensors.items()}
    found = {name: theirs.tensors.get(name, canonical.get(scope.canonical(name))) for name in ours.tensors}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _name_findings(
    output: Inventory,
    source: Inventory,
    scope: Scope,
    originals: dict[str, SourceTensor],
    reader: Reader,
    original: Reader,
) -> Iterator[Finding]:
    ours, theirs = output.main, source.main
    matched = {tensor.spec.name for tensor in originals.values()}
    missing = [name for name in theirs.tensors if name not in matched]
    extra = [name for name in ours.tensors if name not in originals and not scale_kind(name)]
    for names, own, read, code in ((missing, theirs, original, "missing"), (extra, ours, reader, "extra")):
        if not names:
            continue
        known = {p.name for p in parameters(scope, own.config, own.tensors)}
        tied = is_tied(scope, own.config)
        for name in names:
            if tied and scope.canonical(name) == "lm_head.weight" and _same_as_embeddings(own, scope, read):
                continue
            serious = name in known
            if code == "missing":
                yield (error if serious else warning)(
                    "passthrough.missing", name, "every tensor of the source", "not stored",
                    "vLLM would leave the memory as it found it" if serious else "vLLM does not read it; other programs may",
                    "take the tensor over",
                )  # fmt: skip
            else:
                yield (error if serious else warning)(
                    "passthrough.extra", name, "the source's tensors and scales", "a further tensor",
                    "vLLM computes with it, and the source had none" if serious else "no part of the model: vLLM drops it or raises",
                    "remove it",
                )  # fmt: skip


def _same_as_embeddings(component: Component, scope: Scope, reader: Reader) -> bool:
    head = next(t for n, t in component.tensors.items() if scope.canonical(n) == "lm_head.weight")
    tables = (t for n, t in component.tensors.items() if n.endswith("embed_tokens.weight"))
    return any(t.spec[1:] == head.spec[1:] if isinstance(t.spec, tuple) else _equal(head, t, reader) for t in tables)


def _equal(one: SourceTensor, other: SourceTensor, reader: Reader) -> bool:
    same_form = (one.spec.dtype, one.spec.shape) == (other.spec.dtype, other.spec.shape)
    return same_form and same_values((reader, one), (reader, other), range(one.spec.nbytes), Desk()) is None


def _form_finding(tensor: SourceTensor, before: SourceTensor) -> Finding | None:
    dtype, shape = tensor.spec.dtype, tensor.spec.shape
    if shape == before.spec.shape and (dtype == before.spec.dtype or (before.spec.dtype in FLOATS and dtype in {*FLOATS, "F8_E4M3"})):
        return None
    turned = len(shape) > 1 and shape == before.spec.shape[::-1]
    return error(
        "passthrough.form", tensor.spec.name, f"{before.spec.dtype} {list(before.spec.shape)} or F8_E4M3 of that shape",
        f"{dtype} {list(shape)}{', transposed' if turned else ''}", "this is not that tensor",
        "convert again from this source, or name the source that it was made from",
    )  # fmt: skip


def _pair(tensor: SourceTensor, before: SourceTensor, ours: Component, reader: Reader) -> Pair:
    if tensor.spec.dtype != "F8_E4M3" or before.spec.dtype not in FLOATS:
        return Pair(tensor, before)
    scale = scale_of(tensor.spec.name, ours.tensors)
    lies = grid(tensor.spec.shape, scale.spec.shape, block_of(ours.config)) if scale else None
    return Pair(tensor, before, scale, lies)
