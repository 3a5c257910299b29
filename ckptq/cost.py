"""What a job will take: memory, arithmetic, time. Estimates from the plan alone, without torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ckptq.checkpoint import Component
from ckptq.console import size
from ckptq.errors import OutputError, RecipeError, SourceError
from ckptq.plan import Plan
from ckptq.recipe import Recipe
from ckptq.scopes import Scope, at_path
from ckptq.sections import of_models
from ckptq.threads import threads

IMPORTS = 420 * 10**6
"""Resident bytes after importing torch 2.13 (CPU) and transformers 5.17, as benchmarks/memory.py measures them."""
TORCH = 230 * 10**6
"""The same of torch alone, which is all that a job without calibration imports."""
GPU_WRITER = 2 * 10**9
"""What writing takes of a GPU's memory while samples run there: ckptq/encode.py GPU_BAND and GPU_WORKERS."""
BUFFERS = 128 * 10**6
"""What chunk buffers, the writer and the image processor take beside that."""
TURNED, TURNING = 1 << 24, 1 << 21
"""What a thread holds of a matrix that lies transposed in its file, at most, and what it reads that from: ckptq/transpose.py."""
RATES = (("a 16-core CPU at 0.5 TFLOP/s", 0.5e12), ("a GPU at 200 TFLOP/s", 200e12))


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes, and FLOPs of the language model's layers.

    resident  embeddings and towers, needed while samples enter        layer   the largest decoder layer, all its experts included
    sample    what one sample of full length holds while it waits      samples how many there are at most
    passing   what a layer's intermediate values of such a sample take while it passes
    flops     without those of the towers
    ahead     decoder layers that are read while one computes
    turned    what a thread holds that reads routed experts which lie transposed in their file
    """

    resident: int
    layer: int
    sample: int
    passing: int
    samples: int
    tokens: int
    flops: float
    ahead: int = 1
    turned: int = 0

    @property
    def fixed(self) -> int:
        """Peak memory without waiting samples, once imports are in. One thread reads layers; afterwards many read to write."""
        calibrating = self.turned + self.passing + max(self.resident, (1 + self.ahead) * self.layer)
        return IMPORTS + BUFFERS + max(calibrating, threads() * self.turned)

    @property
    def peak(self) -> int:
        """Peak memory with all samples waiting at once."""
        return self.fixed + self.sample * self.samples if self.samples else TORCH + BUFFERS + threads() * self.turned

    @property
    def least(self) -> int:
        """Peak memory with one sample waiting at a time, and one decoder layer."""
        return min(replace(self, ahead=0).fixed + self.sample, self.peak)


def estimate(plan: Plan, component: Component, scope: Scope, recipe: Recipe, *, calibrates: bool) -> Cost:
    """The cost of a plan, taking every sample as long as the recipe allows. Raises SourceError for a config without sizes."""
    layers = [0] * plan.layer_count
    resident = parameters = routed = 0
    experts = scope.experts.runtime + "." if scope.experts else None
    for name, tensor in component.tensors.items():
        at = scope.layer_of(name)
        if scope.skips(name):
            continue
        if at is not None:
            layers[at[0]] += tensor.spec.nbytes
            if experts is not None and at[1].startswith(experts):
                routed += tensor.spec.numel
            else:
                parameters += tensor.spec.numel
        elif not scope.canonical(name).startswith(f"{scope.head}."):
            resident += tensor.spec.nbytes
    settings = of_models(recipe.calibration)
    length = settings.sequence_length
    sample, passing = flowing(component, scope, length)
    text = scope.text(component.config)
    count, chosen = _routing(text, scope, component)
    if count:  # of the experts of a layer, those that a token passes
        parameters += routed * (chosen + count * settings.all_experts) // count
    samples = recipe.calibration.samples if calibrates else 0
    attention = 4 * plan.layer_count * int(text["hidden_size"]) * length / 2
    return Cost(
        resident=resident,
        layer=max(layers),
        sample=sample,
        passing=passing,
        samples=samples,
        tokens=samples * length,
        flops=samples * length * (2 * parameters + attention),
        turned=max((min(t.spec.nbytes, TURNED) + TURNING for t in component.tensors.values() if t.stride), default=0),
    )


def flowing(component: Component, scope: Scope, length: int) -> tuple[int, int]:
    """(`sample`, `passing`) of a sample of that many tokens, see Cost. Raises SourceError for a config without sizes."""
    text = scope.text(component.config)
    try:
        hidden = int(text["hidden_size"])
        intermediate = int(text.get("intermediate_size", 0)) or _widest(component, scope)  # some families call it otherwise
        head_dim = int(text.get("head_dim") or hidden // int(text["num_attention_heads"]))
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(f"config.json: hidden_size and num_attention_heads are needed: {error!r}") from error
    count, chosen = _routing(text, scope, component)
    waiting = 4 * hidden + 4 * head_dim + 2 * hidden * _features(component, scope)
    # gate, up and their product in BF16; norms in F32; which expert each token takes, as transformers' experts note it
    return length * waiting, length * (3 * 2 * intermediate + 4 * 4 * hidden + 2 * 8 * count * chosen)


def _widest(component: Component, scope: Scope) -> int:
    """The largest dimension of a decoder layer's tensors."""
    shapes = (t.spec.shape for name, t in component.tensors.items() if scope.layer_of(name) and not scope.skips(name))
    return max((size for shape in shapes for size in shape), default=0)


def _routing(text: Mapping[str, Any], scope: Scope, component: Component) -> tuple[int, int]:
    """(experts of a layer, those that a token passes); (0, 0) where there are none."""
    count = max(scope.expert_count(component.config, layer) for layer in range(scope.layer_count(component.config)))
    chosen = text.get("num_experts_per_tok")
    return (count, min(chosen, count) if type(chosen) is int and chosen > 0 else count) if count else (0, 0)


def _features(component: Component, scope: Scope) -> int:
    """How many more vectors wait for a token: Qwen3-VL's deepstack adds features between layers, and keeps what it adds them to."""
    found = (at_path(component.config, path) for tower in scope.towers for path in tower.lists.values())
    features = sum(len(blocks) for blocks in found if isinstance(blocks, list))
    return features + 1 if features else 0


def fitting(cost: Cost, limit: int | None, free: int, imports: int = IMPORTS) -> Cost:
    """The same, but without a layer that is read ahead where that leaves no room for one sample. Parameters: see waiting_budget."""
    room = int(0.8 * free) + imports if limit is None else limit
    return cost if cost.fixed - IMPORTS + imports + cost.sample <= room else replace(cost, ahead=0)


def waiting_budget(cost: Cost, limit: int | None, free: int, imports: int = IMPORTS) -> int:
    """Bytes that waiting samples may hold where they are kept: under `limit` in all, or under 80 % of what is `free` now.

    imports   what else takes of `limit`: IMPORTS on the host, GPU_WRITER on a GPU

    Raises RecipeError where not even one sample fits `limit`.
    """
    fixed = cost.fixed - IMPORTS + imports
    if limit is None:
        return max(int(0.8 * free) - (fixed - imports), cost.sample)
    if limit < fixed + cost.sample:
        raise RecipeError(
            f"--memory {size(limit)}: too little: embeddings, a decoder layer and one sample take {size(fixed + cost.sample)}",
            hint=f"give --memory {-(-(fixed + cost.sample) // 10**6)}MB or more, or lower the sequence length",
        )
    return limit - fixed


def available_memory() -> int:
    """Bytes this process may still take: the system's MemAvailable, or its control group's limit where that is lower."""
    info = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(info["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError, KeyError):  # no control group, or no limit
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cache = int(stat["inactive_file"]) + int(stat["active_file"])  # counted as used, and given back when asked for
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()) + cache)
    return free


def peak_rss() -> int:
    """The most memory this process had resident, in bytes. getrusage would tell a fat parent's peak, kept across fork and exec."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def check_space(output: Path, nbytes: int) -> None:
    """Raises OutputError where the disk under `output` has less room than the plan writes."""
    existing = next(p for p in (output.absolute(), *output.absolute().parents) if p.exists())
    stat = os.statvfs(existing)
    free = stat.f_bavail * stat.f_frsize
    if free < nbytes:
        raise OutputError(
            f"{output}: the output takes {size(nbytes)}, the disk has {size(free)} free",
            hint="free some space, or choose another --output",
        )
