"""How far each tensor of a candidate is from the reference's, both as a server holds them. From files alone, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from ckptq.checkpoint import Reader, SourceTensor
from ckptq.compare.held import Area, Desk, Held, areas, hold, read
from ckptq.compare.matched import Matched, Part
from ckptq.compare.metrics import Sums, extreme, sums
from ckptq.threads import in_order

PART = 1 << 22
"""Values that one thread compares in one go."""


@dataclass(frozen=True, slots=True)
class WeightError:
    """A tensor's error. Definitions: ckptq/compare/metrics.py; sqnr_db is -20 log10(relative_l2), infinity where nothing differs.

    name    the reference's; of a pipeline with its component before it: `transformer/x`
    dtype   safetensors' word for what the candidate stores
    coding  the candidate's format in words, `FP8 channel`; "" for what is no codes
    shape   of the reference's weight
    note    why all figures are NaN: the two can't be compared. Else ""
    """

    name: str
    dtype: str
    coding: str
    shape: tuple[int, ...]
    cosine: float
    relative_l2: float
    max_abs: float
    sqnr_db: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class _Job:
    """Some rows of a pair; `why` in place of them where it can't be compared. `last` of its pair."""

    name: str
    ours: SourceTensor
    theirs: SourceTensor
    held: tuple[Held, Held] | None
    rows: range
    last: bool
    why: str = ""


def weight_errors(matched: Matched, advance: Callable[[int], None] = lambda _: None) -> Iterator[WeightError]:
    """Of every pair, in the order of the candidate's files. `advance` is told the bytes of both that were compared.

    Reads through fixed buffers, one set a thread. Equal runs give equal figures, however many threads there are.
    """
    for part in matched.parts:
        with ExitStack() as open_files:
            readers = [open_files.enter_context(Reader(*side)) for side in (part.reference, part.candidate)]
            done = Sums()
            for job, found in in_order(_look, _jobs(part, readers[0], readers[1]), Desk):
                done += found
                if job.last:
                    yield _error(job, done)
                    advance(job.ours.spec.nbytes + job.theirs.spec.nbytes)
                    done = Sums()


def worst_first(errors: Iterable[WeightError]) -> list[WeightError]:
    """By relative L2; what can't be told, or is NaN, before all else."""

    def order(error: WeightError) -> tuple[bool, float, float, str]:
        told = not math.isnan(error.relative_l2 + error.cosine)
        return told, -error.relative_l2 if told else 0.0, error.cosine if told else 0.0, error.name

    return sorted(errors, key=order)


def figures(errors: Sequence[WeightError], unmatched: int) -> dict[str, float]:
    """{metric: value}; of none there are none. A NaN among them makes the whole figure one."""
    if not errors:
        return {}
    return {
        "weight_cosine_min": extreme(min, (e.cosine for e in errors)),
        "weight_relative_l2_max": extreme(max, (e.relative_l2 for e in errors)),
        "weight_sqnr_db_min": extreme(min, (e.sqnr_db for e in errors)),
        "weights_unmatched": float(unmatched),
    }


def by_part(errors: Iterable[WeightError]) -> Mapping[tuple[str, str], list[WeightError]]:
    """{(part of the model, format in words or the dtype of what is no codes): its tensors}, sorted."""
    found: dict[tuple[str, str], list[WeightError]] = {}
    for error in errors:
        found.setdefault((part_of(error.name), error.coding or error.dtype), []).append(error)
    return dict(sorted(found.items()))


def part_of(name: str) -> str:
    """`model.layers`, `visual.blocks`, `lm_head`: of a tensor's name what comes before a number, at most two words."""
    modules = name.split(".")[:-1] or [name]
    numbered = next((i for i, word in enumerate(modules) if word.isdigit()), 2)
    return ".".join(modules[: min(numbered, 2)])


def _jobs(part: Part, reader: Reader, other: Reader) -> Iterator[_Job]:
    """The work on a part. The scales of a pair are read here, when its turn comes."""
    order = sorted(part.pairs.items(), key=lambda item: (item[1][1].file, item[1][1].offset))
    for name, (theirs, ours) in order:
        one, two = hold(theirs, part.reference[1], reader), hold(ours, part.candidate[1], other)
        why = next((f"{side}: {held}" for side, held in (("reference", one), ("candidate", two)) if isinstance(held, str)), "")
        if isinstance(one, str) or isinstance(two, str):
            yield _Job(name, ours, theirs, None, range(0), True, why)
        elif one.shape != two.shape:
            turned = ", which is transposed" if len(one.shape) > 1 and one.shape == two.shape[::-1] else ""
            yield _Job(
                name, ours, theirs, None, range(0), True, f"shape {list(one.shape)}, of the candidate {list(two.shape)}{turned}"
            )
        else:
            rows = math.prod(one.shape[:-1]) if 0 not in one.shape else 0
            step = max(PART // max(one.columns, 1), 1)
            for top in range(0, max(rows, 1), step):
                yield _Job(name, ours, theirs, (one, two), range(top, min(top + step, rows)), top + step >= rows)


def _look(job: _Job, desk: Desk) -> tuple[_Job, Sums]:
    if job.held is None:
        return job, Sums()
    one, two = job.held
    parts = (_sums(one, two, area, desk) for area in areas(one.columns, job.rows))
    return job, sum(parts, Sums())


def _sums(one: Held, two: Held, area: Area, desk: Desk) -> Sums:
    a, b, spare = desk.values
    return sums(read(one, area, desk, a), read(two, area, desk, b), spare[: area.count])


def _error(job: _Job, found: Sums) -> WeightError:
    form = job.ours.spec
    if job.held is None:
        nan = math.nan
        return WeightError(job.name, form.dtype, "", job.theirs.spec.shape, nan, nan, nan, nan, job.why)
    one, two = job.held
    return WeightError(job.name, form.dtype, two.coding, one.shape, found.cosine, found.relative_l2, found.largest, found.sqnr_db)
