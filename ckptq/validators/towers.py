"""Towers as vLLM 0.32.0 builds them: how many blocks, which of what is stored it reads, and the sizes that config.json tells."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import Any

from ckptq.scopes import MOST_LAYERS, Fused, Scope, Tower, at_path


def tower_of(name: str, scope: Scope) -> Tower | None:
    """The tower that a canonical name is in."""
    return next((t for t in scope.towers if name.startswith(t.prefix + ".")), None)


def blocks(name: str, tower: Tower, scope: Scope, config: Mapping[str, Any], stored: Iterable[str]) -> range:
    """The numbers of the blocks that `{i}` in a name of the tower stands for.

    From config.json, or from what is stored where it does not tell.
    """
    inside = name[len(tower.prefix) + 1 :]
    path = next((path for at, path in tower.lists.items() if inside.startswith(at + ".")), tower.depth)
    said = at_path(config, path)
    depth = tower.assumed.get(path.rpartition(".")[2]) if said is None else said
    depth = len(depth) if isinstance(depth, list) else depth
    if type(depth) is int:
        return range(min(depth, MOST_LAYERS))
    found = re.compile(re.escape(name[: name.index("{i}")]) + r"(\d{1,4})\.")
    return range(max((int(m[1]) + 1 for n in stored if (m := found.match(scope.canonical(n)))), default=0))


def built(count: range, tower: Tower, config: Mapping[str, Any]) -> range:
    """Those of a tower's blocks that the server builds: models/llava.py _get_num_hidden_layers, models/utils.py get_layer_index."""
    said = config.get(tower.used_to, tower.assumed.get(tower.used_to)) if tower.used_to else None
    used = [n for n in (said if isinstance(said, list) else [said]) if type(n) is int]
    return count[: max(0, *(n if n >= 0 else len(count) + n + 1 for n in used))] if used else count


def reads(name: str, scope: Scope, config: Mapping[str, Any], stored: Iterable[str]) -> Callable[[str], bool]:
    """Whether the server reads a place that a canonical name stands for. Of a tower it passes over some that are stored."""
    tower = tower_of(name, scope)
    if tower is None or not (tower.used_to or tower.unread):
        return lambda place: True
    if name[len(tower.prefix) + 1 :].startswith(tower.unread):
        return lambda place: False
    if "{i}" not in name:
        return lambda place: True
    places = {name.replace("{i}", str(i)) for i in built(blocks(name, tower, scope, config, stored), tower, config)}
    return lambda place: place in places


def numbers(fused: Fused, tower: Tower, scope: Scope, config: Mapping[str, Any], stored: Iterable[str]) -> range:
    """The numbers of the blocks in which the server builds a tower's linear with the quantization config.

    One for a linear outside the blocks; none where a size is no multiple of what the server asks for.
    """
    name = f"{tower.prefix}.{fused.runtime}"
    if fused.multiple > 1:
        words, own = scope.parameters.get(f"{tower.prefix}.{fused.shards[0]}.weight", "").split(), sizes(tower, config)
        if any(own[word] % fused.multiple for word in words if word in own):
            return range(0)
    return built(blocks(name, tower, scope, config, stored), tower, config) if "{i}" in name else range(1)


def sizes(tower: Tower, config: Mapping[str, Any]) -> dict[str, int]:
    """{word: size} of the tower's own dimensions; those that its config does not tell are left out."""
    own = tower.config(config)
    found = {word: size(terms, own) for word, terms in tower.sizes.items()}
    return {word: n for word, n in found.items() if n is not None}


def size(terms: str, config: Mapping[str, Any]) -> int | None:
    """A sum of products: `a / b * c + 1`. Quotients are rounded down."""
    with contextlib.suppress(OverflowError, ValueError):  # no size at all: config.json is anybody's
        products = [[_factor(factor.split("/"), config) for factor in term.split("*")] for term in terms.split("+")]
        values = [None if None in factors else prod(f for f in factors if f is not None) for factors in products]
        return None if None in values else int(sum(v for v in values if v is not None))
    return None


def _factor(parts: list[str], config: Mapping[str, Any]) -> float | None:
    numbers = [int(part) if part.strip().isdecimal() else config.get(part.strip()) for part in parts]
    known = [n for n in numbers if isinstance(n, (int, float)) and not isinstance(n, bool)]
    if len(known) < len(parts) or 0 in known[1:]:
        return None
    return known[0] if len(known) == 1 else known[0] // known[1]
