"""A checkpoint that is run beside another: its layers, its output head, what its server does to what flows, and the samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ckptq.calibration import Sample
from ckptq.calibration.encode import Encoder
from ckptq.checkpoint import Component, Inventory, Reader, read_inventory
from ckptq.compare.decoded import Decoded, decoded
from ckptq.compare.head import Head
from ckptq.compare.served import head_cast, serving
from ckptq.compare.spans import judged
from ckptq.errors import CalibrationError, CkptqError, RecipeError, UnsupportedError
from ckptq.lockstep import Inputs
from ckptq.quantized import describe
from ckptq.scopes import Scope
from ckptq.spelled import recorded, scope_to_validate
from ckptq.streamed import StreamedModel
from ckptq.unstack import unstack
from ckptq.validators import Stored, configs, record
from ckptq.validators.expected import Expected, expect
from ckptq.validators.servers import DEFAULT

_BY_NAME = "`ckptq compare --weights-only` pairs tensors by name and runs nothing"


@dataclass(frozen=True, slots=True)
class Side:
    """`component` and `reader` have weights as the server multiplies with them, `stored` as they are stored.

    expected  what the server builds; None where nothing is quantized
    """

    component: Component
    scope: Scope
    reader: Reader
    model: StreamedModel
    head: Head
    stored: Component
    expected: Expected | None


@contextmanager
def open_side(folder: Path, device: torch.device, beside: Path | None = None, given: Scope | None = None) -> Iterator[Side]:
    """A checkpoint as it computes, streamed. Raises UnsupportedError for a pipeline and for what can't be decoded or computed.

    given   the scope that a recipe spells out
    beside  the checkpoint that it is compared with, whose ckptq.json may have one where its own has none: a source's candidate
    """
    with ExitStack() as stack:
        try:
            side = _open(stack, folder, device, beside, given)
        except CkptqError as problem:  # of two checkpoints, which one?
            if str(folder) in str(problem):
                raise
            raise type(problem)(f"{folder}: {problem}", hint=problem.hint) from problem
        yield side


@contextmanager
def open_pair(reference: Path, candidate: Path, device: torch.device, given: Scope | None = None) -> Iterator[tuple[Side, Side]]:
    """Both, see `open_side`. Raises RecipeError for two of different models."""
    with open_side(reference, device, candidate, given) as one, open_side(candidate, device, reference, given) as other:
        _refuse_others(one, other)
        yield one, other


def _open(stack: ExitStack, folder: Path, device: torch.device, beside: Path | None, given: Scope | None) -> Side:
    inventory = read_inventory(folder)
    if inventory.pipeline is not None:
        raise UnsupportedError("what a pipeline does is compared by its outputs", hint="give two folders of images")
    scope = _scope(inventory, beside, given)
    if not describe(inventory.main):
        inventory = unstack(inventory, scope)
        reader = stack.enter_context(Reader(inventory.root, inventory.main))
        model = StreamedModel(inventory.root, inventory.main, scope, reader, device)
        return Side(inventory.main, scope, reader, model, Head(inventory.main, scope, reader, device), inventory.main, None)
    stored = inventory.main
    at = _expected(folder, stored, scope)
    component = decoded(stored)
    reader = stack.enter_context(Decoded(inventory.root, component, stored, at))
    model = StreamedModel(inventory.root, component, scope, reader, device)
    stack.enter_context(serving(model, stored, at, reader, scope.kv))
    return Side(component, scope, reader, model, Head(component, scope, reader, device), stored, at)


def _scope(inventory: Inventory, beside: Path | None, given: Scope | None) -> Scope:
    bodies = (record.body(folder) for folder in (inventory.root, beside) if folder is not None)
    try:
        return scope_to_validate(inventory.main.config, given, lambda: next(filter(recorded, bodies), None))[0]
    except UnsupportedError as none:
        hint = f"give --recipe FILE with a `scope:`, as `ckptq inspect` proposes one; {_BY_NAME}"
        raise UnsupportedError(str(none), hint=hint) from none


def _expected(folder: Path, component: Component, scope: Scope) -> Expected:
    from ckptq.validate import other_config

    other, _ = other_config(folder, idle=isinstance(component.config.get("quantization_config"), dict))
    stored = Stored(component.config, other, {name: tensor.spec for name, tensor in component.tensors.items()})
    try:
        settings, findings = configs.read(stored, scope, DEFAULT)
    except UnsupportedError as unknown:  # its words are those of a validation
        raise UnsupportedError(f"{describe(component)}: ckptq does not decode that", hint=_BY_NAME) from unknown
    if settings is None:
        raise UnsupportedError(f"{findings[0].subject}: expected {findings[0].expected}, found {findings[0].found}")
    return expect(stored, scope, settings)


def _refuse_others(one: Side, other: Side) -> None:
    pairs = {
        "architecture": (one.scope.name, other.scope.name),
        "number of layers": (len(one.model.layers), len(other.model.layers)),
        "vocabulary": (one.head.size, other.head.size),
    }
    for what, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise RecipeError(
                f"reference and candidate differ in their {what}: {theirs} and {ours}", hint=f"name two of one model; {_BY_NAME}"
            )
    shapes = {name: tuple(parameter.shape) for name, parameter in one.model.model.named_parameters()}
    for name, parameter in other.model.model.named_parameters():
        if shapes.get(name, parameter.shape) != parameter.shape:
            raise RecipeError(
                f"reference and candidate differ in the shape of {name}: {list(shapes[name])} and {list(parameter.shape)}",
                hint=f"name two of one model; {_BY_NAME}",
            )


class Samples:
    """Encodes samples, and knows which of their tokens are judged once they have been."""

    def __init__(self, encoder: Encoder, samples: Sequence[Sample]) -> None:
        self.encoder, self.samples = encoder, samples
        self.ids: dict[int, list[int]] = {}
        self.spans: dict[int, range] = {}

    def encode(self, number: int) -> Inputs:
        """The forward inputs of a sample, see Encoder.encode. Raises CalibrationError for one without a token to judge."""
        try:
            inputs = self.encoder.encode(self.samples[number])
        except CalibrationError as problem:  # its words are those of a recipe's calibration
            hint = problem.hint and _plain(problem.hint)
            raise CalibrationError(_plain(str(problem)), hint=hint) from problem
        if number not in self.spans:
            self.ids[number] = inputs["input_ids"][0].tolist()
            self.spans[number] = judged(self.samples[number], inputs, self.encoder)
        return inputs

    def came(self, numbers: Sequence[int]) -> torch.Tensor:
        """The ids of the judged tokens of these samples, one behind another, int64 [N]."""
        return torch.tensor([self.ids[number][at] for number in numbers for at in self.spans[number]])


def _plain(words: str) -> str:
    return words.replace("calibration.", "").replace("the calibration set", "the samples")


def predicting(side: Side, hidden: Sequence[torch.Tensor], inputs: Samples, numbers: Sequence[int]) -> torch.Tensor:
    """What goes into the output head to predict the judged tokens of these samples, [N, H].

    hidden  the samples' last hidden states, [1, T, H] each: the decoder's last norm is still to come
    """
    decoder = side.model.decoder
    norms = [name for name, _ in decoder.named_children() if "norm" in name]
    if len(norms) != 1:
        raise UnsupportedError(f"{type(decoder).__name__} of transformers: expected one norm after the layers, found {norms}")
    spans = [inputs.spans[number] for number in numbers]
    side.model.load_resident(within=f"{side.model.decoder_name}.{norms[0]}")
    try:
        norm = decoder.get_submodule(norms[0])
        found = torch.cat([norm(state[:, at.start - 1 : at.stop - 1])[0] for state, at in zip(hidden, spans, strict=True)])
        cast = head_cast(side.stored, side.expected, side.reader) if side.expected else None
        return cast(found) if cast else found
    finally:
        side.model.drop_resident()
