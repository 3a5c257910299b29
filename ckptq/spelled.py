"""Scopes that are no file of ckptq/scopes: spelled out in a recipe, and kept in the ckptq.json of what was made with one.

A recipe's `scope:` has the fields of `ckptq.scopes.Scope`; pydantic reads those classes as they stand (ckptq/recipe.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ckptq.errors import RecipeError, UnsupportedError
from ckptq.mistakes import describe
from ckptq.scopes import Experts, Scope, find_scope
from ckptq.validators.vllm_rules import server_name

MOST_NAMES = 512
"""Names in one list of a scope. Each may stand for a tensor of every layer, and no family has a tenth of it."""
_MOST_RULES, _MOST_OF_EXPERTS, _LONGEST = 32, 16, 300
"""Rules that rewrite a name, names that stand for a tensor of every expert, characters of a name. No family has a third of them."""


def consistent(scope: Scope | None) -> Scope | None:
    """The scope itself. Raises ValueError for one whose parts do not go together."""
    if scope is not None and (problem := next(_problems(scope), None)):
        raise ValueError(f"expected {problem}")
    return scope


def _problems(scope: Scope) -> Iterator[str]:
    shards = [shard for fused in scope.linears for shard in fused.shards]
    counted = (scope.parameters, shards, scope.kept, scope.server_kept, scope.server_prefix, scope.skipped, scope.towers)
    if max(len(names) for names in counted) > MOST_NAMES or sum(len(t.linears) for t in scope.towers) > MOST_NAMES:
        yield f"at most {MOST_NAMES} names in a list, found more"
    rewriting = (scope.generations, scope.aliases, scope.server_prefix)
    if max(len(rules) for rules in rewriting) > _MOST_RULES:
        yield f"at most {_MOST_RULES} rules in generations, aliases and server_prefix each, found more"
    texts = [scope.name, scope.layers, *scope.parameters, *scope.parameters.values(), *shards]
    texts += [text for rules in rewriting for rule in rules for text in rule]
    texts += [text for tower in scope.towers for text in (tower.prefix, *tower.sizes, *tower.sizes.values())]
    if any(len(text) > _LONGEST for text in texts):
        yield f"names of at most {_LONGEST} characters, found a longer one"
    whole = re.compile(r"\..+\.")  # parts of a name that are replaced by as many do not make it grow
    if odd := next((a for a in scope.aliases if not all(map(whole.fullmatch, a)) or a[0].count(".") != a[1].count(".")), None):
        yield f"aliases to be as many whole parts of a name, as '.w1.' is, found {odd[0]!r} for {odd[1]!r}"
    every = list(shards)
    if scope.experts:
        yield from _problems_of_experts(scope.experts, scope)
        every += [shard for group in scope.experts.groups for shard in group]
        every += [shard for fused in scope.experts.linears for shard in fused.shards]
    if not re.fullmatch(r"AutoModel\w*", scope.auto_class):
        yield f"auto_class to be one of transformers' AutoModel classes, found {scope.auto_class!r:.80}"
    if not shards or not all(fused.shards for fused in scope.linears):
        yield "linears with shards, found none"
    if repeated := next((shard for shard in every if every.count(shard) > 1), None):
        yield f"each shard in one linear, found {repeated!r} twice"
    if stranger := next((module for module in scope.kv if module and module not in shards), None):
        yield f"kv to name shards of linears, found {stranger!r}"
    if lost := next((s for s in shards if f"{scope.layers}.{{i}}.{s}.weight" not in scope.parameters), None):
        yield f"parameters to have the weight of every linear, found none called '{scope.layers}.{{i}}.{lost}.weight'"
    known = {"", *scope.kept, *(server_name(f"{kept}.", scope).removesuffix(".") for kept in scope.kept)}
    if nobodys := next((name for name in scope.server_kept if name not in known), None):
        yield f"server_kept to have the server's names of modules among kept, found {nobodys!r}"
    places = (scope.layers + ".", *(tower.prefix + "." for tower in scope.towers))
    if astray := next((n for n in scope.parameters if "{i}" in n and not n.startswith(places)), None):
        yield f"'{{i}}' in names inside the layers or a tower alone, found {astray!r}"
    for long, short in scope.generations:
        if scope.canonical(long + "x") != short + "x" or scope.canonical(short + "x") != short + "x":
            yield f"generations that leave canonical names as they are, the longest first, found {long!r}"


def _problems_of_experts(experts: Experts, scope: Scope) -> Iterator[str]:
    linears = [linear for group in experts.groups for linear in group]
    if not (experts.counts and experts.groups and all(experts.groups)):
        yield "experts with groups of linears, and a key that counts them, found none"
    if max(len(linears), len(experts.linears), sum("{e}" in name for name in scope.parameters)) > _MOST_OF_EXPERTS:
        yield f"at most {_MOST_OF_EXPERTS} names of experts, found more"
    if single := next((linear for linear in linears if "{e}" not in linear), None):
        yield f"'{{e}}' in the linears of experts.groups, found {single!r}"
    if experts.stored and len(experts.stored) != len(experts.groups):
        yield f"experts.stored to have a name for each of the groups, found {len(experts.stored)} for {len(experts.groups)}"
    gone = {shard for fused in scope.linears if fused.runtime.startswith(experts.dense) for shard in fused.shards}
    if lost := next((module for module in scope.kv if module in gone), None):
        yield f"K and V in layers with experts, too, found {lost!r} among what they do without, {experts.dense!r:.80}"


def choose_scope(config: Mapping[str, Any], spelled: Scope | None) -> Scope:
    """The scope that a recipe spells out, else the one that ckptq has for this config.json.

    Raises RecipeError for a scope of other architectures, UnsupportedError where there is none.
    """
    if spelled is None:
        return find_scope(config)
    said = config.get("architectures")
    if not set(spelled.architectures) & set(said if isinstance(said, list) else ()):
        raise RecipeError(
            f"scope.architectures: {', '.join(spelled.architectures)}; config.json has architectures {said!r:.200}",
            hint="this scope is of another model: `ckptq inspect SRC` proposes one",
        )
    return spelled


def scope_to_validate(config: Mapping[str, Any], given: Scope | None, record: Callable[[], Any]) -> tuple[Scope, str]:
    """(the scope to judge a checkpoint by, where it comes from: "ckptq", "--scope" or "ckptq.json").

    `record` reads the checkpoint's ckptq.json. It is anybody's, so it counts only where ckptq has no scope of its own.
    Raises UnsupportedError where there is none, RecipeError for a scope that is unsound or of other architectures.
    """
    if given is not None:
        return choose_scope(config, given), "--scope"
    try:
        return find_scope(config), "ckptq"
    except UnsupportedError as none:
        spelled = recorded(record())
        if spelled is None:
            hint = "give --scope FILE: a recipe with a scope, as `ckptq inspect SRC` proposes one"
            raise UnsupportedError(str(none), hint=hint) from none
        return choose_scope(config, parse_scope(spelled, "ckptq.json: job.recipe.scope")), "ckptq.json"


def recorded(body: Any) -> Mapping[str, Any] | None:
    """The `scope` of a ckptq.json, as it stands there, or None."""
    for key in ("job", "recipe", "scope"):
        body = body.get(key) if isinstance(body, Mapping) else None
    return body if isinstance(body, Mapping) else None


def load_scope(path: Path) -> Scope:
    """The scope in a recipe, in a file with `scope:` alone, or in a ckptq.json. Raises RecipeError as load_recipe does."""
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except FileNotFoundError:
        raise RecipeError(f"--scope {path}: no such file") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"--scope {path}: not YAML: {str(error).splitlines()[0]}") from error
    section = data.get("scope", recorded(data)) if isinstance(data, dict) else None
    if section is None:
        raise RecipeError(f"--scope {path}: has no scope", hint="`ckptq inspect SRC` proposes one, as `scope:` of a recipe")
    return parse_scope(section, f"--scope {path}")


def parse_scope(section: object, name: str) -> Scope:
    """A scope as a recipe has it; `name` is what errors call the place where it stands."""
    from pydantic import ValidationError  # late: few checkpoints have such a scope

    from ckptq.recipe import SECTIONS, Recipe

    try:
        scope = Recipe.model_validate({"quantize": [{"modules": "*", "scheme": "fp8"}], "scope": section}).scope
    except ValidationError as error:
        problems = [describe(e, {}, SECTIONS) for e in error.errors()]
        raise RecipeError(f"{name}:\n" + "\n".join(f"  - {p}" for p in problems)) from None
    if scope is None:
        raise RecipeError(f"{name}: expected a scope, found none")
    return scope
