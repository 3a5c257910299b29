"""What quantizing some units costs, exactly: the reference, and beside it the same model with these as the candidate has them.

The reference's samples pass the layers in lock-step. Where a branch first differs, its hidden states leave the reference's, and
from there on each layer runs once more for it, with the same masks and positions. Branches that have been the same so far are one.
So one read of both checkpoints measures any number of branches, in memory for two layers of each checkpoint and a hidden state for
each branch and sample.

Embeddings, towers, the last norm and the output head are the reference's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ckptq.calibration import Sample
from ckptq.calibration.encode import Encoder
from ckptq.compare.head import Distances, compare_heads, split
from ckptq.compare.room import waiting_room
from ckptq.compare.sampled import interval
from ckptq.compare.sides import Samples, Side, open_pair, predicting
from ckptq.compare.tally import Tally
from ckptq.console import Console
from ckptq.lockstep import Wave
from ckptq.scopes import Scope
from ckptq.sensitivity.choose import Kl
from ckptq.sensitivity.units import Unit, find_units, refuse_changed_norms


@dataclass(frozen=True, slots=True)
class Branch:
    """The reference with these units quantized, by their names, and, if `kv`, with the candidate's FP8 cache in every layer."""

    units: frozenset[str]
    kv: bool = False


REFERENCE = Branch(frozenset())


def forwards(branches: Sequence[Branch], layer_of: Mapping[str, int], depth: int) -> float:
    """How much `exact` computes, the reference included, in passes of the samples through all layers of one model."""
    return 1 + sum(len(_distinct(branches, layer_of, layer)) for layer in range(depth)) / depth


def _distinct(branches: Iterable[Branch], layer_of: Mapping[str, int], layer: int) -> dict[Branch, Branch]:
    """{what the branches are up to this layer, that is not the reference: what it is without the layer}."""
    found = (_up_to(branch, layer_of, layer) for branch in branches)
    return {branch: _up_to(branch, layer_of, layer - 1) for branch in found if branch != REFERENCE}


def _up_to(branch: Branch, layer_of: Mapping[str, int], layer: int) -> Branch:
    return Branch(frozenset(name for name in branch.units if layer_of[name] <= layer), branch.kv and layer >= 0)


@dataclass(frozen=True, slots=True)
class _Call:
    """How the reference's layer was called with a sample, what it gave, and what goes into the next layer."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: torch.Tensor
    following: torch.Tensor

    @property
    def hidden(self) -> torch.Tensor:
        """[1, T, H]."""
        found: torch.Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return found

    def again(self, layer: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """What another layer, or another state, gives, [1, T, H]; without the hooks on the layer itself, where samples wait."""
        if self.args:
            found = layer.forward(hidden, *self.args[1:], **self.kwargs)
        else:
            found = layer.forward(**{**self.kwargs, "hidden_states": hidden})
        output: torch.Tensor = found[0] if isinstance(found, tuple) else found
        return output

    def onward(self, output: torch.Tensor) -> torch.Tensor:
        """What goes into the next layer. Between layers models add at most what does not depend on them: Qwen3-VL's deepstack."""
        if self.following is self.output:
            return output
        return (output.float() + (self.following.float() - self.output.float())).to(output.dtype)


_States = dict[tuple[Branch, int], torch.Tensor]
"""What enters the next layer: of each branch that differs by then, and of each sample of the wave."""
Visit = Callable[[int, int, _Call], None]
AfterLayer = Callable[[int, int], None]
"""Is told the layer that all samples of a wave have passed, and how many these are. What it raises ends the run."""


class Runner:
    """Measures branches of a reference and a candidate on samples. Made by `running`."""

    def __init__(self, reference: Side, candidate: Side, inputs: Samples, memory: int, console: Console) -> None:
        """`memory`: bytes that hidden states may hold between layers."""
        self.units: tuple[Unit, ...] = find_units(reference, candidate)
        self.layer_of = {unit.name: unit.layer for unit in self.units}
        self.depth = len(reference.model.layers)
        self.has_kv = candidate.expected is not None and candidate.expected.settings.kv_fp8
        self._modules = {unit.name: unit.modules for unit in self.units}
        self._here = [frozenset(unit.name for unit in self.units if unit.layer == layer) for layer in range(self.depth)]
        self.reference, self.candidate, self.memory = reference, candidate, memory
        self._inputs, self._console = inputs, console

    def lengths(self) -> list[int]:
        """Tokens of each sample, prompts and images included. Raises CalibrationError for one without a token to judge."""
        return [self._inputs.encode(number)["input_ids"].shape[1] for number in range(len(self._inputs.samples))]

    def local_errors(self, after_layer: AfterLayer | None = None) -> dict[str, float]:
        """{unit: relative L2 of its layer's output over all samples, where it alone is quantized}."""
        tally = Tally()

        def visit(layer: int, place: int, call: _Call) -> None:
            for name in self._here[layer]:
                tally.add(layer, name, call.output, self._forward(Branch(frozenset({name})), layer, call, call.hidden))

        first = 0
        while first < len(self._inputs.samples):
            first += len(self._pass(first, 1, "local errors", visit, after_layer))
        return {unit.name: tally.relative_l2(unit.layer, unit.name) for unit in self.units}

    def exact(self, branches: Sequence[Branch]) -> list[Kl]:
        """KL(reference || branch) of each, mean over judged tokens, with its bootstrap interval over samples."""
        found: dict[Branch, list[float]] = {branch: [] for branch in branches}
        computed = [_distinct(found, self.layer_of, layer) for layer in range(self.depth)]
        states: _States = {}

        def visit(layer: int, place: int, call: _Call) -> None:
            before = {earlier: states.pop((earlier, place), call.hidden) for earlier in dict.fromkeys(computed[layer].values())}
            for branch, earlier in computed[layer].items():
                states[branch, place] = call.onward(self._forward(branch, layer, call, before[earlier]))

        first = 0
        while first < len(self._inputs.samples):
            last = self._pass(first, 1 + len(found), "exact KL", visit)
            for branch, distances in self._distances([*found], last, range(first, first + len(last)), states).items():
                found[branch] += [float(part.kl.mean()) for part in distances]
            first += len(last)
        tokens = [len(self._inputs.spans[number]) for number in range(first)]
        return [_mean(tokens, found[branch]) for branch in branches]

    def _pass(self, first: int, states: int, stage: str, visit: Visit, after_layer: AfterLayer | None = None) -> list[torch.Tensor]:
        """Runs samples from `first` on through all layers, as many as fit the memory with so many states each.

        `visit` is told of each layer and sample. Returns the samples' last hidden states.
        """
        one, other = self.reference.model, self.candidate.model
        other.fill_buffers()
        with Wave(one, self._inputs.encode) as wave, _called(one.layers) as seen:
            wave.enter(range(first, len(self._inputs.samples)), self.memory // states, self._console)
            with self._console.stage(stage, wave.depth, "layers") as advance:
                for layer, _ in zip(wave.layers(), other.in_turn(), strict=True):
                    for place in range(len(wave)):
                        wave.step_one(place)
                        args, kwargs, output = seen
                        visit(layer, place, _Call(args, kwargs, output, wave.hidden_of(place)))
                    if after_layer is not None:
                        if one.device.type == "cuda":  # what was asked of it is done when the clock is looked at
                            torch.cuda.synchronize(one.device)
                        after_layer(layer, len(wave))
                    advance(1)
            other.release()
            return wave.hidden()

    def _forward(self, branch: Branch, layer: int, call: _Call, hidden: torch.Tensor) -> torch.Tensor:
        """The layer as the branch has it, with the sample of that call, on other hidden states."""
        here = self._here[layer]
        ours, theirs = (side.model.layers[layer] for side in (self.reference, self.candidate))
        # The candidate's attention, whatever its linears, is the one that has the cache.
        base, other, taken = (theirs, ours, here - branch.units) if branch.kv else (ours, theirs, here & branch.units)
        with _mixed(base, other, [module for name in taken for module in self._modules[name]]):
            return call.again(base, hidden)

    def _distances(
        self, branches: Sequence[Branch], last: Sequence[torch.Tensor], numbers: range, states: _States
    ) -> dict[Branch, list[Distances]]:
        """Of each branch, sample by sample. `last`: the reference's hidden states; `states` holds the others', and is emptied."""
        hidden = []
        for branch in (REFERENCE, *branches):
            own = [states.pop((branch, place), state) for place, state in enumerate(last)]
            hidden.append(predicting(self.reference, own, self._inputs, numbers))
        head, tokens = self.reference.head, self._inputs.came(numbers).to(hidden[0].device)
        with self._console.stage("heads", head.size, "rows") as advance:
            found = compare_heads([head] * len(hidden), hidden, tokens, advance)
        sizes = [len(self._inputs.spans[number]) for number in numbers]
        return {branch: split(distances, sizes) for branch, distances in zip(branches, found, strict=True)}


@contextmanager
def running(
    reference: Path,
    candidate: Path,
    samples: Sequence[Sample],
    *,
    sequence_length: int,
    max_pixels: int | None,
    device: torch.device,
    memory: int | None,
    console: Console,
    scope: Scope | None = None,
    limit: int | None = None,
) -> Iterator[Runner]:
    """A runner, while in this context. Parameters: see measure_behavior.

    Raises RecipeError for two of different models, for a candidate that quantizes no layer and for a limit that is too small,
    UnsupportedError for what can't be computed, CalibrationError for samples without judged tokens.
    """
    inputs = Samples(Encoder(reference, max_pixels, sequence_length), samples)
    with open_pair(reference, candidate, device, scope) as sides, torch.inference_mode():
        refuse_changed_norms(sides[0], sides[1])
        if memory is None:
            memory = waiting_room(sides, len(samples), sequence_length, limit, device)
        yield Runner(sides[0], sides[1], inputs, memory, console)


@contextmanager
def _called(layers: Iterable[torch.nn.Module]) -> Iterator[list[Any]]:
    """[args, kwargs, output] of the layer that a sample has passed last.

    To be entered after the wave, whose hooks then come first, and before its samples: a call looks its hooks up when it begins.
    """
    found: list[Any] = [None, None, None]

    def before(module: Any, args: Any, kwargs: Any) -> None:
        found[:2] = args, kwargs

    def after(module: Any, args: Any, output: Any) -> None:
        found[2] = output[0] if isinstance(output, tuple) else output

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
            # Before the wave's own, which ends the sample after the last layer.
            hooks.callback(layer.register_forward_hook(after, prepend=True).remove)
        yield found


@contextmanager
def _mixed(base: torch.nn.Module, other: torch.nn.Module, paths: Iterable[str]) -> Iterator[None]:
    """`base` with modules of `other` in the place of its own."""
    with ExitStack() as undo:
        for path in paths:
            around, _, leaf = path.rpartition(".")
            modules = base.get_submodule(around)._modules
            undo.callback(modules.__setitem__, leaf, modules[leaf])
            modules[leaf] = other.get_submodule(path)
        yield


def _mean(tokens: Sequence[int], means: Sequence[float]) -> Kl:
    weighted = sum(count * mean for count, mean in zip(tokens, means, strict=True))
    return Kl(weighted / sum(tokens), *interval(tokens, means))
