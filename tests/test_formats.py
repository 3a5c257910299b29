"""Every format that ckptq writes: its good plan has no finding, and each change of a quantized linear's tensors has one, at its place."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from ckptq.checkpoint import TensorSpec, read_inventory
from ckptq.exporters import find_exporter
from ckptq.planner import build_plan
from ckptq.recipe import load_recipe
from ckptq.schemes import SCHEMES
from ckptq.scopes.qwen2_5_vl import SCOPE
from ckptq.validators import Finding, Stored, configs, kv, layout, strays
from ckptq.validators.expected import Expected, expect
from ckptq.validators.formats import SCALE_KINDS, WEIGHT_KINDS
from ckptq.validators.servers import DEFAULT, SERVERS, Server

SOURCE = read_inventory(Path(__file__).parent.parent / "examples" / "tiny-qwen2.5-vl").main
MIXED = ("quantize.1.where=mlp", "quantize.1.scheme=nvfp4")
EXPORTS = [
    *((form, scheme) for form in ("modelopt", "compressed-tensors", "fp8") for scheme in find_exporter(form).SCHEMES),
    ("modelopt", "mixed"),
    ("compressed-tensors", "mixed"),
]
IDS = [f"{form} {scheme}" for form, scheme in EXPORTS]
Q, K, V = (f"model.layers.0.self_attn.{s}_proj" for s in "qkv")
DTYPES = ("F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2", "F8_E8M0", "U8", "I8", "I32")


@dataclass(frozen=True, slots=True)
class Export:
    """The configs and tensors of a plan."""

    section: dict[str, Any]
    other: dict[str, Any] | None
    tensors: dict[str, TensorSpec]

    def found(self, server: Server = DEFAULT, **changes: TensorSpec | None) -> list[Finding]:
        """The findings, after tensors were put in place or (None) taken away."""
        tensors = {name: spec for name, spec in {**self.tensors, **changes}.items() if spec is not None}
        stored = Stored({**SOURCE.config, "quantization_config": self.section}, self.other, tensors)
        settings, findings = configs.read(stored, SCOPE, server)
        if settings is None:
            return findings
        at = expect(stored, SCOPE, settings)
        return findings + [finding for validator in (layout, strays, kv) for finding in validator.check(at)]


def export(form: str, scheme: str) -> Export:
    kv_cache = "kv_cache=null" if form == "fp8" or scheme not in ("fp8", "nvfp4") else "kv_cache.scheme=fp8"
    recipe = load_recipe(f"qwen25vl-lm-mixed-{form}" if scheme == "mixed" else "demo", () if scheme == "mixed" else (
        f"quantize.0.scheme={scheme}", f"export.format={form}", kv_cache), model="x")  # fmt: skip
    plan = build_plan(recipe, SOURCE, SCOPE, find_exporter(form))
    other = plan.files.get(configs.OTHER)
    section = json.loads(plan.files["config.json"])["quantization_config"]
    return Export(section, json.loads(other) if other else None, dict(plan.tensors))
