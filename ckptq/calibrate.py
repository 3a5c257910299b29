"""Lock-step calibration: all samples pass decoder layer after decoder layer, and only one layer has weights at a time.

Each sample runs the model's own forward in a greenlet of its own. A hook before every decoder layer switches back to the
driver here, which gives the layer its weights, lets every sample run through it, takes the layer's amaxes, frees it and goes
on. What happens between layers happens as in any forward, so nothing is traced and nothing depends on the architecture.

One sample a forward: padding would change the amaxes, and so the result depends on neither batching nor order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from greenlet import getcurrent, greenlet

from ckptq.console import Console
from ckptq.errors import DataError
from ckptq.journal import Progress, ProgressFile
from ckptq.observe import Seen, observing
from ckptq.plan import Observer
from ckptq.streamed import StreamedModel
from ckptq.waiting import free_outside, held_bytes

Inputs = dict[str, torch.Tensor]


def calibrate(
    streamed: StreamedModel,
    observers: Sequence[Observer],
    names: Sequence[str],
    encode: Callable[[int], Inputs],
    memory: int,
    saved: ProgressFile,
    console: Console,
    watch: Callable[[], None] = lambda: None,
    *,
    all_experts: bool = False,
    tokens: MutableMapping[str, list[int]] | None = None,
) -> dict[Observer, float]:
    """The amax of every input, K and V observer over all samples, and of every weight that a decoder layer has.

    names    what each sample is called, for messages
    encode   sample number -> forward inputs of one unpadded sample, batch dimension 1
    memory   bytes that waiting samples may hold; more samples than fit are taken in waves, whose maxima are merged
    saved    where progress is kept, so that a killed run goes on from the layer it had saved
    watch    is called with every sample that enters and before every layer, and ends the calibration by what it raises
    all_experts  whether routed experts see every token, not those alone that the router sends them
    tokens   gains how many the router sent each expert, by the name of the module around them

    Raises DataError for NaN or infinite weights and activations, and for an observer that no sample reached.
    """
    state = saved.load() or Progress()
    amax, counts = dict(state.amax), tokens if tokens is not None else {}
    counts.update(state.tokens)
    by_name = {o.name: o for o in observers}
    with torch.inference_mode(), observing(streamed, observers, all_experts=all_experts) as seen:
        while state.first < len(names):
            count = _Wave(streamed, state, names, encode, memory, seen, watch).run(observers, amax, counts, saved, console)
            state = Progress(first=state.first + count, amax=dict(amax), tokens=dict(counts))
            saved.save(state)
    if unreached := [o.name for o in observers if o.kind != "weight" and o.name not in amax]:
        raise DataError(
            f"{unreached[0]}: no calibration sample reached {by_name[unreached[0]].module} ({len(unreached)} such observers)",
            hint="add samples that use it, or keep the module in the recipe",
        )
    return {by_name[name]: value for name, value in amax.items()}


class _Wave:
    """The samples that pass the layers together, from `state.first` on: as many as `memory` holds, at least one."""

    def __init__(
        self,
        streamed: StreamedModel,
        state: Progress,
        names: Sequence[str],
        encode: Callable[[int], Inputs],
        memory: int,
        seen: Seen,
        watch: Callable[[], None],
    ) -> None:
        self._streamed = streamed
        self._state = state
        self._names = names
        self._encode = encode
        self._memory = memory
        self._seen = seen
        self._watch = watch
        self._driver = getcurrent()
        self._samples: list[greenlet] = []
        self._hidden: dict[greenlet, torch.Tensor] = {}
        self._restored: dict[greenlet, torch.Tensor] = {}
        self._waiting_bytes = 0
        self._largest_sample = 0

    def run(
        self,
        observers: Sequence[Observer],
        amax: dict[str, float],
        tokens: MutableMapping[str, list[int]],
        saved: ProgressFile,
        console: Console,
    ) -> int:
        """Runs the wave to the last layer, raising `amax` and `tokens` in place; the number of samples it took."""
        layers, seen = self._streamed.layers, self._seen
        weights = {f"{o.module}.weight": o.name for o in observers if o.kind == "weight"}
        hooks = [layer.register_forward_pre_hook(self._park, with_kwargs=True) for layer in layers]
        hooks.append(layers[-1].register_forward_hook(self._end))
        hooks.append(self._streamed.decoder.register_forward_pre_hook(self._called, with_kwargs=True))
        try:
            finished = layers[: self._state.layer]
            with _bypassed(finished):
                self._enter(console)
                self._skip(finished)
            with console.stage("calibrate", len(layers) - self._state.layer, "layers") as advance:
                for index in self._each_layer():
                    self._watch()
                    amax |= {weights[name]: value for name, value in seen.take_weights().items() if name in weights}
                    for number, sample in enumerate(self._samples):
                        seen.sample = self._state.first + number
                        sample.switch()
                    for observer, value in seen.take(self._names).items():
                        amax[observer.name] = max(amax.get(observer.name, 0.0), value)
                    for experts, found in seen.take_tokens().items():
                        tokens[experts] = [a + b for a, b in zip(tokens.get(experts, [0] * len(found)), found, strict=True)]
                    if index + 1 < len(layers) and saved.due():
                        hidden = [self._hidden[sample] for sample in self._samples]
                        saved.save(Progress(self._state.first, index + 1, dict(amax), hidden, dict(tokens)))
                    advance(1)
            return len(self._samples)
        finally:
            self._streamed.release()  # the next wave needs room for embeddings and towers first
            for sample in filter(None, self._samples):  # a greenlet is true while it lives
                sample.throw()
            for hook in hooks:
                hook.remove()

    def _enter(self, console: Console) -> None:
        """Starts samples up to the first decoder layer: embeddings and vision tower run here, once per sample."""
        first, known = self._state.first, len(self._state.hidden)
        self._streamed.load_resident(self._seen.note_weight)
        self._seen.take_weights()
        with console.stage("enter", known or len(self._names) - first, "samples") as advance:
            for number in range(first, len(self._names)):
                self._watch()
                # A copy, because memory borrowed from numpy can't be given back by `_free_pixels`.
                inputs = {name: tensor.to(self._streamed.device, copy=True) for name, tensor in self._encode(number).items()}
                sample = greenlet(lambda inputs=inputs: self._streamed.model(**inputs, use_cache=False))
                self._samples.append(sample)
                sample.switch()
                _free_pixels(inputs)
                advance(1)
                if len(self._samples) == known or (not known and not self._room_for_another()):
                    break
        if (waiting := len(self._names) - first - len(self._samples)) and not first:
            console.note(f"calibration goes in waves: {len(self._samples)} samples fit the memory, {waiting} wait for their turn")
        self._streamed.drop_resident()

    def _room_for_another(self) -> bool:
        """Whether `memory` holds one more sample like the largest so far."""
        return self._waiting_bytes + self._largest_sample <= self._memory

    def _skip(self, finished: Sequence[torch.nn.Module]) -> None:
        """Passes the layers that a killed run had finished, without weights, then puts back the hidden states it had saved."""
        for _ in finished:
            for sample in self._samples:
                sample.switch()
        if self._state.hidden:
            hidden = (tensor.to(self._streamed.device) for tensor in self._state.hidden)
            self._restored = dict(zip(self._samples, hidden, strict=True))
            self._hidden = dict(self._restored)

    def _each_layer(self) -> Iterator[int]:
        """Layer after layer with its weights in place, the next one being read meanwhile if there is room for it."""
        streamed, last = self._streamed, len(self._streamed.layers) - 1
        with ThreadPoolExecutor(1) as pool:
            coming: list[Future[torch.Tensor]] = []
            for index in range(self._state.layer, last + 1):
                while len(coming) <= min(streamed.ahead, last - index):
                    coming.append(pool.submit(streamed.read_layer, index + len(coming)))
                slot = coming[0].result()
                with streamed.use_layer(index, slot, self._seen.note_weight):
                    yield index
                del coming[0]

    def _called(self, decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The decoder has all that it will get: what its layers read later, Qwen3-VL's deepstack too, is among its arguments."""
        free_outside(sys._getframe(1), (args, kwargs), self._streamed.model)

    def _park(self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before every decoder layer: wait for the driver. Returns new arguments only where a saved state is put back."""
        sample = getcurrent()
        hidden = args[0] if args else kwargs["hidden_states"]
        if sample not in self._hidden:
            held = held_bytes(sys._getframe(1), hidden, self._streamed.model)
            self._waiting_bytes += held
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
        """After the last decoder layer: nothing is left to measure, so the norm, the head and the logits never run."""
        self._hidden.pop(getcurrent(), None)
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


def _free_pixels(inputs: Inputs) -> None:
    """Empties the storage of float inputs: the outer frames keep the tensors, but no decoder layer reads pixels."""
    for tensor in inputs.values():
        if tensor.is_floating_point():
            tensor.untyped_storage().resize_(0)
