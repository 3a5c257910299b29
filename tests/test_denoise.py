"""Amaxes of denoisers: the resident pipeline's bit for bit, each step read once, in memory that no number of blocks raises."""

import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peers.resident_pipeline import load, run
from pipelines import pipelines
from safetensors.torch import load_file, save_file

from ckptq import denoise
from ckptq.calibration import Sample
from ckptq.checkpoint import Component, Inventory, Reader, SourceTensor, read_inventory
from ckptq.console import Console
from ckptq.denoise import DenoiserPart, measure
from ckptq.denoise_cost import BUFFERS, IMPORTS, Reads, reads, refuse_unrunnable, room
from ckptq.denoise_pipeline import arguments
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


@pytest.mark.parametrize("name", ["qwen_image", "z_image", "flux2", "flux2_klein", "wan22"])
def test_amaxes_are_the_resident_pipelines_and_a_step_reads_a_denoiser_once(name: str, make: Make, stack: ExitStack) -> None:
    """With both guidance branches, refiners, blocks of two kinds, text encoders of four and two experts."""
    folder, settings = make(name), PromptCalibration(**PROMPTS)
    parts = parts_of(inventory := read_inventory(folder), stack)
    found = measure(folder, list(parts.values()), settings, CPU, Console(quiet=True))
    assert {part: of_kind(table, "input") for part, table in found.items()} == hooked(folder, parts, settings)
    passes = read = 0
    for part in parts.values():
        stored = load_file(folder / part.component.folder / "diffusion_pytorch_model.safetensors")
        weights = {o.name: float(stored[f"{o.module}.weight"].abs().max()) for o in part.observers if o.kind == "weight"}
        assert of_kind(found[part.component.folder], "weight") == weights
        assert isinstance(part.reader, Counting)
        times = part.reader.times
        (count,) = {times[f"{o.module}.weight"] for o in part.observers}
        passes += round(count)
        blocks = tuple(f"{block.prefix}." for block in part.denoiser.stacks)
        read += sum(part.component.tensors[n].spec.nbytes * round(times[n]) for n in times if n.startswith(blocks))
    assert passes == settings.steps
    assert read == reads(inventory, settings).total


def test_guidance_and_steps_change_what_is_measured(make: Make, stack: ExitStack) -> None:
    """Else the equality of amaxes would say little about either."""
    folder = make("qwen_image")
    parts = list(parts_of(read_inventory(folder), stack).values())

    def measured(**more: Any) -> dict[str, float]:
        return of_kind(
            measure(folder, parts, PromptCalibration(**{**PROMPTS, **more}), CPU, Console(quiet=True))["transformer"], "input"
        )

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
    least = replace(reads(inventory, settings), ahead=0).peak + 1
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
    storages = {
        s._cdata: s.nbytes()
        for t in gc.get_objects()
        if isinstance(t, torch.Tensor) and not t.is_meta and (s := t.untyped_storage())
    }
    return sum(storages.values())


def test_each_prompt_has_noise_and_guidance_of_its_own() -> None:
    """Guidance goes where a pipeline of two branches takes it, or one that is distilled."""

    class Pipeline:
        def __init__(self, *, distilled: bool) -> None:
            self.transformer = SimpleNamespace(config=SimpleNamespace(guidance_embeds=distilled))

        def __call__(
            self, prompt: str, negative_prompt: str, generator: Any, true_cfg_scale: float = 1.0, guidance_scale: float = 1.0
        ) -> None: ...

    samples = [Sample("a", "one"), Sample("b", "two", negative="dull")]
    settings = PromptCalibration(source="prompts", guidance=3, seed=7)
    first, second = (arguments(Pipeline(distilled=False), settings, s, n) for n, s in enumerate(samples))
    assert [given["generator"].initial_seed() for given in (first, second)] == [7, 8]
    assert [given["negative_prompt"] for given in (first, second)] == [" ", "dull"]
    assert (first["true_cfg_scale"], "guidance_scale" in first) == (3, False)
    distilled = arguments(Pipeline(distilled=True), settings, samples[0], 0)
    assert (distilled["guidance_scale"], "true_cfg_scale" in distilled) == (3, False)


# What can't be run


def test_an_expert_that_no_step_reaches_is_named(make: Make, stack: ExitStack) -> None:
    folder = make("wan22")
    parts = list(parts_of(read_inventory(folder), stack).values())
    with pytest.raises(DataError, match="transformer_2: none of the 1 denoising steps runs it") as found:
        measure(folder, parts, PromptCalibration(**{**PROMPTS, "steps": 1}), CPU, Console(quiet=True))
    assert "boundary_ratio" in str(found.value.hint)


def test_nan_in_activations_names_prompt_and_module(make: Make, stack: ExitStack, tmp_path: Path) -> None:
    """Infinity squared, in the second block alone: the stored weights are finite."""
    folder = shutil.copytree(make("qwen_image"), tmp_path / "huge")
    path = folder / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["transformer_blocks.0.img_mlp.net.2.weight"] *= 1e38
    save_file(tensors, path)
    parts = list(parts_of(read_inventory(folder), stack).values())
    with pytest.raises(DataError, match=r"transformer_blocks\.1\..*NaN or infinite activations in layer 1 with sample prompt"):
        measure(folder, parts, PromptCalibration(**PROMPTS), CPU, Console(quiet=True))


@pytest.mark.parametrize(
    ("entries", "error", "message"),
    [
        ({"transformer": ["my_blocks", "QwenImageTransformer2DModel"]}, UnsupportedError, "class of 'my_blocks'"),
        ({"_class_name": "QwenImageDMD2Pipeline"}, UnsupportedError, "has no such pipeline"),
        (
            {"tokenizer": ["transformers", "NoTokenizer"]},
            UnsupportedError,
            "NoTokenizer, which transformers has not",
        ),
        ({"_class_name": "QwenImageEditPipeline", "processor": [None, None]}, CalibrationError, "edits an image, and the prompt"),
    ],
)
def test_a_pipeline_that_can_not_run_is_refused(
    entries: Mapping[str, Any], error: type[CkptqError], message: str, make: Make, stack: ExitStack, tmp_path: Path
) -> None:
    folder = shutil.copytree(make("qwen_image"), tmp_path / "edited")
    edit(folder, **entries)
    parts = list(parts_of(read_inventory(folder), stack).values())
    with pytest.raises(error, match=message):
        measure(folder, parts, PromptCalibration(**PROMPTS), CPU, Console(quiet=True))


def test_a_text_encoder_in_a_pickle_is_refused_and_a_vae_is_not_wanted(make: Make, stack: ExitStack, tmp_path: Path) -> None:
    folder = shutil.copytree(make("qwen_image"), tmp_path / "pickles")
    (folder / "vae/diffusion_pytorch_model.safetensors").rename(folder / "vae/diffusion_pytorch_model.bin")
    parts = list(parts_of(read_inventory(folder), stack).values())
    settings = PromptCalibration(**{**PROMPTS, "steps": 1})
    assert measure(folder, parts, settings, CPU, Console(quiet=True))["transformer"]
    (folder / "text_encoder/model.safetensors").rename(folder / "text_encoder/pytorch_model.bin")
    with pytest.raises(UnsupportedError, match="text_encoder: has no weights in safetensors"):
        measure(folder, parts, settings, CPU, Console(quiet=True))


def test_denoisers_that_diffusers_has_not_are_refused_before_anything_is_read() -> None:
    without = [d for d in all_denoisers() if not d.builder]
    assert {"omnigen2"} <= {d.name for d in without}
    for denoiser in without:
        pipeline = {"_class_name": denoiser.pipelines[0]} if denoiser.pipelines else None
        with pytest.raises(UnsupportedError, match="diffusers has no pipeline of it") as found:
            refuse_unrunnable(pipeline, denoiser)
        assert "fp8-dynamic" in str(found.value.hint)


# Answers that come later


def test_what_is_done_with_an_answer_is_done_with_the_value() -> None:
    """Without waiting for it only indexing and `float` are done."""
    value, asked = torch.arange(6.0, dtype=torch.bfloat16).view(2, 3) + 1, []

    def later() -> Any:
        def find() -> tuple[torch.Tensor]:
            asked.append(1)
            return (value,)

        return Later(find)[0]

    later()[:, :2].float()
    assert not asked
    assert torch.equal(later()[:, :2].float() * 2, value[:, :2].float() * 2)
    other = torch.ones(2, 3)
    for ours, plain in (
        (later() - other, value - other),
        (other - later(), other - value),
        (2 * later() / 3, 2 * value / 3),
        (-later(), -value),
        (torch.norm(later(), dim=-1), torch.norm(value, dim=-1)),
        (torch.cat([later(), other]), torch.cat([value, other])),
        (later().to(torch.float64).sum(), value.to(torch.float64).sum()),
        (torch.stack([row for row in later()]), value),  # noqa: C416
    ):
        assert torch.equal(ours, plain)
    assert (len(later()), later().shape) == (2, value.shape)


def test_an_argument_that_changes_before_the_call_runs_is_an_error() -> None:
    class Model:
        folder = "transformer"
        blocks = ()

    latents = torch.zeros(2)
    call = Call(Model(), lambda given: given, ([latents],), {})  # type: ignore[arg-type]
    latents += 1
    with pytest.raises(RuntimeError, match="changes what it has given to transformer"):
        call.run()


# What it takes


def test_what_memory_leaves_for_prompts() -> None:
    needed = Reads(step=100, steps=2, resident=10, block=50, encoders=500)
    assert (needed.total, needed.peak) == (200, IMPORTS + BUFFERS + 500)
    assert room(needed, needed.peak + 7, free=0) == 7
    assert room(needed, None, free=10**9) == 8 * 10**8 - BUFFERS - 500
    with pytest.raises(RecipeError, match="too little"):
        room(needed, needed.peak, free=0)
