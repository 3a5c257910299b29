"""JSON: one object, described by docs/validate.schema.json. Keys are only ever added."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ckptq import __version__
from ckptq.reports import Outcome, count, places
from ckptq.validators import Finding
from ckptq.validators.codes import catalog

SCHEMA = 1
"""Raised when a key changes its meaning or goes."""


def text(outcome: Outcome) -> str:
    """Plain ASCII, and no `##[`, which a runner of GitHub Actions would take for a command even inside a string."""
    return json.dumps(data(outcome), indent=2, allow_nan=False).replace("##[", "#\\u0023[") + "\n"


def data(outcome: Outcome) -> dict[str, Any]:
    """The object itself. Holds no time and no path but those that the user gave."""
    asked, findings = outcome.asked, outcome.findings
    return {
        "schema": SCHEMA,
        "tool": {"name": "ckptq", "version": __version__},
        "checkpoint": outcome.checkpoint,
        "resolved": outcome.resolved,
        "ok": outcome.ok,
        "exit_code": outcome.exit_code,
        "strict": asked.strict,
        "rules": None if outcome.refusal else asdict(outcome.rules),
        "asked": {
            "source": asked.source,
            "values": asked.values,
            "load": asked.load,
            "generate": asked.generate,
            "vllm": asked.vllm,
            "tensor_parallel": asked.tp,
            "expert_parallel": asked.ep,
            "scope": str(asked.scope) if asked.scope else None,
            "target": asked.target,
        },
        "scope": {"name": outcome.scope[0], "from": outcome.scope[1]} if outcome.scope else None,
        "checked": [{"what": c.what, "amount": c.amount, "unit": c.unit} for c in outcome.checked],
        "skipped": dict(outcome.skipped),
        "quantization": plain(outcome.built),
        "counts": {
            "errors": count(findings, "error"),
            "warnings": count(findings, "warning"),
            "error_places": places(findings, "error"),
            "warning_places": places(findings, "warning"),
        },
        "findings": [finding(f) for f in findings],
        "server": plain(outcome.served),
        "error": asdict(outcome.refusal) if outcome.refusal else None,
    }


def finding(f: Finding) -> dict[str, Any]:
    """A finding with what its code means and where the rule was read."""
    code = catalog().get(f.code)
    return {**asdict(f), "meaning": code.meaning if code else "", "source": code.source if code else ""}


def plain(value: Any) -> Any:
    """What JSON can say of `value`: NaN and infinities as texts, all else but containers and numbers by str."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
