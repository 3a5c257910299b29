"""How far one array is from another, from sums over pieces of them: the same figures for weights, images and frames.

Formulas and names are those of vLLM-Omni 0.30.0 quantization/tools/compare_diffusion_trajectory_similarity.py; d = candidate -
reference, all in float64:

    mse = mean d^2    rmse = sqrt(mse)    mae = mean |d|    max_abs = max |d|    l2 = ||d||
    relative_l2 = ||d|| / ||reference||: 0 where both are 0, infinity where the reference alone is
    cosine_similarity = <reference, candidate> / (||reference|| ||candidate||) in [-1, 1]: 1 where both norms are 0, 0 where one is
    psnr_db = 20 log10(255) - 10 log10(mse), infinity where mse is 0; of arrays in uint8 alone

and of weights sqnr_db = -20 log10(relative_l2). No values at all differ in nothing: 0, with a cosine of 1. A NaN or an infinity on
either side makes the figures that it reaches NaN or infinite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    F64 = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over pairs of values (a of the reference, b of the candidate): a^2, b^2, a b, d^2, |d|; and the largest |d|."""

    count: int = 0
    reference: float = 0.0
    candidate: float = 0.0
    product: float = 0.0
    squares: float = 0.0
    sizes: float = 0.0
    largest: float = 0.0

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.count + other.count,
            self.reference + other.reference,
            self.candidate + other.candidate,
            self.product + other.product,
            self.squares + other.squares,
            self.sizes + other.sizes,
            _larger(self.largest, other.largest),
        )

    @property
    def cosine(self) -> float:
        norms = math.sqrt(self.reference), math.sqrt(self.candidate)
        if self.squares == 0 and math.isfinite(norms[0]):
            return 1.0
        if 0.0 in norms:
            return 0.0 if not math.isnan(norms[0] + norms[1]) else math.nan
        cosine = self.product / norms[0] / norms[1]
        return cosine if math.isnan(cosine) else max(-1.0, min(1.0, cosine))

    @property
    def mse(self) -> float:
        return self.squares / self.count if self.count else 0.0

    @property
    def mae(self) -> float:
        return self.sizes / self.count if self.count else 0.0

    @property
    def l2(self) -> float:
        return math.sqrt(self.squares)

    @property
    def relative_l2(self) -> float:
        if self.reference == 0:
            return math.inf if self.squares > 0 else self.squares
        return self.l2 / math.sqrt(self.reference)

    @property
    def sqnr_db(self) -> float:
        return _decibels(self.relative_l2)

    @property
    def psnr_db(self) -> float:
        return _decibels(math.sqrt(self.mse) / 255)


def sums(reference: F64, candidate: F64, spare: F64) -> Sums:
    """Of two float64 arrays [n], n > 0. `spare` [n] is overwritten."""
    import numpy as np

    with np.errstate(all="ignore"):  # einsum: in a fixed order, and no threads of a BLAS's own
        norms = float(np.einsum("i,i", reference, reference)), float(np.einsum("i,i", candidate, candidate))
        product = float(np.einsum("i,i", reference, candidate))
        np.subtract(candidate, reference, out=spare)
        errors = float(np.einsum("i,i", spare, spare))
        np.abs(spare, out=spare)
        return Sums(len(reference), *norms, product, errors, float(spare.sum()), float(spare.max()))


def extreme(of: Callable[[Iterable[float]], float], values: Iterable[float]) -> float:
    """min or max of some values, or NaN where any is."""
    known = list(values)
    return math.nan if any(map(math.isnan, known)) else of(known)


def _larger(a: float, b: float) -> float:
    """The larger of two, or NaN where either is."""
    return a if a > b or math.isnan(a) else b


def _decibels(ratio: float) -> float:
    """-20 log10(ratio)."""
    if ratio == 0:
        return math.inf
    return -20 * math.log10(ratio)
