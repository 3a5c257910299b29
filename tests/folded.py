"""Names of tensors with the numbers of layers, blocks and experts joined, so that golden files are short enough to be read."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_PLACE = "\0"


def folded(names: Iterable[str]) -> list[str]:
    """`a.0.b` and `a.1.b` -> `a.{0..1}.b`, where every combination of numbers is there; in the order of the first of each."""
    groups: dict[str, list[tuple[int, ...]]] = {}
    for name in names:
        groups.setdefault(_NUMBER.sub(_PLACE, name), []).append(tuple(map(int, _NUMBER.findall(name))))
    return [name for pattern, numbers in groups.items() for name in _joined(pattern, numbers)]


def _joined(pattern: str, numbers: list[tuple[int, ...]]) -> list[str]:
    columns = [sorted(set(column)) for column in zip(*numbers, strict=True)]
    if sorted(numbers) != list(itertools.product(*columns)):
        return [_filled(pattern, map(str, number)) for number in numbers]
    return [_filled(pattern, map(_range, columns))]


def _range(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    whole = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{{{numbers[0]}..{numbers[-1]}}}" if whole else f"{{{','.join(map(str, numbers))}}}"


def _filled(pattern: str, texts: Iterable[str]) -> str:
    first, *rest = pattern.split(_PLACE)
    return first + "".join(text + part for text, part in zip(texts, rest, strict=True))
