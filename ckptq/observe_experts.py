"""Notes what reaches the routed experts of a transformers model, which holds those of a layer as one module.

transformers 5.17 models/*/modeling_*.py, classes *Experts: `forward(hidden_states, top_k_index, top_k_weights)` multiplies, expert
by expert, with slices of `gate_up_proj` and `down_proj` by torch.nn.functional.linear. What the second one reads is no module's
input, so these calls are watched. ModelOpt 0.47.0 does so too, and has one amax for each parameter of a layer, whatever the expert
(torch/quantization/plugins/huggingface.py _QuantFusedExperts).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ckptq.errors import UnsupportedError

Note = Callable[[str, torch.Tensor], torch.Tensor | None]
"""Takes a parameter's name in the module, and a value that is multiplied with a slice of it; what it returns stands in for that."""


@contextmanager
def watching(
    module: Any, parameters: Mapping[str, str], note: Note, count: Callable[[torch.Tensor], None], *, all_experts: bool
) -> Iterator[None]:
    """While in this context, `note` is told of what is multiplied with the module's parameters.

    parameters   parameter -> the module of the checkpoint that it is observed for, for messages
    count        is told how many tokens each expert has got of a forward, int64 [E]
    all_experts  runs every token through every expert as well, and drops what comes out

    Raises UnsupportedError, from within a forward, where the module multiplies in another way.
    """
    forward = module.forward

    def watched(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Any:
        experts = getattr(module, next(iter(parameters))).shape[0]
        count(torch.bincount(top_k_index.flatten(), minlength=experts))
        with _Linears({name: getattr(module, name) for name in parameters}, note) as seen:
            if all_experts:  # one at a time: for many the module would make a mask of tokens x experts x experts
                for expert in range(experts):
                    forward(hidden_states, torch.full_like(top_k_index[:, :1], expert), torch.zeros_like(top_k_weights[:, :1]))
            found = forward(hidden_states, top_k_index, top_k_weights)
        if missed := [source for name, source in parameters.items() if name not in seen.noted]:
            raise UnsupportedError(
                f"{missed[0]}: {type(module).__name__} of transformers multiplies in a way that ckptq can't observe",
                hint="take a scheme that needs no calibration for routed experts, or keep them",
            )
        return found

    module.forward = watched
    try:
        yield
    finally:
        del module.forward


class _Linears(TorchFunctionMode):
    """Sees every torch.nn.functional.linear of this thread, and notes those whose weight lies in one of the parameters."""

    def __init__(self, parameters: Mapping[str, torch.Tensor], note: Note) -> None:
        super().__init__()
        self.noted: set[str] = set()
        self._places = {name: range(p.data_ptr(), p.data_ptr() + p.nbytes) for name, p in parameters.items()}
        self._note = note

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.nn.functional.linear and len(args) >= 2:
            at = args[1].data_ptr()
            for name, place in self._places.items():
                if at in place:
                    self.noted.add(name)
                    if (changed := self._note(name, args[0])) is not None:
                        args = (changed, *args[1:])
        return function(*args, **(kwargs or {}))
