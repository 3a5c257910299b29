"""Samples in lock-step: all pass decoder layer after decoder layer, and only one layer has weights at a time.

Each sample runs the model's own forward in a greenlet of its own. A hook before every decoder layer switches back to the
driver, who gives the layer its weights, lets every sample run through it and goes on. What happens between layers happens as in any
forward, so nothing is traced and nothing depends on the architecture.

One sample a forward: padding would change what flows, and so the result depends on neither batching nor order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch
from greenlet import getcurrent, greenlet

from ckptq.blocks import Look, unseen
from ckptq.console import Console
from ckptq.streamed import StreamedModel
from ckptq.waiting import free_outside, held_bytes

Inputs = dict[str, torch.Tensor]


class Wave:
    """The samples that pass the layers together; used as a context.

    `enter` starts them, `layers` gives layer after layer its weights, and in between `step` lets every sample run through one.
    """

    def __init__(self, streamed: StreamedModel, encode: Callable[[int], Inputs], *, look: Look = unseen) -> None:
        """`encode`: a sample's number -> its forward inputs, unpadded, batch dimension 1. `look`: see Blocks.load_resident."""
        self._streamed = streamed
        self._encode = encode
        self._look = look
        self._driver = getcurrent()
        self._samples: list[greenlet] = []
        self._hidden: dict[greenlet, torch.Tensor] = {}
        self._restored: dict[greenlet, torch.Tensor] = {}
        self._hooks: list[Any] = []
        self._bypassing = ExitStack()
        self.waiting_bytes = 0
        self._largest_sample = 0

    def __enter__(self) -> Wave:
        layers = self._streamed.layers
        self._hooks = [layer.register_forward_pre_hook(self._park, with_kwargs=True) for layer in layers]
        self._hooks.append(layers[-1].register_forward_hook(self._end))
        self._hooks.append(self._streamed.decoder.register_forward_pre_hook(self._called, with_kwargs=True))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bypassing.close()
        self._streamed.release()  # the next wave needs room for embeddings and towers first
        for sample in filter(None, self._samples):  # a greenlet is true while it lives
            sample.throw()
        for hook in self._hooks:
            hook.remove()

    @property
    def depth(self) -> int:
        """How many decoder layers there are."""
        return len(self._streamed.layers)

    def __len__(self) -> int:
        """How many samples have entered."""
        return len(self._samples)

    def enter(
        self,
        numbers: Sequence[int],
        memory: int,
        console: Console,
        *,
        passed: int = 0,
        hidden: Sequence[torch.Tensor] = (),
        watch: Callable[[], None] = lambda: None,
    ) -> None:
        """Starts samples up to the first decoder layer: embeddings and vision tower run here, once per sample.

        memory  bytes that waiting samples may hold: of the samples as many enter as fit, at least one
        passed  layers that an earlier run had finished: they are passed without weights, then `hidden` is put back, what each of
                its samples had, and as many enter
        watch   is called with every sample
        """
        self._bypassing.enter_context(_bypassed(self._streamed.layers[:passed]))
        self._streamed.load_resident(self._look)
        with console.stage("enter", len(hidden) or len(numbers), "samples") as advance:
            for number in numbers:
                watch()
                # A copy, because memory borrowed from numpy can't be given back by `_free_pixels`.
                inputs = {name: tensor.to(self._streamed.device, copy=True) for name, tensor in self._encode(number).items()}
                sample = greenlet(lambda inputs=inputs: self._streamed.model(**inputs, use_cache=False))
                self._samples.append(sample)
                sample.switch()
                _free_pixels(inputs)
                advance(1)
                if len(self._samples) == len(hidden) or (not hidden and self.waiting_bytes + self._largest_sample > memory):
                    break
        self._streamed.drop_resident()
        for _ in range(passed):
            self.step()
        if hidden:
            back = (tensor.to(self._streamed.device) for tensor in hidden)
            self._restored = dict(zip(self._samples, back, strict=True))
            self._hidden = dict(self._restored)

    def layers(self, first: int = 0) -> Iterator[int]:
        """Layer after layer from `first` on with its weights in place, the next one being read meanwhile if there is room."""
        return self._streamed.in_turn(first, self._look)

    def step(self, turn: Callable[[int], None] = lambda number: None) -> None:
        """Lets every sample run through the layer that it waits for. `turn` is told each one's place before it goes on."""
        for place in range(len(self._samples)):
            turn(place)
            self.step_one(place)

    def step_one(self, place: int) -> None:
        """Lets one sample run through it."""
        self._samples[place].switch()

    def hidden(self) -> list[torch.Tensor]:
        """What each sample has for the next layer, or has got of the last one: [1, T, H]."""
        return [self._hidden[sample] for sample in self._samples]

    def hidden_of(self, place: int) -> torch.Tensor:
        """The same of one."""
        return self._hidden[self._samples[place]]

    def _called(self, decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The decoder has all that it will get: what its layers read later, Qwen3-VL's deepstack too, is among its arguments."""
        free_outside(sys._getframe(1), (args, kwargs), self._streamed.model)

    def _park(self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before every decoder layer: wait for the driver. Returns new arguments only where a saved state is put back."""
        sample = getcurrent()
        hidden = args[0] if args else kwargs["hidden_states"]
        if sample not in self._hidden:
            held = held_bytes(sys._getframe(1), hidden, self._streamed.model)
            self.waiting_bytes += held
            self._largest_sample = max(self._largest_sample, held)
        self._hidden[sample] = hidden
        del hidden
        self._driver.switch()
        restored = self._restored.pop(sample, None)
        if restored is None:
            return None
        if args:
            return (restored, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": restored}

    def _end(self, layer: torch.nn.Module, args: Any, output: Any) -> None:
        """After the last decoder layer the forward ends: whoever needs what comes behind it takes it from there."""
        self._hidden[getcurrent()] = output[0] if isinstance(output, tuple) else output
        self._driver.switch()


@contextmanager
def _bypassed(layers: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Layers called in this context return their input. Decoder layers of transformers 5 return the hidden state alone.

    torch looks a module's forward up before it runs the hooks in which samples park, so this must begin before they enter.
    """
    for layer in layers:
        layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _free_pixels(inputs: Mapping[str, torch.Tensor]) -> None:
    """Empties the storage of float inputs: the outer frames keep the tensors, but no decoder layer reads pixels."""
    for tensor in inputs.values():
        if tensor.is_floating_point():
            tensor.untyped_storage().resize_(0)
