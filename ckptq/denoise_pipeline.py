"""A pipeline folder as diffusers runs it, with its models on `meta`: one pipeline object for each prompt, over shared models.

What is passed to a pipeline's `__call__` follows from its signature (diffusers 0.42.1): guidance is `true_cfg_scale` where it has
that, which then needs a negative prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ckptq.calibration import Sample
from ckptq.calibration.encode import read_image
from ckptq.checkpoint import Inventory, Reader
from ckptq.denoise_cost import DYNAMIC, WHOLE, DenoiserPart, refuse_unrunnable
from ckptq.denoise_models import PipelineModel, diffusers_model, transformers_model, unfilled
from ckptq.errors import CalibrationError, UnsupportedError
from ckptq.scopes.denoisers import find_denoiser
from ckptq.sections import PromptCalibration
from ckptq.streamed import quiet

EDITING = ("Edit", "Layered", "ImageToVideo")
"""In the names of pipelines that do nothing without an image."""


@dataclass
class Pipeline:
    """The models of a pipeline, and how to make one of its class for a prompt.

    denoisers  by folder; every one that the pipeline has, converted or not, since each step needs the one before
    encoders   text encoders that are read block by block
    whole      what must be in memory as a whole while prompts are encoded
    """

    denoisers: dict[str, PipelineModel] = field(default_factory=dict)
    encoders: list[PipelineModel] = field(default_factory=list)
    whole: list[PipelineModel] = field(default_factory=list)
    make: Callable[[], Any] = lambda: None


def open_pipeline(
    inventory: Inventory,
    parts: Sequence[DenoiserPart],
    device: torch.device,
    readers: ExitStack,
    *,
    images: bool,
) -> Pipeline:
    """Builds all models on `meta`. `readers` closes the files of those that are in no part. `images`: whether prompts bring some.

    Raises UnsupportedError for a pipeline that diffusers has not, or that brings code of its own.
    """
    index = inventory.pipeline
    for part in parts:
        refuse_unrunnable(index, part.denoiser)
    assert index is not None
    cls = _class(index)
    found = Pipeline()
    known = {part.component.folder: part for part in parts}
    components = {c.folder: c for c in inventory.components} | {folder: part.component for folder, part in known.items()}
    given: dict[str, Any] = {
        name: value for name, value in index.items() if not name.startswith("_") and not isinstance(value, list)
    }
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list):
            continue
        library, kind = entry
        component = components.get(name)
        if library is None or kind is None:
            given[name] = None
        elif component is None:
            given[name] = _loaded(inventory.root / name, library, kind)
        else:
            reader = known[name].reader if name in known else readers.enter_context(Reader(inventory.root, component))
            denoiser = find_denoiser(component.config, index["_class_name"])
            if denoiser is not None:
                stacks = [stack.prefix for stack in denoiser.stacks]
                model = found.denoisers[name] = diffusers_model(component, kind, stacks, reader, device)
            elif library == "diffusers":
                model = diffusers_model(component, kind, (), reader, device)
                found.whole += [model] if images else []
            else:
                whole = name in WHOLE
                model = transformers_model(inventory.root, component, kind, reader, device, whole=whole)
                (found.whole if whole else found.encoders).append(model)
            given[name] = model.model
    found.make = _maker(cls, given, device)
    return found


def _class(index: Mapping[str, Any]) -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise UnsupportedError(
            "prompts are run with diffusers, which is not installed", hint="pip install 'ckptq[diffusion]'"
        ) from error
    name = index["_class_name"]
    cls = getattr(diffusers, name, None)
    if cls is None:
        raise UnsupportedError(f"{name}: diffusers {diffusers.__version__} has no such pipeline", hint=DYNAMIC)
    return cls


def _loaded(folder: Path, library: str, kind: str) -> Any:
    """A scheduler, tokenizer or processor; or a VAE whose weights are no safetensors, without them: none is decoded with."""
    import diffusers
    import transformers

    cls = getattr(diffusers if library == "diffusers" else transformers, kind, None)
    if cls is None:
        raise UnsupportedError(f"model_index.json: {folder.name} is a {kind}, which {library} has not")
    if isinstance(cls, type) and issubclass(cls, torch.nn.Module):
        return unfilled(cls, folder)
    options = {} if library == "diffusers" else {"trust_remote_code": False}
    try:
        with quiet():
            return cls.from_pretrained(folder, local_files_only=True, **options)
    except ImportError as error:
        told = str(error).strip().splitlines()[0]
        raise UnsupportedError(f"{folder.name}: {told}", hint="install the package that it names") from error
    except Exception as error:  # what a library raises depends on what it stumbles over
        told = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsupportedError(f"{folder.name}: {kind} can't be loaded: {told}") from error


def _maker(cls: Any, given: Mapping[str, Any], device: torch.device) -> Callable[[], Any]:
    """Pipelines keep what they are at in themselves and in their scheduler, so that each prompt needs its own."""
    here = type(cls.__name__, (cls,), {"_execution_device": property(lambda self: device)})
    here.__module__ = cls.__module__
    arguments = {name: value for name, value in given.items() if name in inspect.signature(cls.__init__).parameters}

    def make() -> Any:
        with quiet():
            scheduler = type(given["scheduler"]).from_config(given["scheduler"].config)
            pipeline = here(**{**arguments, "scheduler": scheduler})
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


@contextmanager
def hushed() -> Iterator[None]:
    """What the libraries log of prompts, for each one anew, stays unsaid."""
    import diffusers
    import transformers

    logs = (diffusers.utils.logging, transformers.utils.logging)
    before = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity_error()
    try:
        yield
    finally:
        for log, verbosity in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)


def arguments(pipeline: Any, settings: PromptCalibration, sample: Sample, number: int) -> dict[str, Any]:
    """What the pipeline's `__call__` is given for a prompt: its own defaults for all that the settings leave open.

    Noise comes from a generator on the CPU, so that it is the same on every device. Raises CalibrationError for a pipeline that
    edits an image where there is none.
    """
    takes = inspect.signature(type(pipeline).__call__).parameters
    given: dict[str, Any] = {
        "prompt": sample.text,
        "height": settings.height,
        "width": settings.width,
        "num_inference_steps": settings.steps,
        "generator": torch.Generator("cpu").manual_seed(settings.seed + number),
        "output_type": "latent",
        "return_dict": False,
    }
    distilled = getattr(pipeline.transformer.config, "guidance_embeds", False)
    scale = "true_cfg_scale" if "true_cfg_scale" in takes and not distilled else "guidance_scale"
    if settings.guidance is not None and scale in takes:
        given[scale] = settings.guidance
    negative = sample.negative
    if negative is None and "true_cfg_scale" in takes:
        negative = " "
    if negative is not None and "negative_prompt" in takes:
        given["negative_prompt"] = negative
    if settings.frames is not None and "num_frames" in takes:
        given["num_frames"] = settings.frames
    if sample.image is not None and "image" in takes:
        image = read_image(sample.image)
        given["image"] = [image] if type(pipeline).__name__ == "GlmImagePipeline" else image
    elif any(word in type(pipeline).__name__ for word in EDITING):
        raise CalibrationError(
            f"{sample.name}: {type(pipeline).__name__} edits an image, and the prompt brings none",
            hint="name some in calibration.images, or give `image` in the lines of a .jsonl file",
        )
    return {name: value for name, value in given.items() if name in takes}
