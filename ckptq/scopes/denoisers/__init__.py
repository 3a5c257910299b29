"""Scopes of denoisers: one file for each transformer of a diffusion pipeline, data only.

A denoiser says which linears of its blocks vLLM-Omni can build quantized, how it fuses them, and under which names their scales
arrive. Module names are those of the checkpoint's own files; `runtime` names are the server's.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptq.errors import SourceError
from ckptq.scopes import MOST_LAYERS, Fused, at_path


@dataclass(frozen=True, slots=True)
class Stack:
    """A list of blocks.

    prefix   before a block's number, as stored: `transformer_blocks`
    depth    key of config.json with the number of blocks, `a.b` where it is deeper
    linears  the linears of a block that the server builds with the quantization config, fused as it fuses them. Names are relative
             to the block; `{e}` in a name stands for a routed expert's number. Those of one `runtime` are parts of one
             module there: quantized all or none, in one scheme
    stays    linears of a block that the server builds without it, whatever is stored, relative to the block
    kept     linears of a block that the server builds with it, and that stay all the same: each list of what it ignores must
             reach them
    experts  key of config.json with the number of routed experts, or ""
    optional `runtime` of linears that some blocks or checkpoints do without
    server   `prefix` as the server's lists know it, where that differs
    """

    prefix: str
    depth: str
    linears: tuple[Fused, ...]
    stays: tuple[str, ...] = ()
    kept: tuple[Fused, ...] = ()
    experts: str = ""
    optional: tuple[str, ...] = ()
    server: str = ""

    def count(self, config: Mapping[str, Any]) -> int:
        """The number of blocks. Raises SourceError where config.json does not give it."""
        return _count(config, self.depth)

    def called(self, number: int) -> str:
        """A block as the server's lists know it: `transformer_blocks.0`."""
        return f"{self.server or self.prefix}.{number}"


@dataclass(frozen=True, slots=True)
class Encoder:
    """A text encoder that the server builds with the denoiser's quantization config, so that a list must name all of its linears.

    folder     its component
    pipelines  those of the denoiser's that do so
    patterns   what reaches them where a list has patterns
    layers     before a layer's number, as the server calls it
    depth      key of the component's config.json with the number of layers
    linears    of a layer, as the server calls them, relative to it
    others     further ones
    """

    folder: str
    pipelines: tuple[str, ...]
    patterns: tuple[str, ...]
    layers: str
    depth: str
    linears: tuple[str, ...]
    others: tuple[str, ...] = ()

    def names(self, config: Mapping[str, Any]) -> list[str]:
        """All of them, for lists that have exact names alone. Raises SourceError where the encoder's config.json has no depth."""
        layers = range(_count(config, self.depth))
        return [*(f"{self.layers}.{i}.{linear}" for i in layers for linear in self.linears), *self.others]


@dataclass(frozen=True, slots=True)
class Denoiser:
    """One transformer of a pipeline, or of several.

    classes    values of `_class_name` in its config.json; of a root checkpoint, of `architectures`
    pipelines  values of `_class_name` in model_index.json under which the server runs it; () of a root checkpoint
    source     the server's file and version that all this was read in
    builder    the class of diffusers that computes it, for static scales; "" where diffusers has none
    folders    the components that may hold it: ("transformer",), of Wan 2.2 ("transformer", "transformer_2"), of a root ("",)
    stacks     its blocks, in the order in which they run
    stays      further linears that stay, whatever a recipe says: embedders, modulations, the output. Patterns of stored names
    kept       further linears that the server builds with the quantization config, and that stay all the same
    modules    {end of a linear's name, as the server's lists know it: end of its module's name, before `.weight`}, where these
               differ
    renamed    {part of a stored name: what a file of format modelopt must call it, so that the server's adapter finds its scale}.
               A file with such names is none that plain diffusers loads
    joined     {name of a linear in such a file: the linears whose rows it stacks}, relative to the block: OmniGen2's gate_up_proj
    adapted    folders whose files go through that adapter
    ignore     patterns of the server's names that every list of patterns is given: they reach all that is `kept`, and of what stays
               at least what other versions of the server would build quantized. Lists of exact names are given what is `kept`
    encoder    the pipeline's text encoder, where the server gives it the same config
    formats    {export.format: its schemes} that the server takes for it
    options    {export.format: what the server must be started with}, where the files alone do not do
    padded     whether the server pads sizes that are no multiple of 16 itself
    """

    name: str
    classes: tuple[str, ...]
    pipelines: tuple[str, ...]
    source: str
    builder: str
    stacks: tuple[Stack, ...]
    stays: tuple[str, ...]
    folders: tuple[str, ...] = ("transformer",)
    kept: tuple[Fused, ...] = ()
    modules: Mapping[str, str] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    adapted: tuple[str, ...] = ("transformer",)
    ignore: tuple[str, ...] = ()
    encoder: Encoder | None = None
    formats: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    padded: bool = False


def _count(config: Mapping[str, Any], path: str) -> int:
    count = at_path(config, path)
    if type(count) is not int or not 0 <= count <= MOST_LAYERS:
        raise SourceError(f"config.json: {path} should be an integer up to {MOST_LAYERS}, found {count!r:.80}")
    return count


def all_denoisers() -> Iterator[Denoiser]:
    """Every denoiser in this folder, by file name."""
    for module in sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")):
        yield importlib.import_module(f"{__name__}.{module}").DENOISER


def find_denoiser(config: Mapping[str, Any], pipeline: str | None) -> Denoiser | None:
    """The denoiser of a component's config.json inside a pipeline of that `_class_name`; None for a component that is none.

    pipeline   None for a root checkpoint, which has no model_index.json
    """
    said = config.get("architectures") if pipeline is None else [config.get("_class_name")]
    names = [name for name in said if isinstance(name, str)] if isinstance(said, list) else []
    return next((d for d in all_denoisers() if set(names) & set(d.classes) and (pipeline is None or pipeline in d.pipelines)), None)
