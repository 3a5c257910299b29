"""What a job will take: memory, arithmetic, time. Estimates from the plan alone, without torch."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from ckptq.checkpoint import Component
from ckptq.errors import OutputError, RecipeError
from ckptq.plan import Plan
from ckptq.recipe import Recipe
from ckptq.scopes import Scope

IMPORTS = 650 * 10**6
"""Resident bytes after importing torch 2.13 (CPU), transformers 5.17 and ModelOpt 0.47, as benchmarks/memory.py measures them."""
BUFFERS = 128 * 10**6
"""What chunk buffers, the writer and one layer's intermediate values of a 2048-token sample take at most beside that."""
RATES = (("a 16-core CPU at 0.5 TFLOP/s", 0.5e12), ("a GPU at 200 TFLOP/s", 200e12))


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes, and FLOPs of the language model's layers.

    resident  embeddings and towers, needed while samples enter        layer   the largest decoder layer
    sample    what one sample of full length holds while it waits      samples how many there are at most
    """

    resident: int
    layer: int
    sample: int
    samples: int
    tokens: int
    flops: float

    @property
    def fixed(self) -> int:
        """Peak memory without waiting samples, once imports are in."""
        return IMPORTS + BUFFERS + max(self.resident, 2 * self.layer)

    @property
    def peak(self) -> int:
        """Peak memory with all samples waiting at once."""
        return self.fixed + self.sample * self.samples if self.samples else IMPORTS + BUFFERS


def estimate(plan: Plan, component: Component, scope: Scope, recipe: Recipe) -> Cost:
    """The cost of a plan, taking every sample as long as the recipe allows."""
    layers = [0] * plan.layer_count
    resident = parameters = 0
    for name, tensor in component.tensors.items():
        at = scope.layer_of(name)
        if at is not None:
            layers[at[0]] += tensor.spec.nbytes
            parameters += tensor.spec.numel
        elif not scope.canonical(name).startswith("lm_head."):
            resident += tensor.spec.nbytes
    text = scope.text(component.config)
    hidden, length = int(text["hidden_size"]), recipe.calibration.sequence_length
    head_dim = int(text.get("head_dim") or hidden // int(text["num_attention_heads"]))
    samples = recipe.calibration.samples if plan.calibrated else 0
    attention = 4 * plan.layer_count * hidden * length / 2
    return Cost(
        resident=resident,
        layer=max(layers),
        sample=length * (4 * hidden + 4 * head_dim),
        samples=samples,
        tokens=samples * length,
        flops=samples * length * (2 * parameters + attention),
    )


def waiting_budget(cost: Cost, memory: int | None) -> int:
    """Bytes that waiting samples may hold under `memory`, or under 80 % of what is free now.

    Raises RecipeError where not even one sample fits.
    """
    total = memory if memory is not None else int(0.8 * available_memory()) + IMPORTS
    left = total - cost.fixed
    if memory is not None and left < cost.sample:
        raise RecipeError(
            f"--memory {memory}: too little: embeddings, two decoder layers and one sample take {cost.fixed + cost.sample} bytes",
            hint=f"give --memory {-(-(cost.fixed + cost.sample) // 10**6)}MB or more, or lower calibration.sequence_length",
        )
    return max(left, cost.sample)


def available_memory() -> int:
    """Bytes this process may still take: the system's MemAvailable, or its control group's limit where that is lower."""
    info = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(info["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no control group, or no limit
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return free


def check_space(output: Path, nbytes: int) -> None:
    """Raises OutputError where the disk under `output` has less room than the plan writes."""
    existing = next(p for p in (output.absolute(), *output.absolute().parents) if p.exists())
    stat = os.statvfs(existing)
    free = stat.f_bavail * stat.f_frsize
    if free < nbytes:
        raise OutputError(
            f"{output}: the output takes {nbytes} bytes, the disk has {free} free",
            hint="free some space, or choose another --output",
        )
