"""Calibration of a language model: samples in lock-step (ckptq/lockstep.py), and the amaxes of each layer that they passed."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence

import torch

from ckptq.console import Console
from ckptq.errors import DataError
from ckptq.journal import Progress, ProgressFile
from ckptq.lockstep import Inputs, Wave
from ckptq.observe import Seen, observing
from ckptq.plan import Observer
from ckptq.streamed import StreamedModel


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
            with Wave(streamed, encode, look=seen.note_weight) as wave:
                left = range(state.first, len(names))
                wave.enter(left, memory, console, passed=state.layer, hidden=state.hidden, watch=watch)
                seen.take_weights()
                if len(wave) < len(left) and not state.first:
                    waiting = len(left) - len(wave)
                    console.note(f"calibration goes in waves: {len(wave)} samples fit the memory, {waiting} wait for their turn")
                _pass_layers(wave, state, names, observers, seen, amax, counts, saved, console, watch)
                count = len(wave)
            state = Progress(first=state.first + count, amax=dict(amax), tokens=dict(counts))
            saved.save(state)
    if unreached := [o.name for o in observers if o.kind != "weight" and o.name not in amax]:
        raise DataError(
            f"{unreached[0]}: no calibration sample reached {by_name[unreached[0]].module} ({len(unreached)} such observers)",
            hint="add samples that use it, or keep the module in the recipe",
        )
    return {by_name[name]: value for name, value in amax.items()}


def _pass_layers(
    wave: Wave,
    state: Progress,
    names: Sequence[str],
    observers: Sequence[Observer],
    seen: Seen,
    amax: dict[str, float],
    tokens: MutableMapping[str, list[int]],
    saved: ProgressFile,
    console: Console,
    watch: Callable[[], None],
) -> None:
    """Runs the wave, samples from `state.first` on, to the last layer; raises `amax` and `tokens` in place."""
    weights = {f"{o.module}.weight": o.name for o in observers if o.kind == "weight"}

    def turn(place: int) -> None:
        seen.sample = state.first + place

    count = wave.depth
    with console.stage("calibrate", count - state.layer, "layers") as advance:
        for index in wave.layers(state.layer):
            watch()
            amax |= {weights[name]: value for name, value in seen.take_weights().items() if name in weights}
            wave.step(turn)
            for observer, value in seen.take(names).items():
                amax[observer.name] = max(amax.get(observer.name, 0.0), value)
            for experts, found in seen.take_tokens().items():
                tokens[experts] = [a + b for a, b in zip(tokens.get(experts, [0] * len(found)), found, strict=True)]
            if index + 1 < count and saved.due():
                saved.save(Progress(state.first, index + 1, dict(amax), wave.hidden(), dict(tokens)))
            advance(1)
