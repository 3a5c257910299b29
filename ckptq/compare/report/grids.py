"""Errors by layer and module type: what the heat maps show, without a line of how."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from ckptq.compare.behavior import Behavior
    from ckptq.compare.weights import WeightError

TINY = 1e-12
"""A KL below it is the arithmetic's, and counts as none."""
ROWS, COLUMNS = 60, 200
"""Of a heat map at most; of more, those with the largest errors."""
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_K = TypeVar("_K", tuple[str, str], int)
ALONE, _NOWHERE = "–", -1
"""The column of what is in no layer, and its number."""


@dataclass(frozen=True, slots=True)
class Row:
    """A module type. `part` is the tower or the stack of layers that it is of; `values` are by column, None where there is none."""

    part: str
    name: str
    values: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Grid:
    """Relative L2 errors by module type and layer. `left`: rows and columns that are not in it, for want of room."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    left: int = 0

    @property
    def values(self) -> list[float]:
        return [value for row in self.rows for value in row.values if value is not None]


@dataclass(frozen=True, slots=True)
class Span:
    """What the colors of a grid stand for: from `low` to `high`, evenly in the logarithm.

    1 is within it: an error as large as the values, which zeros in their place would have. So a sound candidate is pale, and a
    report can be held against another.
    """

    low: float
    high: float

    def place(self, value: float) -> float:
        """From 0 to 1, of a value above 0."""
        low, high = math.log(self.low), math.log(self.high)
        return min(1.0, max(0.0, (math.log(value) - low) / (high - low)))


def span(values: Iterable[float]) -> Span:
    """Of relative errors: at most four decades, so that rounding noise takes no color from what counts."""
    known = [value for value in values if 0 < value < math.inf]
    high = max([1.0, *known])
    return Span(max(min([high / 30, *known]), high / 1e4), high)


def of_weights(errors: Sequence[WeightError]) -> Grid:
    """Of matrices, and of whatever else differs; of experts in a layer the worst, and what can't be told above all."""
    shown = [e for e in errors if len(e.shape) > 1 or e.relative_l2 != 0]
    cells: dict[tuple[str, str], dict[int, float]] = {}
    for error in shown:
        part, name, layer = placed(error.name)
        row = cells.setdefault((part, name), {})
        row[layer] = worst((row.get(layer, 0.0), error.relative_l2))
    by_layer: dict[int, list[float]] = {}
    for row in cells.values():
        for layer, value in row.items():
            by_layer.setdefault(layer, []).append(value)
    columns = _largest(by_layer, COLUMNS)
    kept = _largest({key: list(row.values()) for key, row in cells.items()}, ROWS)
    return Grid(
        tuple(ALONE if column == _NOWHERE else str(column) for column in columns),
        tuple(Row(*key, tuple(cells[key].get(column) for column in columns)) for key in kept),
        len(cells) - len(kept) + len(by_layer) - len(columns),
    )


def of_behavior(found: Behavior) -> Grid:
    """Of hidden states, the first column what enters the first layer; and of what is in the layers."""
    layers = found.layers[:COLUMNS]
    names = list(dict.fromkeys(name for layer in layers for name in layer.modules))
    hidden = Row("", "hidden states", (found.entering.relative_l2, *(layer.hidden.relative_l2 for layer in layers)))
    rows = [Row("in the layer", name, (None, *(layer.modules.get(name) for layer in layers))) for name in names[:ROWS]]
    columns = ("in", *(str(layer.layer) for layer in layers))
    return Grid(columns, (hidden, *rows), len(names[ROWS:]) + len(found.layers[COLUMNS:]))


def placed(tensor: str) -> tuple[str, str, int]:
    """(stack of layers or tower, module type, layer) of a tensor: the first number in its name is the layer's, others are `*`.

    `model.layers.3.mlp.up_proj.weight` -> ("model.layers", "mlp.up_proj", 3); `lm_head.weight` -> ("", "lm_head", -1).
    """
    module = tensor.removesuffix(".weight")
    first = _NUMBER.search(module)
    if first is None:
        return "", module, _NOWHERE
    before, after = module[: first.start() - 1], module[first.end() + 1 :]
    return before, _NUMBER.sub("*", after) or "*", int(first[0][:9])


@dataclass(frozen=True, slots=True)
class Bins:
    """Tokens by their KL, two bins a decade from 10**first on. `none`: below TINY; `odd`: infinite, or no number."""

    first: float
    counts: tuple[int, ...]
    none: int
    odd: int


def bins(kl: Sequence[float]) -> Bins:
    """Every token is in one."""
    known = Counter(math.floor(2 * math.log10(value)) for value in kl if TINY <= value < math.inf)
    first, last = min(known, default=-2), max(known, default=-1)
    none = sum(value < TINY for value in kl)
    return Bins(first / 2, tuple(known[half] for half in range(first, last + 1)), none, len(kl) - none - known.total())


def worst(values: Iterable[float]) -> float:
    """The largest, or NaN where there is one."""
    return max(values, key=lambda value: (math.isnan(value), value))


def _order(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _largest(found: Mapping[_K, list[float]], count: int) -> list[_K]:
    """The keys with the largest values, sorted."""
    return sorted(sorted(found, key=lambda key: -_order(worst(found[key])))[:count])
