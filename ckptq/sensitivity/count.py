"""What there is to rank, and what that takes: known from headers, the tokenizer and the samples."""

from __future__ import annotations

from collections.abc import Sequence

from ckptq import cost
from ckptq.checkpoint import Component
from ckptq.errors import RecipeError, UnsupportedError
from ckptq.hub import Source
from ckptq.scopes import Scope
from ckptq.sensitivity import Asked, Counted, measure
from ckptq.sensitivity.branches import Runner
from ckptq.sensitivity.cost import Work
from ckptq.sensitivity.recipe import Base, reached
from ckptq.validate import is_diffusion


def refuse_pipelines(asked: Asked, opened: Sequence[Source]) -> None:
    """Raises UnsupportedError where one is a diffusion pipeline."""
    for name, source in zip((asked.reference, asked.candidate), opened, strict=True):
        if is_diffusion(source.root):
            raise UnsupportedError(f"{name}: a pipeline: what is ranked here are the layers of language models")


def count(asked: Asked, runner: Runner, base: Base | None) -> Counted:
    """What there is to do. Raises RecipeError for a recipe that does not make what the candidate is, and for more units to keep
    than there are, CalibrationError as `Runner.lengths`.
    """
    units = {unit.name: unit for unit in runner.units}
    if base is not None:
        patterns = [pattern for unit in runner.units for pattern in unit.patterns]
        if odd := sorted(base.quantized - reached(patterns, base.quantized)):
            raise RecipeError(f"the recipe quantizes {odd[0]}, which {asked.candidate} does not: it is another's", hint=_HINT)
        for unit in runner.units:
            if not reached(unit.patterns, base.quantized):
                raise RecipeError(f"the recipe keeps {unit.name}, which {asked.candidate} quantizes: it is another's", hint=_HINT)
    if asked.keep is not None and asked.keep >= len(units):
        raise RecipeError(
            f"--keep {asked.keep}: the candidate quantizes {len(units)} units, and one of them must stay so",
            hint=f"keep {len(units) - 1} at most" if len(units) > 1 else None,
        )
    lengths, sides = runner.lengths(), (runner.reference, runner.candidate)
    stored = [side.stored.nbytes for side in sides]
    work = Work(
        runner.depth,
        len(units),
        _head(sides[0].component, sides[0].scope),
        sum(stored),
        cost.flowing(sides[0].component, sides[0].scope, sum(lengths))[0],
        runner.memory,
        len(lengths),
    )
    parts = measure.plan(asked, work, [unit.layer for unit in runner.units], kv=runner.has_kv)
    return Counted(base, units, runner.has_kv, len(lengths), sum(lengths), stored[1], work, parts)


_HINT = "name the recipe that made it with --recipe"


def _head(component: Component, scope: Scope) -> float:
    """Bytes of the output head, over those of all layers."""
    sizes = {scope.canonical(name): tensor.spec.nbytes for name, tensor in component.tensors.items()}
    layers = sum(size for name, size in sizes.items() if scope.layer_of(name))
    tied = (size for name, size in sizes.items() if name.endswith("embed_tokens.weight"))
    return (sizes.get(f"{scope.head}.weight") or next(tied, 0)) / layers
