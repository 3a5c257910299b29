"""Workflow commands of GitHub Actions: an annotation for each finding, and the verdict.

Escaping as the runner undoes it: actions/runner at 079cdb1 src/Runner.Common/ActionCommand.cs UnescapeData, UnescapeProperty.
"""

from __future__ import annotations

import re

from ckptq.reports import Outcome, rules, safe_text, verdict
from ckptq.validators import Finding, Severity

_SHOWN = 10
"""Annotations of one level that GitHub takes from a step; those after them are dropped without a word."""
_FILE = re.compile(r"(?!/)(?![^:]*\.\.)[\w./+-]+\.(?:json|safetensors|bin|pt|pth|gguf|jinja|model|txt)(?=: |$)", re.ASCII)


def text(outcome: Outcome) -> str:
    """One line for each command. Nothing else is printed: other text might hold what the runner takes for a command."""
    title = f"ckptq validate {safe_text(outcome.checkpoint)}"
    if outcome.refusal is not None:
        refusal = outcome.refusal
        said = "\n".join(filter(None, (refusal.message, refusal.hint)))
        return command("error", safe_text(said, lines=True), title=title) + "\n"
    lines = [*_annotations(outcome, "error"), *_annotations(outcome, "warning")]
    conclusion = f"{verdict(outcome.findings, outcome.asked.strict)}, by the rules of {rules(outcome)}"
    return "\n".join([*lines, command("notice", conclusion, title=title)]) + "\n"


def _annotations(outcome: Outcome, severity: Severity) -> list[str]:
    """Errors, or warnings. Where there are too many the last one counts the rest."""
    found = [f for f in outcome.findings if f.severity == severity]
    shown = found if len(found) <= _SHOWN else found[: _SHOWN - 1]
    level = "error" if outcome.asked.strict else severity
    lines = [_annotation(level, f, outcome.checkpoint) for f in shown]
    if rest := found[len(shown) :]:
        codes = ", ".join(dict.fromkeys(f.code for f in rest))
        lines.append(command(level, safe_text(f"{len(rest)} more: {codes}; the JSON report has them all"), title="more findings"))
    return lines


def _annotation(level: str, f: Finding, checkpoint: str) -> str:
    many = f" ({f.count} places)" if f.count > 1 else ""
    rest = (f"{label}: {safe_text(getattr(f, label), lines=True)}" for label in ("expected", "found", "effect", "mend"))
    said = "\n".join((f"{safe_text(f.subject)}{many}", *rest))
    file = _FILE.match(f.subject)
    where = {"file": f"{checkpoint.rstrip('/')}/{file[0]}"} if file else {}
    return command(level, said, title=safe_text(f.code), **{k: safe_text(v) for k, v in where.items()})


def command(name: str, message: str, **properties: str) -> str:
    """`::error title=...,file=...::message`."""
    given = ",".join(f"{key}={_property(value)}" for key, value in properties.items())
    return f"::{name} {given}::{_data(message)}"


def _data(value: str) -> str:
    return value.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(value: str) -> str:
    return _data(value).replace(":", "%3A").replace(",", "%2C")
