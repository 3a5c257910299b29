"""Validators: each looks at one side of a checkpoint and returns findings. None of them prints or raises for a fault it finds.

Each module lists its codes in `CODES`, with the file of the server that a rule was read in; `ckptq/validators/codes.py` joins them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ckptq.checkpoint import TensorSpec

Severity = Literal["error", "warning"]
_LONGEST = 2000


@dataclass(frozen=True, slots=True)
class Code:
    """What a finding's code means. `source`: the server's file and version that the rule was read in, or "" for our own rule."""

    meaning: str
    source: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault, or one fault at `count` places.

    code      stable; listed in the `CODES` of the module that finds it
    severity  error: wrong answers or no load; warning: works, but fragile or lossy
    subject   a tensor, a config key or a file
    expected  what belongs there
    found     what is there
    effect    what the server will do with it
    mend      what to do about it

    `expected`, `effect` and `mend` name no layer, so that findings can be grouped.
    """

    code: str
    severity: Severity
    subject: str
    expected: str
    found: str
    effect: str
    mend: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class Stored:
    """A checkpoint as a server meets it: from a folder's headers, or from a plan before anything is written.

    `unreadable` says why hf_quant_config.json is None though there is such a file, which config.json's own section makes idle.
    """

    config: Mapping[str, Any]
    hf_quant_config: Mapping[str, Any] | None
    tensors: Mapping[str, TensorSpec]
    unreadable: str = ""


def error(code: str, subject: str, expected: str, found: str, effect: str, mend: str) -> Finding:
    """A finding that means wrong answers or no load."""
    return _finding(code, "error", subject, expected, found, effect, mend)


def warning(code: str, subject: str, expected: str, found: str, effect: str, mend: str) -> Finding:
    """A finding that means: works, but is fragile or lossy."""
    return _finding(code, "warning", subject, expected, found, effect, mend)


def _finding(code: str, severity: Severity, *texts: str) -> Finding:
    """Long texts are cut: a configuration's value may be as long as its file, and stand in many findings."""
    subject, expected, found, effect, mend = (t if len(t) <= _LONGEST else f"{t[:_LONGEST]}..." for t in texts)
    return Finding(code, severity, subject, expected, found, effect, mend)


def has_errors(findings: Iterable[Finding]) -> bool:
    """Whether any finding says that the server would refuse the checkpoint or answer wrongly."""
    return any(f.severity == "error" for f in findings)
