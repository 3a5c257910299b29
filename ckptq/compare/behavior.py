"""Two checkpoints of one architecture on the same samples, in lock-step: a layer of each is in memory, each sample passes both.

The candidate computes as its server would (served.py), and so does the reference, where it is quantized. After each layer hidden
states are compared, and within it what linears, attention and feed-forward give; at the end the distributions of the next token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ckptq.calibration import Sample
from ckptq.calibration.encode import Encoder
from ckptq.compare.head import Distances, compare_heads, split
from ckptq.compare.sides import Samples, Side, chosen, normed, open_side, refuse_others
from ckptq.console import Console
from ckptq.lockstep import Wave
from ckptq.streamed import StreamedModel

WORST, TOKENS = 4, 512
"""Samples that are told token by token, and how many tokens of each at most."""
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
    memory: int,
    console: Console,
) -> Behavior:
    """Runs the samples through both. `memory`: bytes that waiting samples may hold; what does not fit goes in waves.

    Raises UnsupportedError for checkpoints that can't be compared or computed, CalibrationError for samples without judged tokens.
    """
    encoder = Encoder(reference, max_pixels, sequence_length)
    inputs = Samples(encoder, samples)
    tally, found = _Tally(), list[tuple[int, Distances]]()
    with ExitStack() as stack, torch.inference_mode():
        sides = [stack.enter_context(open_side(folder, device)) for folder in (reference, candidate)]
        refuse_others(sides[0], sides[1])
        first = 0
        while first < len(samples):
            count, part = _wave(sides, inputs, range(first, len(samples)), memory, tally, console)
            found += part
            first += count
    gaps = tuple(_sample(number, distances, inputs) for number, distances in found)
    worst = sorted(found, key=lambda item: -float(item[1].kl.mean()))[:WORST]
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
    sides: Sequence[Side], inputs: Samples, numbers: range, memory: int, tally: _Tally, console: Console
) -> tuple[int, list[tuple[int, Distances]]]:
    """(how many samples passed, what the distributions of each are apart)."""
    one, other = sides
    with Wave(one.model, inputs.encode) as a, Wave(other.model, inputs.encode) as b:
        a.enter(numbers, memory // 2, console)
        b.enter(numbers[: len(a)], 1 << 62, console)
        for before, after in zip(a.hidden(), b.hidden(), strict=True):
            tally.add(_ENTERING, "", before, after)
        with console.stage("compare", a.depth, "layers") as advance:
            for layer, _ in zip(a.layers(), b.layers(), strict=True):
                with _watching(one.model, layer) as given, _watching(other.model, layer) as found:
                    for place in range(len(a)):
                        a.step_one(place)
                        b.step_one(place)
                        tally.add(layer, "", a.hidden()[place], b.hidden()[place])
                        for name in given:
                            tally.add(layer, name, given[name], found[name])
                advance(1)
        last = [wave.hidden() for wave in (a, b)]
    states = [normed(side, hidden) for side, hidden in zip(sides, last, strict=True)]
    numbers = numbers[: len(last[0])]
    tokens = inputs.came(numbers).to(one.model.device)
    with console.stage("heads", 1):
        before, after = (chosen(state, inputs, numbers) for state in states)
        distances = compare_heads(one.head, other.head, (before, after), tokens)
    return len(numbers), list(zip(numbers, split(distances, [len(inputs.spans[n]) for n in numbers]), strict=True))


@contextmanager
def _watching(model: StreamedModel, layer: int) -> Iterator[dict[str, torch.Tensor]]:
    """What the layer's modules give, of the sample that passed last: its linears, and the modules around them."""
    found: dict[str, torch.Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if isinstance(value, torch.Tensor):
                found[name] = value.detach().clone() if name.endswith("_proj") else value

        return hook

    with ExitStack() as hooks:
        for name, module in model.layers[layer].named_modules():
            if name and (isinstance(module, torch.nn.Linear) or name.count(".") == 0) and "norm" not in name:
                hooks.callback(module.register_forward_hook(note(name)).remove)
        yield found


@dataclass(slots=True)
class _Tally:
    """Sums over samples, float64: of squared differences, of squares of both, of products. By layer and module."""

    sums: dict[tuple[int, str], list[float]] = field(default_factory=dict)

    def add(self, layer: int, name: str, reference: torch.Tensor, candidate: torch.Tensor) -> None:
        r, c = reference.reshape(-1).float(), candidate.reshape(-1).float()
        d = c - r
        found = torch.stack([torch.dot(x, y).double() for x, y in ((d, d), (r, r), (c, c), (r, c))]).tolist()
        known = self.sums.setdefault((layer, name), [0.0] * 4)
        for i, value in enumerate(found):
            known[i] += value

    def entering(self) -> Gap:
        return gap(*self.sums[_ENTERING, ""])

    def layers(self) -> tuple[LayerGap, ...]:
        numbers = sorted({layer for layer, _ in self.sums} - {_ENTERING})
        names = list(dict.fromkeys(name for _, name in self.sums if name))
        return tuple(
            LayerGap(n, gap(*self.sums[n, ""]), {m: gap(*self.sums[n, m]).relative_l2 for m in names if (n, m) in self.sums})
            for n in numbers
        )


def gap(error: float, reference: float, candidate: float, product: float) -> Gap:
    """Of sums of squares. Both all zero: no error; the reference alone: infinite."""
    relative = math.sqrt(error / reference) if reference else (math.inf if error else 0.0)
    norms = math.sqrt(reference * candidate)
    cosine = max(-1.0, min(1.0, product / norms)) if norms else float(reference == candidate)
    if relative in (0, math.inf):
        return Gap(relative, cosine, -math.inf if relative else math.inf)
    return Gap(relative, cosine, -20 * math.log10(relative))


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
