"""Tiny diffusion pipelines: one file per model writes a folder with its layout, for tests and benchmarks.

A file in this folder that isn't `parts.py` holds one `PIPELINE`; it is found by its being here, and named as the denoiser's file in
ckptq/scopes/denoisers. Nothing heavy is imported before `make` is called. Weights are random, BF16, the same every time.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A pipeline's tiny folder.

    make         writes it into a folder; with `layers=3` and what else each file takes, of other sizes
    denoisers    subfolders with a denoiser, in the order they run in: "" where the checkpoint is one of a single component
    diffusers    the pipeline's class in diffusers, "" where diffusers has none: then its weights have the hub's names by hand
    server       the pipeline's class in vLLM-Omni
    """

    make: Callable[..., None]
    denoisers: tuple[str, ...]
    diffusers: str
    server: str


def pipelines() -> dict[str, Pipeline]:
    """All of them, by the name of their file."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "parts")
    return {name: importlib.import_module(f"pipelines.{name}").PIPELINE for name in names}
