"""Both models on the samples that were asked for, and what came of it in figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ckptq import cost
from ckptq.calibration import load_samples
from ckptq.console import Console
from ckptq.convert import resolve_device
from ckptq.sections import Calibration, of_models

if TYPE_CHECKING:
    from ckptq.compare.behavior import Behavior

DRAWS, SEED = 2000, 0
"""Of the bootstrap: with 2000 draws the ends of an interval vary by a few percent of its width."""
_SHARE = 0.8
"""Of the free memory, where no limit is given."""


def measure(
    reference: Path, candidate: Path, settings: Calibration, device: str, memory: int | None, console: Console
) -> tuple[Behavior, dict[str, float]]:
    """(what the samples showed, its figures). Half of `memory` is for what waits between layers.

    Raises RecipeError for samples of a denoiser, CalibrationError where there are none, UnsupportedError for what can't be run.
    """
    settings = of_models(settings)
    import torch

    from ckptq.compare.behavior import measure_behavior

    samples = load_samples(settings)
    where = torch.device(resolve_device(device))
    free = cost.available_memory() if where.type == "cpu" else torch.cuda.mem_get_info(where)[0]
    found = measure_behavior(
        reference,
        candidate,
        samples,
        sequence_length=settings.sequence_length,
        max_pixels=getattr(settings, "max_pixels", None),
        device=where,
        memory=(memory or int(_SHARE * free)) // 2,
        console=console,
    )
    return found, figures(found)


def figures(found: Behavior) -> dict[str, float]:
    """{metric: value}, as policy.METRICS names them: over judged tokens, whichever sample they are of."""
    import numpy as np

    kl = np.array(found.kl)
    reference, candidate = np.array(found.nll_reference), np.array(found.nll_candidate)
    means = float(reference.mean()), float(candidate.mean())
    tokens = [sample.tokens for sample in found.samples]
    ends = ("low", "high")
    apart = interval(tokens, [sample.kl_mean for sample in found.samples])
    losses = interval(tokens, [sample.nll_candidate - sample.nll_reference for sample in found.samples])
    return {
        "kl_mean": float(kl.mean()),
        **{f"kl_mean_{end}": value for end, value in zip(ends, apart, strict=False)},
        "kl_p99": float(np.quantile(kl, 0.99)),
        "kl_max": float(kl.max()),
        "top1_agreement": float(np.mean(found.same_top)),
        "perplexity_reference": math.exp(means[0]),
        "perplexity_candidate": math.exp(means[1]),
        "perplexity_ratio": math.exp(means[1] - means[0]),
        "nll_reference": means[0],
        "nll_candidate": means[1],
        "nll_difference": means[1] - means[0],
        **{f"nll_difference_{end}": value for end, value in zip(ends, losses, strict=False)},
        "hidden_relative_l2_last": found.layers[-1].hidden.relative_l2,
    }


def interval(tokens: Sequence[int], means: Sequence[float]) -> tuple[float, ...]:
    """The ends of the 95 % interval of a mean over tokens: percentiles 2.5 and 97.5 over draws of whole samples.

    tokens  judged ones of each sample    means  over each sample's tokens

    Tokens of one sample go together, so samples are what is drawn. () for fewer than two.
    """
    import numpy as np

    if len(tokens) < 2:
        return ()
    counts = np.array(tokens)
    sums = counts * np.array(means)
    drawn = np.random.default_rng(SEED).integers(0, len(counts), (DRAWS, len(counts)))
    low, high = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), (0.025, 0.975))
    return float(low), float(high)
