"""Both models on the samples that were asked for, and what came of it in figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ckptq.calibration import load_samples
from ckptq.console import Console
from ckptq.convert import resolve_device
from ckptq.sections import Calibration, of_models

if TYPE_CHECKING:
    from ckptq.compare.behavior import Behavior
    from ckptq.scopes import Scope

DRAWS, SEED = 2000, 0
"""Of the bootstrap: with 2000 draws the ends of an interval vary by a few percent of its width."""


def measure(
    roots: Sequence[Path],
    settings: Calibration,
    device: str,
    memory: int | None,
    console: Console,
    scope: Scope | None = None,
) -> tuple[Behavior, dict[str, float]]:
    """(what the samples showed of the candidate, its figures). `memory`: a limit on what the device gives.

    roots  of the reference, the candidate and, if there is one, a baseline, which runs after it    scope  see measure_behavior

    Raises RecipeError for samples of a denoiser, CalibrationError where there are none, UnsupportedError for what can't be run.
    """
    settings = of_models(settings)
    import torch

    from ckptq.compare.behavior import measure_behavior
    from ckptq.compare.sides import open_pair

    samples = load_samples(settings)
    where = torch.device(resolve_device(device))
    for root in roots[2:]:  # what is wrong with a baseline is told before the candidate has run
        with open_pair(roots[0], root, where, scope):
            pass
    found, *baseline = [
        measure_behavior(
            roots[0],
            root,
            samples,
            sequence_length=settings.sequence_length,
            max_pixels=getattr(settings, "max_pixels", None),
            device=where,
            memory=None,
            limit=memory,
            console=console,
            scope=scope,
        )
        for root in roots[1:]
    ]
    return found, figures(found) | (against(found, baseline[0]) if baseline else {})


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
        "perplexity_reference": _exp(means[0]),
        "perplexity_candidate": _exp(means[1]),
        "perplexity_ratio": _exp(means[1] - means[0]),
        "nll_reference": means[0],
        "nll_candidate": means[1],
        "nll_difference": means[1] - means[0],
        **{f"nll_difference_{end}": value for end, value in zip(ends, losses, strict=False)},
        "hidden_relative_l2_last": found.layers[-1].hidden.relative_l2,
    }


def _exp(value: float) -> float:
    """Infinite where math.exp raises: of a mean loss above 709."""
    return math.exp(value) if value < 709 else value * math.inf


def against(found: Behavior, baseline: Behavior) -> dict[str, float]:
    """The same of a candidate and of a baseline, both beside one reference on the same samples: whose KL is smaller.

    A few tokens carry the mean KL, as they do the mean NLL; on how many samples it is smaller depends on none of them.
    """
    tokens = [sample.tokens for sample in found.samples]
    pairs = [(ours.kl_mean, theirs.kl_mean) for ours, theirs in zip(found.samples, baseline.samples, strict=True)]
    nearer = [(ours < theirs) + (ours == theirs) / 2 for ours, theirs in pairs]
    means = [math.fsum(behavior.kl) / len(behavior.kl) for behavior in (found, baseline)]
    values = {"kl_difference": means[0] - means[1], "kl_nearer": math.fsum(nearer) / len(nearer)}
    ends = {
        "kl_difference": interval(tokens, [ours - theirs for ours, theirs in pairs]),
        "kl_nearer": interval([1] * len(nearer), nearer),
    }
    figures = {"kl_baseline": means[1]}
    for name, value in values.items():
        figures |= {name: value, **dict(zip((f"{name}_low", f"{name}_high"), ends[name], strict=False))}
    return figures


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
