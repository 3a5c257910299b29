"""Families with a vision tower (tests/families): how samples are encoded by each processor, and what waits between decoder layers:
what is added there, as deepstack is, survives an interruption, and what samples hold is what is counted."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from families import IMAGE_SAMPLES, ROOT, families
from greenlet import greenlet

from ckptq import lockstep as engine
from ckptq.calibrate import calibrate
from ckptq.calibration import Sample, load_samples
from ckptq.calibration.encode import Encoder
from ckptq.checkpoint import Reader, read_inventory
from ckptq.console import Console
from ckptq.errors import CalibrationError
from ckptq.journal import ProgressFile
from ckptq.plan import Observer
from ckptq.scopes import find_scope
from ckptq.sections import CocoCalibration
from ckptq.streamed import StreamedModel
from ckptq.waiting import free_outside

FAMILIES = families()
SCENE = ROOT / "examples/scenes/calib/000001000000.jpg"
USER, ASSISTANT, STOP = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"
START, PAD, END, MODEL = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|im_start|>model\n"
QWEN = f"{USER}{START}{16 * PAD}{END}Describe the image.{ASSISTANT}A circle.{STOP}\n"
Run = Callable[..., dict[str, float]]
Watch = Callable[[StreamedModel], None]


class Stop(Exception):  # noqa: N818
    """Thrown where a run is to end."""


def observers(streamed: StreamedModel, names: list[str]) -> list[Observer]:
    """One for the input of each layer's first and last linear, and for its K."""
    found = []
    for name in (n.removesuffix(".weight") for n in names):
        at = streamed._scope.layer_of(name + ".")
        if at and at[1].startswith(("self_attn.q_proj", "mlp.down_proj")):
            found.append(Observer(name, "input", at[0]))
        elif at and at[1].startswith("self_attn.k_proj"):
            found.append(Observer(name, "k", at[0]))
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """source(family) -> its checkpoint, made at the first call."""

    @functools.cache
    def made(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        FAMILIES[name].make(folder)
        return folder

    return made


@pytest.mark.parametrize(
    ("name", "text", "further"),
    [
        ("qwen2_vl", QWEN, {"mm_token_type_ids", "image_grid_thw"}),
        ("qwen3_vl", QWEN, {"mm_token_type_ids", "image_grid_thw"}),
        ("gemma3", f"{USER}\n\n{START}{4 * PAD}{END}\n\nDescribe the image.{STOP}\n{MODEL}A circle.{STOP}\n", {"token_type_ids"}),
        ("llava", f"USER: {16 * PAD}\nDescribe the image. ASSISTANT: A circle. ", set()),
    ],
)
def test_a_sample_is_encoded_as_the_families_processor_does(
    name: str, text: str, further: set[str], source: Callable[[str], Path]
) -> None:
    encoder = Encoder(source(name), None, 512)
    inputs = encoder.encode(Sample(SCENE.name, "A circle.", "Describe the image.", SCENE))
    (ids,) = inputs["input_ids"]
    assert encoder._tokenizer.decode(ids) == text
    assert inputs.keys() == {"input_ids", "attention_mask", "pixel_values", *further}
    for types in further - {"image_grid_thw"}:
        assert torch.equal(inputs[types][0], (ids == encoder._tokenizer.convert_tokens_to_ids(PAD)).long())
    assert encoder.encode(Sample("t", "A circle.", "What?")).keys() == {"input_ids", "attention_mask"}
    for reserved in (PAD, *([START] if name == "gemma3" else [])):
        with pytest.raises(CalibrationError, match="which the checkpoint reserves for images and such"):
            encoder.encode(Sample(SCENE.name, f"A {reserved}.", "Describe the image.", SCENE))


@pytest.mark.parametrize("name", ["gemma3", "llava"])
def test_a_processor_of_one_size_takes_no_limit(name: str, source: Callable[[str], Path]) -> None:
    with pytest.raises(CalibrationError, match=r"max_pixels: the checkpoint's \w+ has no such limit"):
        Encoder(source(name), 3136, 512).encode(Sample(SCENE.name, "A circle.", "Describe the image.", SCENE))


@pytest.fixture(scope="module")
def runner(source: Callable[[str], Path]) -> Callable[[str], Run]:
    """runner(family)(kept, watch, memory) -> {observer: amax}, of three samples with images."""

    def of(name: str) -> Run:
        folder = source(name)
        component = read_inventory(folder).main
        samples: list[Sample] = load_samples(CocoCalibration.model_validate({**IMAGE_SAMPLES, "prompt": "Describe the image."}))
        encoder = Encoder(folder, None, 512)

        def run(kept: Path, watch: Watch = lambda streamed: None, memory: int = 1 << 40) -> dict[str, float]:
            with Reader(folder, component) as reader:
                streamed = StreamedModel(folder, component, find_scope(component.config), reader, torch.device("cpu"))
                seen = observers(streamed, [n for n in component.tensors if n.endswith("_proj.weight")])
                file, called = ProgressFile(kept, 0), [sample.name for sample in samples]
                quiet = Console(quiet=True)
                found = calibrate(
                    streamed, seen, called, lambda n: encoder.encode(samples[n]), memory, file, quiet, lambda: watch(streamed)
                )
            return {observer.name: value for observer, value in found.items()}

        return run

    return of


def test_deepstack_survives_an_interruption_before_any_layer(runner: Callable[[str], Run], tmp_path: Path) -> None:
    """Features are added after layers 0 and 1 of three: both before and after what was saved."""
    run = runner("qwen3_vl")
    whole = run(tmp_path / "whole")
    assert len(whole) == 9
    for layer in (1, 2):
        calls = iter(range(100))

        def stop(streamed: StreamedModel, calls: Any = calls, at: int = 3 + layer) -> None:
            if next(calls) == at:  # three samples enter, then each layer begins
                raise Stop

        kept = tmp_path / f"stopped before {layer}"
        with pytest.raises(Stop):
            run(kept, stop)
        saved = ProgressFile(kept, 0).load()
        assert saved is not None
        assert (saved.layer, len(saved.hidden)) == (layer, 3)
        assert run(kept) == whole
    assert run(tmp_path / "waves", memory=1) == whole


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "gemma3", "llava"])
def test_what_waits_is_what_is_counted(
    name: str, runner: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pixels are gone then, and so is what the tower made and the decoder was not given."""
    counted: list[int] = []
    tokens: list[int] = []
    count = engine.held_bytes

    def held(frame: Any, hidden: torch.Tensor, model: torch.nn.Module) -> int:
        tokens.append(hidden.shape[1])
        counted.append(count(frame, hidden, model))
        return counted[-1]

    monkeypatch.setattr(engine, "held_bytes", held)
    calls, found = iter(range(100)), []
    run, others = runner(name), storages()

    def watch(streamed: StreamedModel) -> None:
        if next(calls) == 4:  # three samples have entered and passed the first layer
            found.append(alive(streamed, others))

    run(tmp_path / "kept", watch)
    ids_and_masks = 64 * sum(tokens)
    assert len(counted) == 3
    assert 0.8 * sum(counted) < found[0] < sum(counted) + ids_and_masks


def alive(streamed: StreamedModel, others: Mapping[int, int]) -> int:
    """Bytes of all tensors of this process but the model's and those of other tests."""
    own = {t.untyped_storage()._cdata for t in (*streamed.model.parameters(), *streamed.model.buffers(), *streamed._slots)}
    return sum(nbytes for storage, nbytes in storages().items() if storage not in own and storage not in others)


def storages() -> dict[int, int]:
    """{storage: bytes} of every tensor that the collector knows."""
    gc.collect()
    everything = (value for value in gc.get_objects() if type(value) is torch.Tensor)
    return {s._cdata: s.nbytes() for t in everything if (s := t.untyped_storage())}


def test_what_a_module_keeps_for_another_is_not_freed() -> None:
    """transformers' models pass such values on as attributes, too: an empty storage behind one would end the process."""
    model = torch.nn.Module()
    model.inner = torch.nn.Linear(2, 2)

    def forward() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        kept, given, dropped = torch.ones(4), torch.ones(4), torch.ones(4)
        model.inner.features = [kept]
        free_outside(sys._getframe(0), (given,), model)
        return kept, given, dropped

    found = greenlet(forward).switch()  # as samples run, with no frames around their own
    assert [tensor.untyped_storage().nbytes() for tensor in found] == [16, 16, 0]
    assert model.inner.weight.untyped_storage().nbytes() == 16
