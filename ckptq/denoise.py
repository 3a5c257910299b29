"""Amaxes of denoisers: the pipeline's own loop over prompts, steps and guidance, with one block of one model in memory at a time.

Text encoders run first, over all prompts, and are freed. Then a denoiser is read once for each denoising step, since a step needs
the one before; which of several runs a step says the pipeline, Wan2.2's by its boundary_ratio. Nothing is decoded to an image.
Amaxes equal those of the resident pipeline on the same prompts, seeds and steps bit for bit (tests/test_denoise.py).

A killed run starts again: what a prompt knows lies in the frames of the pipeline's own code, which nothing can save.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from greenlet import GreenletExit

from ckptq.blocks import Look, unseen
from ckptq.calibration import Sample, load_samples
from ckptq.checkpoint import Inventory, read_inventory
from ckptq.console import Advance, Console
from ckptq.cost import available_memory
from ckptq.denoise_cost import DYNAMIC, IMPORTS, DenoiserPart, fitting, reads, room
from ckptq.denoise_models import PipelineModel
from ckptq.denoise_pipeline import Pipeline, arguments, hushed, open_pipeline
from ckptq.denoise_run import Run
from ckptq.errors import CalibrationError, DataError, UnsupportedError
from ckptq.observe import Seen
from ckptq.plan import Observer
from ckptq.sections import PromptCalibration

__all__ = ["DenoiserPart", "measure"]

Table = dict[str, float]
"""{observer: amax}."""


def measure(
    root: Path,
    parts: Sequence[DenoiserPart],
    settings: PromptCalibration,
    device: torch.device,
    console: Console,
    *,
    memory: int | None = None,
    samples: Sequence[Sample] | None = None,
    inventory: Inventory | None = None,
) -> dict[str, Table]:
    """{folder: {observer: amax}} of the parts' inputs, and of the weights in their blocks.

    memory     bytes that the process may take; more prompts than fit pass a step's blocks in waves, each of which reads them again
    samples    what `load_samples(settings)` has found, where that is known
    inventory  the same of `read_inventory(root)`

    Raises UnsupportedError for a pipeline that diffusers can't run or that brings code of its own, CalibrationError where it does
    not run with these settings, DataError for NaN, infinity, and a denoiser or a module that no step reached.
    """
    inventory = inventory or read_inventory(root)
    samples = samples or load_samples(settings)
    with ExitStack() as stack, torch.random.fork_rng(), torch.no_grad():
        pipeline = open_pipeline(inventory, parts, device, stack, images=any(sample.image for sample in samples))
        stack.enter_context(hushed())
        # Of a GPU's memory imports take nothing.
        limit = memory if memory is None or device.type == "cpu" else memory + IMPORTS
        needed = fitting(reads(inventory, settings), limit)
        for model in pipeline.denoisers.values():
            model.ahead = needed.ahead
        budget = room(needed, limit, _free(device))
        work = _Work(pipeline, parts, samples, settings, console)
        for part in parts:
            work.observe(part, stack)
        work.run(budget)
        return {folder: work.table(part) for folder, part in work.parts.items()}


def _free(device: torch.device) -> int:
    return available_memory() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]


class _Work:
    """Which models have their weights, what was seen, and how often what was read."""

    def __init__(
        self,
        pipeline: Pipeline,
        parts: Sequence[DenoiserPart],
        samples: Sequence[Sample],
        settings: PromptCalibration,
        console: Console,
    ) -> None:
        self.parts = {part.component.folder: part for part in parts}
        self._pipeline = pipeline
        self._samples = samples
        self._settings = settings
        self._console = console
        self._seen = {folder: Seen() for folder in self.parts}
        self._tables: dict[str, Table] = {folder: {} for folder in self.parts}
        self._loaded: list[PipelineModel] = []
        self._reads: dict[str, list[int]] = {folder: [] for folder in pipeline.denoisers}
        self._advance: Advance = lambda count: None

    def observe(self, part: DenoiserPart, stack: ExitStack) -> None:
        """Notes what enters the modules of the part's observers, until `stack` ends."""
        folder = part.component.folder
        for observer in (o for o in part.observers if o.kind == "input"):
            try:
                module = self._pipeline.denoisers[folder].model.get_submodule(observer.module)
            except AttributeError as error:
                raise UnsupportedError(
                    f"{folder}: diffusers' {part.denoiser.builder} has no module {observer.module}", hint=DYNAMIC
                ) from error
            stack.callback(module.register_forward_pre_hook(partial(_note, self._seen[folder], observer)).remove)

    def run(self, budget: int) -> None:
        """Runs all prompts to the end of their last step."""
        denoisers = list(self._pipeline.denoisers.values())
        run = Run(denoisers, budget, self)
        total = self._settings.steps * max(len(model.blocks) for model in denoisers)
        with ExitStack() as stack, self._console.stage("denoise", total, "layers") as self._advance:
            for model in (*denoisers, *self._pipeline.encoders):
                stack.enter_context(run.watching(model))
            stack.callback(self._load)
            self._load(*self._pipeline.encoders, *self._pipeline.whole)
            run.run([self._prompt(number) for number in range(len(self._samples))])
        self._tell()

    def _prompt(self, number: int) -> Callable[[], Any]:
        pipeline = self._pipeline.make()
        given = arguments(pipeline, self._settings, self._samples[number], number) | {"callback_on_step_end": _stop}

        def prompt() -> None:
            try:
                pipeline(**given)
            except ValueError as error:
                raise CalibrationError(f"{type(pipeline).__name__} does not run with these settings: {error}") from error
            except (ImportError, NameError) as error:  # diffusers 0.42.1 names ftfy where it has not been able to import it
                raise UnsupportedError(f"{type(pipeline).__name__} needs a package that is not installed: {error}") from error

        return prompt

    def _load(self, *models: PipelineModel) -> None:
        """These models have their weights, less those of blocks, and no others."""
        for model in self._loaded:
            if model not in models:
                model.drop_resident()
        before, self._loaded = self._loaded, list(models)
        for model in models:
            if model not in before:
                model.load_resident()

    def turn(self, number: int) -> None:
        """A prompt goes on."""
        for seen in self._seen.values():
            seen.sample = number

    def begin(self, model: PipelineModel) -> Look:
        """A model is about to be read. What is returned is shown its tensors."""
        if model in self._pipeline.encoders:
            return unseen
        if self._loaded != [model]:
            self._load(model)
        first, part = not self._reads[model.folder], self.parts.get(model.folder)
        weighed = part is not None and any(o.kind == "weight" for o in part.observers)
        return self._seen[model.folder].note_weight if first and weighed else unseen

    def block(self, model: PipelineModel) -> None:
        """All calls have passed a block of it."""
        if model not in self._pipeline.encoders:
            self._advance(1)

    def end(self, model: PipelineModel, reads: int) -> None:
        """All calls that waited for it have run; it was read so many times for that."""
        if model in self._pipeline.encoders:
            return
        self._reads[model.folder].append(reads)
        if (seen := self._seen.get(model.folder)) is None:
            return
        table, names = self._tables[model.folder], {f"{o.module}.weight": o.name for o in self.parts[model.folder].observers}
        table |= {names[name]: amax for name, amax in seen.take_weights().items() if name in names}
        for observer, amax in seen.take([sample.name for sample in self._samples]).items():
            table[observer.name] = max(table.get(observer.name, 0.0), amax)

    def table(self, part: DenoiserPart) -> Table:
        """{observer: amax} of a part. Raises DataError where no step reached one of its observers."""
        folder, steps = part.component.folder, self._settings.steps
        missing = [o for o in part.observers if o.kind == "input" and o.name not in self._tables[folder]]
        if missing and not self._reads[folder]:
            raise DataError(
                f"{folder}: none of the {steps} denoising steps runs it",
                hint="raise calibration.steps; which denoiser runs a step follows from the pipeline's boundary_ratio",
            )
        if missing:
            raise DataError(
                f"{folder}: no prompt reached {missing[0].module} ({len(missing)} such modules)",
                hint="add prompts that use it, or keep the module in the recipe",
            )
        return self._tables[folder]

    def _tell(self) -> None:
        """Says so where the denoisers were read more often than once a step."""
        waves = max((max(found) for found in self._reads.values() if found), default=1)
        passes = sum(len(found) for found in self._reads.values())
        if waves > 1:
            self._console.note(f"denoise: prompts passed in up to {waves} waves, for want of memory; each read all blocks")
        if passes > self._settings.steps:
            self._console.note(f"denoise: the pipeline ran its denoisers {passes} times in {self._settings.steps} steps")


def _stop(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Ends a prompt after its last step: some pipelines ask things of the VAE even if nothing is decoded."""
    if step + 1 == pipeline.num_timesteps:
        raise GreenletExit
    return values


def _note(seen: Seen, observer: Observer, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    seen.note(observer, args[0])
