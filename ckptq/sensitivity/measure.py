"""The ranking: local errors of all units, exact KLs of the worst, the curve, the search for the smallest that is good enough."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from ckptq.console import Console, duration
from ckptq.errors import DataError, RecipeError
from ckptq.sensitivity import Asked, Counted, Part, Point, Sensitivity, choose
from ckptq.sensitivity.branches import Branch, Runner, forwards
from ckptq.sensitivity.choose import Kl
from ckptq.sensitivity.cost import Clock, Work, fit, fitting
from ckptq.sensitivity.units import elsewhere

_T = TypeVar("_T")
WIDTH = 4
"""Sets that one pass of the search measures at most."""
_LOCAL, _EXACT, _CURVE, _SEARCH = "local errors", "exact KL", "curve", "search"


def plan(asked: Asked, work: Work, layers: Sequence[int], *, kv: bool) -> tuple[Part, ...]:
    """The work, at most: which units are measured is not known yet, so that they may be those of the first of `layers`."""
    count = work.units if asked.exact is None else min(asked.exact, work.units)
    sets = sum(map(len, _curve(asked, work.units)))
    firsts = [0] * (1 + kv) + sorted(layers)[:count]
    parts = [Part(_LOCAL, work.local, 1, work.reads(0)), Part(_EXACT, work.branches(firsts), 1, work.reads(len(firsts)))]
    if sets:
        parts.append(Part(_CURVE, work.branches([0] * sets), 1, work.reads(sets)))
    return (*parts, *_searching(asked, work))


def _curve(asked: Asked, units: int) -> tuple[list[int], list[int]]:
    """How many units the sets of the curve keep: (those without which there is no answer, the others)."""
    must = [asked.keep] if asked.keep else [units - 1] if asked.limit is not None and units > 1 else []
    return must, [n for n in choose.doubling(units)[1:] if n not in must]


def _searching(asked: Asked, work: Work, exchanges: int = 1) -> list[Part]:
    """Between two sets of the curve, the widest apart, and passes of exchanges."""
    kept = sorted({0, *(n for some in _curve(asked, work.units) for n in some)})
    widest = max((b - a for a, b in itertools.pairwise(kept)), default=0)
    passes = exchanges + math.ceil(math.log(widest, WIDTH + 1)) if widest and asked.limit is not None else 0
    return [Part(_SEARCH, passes * work.branches([0] * WIDTH), passes, passes * work.reads(WIDTH))] if passes else []


def measure(asked: Asked, counted: Counted, runner: Runner, clock: Clock, console: Console) -> Sensitivity:
    """Does the work that was counted, or as much of it as fits the budget.

    Raises RecipeError, after the first layer, for a budget that not even the local errors and the candidate's KL fit,
    DataError where that KL is no number.
    """
    run = _Run(asked, counted, runner, clock, console)
    if odd := elsewhere(runner.candidate):
        run.say(
            f"{odd[0]} and what else the candidate quantizes outside of the decoder layers, {len(odd)} linears, is not measured"
        )
    local = run.local_errors()
    worst = choose.worst_first(local)[: len(local) if asked.exact is None else asked.exact]
    worst = worst[: run.affordable(worst)]
    everything = [run.keeping(()), *([Branch(frozenset(), kv=True)] if counted.kv else [])]
    run.exact(_EXACT, everything + [Branch(frozenset({name})) for name in worst])
    whole, cache = run.known[everything[0]], run.known[everything[1]] if counted.kv else None
    if not math.isfinite(whole.mean):
        raise DataError(
            f"{asked.candidate}: a KL of {whole.mean} to {asked.reference} on these samples, so there is nothing to rank",
            hint="`ckptq compare` says from which layer on, `ckptq validate` what is wrong with it",
        )
    ranking = choose.rank(local, {name: run.known[Branch(frozenset({name}))] for name in worst}, whole.mean)
    kl, saved = {unit.name: unit.kl for unit in ranking}, {name: unit.saved for name, unit in counted.units.items()}
    order = [*kl] if asked.limit is None else choose.by_cost_of_a_byte(kl, saved)
    run.curve(order)
    if asked.limit is not None:
        run.search(order, choose.left(order, kl), asked.limit)
        run.exchange(order, kl, saved, asked.limit)
    return Sensitivity(
        asked, counted, tuple(ranking), whole, cache, run.points(saved), tuple(run.spent), tuple(run.expected), tuple(run.notes)
    )


@dataclass(slots=True)
class _Run:
    """The work as it goes. `known`: every branch that was measured; `kept`: the units that its sets keep."""

    asked: Asked
    counted: Counted
    runner: Runner
    clock: Clock
    console: Console
    known: dict[Branch, Kl] = field(default_factory=dict)
    kept: list[tuple[str, ...]] = field(default_factory=lambda: [()])
    spent: list[Part] = field(default_factory=list)
    expected: list[Part] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def work(self) -> Work:
        return self.counted.work

    def say(self, note: str) -> None:
        self.notes.append(note)
        self.console.warn(note)

    def keeping(self, kept: Sequence[str]) -> Branch:
        """The candidate but for these units."""
        return Branch(frozenset(self.counted.units) - frozenset(kept), self.counted.kv)

    def local_errors(self) -> dict[str, float]:
        """Times the first layer, and tells what all of it will take."""
        begun, entered = self.clock.now(), self.console.seconds.get("enter", 0.0)

        def after(layer: int, samples: int) -> None:
            if self.clock.rate:
                return
            seconds, share = self.clock.now() - begun, samples / self.counted.samples
            entering = self.console.seconds.get("enter", 0.0) - entered
            here = sum(unit.layer == layer for unit in self.counted.units.values())
            self.clock.rate = max(seconds - entering, 1e-9) / share / (1 + here) * self.work.layers
            self.clock.entering = entering / share
            self.tell(self.clock.elapsed - seconds)

        return self.timed(_LOCAL, self.work.local, 0, lambda: self.runner.local_errors(after))

    def tell(self, before: float) -> None:
        """What is expected, once it can be. Raises RecipeError where the least does not fit. `before`: seconds that went by."""
        self.expected = [replace(part, seconds=self.clock.seconds(part.forwards, part.passes)) for part in self.counted.parts]
        total = before + sum(part.seconds or 0.0 for part in self.expected)
        told = ", ".join(f"{part.name} {duration(part.seconds or 0.0)}" for part in self.expected)
        self.console.note(f"expected: {told}; {duration(total)} in all, the start included")
        least = before + self.clock.seconds(self.work.local) + self.least()
        if self.clock.limit is not None and least > self.clock.limit:
            enough = math.ceil(1.2 * least)
            raise RecipeError(
                f"--budget {duration(self.clock.limit)}: too little: local errors and the KL that can't be done without take "
                f"about {duration(least)}",
                hint=f"give --budget {f'{enough}s' if enough < 120 else f'{-(-enough // 60)}m'} or more, or fewer --samples, "
                "or a shorter --sequence-length",
            )

    def least(self) -> float:
        """Seconds of what must follow the local errors: the candidate's KL, its cache's, and the set that was asked for."""
        must, _ = _curve(self.asked, self.work.units)
        wanted = self.clock.seconds(self.work.branches([0] * len(must))) if must else 0.0
        return self.clock.seconds(self.work.branches([0] * (1 + self.counted.kv))) + wanted

    def affordable(self, worst: Sequence[str]) -> int:
        """How many of these units can be measured so that the curve and the search still can be, too."""
        room = self.clock.room(0) - self.least() / self.clock.rate
        for part in _searching(self.asked, self.work, exchanges=0):
            room -= self.clock.seconds(part.forwards, part.passes) / self.clock.rate
        count, _ = fit(room, [self.work.branch(self.counted.units[name].layer) for name in worst], self.optional())
        if count < len(worst):
            self.say(f"the budget is enough for the exact KL of {count} of {len(worst)} units")
        return count

    def optional(self) -> list[float]:
        """Forwards of the sets of the curve that may be left out; the first of them may bring the pass with it."""
        must, more = _curve(self.asked, self.work.units)
        costs = [self.work.branch()] * len(more)
        return [costs[0] + self.work.reference + self.clock.entering / self.clock.rate, *costs[1:]] if costs and not must else costs

    def curve(self, order: Sequence[str]) -> None:
        """Measures the sets of the curve that there is time for."""
        must, more = _curve(self.asked, self.work.units)
        needed = self.clock.seconds(self.work.branches([0] * len(must))) / self.clock.rate if must else 0.0
        count = fitting(self.clock.room(0) - needed, self.optional())
        if count < len(more):
            self.say(f"the budget is enough for {count} of the {len(more)} sets of the curve")
        self.sets(_CURVE, [order[:n] for n in sorted([*must, *more[:count]])])

    def search(self, order: Sequence[str], estimates: Sequence[float], limit: float) -> None:
        """Measures sets until the fewest units of that order are known that meet the limit, or the budget is spent."""
        while True:
            width = self.width()
            lengths = choose.next_lengths(self.lengths(order), estimates, limit, max(width, 1))
            if not lengths:
                return
            if not width:
                self.say("the budget ended the search: fewer units may be enough")
                return
            self.sets(_SEARCH, [order[:n] for n in lengths])

    def exchange(self, order: Sequence[str], kl: Mapping[str, float], saved: Mapping[str, int], limit: float) -> None:
        """Looks for a smaller file near the one that was found."""
        known = self.lengths(order)
        kept = choose.smallest(known, limit)
        if not kept or kept - 1 not in known:
            return
        sets = choose.exchanges(order, kept, (known[kept - 1], known[kept]), kl, saved, limit)
        self.sets(_SEARCH, sets[: self.width()])

    def lengths(self, order: Sequence[str]) -> dict[int, float]:
        """{kept: KL} of the measured sets that are the first units of the order."""
        return {len(names): self.known[self.keeping(names)].mean for names in self.kept if names == tuple(order[: len(names)])}

    def width(self) -> int:
        """How many sets one more pass has time for."""
        room = self.clock.room() - self.work.reference
        return WIDTH if room >= WIDTH * self.work.branch() else max(int(room / self.work.branch()), 0)

    def sets(self, name: str, sets: Sequence[Sequence[str]]) -> None:
        self.exact(name, [self.keeping(names) for names in sets])
        self.kept += [names for names in map(tuple, sets) if names not in self.kept]

    def points(self, saved: Mapping[str, int]) -> tuple[Point, ...]:
        found = [Point(n, self.known[self.keeping(n)], self.counted.stored + sum(map(saved.__getitem__, n))) for n in self.kept]
        return tuple(sorted(found, key=lambda point: (len(point.kept), point.nbytes)))

    def exact(self, name: str, branches: Sequence[Branch]) -> None:
        """Measures those that are not known."""
        new = [branch for branch in dict.fromkeys(branches) if branch not in self.known]
        if not new:
            return
        layers = {unit.name: unit.layer for unit in self.counted.units.values()}
        cost = forwards(new, layers, self.work.layers) + (1 + len(new)) * self.work.head
        found = self.timed(name, cost, len(new), lambda: self.runner.exact(new))
        self.known |= dict(zip(new, found, strict=True))

    def timed(self, name: str, cost: float, branches: int, what: Callable[[], _T]) -> _T:
        """What it returns. The rate of later parts is this one's, which has seen output heads, too."""
        begun, entered = self.clock.now(), self.console.seconds.get("enter", 0.0)
        found = what()
        seconds = self.clock.now() - begun
        entering = self.console.seconds.get("enter", 0.0) - entered
        self.clock.rate = max(seconds - entering, 1e-9) / cost
        self.spent.append(Part(name, cost, 1, self.work.reads(branches), seconds))
        return found
