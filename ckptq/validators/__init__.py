"""Validators: each looks at one side of a checkpoint and returns findings. None of them prints or raises for a fault it finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ckptq.checkpoint import TensorSpec

Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault, or one fault at `count` places. `code` is stable; `subject` is a tensor, a config key or a file.

    An error means wrong answers or no load; a warning, that it works but is fragile or lossy. `hint` says how to mend it and names
    no layer, so that findings can be grouped.
    """

    code: str
    severity: Severity
    subject: str
    expected: str
    actual: str
    hint: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class Stored:
    """A checkpoint as a server meets it: from a folder's headers, or from a plan before anything is written."""

    config: Mapping[str, Any]
    hf_quant_config: Mapping[str, Any] | None
    tensors: Mapping[str, TensorSpec]


def error(code: str, subject: str, expected: str, actual: str, hint: str) -> Finding:
    """A finding that means wrong answers or no load."""
    return Finding(code, "error", subject, expected, actual, hint)


def warning(code: str, subject: str, expected: str, actual: str, hint: str) -> Finding:
    """A finding that means: works, but is fragile or lossy."""
    return Finding(code, "warning", subject, expected, actual, hint)
