"""Proposes a scope for an architecture that has no file in ckptq/scopes, from the transformers model built on `meta`.

What transformers does not tell, how the server names and fuses things, is guessed by the habits of vLLM's models, and marked so.
A proposal is for a reader to check and to put into a recipe: nothing is ever written by it unasked.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from ckptq.checkpoint import Component
from ckptq.errors import UnsupportedError
from ckptq.reports import safe_text
from ckptq.scopes import Scope, at_path


@dataclass(frozen=True, slots=True)
class Proposal:
    """A scope, and what is uncertain about it: {field: why}."""

    scope: Scope
    uncertain: Mapping[str, str]


def propose(folder: Path, component: Component) -> Proposal:
    """A scope for the checkpoint. `folder` has its config.json; no weights are read. Imports transformers.

    Raises UnsupportedError, with the reason, where transformers does not know the model or no scope can say what it is.
    """
    from ckptq.proposals import around, layers, reading

    found = reading.read(folder, component)
    text_config, text = layers.text_config(found)
    at, count = layers.decoder_layers(found, text)
    experts = layers.experts(found, at, count, text)
    linears = layers.linears(found, at, count, experts)
    head = around.head(found)
    towers = tuple(around.towers(found))
    kept = around.kept(found, at, towers, head)
    prefixes, server_layers, server_kept = around.server(found, at, towers, kept, head)
    scope = Scope(
        name=str(found.config.model_type),
        architectures=tuple(component.config["architectures"]),
        source=f"proposed from transformers {reading.version()} {type(found.model).__name__}",
        auto_class=reading.auto_class(found.config, type(found.model).__name__),
        text_config=text_config,
        generations=(),
        layers=at,
        linears=linears,
        kv=layers.kv(found, linears),
        towers=towers,
        parameters=around.parameters(found, at, count, towers, head),
        kept=kept,
        server_prefix=prefixes,
        server_layers=server_layers,
        server_kept=server_kept,
        experts=experts,
        explicit_head_dim="head_dim" in text,
        norm_offset=layers.norm_offset(found),
        skipped=around.skipped(found, at, count, text),
        flat=bool(text_config) and not isinstance(at_path(component.config, text_config), Mapping),
    )
    found.note("source", "whether and how vLLM serves this architecture was not looked at; put its model file here")
    _verify(scope, component)
    return Proposal(scope, dict(found.uncertain))


def _verify(scope: Scope, component: Component) -> None:
    """Raises UnsupportedError where the scope does not describe the checkpoint that it was made from."""
    from ckptq.spelled import consistent
    from ckptq.validators.vllm_rules import parameters

    try:
        consistent(scope)
    except ValueError as problem:
        raise UnsupportedError(f"no scope can be proposed: {problem}") from problem
    read = parameters(scope, component.config, component.tensors)
    if lost := next((p.name for p in read if p.required and p.name not in component.tensors), None):
        raise UnsupportedError(f"no scope can be proposed: {lost} is not stored, and others like it are: layers or blocks differ")


def with_skipped(scope: Scope, component: Component) -> Proposal | None:
    """A scope of ckptq's with more under `skipped`: what lies outside all that it knows. None where nothing does."""
    from ckptq.validators.strays import beyond
    from ckptq.validators.vllm_rules import parameters

    beginning = beyond(scope, (p.name for p in parameters(scope, component.config, component.tensors)))
    found = dict.fromkeys(b for name in component.tensors if not scope.skips(name) and (b := beginning(name)))
    if not found:
        return None
    why = "vLLM's own class for this architecture raises at such names: this is for a server that passes them over"
    return Proposal(replace(scope, skipped=(*scope.skipped, *found)), {"skipped": f"{', '.join(found)}: {why}"})


def as_yaml(proposal: Proposal) -> str:
    """The section `scope:` of a recipe, with comments on what is uncertain."""
    import yaml

    lines = [
        "# Proposed by `ckptq inspect`. What is uncertain was guessed: compare it with vLLM's own model file.",
        "# Then put it into a recipe: `ckptq convert --recipe FILE --dry-run` shows what becomes what.",
        "scope:",
    ]
    body = _plain(proposal.scope)
    for name in (f.name for f in fields(Scope)):
        if why := proposal.uncertain.get(name):
            told = safe_text(f"uncertain: {why}")  # names of tensors are anybody's
            lines += [f"  # {line}" for line in textwrap.wrap(told, 110, break_on_hyphens=False, break_long_words=False)]
        if name in body:
            style = None if isinstance(body[name], list) else False  # short lists on one line
            text = yaml.safe_dump({name: body[name]}, sort_keys=False, width=120, default_flow_style=style)
            lines += [f"  {line}" for line in text.splitlines()]
        elif why:
            lines.append(f"  # {name}: []")
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> Any:
    """Mappings and lists of a scope, without what is as its class has it anyway."""
    if is_dataclass(value):
        defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(value)}
        found = {name: getattr(value, name) for name in defaults}
        return {name: _plain(inner) for name, inner in found.items() if defaults[name] is MISSING or inner != defaults[name]}
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, Iterable) and not isinstance(value, str) else value
