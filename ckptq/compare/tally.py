"""How far two models' values are apart, layer by layer and module by module: sums over samples, kept where the models compute."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ckptq.compare.casts import step_of

_ENTERING = -1
"""In place of a layer's number: before the first."""


@dataclass(frozen=True, slots=True)
class Gap:
    """How far the candidate's values are from the reference's: ||c - r|| / ||r||, the angle's cosine, -20 log10 of the first."""

    relative_l2: float
    cosine: float
    sqnr_db: float


@dataclass(frozen=True, slots=True)
class LayerGap:
    """Of the hidden states that a decoder layer gives, and, by their name in the layer, of its linears, attention and the like."""

    layer: int
    hidden: Gap
    modules: dict[str, float]


class Tally:
    """Sums of squared differences, of squares of both, of products, float64 [4]. By layer and module; "" is the hidden states'.

    They are fetched once, at the end: to ask a GPU for a number is to wait for all that it has been given to do.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[int, str], torch.Tensor] = {}

    def add(self, layer: int, name: str, reference: torch.Tensor, candidate: torch.Tensor) -> None:
        """Takes two tensors of one shape."""
        found, known = squares(reference, candidate), self._sums.get((layer, name))
        self._sums[layer, name] = found if known is None else known + found

    def enter(self, reference: torch.Tensor, candidate: torch.Tensor) -> None:
        """The same of hidden states before the first layer."""
        self.add(_ENTERING, "", reference, candidate)

    def entering(self) -> Gap:
        """Of what `enter` was given."""
        return self._gap(_ENTERING, "")

    def layers(self) -> tuple[LayerGap, ...]:
        """Of all else, in order."""
        numbers = sorted({layer for layer, _ in self._sums} - {_ENTERING})
        names = list(dict.fromkeys(name for _, name in self._sums if name))
        return tuple(
            LayerGap(n, self._gap(n, ""), {m: self._gap(n, m).relative_l2 for m in names if (n, m) in self._sums}) for n in numbers
        )

    def relative_l2(self, layer: int, name: str) -> float:
        """Of one module in a layer."""
        return self._gap(layer, name).relative_l2

    def _gap(self, layer: int, name: str) -> Gap:
        return gap(*self._sums[layer, name].tolist())


def squares(reference: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """Sums of (c - r)^2, r^2, c^2 and r * c, float64 [4] on their device: of pieces in float32, of those in float64."""
    r, c = reference.reshape(-1), candidate.reshape(-1)
    total = torch.zeros(4, dtype=torch.float64, device=r.device)
    step = step_of(r)
    for one, two in zip(torch.split(r, step), torch.split(c, step), strict=True):
        a, b = one.float(), two.float()
        d = b - a
        total += torch.stack([torch.dot(x, y) for x, y in ((d, d), (a, a), (b, b), (a, b))])
    return total


def gap(error: float, reference: float, candidate: float, product: float) -> Gap:
    """Of sums of squares. Both all zero: no error; the reference alone: infinite. NaN stays NaN, by the order of min and max."""
    relative = math.sqrt(error / reference) if reference else (math.inf if error else 0.0)
    norms = math.sqrt(reference * candidate)
    cosine = max(min(product / norms, 1.0), -1.0) if norms else float(reference == candidate)
    if relative in (0, math.inf):
        return Gap(relative, cosine, -math.inf if relative else math.inf)
    return Gap(relative, cosine, -20 * math.log10(relative))
