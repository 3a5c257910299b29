"""For people: every finding as a short paragraph, then the verdict and what it rests on. Colored on a terminal alone."""

from __future__ import annotations

import math
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ckptq.console import Console, amount, duration
from ckptq.reports import Outcome, next_command, rules, safe_text, verdict
from ckptq.validators import Finding
from ckptq.validators.codes import catalog

if TYPE_CHECKING:
    from rich.text import Text

_SHOWN = 50
"""Findings that are told in full; nobody reads on, and JSON has them all."""
_COLORS = {"error": "bold red", "warning": "bold yellow", "FAILED": "bold red", "OK": "bold green"}
_LABEL = 15
_GROUPS = {
    "values": "values",
    "record": "changes since it was made",
    "passthrough": "the source",
    "parallel": "several GPUs",
    "server": "the real server",
}


def show(console: Console, outcome: Outcome) -> None:
    """The whole result. A refusal is told on stderr, by whoever started the command."""
    show_findings(console, outcome.findings)
    said = verdict(outcome.findings, outcome.asked.strict)
    word, _, rest = said.partition(":")
    console.show(_text((safe_text(outcome.checkpoint), ""), (": ", ""), (word, _COLORS[word]), (f":{rest}", "")))
    for label, text in _facts(outcome):
        console.show(_row(label, text))
    if outcome.ok:
        console.show(f"    {'next':<{_LABEL - 4}}{safe_text(next_command(outcome))}")  # not wrapped: it is there to be copied


def show_findings(console: Console, findings: Sequence[Finding]) -> None:
    """Each finding: code and meaning, where, expected, found, effect, mend."""
    for f in findings[:_SHOWN]:
        code = catalog().get(f.code)
        meaning = f": {code.meaning}" if code else ""
        many = f" ({f.count} places)" if f.count > 1 else ""
        console.show(_text((f.severity, _COLORS[f.severity]), (": ", ""), (safe_text(f.code), "bold"), (meaning + many, "")))
        for label in ("where", "expected", "found", "effect", "mend"):
            console.show(_row(label, f.subject if label == "where" else getattr(f, label)))
        console.show("")
    if len(findings) > _SHOWN:
        console.show(f"and {len(findings) - _SHOWN} more findings: --format json lists them\n")


def _facts(outcome: Outcome) -> Iterator[tuple[str, str]]:
    yield "rules", rules(outcome)
    if outcome.scope and outcome.scope[1] != "ckptq":
        yield "scope", f"{outcome.scope[0]}, as {outcome.scope[1]} spells it out; ckptq has none of its own to compare it with"
    if outcome.built:
        yield "method", _method(outcome.built)
    yield "checked", ", ".join(_checked(outcome)) or "nothing"
    if outcome.ok and outcome.skipped:  # after a failure there is something else to do first
        missing = (f"{_GROUPS.get(group, group)} ({why.removeprefix('needs ')})" for group, why in outcome.skipped.items())
        yield "unchecked", ", ".join(missing)
    if outcome.served and outcome.served["version"]:
        yield from _served(outcome.served)


def _served(served: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the real server did; why it stopped is a finding."""
    how = f"as {served['quantization'] or 'unquantized'}, KV cache {served['kv_cache_dtype']}"
    took = f"{how}, in {duration(served['load_seconds'])}" if 0 < served["load_seconds"] < math.inf else "to no end"
    yield "server", f"vLLM {served['version']} on {served['platform']} loaded it {took}"
    if served["stand_ins"]:
        yield "", f"with stand-ins for what this vLLM lacks: {', '.join(served['stand_ins'])}"
    if served["text"]:
        yield "", f"after the prompt it goes on with {served['text']!r}"
    for text in served["image_texts"]:
        yield "", f"after an image with {text!r}"


def _checked(outcome: Outcome) -> Iterator[str]:
    """Stages with what they looked at, then the checks that are no stages."""
    for c in outcome.checked:
        much = f" ({amount(c.amount, c.unit)})" if c.what != "server" else ""
        yield _GROUPS.get(c.what, c.what) + much
    asked = outcome.asked
    if (asked.tp > 1 or asked.ep) and "parallel" not in outcome.skipped:
        yield f"{_GROUPS['parallel']} ({' '.join([f'--tp {asked.tp}', *(['--ep'] if asked.ep else [])])})"


def _method(built: Mapping[str, Any]) -> str:
    """`modelopt: 42 linears in ModelOpt FP8; 22 not quantized; FP8 KV cache`."""
    linears = [f"{count} linears in {form}" for form, count in built["linears"].items()] or ["no quantized linear"]
    kept = f"{built['kept']} not quantized"
    cache = ["FP8 KV cache"] if built["kv_cache"] == "fp8" else []
    return f"{built['method']}: {'; '.join([*linears, kept, *cache])}"


def _row(label: str, text: str) -> Text:
    """A label, and beside it the text, wrapped under itself. Line breaks count in what the server said alone."""
    head = f"    {label:<{_LABEL - 4}}"
    lines = [
        part
        for line in safe_text(text, lines=label == "found").splitlines() or [""]
        for part in textwrap.wrap(line, max(_width() - _LABEL, 24), break_on_hyphens=False) or [""]
    ]
    return _text((head, "dim"), (("\n" + " " * _LABEL).join(lines), ""))


def _width() -> int:
    """As wide as console.Console.show prints."""
    asked = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdecimal()
    return shutil.get_terminal_size().columns if asked else 120


def _text(*parts: tuple[str, str]) -> Text:
    from rich.text import Text

    return Text.assemble(*parts)
