"""Which tokens of a sample are judged: the answer's, where there is one, else all of the text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckptq.calibration import Sample

if TYPE_CHECKING:
    import torch


def judged(sample: Sample, inputs: dict[str, torch.Tensor], tokenize: Any) -> range:
    """Positions of the tokens that count, from 1 on: what comes before each predicts it.

    tokenize  text -> token ids without special ones. The answer's own ids are looked for from the end, where a chat template puts
              them; where its border has merged with a neighbor, the longest end of them that is there counts. The token that ends
              the answer counts, too: a model must know when to stop.
    """
    ids = inputs["input_ids"][0].tolist()
    if sample.prompt is None:
        return range(1, len(ids))
    answer = tokenize(sample.text)
    for cut in range(min(3, len(answer))):
        wanted = answer[cut:]
        for at in range(len(ids) - len(wanted), 0, -1):
            if ids[at : at + len(wanted)] == wanted:
                return range(at, min(at + len(wanted) + 1, len(ids)))
    return range(max(1, len(ids) - len(answer)), len(ids))
