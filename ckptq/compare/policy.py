"""What a comparison must not show: limits such as `kl_mean>0.02`, over the figures that were measured."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from ckptq.errors import RecipeError
from ckptq.mistakes import close

Part = Literal["weights", "behavior", "baseline", "images"]
METRICS: Mapping[Part, Mapping[str, str]] = MappingProxyType(
    {
        "weights": {
            "weight_cosine_min": "lowest cosine of a tensor with the reference's",
            "weight_relative_l2_max": "largest relative L2 error of a tensor",
            "weight_sqnr_db_min": "lowest signal-to-quantization-noise ratio of a tensor, dB",
            "weights_unmatched": "tensors that one side lacks",
        },
        "behavior": {
            "kl_mean": "KL divergence of the next token's distribution, mean over tokens, nats",
            "kl_mean_low": "lower end of the mean KL's 95 % bootstrap interval over samples",
            "kl_mean_high": "its upper end",
            "kl_p99": "the KL of a token, 99th percentile",
            "kl_max": "the KL of a token, largest",
            "top1_agreement": "share of tokens at which both find the same one likeliest",
            "perplexity_reference": "perplexity of the reference",
            "perplexity_candidate": "perplexity of the candidate",
            "perplexity_ratio": "candidate's perplexity over the reference's",
            "nll_reference": "mean negative log-likelihood of the samples' tokens, nats, of the reference",
            "nll_candidate": "mean negative log-likelihood of the samples' tokens, nats, of the candidate",
            "nll_difference": "the candidate's mean NLL less the reference's",
            "nll_difference_low": "lower end of that difference's 95 % bootstrap interval over samples",
            "nll_difference_high": "its upper end",
            "hidden_relative_l2_last": "relative L2 error of the last layer's hidden states",
        },
        "baseline": {
            "kl_baseline": "mean KL of the baseline, another candidate, on the same samples",
            "kl_difference": "kl_mean less the baseline's: below 0 the candidate is nearer to the reference",
            "kl_difference_low": "lower end of that difference's 95 % bootstrap interval, paired by sample",
            "kl_difference_high": "its upper end",
            "kl_nearer": "share of samples on which the candidate's KL is smaller than the baseline's",
            "kl_nearer_low": "lower end of that share's 95 % bootstrap interval over samples",
            "kl_nearer_high": "its upper end",
        },
        "images": {
            "cosine_similarity": "cosine of all pixels",
            "cosine_similarity_min": "cosine of the worst output",
            "mae": "mean absolute error, in pixel values",
            "mae_max": "mean absolute error of the worst output",
            "mse": "mean squared error",
            "rmse": "root of the mean squared error",
            "max_abs": "largest error of a pixel",
            "l2": "L2 norm of the error",
            "relative_l2": "L2 norm of the error over the reference's",
            "relative_l2_max": "relative L2 error of the worst output",
            "psnr_db": "peak signal-to-noise ratio, dB",
            "psnr_db_min": "peak signal-to-noise ratio of the worst output, dB",
            "avg_generation_time_ratio_candidate_over_reference": "mean seconds a run, candidate over reference",
            "max_peak_memory_ratio_candidate_over_reference": "largest peak of device memory, candidate over reference",
        },
    }
)
"""{what is measured: {metric: its meaning}}. Of images the names are those of vLLM-Omni's similarity tool."""
_ALL = {metric: part for part, metrics in METRICS.items() for metric in metrics}
_BEYOND: Mapping[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_LIMIT = re.compile(r"\s*([A-Za-z]\w*)\s*(>=|<=|>|<)\s*(\S+)\s*")


@dataclass(frozen=True, slots=True)
class Limit:
    """It is broken where `metric op value` holds: `kl_mean > 0.02`."""

    metric: str
    op: str
    value: float

    @property
    def part(self) -> Part:
        """What must be measured for it."""
        return _ALL[self.metric]

    def __str__(self) -> str:
        return f"{self.metric}{self.op}{self.value:g}"


@dataclass(frozen=True, slots=True)
class Judged:
    """A limit with what was found. A NaN is beyond every limit."""

    limit: Limit
    found: float

    @property
    def broken(self) -> bool:
        return math.isnan(self.found) or _BEYOND[self.limit.op](self.found, self.limit.value)

    def __str__(self) -> str:
        return f"{self.limit.metric} is {self.found:.6g}, {'beyond' if self.broken else 'within'} the limit {self.limit}"


def parse_policy(text: str) -> Limit:
    """`kl_mean>0.02` as a Limit. Raises RecipeError for another form, and for a metric that there is not."""
    try:
        return read_limit(text)
    except ValueError as problem:
        raise RecipeError(f"--fail-on: {problem}", hint=f"metrics: {', '.join(_ALL)}") from None


def read_limit(text: str) -> Limit:
    """The same for a recipe. Raises ValueError."""
    match = _LIMIT.fullmatch(text)
    value = _number(match[3]) if match else None
    if match is None or value is None:
        raise ValueError(f"expected METRIC, one of > >= < <=, and a number, as in 'kl_mean>0.02', found {text!r}")
    if match[1] not in _ALL:
        raise ValueError(f"expected a metric that is measured, found {match[1]!r}{close(match[1], _ALL, near_only=True)}")
    return Limit(match[1], match[2], value)


def refuse_unmeasured(limits: Iterable[Limit], missing: Mapping[Part, str]) -> None:
    """Raises RecipeError for a limit on what will not be measured: {part: why}."""
    for limit in limits:
        if limit.part in missing:
            raise RecipeError(f"limit {limit}: {limit.metric} is not measured: {missing[limit.part]}")


def judge(limits: Iterable[Limit], figures: Mapping[str, float]) -> tuple[Judged, ...]:
    """Every limit with what was found. Raises RecipeError for a metric that was not measured."""
    found: list[Judged] = []
    for limit in limits:
        if limit.metric not in figures:
            raise RecipeError(
                f"limit {limit}: {limit.metric} was not measured", hint=f"measured: {', '.join(figures) or 'nothing'}"
            )
        found.append(Judged(limit, figures[limit.metric]))
    return tuple(found)


def broken(limits: Iterable[Limit], figures: Mapping[str, float]) -> list[str]:
    """A sentence for each limit that is broken: metric, value, limit. Raises as `judge`."""
    return [str(judged) for judged in judge(limits, figures) if judged.broken]


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
