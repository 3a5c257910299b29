"""A comparison as one HTML file that opens offline, for people: what `--report html=FILE` writes.

There is no script in it, for what shows the artifacts of a CI run blocks scripts; no font and no address outside it, and a
Content-Security-Policy that keeps it so. Every name and every text is the checkpoint's or the user's and is trusted in nothing:
jinja2 escapes all of them, `svg.py` those in plots, after `safe_text` took what would turn the text around them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import yaml
from markupsafe import Markup

from ckptq.compare import Comparison
from ckptq.compare.images import THRESHOLDS, grade
from ckptq.compare.policy import METRICS
from ckptq.compare.render import nearer, number
from ckptq.compare.report import grids, pictures, plots
from ckptq.console import size
from ckptq.reports import safe_text

if TYPE_CHECKING:
    from ckptq.compare.behavior import Behavior, SampleGap, TokenGap, WorstSample
    from ckptq.compare.images import ImageMetrics
    from ckptq.compare.weights import WeightError

WORST, OUTPUTS, APART, NAMES = 50, 6, 8, 100
"""Tensors, outputs with pictures, tokens of a sample and tensors without a partner that are shown; JSON has all."""
STEPS = (1e-3, 1e-2, 1e-1, 1.0)
"""From where on a token's KL has the next color, the same in every report."""
_PARTS = re.compile(r"(?<=[/_])|(?=\.[A-Za-z])")
_LIGHT, _DARK = ("YlOrRd", 0.1, 1.0), ("inferno", 0.2, 0.97)
"""Colors of the heat maps: (matplotlib's name, from, to). On a dark page the large is bright, on a light one it is dark."""


def text(found: Comparison) -> str:
    """The page. Reads the images of the worst samples and outputs once more; one that is gone is left out."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ckptq.compare.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: safe_text(value.replace("\t", "    "), lines=True) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, size=size, step=step, broken_up=broken_up)
    page = {
        "found": found,
        "verdict": _verdict(found),
        "nearer": nearer(found) if found.baseline else "",
        "tiles": list(_tiles(found)),
        "meanings": {metric: meaning for metrics in METRICS.values() for metric, meaning in metrics.items()},
        "grade": grade,
        "weights": None if found.weights is None else _weights(found.weights),
        "behavior": None if found.behavior is None else _behavior(found.behavior, found.figures),
        "images": None if found.images is None else _outputs(found, found.images),
        "recipe": yaml.safe_dump(_plain(found.recipe), sort_keys=False, allow_unicode=True).splitlines() if found.recipe else None,
        "ramps": plots.ramp((_LIGHT, _DARK)),
        "steps": STEPS,
        "shown": {"names": NAMES},
    }
    return environment.get_template("page.html").render(page)


def step(kl: float) -> int:
    """The number of STEPS that it reaches; what is no number reaches all."""
    return len(STEPS) if math.isnan(kl) else sum(kl >= limit for limit in STEPS)


def broken_up(name: str) -> Markup:
    """A name or a path that may break where its parts meet."""
    return Markup("<wbr>").join(part for part in _PARTS.split(safe_text(name)) if part)


def _plain(value: Any) -> Any:
    """What YAML can say, of what a ckptq.json has."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


@dataclass(frozen=True, slots=True)
class Tile:
    """A figure that is worth a look before all others."""

    name: str
    value: str
    more: str = ""


def _verdict(found: Comparison) -> tuple[str, str]:
    """(its class: "bad", "good" or "none"; in words)."""
    broken, count = sum(judged.broken for judged in found.limits), len(found.limits)
    if found.undefined:
        return "bad", f"Failed: {found.undefined}"
    if not count:
        return "none", "Measured. No limit was given, so there is no verdict."
    limits = f"{count} limit{'s' * (count > 1)}"
    return ("bad", f"Failed: {broken} of {limits} broken") if broken else ("good", f"Passed: {limits} kept")


def _tiles(found: Comparison) -> Iterator[Tile]:
    figures = found.figures
    if found.behavior is not None:
        yield from _behavior_tiles(figures, found.behavior)
    if found.weights:
        worst = found.weights[0]
        yield Tile(
            "Worst tensor, relative L2", number(worst.relative_l2), f"{worst.name}: {worst.note}" if worst.note else worst.name
        )
    if found.images is not None:
        yield from _output_tiles(figures, found.images)
    elif found.sizes:
        before, after = found.sizes["reference"], found.sizes["candidate"]
        yield Tile("Size", f"{after / before:.1%}" if before else size(after), f"{size(after)} against {size(before)}")


def _behavior_tiles(figures: Mapping[str, float], behavior: Behavior) -> Iterator[Tile]:
    count = len(behavior.samples)
    yield Tile("KL divergence, mean", number(figures["kl_mean"]), _between(figures, "kl_mean") or "nats a token, of one sample")
    tokens = f"of {len(behavior.kl)} tokens in {count} sample{'s' * (count != 1)}"
    yield Tile("Same likeliest token", f"{figures['top1_agreement']:.2%}", tokens)
    change = f"{number(figures['perplexity_reference'])} → {number(figures['perplexity_candidate'])}"
    yield Tile("Perplexity ratio", number(figures["perplexity_ratio"]), change)
    said = _between(figures, "nll_difference")
    if said:
        low, high = figures["nll_difference_low"], figures["nll_difference_high"]
        differ = low > 0 or high < 0
        told = ", which does not hold 0: they differ" if differ else ", which holds 0: no difference is proven"
        said += told if math.isfinite(low + high) else ""
    yield Tile("Change of mean NLL", f"{figures['nll_difference']:+.4g}", said or "nats a token, of one sample")


def _between(figures: Mapping[str, float], metric: str) -> str:
    low, high = (figures.get(f"{metric}_{end}") for end in ("low", "high"))
    return f"95 % interval {number(low)} to {number(high)}" if low is not None and high is not None else ""


def _output_tiles(figures: Mapping[str, float], images: ImageMetrics) -> Iterator[Tile]:
    for metric, name in (("psnr_db", "PSNR, dB"), ("cosine_similarity", "Cosine"), ("mae", "Mean absolute error")):
        if metric in figures:
            end = "max" if metric == "mae" else "min"
            yield Tile(name, number(figures[metric]), f"of the worst output {number(figures[f'{metric}_{end}'])}")
    yield Tile("Relative L2", number(figures["relative_l2"]), f"of {len(images.outputs)} outputs together")
    for metric, name in (("avg_generation_time", "Time"), ("max_peak_memory", "Peak memory")):
        if (value := figures.get(f"{metric}_ratio_candidate_over_reference")) is not None:
            yield Tile(name, f"{value:.1%}", "of the reference's")


def _weights(errors: Sequence[WeightError]) -> dict[str, Any]:
    grid = grids.of_weights(errors)
    differ = [error for error in errors if error.relative_l2 != 0]
    label = f"Relative L2 error of weights by module type and layer; the worst is {number(errors[0].relative_l2) if errors else 0}."
    return {
        "grid": grid,
        "map": plots.heat_map(grid, "weights", label) if grid.rows else None,
        "worst": differ[:WORST],
        "differ": len(differ),
        "stored": list(_stored(errors)),
    }


def _stored(errors: Sequence[WeightError]) -> Iterator[tuple[str, str, int, int, float]]:
    """(stack of layers or tower, what the candidate stores, tensors, of these equal, the worst relative L2)."""
    groups: dict[tuple[str, str], list[float]] = {}
    for error in errors:
        part = grids.placed(error.name)[0] or "outside of layers"
        groups.setdefault((part, error.coding or error.dtype), []).append(error.relative_l2)
    for (part, coding), values in sorted(groups.items()):
        yield part, coding, len(values), values.count(0.0), grids.worst(values)


def _behavior(found: Behavior, figures: Mapping[str, float]) -> dict[str, Any]:
    grid = grids.of_behavior(found)
    marks = {"mean": figures["kl_mean"], "p99": figures["kl_p99"]}
    last = number(found.layers[-1].hidden.relative_l2) if found.layers else "nan"
    label = f"Relative L2 error by module and layer; of the last layer's hidden states {last}."
    return {
        "grid": grid,
        "map": plots.heat_map(grid, "behavior", label),
        "histogram": plots.kl_histogram(found.kl, marks, f"Histogram of the KL divergence of {len(found.kl)} tokens."),
        "losses": plots.losses(found.samples, "Mean NLL of each sample, by the reference and by the candidate."),
        "sorted": plots.sorted_kl(found.samples, "Mean KL of each sample, largest first."),
        "layers": [("in", found.entering), *((str(layer.layer), layer.hidden) for layer in found.layers)],
        "samples": [_sample(worst, found.samples) for worst in found.worst],
    }


@dataclass(frozen=True, slots=True)
class Told:
    """A sample, token by token. `apart`: the tokens with the largest KL, with their places and the text before them."""

    sample: WorstSample
    gap: SampleGap | None
    picture: Markup | None
    apart: tuple[tuple[int, str, TokenGap], ...]


def _sample(worst: WorstSample, samples: Sequence[SampleGap]) -> Told:
    order = sorted(range(len(worst.tokens)), key=lambda at: -math.inf if math.isnan(kl := worst.tokens[at].kl) else -kl)[:APART]
    before = ["".join(token.text for token in worst.tokens[max(0, at - 6) : at]) for at in order]
    apart = tuple((at, text, worst.tokens[at]) for at, text in zip(order, before, strict=True))
    gap = max((sample for sample in samples if sample.name == worst.name), key=lambda sample: sample.kl_mean, default=None)
    return Told(worst, gap, pictures.small(worst.image) if worst.image is not None else None, apart)


def _outputs(found: Comparison, images: ImageMetrics) -> dict[str, Any]:
    reference, candidate = (Path(name).expanduser() for name in (found.reference, found.candidate))
    levels = ("recommended", "good", "strict", "target")
    limits = []
    for metric, table in {m: t for tables in THRESHOLDS.values() for m, t in tables.items()}.items():
        if metric in found.figures:
            bounds = {name.rpartition("_")[0]: (name.rpartition("_")[2], limit) for name, limit in table.items()}
            shown = [f"{'≥' if b[0] == 'min' else '≤'} {b[1]:g}" if (b := bounds.get(name)) else "" for name in levels]
            limits.append((metric, found.figures[metric], shown, grade(metric, found.figures[metric])))
    return {
        "pictures": [
            (pictures.beside(reference, candidate, name), images.outputs[name]) for name in list(images.outputs)[:OUTPUTS]
        ],
        "levels": levels,
        "limits": limits,
        "outputs": list(images.outputs.items())[:WORST],
        "taken": [("reference", images.reference_generation), ("candidate", images.candidate_generation)],
    }
