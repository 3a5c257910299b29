"""Weights that are on disk while a model lies on `meta`: its blocks are read one at a time, the rest while it is needed.

A block is what the model runs as a whole: a decoder layer, a transformer block of a denoiser. One that computes and one that is
read meanwhile are in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from ckptq.checkpoint import Reader, SourceTensor, TensorSpec
from ckptq.placement import Filling
from ckptq.plan import module_of
from ckptq.tensors import blank, raw, typed

ALIGNMENT = 64
STAGED = 1 << 26
"""Bytes on their way to a GPU at a time. Pinning memory takes time; two layers of a 72B would take 3.6 GB of it."""


Look = Callable[[SourceTensor, torch.Tensor], None]
"""What is shown each stored tensor of a model as it is read."""


def unseen(source: SourceTensor, values: torch.Tensor) -> None:
    """Looks at nothing."""


class Blocks:
    """The weights of a model on `meta`: which tensors fill what, and the buffers they are read into.

    `device` is where blocks compute. `ahead`: blocks that are read while one computes, 1 or 0. A subclass fills `_layer_sources`,
    for each block {parameter: what fills it}, `_resident_sources`, the same of all else, `_dtypes`, {parameter: dtype in memory},
    and, where modules share parameters, `_tied`, {parameter: its other names}.
    """

    def __init__(self, model: Any, reader: Reader, device: torch.device, ahead: int = 1) -> None:
        self.model = model
        self.device = device
        self.ahead = ahead
        self._reader = reader
        self._layer_sources: list[dict[str, Filling]] = []
        self._resident_sources: dict[str, Filling] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._tied: dict[str, list[str]] = {}
        self._slots: list[torch.Tensor] = []
        self._staging: torch.Tensor | None = None
        self._stream: torch.cuda.Stream | None = None

    @property
    def layer_bytes(self) -> int:
        """Of the largest block, as it lies in its buffer."""
        return max((sum(_slot(f.spec) for f in fillings.values()) for fillings in self._layer_sources), default=0)

    @property
    def resident_bytes(self) -> int:
        """Of all but the blocks."""
        return sum(filling.spec.nbytes for filling in self._resident_sources.values())

    def fill_buffers(self) -> None:
        """Computes what no file holds, once the rest is there."""

    def load_resident(self, look: Look = unseen, within: str = "") -> None:
        """Gives real weights to everything but the blocks, or of that to what lies `within` a module; computes what no file holds.

        `look` is shown each tensor as it is stored.
        """
        for name, filling in self._resident_sources.items():
            if not name.startswith(within):
                continue
            buffer = torch.empty(_slot(filling.spec), dtype=torch.uint8, device=self.device)
            self._read(filling, buffer)
            self._set(name, _stored(filling, buffer, look).to(self._dtypes[name]))
        self.fill_buffers()

    def drop_resident(self) -> None:
        """Frees them again; samples that wait at a block no longer need them."""
        for name, filling in self._resident_sources.items():
            self._set(name, blank(filling.spec, self._dtypes[name]))

    def in_turn(self, first: int = 0, look: Look = unseen) -> Iterator[int]:
        """Block after block from `first` on with its weights in place, the next one being read meanwhile if there is room."""
        last = len(self._layer_sources) - 1
        with ThreadPoolExecutor(1) as pool:
            coming: list[Future[torch.Tensor]] = []
            for index in range(first, last + 1):
                while len(coming) <= min(self.ahead, last - index):
                    coming.append(pool.submit(self.read_layer, index + len(coming)))
                with self.use_layer(index, coming[0].result(), look):
                    yield index
                del coming[0]

    def read_layer(self, index: int) -> torch.Tensor:
        """A layer's weights as bytes on `device`, in buffers that are used in turn: one, and one for each layer that is read ahead.

        Runs in a thread of its own while the layer before computes, where there is a buffer for that.
        """
        with self._aside():
            if not self._slots:
                self._slots = [torch.empty(self.layer_bytes, dtype=torch.uint8, device=self.device) for _ in range(1 + self.ahead)]
            slot, at = self._slots[index % len(self._slots)], 0
            for filling in self._layer_sources[index].values():
                self._read(filling, slot[at:])
                at += _slot(filling.spec)
        return slot

    @contextlib.contextmanager
    def use_layer(self, index: int, slot: torch.Tensor, look: Look = unseen) -> Iterator[None]:
        """The layer has its weights, from what `read_layer` returned, until the block ends. `look`: see load_resident."""
        fillings, at = self._layer_sources[index], 0
        for name, filling in fillings.items():
            # As transformers and vLLM load it: what is stored wider than the model computes, a norm in F32 say, is cast.
            self._set(name, _stored(filling, slot[at:], look).to(self._dtypes[name]))
            at += _slot(filling.spec)
        try:
            yield
        finally:
            for name, filling in fillings.items():
                self._set(name, blank(filling.spec, self._dtypes[name]))
            if self.device.type == "cuda":  # the buffer is filled again while the next layer computes
                torch.cuda.current_stream(self.device).synchronize()

    def release(self) -> None:
        """Frees the layer buffers."""
        self._slots.clear()

    def _set(self, name: str, tensor: torch.Tensor) -> None:
        """Puts a tensor in the place of a parameter or buffer, and of those that are tied to it."""
        for each in (name, *self._tied.get(name, ())):
            owner, leaf = self.model.get_submodule(module_of(each)), each.rpartition(".")[2]
            if leaf in owner._parameters:
                owner._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)
            else:
                owner._buffers[leaf] = tensor

    def _read(self, filling: Filling, target: torch.Tensor) -> None:
        """Reads the bytes of a parameter's tensors into memory of the device, one behind another."""
        at = 0
        for source in filling.sources:
            self._read_one(source, target[at:])
            at += source.spec.nbytes

    def _read_one(self, source: SourceTensor, target: torch.Tensor) -> None:
        """A GPU's piece by piece, through a pinned buffer."""
        nbytes = source.spec.nbytes
        if self.device.type != "cuda":
            self._reader.read_into(source, 0, raw(target)[:nbytes])
            return
        if self._staging is None:
            self._staging = torch.empty(STAGED, dtype=torch.uint8, pin_memory=True)
        for at in range(0, nbytes, STAGED):
            piece = self._staging[: min(STAGED, nbytes - at)]
            self._reader.read_into(source, at, raw(piece))
            target[at : at + len(piece)].copy_(piece, non_blocking=True)
            torch.cuda.current_stream(self.device).synchronize()

    def _aside(self) -> contextlib.AbstractContextManager[object]:
        """On a GPU a stream of its own, so that nothing here waits for a layer that computes, or takes memory it still reads."""
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(self._stream)


def _stored(filling: Filling, buffer: torch.Tensor, look: Look) -> torch.Tensor:
    """What `_read` put into a byte buffer, in the stored dtype. `look` is shown each tensor of it."""
    at = 0
    for source in filling.sources:
        look(source, typed(buffer[at:], source.spec))
        at += source.spec.nbytes
    return typed(buffer, filling.spec)


def _slot(spec: TensorSpec) -> int:
    return -(-spec.nbytes // ALIGNMENT) * ALIGNMENT
