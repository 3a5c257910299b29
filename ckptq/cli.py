"""The command line: parse, one call, render. Heavy imports stay inside the commands, so that --help is quick."""

from __future__ import annotations

import atexit
import gc
import os
import shlex
import shutil
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from ckptq.compare.command import compare
from ckptq.interrupts import unwind_on_signals
from ckptq.sensitivity.command import sensitivity

Format = Literal["human", "json"]
FormatOption = Annotated[Format, typer.Option("--format", help="human: tables; json: one object on stdout.")]

app = typer.Typer(
    help="Offline checkpoint quantizer: FP8, INT8 and 4-bit checkpoints that vLLM loads, made piece by piece, and validated.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich takes a third of the time, and would eat [@revision]
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def convert(
    recipe: Annotated[str, typer.Option("--recipe", metavar="RECIPE", help="A recipe file, or the name of a shipped one.")],
    model: Annotated[
        str | None, typer.Option("--model", metavar="SRC", help="Source: a folder, or a Hub id org/name[@revision].")
    ] = None,
    output: Annotated[str | None, typer.Option("--output", metavar="OUT", help="Folder to write; must not exist.")] = None,
    from_fp8: Annotated[
        bool,
        typer.Option("--from-fp8", help="The source is FP8: dequantize it on the way. A quantized one is refused otherwise."),
    ] = False,
    amax: Annotated[
        Path | None,
        typer.Option(
            "--amax",
            metavar="PATH",
            help="Don't calibrate: take the amaxes in this earlier output, or its ckptq.json.",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. calibration.samples=64; repeatable."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop: no weights read, no output.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with this job's interrupted run, if there is one.")] = False,
    device: Annotated[
        str, typer.Option("--device", metavar="DEVICE", help="Where to compute: auto, cpu, cuda or cuda:N.")
    ] = "auto",
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="SIZE", help="Limit on the device that calibrates, e.g. 16GB; samples go in waves."),
    ] = None,
    format: FormatOption = "human",
) -> None:
    """Quantize a checkpoint as a recipe says, and check the result."""
    from ckptq import render_job as render
    from ckptq.compare.quality import judge_output, refuse_unmeasured_limits
    from ckptq.console import Console
    from ckptq.convert import convert as run
    from ckptq.prepare import prepare
    from ckptq.recipe import load_recipe
    from ckptq.sections import size_option
    from ckptq.validators import has_errors

    limit = size_option("--memory", memory)
    settings = load_recipe(recipe, overrides or (), model=model, output=output, from_fp8=from_fp8 or None)
    console = Console(format)
    job = prepare(settings, amax)
    refuse_unmeasured_limits(job)
    if dry_run:
        console.result(render.plan_data(job), lambda: render.show_plan(console, job))
        raise typer.Exit(int(has_errors(job.findings)))
    report = run(job, resume=resume, device=device, memory=limit, console=console)
    quality = judge_output(job, report, device, limit, console)
    console.result(render.report_data(report, quality), lambda: render.show_report(console, report, quality))
    raise typer.Exit(quality.exit_code if quality else 0)


@app.command()
def validate(
    checkpoint: Annotated[
        str, typer.Argument(metavar="DIR", help="A quantized checkpoint: a folder, or a Hub id org/name[@revision].")
    ],
    source: Annotated[
        str | None, typer.Option("--source", metavar="SRC", help="What it was made from: untouched tensors must be equal to it.")
    ] = None,
    no_values: Annotated[
        bool, typer.Option("--no-values", help="Names, dtypes, shapes and configs alone; of a Hub model only headers are read.")
    ] = False,
    vllm: Annotated[
        str | None,
        typer.Option("--vllm", metavar="VERSION", help="The version that will serve it; 0.32, or with --load the one that loads."),
    ] = None,
    tp: Annotated[int, typer.Option("--tp", metavar="N", min=1, help="Tensor parallel size that it will be served with.")] = 1,
    ep: Annotated[bool, typer.Option("--ep", help="It will be served expert parallel.")] = False,
    load: Annotated[bool, typer.Option("--load", help="Also load it with the real vLLM, and look at what was loaded.")] = False,
    generate: Annotated[bool, typer.Option("--generate", help="Also generate with the real vLLM; implies --load.")] = False,
    vllm_python: Annotated[
        Path, typer.Option("--vllm-python", metavar="PYTHON", help="The interpreter that has vLLM.", show_default="this one")
    ] = Path(sys.executable),
    scope: Annotated[
        Path | None,
        typer.Option("--scope", metavar="FILE", help="Judge by the scope in this recipe or ckptq.json, not by ckptq's own."),
    ] = None,
    target: Annotated[
        Literal["auto", "vllm", "vllm-omni"],
        typer.Option(
            "--target",
            help="Who will serve it; auto: vLLM-Omni for a diffusion pipeline. Of a talker vllm-omni has rules of its own.",
        ),
    ] = "auto",
    strict: Annotated[bool, typer.Option("--strict", help="Warnings count as errors.")] = False,
    format: Annotated[
        Literal["human", "json", "junit", "github"],
        typer.Option("--format", help="What goes to stdout; github: annotations for a workflow."),
    ] = "human",
    report: Annotated[
        list[str] | None,
        typer.Option("--report", metavar="FORMAT=FILE", help="Also write json=FILE or junit=FILE, whatever happens; repeatable."),
    ] = None,
) -> None:
    """Say whether vLLM will serve a checkpoint right. Exit code 1 where it will not, 2 where it can't be read."""
    from dataclasses import replace

    from ckptq import judge, reports
    from ckptq.console import Console
    from ckptq.reports.human import show

    kept = reports.destinations(report or ())
    asked = reports.Asked(source, not no_values, load or generate, generate, strict, vllm, tp=tp, ep=ep, scope=scope, target=target)
    console = Console()

    def tell(outcome: reports.Outcome) -> None:
        if format != "human":
            print(reports.written(format, outcome), end="", flush=True)
        elif outcome.refusal is None:
            show(console, outcome)
        for path, kind in kept.items():
            path.write_text(reports.written(kind, outcome), encoding="ascii")

    try:
        asked = replace(asked, server=judge.rules(asked, vllm_python))
        outcome = judge.judge(checkpoint, asked, vllm_python, console)
    except Exception as problem:
        tell(reports.refused(checkpoint, asked, problem))
        raise
    tell(outcome)
    raise typer.Exit(outcome.exit_code)


app.command()(compare)
app.command()(sensitivity)


@app.command()
def restore(
    checkpoint: Annotated[str, typer.Argument(metavar="DIR", help="An FP8 checkpoint: a folder, or a Hub id org/name[@revision].")],
    output: Annotated[Path, typer.Argument(metavar="BF16_DIR", help="Folder to write; must not exist.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop: no weights read, no output.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with this job's interrupted run, if there is one.")] = False,
    format: FormatOption = "human",
) -> None:
    """Turn FP8 weights back into a plain BF16 checkpoint, within the format's error."""
    from ckptq import restore as restoring
    from ckptq.console import Console

    console = Console(format)
    job = restoring.prepare(checkpoint)
    if dry_run:
        console.result(restoring.plan_data(job), lambda: restoring.show_plan(console, job))
        return
    report = restoring.restore(job, output, console, resume=resume)
    console.result(restoring.report_data(report), lambda: restoring.show_report(console, report))


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A folder, or a Hub id org/name[@revision].")],
    recipe: Annotated[str | None, typer.Option("--recipe", metavar="RECIPE", help="Count for this recipe alone.")] = None,
    format: FormatOption = "human",
) -> None:
    """Show a checkpoint's parts, its scope or a proposal for one, and what recipes would touch."""
    from ckptq import hub, render, render_pipeline
    from ckptq.checkpoint import read_inventory
    from ckptq.console import Console

    console = Console(format)
    opened = hub.fetch(source, weights=False)
    inventory = read_inventory(opened.root, opened.header)
    if render_pipeline.holds_denoiser(inventory):
        data = render_pipeline.pipeline_data(inventory, recipe)
        console.result(data, lambda: render_pipeline.show_pipeline(console, data))
    else:
        data = render.inspect_data(inventory, recipe)
        console.result(data, lambda: render.show_inspect(console, data))


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this one.")] = None,
    schemes: Annotated[bool, typer.Option("--schemes", help="List the schemes, and which formats have them.")] = False,
    format: FormatOption = "human",
) -> None:
    """List the shipped recipes, or print one."""
    from ckptq import render
    from ckptq.console import Console
    from ckptq.errors import RecipeError
    from ckptq.mistakes import close
    from ckptq.recipe import shipped

    console = Console(format)
    if schemes:
        data = render.schemes_data()
        console.result(data, lambda: render.show_schemes(console, data))
        return
    known = shipped()
    if name is None:
        data = render.recipes_data(known)
        console.result(data, lambda: render.show_recipes(console, data))
        return
    text = known.get(name.removesuffix(".yaml"))
    if text is None:
        raise RecipeError(
            f"no shipped recipe {name!r}{close(name.removesuffix('.yaml'), known, near_only=True)}",
            hint="`ckptq recipes` lists them",
        )
    console.result({"name": name.removesuffix(".yaml"), "text": text}, lambda: print(text, end=""))


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False
) -> None:
    """Options before the command."""
    if version:
        from ckptq import __version__

        print(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Ends the process with 0 done, 1 the data is at fault, 2 usage or I/O, 70 a fault of ckptq, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Waiting OpenMP threads spin by default and slow each other down where cores are few; must be set before torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's, which would spin too; nothing here multiplies matrices with it
    atexit.register(gc.freeze)  # nothing left is garbage: looking through it all once more took a quarter of a second
    gc.set_threshold(50_000, 20, 100)  # imports make a million objects and no garbage: looking for some took a tenth of their time
    stopped = unwind_on_signals(lambda: _say("stopping; once more stops at once", None), lambda: _stop_now(arguments))
    try:
        code = app(arguments, prog_name="ckptq", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except typer.Exit as stop:
        code = stop.exit_code
    except Exception as error:  # a library that is interrupted while it is imported raises what it likes
        code = 130 if stopped() else _failed(error)
    if code == 130:  # typer turns Ctrl-C into an exit code of its own
        _say("interrupted", _resume_hint(arguments))
    sys.exit(code if isinstance(code, int) else 0)


def _failed(error: Exception) -> int:
    """Says what is wrong; the exit code."""
    from ckptq.errors import CkptqError

    if isinstance(error, OSError):
        error = CkptqError(f"{error.filename or 'input/output'}: {error.strerror or error}")
    if isinstance(error, CkptqError):
        _say(f"error: {error}", error.hint)
        return error.exit_code
    if not hasattr(error, "exit_code") or not hasattr(error, "format_message"):
        traceback.print_exception(error)
        _say("this is a fault of ckptq: please report it with the lines above", None)
        return 70
    where = getattr(getattr(error, "ctx", None), "command_path", "ckptq")
    _say(f"error: {error.format_message().replace('Value error, ', '')}", f"`{where} --help` shows what there is")
    return 2


def _stop_now(arguments: list[str]) -> NoReturn:
    _say("interrupted", _resume_hint(arguments))
    os._exit(130)


def _resume_hint(arguments: list[str]) -> str | None:
    if not {"convert", "restore"} & {*arguments} or "--dry-run" in arguments:
        return None
    rest = arguments if "--resume" in arguments else [*arguments, "--resume"]
    command = ["ckptq"] if shutil.which("ckptq") else [sys.executable, "-m", "ckptq"]
    return "go on with: " + shlex.join([*command, *rest])


def _say(text: str, hint: str | None) -> None:
    from ckptq.reports import safe_text  # a checkpoint's names may be in it

    print(safe_text(text, lines=True), file=sys.stderr)
    if hint:
        print(f"  {safe_text(hint, lines=True)}", file=sys.stderr)


if __name__ == "__main__":
    main()
