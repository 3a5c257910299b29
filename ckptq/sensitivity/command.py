"""The command `ckptq sensitivity`: its options, one call, and what is printed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ckptq.compare.command import (
    CocoOption,
    DeviceOption,
    LengthOption,
    MemoryOption,
    SamplesOption,
    SeedOption,
    TextOption,
    samples_of,
)

if TYPE_CHECKING:
    from ckptq.sensitivity import Counted


def sensitivity(
    reference: Annotated[
        str, typer.Argument(metavar="REFERENCE", help="A folder, or a Hub id org/name[@revision]: what was converted.")
    ],
    candidate: Annotated[str, typer.Argument(metavar="CANDIDATE", help="The same: what it was converted to.")],
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", metavar="RECIPE", help="By which CANDIDATE was made, where its ckptq.json does not say."),
    ] = None,
    keep: Annotated[
        int | None, typer.Option("--keep", metavar="N", min=1, help="Print the recipe that keeps the N units that cost the most.")
    ] = None,
    kl: Annotated[
        float | None,
        typer.Option("--kl", metavar="LIMIT", help="Print the recipe of the smallest output found whose mean KL is at most this."),
    ] = None,
    exact: Annotated[
        str | None,
        typer.Option("--exact", metavar="K", help="Measure the KL of the K units with the largest local error, or of all."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", metavar="TIME", help="Be done in that time, e.g. 90s, 10m, 2h: measure less.")
    ] = None,
    text: TextOption = None,
    coco: CocoOption = None,
    samples: SamplesOption = None,
    seed: SeedOption = None,
    sequence_length: LengthOption = None,
    output: Annotated[Path | None, typer.Option("--output", metavar="FILE", help="Write the recipe there; must not exist.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it takes and stop: nothing is computed.")] = False,
    device: DeviceOption = "auto",
    memory: MemoryOption = None,
    format: Annotated[
        Literal["human", "json"], typer.Option("--format", help="human: tables; json: one object on stdout.")
    ] = "human",
) -> None:
    """Rank what a conversion quantizes by what that costs, and print a recipe that keeps the worst of it."""
    from ckptq import sensitivity as ranking
    from ckptq.console import Console
    from ckptq.errors import OutputError, RecipeError
    from ckptq.sections import size_option
    from ckptq.sensitivity import recipe as recipes
    from ckptq.sensitivity import render
    from ckptq.sensitivity.cost import parse_duration
    from ckptq.writer import write_report

    if keep is not None and kl is not None:
        raise RecipeError("--keep and --kl: expected one of them")
    if kl is not None and not 0 <= kl < float("inf"):
        raise RecipeError(f"--kl: expected a number from 0 on, found {kl}")
    _refuse_output(output, chooses=keep is not None or kl is not None)
    chosen, _ = samples_of(text, coco, None, {"samples": samples, "seed": seed, "sequence_length": sequence_length})
    assert chosen is not None
    asked = ranking.Asked(
        reference,
        candidate,
        chosen,
        recipe,
        keep,
        kl,
        _exact(exact),
        None if budget is None else parse_duration("--budget", budget),
        device,
        size_option("--memory", memory),
    )
    console = Console(format)
    told: list[Counted] = []

    def tell(counted: Counted) -> None:
        told.append(counted)
        if format == "human":
            render.show_cost(console, counted)
        else:
            console.note(render.cost_line(counted))

    found = ranking.sensitivity(asked, console, tell, dry_run=dry_run)
    command, problem, written = None, None, output
    if found is not None and found.recipe is not None:
        if output is not None:
            try:
                write_report(output, found.recipe)
            except OutputError as refused:  # what may have taken hours is shown all the same, with the recipe
                problem, written = refused, None
        assert told[0].base is not None
        command = recipes.command(told[0].base, str(written or f"{Path(found.output or '').name}.yaml"))
    said = render.data(asked, told[0], found, command)
    console.result(said, lambda: render.show(console, found, written, command) if found else None)
    if problem is not None:
        raise problem
    raise typer.Exit(found.exit_code if found else 0)


def _exact(text: str | None) -> int | None:
    """How many units' KL is measured; None for all. Raises RecipeError."""
    from ckptq.errors import RecipeError
    from ckptq.sensitivity import EXACT

    if text is None:
        return EXACT
    if text == "all":
        return None
    if not text.isdecimal():
        raise RecipeError(f"--exact: expected a number or all, found {text!r}")
    return int(text)


def _refuse_output(output: Path | None, *, chooses: bool) -> None:
    """Raises OutputError for a file that is there already, a folder that is not, and where there is nothing to write."""
    from ckptq.errors import OutputError

    if output is None:
        return
    if not chooses:
        raise OutputError(f"--output {output}: there is no recipe without --keep or --kl", hint="add one of them")
    if output.exists() or output.is_symlink():
        raise OutputError(f"--output {output}: exists already", hint="choose another name")
    if not output.parent.is_dir():
        raise OutputError(f"--output {output}: can't be written: there is no folder {output.parent}")
