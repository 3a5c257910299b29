"""What becomes of every module: the rules of a recipe against what there is. Pure."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ckptq.errors import RecipeError
from ckptq.linears import FusedLinear
from ckptq.mistakes import close
from ckptq.plan import Decision, QuantizedGroup
from ckptq.schemes import SCHEMES


class RuleLike(Protocol):
    """A rule of a recipe: see ckptq.recipe.Rule."""

    @property
    def modules(self) -> Sequence[str]: ...
    @property
    def scheme(self) -> str: ...


class Rules(Protocol):
    """The rules for one component: of a recipe's top level, or of one of its `components`."""

    @property
    def quantize(self) -> Sequence[RuleLike]: ...
    @property
    def keep(self) -> Sequence[str]: ...


UNMATCHED = "no rule matches"
"""Why a linear stays that could be quantized, or that a user could mean to quantize."""


@dataclass(frozen=True, slots=True)
class Subjects:
    """The modules that patterns may name.

    stays      all of them -> why one stays where no rule can or does quantize it
    linears    those that can be quantized -> where they are: `linear of layer 3`
    outside    linears elsewhere, which a user could mean to quantize -> what `keep` must have for one
    spellings  a module's name, in every way that a pattern may use
    whole      what linears are part of, for errors, and `inner` what of it: `the language model`, `layers`
    inside     a pattern that names it
    scope      the scope's name
    """

    stays: Mapping[str, str]
    linears: Mapping[str, str]
    outside: Mapping[str, str]
    spellings: Callable[[str], Iterable[str]]
    whole: str
    inner: str
    inside: str
    scope: str


def decide(rules: Rules, subjects: Subjects) -> tuple[Decision, ...]:
    """What becomes of every module. Raises RecipeError for a pattern that matches nothing or reaches outside of what can be."""
    _refuse_idle_patterns(rules, subjects)
    return tuple(_decision(module, rules, subjects) for module in subjects.stays)


def _decision(module: str, rules: Rules, subjects: Subjects) -> Decision:
    for pattern in rules.keep:
        if _matches(pattern, module, subjects):
            return Decision(module, "keep", f"keep: {pattern}", "kept by the recipe")
    for rule in rules.quantize:
        for pattern in rule.modules:
            if not _matches(pattern, module, subjects):
                continue
            if module in subjects.linears:
                return Decision(module, rule.scheme, f"quantize: {pattern}", subjects.linears[module])
            if module in subjects.outside:
                raise RecipeError(
                    f"quantize pattern {pattern!r} matches {module}, which is outside {subjects.whole}'s {subjects.inner}; "
                    f"the scope {subjects.scope} quantizes those only",
                    hint=f"add {subjects.outside[module]!r} to keep, or narrow the pattern to {subjects.inside!r}",
                )
            return Decision(module, "keep", f"quantize: {pattern}", subjects.stays[module])
    return Decision(module, "keep", "", subjects.stays[module])


def _refuse_idle_patterns(rules: Rules, subjects: Subjects) -> None:
    named = list(subjects.stays)
    lines = [("keep", p) for p in rules.keep] + [("quantize", p) for rule in rules.quantize for p in rule.modules]
    idle = [
        f"{kind} pattern {p!r} matches no module{_close_module(p, named, subjects)}"
        for kind, p in lines
        if not _any(p, named, subjects)
    ]
    idle += [
        f"quantize pattern {p!r} matches no linear of {subjects.whole}{_why_none(p, subjects)}"
        for p in (p for rule in rules.quantize for p in rule.modules)
        if _any(p, named, subjects) and not _any(p, subjects.linears, subjects)
    ]
    if idle:
        raise RecipeError("\n".join(idle), hint="`ckptq inspect SRC` shows the parts of the checkpoint, and the recipes that fit")


def _why_none(pattern: str, subjects: Subjects) -> str:
    """Of a linear that stays whatever a recipe says: why."""
    reasons = {subjects.stays[m] for m in subjects.stays if _matches(pattern, m, subjects)}
    told = sorted(reasons - {"not a linear", UNMATCHED})
    return f" that can be quantized: {told[0]}" if told else ""


def _matches(pattern: str, module: str, subjects: Subjects) -> bool:
    """Whether a pattern names the module, or a module around it."""
    return any(fnmatch.fnmatchcase(s, pattern) or s.startswith(pattern + ".") for s in subjects.spellings(module))


def _any(pattern: str, modules: Iterable[str], subjects: Subjects) -> bool:
    return any(_matches(pattern, m, subjects) for m in modules)


def _close_module(pattern: str, modules: Sequence[str], subjects: Subjects) -> str:
    spelled = {s for m in modules for s in subjects.spellings(m)}
    prefixes = {".".join(s.split(".")[:n]) for s in spelled for n in range(1, s.count(".") + 2)}
    return close(pattern.strip("*."), prefixes, near_only=True)


def quantized_groups(linears: Iterable[FusedLinear], decisions: Sequence[Decision]) -> tuple[QuantizedGroup, ...]:
    """The fused linears that get a scheme. Raises RecipeError for one whose shards get several, or none for them all."""
    groups = tuple(_groups(linears, decisions))
    if not groups:
        raise RecipeError("the recipe quantizes nothing: every linear that a rule matches is also in keep")
    return groups


def _groups(linears: Iterable[FusedLinear], decisions: Sequence[Decision]) -> Iterator[QuantizedGroup]:
    action = {d.module: d.action for d in decisions}
    rule_of = {d.module: d.rule or "no rule" for d in decisions}
    built: dict[tuple[int, str], str] = {}  # where the server builds one module of what follows: its first shard
    for fused in linears:
        first = built.setdefault((fused.layer, fused.runtime), fused.modules[0])
        if any(action[m] != action[first] for m in fused.modules):
            raise _split(fused, first, action, rule_of)
        if action[first] != "keep":
            yield QuantizedGroup(fused.layer, fused.modules, SCHEMES[action[first]], fused.observed, fused.routed)


def _split(fused: FusedLinear, first: str, action: Mapping[str, str], rule_of: Mapping[str, str]) -> RecipeError:
    """What a rule splits: the shards of a linear, or the experts of a layer."""
    modules = dict.fromkeys((first, *fused.modules))
    told = "; ".join(f"{m}: {action[m]} ({rule_of[m]})" for m in modules)
    what = "fuses all routed experts of a layer" if fused.routed else f"fuses {', '.join(modules)}"
    return RecipeError(
        f"the server {what} into {fused.runtime}: they must get one scheme; the recipe says {told}",
        hint="give all of them to one rule, or keep all of them",
    )
