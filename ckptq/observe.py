"""Notes the largest magnitude of what passes chosen places of a transformers model, and of its weights, and changes no value.

Inputs are seen by hooks on the linears, those of routed experts as observe_experts.py says. K and V are seen where the attention
module hands them to the attention function, after RoPE and before any repetition of KV heads, which is where ModelOpt 0.47.0 has
its quantizers (torch/quantization/plugins/huggingface.py). All give ModelOpt's amaxes bit for bit (tests/test_parity.py,
tests/test_families.py), without its wrappers around every module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from ckptq.checkpoint import SourceTensor
from ckptq.encode import refuse_odd
from ckptq.errors import DataError, UnsupportedError
from ckptq.observe_experts import watching
from ckptq.plan import Observer, module_of
from ckptq.streamed import StreamedModel


class Seen:
    """What observers have seen since it was last taken. The driver sets `sample` before it lets one run."""

    def __init__(self) -> None:
        self.sample = 0
        self._values: dict[Observer, list[tuple[int, torch.Tensor]]] = {}
        self._tokens: dict[str, torch.Tensor] = {}
        self._weights: list[tuple[SourceTensor, torch.Tensor]] = []

    def note(self, observer: Observer, values: torch.Tensor) -> None:
        """Keeps the largest magnitude of `values` (any shape), on its device: fetching it would make a GPU wait."""
        noted, amax = self._values.setdefault(observer, []), _largest(values)
        if noted and noted[-1][0] == self.sample:  # one expert after another
            amax = torch.maximum(noted.pop()[1], amax)
        noted.append((self.sample, amax))

    def count(self, experts: str, tokens: torch.Tensor) -> None:
        """Adds to the number of tokens that reached each of these experts, int64 [E]."""
        self._tokens[experts] = self._tokens[experts] + tokens if experts in self._tokens else tokens

    def take_tokens(self) -> dict[str, list[int]]:
        """{module around the experts: tokens of each} since the last time."""
        found = {name: tokens.tolist() for name, tokens in self._tokens.items()}
        self._tokens.clear()
        return found

    def note_weight(self, source: SourceTensor, values: torch.Tensor) -> None:
        """The same of a tensor of the checkpoint, in the dtype that is stored."""
        if values.is_floating_point() and values.numel():
            self._weights.append((source, _largest(values).double()))

    def take_weights(self) -> dict[str, float]:
        """{tensor's name: amax} since the last time. Raises DataError naming a tensor with a NaN or an infinity."""
        amaxes = torch.stack([amax for _, amax in self._weights]).tolist() if self._weights else []
        sources = [source for source, _ in self._weights]
        self._weights.clear()
        for source, amax in zip(sources, amaxes, strict=True):
            refuse_odd(source.spec.name, source.file, amax)
        return {source.spec.name: amax for source, amax in zip(sources, amaxes, strict=True)}

    def take(self, names: Sequence[str]) -> dict[Observer, float]:
        """{observer: amax} of activations since the last time. Raises DataError naming the sample that brought NaN or infinity."""
        found: dict[Observer, float] = {}
        for observer, noted in self._values.items():
            values = torch.stack([value for _, value in noted]).tolist()
            for (sample, _), value in zip(noted, values, strict=True):
                if not math.isfinite(value):
                    raise DataError(
                        f"{observer.name}: NaN or infinite activations in layer {observer.layer} with sample {names[sample]}",
                        hint="leave the sample out, or check the checkpoint: the weights themselves are finite",
                    )
            found[observer] = max(values)
        self._values.clear()
        return found


def _largest(values: torch.Tensor) -> torch.Tensor:
    low, high = torch.aminmax(values)
    return torch.maximum(-low, high)


@contextmanager
def observing(streamed: StreamedModel, observers: Sequence[Observer], *, all_experts: bool = False) -> Iterator[Seen]:
    """While in this context, every forward of the model is observed. `all_experts`: every routed expert gets every token, too.

    Raises UnsupportedError where K and V can't be reached.
    """
    seen = Seen()
    inputs = [o for o in observers if o.kind == "input"]
    experts: dict[Any, dict[str, Observer]] = {}
    with ExitStack() as watches:
        for observer in inputs:
            parameter = streamed.parameter(observer.module)
            if parameter == "weight":
                hook = streamed.module(observer.module).register_forward_pre_hook(partial(_note_input, seen, observer))
                watches.callback(hook.remove)
            else:
                experts.setdefault(streamed.module(observer.module), {})[parameter] = observer
        for module, places in experts.items():
            watches.enter_context(_watching_experts(module, places, seen, all_experts))
        watches.enter_context(_watching_attention(streamed, [o for o in observers if o.kind in ("k", "v")], seen))
        yield seen


def _note_input(seen: Seen, observer: Observer, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    seen.note(observer, args[0])


def _watching_experts(module: Any, places: Mapping[str, Observer], seen: Seen, all_experts: bool) -> AbstractContextManager[None]:
    around = module_of(module_of(next(iter(places.values())).module))
    names = {parameter: observer.module for parameter, observer in places.items()}
    return watching(
        module,
        names,
        lambda parameter, values: seen.note(places[parameter], values),
        lambda tokens: seen.count(around, tokens),
        all_experts=all_experts,
    )


@contextmanager
def _watching_attention(streamed: StreamedModel, observers: Sequence[Observer], seen: Seen) -> Iterator[None]:
    """Stands in for the attention function, in the registry where transformers 5.17 attention modules look it up."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    places: dict[tuple[Any, str], Observer] = {(streamed.around(o.module), o.kind): o for o in observers}
    names: set[str] = {module.config._attn_implementation for module, _ in places}
    if missing := sorted(name for name in names if name not in ALL_ATTENTION_FUNCTIONS):
        raise UnsupportedError(f"K and V can't be observed under the attention implementation {missing[0]!r}")

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            for kind, values in (("k", key), ("v", value)):
                if observer := places.get((module, kind)):
                    seen.note(observer, values)
            return function(module, query, key, value, *args, **kwargs)

        return attention

    for name in names:  # an entry of the registry's own, over the library's, which comes back when it is deleted
        ALL_ATTENTION_FUNCTIONS[name] = watched(ALL_ATTENTION_FUNCTIONS[name])
    try:
        yield
    finally:
        for name in names:
            del ALL_ATTENTION_FUNCTIONS[name]
