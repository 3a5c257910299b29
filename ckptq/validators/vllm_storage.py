"""Sets of bytes, and where in its storage a tensor's elements are. For vllm_track.py, in the interpreter that has the server."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_RUNS = 1_000_000
"""Stretches that one view is taken apart into; beyond, its whole span counts."""


class Intervals:
    """A set of integers as sorted disjoint [start, stop)."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.stops: list[int] = []

    def add(self, start: int, stop: int) -> None:
        """Joins with what touches it."""
        if start >= stop:
            return
        first, last = bisect_left(self.stops, start), bisect_right(self.starts, stop)
        if first < last:
            start, stop = min(start, self.starts[first]), max(stop, self.stops[last - 1])
        self.starts[first:last], self.stops[first:last] = [start], [stop]

    def within(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The parts of [start, stop) that are in the set."""
        for i in range(bisect_right(self.stops, start), len(self.starts)):
            if self.starts[i] >= stop:
                return
            yield max(start, self.starts[i]), min(stop, self.stops[i])

    def gaps(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The parts of [start, stop) that are not in the set."""
        for a, b in self.within(start, stop):
            if a > start:
                yield start, a
            start = b
        if start < stop:
            yield start, stop

    def count(self, start: int, stop: int) -> int:
        return sum(b - a for a, b in self.within(start, stop))


@dataclass(frozen=True, slots=True)
class Place:
    """Where in its storage a tensor's elements are: `offset` and `strides` in elements of `itemsize` bytes."""

    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int

    @classmethod
    def of(cls, tensor: Any) -> Place:
        return cls(tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()), tensor.element_size())

    @property
    def elements(self) -> int:
        return math.prod(self.sizes)

    @property
    def span(self) -> tuple[int, int]:
        """First byte and the one past the last."""
        if not self.elements:
            return 0, 0
        last = self.offset + sum((n - 1) * s for n, s in zip(self.sizes, self.strides, strict=True))
        return self.offset * self.itemsize, (last + 1) * self.itemsize

    def runs(self) -> Iterator[tuple[int, int]]:
        """[start, stop) in bytes of the stretches without holes; the whole span where there are too many."""
        if not self.elements:
            return
        dims = sorted(((s, n) for n, s in zip(self.sizes, self.strides, strict=True) if n > 1 and s), reverse=True)
        length = 1
        while dims and dims[-1][0] <= length:
            stride, size = dims.pop()
            length += (size - 1) * stride
        if math.prod(n for _, n in dims) > _RUNS:
            yield self.span
            return
        starts: Iterable[int] = (self.offset,)
        for stride, size in dims:
            starts = [start + i * stride for start in starts for i in range(size)]
        for start in starts:
            yield start * self.itemsize, (start + length) * self.itemsize


def without(gaps: Sequence[tuple[int, int]], elements: int) -> Any:
    """Bool [elements]: True but for the gaps."""
    import torch

    mask = torch.ones(elements, dtype=torch.bool)
    for a, b in gaps:
        mask[a:b] = False
    return mask


def scattered(flat: Any, place: Place) -> Any:
    """Bool over the elements of a storage: those True that `flat`, in the order of the place's index, has True."""
    import torch

    mask = torch.zeros(place.span[1] // place.itemsize, dtype=torch.bool)
    mask.as_strided(place.sizes, place.strides, place.offset).logical_or_(flat.view(place.sizes))
    return mask


def flat_gaps(covered: Intervals, place: Place) -> list[tuple[int, int]]:
    """[first, end) of the flat index of the elements that aren't wholly covered."""
    import torch

    start, stop = place.span
    gaps = [(a // place.itemsize, -(-b // place.itemsize)) for a, b in covered.gaps(start, stop)]
    if not gaps:
        return []
    dense, expected = True, 1
    for n, s in zip(reversed(place.sizes), reversed(place.strides), strict=True):
        dense = dense and (n == 1 or s == expected)
        expected *= n
    if dense:
        return [(a - place.offset, b - place.offset) for a, b in gaps]
    mask = torch.zeros(stop // place.itemsize, dtype=torch.bool)
    for a, b in gaps:
        mask[a:b] = True
    return [*ranges(mask.as_strided(place.sizes, place.strides, place.offset).reshape(-1))]


def ranges(mask: Any) -> Iterator[tuple[int, int]]:
    """[first, end) of each stretch of True."""
    import torch

    padded = torch.zeros(mask.numel() + 2, dtype=torch.int8)
    padded[1:-1] = mask.cpu()
    edges = padded.diff().nonzero().view(-1, 2) if padded.any() else ()
    for first, end in edges:
        yield int(first), int(end)
