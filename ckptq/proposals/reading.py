"""What transformers says of a checkpoint: its model on `meta`, and which stored tensor fills what."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptq.checkpoint import Component, TensorSpec
from ckptq.errors import UnsupportedError
from ckptq.plan import module_of
from ckptq.scopes import MOST_LAYERS

AUTO = ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModelForMultimodalLM")


@dataclass(slots=True)
class Found:
    """The model and its parameters.

    stored     {name in memory: stored name}
    experts    {parameter that holds all experts of a layer: stored names, `{e}` for the expert's number, in the order of memory}
    unknown    stored names that the class does not know
    uncertain  {field of the scope: why}
    """

    model: Any
    config: Any
    component: Component
    stored: dict[str, str] = field(default_factory=dict)
    experts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    uncertain: dict[str, str] = field(default_factory=dict)

    def note(self, name: str, why: str) -> None:
        """Says that a field is uncertain."""
        self.uncertain[name] = f"{self.uncertain[name]}; {why}" if name in self.uncertain else why

    def spec(self, memory: str) -> TensorSpec:
        """The stored tensor that fills a parameter."""
        return self.component.tensors[self.stored[memory]].spec

    def name_of(self, module: str) -> str:
        """A module in memory as the files call it; the name in memory where nothing of it is stored."""
        inside = next((n for n in self.stored if n.startswith(module + ".")), "")
        stored, rest = self.stored.get(inside, ""), inside[len(module) :]
        return stored.removesuffix(rest) if stored.endswith(rest) and rest else module


def version() -> str:
    """Of transformers."""
    import transformers

    return str(transformers.__version__)


def read(folder: Path, component: Component) -> Found:
    """Builds the model. Raises UnsupportedError where transformers can't, or makes parameters in ways that no scope can say."""
    import torch
    import transformers

    from ckptq.streamed import quiet

    said = component.config.get("architectures")
    name = said[0] if isinstance(said, list) and said and isinstance(said[0], str) else None
    if name is None:
        raise UnsupportedError("no scope can be proposed: config.json names no architecture")
    if endless := next((key for key, count in _counts(component.config) if count > MOST_LAYERS), None):
        raise UnsupportedError(f"no scope can be proposed: config.json: {endless} is above {MOST_LAYERS}")
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            with torch.device("meta"):
                model = getattr(transformers, auto_class(config, name)).from_config(config)
    except UnsupportedError:
        raise
    except Exception as problem:  # transformers raises anything at a config.json that it can't use
        told = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise UnsupportedError(f"no scope can be proposed: transformers {version()} can't build {name}: {told:.300}") from problem
    found = Found(model, config, component)
    _place(found)
    return found


def _counts(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """What config.json counts and a model is built by, in any section: nobody shall be made to build a million layers."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _counts(value)
        elif isinstance(value, int) and re.search("(layers?|depth|blocks|experts)$", key):
            yield key, value


def auto_class(config: Any, name: str) -> str:
    """The auto class that builds the architecture. Raises UnsupportedError where none does."""
    import transformers

    for auto in AUTO:
        mapping = getattr(getattr(transformers, auto, None), "_model_mapping", {})
        built = mapping.get(type(config), ())
        if name in {b.__name__ for b in (built if isinstance(built, tuple) else (built,))}:
            return auto
    raise UnsupportedError(f"no scope can be proposed: none of {', '.join(AUTO)} of transformers {version()} builds {name}")


def _place(found: Found) -> None:
    """By transformers' own mapping: conversion_mapping.py, core_model_loading.py rename_source_key of 5.17.0."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(found.model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = found.model.state_dict()
    merged: dict[str, dict[str, str]] = {}
    for name in found.component.tensors:
        memory, pattern = rename_source_key(name, renamings, converters, found.model.base_model_prefix, state)
        if memory not in state:
            found.unknown.append(name)
        elif pattern is None:
            found.stored[memory] = name
        else:
            merged.setdefault(memory, {})[pattern] = re.sub(r"\.\d+\.(?=[^.]+\.weight$)", ".{e}.", name)
    for memory, by_pattern in merged.items():
        order = next(c.source_patterns for c in converters if next(iter(by_pattern)) in c.source_patterns)
        found.experts[memory] = tuple(by_pattern[pattern] for pattern in order if pattern in by_pattern)
        if odd := next((name for name in by_pattern.values() if "{e}" not in name), None):
            raise UnsupportedError(f"no scope can be proposed: transformers makes {memory} of {odd} in a way that no scope says")


def is_matrix(found: Found, memory: str) -> bool:
    """Whether a name in memory is a weight of two dimensions."""
    return memory.endswith(".weight") and len(found.spec(memory).shape) == 2


def leaf(module: str) -> str:
    """The last part of a name."""
    return module.rpartition(".")[2]


def parent(module: str) -> str:
    """All but the last part."""
    return module_of(module)
