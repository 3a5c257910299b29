"""Runs all prompts of a pipeline together, so that each of its models is read once for what all of them want of it next.

Each prompt is the pipeline's own `__call__` in a greenlet. A model's forward does not run there: the call is noted, and a denoiser
answers at once with a `Later`. Only when the pipeline computes with that, after the other guidance branch has been called too,
does the prompt wait. Once all wait, the calls that were noted run, each in a greenlet of its own that stops before every block: one
block is read, all calls pass it, the next is read. So prompts and guidance branches share a step, and no pipeline is rewritten.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from greenlet import getcurrent, greenlet

from ckptq.blocks import Look, unseen
from ckptq.denoise_models import PipelineModel
from ckptq.waiting import held_bytes, tensors


class Call:
    """One call of a model by one prompt. `keeps`: how many hidden states it holds when it ends, one after each block at most."""

    def __init__(self, model: PipelineModel, forward: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.model = model
        self.prompt = getcurrent()
        self.done = False
        self.result: Any = None
        self.keeps = len(model.blocks) if kwargs.get("output_hidden_states") else 1
        self._forward = forward
        self._given = (args, kwargs)
        self._versions = [t._version for t in tensors(self._given)]

    def run(self) -> None:
        """In a greenlet of its own, as late as it likes: what it was given must still be what it was."""
        if self._versions != [t._version for t in tensors(self._given)]:
            raise RuntimeError(f"the pipeline changes what it has given to {self.model.folder} before it reads the answer")
        args, kwargs = self._given
        self.result, self.done = self._forward(*args, **kwargs), True
        self._given = ((), {})


class Later:
    """What a call will return. It can be indexed and made float32 without waiting; whatever else is done with it waits."""

    def __init__(self, find: Callable[[], Any]) -> None:
        self._find = find
        self._found: list[Any] = []

    def _now(self) -> Any:
        if not self._found:
            self._found.append(self._find())
        return self._found[0]

    def __getitem__(self, key: Any) -> Any:
        return Later(lambda: self._now()[key])

    def float(self) -> Any:
        return Later(lambda: self._now().float())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._now(), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*real(args), **real(kwargs or {}))


def _operator(name: str) -> Callable[..., Any]:
    def operate(self: Later, *args: Any) -> Any:
        found = getattr(self._now(), name)
        return found(*real(args))

    return operate


for _name in (
    "add",
    "radd",
    "sub",
    "rsub",
    "mul",
    "rmul",
    "truediv",
    "rtruediv",
    "pow",
    "neg",
    "abs",
    "matmul",
    "len",
    "iter",
    "bool",
):
    setattr(Later, f"__{_name}__", _operator(f"__{_name}__"))


def real(value: Any) -> Any:
    """The value with every `Later` in nested lists, tuples and dicts replaced by what it stands for."""
    if isinstance(value, Later):
        return value._now()
    if type(value) in (list, tuple):
        return type(value)(real(item) for item in value)
    return {key: real(item) for key, item in value.items()} if type(value) is dict else value


class Events(Protocol):
    """What a run tells of its progress: see the methods of ckptq/denoise.py."""

    def turn(self, number: int) -> None: ...

    def begin(self, model: PipelineModel) -> Look: ...

    def block(self, model: PipelineModel) -> None: ...

    def end(self, model: PipelineModel, reads: int) -> None: ...


class Run:
    """The prompts, and the calls of models that wait to run.

    lazy    models whose calls are answered with a `Later`
    budget  bytes that prompts and calls may hold while they wait; more calls than fit run in waves
    """

    def __init__(self, lazy: Sequence[PipelineModel], budget: int, events: Events) -> None:
        self._lazy = lazy
        self._budget = budget
        self._events = events
        self._driver = getcurrent()
        self._queue: list[Call] = []
        self._prompts: list[greenlet] = []
        self._branches: dict[greenlet, Call] = {}
        self._at: dict[greenlet, int] = {}
        self._held = self._largest = 0

    def run(self, prompts: Sequence[Callable[[], Any]]) -> None:
        """Starts every prompt and runs all to their end."""
        self._prompts = [greenlet(prompt) for prompt in prompts]
        try:
            self._resume()
            while self._queue:
                model = self._queue[0].model
                calls = [call for call in self._queue if call.model is model]
                self._queue = [call for call in self._queue if call.model is not model]
                self._pass(model, calls)
                self._resume()
        finally:
            for each in [*self._branches, *self._prompts]:
                if each:  # a greenlet is true while it lives
                    each.throw()

    def _resume(self) -> None:
        """Lets every prompt go on until it waits or ends."""
        for number, prompt in enumerate(self._prompts):
            if not prompt.dead:
                self._events.turn(number)
                prompt.switch()

    @contextmanager
    def watching(self, model: PipelineModel) -> Iterator[None]:
        """In this context calls of the model are noted, and its blocks wait to be read."""
        forward = model.model.forward
        with ExitStack() as undo:
            model.model.forward = partial(self._called, model, forward)
            undo.callback(delattr, model.model, "forward")
            for index, block in enumerate(model.blocks):
                undo.callback(block.register_forward_pre_hook(partial(self._park, model, index), with_kwargs=True).remove)
            yield

    def _called(self, model: PipelineModel, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of the model's forward, in the prompt's greenlet."""
        call = Call(model, forward, real(args), real(kwargs))
        self._queue.append(call)
        if model in self._lazy and kwargs.get("return_dict") is False and all(map(_plain, (*args, *kwargs.values()))):
            return Later(lambda: self._wait(call))
        return self._wait(call)

    def _wait(self, call: Call) -> Any:
        while not call.done:
            self._driver.switch()
        result, call.result = call.result, None
        return result

    def _pass(self, model: PipelineModel, calls: list[Call]) -> None:
        """Runs calls of a model: it is read once, or as often as memory for what waits between blocks demands."""
        look, reads = self._events.begin(model), 0
        numbers = {prompt: number for number, prompt in enumerate(self._prompts)}
        outside = sum(held_bytes(p.gr_frame, torch.empty(0), model.model) for p in self._prompts if not p.dead)
        while calls or self._branches:
            self._held = self._largest = 0
            while calls and (not self._branches or outside + self._held + self._largest <= self._budget):
                call = calls.pop(0)
                branch = greenlet(call.run)
                self._branches[branch] = call
                self._go_on(branch, numbers)
            for index in model.in_turn(0, look):
                for branch in [b for b in self._branches if self._at[b] == index]:
                    self._go_on(branch, numbers)
                self._events.block(model)
            look, reads = unseen, reads + 1
        model.release()
        self._events.end(model, reads)

    def _go_on(self, branch: greenlet, numbers: Mapping[greenlet, int]) -> None:
        self._events.turn(numbers[self._branches[branch].prompt])
        branch.switch()
        if branch.dead:
            self._at.pop(branch, None)
            del self._branches[branch]

    def _park(self, model: PipelineModel, index: int, block: torch.nn.Module, args: Any, kwargs: Any) -> None:
        """Before every block: wait for the driver. Returns None: torch would take anything else for new arguments."""
        branch = getcurrent()
        if branch not in self._at:
            given = next(tensors((args, kwargs)))
            held = held_bytes(sys._getframe(1), given, model.model) + (self._branches[branch].keeps - 1) * given.nbytes
            self._held += held
            self._largest = max(self._largest, held)
            del given
        self._at[branch] = index
        del args, kwargs
        self._driver.switch()


def _plain(value: Any) -> bool:
    """Whether nothing but an in-place operation on a tensor can change the value; those are found out.

    GLM-Image's cache of keys and values is none, unless it is not used (pipelines/glm_image/pipeline_glm_image.py: no mode is set).
    """
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(map(_plain, value.values()))
    if type(value).__name__ == "GlmImageKVCache":
        return all(cache.mode is None for cache in value.caches)
    return value is None or isinstance(value, (torch.Tensor, Later, int, float, str, torch.dtype, torch.device))
