"""What attention gets as K and V, after a server's cache where there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Attention = Callable[..., Any]
Listeners = dict[Any, Callable[["torch.Tensor", "torch.Tensor"], None]]
"""{attention module: what is told its K and V}."""


@contextmanager
def attended() -> Iterator[Listeners]:
    """While in this context, K and V of the modules in what it gives are told.

    To be entered before served.serving, whose stand-ins for transformers' attention functions then lie around these.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    listeners: Listeners = {}

    def told(function: Attention) -> Attention:
        def attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if listener := listeners.get(module):
                listener(key, value)
            return function(module, query, key, value, *args, **kwargs)

        return attention

    with replaced(list(ALL_ATTENTION_FUNCTIONS), told):
        yield listeners


@contextmanager
def replaced(names: Iterable[str], wrap: Callable[[Attention], Attention]) -> Iterator[None]:
    """While in this context, transformers' attention functions of these names are what `wrap` makes of them.

    Contexts may lie in one another: what was there before comes back, be it the library's own or another's stand-in.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = {name: ALL_ATTENTION_FUNCTIONS[name] for name in names}
    for name, function in before.items():  # an entry of the registry's own, over the library's
        ALL_ATTENTION_FUNCTIONS[name] = wrap(function)
    try:
        yield
    finally:
        for name, function in before.items():
            del ALL_ATTENTION_FUNCTIONS[name]
            if ALL_ATTENTION_FUNCTIONS.get(name) is not function:
                ALL_ATTENTION_FUNCTIONS[name] = function
