"""What two models take of the memory that pass their layers side by side, and what that leaves for samples that wait."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ckptq import cost

if TYPE_CHECKING:
    import torch

    from ckptq.compare.sides import Side

ROWS, TOKENS = 4096, 512
"""Of the vocabulary, and positions, whose logits are in memory at a time."""


def waiting_room(sides: Sequence[Side], samples: int, length: int, limit: int | None, device: torch.device) -> int:
    """Bytes that waiting samples of both may hold, so that all stays under `limit`, or under 80 % of what is free.

    Where that leaves too little for one sample of `length` tokens, no layer is read ahead of the one that computes.

    Raises RecipeError for a limit under which one sample does not fit.
    """
    import torch

    needs = _needs(sides, samples, length)
    if device.type == "cpu":
        free, imports = cost.available_memory(), cost.IMPORTS
    else:
        free, imports = torch.cuda.mem_get_info(device)[0], 0
    needs = cost.fitting(needs, limit, free, imports)
    for side in sides:
        side.model.ahead = needs.ahead
    return cost.waiting_budget(needs, limit, free, imports)


def _needs(sides: Sequence[Side], samples: int, length: int) -> cost.Cost:
    """Both have a layer at a time, only one its embeddings and towers. The heads' pieces come when the layers are gone."""
    flows = [cost.flowing(side.component, side.scope, length) for side in sides]
    hidden = int(sides[0].scope.text(sides[0].component.config)["hidden_size"])
    heads = ROWS * (2 * len(sides) * hidden + 8 * TOKENS)  # of both logits in BF16, of the reference their exponentials in F32
    return cost.Cost(
        resident=max(heads, *(side.model.resident_bytes for side in sides)),
        layer=sum(side.model.layer_bytes for side in sides),
        sample=sum(sample for sample, _ in flows),
        passing=sum(passing for _, passing in flows),  # what the reference's modules gave is kept while the candidate computes
        samples=samples,
        tokens=samples * length,
        flops=0,
    )
