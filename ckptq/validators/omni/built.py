"""The denoiser as vLLM-Omni builds it: its linears, how each is built, and under which stored names it finds their tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckptq.checkpoint import TensorSpec
from ckptq.errors import SourceError
from ckptq.scopes import MOST_EXPERTS, MOST_IN_ALL, Fused, at_path
from ckptq.scopes.denoisers import Denoiser, Stack
from ckptq.validators.expected import MOST_MATCHES
from ckptq.validators.methods import Treatment
from ckptq.validators.methods.modelopt import exactly_skipped, excluded
from ckptq.validators.omni.sections import Section
from ckptq.validators.omni.server import Facts, facts_of
from ckptq.validators.servers import DEFAULT


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear there.

    prefix    the server's name, which lists are matched with
    shards    for each unfused linear of the file the names that it may be stored under, the source's first
    whole     names under which the fused one may be stored as one
    optional  whether some checkpoints have none
    """

    prefix: str
    shards: tuple[tuple[str, ...], ...]
    whole: tuple[str, ...] = ()
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Built:
    """Made once for a component.

    tensors    what is stored
    linears    all that are built with the quantization config
    treatment  by their prefix
    adapted    whether the files go through ModelOpt's adapter
    """

    denoiser: Denoiser
    facts: Facts
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorSpec]
    section: Section
    linears: tuple[Linear, ...]
    treatment: Mapping[str, Treatment]
    adapted: bool

    def loses(self, module: str) -> bool:
        """Whether the adapter drops the scales of a module stored under this name: it maps weights and scales by other rules."""
        return self.adapted and lost(module, self.denoiser)

    def units(self, linear: Linear) -> tuple[tuple[str, ...], ...]:
        """Of a linear the parts that are stored, each with its possible names: shards, or the fused one."""
        whole = any(f"{name}.weight" in self.tensors for name in linear.whole)
        return (linear.whole,) if whole else linear.shards

    def find(self, names: Sequence[str], kind: str) -> TensorSpec | None:
        """A tensor of a part: under a name that arrives rather than one that does not."""
        found = [self.tensors[n] for name in names if (n := f"{name}.{kind}") in self.tensors]
        return next((s for s in found if kind == "weight" or not self.loses(s.name.removesuffix(f".{kind}"))), None)


def lost(module: str, denoiser: Denoiser) -> bool:
    """Whether the adapter has no target for this name, by which `weight_scale` would reach the server."""
    inside = f".{module}."
    shards = {shard for shards in denoiser.joined.values() for shard in shards}
    return any(f".{part}." in inside for part in (*denoiser.renamed, *shards))


def build(denoiser: Denoiser, folder: str, config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], section: Section) -> Built:
    """Raises SourceError for a config without its numbers of blocks, or a list that would take hours to match."""
    facts = facts_of(denoiser.name)
    found = tuple(linears(denoiser, config))
    if len(found) * len(section.entries) > MOST_MATCHES:
        raise SourceError(f"{section.file}.{section.key}: {len(section.entries)} entries: too many to match")
    treat = matcher(section, facts)
    adapted = section.method == "modelopt" and folder in denoiser.adapted
    return Built(denoiser, facts, config, tensors, section, found, {x.prefix: treat(x.prefix) for x in found}, adapted)


def linears(denoiser: Denoiser, config: Mapping[str, Any]) -> Iterator[Linear]:
    """Every linear that the server builds with the quantization config, those among them that stay for want of anything better."""
    for stack in denoiser.stacks:
        at = stack.server or stack.prefix
        for i in range(stack.count(config)):
            for fused in (*stack.linears, *stack.kept):
                for e in _experts(fused, stack, config):
                    found = _linear(fused, f"{stack.prefix}.{i}.", f"{at}.{i}.", e, denoiser)
                    yield replace(found, optional=fused.runtime in stack.optional)
    yield from (_linear(fused, "", "", "", denoiser) for fused in denoiser.kept)


def _experts(fused: Fused, stack: Stack, config: Mapping[str, Any]) -> Sequence[str]:
    """Numbers of the routed experts that the linear is of, or one empty text."""
    if not any("{e}" in shard for shard in fused.shards):
        return ("",)
    count = at_path(config, stack.experts)
    count = count[0] if isinstance(count, list) and count else count  # HunyuanImage-3 has one for each layer
    if type(count) is not int or not 0 <= count <= MOST_EXPERTS or count * stack.count(config) > MOST_IN_ALL:
        raise SourceError(f"config.json: {stack.experts} should be an integer up to {MOST_EXPERTS}, found {count!r:.80}")
    return [str(e) for e in range(count)]


def _linear(fused: Fused, stored: str, server: str, expert: str, denoiser: Denoiser) -> Linear:
    def spelled(name: str) -> tuple[str, ...]:
        name = stored + name.replace("{e}", expert)
        other = name
        for old, new in denoiser.renamed.items():
            other = f".{other}.".replace(f".{old}.", f".{new}.")[1:-1]
        return tuple(dict.fromkeys((name, other)))

    runtime = fused.runtime.replace("{e}", expert)
    shards = tuple(spelled(shard) for shard in fused.shards)
    joined = [name for name, parts in denoiser.joined.items() if set(parts) == set(fused.shards)]
    whole = tuple(dict.fromkeys(stored + name for name in (*joined, runtime))) if len(shards) > 1 and not expert else ()
    return Linear(server + runtime, shards, whole)


def matcher(section: Section, facts: Facts) -> Callable[[str], Treatment]:
    """How a linear is built, by the server's name.

    The pipeline's class has no packed_modules_mapping that would reach the config (diffusion/registry.py
    _prepare_diffusion_quant_config), so the names of shards are nothing to an exact match.
    """
    entries = server_entries(section, facts)

    def treat(prefix: str) -> Treatment:
        if section.method == "modelopt":
            return excluded(prefix, entries, {}, DEFAULT) or section.form
        return "kept" if exactly_skipped(prefix, entries, {}, DEFAULT) else section.form

    return treat


def server_entries(section: Section, facts: Facts) -> tuple[str, ...]:
    """The list as the server comes to hold it. Only a pipeline with a mapper rewrites it, `X*` into `X` and `X.*` first."""
    if not facts.renames:
        return section.entries
    entries: list[str] = []
    for entry in section.entries:
        tree = section.method == "modelopt" and len(entry) >= 2 and entry[-1] == "*" and entry[-2] != "."
        entries += [entry[:-1], entry[:-1] + ".*"] if tree else [entry]
    return tuple(_renamed(entry, facts) for entry in entries)


def _renamed(entry: str, facts: Facts) -> str:
    for old, new in facts.renames:
        if old.startswith("^"):
            entry = new + entry[len(old) - 1 :] if entry.startswith(old[1:]) else entry
        else:
            entry = entry.replace(old, new)
    return entry
