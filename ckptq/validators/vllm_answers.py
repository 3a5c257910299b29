"""The log-probabilities that the real vLLM answered with, as findings: numbers that no served model of any use gives."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ckptq.validators import Code, Finding, error

CODES = {
    "server.not-finite": Code("a log-probability is NaN or infinite where it can't be"),
    "server.no-distribution": Code("probabilities of different tokens sum to more than one"),
    "server.flat": Code("every token is as likely as any other, at every position"),
    "server.constant": Code("one token is the likeliest after every word of a text"),
    "server.worse-than-chance": Code("a plain English text is less likely than tokens drawn at random"),
    "server.blind": Code("two different images give the same log-probabilities"),
}

_FLAT = 0.01
"""Nats: log-probabilities of all likeliest tokens this close to -ln(vocabulary) say that the logits are constant."""
_SAME = 1e-6
"""Nats: a first token's log-probabilities from two images that differ by less come from a tower that sees neither."""
_SUM = 1.001
"""Float32 log-probabilities of 20 tokens sum to no more than this."""
_CHANCE = 0.5
"""Nats a token: an untrained model is worse than chance by less, one that is confident of what is wrong by more."""


def check(generated: Mapping[str, Any]) -> Iterator[Finding]:
    """Findings on what vllm_generate.py returned. Of two that say the same of text or images the first."""
    vocabulary = generated["vocabulary"]
    of_text = [*judge(_values(generated["logprobs"]), vocabulary)] or [*_of_prompt(generated)]
    yield from of_text
    looks = [_values(image["logprobs"]) for image in generated["images"]]
    of_images = (
        [*judge([place for places in looks for place in places], vocabulary, "log-probabilities after an image")] if looks else []
    )
    yield from of_images if not of_text else ()
    if len(looks) == 2 and not of_images and _same(*(image["logprobs"][0] for image in generated["images"])):
        yield error(
            "server.blind", "log-probabilities after an image", "other ones after another image", f"the same within {_SAME:g}",
            "it answers without seeing",
            "the vision tower or its projection is dead: look for zeros, NaN and missing tensors there",
        )  # fmt: skip


def _values(places: Sequence[Mapping[str, float]]) -> list[list[float]]:
    return [[*place.values()] for place in places]


def _same(first: Mapping[str, float], second: Mapping[str, float]) -> bool:
    return first.keys() == second.keys() and all(abs(first[token] - second[token]) < _SAME for token in first)


def judge(logprobs: Sequence[Sequence[float]], vocabulary: int, subject: str = "log-probabilities") -> Iterator[Finding]:
    """Findings on log-probabilities, [position][entry]: of different tokens, the likeliest at each position and the given one."""
    entries = [value for place in logprobs for value in place]
    wrong = sum(math.isnan(value) or value == math.inf for value in entries)
    if wrong or not entries:
        yield error(
            "server.not-finite", subject, "finite numbers", f"{wrong} of {len(entries)} are NaN or infinite",
            "a scale is missing, zero or NaN, or a weight holds NaN", "mend the other findings",
        )  # fmt: skip
        return
    sums = [sum(math.exp(min(value, 1.0)) for value in place) for place in logprobs]
    if max(sums) > _SUM:
        yield error(
            "server.no-distribution", subject, "probabilities that sum to one at most", f"{max(sums):.4f}",
            "its answers are drawn from no distribution", "mend the other findings; without any, the fault lies with this vLLM",
        )  # fmt: skip
        return
    flat = -math.log(vocabulary)
    best = [max(place) for place in logprobs]
    if all(abs(value - flat) < _FLAT for value in best):
        yield error(
            "server.flat", subject, "some tokens likelier than others",
            f"{best[0]:.4f} at every position, which is -ln({vocabulary})",
            "the logits are constant", "lm_head or the last norm is broken, most often an lm_head that the exclude list misses",
        )  # fmt: skip


def _of_prompt(generated: Mapping[str, Any]) -> Iterator[Finding]:
    """A server that answers, but not as a model that has learned a language would."""
    given, likeliest = generated["prompt"], generated["likeliest"]
    if not given:
        return
    mean, chance = sum(given) / len(given), -math.log(generated["vocabulary"])
    mend = "compare values with --source; scales that are the reciprocal, the amax or another layer's do this"
    if mean < chance - _CHANCE:
        yield error(
            "server.worse-than-chance", "log-probabilities of an English sentence", f"above {chance:.1f} a token, which is chance",
            f"{mean:.1f}", "its answers are noise", mend,
        )  # fmt: skip
    elif len(given) > 1 and len({*likeliest}) == 1:
        yield error(
            "server.constant", "log-probabilities of an English sentence", "another likeliest token after another word",
            f"token {likeliest[0]} after each of {len(given)}", "it answers the same whatever it is asked", mend,
        )  # fmt: skip
