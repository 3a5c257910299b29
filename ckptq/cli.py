"""The command line: parse, one call, render. Heavy imports stay inside the commands, so that --help is quick."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

Format = Literal["human", "json"]
FormatOption = Annotated[Format, typer.Option("--format", help="human: tables; json: one object on stdout.")]

app = typer.Typer(
    help="Offline checkpoint quantizer: FP8 checkpoints that vLLM loads, made layer by layer, and validated.",
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
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. calibration.samples=64; repeatable."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop: no weights read, no output.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with this job's interrupted run, if there is one.")] = False,
    device: Annotated[
        str, typer.Option("--device", metavar="DEVICE", help="Where calibration runs: auto, cpu, cuda or cuda:N.")
    ] = "auto",
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="SIZE", help="Limit on the device that calibrates, e.g. 16GB; samples go in waves."),
    ] = None,
    format: FormatOption = "human",
) -> None:
    """Quantize a checkpoint as a recipe says, and check the result."""
    from ckptq import render
    from ckptq.console import Console
    from ckptq.convert import convert as run
    from ckptq.convert import prepare
    from ckptq.recipe import load_recipe, size_option
    from ckptq.validate import has_errors

    limit = size_option("--memory", memory)
    settings = load_recipe(recipe, overrides or (), model=model, output=output)
    console = Console(format)
    job = prepare(settings)
    if dry_run:
        console.result(render.plan_data(job), lambda: render.show_plan(console, job))
        raise typer.Exit(int(has_errors(job.findings)))
    report = run(job, resume=resume, device=device, memory=limit, console=console)
    console.result(render.report_data(report), lambda: render.show_report(console, report))


@app.command()
def validate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A quantized checkpoint.")],
    source: Annotated[
        str | None, typer.Option("--source", metavar="SRC", help="What it was made from: untouched tensors must be equal to it.")
    ] = None,
    load: Annotated[bool, typer.Option("--load", help="Also load it with the real vLLM, and generate.")] = False,
    vllm_python: Annotated[Path, typer.Option("--vllm-python", metavar="PYTHON", help="The interpreter that has vLLM.")] = Path(
        sys.executable
    ),
    format: FormatOption = "human",
) -> None:
    """Say whether vLLM will serve a checkpoint right. Exit code 1 where it will not."""
    from ckptq import hub, render
    from ckptq.console import Console
    from ckptq.validate import has_errors, validate_folder

    console = Console(format)
    origin = hub.fetch(source, weights=True).root if source else None
    findings = validate_folder(folder, source=origin, progress=console)
    served = None
    if load:
        from ckptq.validators import vllm_load

        served = vllm_load.load(folder, vllm_python)
        findings = [*findings, *served.findings]
    console.result(render.findings_data(folder, findings, served), lambda: render.show_findings(console, folder, findings, served))
    raise typer.Exit(int(has_errors(findings)))


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A folder, or a Hub id org/name[@revision].")],
    recipe: Annotated[str | None, typer.Option("--recipe", metavar="RECIPE", help="Count for this recipe alone.")] = None,
    format: FormatOption = "human",
) -> None:
    """Show a checkpoint's parts, its scope, and what recipes would touch."""
    from ckptq import hub, render
    from ckptq.checkpoint import read_inventory
    from ckptq.console import Console

    console = Console(format)
    opened = hub.fetch(source, weights=False)
    data = render.inspect_data(read_inventory(opened.root, opened.header), recipe)
    console.result(data, lambda: render.show_inspect(console, data))


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this one.")] = None,
    format: FormatOption = "human",
) -> None:
    """List the shipped recipes, or print one."""
    from ckptq import render
    from ckptq.console import Console
    from ckptq.errors import RecipeError
    from ckptq.mistakes import close
    from ckptq.recipe import shipped

    console = Console(format)
    known = shipped()
    if name is None:
        data = render.recipes_data(known)
        console.result(data, lambda: render.show_recipes(console, data))
        return
    text = known.get(name.removesuffix(".yaml"))
    if text is None:
        raise RecipeError(f"no shipped recipe {name!r}{close(name.removesuffix('.yaml'), known)}")
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
    from ckptq.errors import CkptqError

    arguments = list(sys.argv[1:] if argv is None else argv)
    # Waiting OpenMP threads spin by default and slow each other down where cores are few; must be set before torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: _interrupt(arguments))
    try:
        code = app(arguments, prog_name="ckptq", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except CkptqError as error:
        _say(f"error: {error}", error.hint)
        code = error.exit_code
    except OSError as error:
        _say(f"error: {error.filename or 'input/output'}: {error.strerror or error}", None)
        code = 2
    except typer.Exit as stop:
        code = stop.exit_code
    except Exception as error:
        if not hasattr(error, "exit_code") or not hasattr(error, "format_message"):
            traceback.print_exc()
            _say("this is a fault of ckptq: please report it with the lines above", None)
            sys.exit(70)
        where = getattr(getattr(error, "ctx", None), "command_path", "ckptq")
        _say(f"error: {error.format_message().replace('Value error, ', '')}", f"`{where} --help` shows what there is")
        code = 2
    if code == 130:  # typer turns Ctrl-C into an exit code of its own
        _say("interrupted", _resume_hint(arguments))
    sys.exit(code if isinstance(code, int) else 0)


def _interrupt(arguments: list[str]) -> NoReturn:
    """The first signal unwinds, which waits for files that are being fetched. A second ends the process at once.

    Nothing is lost by that: what `--resume` needs is complete on the disk at any moment.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: _stop_now(arguments))
    _say("stopping; once more stops at once", None)
    raise KeyboardInterrupt


def _stop_now(arguments: list[str]) -> NoReturn:
    _say("interrupted", _resume_hint(arguments))
    os._exit(130)


def _resume_hint(arguments: list[str]) -> str | None:
    if "convert" not in arguments or "--dry-run" in arguments:
        return None
    rest = arguments if "--resume" in arguments else [*arguments, "--resume"]
    command = ["ckptq"] if shutil.which("ckptq") else [sys.executable, "-m", "ckptq"]
    return "go on with: " + shlex.join([*command, *rest])


def _say(text: str, hint: str | None) -> None:
    print(text, file=sys.stderr)
    if hint:
        print(f"  {hint}", file=sys.stderr)


if __name__ == "__main__":
    main()
