"""What a ranking takes, before any of it is done. In forwards: 1 is all samples through all layers of one model."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ckptq.errors import RecipeError

_SECONDS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True, slots=True)
class Work:
    """Sizes of the job.

    head     what an output head costs, beside all layers; next to nothing in a large model
    nbytes   of both checkpoints          waiting  that all samples hold between layers, of one model
    memory   that those of all branches may hold
    """

    layers: int
    units: int
    head: float
    nbytes: int = 0
    waiting: int = 0
    memory: int = 1
    samples: int = 1

    @property
    def local(self) -> float:
        """Of the local errors: every layer once, and once more for each of its units."""
        return 1 + self.units / self.layers

    def branch(self, first: float = 0) -> float:
        """Of one branch that leaves the reference at layer `first`."""
        return (self.layers - first) / self.layers + self.head

    @property
    def reference(self) -> float:
        """Of the reference, in any pass that has branches."""
        return 1 + self.head

    def branches(self, firsts: Sequence[float]) -> float:
        """Of one pass: the reference, and the branches beside it."""
        return self.reference + sum(map(self.branch, firsts)) if firsts else 0.0

    def reads(self, branches: int) -> int:
        """Bytes that a pass reads: both checkpoints for each wave of samples that wait together, in all branches."""
        together = max(self.samples * self.memory // max(self.waiting * (1 + branches), 1), 1)
        return self.nbytes * -(-self.samples // together)


@dataclass(slots=True)
class Clock:
    """How much may still be done.

    limit     seconds in all, None for no end
    rate      that a forward takes, once it is known
    entering  that the samples take to the first layer, in every pass: embeddings and towers
    """

    limit: float | None
    rate: float = 0.0
    entering: float = 0.0
    now: Callable[[], float] = time.monotonic
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.now()

    @property
    def elapsed(self) -> float:
        return self.now() - self.started

    def seconds(self, forwards: float, passes: int = 1) -> float:
        """That so much work will take."""
        return forwards * self.rate + passes * self.entering

    def room(self, passes: int = 1) -> float:
        """Forwards that are left, in so many passes."""
        if self.limit is None or not self.rate:
            return math.inf
        return max(self.limit - self.elapsed - passes * self.entering, 0.0) / self.rate


def fit(room: float, exact: Sequence[float], curve: Sequence[float]) -> tuple[int, int]:
    """How many of each, from the first on, fit into `room`. The curve comes before exact KLs: it is what one decides by."""
    points = fitting(room, curve)
    if points < len(curve):
        return 0, points
    return fitting(room - sum(curve), exact), points


def fitting(room: float, costs: Sequence[float]) -> int:
    """How many of `costs`, from the first on, fit into `room`."""
    for count, cost in enumerate(costs):
        room -= cost
        if room < 0:
            return count
    return len(costs)


def parse_duration(option: str, text: str) -> float:
    """`10m` -> 600.0. Raises RecipeError naming the option for anything that is no time above 0."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhSMH])\s*", text)
    seconds = float(match[1]) * _SECONDS[match[2].lower()] if match else 0.0
    if seconds <= 0:
        raise RecipeError(f"{option}: expected a time such as 90s, 10m or 1.5h, found {text!r}")
    return seconds
