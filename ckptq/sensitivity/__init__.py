"""`ckptq sensitivity`: what quantizing each unit alone costs, and the recipe that keeps the worst. Light: imports no numpy.

A unit is what a server can leave out alone: the shards of a fused linear of one layer, or all routed experts of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckptq.console import Console
    from ckptq.sections import Calibration
    from ckptq.sensitivity.choose import Kl, Ranked
    from ckptq.sensitivity.cost import Work
    from ckptq.sensitivity.recipe import Base
    from ckptq.sensitivity.units import Unit

EXACT = 16
"""Units whose KL is measured where nothing else is asked for."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a ranking was asked for. `reference` and `candidate` are as the user named them.

    samples  what both are run on               recipe  by which the candidate was made, where its ckptq.json does not tell
    keep     how many units the recipe keeps    limit   the KL that it must meet; one of these or none
    exact    units whose KL is measured; None for all
    budget   seconds
    """

    reference: str
    candidate: str
    samples: Calibration
    recipe: str | None = None
    keep: int | None = None
    limit: float | None = None
    exact: int | None = EXACT
    budget: float | None = None
    device: str = "auto"
    memory: int | None = None

    @property
    def chooses(self) -> bool:
        """Whether a recipe is to come of it."""
        return self.keep is not None or self.limit is not None


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the work.

    forwards  each is all samples through all layers of one model      passes   of the samples, side by side in all branches
    nbytes    read of both checkpoints, in all passes                  seconds  None before any of it was timed
    """

    name: str
    forwards: float
    passes: int
    nbytes: int
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Counted:
    """What there is to do, known before anything is computed.

    base    by which the candidate was made; None where nobody says, and no recipe is asked for
    tokens  of all samples, prompts and images included
    stored  bytes of the candidate's weights                 kv      whether it has an FP8 KV cache
    parts   of the work, at most
    """

    base: Base | None
    units: Mapping[str, Unit]
    kv: bool
    samples: int
    tokens: int
    stored: int
    work: Work
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Point:
    """A set of units that stay as they are, and what quantizing the others costs. `nbytes`: of the output's weights."""

    kept: tuple[str, ...]
    kl: Kl
    nbytes: int


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """All that a report says.

    ranking   worst first; for --kl sets are kept in another order: by KL per byte
    whole     the candidate itself         cache  with its FP8 KV cache alone; None where it has none
    curve     sets that were measured, by the number of units that they keep, from none on
    spent     what the work took, and what was `expected` after the first layer
    notes     what the budget left out, and what else a reader of the figures should know
    output    the folder that `recipe`, YAML, names; both None where there is nothing to keep
    """

    asked: Asked
    counted: Counted
    ranking: tuple[Ranked, ...]
    whole: Kl
    cache: Kl | None
    curve: tuple[Point, ...]
    spent: tuple[Part, ...]
    expected: tuple[Part, ...]
    notes: tuple[str, ...]
    recipe: str | None = None
    output: str | None = None

    @property
    def chosen(self) -> Point | None:
        """The set that was asked for; None where none was, or no measured one meets the limit."""
        if self.asked.keep is not None:
            return next(point for point in self.curve if len(point.kept) == self.asked.keep)
        limit = self.asked.limit
        good = [point for point in self.curve if limit is not None and point.kl.mean <= limit]
        return min(good, key=lambda point: point.nbytes, default=None)

    @property
    def exit_code(self) -> int:
        """1 where the limit can't be met."""
        return int(self.asked.limit is not None and self.chosen is None)


def sensitivity(asked: Asked, console: Console, tell: Callable[[Counted], None], *, dry_run: bool = False) -> Sensitivity | None:
    """Counts the work, which `tell` is told, and does it; None where it shall not be done.

    Raises RecipeError for what does not go together and for a budget that is too small, SourceError and UnsupportedError for
    checkpoints that can't be read or measured.
    """
    import torch

    from ckptq import hub
    from ckptq.calibration import load_samples
    from ckptq.checkpoint import read_inventory
    from ckptq.convert import resolve_device
    from ckptq.recipe import load_recipe
    from ckptq.sections import of_models
    from ckptq.sensitivity import count, measure, recipe
    from ckptq.sensitivity.branches import running
    from ckptq.sensitivity.cost import Clock

    clock = Clock(asked.budget)
    settings = of_models(asked.samples)
    opened = [hub.fetch(name, weights=True) for name in (asked.reference, asked.candidate)]
    count.refuse_pipelines(asked, opened)
    for source in opened:  # what is no checkpoint is told before what has no tokenizer
        read_inventory(source.root, source.header, strict=False)
    told = load_recipe(asked.recipe) if asked.recipe else None
    samples = load_samples(settings)
    where = torch.device(resolve_device(asked.device))
    with running(
        opened[0].root,
        opened[1].root,
        samples,
        sequence_length=settings.sequence_length,
        max_pixels=getattr(settings, "max_pixels", None),
        device=where,
        memory=None,
        limit=asked.memory,
        console=console,
        scope=told.scope if told else None,
    ) as runner:
        base = recipe.find_base(asked.reference, asked.candidate, opened[1].root, asked.recipe, needed=asked.chooses)
        counted = count.count(asked, runner, base)
        tell(counted)
        if dry_run:
            return None
        found = measure.measure(asked, counted, runner, clock, console)
    return recipe.answer(found)
