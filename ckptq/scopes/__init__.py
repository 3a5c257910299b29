"""Scopes: one file per architecture family, data only. A scope says where the language model is and how the server builds it.

A file in this folder holds one `SCOPE`; it is found by its being here. One whose name begins with an underscore has what several
share, and is no scope. Module names in a scope are *canonical*: the first of the
naming generations below. Names of the source checkpoint are never rewritten; they are compared in canonical form.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ckptq.errors import SourceError, UnsupportedError

MOST_LAYERS, MOST_EXPERTS, MOST_IN_ALL = 4096, 4096, 65_536
"""Layers, experts of a layer and experts of all layers. No model has more, and no config.json shall make anybody count further."""


Split = Literal["heads", "rows", "columns", "none"]
_READ = {"extra": "forbid"}
"""How pydantic reads these classes where a recipe spells a scope out: no key is passed over."""


@dataclass(frozen=True, slots=True)
class Fused:
    """One linear as the server builds it, and the modules of the checkpoint whose rows it stacks (its shards).

    `shards` share one input, and one weight scale where the format is per tensor. Names are relative to the layer or tower.
    `split` is what tensor parallelism shares out between ranks: rows by attention heads, rows, columns, or nothing.
    `packed` says whether the server's packed_modules_mapping tells the shards, so that lists of modules may name them.
    """

    __pydantic_config__: ClassVar[Any] = _READ
    runtime: str
    shards: tuple[str, ...]
    split: Split = "none"
    multiple: int = 1
    packed: bool = True


@dataclass(frozen=True, slots=True)
class Tower:
    """A part other than the language model (vision, audio, what joins them to it). `{i}` in a name stands for a block's number.

    prefix   canonical
    depth    where config.json has the number of blocks, or a list of as many: `section.key`, or deeper; "" where there are none.
             The section is the tower's config: `section.` for one without blocks
    linears  what the server builds with the quantization config
    sizes    words of the dimensions of its parameters -> keys of its config, multiplied: "3 * embed_dim", "a / b * c + 1"
    assumed  what the server takes for keys that its config leaves out: see Scope
    heads    key of the number of attention heads there; "" where there are none
    lists    further blocks with a number of their own: name inside the tower -> where it is, as in `depth`
    used_to  top-level key of the number of the block whose output is used, "" where it is the last: later ones are not built
    unread   names inside the tower that are stored, and not read
    """

    __pydantic_config__: ClassVar[Any] = _READ
    prefix: str
    depth: str
    linears: tuple[Fused, ...]
    sizes: Mapping[str, str] = field(default_factory=dict)
    assumed: Mapping[str, Any] = field(default_factory=dict)
    heads: str = "num_heads"
    lists: Mapping[str, str] = field(default_factory=dict)
    used_to: str = ""
    unread: tuple[str, ...] = ()

    def config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The tower's part of config.json."""
        found = at_path(config, self.depth.rpartition(".")[0])
        return {**self.assumed, **found} if isinstance(found, Mapping) else self.assumed


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
    stored        a tensor for each of `groups` in which files may hold those of all experts together (ckptq/unstack.py)
    """

    __pydantic_config__: ClassVar[Any] = _READ
    runtime: str
    groups: tuple[tuple[str, ...], ...]
    linears: tuple[Fused, ...]
    dense: str
    counts: tuple[str, ...]
    step: str = ""
    dense_layers: str = ""
    stored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Scope:
    """An architecture family.

    architectures  values of config.json's `architectures` that this scope serves
    source         the server's file and version that names, fusing and prefixes were read in
    auto_class     transformers' auto class that builds the model for calibration
    text_config    key of the language model's own config inside config.json, `a.b` where it is deeper, or "" where it is the whole
    flat           whether the server takes the language model's keys from the top level, too, where that section is not there
    generations    (prefix as some checkpoints have it, canonical prefix), longest first
    aliases        (part of a name as some checkpoints have it, canonical part), which the server takes for the same
    layers         canonical prefix of the decoder layers, before the number
    linears        the quantizable linears of a decoder layer
    kv             (module whose output becomes K, module whose output becomes V), relative to the layer; ("", "") where none does
    towers         parts that stay
    parameters     every tensor that the server reads, without scales: canonical name -> its dimensions, in the words of
                   validators/vllm_rules.py; `{i}` stands for the number of a layer or block; a number is itself, `?` is any.
                   After ` if ` come keys of the language model's config, joined by ` or `: the server has the tensor where one of
                   them is set
    kept           canonical names of further linear or embedding modules outside the layers, which stay
    server_prefix  (checkpoint prefix, server prefix), the server's own mapping in its order
    server_layers  the server's prefix of the decoder layers
    server_kept    the server's names of the linears among `kept`, which its exclude list must reach; "" for an output head that
                   it builds without a name, which no list can reach
    experts        the routed experts, where the family has them
    explicit_head_dim  whether the server takes head_dim from config.json where it is there
    norm_offset    what the server adds to the stored weights of norms before it multiplies by them: 1 for Gemma
    assumed        what the server takes for keys that the language model's config leaves out, as many published ones do:
                   defaults of transformers' configuration class, those alone that ckptq asks for
    skipped        beginnings of canonical names that the server passes over, or that a draft model of it reads: `mtp.`, the layer
                   after the last. What is stored there is carried over as it is
    stage          where a checkpoint holds several models: the one with the language model, which alone is built for calibration.
                   "thinker" for tensors `thinker.*` and config.json's `thinker_config`
    model_types    section of config.json -> the model_types that this scope knows there, where an architecture takes several
    repeats_towers whether the server can keep towers whole on every rank: supports_encoder_tp_data
    """

    __pydantic_config__: ClassVar[Any] = _READ
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
    aliases: tuple[tuple[str, str], ...] = ()
    experts: Experts | None = None
    explicit_head_dim: bool = False
    norm_offset: float = 0.0
    assumed: Mapping[str, Any] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    stage: str = ""
    model_types: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    repeats_towers: bool = False
    flat: bool = False

    def canonical(self, name: str) -> str:
        """A source name in canonical form: `model.language_model.layers.0.x` -> `model.layers.0.x`."""
        for theirs, ours in self.aliases:
            name = name.replace(theirs, ours)
        for long, short in self.generations:
            if name.startswith(long):
                return short + name[len(long) :]
        return name

    def spellings(self, name: str) -> frozenset[str]:
        """The name as every generation writes it, so that a pattern may use any of them."""
        canonical = self.canonical(name)
        others = {long + canonical[len(short) :] for long, short in self.generations if canonical.startswith(short)}
        return frozenset({name, canonical, *others})

    @property
    def head(self) -> str:
        """The output head, canonical. The last part of its name is lm_head in every family."""
        return next((kept for kept in self.kept if kept.rpartition(".")[2] == "lm_head"), "lm_head")

    def layer_of(self, name: str) -> tuple[int, str] | None:
        """(layer number, rest of the name) of a source name inside a decoder layer, else None."""
        match = _inside(self.layers).fullmatch(self.canonical(name))
        return (int(match[1]), match[2]) if match else None

    def skips(self, name: str) -> bool:
        """Whether the server passes a tensor over, see `skipped`."""
        return self.canonical(name).startswith(self.skipped) if self.skipped else False

    def text(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The language model's part of config.json, empty where there is none. Old files keep its keys at the top level."""
        section = at_path(config, self.text_config) if self.text_config else config
        known = "num_hidden_layers" in {*section, *self.assumed} if isinstance(section, Mapping) else False
        found = section if isinstance(section, Mapping) and known else config if self.flat or not self.text_config else {}
        return {**self.assumed, **found} if self.assumed else found

    def layer_count(self, config: Mapping[str, Any]) -> int:
        """`num_hidden_layers`. Raises SourceError where config.json does not give it."""
        count = self.text(config).get("num_hidden_layers")
        if type(count) is not int or not 1 <= count <= MOST_LAYERS:
            key = "num_hidden_layers" if self.flat or not self.text_config else f"{self.text_config}.num_hidden_layers"
            raise SourceError(f"config.json: {key} should be an integer from 1 to {MOST_LAYERS}, found {count!r:.80}")
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


@functools.cache
def _inside(layers: str) -> re.Pattern[str]:
    """Of names in a numbered layer."""
    return re.compile(re.escape(layers) + r"\.(\d+)\.(.+)")


def at_path(config: Mapping[str, Any], path: str) -> Any:
    """What config.json has at `section.section.key`, else None."""
    found: Any = config
    for key in path.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def all_scopes() -> Iterator[Scope]:
    """Every scope in this folder, by file name."""
    for module in sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg and not m.name.startswith("_")):
        yield importlib.import_module(f"{__name__}.{module}").SCOPE


def find_scope(config: Mapping[str, Any]) -> Scope:
    """The scope for a config.json. Raises UnsupportedError naming the architecture and those of like names, or why it has none."""
    said = config.get("architectures")
    wanted = said if isinstance(said, list) else []
    if not wanted and config.get("_class_name") is not None:
        raise UnsupportedError(
            f"config.json: {config['_class_name']!r:.80} is a component of a pipeline",
            hint="give the pipeline's folder, the one with model_index.json in it",
        )
    scopes = list(all_scopes())
    for scope in scopes:
        if any(name in scope.architectures for name in wanted):
            _refuse_types(scope, config)
            return scope
    refused = importlib.import_module(f"{__name__}._refused").REFUSED
    if reason := next((refused[name] for name in wanted if isinstance(name, str) and name in refused), None):
        raise UnsupportedError(f"config.json: architectures {wanted!r:.200}: {reason}")
    near = _alike(wanted, [name for scope in scopes for name in scope.architectures])
    raise UnsupportedError(
        f"config.json: no scope for architectures {wanted!r:.200}" + (f"; nearest in name: {', '.join(near)}" if near else ""),
        hint="`ckptq recipes` lists what there is; `ckptq inspect SRC` proposes a scope to be put into a recipe under `scope:`",
    )


def _alike(wanted: list[Any], known: list[str]) -> list[str]:
    """Architectures whose names are much like the first one's, apart from `ForCausalLM` and the like; at most four."""
    stems: dict[str, list[str]] = {}
    for name in sorted(known):
        stems.setdefault(name.partition("For")[0], []).append(name)
    stem = wanted[0].partition("For")[0][:100] if wanted and isinstance(wanted[0], str) else ""
    return [name for near in difflib.get_close_matches(stem, stems, n=3, cutoff=0.6) for name in stems[near]][:4]


def _refuse_types(scope: Scope, config: Mapping[str, Any]) -> None:
    for section, known in scope.model_types.items():
        found = at_path(config, f"{section}.model_type")
        if found is not None and found not in known:
            raise UnsupportedError(
                f"config.json: {section}.model_type {found!r:.80} inside {scope.architectures[0]}: the scope {scope.name} knows "
                + ", ".join(known),
                hint="a recipe may spell a scope out for it, under `scope:`",
            )
