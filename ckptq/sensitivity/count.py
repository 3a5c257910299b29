"""What there is to rank, and what that takes: known from headers, the tokenizer and the samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckptq.calibration import Sample
from ckptq.calibration.encode import Encoder
from ckptq.checkpoint import Component, read_inventory
from ckptq.errors import RecipeError, UnsupportedError
from ckptq.hub import Source
from ckptq.scopes import Scope
from ckptq.sections import of_models
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


def count(
    asked: Asked, runner: Runner, base: Base | None, opened: Sequence[Source], samples: Sequence[Sample], memory: int
) -> Counted:
    """What there is to do. `memory`: bytes that waiting samples may hold.

    Raises RecipeError for a recipe that does not make what the candidate is, and for more units to keep than there are.
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
    settings = of_models(asked.samples)
    encoder = Encoder(opened[0].root, getattr(settings, "max_pixels", None), settings.sequence_length)
    tokens = sum(encoder.encode(sample)["input_ids"].shape[1] for sample in samples)
    main = [read_inventory(source.root, source.header).main for source in opened]
    work = Work(
        runner.depth,
        len(units),
        _head(main[0], runner.scope),
        sum(component.nbytes for component in main),
        tokens * _waiting(runner.scope.text(main[0].config)),
        memory,
        len(samples),
    )
    parts = measure.plan(asked, work, [unit.layer for unit in runner.units], kv=runner.has_kv)
    return Counted(base, units, runner.has_kv, len(samples), tokens, main[1].nbytes, work, parts)


_HINT = "name the recipe that made it with --recipe"


def _head(component: Component, scope: Scope) -> float:
    """Bytes of the output head, over those of all layers."""
    sizes = {scope.canonical(name): tensor.spec.nbytes for name, tensor in component.tensors.items()}
    layers = sum(size for name, size in sizes.items() if scope.layer_of(name))
    tied = (size for name, size in sizes.items() if name.endswith("embed_tokens.weight"))
    return (sizes.get(f"{scope.head}.weight") or next(tied, 0)) / layers


def _waiting(text: Mapping[str, Any]) -> int:
    """Bytes that a token holds between layers: see ckptq/cost.py."""
    hidden, heads = int(text.get("hidden_size", 0)), int(text.get("num_attention_heads", 1))
    return 4 * hidden + 4 * int(text.get("head_dim") or hidden // heads)
