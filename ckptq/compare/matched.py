"""Which tensor of one checkpoint is which of another: by name, across naming generations, formats and pipelines."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptq.checkpoint import FLOATS, Component, Inventory, SourceTensor
from ckptq.errors import SourceError, UnsupportedError
from ckptq.folder import printable
from ckptq.join import join
from ckptq.scopes import Scope
from ckptq.scopes.denoisers import Denoiser
from ckptq.spelled import scope_to_validate
from ckptq.unstack import unstack
from ckptq.validators import record
from ckptq.validators.omni.pipeline import denoisers_of
from ckptq.validators.scales import scale_kind

_HINT = "name two checkpoints of one architecture"
_BESIDE = frozenset(
    ("weight_shape", "weight_zero_point", "weight_g_idx", "input_zero_point", "k_zero_point", "v_zero_point", "pre_quant_scale")
)
"""What lies beside codes and is neither a weight nor, by its name, a scale."""
_ALONE = ("in the reference alone", "in the candidate alone")


@dataclass(frozen=True, slots=True)
class Unmatched:
    """A tensor, or a component, that one side lacks: `found` says which."""

    name: str
    found: str


@dataclass(frozen=True, slots=True)
class Part:
    """A component of both: (root, component) of each, and {name in the reference: (its tensor, the candidate's)}."""

    reference: tuple[Path, Component]
    candidate: tuple[Path, Component]
    pairs: Mapping[str, tuple[SourceTensor, SourceTensor]]


@dataclass(frozen=True, slots=True)
class Matched:
    parts: tuple[Part, ...]
    unmatched: tuple[Unmatched, ...]

    @property
    def nbytes(self) -> int:
        """What will be read of both, without scales."""
        return sum(a.spec.nbytes + b.spec.nbytes for part in self.parts for a, b in part.pairs.values())


def match(reference: Inventory, candidate: Inventory) -> Matched:
    """Pairs of tensors, scales aside. Routed experts that are stored together are seen one by one.

    A name counts as ckptq.json's `renamed` has it, without a codes' `_packed`, and in the form that the scope, or the denoiser,
    takes for the canonical one; without either as it stands.

    Raises SourceError where the two have nothing in common.
    """
    if (reference.pipeline is None) != (candidate.pipeline is None):
        what = "a plain model" if reference.pipeline is None else "a pipeline"
        raise SourceError(f"{candidate.root}: expected {what}, as {reference.root} is one", hint=_HINT)
    scope = _scope(candidate) or _scope(reference)
    sides = tuple(_unstacked(side, scope) for side in (reference, candidate))
    denoisers = {**denoisers_of(candidate), **denoisers_of(reference)}
    theirs, ours = ({c.folder: c for c in side.components} for side in sides)
    parts: list[Part] = []
    lacking = [Unmatched(folder, "a component of the reference alone") for folder in theirs if folder not in ours]
    lacking += [Unmatched(folder, "a component of the candidate alone") for folder in ours if folder not in theirs]
    for folder in theirs:
        if folder in ours:
            denoiser = denoisers.get(folder)
            names = [_names(side, folder, scope, denoiser) for side in (reference, candidate)]
            pair = _joined(theirs[folder], ours[folder], denoiser)
            part, odd = _pairs((reference.root, pair[0]), (candidate.root, pair[1]), names[0], names[1])
            parts.append(part)
            lacking += odd
    if not any(part.pairs for part in parts):
        raise SourceError(f"{candidate.root}: no tensor has the name of one in {reference.root}", hint=_HINT)
    return Matched(tuple(parts), tuple(lacking))


def _scope(inventory: Inventory) -> Scope | None:
    """Of a language model, None where nobody knows it: its names are taken as they stand."""
    if inventory.pipeline is not None:
        return None
    with contextlib.suppress(UnsupportedError):
        return scope_to_validate(inventory.main.config, None, lambda: record.body(inventory.root))[0]
    return None


def _unstacked(inventory: Inventory, scope: Scope | None) -> Inventory:
    return unstack(inventory, scope) if scope is not None else inventory


def _joined(theirs: Component, ours: Component, denoiser: Denoiser | None) -> tuple[Component, Component]:
    """Both with the linears as one that either of them holds as one."""
    if denoiser is None or not denoiser.joined:
        return theirs, ours

    def whole(component: Component) -> bool:
        return any(f".{linear}.weight" in name for name in component.tensors for linear in denoiser.joined)

    def dense(component: Component) -> bool:
        ends = tuple(f".{part}.weight" for parts in denoiser.joined.values() for part in parts)
        return all(tensor.spec.dtype in FLOATS for name, tensor in component.tensors.items() if name.endswith(ends))

    one, other = whole(theirs), whole(ours)
    theirs = join(theirs, denoiser) if other and not one and dense(theirs) else theirs
    return theirs, join(ours, denoiser) if one and not other and dense(ours) else ours


def _names(inventory: Inventory, folder: str, scope: Scope | None, denoiser: Denoiser | None) -> Callable[[str], str]:
    """Turns a stored name into the one by which both sides are compared."""
    written = _renamed(record.body(inventory.root), folder if inventory.pipeline is not None else None)

    def name(stored: str) -> str:
        called = _weight(stored)
        called = written.get(called, written.get(stored, called))
        if scope is not None:
            return scope.canonical(called)
        for theirs, ours in denoiser.renamed.items() if denoiser is not None else ():
            called = f".{called}.".replace(f".{theirs}.", f".{ours}.").strip(".")
        return called

    return name


def _renamed(body: Any, folder: str | None) -> dict[str, str]:
    """{what the output calls a tensor: what its source does}, as ckptq.json says it; it may be anybody's."""
    if folder is not None:
        components = body.get("components") if isinstance(body, dict) else None
        body = components.get(folder) if isinstance(components, dict) else None
    names = body.get("renamed") if isinstance(body, dict) else None
    return {new: old for old, new in names.items() if isinstance(new, str)} if isinstance(names, dict) else {}


def _pairs(
    reference: tuple[Path, Component],
    candidate: tuple[Path, Component],
    called: Callable[[str], str],
    ours_called: Callable[[str], str],
) -> tuple[Part, list[Unmatched]]:
    """The part, and what one side lacks."""
    theirs = {called(name): tensor for name, tensor in reference[1].tensors.items() if _counts(name)}
    ours = {ours_called(name): tensor for name, tensor in candidate[1].tensors.items() if _counts(name)}
    folder = f"{reference[1].folder}/" if reference[1].folder else ""
    pairs = {f"{folder}{_weight(tensor.spec.name)}": (tensor, ours[name]) for name, tensor in theirs.items() if name in ours}
    odd = [Unmatched(f"{folder}{printable(t.spec.name)}", _ALONE[0]) for name, t in theirs.items() if name not in ours]
    odd += [Unmatched(f"{folder}{printable(t.spec.name)}", _ALONE[1]) for name, t in ours.items() if name not in theirs]
    return Part(reference, candidate, pairs), odd


def _weight(stored: str) -> str:
    """A weight's name by that of its codes: compressed-tensors calls packed ones `weight_packed`."""
    return stored.removesuffix("_packed") if stored.endswith(".weight_packed") else stored


def _counts(name: str) -> bool:
    """Whether it is a tensor of the model itself."""
    return scale_kind(name) is None and name.rpartition(".")[2] not in _BESIDE
