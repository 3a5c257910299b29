"""Which tokens of a sample are judged: the answer's, where there is one, else all of the text."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ckptq.calibration import Sample
from ckptq.errors import CalibrationError

if TYPE_CHECKING:
    import torch

    from ckptq.calibration.encode import Encoder


def judged(sample: Sample, inputs: dict[str, torch.Tensor], encoder: Encoder) -> range:
    """Positions of the tokens that count, from 1 on: what comes before each predicts it.

    Of a conversation they are the answer's, as the chat template sets it, and the token that ends it: a model must know when to
    stop. A token that the answer shares with what comes before it counts as the answer's.

    inputs  what the sample was encoded to, which may be cut at its end

    Raises CalibrationError where nothing is left to judge.
    """
    ids: list[int] = inputs["input_ids"][0].tolist()
    if sample.prompt is None:
        if len(ids) < 2:
            raise CalibrationError(f"{sample.name}: too short to judge: it has one token")
        return range(1, len(ids))
    ending, count = _ending(sample, encoder) or _alone(sample, ids, encoder)
    kept = next((n for n in range(min(len(ending), len(ids) - 1), 0, -1) if ids[-n:] == ending[:n]), 0)
    if not kept:
        raise CalibrationError(
            f"{sample.name}: its answer begins after the {len(ids)} tokens that are kept of it, so there is nothing to judge",
            hint="a larger sequence_length keeps more",
        )
    return range(len(ids) - kept, len(ids) - kept + min(kept, count + 1))


def _ending(sample: Sample, encoder: Encoder) -> tuple[list[int], int] | None:
    """(ids of the rendered conversation from its answer's first token on, how many of them are the answer's).

    Where the answer lies is seen by another one in its place: templates trim it, and set something before it. None where the
    tokenizer does not say what text a token covers.
    """
    odd = next((char for char in map(chr, range(0x2600, 0x2700)) if char not in sample.text), "")
    whole, other = (encoder.rendered(replace(sample, text=text)) for text in (sample.text, odd))
    if whole == other:
        raise CalibrationError(f"{sample.name}: the checkpoint's chat template leaves the answer out, so there is nothing to judge")
    if (tokens := encoder.places(whole)) is None:
        return None
    start = _shared(whole, other)
    end = len(whole) - _shared(whole[start:][::-1], other[start:][::-1])
    ids, places = tokens
    first = next((at for at, (_, stop) in enumerate(places) if stop > start), len(ids))
    return ids[first:], sum(begin < end for begin, _ in places[first:])


def _shared(one: str, other: str) -> int:
    """With how many characters both begin."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _alone(sample: Sample, ids: list[int], encoder: Encoder) -> tuple[list[int], int]:
    """The same of the answer's own ids, looked for from the end; where its border has merged, the longest end that is there."""
    answer = encoder.tokens(sample.text.strip())
    for cut in range(min(3, len(answer))):
        wanted = answer[cut:]
        for at in range(len(ids) - len(wanted), 0, -1):
            if ids[at : at + len(wanted)] == wanted:
                return ids[at:], len(wanted)
    return answer, len(answer)
