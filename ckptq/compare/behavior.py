"""Two checkpoints of one architecture on the same samples, in lock-step: a layer of each is in memory, each sample passes both.

The candidate computes as its server would (served.py), and so does the reference, where it is quantized. After each layer hidden
states are compared, and within it what linears, attention and feed-forward give; at the end the distributions of the next token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ckptq.calibration import Sample
from ckptq.calibration.encode import Encoder
from ckptq.compare.attended import Listeners, attended
from ckptq.compare.head import Distances, compare_heads, split
from ckptq.compare.room import waiting_room
from ckptq.compare.sides import Samples, Side, open_pair, predicting
from ckptq.compare.tally import Gap, LayerGap, Tally
from ckptq.console import Console
from ckptq.lockstep import Wave
from ckptq.scopes import Scope
from ckptq.streamed import StreamedModel

WORST, TOKENS = 4, 512
"""Samples that are told token by token, and how many tokens of each at most."""


@dataclass(frozen=True, slots=True)
class SampleGap:
    """Of one sample's judged tokens. `worst`: the token at which the distributions differ most, after the text before it."""

    name: str
    tokens: int
    kl_mean: float
    kl_max: float
    nll_reference: float
    nll_candidate: float
    worst: str


@dataclass(frozen=True, slots=True)
class TokenGap:
    """Of one judged token: its text, and the text of the token that each model finds likeliest in its place."""

    text: str
    kl: float
    nll_reference: float
    nll_candidate: float
    reference: str
    candidate: str


@dataclass(frozen=True, slots=True)
class WorstSample:
    """A sample of those with the largest mean KL, token by token, with what the user showed and asked."""

    name: str
    prompt: str | None
    image: Path | None
    audio: Path | None
    tokens: tuple[TokenGap, ...]


@dataclass(frozen=True, slots=True)
class Behavior:
    """What the samples showed. `kl` and what follows it have a value for each judged token, sample by sample.

    entering  of the hidden states that enter the first layer: embeddings, and what towers make of images and audio
    worst     the samples that differ most, worst first
    """

    entering: Gap
    layers: tuple[LayerGap, ...]
    samples: tuple[SampleGap, ...]
    worst: tuple[WorstSample, ...]
    kl: tuple[float, ...]
    nll_reference: tuple[float, ...]
    nll_candidate: tuple[float, ...]
    same_top: tuple[bool, ...]


def measure_behavior(
    reference: Path,
    candidate: Path,
    samples: Sequence[Sample],
    *,
    sequence_length: int,
    max_pixels: int | None,
    device: torch.device,
    memory: int | None,
    console: Console,
    scope: Scope | None = None,
    limit: int | None = None,
) -> Behavior:
    """Runs the samples through both. Those that do not fit the memory go in waves.

    memory  bytes that waiting samples may hold; None for what is left of `limit`, or of the free memory
    limit   on all of it, in bytes
    scope   the one that a recipe spells out for both

    Raises UnsupportedError for checkpoints that can't be compared or computed, CalibrationError for samples without judged tokens.
    """
    encoder = Encoder(reference, max_pixels, sequence_length)
    inputs = Samples(encoder, samples)
    tally, found = Tally(), list[tuple[int, Distances]]()
    with attended() as listeners, open_pair(reference, candidate, device, scope) as sides, torch.inference_mode():
        if memory is None:
            memory = waiting_room(sides, len(samples), sequence_length, limit, device)
        first = 0
        while first < len(samples):
            count, part = _wave(sides, inputs, range(first, len(samples)), memory, tally, listeners, console)
            found += part
            first += count
    gaps = tuple(_sample(number, distances, inputs) for number, distances in found)
    worst = sorted(found, key=lambda item: -float(item[1].kl.mean().nan_to_num(math.inf)))[:WORST]
    return Behavior(
        tally.entering(),
        tally.layers(),
        gaps,
        tuple(_tokens(number, distances, inputs) for number, distances in worst),
        tuple(float(v) for _, d in found for v in d.kl),
        tuple(float(v) for _, d in found for v in d.nll_reference),
        tuple(float(v) for _, d in found for v in d.nll_candidate),
        tuple(bool(v) for _, d in found for v in d.same_top),
    )


def _wave(
    sides: Sequence[Side], inputs: Samples, numbers: range, memory: int, tally: Tally, listeners: Listeners, console: Console
) -> tuple[int, list[tuple[int, Distances]]]:
    """(how many samples passed, what the distributions of each are apart)."""
    one, other = sides
    cache = listeners if any(side.expected and side.expected.settings.kv_fp8 for side in sides) else {}
    with Wave(one.model, inputs.encode) as a, Wave(other.model, inputs.encode) as b:
        a.enter(numbers, memory // 2, console)
        b.enter(numbers[: len(a)], 1 << 62, console)
        for before, after in zip(a.hidden(), b.hidden(), strict=True):
            tally.enter(before, after)
        with console.stage("compare", a.depth, "layers") as advance:
            for layer, _ in zip(a.layers(), b.layers(), strict=True):
                pairs = _Pairs(tally, layer)
                with _watching(one.model, layer, pairs.keep, cache), _watching(other.model, layer, pairs.add, cache):
                    for place in range(len(a)):
                        a.step_one(place)
                        b.step_one(place)
                        pairs.done()
                        tally.add(layer, "", a.hidden_of(place), b.hidden_of(place))
                advance(1)
        last = [wave.hidden() for wave in (a, b)]
    numbers = numbers[: len(last[0])]
    tokens = inputs.came(numbers).to(one.model.device)
    hidden = [predicting(side, states, inputs, numbers) for side, states in zip(sides, last, strict=True)]
    with console.stage("heads", one.head.size, "rows") as advance:
        distances = compare_heads([one.head, other.head], hidden, tokens, advance)[0]
    return len(numbers), list(zip(numbers, split(distances, [len(inputs.spans[n]) for n in numbers]), strict=True))


Note = Callable[[str, torch.Tensor], None]


@contextmanager
def _watching(model: StreamedModel, layer: int, note: Note, cache: Listeners) -> Iterator[None]:
    """Tells `note` what the layer's modules give, as they do: its linears, and the modules around them.

    By listeners in `cache` also what attention gets as K and V: self_attn.k_cache, self_attn.v_cache.
    """

    def told(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if isinstance(value, torch.Tensor):
                note(name, value)

        return hook

    with ExitStack() as hooks:
        for name, module in model.layers[layer].named_modules():
            whole = "." not in name and not isinstance(module, torch.nn.Dropout)
            if name and (isinstance(module, torch.nn.Linear) or whole) and "norm" not in name:
                hooks.callback(module.register_forward_hook(told(name)).remove)
            cache[module] = partial(_note_cache, note, name)
        yield
        cache.clear()


def _note_cache(note: Note, name: str, key: torch.Tensor, value: torch.Tensor) -> None:
    note(f"{name}.k_cache", key)
    note(f"{name}.v_cache", value)


class _Pairs:
    """What modules give of one sample in one layer: the reference's is kept until the candidate's comes, then both are counted."""

    def __init__(self, tally: Tally, layer: int) -> None:
        self._tally, self._layer = tally, layer
        self._kept: dict[str, list[torch.Tensor]] = {}

    def keep(self, name: str, value: torch.Tensor) -> None:
        # A copy of what the modules around may change in place.
        self._kept.setdefault(name, []).append(value.clone() if name.endswith("_proj") else value)

    def add(self, name: str, value: torch.Tensor) -> None:
        """What has no counterpart, an expert that another token has reached, is left out."""
        if (kept := self._kept.get(name)) and (before := kept.pop(0)).shape == value.shape:
            self._tally.add(self._layer, name, before, value)

    def done(self) -> None:
        """The sample has passed."""
        self._kept.clear()


def _sample(number: int, distances: Distances, inputs: Samples) -> SampleGap:
    span, ids = inputs.spans[number], inputs.ids[number]
    worst = int(distances.kl.argmax())
    at = span.start + worst
    text = inputs.encoder.text(ids[max(0, at - 12) : at + 1])
    mean = [float(values.mean()) for values in (distances.kl, distances.nll_reference, distances.nll_candidate)]
    return SampleGap(inputs.samples[number].name, len(span), mean[0], float(distances.kl.max()), mean[1], mean[2], text)


def _tokens(number: int, distances: Distances, inputs: Samples) -> WorstSample:
    sample, text = inputs.samples[number], inputs.encoder.text
    ids = inputs.ids[number][inputs.spans[number].start :]
    values = zip(*(getattr(distances, field.name).tolist() for field in fields(Distances)), strict=True)
    tokens = tuple(
        TokenGap(text([came]), kl, nll_reference, nll_candidate, text([ours]), text([theirs]))
        for came, (kl, nll_reference, nll_candidate, ours, theirs) in zip(ids[:TOKENS], values, strict=False)
    )
    return WorstSample(sample.name, sample.prompt, sample.image, sample.audio, tokens)
