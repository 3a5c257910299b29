"""Which elements of which tensors a server's loader wrote and read, seen from below: at every operation that torch dispatches.

Runs in the interpreter that has the server, so it imports nothing of ckptq, and torch alone. `Tracker` is told the checkpoint's
tensors as the loader gets them (`source`) and, before and after, the model's parameters (`begin`, `finish`). In between its
dispatch mode sees each operation with its tensors: views (narrow, select, chunk, transpose, view of another dtype) have the
storage of what they look at, so offset, size and strides say exactly which bytes an operation reads and writes. Nothing of the
loader is replaced.

A parameter's element is written when any operation writes its bytes, or its storage becomes another one (`param.data = x`, a
parameter registered anew) that was. A stored tensor's element is read when an operation takes it as input: making a view, asking
for its shape, or a template of its shape is no read. Copies in another dtype, contiguous copies and other elementwise results
stand for the tensor that they came from, element by element, until they are read themselves.

Exact, with three exceptions, all towards silence: what other threads do isn't seen; an operation that is not elementwise (cat,
max) reads all of its inputs; and of a view with more than a million separate runs the whole span counts. Costs: sorted intervals
of bytes on the host, some hundred bytes a tensor, whatever its size and device. A transient mask of one byte an element is made
for operations that write through an index or a mask, for casts that are read in part, and for a parameter whose own elements lie
apart. Each operation costs some 20 microseconds, and a copy into another dtype three passes over its values in blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

# Relative, for in the server's interpreter this folder is a package of another name (vllm_child.py).
from .vllm_storage import Intervals, Place, flat_gaps, ranges, scattered, without

_BLOCK = 1 << 22
"""Elements that a comparison of values takes at a time."""

# Operations of torch that take a tensor for its shape and dtype alone.
_TEMPLATES = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like", "new_empty",
              "new_empty_strided", "new_zeros", "new_ones", "new_full", "is_same_size")  # fmt: skip
_UNWRITTEN = ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "empty_permuted")
# Operations that write a part of their first argument which its geometry doesn't tell.
_INDEXED = ("index_put_", "_index_put_impl_", "index_copy_", "index_fill_", "index_add_", "scatter_", "scatter_add_",
            "scatter_reduce_", "masked_fill_", "masked_scatter_", "put_")  # fmt: skip
_COPIES = ("_to_copy", "clone", "_to_dtype")


@dataclass(slots=True, eq=False)
class Buffer:
    """What is known of one storage. `ref` keeps its identity, not its data: the address isn't used again while it lives.

    keys     stored tensors that lie in it: (first byte, one past the last, key)
    roots    stored tensors that its content was made from
    origin   for an elementwise result: its own place, and the buffer and place of the tensor that it was made from
    """

    ref: Any
    written: Intervals = field(default_factory=Intervals)
    read: Intervals = field(default_factory=Intervals)
    keys: list[tuple[int, int, str]] = field(default_factory=list)
    roots: frozenset[str] = frozenset()
    origin: tuple[Place, Buffer, Place] | None = None
    written_from: dict[str, None] = field(default_factory=dict)


@dataclass(slots=True)
class Source:
    """One tensor of the checkpoint, as the loader got it."""

    dtype: str
    shape: tuple[int, ...]
    buffer: Buffer
    place: Place
    times: int = 1
    casts: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    """(dtype, storage's identity or ""): elements, and how many of them changed their value."""


class Tracker:
    """See the module. One for one load."""

    def __init__(self) -> None:
        self.buffers: dict[int, Buffer] = {}
        self.made: list[Buffer] = []
        self.sources: dict[str, Source] = {}
        self.item: tuple[float | int | bool, frozenset[str]] | None = None
        self.before: dict[str, int] = {}
        self.problems: list[str] = []

    # --- what the loader's surroundings tell ---

    def begin(self, parameters: Iterable[tuple[str, Any]]) -> None:
        """The model's parameters before the load: nothing of them counts as written, whatever filled them."""
        self.before = {name: id(self._buffer(p)) for name, p in parameters if not p.is_meta}

    def source(self, key: str, tensor: Any) -> None:
        """The loader is about to get `tensor` of the checkpoint."""
        buffer, place = self._buffer(tensor), Place.of(tensor)
        buffer.keys.append((*place.span, key))
        times = self.sources[key].times + 1 if key in self.sources else 1
        self.sources[key] = Source(str(tensor.dtype), tuple(tensor.shape), buffer, place, times)
        self.item = None

    def mode(self) -> AbstractContextManager[Any]:
        """Within it, torch's operations of this thread are noted."""
        from torch.utils import _python_dispatch

        base: Any = _python_dispatch.TorchDispatchMode  # torch leaves it untyped

        tracker = self

        class Mode(base):  # type: ignore[misc]
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                kwargs = kwargs or {}
                indexed = tracker._before_indexed(func, args)
                out = func(*args, **kwargs)
                try:
                    tracker._note(func, args, kwargs, out, indexed)
                except Exception as problem:  # the load is what counts: it goes on, and the trace says that it is incomplete
                    tracker.problems.append(f"{func}: {type(problem).__name__}: {problem}")
                return out

        mode: AbstractContextManager[Any] = Mode()
        return mode

    def finish(self, parameters: Iterable[tuple[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
        """(keys, parameters) as JSON has them. `parameters`: the model's after the load.

        keys: {key: {dtype, shape, elements, read, times, unread: [[first, end of the flat index], ..], parameters, casts}}
        parameters: {name: {dtype, shape, elements, written, unwritten: [[first, end], ..], keys}}; at most 1000 ranges each.
        """
        for buffer in reversed(self.made):
            _hand_on(buffer)
        named = [(name, p) for name, p in parameters if not p.is_meta]
        owners = {self._identity(p): name for name, p in reversed(named)}
        keys = {key: self._key(key, source, owners) for key, source in self.sources.items()}
        found = {name: self._parameter(p) for name, p in named}
        for name, parameter in found.items():
            for key in parameter["keys"]:
                keys[key]["parameters"].append(name)
        return keys, found

    def _key(self, key: str, source: Source, owners: Mapping[str, str]) -> dict[str, Any]:
        unread = flat_gaps(source.buffer.read, source.place)
        casts = [
            {"to": dtype, "parameter": owners.get(owner, ""), "elements": elements, "changed": changed}
            for (dtype, owner), (elements, changed) in source.casts.items()
        ]
        elements = source.place.elements
        return {
            "dtype": source.dtype, "shape": source.shape, "elements": elements, "read": elements - sum(b - a for a, b in unread),
            "times": source.times, "unread": unread[:1000], "parameters": [], "casts": casts,
        }  # fmt: skip

    def _parameter(self, parameter: Any) -> dict[str, Any]:
        place = Place.of(parameter)
        buffer = self.buffers.get(parameter.untyped_storage()._cdata)
        # A storage that no operation of torch has made or touched was filled from outside, and assigned.
        unwritten = flat_gaps(buffer.written, place) if buffer is not None else []
        elements = place.elements
        return {
            "dtype": str(parameter.dtype), "shape": place.sizes, "elements": elements,
            "written": elements - sum(b - a for a, b in unwritten), "unwritten": unwritten[:1000],
            "keys": [*(buffer.written_from if buffer is not None else ())],
        }  # fmt: skip

    # --- what torch's operations tell ---

    @staticmethod
    def _identity(tensor: Any) -> str:
        return str(tensor.untyped_storage()._cdata)

    def _buffer(self, tensor: Any) -> Buffer:
        from torch.multiprocessing import reductions

        weak: Any = reductions.StorageWeakRef
        storage = tensor.untyped_storage()
        buffer = self.buffers.get(storage._cdata)
        if buffer is None:
            buffer = self.buffers[storage._cdata] = Buffer(weak(storage))
        return buffer

    def _known(self, tensor: Any) -> Buffer | None:
        return self.buffers.get(tensor.untyped_storage()._cdata)

    def _roots(self, tensor: Any) -> frozenset[str]:
        """The stored tensors that this one is a part of or was made from."""
        buffer = self._known(tensor)
        if buffer is None:
            return frozenset()
        start, stop = Place.of(tensor).span
        return buffer.roots | {key for a, b, key in buffer.keys if (a < stop and start < b) or a == b == start}

    def _note(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any, indexed: Any) -> None:
        name = func._schema.name.removeprefix("aten::")
        given = [*zip(func._schema.arguments, args, strict=False)]
        given += [(a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs]
        targets = [t for a, value in given if a.alias_info is not None and a.alias_info.is_write for t in _tensors(value)]
        inputs = [t for a, value in given if a.alias_info is None or not a.alias_info.is_write for t in _tensors(value)]
        touched = {t.untyped_storage()._cdata for t in (*targets, *inputs)}
        fresh = [t for t in _tensors(out) if t.untyped_storage()._cdata not in touched]
        if not targets and not fresh and [*_tensors(out)]:
            return  # a view
        roots = frozenset[str]().union(*(self._roots(t) for t in inputs))
        if name in _TEMPLATES:
            inputs, roots = [], frozenset()
        if name == "fill_" and self.item is not None and len(args) > 1 and args[1] == self.item[0]:
            roots = self.item[1]  # param.data.fill_(loaded.item())
        if name == "_local_scalar_dense" and roots:
            self.item = (out, roots)
        elementwise = len(fresh) == 1 and self._elementwise(func, name, inputs, fresh[0])
        for t in inputs:
            if not elementwise and (buffer := self._known(t)) is not None:
                _add(buffer.read, Place.of(t))
        for t in targets:
            self._write(t, roots, indexed if t is targets[0] else None)
        for t in fresh:
            buffer = self._buffer(t)
            buffer.roots |= roots
            if name not in _UNWRITTEN:
                buffer.written_from |= dict.fromkeys(sorted(roots))
                _add(buffer.written, Place.of(t))
        if name in ("copy_", "_to_copy") and inputs and roots:
            self._cast(inputs[0], targets[0] if targets else fresh[0], roots, bool(targets))

    def _elementwise(self, func: Any, name: str, inputs: Sequence[Any], out: Any) -> bool:
        """Whether `out` stands for its one input that comes from the checkpoint, element by element. Then it is noted so."""
        import torch

        tracked = [t for t in inputs if self._roots(t)]
        if len(tracked) != 1 or tracked[0].shape != out.shape or not (name in _COPIES or torch.Tag.pointwise in func.tags):
            return False
        parent, buffer = self._buffer(tracked[0]), self._buffer(out)
        buffer.origin = (Place.of(out), parent, Place.of(tracked[0]))
        self.made.append(buffer)
        return True

    def _write(self, target: Any, roots: frozenset[str], indexed: Any) -> None:
        buffer, place = self._buffer(target), Place.of(target)
        if indexed is None:
            _add(buffer.written, place)
        else:
            for first, end in ranges(indexed):
                buffer.written.add(first * place.itemsize, end * place.itemsize)
        if place.elements:
            buffer.written_from |= dict.fromkeys(sorted(roots))

    def _before_indexed(self, func: Any, args: Sequence[Any]) -> Any:
        """For an operation that writes through an index or mask: a bool mask of its target's whole storage, in elements."""
        import torch

        name = func._schema.name.removeprefix("aten::")
        if name not in _INDEXED:
            return None
        target, *rest = args
        size = target.untyped_storage().nbytes() // target.element_size()
        mask = torch.zeros(size, dtype=torch.bool, device=target.device)
        view = mask.as_strided(target.shape, target.stride(), target.storage_offset())
        # The same operation with the same index, writing True: the values come last but for accumulate, reduce and unsafe.
        where = {"index_put_": 2, "_index_put_impl_": 2, "put_": 2, "masked_fill_": 2, "masked_scatter_": 2}.get(name, 3) - 1
        value = rest[where] if where < len(rest) else None
        ones = torch.ones_like(value, dtype=torch.bool) if isinstance(value, torch.Tensor) else True
        plain = {"index_add_": "index_copy_", "scatter_add_": "scatter_", "scatter_reduce_": "scatter_"}.get(name, name)
        getattr(view, "index_put_" if plain == "_index_put_impl_" else plain)(*rest[:where], ones)
        return mask

    def _cast(self, given: Any, made: Any, roots: frozenset[str], into: bool) -> None:
        if given.dtype == made.dtype or not given.numel():
            return
        changed = count_changed(given, made.dtype)
        for key in roots:
            counts = self.sources[key].casts.setdefault((str(made.dtype), self._identity(made) if into else ""), [0, 0])
            counts[0] += given.numel()
            counts[1] += changed


def count_changed(given: Any, dtype: Any) -> int:
    """How many values of `given` are other ones in `dtype`; NaN counts as changed unless it stays NaN."""
    import torch

    changed = 0
    for block in given.detach().reshape(-1).split(_BLOCK):
        wide = torch.float64 if block.dtype in (torch.float64, torch.int64, torch.int32) else torch.float32
        before, after = block.to(wide), block.to(dtype).to(wide)
        changed += int(((before != after) & ~(before.isnan() & after.isnan())).sum())
    return changed


def _add(into: Intervals, place: Place) -> None:
    for start, stop in place.runs():
        into.add(start, stop)


def _hand_on(buffer: Buffer) -> None:
    """What was read of an elementwise result was read of what it was made from."""
    assert buffer.origin is not None
    own, parent, place = buffer.origin
    gaps = flat_gaps(buffer.read, own)
    if not gaps:
        _add(parent.read, place)
    elif sum(b - a for a, b in gaps) < own.elements:
        flat = without(gaps, own.elements)
        for first, end in ranges(scattered(flat, place)):
            parent.read.add(first * place.itemsize, end * place.itemsize)


def _tensors(value: Any) -> Iterator[Any]:
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
