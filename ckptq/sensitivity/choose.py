"""What to keep: units ranked by what quantizing them costs, and how many must stay for a given KL. Pure: numbers in, numbers out.

A KL is of the next token's distribution, mean over judged tokens, in nats. For small errors it grows with their square, and KLs of
independent errors add up. Estimates rest on both, and nothing that is reported as measured does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import median


@dataclass(frozen=True, slots=True)
class Kl:
    """A measured mean with the ends of its 95 % interval, which one sample alone does not have."""

    mean: float
    low: float | None = None
    high: float | None = None

    def overlaps(self, other: Kl) -> bool:
        """Whether the samples do not tell the two apart; without intervals, whether they are equal."""
        return _low(self) <= _high(other) and _low(other) <= _high(self)


def _low(kl: Kl) -> float:
    return kl.mean if kl.low is None else kl.low


def _high(kl: Kl) -> float:
    return kl.mean if kl.high is None else kl.high


@dataclass(frozen=True, slots=True)
class Ranked:
    """A unit in its place.

    local   relative L2 of the layer's output, with this unit alone quantized
    kl      measured, or estimated from `local`
    exact   the measured one; None for an estimate
    places  first and last place that the intervals leave open; of an estimate its own
    """

    name: str
    local: float
    kl: float
    exact: Kl | None
    places: tuple[int, int]


def worst_first(local: Mapping[str, float]) -> list[str]:
    """Names by local error, largest first; equal ones by name, so that equal runs agree."""
    return sorted(local, key=lambda name: (-local[name], name))


def factor(local: Mapping[str, float], exact: Mapping[str, Kl], whole: float) -> float:
    """c of KL = c * error ** 2: the median of measured units. Where there are none, as if `whole`, of all, were their sum."""
    square = {name: error * error for name, error in local.items()}
    ratios = [kl.mean / square[name] for name, kl in exact.items() if square[name]]
    squares = sum(square.values())
    return median(ratios) if ratios else whole / squares if squares else 0.0


def rank(local: Mapping[str, float], exact: Mapping[str, Kl], whole: float) -> list[Ranked]:
    """All units, worst first: the measured ones by KL, then the others by local error."""
    c = factor(local, exact, whole)
    measured = sorted(exact, key=lambda name: (-exact[name].mean, -local[name], name))
    found = [Ranked(name, local[name], exact[name].mean, exact[name], _places(exact[name], exact.values())) for name in measured]
    rest = worst_first({name: error for name, error in local.items() if name not in exact})
    last = len(found)
    return found + [
        Ranked(name, local[name], c * local[name] * local[name], None, (last + i,) * 2) for i, name in enumerate(rest, 1)
    ]


def _places(one: Kl, all_of_them: Iterable[Kl]) -> tuple[int, int]:
    """Those surely worse come before it, those surely better after it."""
    others = list(all_of_them)
    return 1 + sum(_low(kl) > _high(one) for kl in others), sum(_high(kl) >= _low(one) for kl in others)


def by_cost_of_a_byte(kl: Mapping[str, float], saved: Mapping[str, int]) -> list[str]:
    """In the order in which to keep them for a small file: first those whose every saved byte costs the most KL."""
    return sorted(kl, key=lambda name: (-kl[name] / max(saved[name], 1), name))


def doubling(count: int) -> list[int]:
    """0, 1, 2, 4, 8 and so on: how many of `count` units the curve keeps, never all."""
    return [0, *(1 << n for n in range(max(count - 1, 0).bit_length()))] if count else []


def left(order: Sequence[str], kl: Mapping[str, float]) -> list[float]:
    """[n]: the sum of the KL of what is still quantized where the first n stay, n from 0 to all."""
    return [*reversed([0.0, *accumulate(kl[name] for name in reversed(order))])]


def smallest(known: Mapping[int, float], limit: float) -> int | None:
    """The fewest kept units by which the limit was met; None where it never was."""
    return min((kept for kept, kl in known.items() if kl <= limit), default=None)


def next_lengths(known: Mapping[int, float], estimates: Sequence[float], limit: float, width: int) -> tuple[int, ...]:
    """How many units to keep in the next pass, at most `width` numbers, ascending; none where the answer is known.

    It is known where one that meets the limit stands beside one that does not.

    known      {kept: KL}, with 0 and one that meets the limit in it
    estimates  [n], of any scale: they are made to fit what is known around the answer
    """
    good = smallest(known, limit)
    if not good:
        return ()
    bad = max(kept for kept, kl in known.items() if kept < good and not kl <= limit)
    inside = range(bad + 1, good)
    if len(inside) <= width:
        return tuple(inside)
    guess, middle = _crossing(known, estimates, limit, bad, good), (bad + good) // 2
    even = (bad + (good - bad) * i // (width + 1) for i in range(1, width + 1))
    # The middle halves what is left, however wrong the estimates are.
    wanted = dict.fromkeys(n for n in (*([guess] if width > 1 else ()), middle, guess - 1, *even) if n in inside)
    return tuple(sorted([*wanted][:width]))


def _crossing(known: Mapping[int, float], estimates: Sequence[float], limit: float, bad: int, good: int) -> int:
    """The fewest kept units with an estimate within the limit, after the estimates were stretched over both ends."""
    before, after = estimates[bad], estimates[good]
    stretch = (known[bad] - known[good]) / (before - after) if before > after else 0.0
    return next((n for n in range(bad + 1, good) if known[good] + stretch * (estimates[n] - after) <= limit), good - 1)


def exchanges(
    order: Sequence[str], kept: int, ends: tuple[float, float], kl: Mapping[str, float], saved: Mapping[str, int], limit: float
) -> list[tuple[str, ...]]:
    """Sets near the first `kept` of an order that make a smaller file and may meet the limit still, the smallest first.

    Another unit in place of the last, or one of the others quantized after all, if by these KLs the limit would be met.
    `ends`: the KL of one unit less, and of all these.
    """
    first, last = (*order[: kept - 1],), order[kept - 1]
    other = ((*first, name) for name in order[kept:] if saved[name] < saved[last] and ends[0] - kl[name] <= limit)
    less = (tuple(n for n in order[:kept] if n != name) for name in first if saved[name] > 0 and ends[1] + kl[name] <= limit)
    return sorted([*other, *less], key=lambda names: sum(saved[name] for name in names))
