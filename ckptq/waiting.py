"""What a sample that waits between decoder layers holds, and what of it nobody needs any more.

A forward that waits keeps all frames around the decoder alive, and with them what the towers made: pixels, features before and
after they were put among the embeddings, a tower's last hidden states. That can be four times of what the decoder was given.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch


def free_outside(frame: FrameType | None, given: Any, model: torch.nn.Module) -> None:
    """Empties the float tensors that the frames from `frame` outward hold and the decoder, about to be called, was not `given`.

    Its call never returns to those frames: a forward ends after the last layer. What the model's modules hold stays: weights,
    buffers, and what one has left in an attribute for another.
    """
    left = (t for module in model.modules() for t in tensors(vars(module)))
    kept = {t.untyped_storage()._cdata for t in (*left, *tensors(given))}
    for tensor in _held(frame):
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage._cdata not in kept and storage.resizable():
            storage.resize_(0)


def held_bytes(frame: FrameType | None, hidden: torch.Tensor, model: torch.nn.Module) -> int:
    """What the frames from `frame` outward hold before the first layer, and a second hidden state: the first are the embeddings.

    A third, where there are features [n, H] to be added: the decoder keeps what a layer returned beside the sum.
    """
    own, found = _storages(model), [t for t in _held(frame) if t.untyped_storage().nbytes()]
    adds = any(t.is_floating_point() and t.ndim == 2 and t.shape[-1] == hidden.shape[-1] for t in found)
    held = {s._cdata: s.nbytes() for t in found if (s := t.untyped_storage())._cdata not in own}
    return (2 if adds else 1) * hidden.nbytes + sum(held.values())


def _storages(model: torch.nn.Module) -> set[int]:
    return {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}


def _held(frame: FrameType | None) -> Iterator[torch.Tensor]:
    """The tensors that the local variables of a greenlet's frames hold: its outermost frame has none around it."""
    while frame is not None:
        yield from tensors(dict(frame.f_locals))
        frame = frame.f_back


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested lists, tuples and mappings."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        yield from tensors(tuple(value.values()))
