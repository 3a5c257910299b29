"""The `quality:` block of a recipe: what a conversion ends with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptq.compare import Asked, Comparison, compare
from ckptq.compare.policy import parse_policy, refuse_unmeasured
from ckptq.console import Console
from ckptq.errors import CkptqError

if TYPE_CHECKING:
    from ckptq.compare.policy import Part
    from ckptq.convert import Report
    from ckptq.prepare import Prepared
    from ckptq.sections import Calibration


def refuse_unmeasured_limits(job: Prepared) -> None:
    """Raises RecipeError for a limit on what the comparison will not measure, before the hours that a conversion may take."""
    if job.recipe.quality is not None:
        limits = tuple(parse_policy(limit) for limit in job.recipe.quality.fail_on)
        missing: dict[Part, str] = {"baseline": "a conversion has none beside its output", "images": "these are checkpoints"}
        refuse_unmeasured(limits, missing | ({"behavior": _OF_PIPELINES} if _samples(job) is None else {}))


_OF_PIPELINES = "what a pipeline does is seen by its outputs: compare two folders of them"


def _samples(job: Prepared) -> Calibration | None:
    """What both models are run on: the block's samples, else those of the calibration; of a pipeline none."""
    if job.inventory.pipeline is not None or job.recipe.quality is None:
        return None
    return job.recipe.quality.samples or job.recipe.calibration


def judge_output(job: Prepared, report: Report, device: str, memory: int | None, console: Console) -> Comparison | None:
    """The published output beside its source, against the recipe's limits; None where the recipe has no such block.

    Raises as `compare` does, saying that the output is there. Of a pipeline weights alone are compared.
    """
    quality = job.recipe.quality
    if quality is None:
        return None
    limits = tuple(parse_policy(limit) for limit in quality.fail_on)
    source = job.source.label or str(job.source.root)
    try:
        return compare(Asked(source, str(report.output), limits, _samples(job), device=device, memory=memory), console)
    except CkptqError as problem:
        problem.args = (f"{report.output} is written, but can't be compared with its source: {problem}",)
        raise
