"""A checkpoint that is run beside another: its layers, its output head, what its server does to what flows, and the samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ckptq.calibration import Sample
from ckptq.calibration.encode import Encoder
from ckptq.checkpoint import Component, Reader, read_inventory
from ckptq.compare.decoded import Decoded, decoded
from ckptq.compare.head import Head
from ckptq.compare.served import serving
from ckptq.compare.spans import judged
from ckptq.errors import CalibrationError, RecipeError, UnsupportedError
from ckptq.lockstep import Inputs
from ckptq.quantized import describe
from ckptq.scopes import Scope
from ckptq.spelled import scope_to_validate
from ckptq.streamed import StreamedModel
from ckptq.unstack import unstack
from ckptq.validators import Stored, configs, record
from ckptq.validators.expected import Expected, expect
from ckptq.validators.servers import DEFAULT


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
def open_side(folder: Path, device: torch.device) -> Iterator[Side]:
    """A checkpoint as it computes, streamed. Raises UnsupportedError for a pipeline and for what can't be decoded or computed."""
    inventory = read_inventory(folder)
    if inventory.pipeline is not None:
        raise UnsupportedError(f"{folder}: what a pipeline does is compared by its outputs", hint="give two folders of images")
    scope, _ = scope_to_validate(inventory.main.config, None, lambda: record.body(folder))
    if not describe(inventory.main):
        inventory = unstack(inventory, scope)
        with Reader(inventory.root, inventory.main) as reader:
            model = StreamedModel(inventory.root, inventory.main, scope, reader, device)
            head = Head(inventory.main, scope, reader, device)
            yield Side(inventory.main, scope, reader, model, head, inventory.main, None)
        return
    stored = inventory.main
    component = decoded(stored)
    with Decoded(inventory.root, component, stored) as reader:
        model = StreamedModel(inventory.root, component, scope, reader, device)
        at = _expected(folder, stored, scope)
        with serving(model, stored, at, reader, scope.kv):
            yield Side(component, scope, reader, model, Head(component, scope, reader, device), stored, at)


def _expected(folder: Path, component: Component, scope: Scope) -> Expected:
    from ckptq.validate import other_config

    other, _ = other_config(folder, idle=isinstance(component.config.get("quantization_config"), dict))
    stored = Stored(component.config, other, {name: tensor.spec for name, tensor in component.tensors.items()})
    settings, findings = configs.read(stored, scope, DEFAULT)
    if settings is None:
        raise UnsupportedError(f"{folder}: {findings[0].subject}: expected {findings[0].expected}, found {findings[0].found}")
    return expect(stored, scope, settings)


def refuse_others(one: Side, other: Side) -> None:
    """Raises RecipeError for two of different models."""
    pairs = {
        "architecture": (one.scope.name, other.scope.name),
        "number of layers": (len(one.model.layers), len(other.model.layers)),
        "vocabulary": (one.head.size, other.head.size),
    }
    for what, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise RecipeError(
                f"reference and candidate differ in their {what}: {theirs} and {ours}", hint="compare two of one model"
            )


class Samples:
    """Encodes samples, and knows which of their tokens are judged once they have been."""

    def __init__(self, encoder: Encoder, samples: Sequence[Sample]) -> None:
        self.encoder, self.samples = encoder, samples
        self.ids: dict[int, list[int]] = {}
        self.spans: dict[int, range] = {}

    def encode(self, number: int) -> Inputs:
        """The forward inputs of a sample, see Encoder.encode. Raises CalibrationError for one without a token to judge."""
        inputs = self.encoder.encode(self.samples[number])
        if number not in self.spans:
            self.ids[number] = inputs["input_ids"][0].tolist()
            self.spans[number] = span = judged(self.samples[number], inputs, self.encoder.tokens)
            if not span:
                raise CalibrationError(f"{self.samples[number].name}: too short to judge: it has one token")
        return inputs

    def came(self, numbers: Sequence[int]) -> torch.Tensor:
        """The ids of the judged tokens of these samples, one behind another, int64 [N]."""
        return torch.tensor([self.ids[number][at] for number in numbers for at in self.spans[number]])


def chosen(hidden: Sequence[torch.Tensor], inputs: Samples, numbers: Sequence[int]) -> torch.Tensor:
    """Of these samples' states, [1, T, H] each, those that predict the judged tokens, [N, H]."""
    spans = (inputs.spans[number] for number in numbers)
    return torch.cat([state[0, span.start - 1 : span.stop - 1] for state, span in zip(hidden, spans, strict=True)])


def normed(side: Side, hidden: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What goes into the output head: the decoder's last norm, of each sample's last hidden state [1, T, H]."""
    decoder = side.model.decoder
    norms = [name for name, _ in decoder.named_children() if "norm" in name]
    if len(norms) != 1:
        raise UnsupportedError(f"{type(decoder).__name__} of transformers: expected one norm after the layers, found {norms}")
    side.model.load_resident(within=f"{side.model.decoder_name}.{norms[0]}")
    try:
        norm = decoder.get_submodule(norms[0])
        return [norm(state) for state in hidden]
    finally:
        side.model.drop_resident()
