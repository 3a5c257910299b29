"""What a validation came to, and its words in every format: one file for each, all from the same `Outcome`."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ckptq.errors import CkptqError, OutputError
from ckptq.validators import Finding, Severity, codes
from ckptq.validators.servers import DEFAULT, OMNI, Rules, Server

if TYPE_CHECKING:
    from ckptq.validate import Checked, Target

Machine = Literal["json", "junit", "github"]
Kept = Literal["json", "junit"]
"""Formats of a report that is kept in a file."""
_LONGEST = 4000
"""Characters of one text that are shown; names in a hostile header can be as long as the header."""
# What the runner of GitHub Actions takes for a command: `::name ...::` after any white space, `##[name]` anywhere in a line
# (actions/runner at 079cdb1 src/Runner.Common/ActionCommand.cs TryParseV2, TryParse).
_COMMAND = re.compile(r"::(?=[A-Za-z-]+[ :])")


@dataclass(frozen=True, slots=True)
class Asked:
    """What a validation was asked for. `source`, `vllm` and `scope` are as the user named them; `server` has the rules in force."""

    source: str | None = None
    values: bool = True
    load: bool = False
    generate: bool = False
    strict: bool = False
    vllm: str | None = None
    server: Server = DEFAULT
    tp: int = 1
    ep: bool = False
    scope: Path | None = None
    target: Target = "auto"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why there is no verdict. `kind` is the name of the exception."""

    kind: str
    message: str
    hint: str | None
    exit_code: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """All that a report says.

    checkpoint  as the user named it
    skipped     {group of checks that did not run: why}
    resolved    `org/name@commit`, where it came from the Hub
    served      what the real server did, without its findings, or None where it was not asked
    built       what the server will build (`validate.figures`), or None where the config can't be read
    refusal     set where the checkpoint couldn't be judged; `findings` is empty then
    scope       (name of the scope it was judged by, where that is: "ckptq", "--scope" or "ckptq.json"), or None
    judged_by   whose rules, where they are not those of `asked.server`
    """

    checkpoint: str
    asked: Asked = field(default_factory=Asked)
    findings: tuple[Finding, ...] = ()
    checked: tuple[Checked, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    resolved: str | None = None
    served: Mapping[str, Any] | None = None
    built: Mapping[str, Any] | None = None
    refusal: Refusal | None = None
    scope: tuple[str, str] | None = None
    judged_by: Rules | None = None

    @property
    def rules(self) -> Rules:
        """Whose rules were applied."""
        return self.judged_by or self.asked.server.rules

    @property
    def ok(self) -> bool:
        return self.exit_code == 0

    @property
    def exit_code(self) -> int:
        """0 clean, 1 findings that count, 2 (or more) no verdict."""
        if self.refusal is not None:
            return self.refusal.exit_code
        return int(any(fails(f, self.asked.strict) for f in self.findings))


def fails(finding: Finding, strict: bool) -> bool:
    """Whether the finding makes the validation fail."""
    return strict or finding.severity == "error"


def refused(checkpoint: str, asked: Asked, problem: Exception) -> Outcome:
    """The outcome where `problem` stopped the validation."""
    if isinstance(problem, CkptqError):
        refusal = Refusal(type(problem).__name__, str(problem), problem.hint, problem.exit_code)
    elif isinstance(problem, OSError):
        what = f"{problem.filename or 'input/output'}: {problem.strerror or problem}"
        refusal = Refusal(type(problem).__name__, what, None, 2)
    else:
        refusal = Refusal(type(problem).__name__, f"a fault of ckptq: {problem}", "please report it", 70)
    return Outcome(checkpoint, asked, skipped=dict.fromkeys(groups(), "not reached"), refusal=refusal)


def count(findings: Sequence[Finding], severity: Severity) -> int:
    """Findings of that severity; each may stand for many places."""
    return sum(f.severity == severity for f in findings)


def places(findings: Sequence[Finding], severity: Severity) -> int:
    """Places that the findings of that severity stand for."""
    return sum(f.count for f in findings if f.severity == severity)


def verdict(findings: Sequence[Finding], strict: bool = False) -> str:
    """`FAILED: 1 error at 22 places, 2 warnings`."""
    said = [
        f"{n} {severity}{'s' * (n != 1)}" + (f" at {at} places" if at > n else "")
        for severity in get_args(Severity)
        if (n := count(findings, severity), at := places(findings, severity))[0]
    ]
    failed = any(fails(f, strict) for f in findings)
    only_strict = ", which --strict counts as errors" if failed and not count(findings, "error") else ""
    return f"{'FAILED' if failed else 'OK'}: {', '.join(said) or 'no findings'}{only_strict}"


def rules(outcome: Outcome) -> str:
    """`vLLM 0.32 (tried on the real one)`. A scope that is not ckptq's was tried with no server."""
    found = outcome.rules
    how = "tried on the real one" if found.verified == "loaded" else "read in its source, not tried"
    how = how if outcome.scope is None or outcome.scope[1] == "ckptq" else "not tried with this scope"
    return f"{found.server} {found.version} ({how})"


def groups() -> list[str]:
    """What codes begin with."""
    return list(dict.fromkeys(code.partition(".")[0] for code in codes.catalog()))


def next_command(outcome: Outcome) -> str:
    """What is worth doing after a clean verdict: the next deeper check, at last to serve it."""
    asked = outcome.asked
    command = f"ckptq validate {shlex.quote(outcome.checkpoint)}"
    if not asked.values:
        return command
    source = f" --source {shlex.quote(asked.source)}" if asked.source else ""
    if not asked.source:
        return f"{command} --source SRC"
    if outcome.rules == OMNI:
        return f"vllm serve {shlex.quote(outcome.checkpoint)} --omni"
    if not asked.load:
        return f"{command}{source} --load"
    parallel = (f" --tensor-parallel-size {asked.tp}" if asked.tp > 1 else "") + (" --enable-expert-parallel" if asked.ep else "")
    name, _, revision = outcome.checkpoint.partition("@") if outcome.resolved else (outcome.checkpoint, "", "")
    return f"vllm serve {shlex.quote(name)}{f' --revision {shlex.quote(revision)}' if revision else ''}{parallel}"


def safe_text(text: str, *, lines: bool = False) -> str:
    """`text` without what a terminal or a CI log would act on; with `lines`, line breaks stay.

    Control and format characters (escapes, text direction), lone surrogates and odd spaces become `\\x1b`, `\\u202e`, ...
    """
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}... and {len(text) - _LONGEST} more characters"
    if not text.isprintable():
        text = "".join(c if c.isprintable() or (lines and c == "\n") else c.encode("unicode_escape").decode() for c in text)
    return _COMMAND.sub(r":\\x3a", text).replace("##[", r"#\x23[")


def written(format: Machine, outcome: Outcome) -> str:
    """The outcome in one of the machines' formats, with a line break at its end."""
    text: str = importlib.import_module(f"ckptq.reports.{format}").text(outcome)
    return text


def destinations(options: Sequence[str]) -> dict[Path, Kept]:
    """`--report json=FILE` options as {file: format}. Raises OutputError for another form, or a folder that is not there."""
    found: dict[Path, Kept] = {}
    for option in options:
        format, _, name = option.partition("=")
        if format not in get_args(Kept) or not name:
            raise OutputError(
                f"--report {option}: expected FORMAT=FILE with {' or '.join(get_args(Kept))} for the format",
                hint="for example `--report junit=validate.xml --report json=validate.json`",
            )
        path = Path(name)
        if path.is_dir() or not path.parent.is_dir():
            what = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
            raise OutputError(f"--report {option}: can't be written: {what}", hint="make the folder first, and name a file in it")
        found[path] = "json" if format == "json" else "junit"
    return found
