"""Two models' next-token distributions against each other, from their last hidden states: the output heads go by in pieces.

Logits are never whole in memory. For each position the running maximum m, the sum s of exp(l - m) and, of the reference p,
t = sum of exp(l_p - m_p) (l_p - l_q) are kept while the vocabulary passes, as flash attention does; then
KL(p || q) = t / s_p - (m_p + log s_p) + (m_q + log s_q).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from ckptq.checkpoint import Component, Reader
from ckptq.errors import UnsupportedError
from ckptq.scopes import Scope
from ckptq.tensors import TORCH_DTYPES, raw

ROWS, TOKENS = 4096, 1024
"""Of the vocabulary, and positions, whose logits are in memory at a time."""


@dataclass(frozen=True, slots=True)
class Distances:
    """Of each position [N]: KL(reference || candidate), both losses of the token that came, the token that each finds likeliest."""

    kl: torch.Tensor
    nll_reference: torch.Tensor
    nll_candidate: torch.Tensor
    top_reference: torch.Tensor
    top_candidate: torch.Tensor

    @property
    def same_top(self) -> torch.Tensor:
        """Whether these agree, bool [N]."""
        return self.top_reference == self.top_candidate


class Head:
    """The rows of a model's output head, which may be its embeddings'."""

    def __init__(self, component: Component, scope: Scope, reader: Reader, device: torch.device) -> None:
        """Raises UnsupportedError for a head with a bias, or none."""
        canonical = {scope.canonical(name): name for name in component.tensors}
        if f"{scope.head}.bias" in canonical:
            raise UnsupportedError(f"{canonical[f'{scope.head}.bias']}: an output head with a bias can't be compared")
        tied = next((name for name in canonical.values() if name.endswith("embed_tokens.weight")), None)
        name = canonical.get(f"{scope.head}.weight", tied)
        if name is None:
            raise UnsupportedError(f"neither {scope.head}.weight nor embeddings are stored, so there are no logits")
        self._tensor, self._reader, self._device = component.tensors[name], reader, device
        self.size = self._tensor.spec.shape[0]
        self.finish = _finish(scope.text(component.config))

    def rows(self, first: int, last: int) -> torch.Tensor:
        """[last - first, H], in the dtype that is stored."""
        columns = self._tensor.spec.shape[1]
        found = torch.empty((last - first, columns), dtype=TORCH_DTYPES[self._tensor.spec.dtype])
        self._reader.read_into(self._tensor, first * self._tensor.spec.nbytes // self.size, raw(found))
        return found.to(self._device)


def _finish(config: Mapping[str, Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a model does to its logits: transformers 5.17 Gemma's cap, Granite's divisor, Cohere's factor."""
    cap, divisor, factor = (config.get(key) for key in ("final_logit_softcapping", "logits_scaling", "logit_scale"))

    def finish(logits: torch.Tensor) -> torch.Tensor:
        logits = logits / divisor if divisor else logits
        logits = logits * factor if factor else logits
        return cap * torch.tanh(logits / cap) if cap else logits

    return finish


def compare_heads(reference: Head, candidate: Head, hidden: tuple[torch.Tensor, torch.Tensor], tokens: torch.Tensor) -> Distances:
    """hidden  the two models' last hidden states, after the final norm, [N, H] each    tokens  int64 [N], those that came

    Raises UnsupportedError for vocabularies of different sizes.
    """
    if reference.size != candidate.size:
        raise UnsupportedError(f"the vocabularies differ: {reference.size} tokens and {candidate.size}")
    states = [_State(len(tokens), tokens.device) for _ in range(2)]
    product = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
    for first in range(0, reference.size, ROWS):
        last = min(first + ROWS, reference.size)
        rows = [head.rows(first, last) for head in (reference, candidate)]
        for at in range(0, len(tokens), TOKENS):
            part = slice(at, min(at + TOKENS, len(tokens)))
            logits = [
                head.finish(torch.nn.functional.linear(h[part], r.to(h.dtype)).float())
                for head, h, r in zip((reference, candidate), hidden, rows, strict=True)
            ]
            before = states[0].largest[part].clone()
            for state, found in zip(states, logits, strict=True):
                state.take(found, part, first, tokens[part])
            weights = torch.exp(logits[0] - states[0].largest[part, None])
            product[part] *= torch.exp((before - states[0].largest[part]).double())
            product[part] += (weights * (logits[0] - logits[1])).sum(1, dtype=torch.float64)
    ends = [state.largest.double() + state.total.log() for state in states]
    kl = product / states[0].total - ends[0] + ends[1]
    nll = [end - state.told.double() for end, state in zip(ends, states, strict=True)]
    return Distances(*(found.cpu() for found in (kl.clamp(min=0), *nll, *(state.top for state in states))))


def split(distances: Distances, sizes: Sequence[int]) -> list[Distances]:
    """Those of samples behind one another, sample by sample, which have that many positions each."""
    parts = [torch.split(getattr(distances, field.name), list(sizes)) for field in fields(Distances)]
    return [Distances(*values) for values in zip(*parts, strict=True)]


class _State:
    """What is kept of one model's logits, a value a position."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.largest = torch.full((count,), -torch.inf, device=device)
        self.total = torch.zeros(count, dtype=torch.float64, device=device)
        self.told = torch.zeros(count, device=device)
        self.top = torch.zeros(count, dtype=torch.int64, device=device)

    def take(self, logits: torch.Tensor, part: slice, first: int, tokens: torch.Tensor) -> None:
        """Adds the logits [n, rows] of tokens `first` and on."""
        largest, top = logits.max(1)
        known = self.largest[part]
        self.top[part] = torch.where(largest > known, top + first, self.top[part])
        both = torch.maximum(known, largest)
        self.total[part] *= torch.exp((known - both).double())
        self.total[part] += torch.exp(logits - both[:, None]).sum(1, dtype=torch.float64)
        self.largest[part] = both
        inside = (tokens >= first) & (tokens < first + logits.shape[1])
        place = (tokens - first).clamp(0, logits.shape[1] - 1)
        self.told[part] = torch.where(inside, logits.gather(1, place[:, None])[:, 0], self.told[part])
