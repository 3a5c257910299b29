"""What running a denoiser will read and hold: from tensors' names alone, without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckptq.checkpoint import Component, Inventory, Reader
from ckptq.console import size
from ckptq.errors import RecipeError, UnsupportedError
from ckptq.plan import Observer
from ckptq.scopes.denoisers import Denoiser, find_denoiser
from ckptq.sections import PromptCalibration

IMPORTS = 520 * 10**6
"""Resident bytes after importing torch 2.13 (CPU), transformers 5.17 and a pipeline of diffusers 0.42."""
BUFFERS = 64 * 10**6
WHOLE = ("vision_language_encoder",)
"""Text encoders that must be in memory as a whole: GLM-Image's writes tokens one by one, and would be read for each."""
DYNAMIC = "take a scheme that needs no prompts: fp8-dynamic"
_OUTER = re.compile(r"(?P<stack>.*?[^.\d][^.]*)\.(?P<number>\d+)\.")


@dataclass(frozen=True, slots=True)
class DenoiserPart:
    """A component that needs activations: `observers` name its modules without the folder."""

    component: Component
    denoiser: Denoiser
    observers: Sequence[Observer]
    reader: Reader


@dataclass(frozen=True, slots=True)
class Reads:
    """Bytes. All prompts and guidance branches share a step; more prompts than memory holds are further reads of it.

    step       read from disk for a step: a denoiser's blocks. Of several denoisers, of which one runs a step, the largest's
    steps      how many there are
    resident   what is beside the blocks in a denoiser, in memory while it runs
    block      the largest block
    encoders   in memory while prompts are encoded: embeddings, two layers at a time, and whole what writes tokens or encodes images
    ahead      blocks of a denoiser that are read while one computes
    """

    step: int
    steps: int
    resident: int
    block: int
    encoders: int
    ahead: int = 1

    @property
    def total(self) -> int:
        return self.step * self.steps

    @property
    def peak(self) -> int:
        """Of memory, less what waiting prompts hold."""
        return IMPORTS + BUFFERS + max(self.encoders, self.resident + (1 + self.ahead) * self.block)


def reads(inventory: Inventory, settings: PromptCalibration) -> Reads:
    """What the denoisers of a pipeline will read, and what its other components hold. At least one must be a denoiser."""
    pipeline, whole, encoders = inventory.pipeline or {}, ["vae", *WHOLE] if settings.images else list(WHOLE), 0
    stacks: list[list[int]] = []
    resident = 0
    for component in inventory.components:
        denoiser = find_denoiser(component.config, pipeline.get("_class_name"))
        if denoiser is not None:
            stacks.append(_stacked(component, denoiser))
            resident = max(resident, component.nbytes - sum(stacks[-1]))
        elif component.folder in whole:
            encoders += component.nbytes
        elif component.folder != "vae":
            blocks = _blocks(component)
            encoders += component.nbytes - sum(blocks.values()) + 2 * max(blocks.values(), default=0)
    return Reads(
        step=max(map(sum, stacks)),
        steps=settings.steps,
        resident=resident,
        block=max(max(blocks, default=0) for blocks in stacks),
        encoders=encoders,
    )


def _stacked(component: Component, denoiser: Denoiser) -> list[int]:
    """Bytes of each block, stack after stack."""
    found: dict[str, int] = {}
    for name, tensor in component.tensors.items():
        for stack in denoiser.stacks:
            if name.startswith(f"{stack.prefix}."):
                block = f"{stack.prefix}.{name[len(stack.prefix) + 1 :].partition('.')[0]}"
                found[block] = found.get(block, 0) + tensor.spec.nbytes
    return list(found.values())


def _blocks(component: Component) -> dict[str, int]:
    """{outermost numbered part of names: bytes}: the layers of a text encoder, as its names show them."""
    found: dict[str, int] = {}
    for name, tensor in component.tensors.items():
        if match := _OUTER.match(name):
            found[match[0]] = found.get(match[0], 0) + tensor.spec.nbytes
    return found


def refuse_unrunnable(pipeline: Mapping[str, Any] | None, denoiser: Denoiser) -> None:
    """Raises UnsupportedError where no class of diffusers runs this denoiser's pipeline, or code of the checkpoint's own would."""
    name = (pipeline or {}).get("_class_name")
    if not denoiser.builder or pipeline is None:
        what = name if isinstance(name, str) else denoiser.name
        raise UnsupportedError(
            f"{what}: diffusers has no pipeline of it, so no prompts can be run through its denoiser", hint=DYNAMIC
        )
    for component, entry in pipeline.items():
        if component.startswith("_") or not isinstance(entry, list):
            continue
        if len(entry) != 2 or entry[0] not in ("diffusers", "transformers", None):
            raise UnsupportedError(
                f"model_index.json: {component} is a class of {entry[0]!r}; only classes of diffusers and transformers are run",
                hint=DYNAMIC,
            )


def fitting(needed: Reads, limit: int | None) -> Reads:
    """The same, but without a block that is read ahead where that leaves no room for what waits."""
    return needed if limit is None or limit > needed.peak else replace(needed, ahead=0)


def room(needed: Reads, limit: int | None, free: int) -> int:
    """Bytes that waiting prompts may hold: under `limit` in all, or 80 % of what is `free` now. Raises RecipeError for none."""
    if limit is None:
        return max(int(0.8 * free) - (needed.peak - IMPORTS), 0)
    if limit <= needed.peak:
        raise RecipeError(
            f"--memory {size(limit)}: too little: text encoders, or a block of the denoiser, take {size(needed.peak)}",
            hint=f"give --memory {-(-needed.peak * 11 // 10**7)}MB or more",
        )
    return limit - needed.peak
