"""`ckptq compare`: what a candidate costs beside its reference, and the limits that it must keep. Light: imports no numpy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptq import __version__

if TYPE_CHECKING:
    from ckptq.checkpoint import Inventory
    from ckptq.compare.behavior import Behavior
    from ckptq.compare.images import Generation, ImageMetrics
    from ckptq.compare.matched import Unmatched
    from ckptq.compare.policy import Judged, Limit, Part
    from ckptq.compare.weights import WeightError
    from ckptq.console import Console
    from ckptq.scopes import Scope
    from ckptq.sections import Calibration

ONLY_WEIGHTS = "left out by --weights-only"
NO_BASELINE = "it takes --baseline, another candidate"
PACKAGES = ("torch", "transformers", "numpy", "pillow")


@dataclass(frozen=True, slots=True)
class Asked:
    """What a comparison was asked for. `reference` and `candidate` are as the user named them.

    samples      what both models are run on; None for weights alone
    option       that asked for these samples; "" where nobody did
    generations  what the outputs of reference and candidate took, of two folders of outputs
    scope        that a recipe spells out for both
    baseline     another candidate, which the samples are run on, too; "" for none
    """

    reference: str
    candidate: str
    limits: tuple[Limit, ...] = ()
    samples: Calibration | None = None
    option: str = ""
    generations: tuple[Generation, Generation] | None = None
    device: str = "auto"
    memory: int | None = None
    scope: Scope | None = None
    baseline: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """All that a report says.

    weights    worst first, or None where these are no checkpoints
    unmatched  tensors that one side lacks
    figures    {metric: value}, what limits speak of: the metrics of policy.METRICS that were measured
    limits     each with what was found
    sizes      bytes of the weights, or of outputs the number of them: {"reference": ..., "candidate": ...}
    recipe     by which the candidate was converted, as its ckptq.json has it; None where it has none
    baseline   another candidate, as the user named it, of which figures tell how near it is; "" for none
    skipped    {"weights", "behavior" or "images": why it was not measured}
    """

    reference: str
    candidate: str
    weights: tuple[WeightError, ...] | None = None
    unmatched: tuple[Unmatched, ...] = ()
    behavior: Behavior | None = None
    images: ImageMetrics | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    limits: tuple[Judged, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] | None = None
    skipped: Mapping[Part, str] = field(default_factory=dict)
    baseline: str = ""

    @property
    def exit_code(self) -> int:
        """1 where a limit is broken, and where what was run gave no numbers."""
        return int(bool(self.undefined) or any(judged.broken for judged in self.limits))

    @property
    def undefined(self) -> str:
        """That a model gives NaN or infinities on the samples, and from where on; "" where both give numbers."""
        losses = {side: self.figures.get(f"nll_{side}", 0.0) for side in ("reference", "candidate")}
        side = next((side for side, loss in losses.items() if not math.isfinite(loss)), "")
        if self.behavior is None or not side:
            return ""
        odd = (gap.layer for gap in self.behavior.layers if not math.isfinite(gap.hidden.relative_l2))
        first = f", from layer {layer} on" if (layer := next(odd, None)) is not None else ""
        return f"the {side}, {getattr(self, side)}, gives NaN or infinities on these samples{first}"


def compare(asked: Asked, console: Console) -> Comparison:
    """Measures what was asked for, two checkpoints or two folders of outputs.

    Raises SourceError for what can't be read or compared, RecipeError for a limit on what is not measured.
    """
    from ckptq.compare.images import holds_outputs
    from ckptq.errors import SourceError

    folders = [Path(name).expanduser() for name in (asked.reference, asked.candidate)]
    outputs = [holds_outputs(folder) for folder in folders]
    if all(outputs):
        return _outputs(asked, folders[0], folders[1], console)
    if any(outputs) and all(folder.is_dir() for folder in folders):
        one, other = folders if outputs[0] else folders[::-1]
        raise SourceError(
            f"{one}: a folder of images, and {other} is none", hint="compare two checkpoints, or two folders of images or frames"
        )
    return _checkpoints(asked, console)


def _outputs(asked: Asked, reference: Path, candidate: Path, console: Console) -> Comparison:
    from ckptq.compare import images, policy
    from ckptq.errors import RecipeError

    if option := asked.option or ("--baseline" if asked.baseline else ""):
        raise RecipeError(f"{option} is for checkpoints: these are folders of outputs", hint=f"leave {option} out")
    skipped: dict[policy.Part, str] = dict.fromkeys(("weights", "behavior"), "these are folders of outputs")
    policy.refuse_unmeasured(asked.limits, skipped)
    generations = asked.generations or (images.Generation(), images.Generation())
    with console.stage("images", len(images.output_names(reference)), "steps") as advance:
        found = images.compare_images(
            reference,
            candidate,
            reference_generation=generations[0],
            candidate_generation=generations[1],
            advance=advance,
        )
    figures = images.figures(found)
    limits = policy.judge(asked.limits, figures)
    sizes = dict.fromkeys(("reference", "candidate"), len(found.outputs))
    return Comparison(
        asked.reference, asked.candidate, images=found, figures=figures, limits=limits, sizes=sizes, versions=versions(),
        skipped=skipped,
    )  # fmt: skip


def _checkpoints(asked: Asked, console: Console) -> Comparison:
    from ckptq import hub
    from ckptq.checkpoint import read_inventory
    from ckptq.compare import policy, sampled, weights
    from ckptq.compare.matched import match
    from ckptq.errors import RecipeError
    from ckptq.quantized import describe
    from ckptq.validate import is_diffusion

    if asked.generations is not None:
        raise RecipeError("seconds and peak memory are for folders of outputs: these are checkpoints")
    skipped: dict[policy.Part, str] = {"images": "these are checkpoints"}
    skipped |= {"behavior": ONLY_WEIGHTS} if asked.samples is None else {}
    policy.refuse_unmeasured(asked.limits, skipped if asked.baseline else {**skipped, "baseline": NO_BASELINE})
    if asked.baseline and asked.samples is None:
        raise RecipeError("--baseline is for samples, which --weights-only leaves out", hint="leave one of them out")
    names = (asked.reference, asked.candidate, *([asked.baseline] if asked.baseline else []))
    opened = [hub.fetch(name, weights=True) for name in names]
    inventories = [read_inventory(source.root, source.header, strict=False) for source in opened[:2]]
    if opened[0].root.resolve() == opened[1].root.resolve():
        console.warn("reference and candidate are one folder")
    elif describe(inventories[0].components[0]) and not describe(inventories[1].components[0]):
        console.warn(
            f"{asked.reference}, the reference, is quantized, and {asked.candidate}, the candidate, is not: are they swapped?"
        )
    if is_diffusion(opened[0].root):
        skipped["behavior"] = "what a pipeline does is seen by its outputs: compare two folders of them"
        policy.refuse_unmeasured(asked.limits, skipped)
        if option := asked.option or ("--baseline" if asked.baseline else ""):
            raise RecipeError(f"{option} is for language models: {skipped['behavior']}", hint="add --weights-only")
    found = match(inventories[0], inventories[1])
    behavior, more = None, dict[str, float]()
    if asked.samples is not None and "behavior" not in skipped:  # first: what can't be run is told before all weights are read
        roots = [source.root for source in opened]
        behavior, more = sampled.measure(roots, asked.samples, asked.device, asked.memory, console, asked.scope)
    with console.stage("weights", found.nbytes, "bytes") as advance:
        errors = weights.worst_first(weights.weight_errors(found, advance))
    figures = weights.figures(errors, len(found.unmatched)) | more
    return Comparison(
        asked.reference,
        asked.candidate,
        tuple(errors),
        found.unmatched,
        behavior,
        None,
        figures,
        policy.judge(asked.limits, figures),
        {side: _nbytes(at) for side, at in zip(("reference", "candidate"), inventories, strict=True)},
        versions(),
        settings_of(asked.samples) if behavior is not None and asked.samples is not None else {},
        recorded_recipe(opened[1].root),
        skipped,
        asked.baseline,
    )


def _nbytes(inventory: Inventory) -> int:
    return sum(component.nbytes for component in inventory.components)


def recorded_recipe(folder: Path) -> Mapping[str, Any] | None:
    """The recipe in a conversion's ckptq.json, without the paths of its sources. Another tool's export has none."""
    from ckptq.validators import record

    found: Any = record.body(folder)
    for key in ("job", "recipe"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else None


def settings_of(samples: Calibration) -> dict[str, Any]:
    """What the samples were: without paths."""
    return samples.model_dump(mode="json", exclude={"files", "images", "annotations", "save_every", "all_experts"})


def versions() -> dict[str, str]:
    """Of what figures depend on."""
    import importlib.metadata

    return {"ckptq": __version__, **{name: importlib.metadata.version(name) for name in PACKAGES}}
