"""Validators: each looks at one side of a checkpoint and returns findings. None of them prints or raises for a fault it finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ckptq.checkpoint import TensorSpec


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault. `code` is stable; `subject` is a tensor, a config key or a file; `hint` says how to mend it."""

    code: str
    severity: Literal["error", "warning"]
    subject: str
    expected: str
    actual: str
    hint: str


@dataclass(frozen=True, slots=True)
class Stored:
    """A checkpoint as a server meets it: from a folder's headers, or from a plan before anything is written."""

    config: Mapping[str, Any]
    hf_quant_config: Mapping[str, Any] | None
    tensors: Mapping[str, TensorSpec]
