"""Models' next-token distributions against a reference's, from their last hidden states: the output heads go by in pieces.

Logits are never whole in memory. For each position the running maximum m, the sum s of exp(l - m) and, of each candidate q,
t = sum of exp(l_p - m_p) (l_p - l_q) are kept while the vocabulary passes, as flash attention does; then
KL(p || q) = t / s_p - (m_p + log s_p) + (m_q + log s_q).

Of tokens that are easy the KL is 1e-8 and less, the difference of numbers near 1: values are float32, their sums float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from ckptq.checkpoint import Component, Reader
from ckptq.compare.casts import step_of
from ckptq.compare.room import ROWS, TOKENS
from ckptq.errors import UnsupportedError
from ckptq.scopes import Scope
from ckptq.tensors import TORCH_DTYPES, raw
from ckptq.validators.vllm_rules import is_tied


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
        """Raises UnsupportedError for a head with a bias, or none: embeddings stand in for one where config.json ties them."""
        canonical = {scope.canonical(name): name for name in component.tensors}
        if f"{scope.head}.bias" in canonical:
            raise UnsupportedError(f"{canonical[f'{scope.head}.bias']}: an output head with a bias can't be compared")
        name = canonical.get(f"{scope.head}.weight") or (
            _embeddings(canonical, scope) if is_tied(scope, component.config) else None
        )
        if name is None:
            raise UnsupportedError(
                f"{scope.head}.weight is not stored, so there are no logits", hint="config.json does not tie it to the embeddings"
            )
        self._tensor, self._reader, self._device = component.tensors[name], reader, device
        self.size = self._tensor.spec.shape[0]
        self.finish = _finish(scope.text(component.config))

    def rows(self, first: int, last: int) -> torch.Tensor:
        """[last - first, H], in the dtype that is stored."""
        columns = self._tensor.spec.shape[1]
        found = torch.empty((last - first, columns), dtype=TORCH_DTYPES[self._tensor.spec.dtype])
        self._reader.read_into(self._tensor, first * self._tensor.spec.nbytes // self.size, raw(found))
        return found.to(self._device)


def _embeddings(canonical: Mapping[str, str], scope: Scope) -> str | None:
    """The stored name of those beside the decoder layers: a talker and a draft model have their own."""
    names = [name for name in canonical if name.endswith(("embed_tokens.weight", "wte.weight"))]
    beside = [name for name in names if name.startswith(scope.layers.rpartition(".")[0])]
    return canonical[(beside or names)[0]] if names else None


_AFTER = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")
_FACTORS = ("hyperclovax",)
"""Where Granite's divisor is a factor."""


def _finish(config: Mapping[str, Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a model does to its logits: transformers 5.17 Gemma's cap, Granite's divisor, Cohere's and Falcon-H1's factors.

    config  the language model's part of config.json. What it leaves out transformers' class of configuration has
    """
    defaults = _defaults(str(config.get("model_type")))
    cap, divisor, *factors = (config.get(key, getattr(defaults, key, None)) for key in _AFTER)
    if config.get("model_type") in _FACTORS:
        factors, divisor = [divisor, *factors], None
    factor = math.prod(value for value in factors if value)

    def finish(logits: torch.Tensor) -> torch.Tensor:
        logits = logits / divisor if divisor else logits
        logits = logits * factor if factor != 1 else logits
        return cap * torch.tanh(logits / cap) if cap else logits

    return finish


def _defaults(model_type: str) -> object:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]() if model_type in CONFIG_MAPPING else None


def compare_heads(
    heads: Sequence[Head], hidden: Sequence[torch.Tensor], tokens: torch.Tensor, advance: Callable[[int], None] = lambda rows: None
) -> list[Distances]:
    """Each candidate against the reference, whose logits are computed once, as the rows of one head are read once.

    heads    the reference's, then the candidates'; these may be one and the same
    hidden   their models' last hidden states, after the final norm, [N, H] each
    tokens   int64 [N], those that came
    advance  is told the rows that have passed

    Raises UnsupportedError for vocabularies of different sizes.
    """
    if other := next((head for head in heads if head.size != heads[0].size), None):
        raise UnsupportedError(f"the vocabularies differ: {heads[0].size} tokens and {other.size}")
    one, *others = (_State(len(tokens), tokens.device) for _ in heads)
    for first in range(0, heads[0].size, ROWS):
        last = min(first + ROWS, heads[0].size)
        rows = {head: head.rows(first, last).to(hidden[0].dtype) for head in dict.fromkeys(heads)}
        for block in _slices(0, len(tokens), TOKENS):
            told = torch.nn.functional.linear(hidden[0][block], rows[heads[0]])
            parts = list(_slices(block.start, block.stop, max(step_of(told) // (last - first), 1)))
            places = [slice(part.start - block.start, part.stop - block.start) for part in parts]
            weights, shrunk = torch.empty_like(told, dtype=torch.float32), torch.empty_like(told[:, 0], dtype=torch.float64)
            for part, place in zip(parts, places, strict=True):
                p = heads[0].finish(told[place].to(torch.float32, copy=True))
                weights[place], shrunk[place] = one.take(p, part, first, tokens[part])
            for head, state, after in zip(heads[1:], others, hidden[1:], strict=True):
                found = torch.nn.functional.linear(after[block], rows[head])
                for part, place in zip(parts, places, strict=True):
                    q = head.finish(found[place].float())
                    apart = (heads[0].finish(told[place].float()) - q).mul_(weights[place])
                    state.product[part] = state.product[part] * shrunk[place] + apart.sum(1, dtype=torch.float64)
                    state.take(q, part, first, tokens[part])
        advance(last - first)
    return [_distances(one, state) for state in others]


def _slices(start: int, stop: int, step: int) -> Iterator[slice]:
    return (slice(at, min(at + step, stop)) for at in range(start, stop, step))


def split(distances: Distances, sizes: Sequence[int]) -> list[Distances]:
    """Those of samples behind one another, sample by sample, which have that many positions each."""
    parts = [torch.split(getattr(distances, field.name), list(sizes)) for field in fields(Distances)]
    return [Distances(*values) for values in zip(*parts, strict=True)]


class _State:
    """What is kept of one model's logits, a value a position. `product`: the t of a candidate."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.largest = torch.full((count,), -torch.inf, device=device)
        self.total = torch.zeros(count, dtype=torch.float64, device=device)
        self.product = torch.zeros(count, dtype=torch.float64, device=device)
        self.told = torch.zeros(count, device=device)
        self.top = torch.zeros(count, dtype=torch.int64, device=device)

    def take(self, logits: torch.Tensor, part: slice, first: int, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the logits [n, rows] of tokens `first` and on, F32.

        Returns exp(l - m) in their place, and by what all that was summed under the maximum before must be multiplied, [n].
        """
        largest, top = logits.max(1)
        known = self.largest[part]
        self.top[part] = torch.where(largest > known, top + first, self.top[part])
        place = tokens - first
        inside = (place >= 0) & (place < logits.shape[1])
        told = logits.gather(1, place.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        self.told[part] = torch.where(inside, told, self.told[part])
        both = torch.maximum(known, largest)
        shrunk = torch.exp((known - both).double())
        weights = logits.sub_(both[:, None]).exp_()
        self.total[part] = self.total[part] * shrunk + weights.sum(1, dtype=torch.float64)
        self.largest[part] = both
        return weights, shrunk

    @property
    def end(self) -> torch.Tensor:
        """The logarithm of the sum of exp(l), float64 [N]."""
        return self.largest.double() + self.total.log()


def _distances(one: _State, other: _State) -> Distances:
    kl = (other.product / one.total - one.end + other.end).clamp(min=0)
    losses = (state.end - state.told.double() for state in (one, other))
    return Distances(*(found.cpu() for found in (kl, *losses, one.top, other.top)))
