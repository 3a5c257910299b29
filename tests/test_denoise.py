"""Amaxes of denoisers: those of the resident pipeline bit for bit, each step read once, in memory that no number of blocks raises."""

import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peers.resident_pipeline import load, run
from pipelines import pipelines
from safetensors.torch import load_file

from ckptq import denoise
from ckptq.calibration import digest, load_samples
from ckptq.checkpoint import Component, Inventory, Reader, SourceTensor, read_inventory
from ckptq.console import Console
from ckptq.denoise import DenoiserPart, measure
from ckptq.denoise_cost import reads, refuse_unrunnable, room
from ckptq.denoise_run import Call, Later
from ckptq.errors import CalibrationError, CkptqError, DataError, RecipeError, UnsupportedError
from ckptq.plan import Observer
from ckptq.scopes.denoisers import Denoiser, all_denoisers, find_denoiser
from ckptq.sections import PromptCalibration

CPU = torch.device("cpu")
PROMPTS: Mapping[str, Any] = {
    "source": "prompts", "prompts": ["A red door.", "Two gulls over a grey harbor, early light", "x"], "negative_prompt": "blurry",
    "steps": 3, "height": 64, "width": 64, "frames": 5, "guidance": 4.0, "seed": 3,
}  # fmt: skip
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Writes the tiny pipeline of a name, once for equal options."""

    @cache
    def made(name: str, **options: Any) -> Path:
        folder = tmp_path_factory.mktemp(name)
        pipelines()[name].make(folder, **options)
        if name == "flux2":  # the processor of its images wants torchvision
            edit(folder, tokenizer=["transformers", "Qwen2Tokenizer"])
        return folder

    return made


def edit(folder: Path, **entries: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | entries), encoding="utf-8")


class Counting(Reader):
    """Counts what is read of each tensor."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.times: dict[str, float] = {}

    def read_into(self, tensor: SourceTensor, start: int, buffer: memoryview) -> None:
        name = tensor.spec.name
        self.times[name] = self.times.get(name, 0.0) + len(buffer) / tensor.spec.nbytes
        super().read_into(tensor, start, buffer)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def parts_of(inventory: Inventory, stack: ExitStack) -> dict[str, DenoiserPart]:
    """Every denoiser with observers for all that the server can have quantized."""
    found = {}
    assert inventory.pipeline is not None
    for component in inventory.components:
        denoiser = find_denoiser(component.config, inventory.pipeline["_class_name"])
        if denoiser is not None:
            reader = stack.enter_context(Counting(inventory.root, component))
            found[component.folder] = DenoiserPart(component, denoiser, observers(denoiser, component), reader)
    return found


def observers(denoiser: Denoiser, component: Component) -> list[Observer]:
    blocks = [(stack, number) for stack in denoiser.stacks for number in range(stack.count(component.config))]
    names = [
        (layer, f"{stack.prefix}.{number}.{shard}")
        for layer, (stack, number) in enumerate(blocks)
        for fused in stack.linears
        for shard in fused.shards
    ]
    stored = [(layer, name) for layer, name in names if f"{name}.weight" in component.tensors]
    return [Observer(name, kind, layer) for layer, name in stored for kind in ("input", "weight")]  # type: ignore[arg-type]


def hooked(folder: Path, parts: Mapping[str, DenoiserPart], settings: PromptCalibration) -> dict[str, dict[str, float]]:
    """What plain hooks on the resident pipeline see."""
    pipeline, found = load(folder), {name: {} for name in parts}  # type: dict[str, Any], dict[str, dict[str, float]]

    def note(name: str, table: dict[str, float]) -> Callable[..., None]:
        return lambda module, args: table.update({name: max(table.get(name, 0.0), float(args[0].abs().max()))})

    for component, part in parts.items():
        for observer in part.observers:
            if observer.kind == "input":
                module = getattr(pipeline, component).get_submodule(observer.module)
                module.register_forward_pre_hook(note(observer.name, found[component]))
    run(pipeline, settings)
    return found


def of_kind(table: Mapping[str, float], kind: str) -> dict[str, float]:
    return {name: amax for name, amax in table.items() if name.endswith(f".{kind}_amax")}


@pytest.mark.parametrize("name", ["qwen_image", "z_image", "flux2", "wan22"])
def test_amaxes_are_the_resident_pipelines_and_a_step_reads_a_denoiser_once(name: str, make: Make, stack: ExitStack) -> None:
    """With both guidance branches, refiners, blocks of two kinds, text encoders of four and two experts."""
    folder, settings = make(name), PromptCalibration(**PROMPTS)
    parts = parts_of(inventory := read_inventory(folder), stack)
    found = measure(folder, list(parts.values()), settings, CPU, Console(quiet=True))
    assert {part: of_kind(table, "input") for part, table in found.items()} == hooked(folder, parts, settings)
    times: list[int] = []
    for part in parts.values():
        stored = load_file(folder / part.component.folder / "diffusion_pytorch_model.safetensors")
        weights = {o.name: float(stored[f"{o.module}.weight"].abs().max()) for o in part.observers if o.kind == "weight"}
        assert of_kind(found[part.component.folder], "weight") == weights
        blocks = {f"{o.module}.weight" for o in part.observers}
        assert isinstance(part.reader, Counting)
        (count,) = {part.reader.times[name] for name in blocks}
        times.append(round(count))
    assert sum(times) == settings.steps
    assert reads(inventory, settings).total >= reads(inventory, settings).step * sum(times)


def test_guidance_and_steps_change_what_is_measured(make: Make, stack: ExitStack) -> None:
    """Else the equality of amaxes would say little about either."""
    folder = make("qwen_image")
    parts = list(parts_of(read_inventory(folder), stack).values())

    def measured(**more: Any) -> dict[str, float]:
        return of_kind(measure(folder, parts, PromptCalibration(**{**PROMPTS, **more}), CPU, Console(quiet=True))["transformer"], "input")

    usual = measured()
    for more in ({"guidance": 1.0}, {"steps": 1}, {"seed": 4}, {"negative_prompt": "noise, text"}):
        assert sum(usual[name] != amax for name, amax in measured(**more).items()) > len(usual) / 4, more
    assert measured() == usual


def test_amaxes_are_modelopts(make: Make, stack: ExitStack, tmp_path: Path) -> None:
    folder, given, theirs = make("qwen_image"), tmp_path / "settings.json", tmp_path / "amaxes.json"
    given.write_text(json.dumps(PROMPTS), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "tests/peers/resident_pipeline.py", folder, given, theirs], check=True, env=environment)
    parts = list(parts_of(read_inventory(folder), stack).values())
    ours = measure(folder, parts, PromptCalibration(**PROMPTS), CPU, Console(quiet=True))["transformer"]
    peers = json.loads(theirs.read_text(encoding="utf-8"))["transformer"]
    observed = {o.module: ours[o.name] for o in parts[0].observers if o.kind == "input"}
    assert observed == {module: peers[module] for module in observed}


def test_prompts_pass_in_waves_where_memory_is_short(make: Make, stack: ExitStack, capsys: pytest.CaptureFixture[str]) -> None:
    folder, settings = make("qwen_image"), PromptCalibration(**PROMPTS)
    inventory = read_inventory(folder)
    parts = list(parts_of(inventory, stack).values())
    plenty = measure(folder, parts, settings, CPU, Console(quiet=True))
    least = reads(inventory, settings).peak + 1
    assert measure(folder, parts, settings, CPU, Console(), memory=least) == plenty
    assert "in up to 6 waves" in capsys.readouterr().err  # three prompts, two branches of each
    with pytest.raises(RecipeError, match="too little"):
        measure(folder, parts, settings, CPU, Console(quiet=True), memory=least - 1)


def test_memory_does_not_grow_with_the_number_of_blocks(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {layers: _peak(make("qwen_image", layers=layers), monkeypatch) for layers in (2, 9)}
    assert peaks[9] < peaks[2] + 60_000, peaks  # a block takes five times that


def _peak(folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The most bytes that tensors held while blocks were read, less those of other tests."""
    held: list[int] = []
    block = denoise._Work.block

    def watched(self: Any, model: Any) -> None:
        held.append(_held())
        block(self, model)

    monkeypatch.setattr(denoise._Work, "block", watched)
    gc.collect()
    gc.freeze()  # what is there already is not looked at again
    with ExitStack() as stack:
        parts = list(parts_of(read_inventory(folder), stack).values())
        measure(folder, parts, PromptCalibration(**PROMPTS), CPU, Console(quiet=True))
    return max(held)


def _held() -> int:
    gc.collect()
    storages = {s._cdata: s.nbytes() for t in gc.get_objects() if isinstance(t, torch.Tensor) and not t.is_meta and (s := t.untyped_storage())}
    return sum(storages.values())
