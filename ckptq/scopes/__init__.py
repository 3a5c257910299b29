"""Scopes: one file per architecture family, data only. A scope says where the language model is and how the server builds it.

A file in this folder holds one `SCOPE`; it is found by its being here. Module names in a scope are *canonical*: the first of the
naming generations below. Names of the source checkpoint are never rewritten; they are compared in canonical form.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ckptq.errors import SourceError, UnsupportedError

MOST_LAYERS, MOST_EXPERTS, MOST_IN_ALL = 4096, 4096, 65_536
"""Layers, experts of a layer and experts of all layers. No model has more, and no config.json shall make anybody count further."""


Split = Literal["heads", "rows", "columns", "none"]


@dataclass(frozen=True, slots=True)
class Fused:
    """One linear as the server builds it, and the modules of the checkpoint whose rows it stacks (its shards).

    `shards` share one input, and one weight scale where the format is per tensor. Names are relative to the layer or tower.
    `split` is what tensor parallelism shares out between ranks: rows by attention heads, rows, columns, or nothing.
    """

    runtime: str
    shards: tuple[str, ...]
    split: Split = "none"


@dataclass(frozen=True, slots=True)
class Tower:
    """A part other than the language model (vision, audio). `{i}` in a name stands for a block's number.

    `depth` is where config.json has the number of blocks: `section.key`.
    """

    prefix: str
    depth: str
    linears: tuple[Fused, ...]


@dataclass(frozen=True, slots=True)
class Experts:
    """The routed experts of a layer, which the server builds as one module. Names are relative to the layer.

    runtime       that module
    groups        the linears of one expert that share a slot there: (gate, up), (down,); `{e}` is the expert's number
    linears       further linears of a layer that has experts: the router
    dense         prefix of the linears that such a layer does without
    counts        keys of the number of experts in the language model's config; the first that is there counts
    step          key of n, where only every nth layer has experts, or ""
    dense_layers  key of a list of layers without experts, or ""
    """

    runtime: str
    groups: tuple[tuple[str, ...], ...]
    linears: tuple[Fused, ...]
    dense: str
    counts: tuple[str, ...]
    step: str = ""
    dense_layers: str = ""


@dataclass(frozen=True, slots=True)
class Scope:
    """An architecture family.

    architectures  values of config.json's `architectures` that this scope serves
    source         the server's file and version that names, fusing and prefixes were read in
    auto_class     transformers' auto class that builds the model for calibration
    text_config    key of the language model's own config inside config.json, or "" where it is the whole
    generations    (prefix as some checkpoints have it, canonical prefix), longest first
    layers         canonical prefix of the decoder layers, before the number
    linears        the quantizable linears of a decoder layer
    kv             (module whose output becomes K, module whose output becomes V), relative to the layer
    towers         parts that stay
    parameters     every tensor that the server reads, without scales: canonical name -> its dimensions, in the words of
                   validators/vllm_rules.py; `{i}` stands for the number of a layer or block
    kept           canonical names of further linear or embedding modules outside the layers, which stay
    server_prefix  (checkpoint prefix, server prefix), the server's own mapping in its order
    server_layers  the server's prefix of the decoder layers
    server_kept    the server's names of the linears among `kept`, which its exclude list must reach
    experts        the routed experts, where the family has them
    explicit_head_dim  whether the server takes head_dim from config.json where it is there
    """

    name: str
    architectures: tuple[str, ...]
    source: str
    auto_class: str
    text_config: str
    generations: tuple[tuple[str, str], ...]
    layers: str
    linears: tuple[Fused, ...]
    kv: tuple[str, str]
    towers: tuple[Tower, ...]
    parameters: Mapping[str, str]
    kept: tuple[str, ...]
    server_prefix: tuple[tuple[str, str], ...]
    server_layers: str
    server_kept: tuple[str, ...]
    experts: Experts | None = None
    explicit_head_dim: bool = False

    def canonical(self, name: str) -> str:
        """A source name in canonical form: `model.language_model.layers.0.x` -> `model.layers.0.x`."""
        for long, short in self.generations:
            if name.startswith(long):
                return short + name[len(long) :]
        return name

    def spellings(self, name: str) -> frozenset[str]:
        """The name as every generation writes it, so that a pattern may use any of them."""
        canonical = self.canonical(name)
        others = {long + canonical[len(short) :] for long, short in self.generations if canonical.startswith(short)}
        return frozenset({name, canonical, *others})

    def layer_of(self, name: str) -> tuple[int, str] | None:
        """(layer number, rest of the name) of a source name inside a decoder layer, else None."""
        match = re.fullmatch(re.escape(self.layers) + r"\.(\d+)\.(.+)", self.canonical(name))
        return (int(match[1]), match[2]) if match else None

    def text(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The language model's part of config.json. Old files keep its keys at the top level."""
        section = config.get(self.text_config) if self.text_config else config
        return section if isinstance(section, Mapping) and "num_hidden_layers" in section else config

    def layer_count(self, config: Mapping[str, Any]) -> int:
        """`num_hidden_layers`. Raises SourceError where config.json does not give it."""
        count = self.text(config).get("num_hidden_layers")
        if type(count) is not int or not 1 <= count <= MOST_LAYERS:
            raise SourceError(f"config.json: num_hidden_layers should be an integer from 1 to {MOST_LAYERS}, found {count!r:.80}")
        return count

    def experts_key(self, config: Mapping[str, Any]) -> str:
        """The key under which this config.json has the number of experts; "" where the family has none."""
        keys = self.experts.counts if self.experts else ("",)
        return next((key for key in keys if key in self.text(config)), keys[0])

    def expert_count(self, config: Mapping[str, Any], layer: int) -> int:
        """How many routed experts a layer has; 0 for a dense one. Raises SourceError where config.json does not give it."""
        if self.experts is None:
            return 0
        text, key = self.text(config), self.experts_key(config)
        count = text.get(key)
        if type(count) is not int or not 0 <= count <= MOST_EXPERTS:
            raise SourceError(f"config.json: {key} should be an integer up to {MOST_EXPERTS}, found {count!r:.80}")
        if count * self.layer_count(config) > MOST_IN_ALL:
            raise SourceError(f"config.json: {key} {count} in {self.layer_count(config)} layers: expected {MOST_IN_ALL} at most")
        dense, step = text.get(self.experts.dense_layers) or (), text.get(self.experts.step, 1)
        if (isinstance(dense, list) and layer in dense) or (isinstance(step, int) and step > 1 and (layer + 1) % step):
            return 0
        return count


def all_scopes() -> Iterator[Scope]:
    """Every scope in this folder, by file name."""
    for module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
        yield importlib.import_module(f"{__name__}.{module}").SCOPE


def find_scope(config: Mapping[str, Any]) -> Scope:
    """The scope for a config.json. Raises UnsupportedError naming the architecture and those that are known."""
    said = config.get("architectures")
    wanted = said if isinstance(said, list) else []
    scopes = list(all_scopes())
    for scope in scopes:
        if any(name in scope.architectures for name in wanted):
            return scope
    known = ", ".join(sorted(name for scope in scopes for name in scope.architectures))
    raise UnsupportedError(
        f"config.json: no scope for architectures {wanted!r:.200}; known: {known}",
        hint="a scope is one data file in ckptq/scopes; CONTRIBUTING.md says how to add one",
    )
