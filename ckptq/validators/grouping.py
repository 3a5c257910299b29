"""Joins findings that are one fault at many places: layers, experts and blocks as `{0..27}`, other names side by side.

Linear in the number of findings. Of each fault only the first finding and the numbers of its places are kept.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ckptq.console import number_runs
from ckptq.validators import Finding

_NAMES = 3
"""Names in one finding's subject; the rest is counted."""
_RUNS = 12
"""Numbers, or runs of them, in one pair of braces; the rest is counted."""
_FIRST = " (in the first)"
# Nine digits: int() refuses to read thousands, and a number with a leading zero is no number but part of a name.
_NUMBER = re.compile(r"(?<=\.)(?:0|[1-9]\d{0,8})(?=\.|$)", re.ASCII)
_NUMBERS = 4
"""Numbers of one name that count as places; names of models have two or three."""
_FIGURE = re.compile(r"\d[\d.]*(?:e[+-]?\d+)?", re.ASCII)
Place = tuple[int, ...]
Pieces = tuple[str, ...]
"""What stands around the numbers of a name: one more than there are numbers."""


@dataclass(slots=True)
class _Fault:
    first: Finding
    places: dict[Place, None] = field(default_factory=dict)
    count: int = 0
    differ: bool = False

    def add(self, finding: Finding, place: Place) -> None:
        self.places[place] = None
        self.count += finding.count
        self.differ |= finding.found != self.first.found


def group(findings: Iterable[Finding]) -> list[Finding]:
    """One finding for one fault, errors first, otherwise in the order of first appearance. The counts add up.

    Where the places differ in what was found, the first one's is shown, and the text says so. Braces multiply: `{0,1}.x.{2,3}`
    stands for four places, and sets of places that are no such product become names side by side.
    """
    faults: dict[tuple[Pieces, tuple[str, ...]], _Fault] = {}
    for finding in findings:
        pieces, place = _split(finding.subject)
        key = pieces, (finding.code, finding.severity, finding.expected, finding.effect, finding.mend)
        fault = faults.get(key)
        if fault is None:
            fault = faults[key] = _Fault(finding)
        fault.add(finding, place)
    stories: dict[tuple[str, ...], list[tuple[Pieces, _Fault]]] = {}
    for (pieces, said), fault in faults.items():
        story = _FIGURE.sub("#", fault.first.found.removesuffix(_FIRST))
        stories.setdefault((*said, story), []).append((pieces, fault))
    return sorted((_join(same) for same in stories.values()), key=lambda f: f.severity != "error")


def _split(subject: str) -> tuple[Pieces, Place]:
    """`layers.3.experts.17.w` -> ((`layers.`, `.experts.`, `.w`), (3, 17))."""
    numbers = itertools.islice(_NUMBER.finditer(subject), _NUMBERS)
    return tuple(_NUMBER.split(subject, _NUMBERS)), tuple(int(number[0]) for number in numbers)


def _join(same: Sequence[tuple[Pieces, _Fault]]) -> Finding:
    first = same[0][1].first
    count = sum(fault.count for _, fault in same)
    if count == first.count:
        return first
    differ = any(fault.differ or fault.first.found != first.found for _, fault in same) and not first.found.endswith(_FIRST)
    names = [name for pieces, fault in same for name in _names(pieces, list(fault.places))]
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return dataclasses.replace(
        first, subject=", ".join(names[:_NAMES]) + more, found=first.found + (_FIRST if differ else ""), count=count
    )


def _names(pieces: Pieces, places: Sequence[Place]) -> Iterator[str]:
    for product in _products(places):
        runs = [_runs(numbers) for numbers in product]
        yield pieces[0] + "".join(run + piece for run, piece in zip(runs, pieces[1:], strict=True))


def _runs(numbers: Iterable[int]) -> str:
    """As `number_runs`, cut short where there is no end of runs: `{0,2..9,11 and 40 more}`."""
    ordered = sorted(set(numbers))
    starts = [i for i, n in enumerate(ordered) if i == 0 or ordered[i - 1] != n - 1]
    if len(starts) <= _RUNS:
        return number_runs(ordered)
    shown = starts[_RUNS]
    return f"{number_runs(ordered[:shown])[:-1]} and {len(ordered) - shown} more}}"


def _products(places: Sequence[Place]) -> list[tuple[Sequence[int], ...]]:
    """The places as few products of number lists: first numbers that have the same rests go together."""
    if not places[0]:
        return [()]
    rests: dict[int, list[Place]] = {}
    for number, *rest in places:
        rests.setdefault(number, []).append(tuple(rest))
    alike: dict[frozenset[Place], list[int]] = {}
    for number, these in rests.items():
        alike.setdefault(frozenset(these), []).append(number)
    return [(numbers, *product) for numbers in alike.values() for product in _products(rests[numbers[0]])]
