"""What attention gets as K and V, after a server's cache where there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Listeners = dict[Any, Callable[["torch.Tensor", "torch.Tensor"], None]]
"""{attention module: what is told its K and V}."""


@contextmanager
def attended() -> Iterator[Listeners]:
    """While in this context, K and V of the modules in what it gives are told.

    To be entered before served.serving, whose stand-ins for transformers' attention functions then lie around these.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    listeners: Listeners = {}

    def told(function: Callable[..., Any]) -> Callable[..., Any]:
        def attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if listener := listeners.get(module):
                listener(key, value)
            return function(module, query, key, value, *args, **kwargs)

        return attention

    names = list(ALL_ATTENTION_FUNCTIONS)
    for name in names:  # an entry of the registry's own, over the library's, which comes back when it is deleted
        ALL_ATTENTION_FUNCTIONS[name] = told(ALL_ATTENTION_FUNCTIONS[name])
    try:
        yield listeners
    finally:
        for name in names:
            del ALL_ATTENTION_FUNCTIONS[name]
