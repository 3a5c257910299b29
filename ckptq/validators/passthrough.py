"""The output against its source: what was to stay is byte for byte the same, and what was quantized still says the same.

A weight is called after the source's: `x.weight_packed` is made from `x.weight`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptq.checkpoint import FLOATS, Component, Inventory, Reader, SourceTensor, TensorSpec
from ckptq.scopes import Scope
from ckptq.threads import in_order
from ckptq.validators import Code, Finding, error, sidecars, warning
from ckptq.validators.coding import FP8, INT8, find_coding, number_of
from ckptq.validators.likeness import Likeness
from ckptq.validators.rounding import Coded, Desk, Off, beyond, differing, joined, load
from ckptq.validators.scales import block_of, scale_kind
from ckptq.validators.vllm_rules import is_tied, parameters

CODES = {
    "passthrough.missing": Code("a tensor of the source is not in the output"),
    "passthrough.extra": Code("a tensor that is neither the source's nor a scale"),
    "passthrough.form": Code("a tensor with another shape, or in another dtype than codes or the source's"),
    "passthrough.cast": Code("an unquantized tensor with the source's values in another dtype"),
    "passthrough.bytes": Code("an unquantized tensor whose values differ"),
    "passthrough.weight-error": Code("a quantized weight further from the source than its number format rounds"),
}

PART = 1 << 24
"""Values that one thread compares in one go."""
TWICE, FEW = 2.0, 0.01
"""Rounding a second time, under a scale beside the first, moves few weights beyond the bound, and none beyond twice the bound."""
SAMPLE, EVERY = 1 << 16, 128
"""Of a sample: values in one of its parts, and how many parts there are for each that is compared."""
_PACKED = "weight_packed"


@dataclass(frozen=True, slots=True)
class Pair:
    """A stored tensor and the source's that it is made from. `coded` is how its codes are scaled, None for a copy."""

    ours: SourceTensor
    theirs: SourceTensor
    coded: Coded | None = None

    @property
    def name(self) -> str:
        return self.ours.spec.name


def check(
    output: Inventory,
    source: Inventory,
    scope: Scope,
    advance: Callable[[int], None] = lambda _: None,
    *,
    sample: bool = False,
    proved: Collection[str] = (),
) -> Iterator[Finding]:
    """All findings against the source. Reads both through fixed buffers; `advance` is told the output's bytes compared.

    The two may spell names after different generations of the architecture. `sample`: of a quantized tensor only its first and
    last part and some between are compared. `proved` names tensors of the output that are known to hold the source's bytes: a
    digest has said so.
    """
    ours, theirs = output.main, source.main
    if other := sidecars.other_model(ours.config, theirs.config, scope):
        yield other
        advance(ours.nbytes)
        return
    originals = _originals(ours, theirs, scope)
    yield from sidecars.check(output, source)
    with Reader(output.root, ours) as reader, Reader(source.root, theirs) as original:
        matched = {tensor.spec.name for tensor in originals.values()}
        missing = [name for name in theirs.tensors if name not in matched]
        extra = [name for name in ours.tensors if name not in originals and not scale_kind(name)]
        yield from (_missing(name, read) for name, read in _read_by_server(missing, theirs, scope, original))
        yield from (_extra(name, read) for name, read in _read_by_server(extra, ours, scope, reader))
        yield from _compared((reader, ours), (original, theirs), originals, advance, sample, proved)


def check_component(
    output: tuple[Path, Component],
    source: tuple[Path, Component],
    called: Callable[[str], str] = lambda name: name,
    advance: Callable[[int], None] = lambda _: None,
    *,
    sample: bool = False,
    proved: Collection[str] = (),
) -> Iterator[Finding]:
    """The same of a component of a pipeline, without its files. `called` turns a name in the output into the source's."""
    (root, ours), (origin, theirs) = output, source
    originals = {name: tensor for name in ours.tensors if (tensor := theirs.tensors.get(called(name))) is not None}
    matched = {tensor.spec.name for tensor in originals.values()}
    yield from (_missing(name, True) for name in theirs.tensors if name not in matched)
    yield from (_extra(name, False) for name in ours.tensors if name not in originals and not scale_kind(name))
    with Reader(root, ours) as reader, Reader(origin, theirs) as original:
        yield from _compared((reader, ours), (original, theirs), originals, advance, sample, proved)


def _compared(
    output: tuple[Reader, Component],
    source: tuple[Reader, Component],
    originals: Mapping[str, SourceTensor],
    advance: Callable[[int], None],
    sample: bool,
    proved: Collection[str],
) -> Iterator[Finding]:
    """Findings on tensors that both have. `originals`: {name in the output: the source's tensor}."""
    (reader, ours), (original, theirs) = output, source
    advance(sum(t.spec.nbytes for name, t in ours.tensors.items() if name not in originals))
    tensors = _in_file_order(ours, originals)
    for tensor in tensors:
        yield from _form_findings(tensor, originals[tensor.spec.name].spec)
    pairs = (_pair(tensor, originals[tensor.spec.name], ours, reader) for tensor in tensors)
    alike = Likeness(theirs.tensors.values(), reader, original)
    for pair, off in _offs(_jobs(pairs, {*proved}, sample), reader, original):
        if off is not None:
            yield _value_finding(pair, off, alike.describe(pair.ours, pair.theirs, pair.coded))
        advance(pair.ours.spec.nbytes)


def _originals(ours: Component, theirs: Component, scope: Scope) -> dict[str, SourceTensor]:
    """{our name: the source's tensor}, by name, or else by canonical name."""
    canonical = {scope.canonical(name): tensor for name, tensor in theirs.tensors.items()}
    called = {name: name.removesuffix("_packed") if name.endswith(f".{_PACKED}") else name for name in ours.tensors}
    found = {
        name: theirs.tensors.get(name) or theirs.tensors.get(called[name]) or canonical.get(scope.canonical(called[name]))
        for name in ours.tensors
    }
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _in_file_order(ours: Component, originals: Mapping[str, SourceTensor]) -> list[SourceTensor]:
    return sorted((ours.tensors[name] for name in originals), key=lambda t: (t.file, t.offset))


def _read_by_server(names: Sequence[str], own: Component, scope: Scope, reader: Reader) -> Iterator[tuple[str, bool]]:
    """(name, whether the server reads it) of names that one side lacks. A tied head that repeats the embeddings does not count."""
    known = {p.name for p in parameters(scope, own.config, own.tensors)} if names else set()
    for name in names:
        if (
            scope.canonical(name) != f"{scope.head}.weight"
            or not is_tied(scope, own.config)
            or not _repeats_embeddings(name, own, reader)
        ):
            yield name, name in known


def _repeats_embeddings(name: str, own: Component, reader: Reader) -> bool:
    head = own.tensors[name]
    tables = [t for n, t in own.tensors.items() if n.endswith("embed_tokens.weight") and t.spec.shape == head.spec.shape]
    same = (
        differing((reader, head), (reader, t), range(head.spec.numel), Desk()) for t in tables if t.spec.dtype == head.spec.dtype
    )
    return any(off is None for off in same)


def _missing(name: str, read: bool) -> Finding:
    effect = "vLLM leaves that memory as it finds it" if read else "none in vLLM, which does not read it"
    report = error if read else warning
    return report("passthrough.missing", name, "every tensor of the source", "not stored", effect, "take the tensor over")


def _extra(name: str, read: bool) -> Finding:
    effect = "vLLM computes with it, and the source has none" if read else "vLLM drops it or raises; it is no part of the model"
    report = error if read else warning
    return report("passthrough.extra", name, "the source's tensors, and scales", "a further tensor", effect, "remove it")


def _pair(tensor: SourceTensor, before: SourceTensor, ours: Component, reader: Reader) -> Pair:
    coding = find_coding(tensor, ours.tensors, block_of(ours.config)) if _is_coded(tensor, before.spec) else None
    return Pair(tensor, before, load(coding, reader) if coding else None)


def _is_coded(ours: SourceTensor, theirs: TensorSpec) -> bool:
    return number_of(ours) is not None and theirs.dtype in FLOATS


def _shape(ours: SourceTensor, theirs: TensorSpec) -> tuple[int, ...]:
    """Of the weight that is stored, of packed codes too."""
    number = number_of(ours)
    return number.shape(ours.spec.shape) if number and theirs.dtype in FLOATS else ours.spec.shape


def _comparable(pair: Pair) -> bool:
    ours, theirs = pair.ours.spec, pair.theirs.spec
    if _shape(pair.ours, theirs) != theirs.shape or not ours.numel:
        return False
    return ours.dtype == theirs.dtype or pair.coded is not None or {ours.dtype, theirs.dtype} <= FLOATS


def _form_findings(tensor: SourceTensor, theirs: TensorSpec) -> Iterator[Finding]:
    ours, shape = tensor.spec, _shape(tensor, theirs)
    known = ours.dtype == theirs.dtype or _is_coded(tensor, theirs) or {ours.dtype, theirs.dtype} <= FLOATS
    if shape != theirs.shape or not known:
        turned = len(shape) > 1 and shape == theirs.shape[::-1]
        yield error(
            "passthrough.form", ours.name, f"{theirs.dtype} {list(theirs.shape)}, or codes of that shape, of 4 bits two in a byte",
            f"{ours.dtype} {list(ours.shape)}{', which is transposed' if turned else ''}", "this is not that tensor",
            "convert again from this source, or name the source that it was made from",
        )  # fmt: skip
    elif {ours.dtype, theirs.dtype} <= FLOATS and ours.dtype != theirs.dtype:
        yield warning(
            "passthrough.cast", ours.name, f"{theirs.dtype}, as in the source", ours.dtype,
            "vLLM casts what it loads to the dtype it serves in", "keep the source's dtype",
        )  # fmt: skip


Job = tuple[Pair, range | None, bool]
"""(pair, rows of codes or values of a copy, whether it is the pair's last part)"""


def _offs(jobs: Iterable[Job], reader: Reader, original: Reader) -> Iterator[tuple[Pair, Off | None]]:
    """What is beyond the bound in each pair, None where nothing is. Large tensors are shared out among threads."""

    def look(job: Job, desk: Desk) -> tuple[Pair, Off | None, bool]:
        pair, part, last = job
        if part is None:
            return pair, None, last
        output, source = (reader, pair.ours), (original, pair.theirs)
        off = beyond(output, source, pair.coded, part, desk) if pair.coded else differing(output, source, part, desk)
        return pair, off, last

    offs: list[Off] = []
    for pair, off, last in in_order(look, jobs, Desk):
        offs += [off] if off else []
        if last:
            yield pair, joined(offs)
            offs = []


def _jobs(pairs: Iterable[Pair], proved: Collection[str], sample: bool) -> Iterator[Job]:
    for pair in pairs:
        if not _comparable(pair) or (pair.coded is None and pair.name in proved):
            yield pair, None, True
            continue
        end, size = pair.ours.spec.numel, SAMPLE if sample and pair.coded else PART
        step = size
        if pair.coded is not None:
            grid = pair.coded.grid
            end, step = grid.rows, max(size // (grid.columns * grid.high), 1) * grid.high
            step = min(step, max(size // grid.columns, 1)) if sample or grid.wide == grid.columns else step
        parts = [range(at, min(at + step, end)) for at in range(0, end, step)]
        if sample and pair.coded:
            parts = [part for i, part in enumerate(parts) if i % EVERY == 0 or i == len(parts) - 1]
        yield from ((pair, part, part.stop == parts[-1].stop) for part in parts)


def _value_finding(pair: Pair, off: Off, likeness: str) -> Finding:
    shape, place = _shape(pair.ours, pair.theirs.spec), list[int]()
    left, count = off.first, math.prod(shape)
    for size in reversed(shape):
        left, at = divmod(left, size)
        place.insert(0, at)
    seen = f"{off.count} of {count} values are not, first {place}"
    if pair.coded is None:
        return error(
            "passthrough.bytes", pair.name, "the source's values", f"{seen}{likeness}",
            "vLLM computes with other values than the source's",
            "take the tensor over again, or name the source that it was made from",
        )  # fmt: skip
    worst = f", worst {off.worst:.3g} times the limit" if math.isfinite(off.worst) else ""
    expected = f"code * scale within {pair.coded.number.name}'s rounding of the source's weight: {_half_step(pair.coded)}"
    if off.worst <= TWICE and off.count <= FEW * count:
        return warning(
            "passthrough.weight-error", pair.name, expected, f"{seen}{worst}", "these weights were rounded twice, as it seems",
            "encode from the source's own weights",
        )  # fmt: skip
    return error(
        "passthrough.weight-error", pair.name, expected, f"{seen}{worst}{likeness}",
        "vLLM computes with another weight than the source's", "convert again, or name the source that it was made from",
    )  # fmt: skip


def _half_step(coded: Coded) -> str:
    if coded.number is FP8:
        return "2^-4 of it, or half the smallest step"
    return (
        "half a step" if coded.number is INT8 else "half a step: a quarter of its scale, half of it from 2 on, all of it from 4 on"
    )
