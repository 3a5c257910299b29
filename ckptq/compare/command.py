"""The command `ckptq compare`: its options, one call, and what is printed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

if TYPE_CHECKING:
    from ckptq.compare import Comparison
    from ckptq.compare.images import Generation
    from ckptq.recipe import Recipe
    from ckptq.sections import Calibration

Report = Literal["html", "json"]
_SAMPLES = "Run both models on"
TextOption = Annotated[list[str] | None, typer.Option("--text", metavar="FILE", help=f"{_SAMPLES} these texts; repeatable.")]
CocoOption = Annotated[
    tuple[str, str] | None, typer.Option("--coco", metavar="IMAGES ANNOTATIONS", help=f"{_SAMPLES} images with captions.")
]
SamplesOption = Annotated[int | None, typer.Option("--samples", metavar="N", min=1, help="How many samples.")]
SeedOption = Annotated[int | None, typer.Option("--seed", metavar="N", help="Which ones.")]
LengthOption = Annotated[int | None, typer.Option("--sequence-length", metavar="N", min=8, help="Tokens of a sample, at most.")]
DeviceOption = Annotated[str, typer.Option("--device", metavar="DEVICE", help="Where to compute: auto, cpu, cuda or cuda:N.")]
MemoryOption = Annotated[str | None, typer.Option("--memory", metavar="SIZE", help="Limit on that device, e.g. 16GB.")]


def compare(
    reference: Annotated[
        str,
        typer.Argument(metavar="REFERENCE", help="A folder, or a Hub id org/name[@revision]: what to judge by."),
    ],
    candidate: Annotated[
        str, typer.Argument(metavar="CANDIDATE", help="The same: what is judged. Or both are folders of images, or videos' frames.")
    ],
    weights_only: Annotated[bool, typer.Option("--weights-only", help="Compare tensors alone: run no samples.")] = False,
    text: TextOption = None,
    coco: CocoOption = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", metavar="RECIPE", help=f"{_SAMPLES} its quality.samples or else calibration; its limits count, too."
        ),
    ] = None,
    samples: SamplesOption = None,
    seed: SeedOption = None,
    sequence_length: LengthOption = None,
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", metavar="OTHER", help="Another candidate, on the same samples: whose KL is smaller?"),
    ] = None,
    fail_on: Annotated[
        list[str] | None,
        typer.Option("--fail-on", metavar="LIMIT", help="Exit code 1 where it holds, e.g. 'kl_mean>0.02'; repeatable."),
    ] = None,
    reference_seconds: Annotated[
        list[float] | None,
        typer.Option("--reference-seconds", metavar="S", min=0, help="Of outputs: what a run took; repeatable, as the next three."),
    ] = None,
    candidate_seconds: Annotated[list[float] | None, typer.Option("--candidate-seconds", metavar="S", min=0)] = None,
    reference_memory: Annotated[
        list[float] | None, typer.Option("--reference-peak-memory-mb", metavar="MIB", min=0, help="Of outputs: its device's peak.")
    ] = None,
    candidate_memory: Annotated[list[float] | None, typer.Option("--candidate-peak-memory-mb", metavar="MIB", min=0)] = None,
    device: DeviceOption = "auto",
    memory: MemoryOption = None,
    format: Annotated[
        Literal["human", "json"], typer.Option("--format", help="human: tables; json: one object on stdout.")
    ] = "human",
    report: Annotated[
        list[str] | None, typer.Option("--report", metavar="FORMAT=FILE", help="Also write html=FILE or json=FILE; repeatable.")
    ] = None,
) -> None:
    """Measure what a candidate costs beside its reference. Exit code 1 where a limit is broken, 2 where it can't be measured."""
    from ckptq.compare import Asked, policy, render
    from ckptq.compare import compare as run
    from ckptq.console import Console
    from ckptq.recipe import load_recipe
    from ckptq.sections import size_option
    from ckptq.writer import write_report

    kept = _destinations(report or ())
    told = load_recipe(recipe) if recipe else None
    limits = [*(told.quality.fail_on if told and told.quality else ()), *(fail_on or ())]
    chosen = {"samples": samples, "seed": seed, "sequence_length": sequence_length}
    asked = Asked(
        reference,
        candidate,
        tuple(policy.parse_policy(limit) for limit in limits),
        *samples_of(text, coco, told, chosen, weights_only=weights_only),
        generations=_generations(reference_seconds, reference_memory, candidate_seconds, candidate_memory),
        device=device,
        memory=size_option("--memory", memory),
        scope=told.scope if told else None,
        baseline=baseline or "",
    )
    console = Console(format)
    found = run(asked, console)
    console.result(render.data(found), lambda: render.show(console, found))
    for path, kind in kept.items():
        write_report(path, _written(kind, found))
    raise typer.Exit(found.exit_code)


def samples_of(
    text: list[str] | None,
    coco: tuple[str, str] | None,
    recipe: Recipe | None,
    given: dict[str, int | None],
    *,
    weights_only: bool = False,
) -> tuple[Calibration | None, str]:
    """(what to run both models on, or None; the option that asked for it). Raises RecipeError for what does not go together.

    given  settings of samples: those that are None were not asked for
    """
    from ckptq.errors import RecipeError
    from ckptq.sections import BuiltinCalibration, CocoCalibration, TextCalibration

    chosen: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    sources = {"--text": bool(text), "--coco": coco is not None, "--recipe": recipe is not None}
    named = [option for option, there in sources.items() if there]
    options = [*named, *(f"--{key.replace('_', '-')}" for key in chosen)]
    if len(named) > 1:
        raise RecipeError(f"{' and '.join(named)}: expected one source of samples")
    if weights_only:
        if odd := [option for option in options if option != "--recipe"]:  # which has limits, too
            raise RecipeError(f"{odd[0]} is for samples, which --weights-only leaves out", hint=f"leave {odd[0]} out")
        return None, ""
    option = next(iter(options), "")
    if text:
        return TextCalibration(source="text", files=text, **chosen), option
    if coco is not None:
        return CocoCalibration(source="coco", images=coco[0], annotations=coco[1], **chosen), option
    if recipe is not None:
        section = recipe.quality.samples if recipe.quality is not None else None
        return (section or recipe.calibration).model_copy(update=chosen), "" if len(options) == 1 else options[1]
    return BuiltinCalibration(source="builtin", **chosen), option


def _generations(*given: list[float] | None) -> tuple[Generation, Generation] | None:
    """Of reference and candidate; None where nothing was supplied."""
    from ckptq.compare.images import Generation

    values = [tuple(numbers or ()) for numbers in given]
    return (Generation(*values[:2]), Generation(*values[2:])) if any(values) else None


def _destinations(options: list[str] | tuple[()]) -> dict[Path, Report]:
    """`--report html=FILE` options as {file: format}. Raises OutputError for another form, or a folder that is not there."""
    from ckptq.errors import OutputError

    found: dict[Path, Report] = {}
    for option in options:
        kind, _, name = option.partition("=")
        path = Path(name)
        if kind not in get_args(Report) or not name:
            raise OutputError(
                f"--report {option}: expected FORMAT=FILE with html or json for the format",
                hint="for example --report html=compare.html",
            )
        if path.is_dir() or not path.parent.is_dir():
            what = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
            raise OutputError(f"--report {option}: can't be written: {what}", hint="make the folder first, and name a file in it")
        found[path] = "html" if kind == "html" else "json"
    return found


def _written(kind: Report, found: Comparison) -> str:
    """The report in that format."""
    if kind == "json":
        from ckptq.compare import render

        return render.text(found)
    from ckptq.compare.report import html

    return html.text(found)
