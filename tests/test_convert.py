"""Whole conversions of the example model in the other forms in which Qwen2.5-VL checkpoints are met."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ckptq.checkpoint import INDEX
from ckptq.console import Console
from ckptq.convert import Report, convert, prepare
from ckptq.errors import DataError
from ckptq.numerics import fp8
from ckptq.recipe import load_recipe
from ckptq.schemes import Scheme
from ckptq.scopes.qwen2_5_vl import SCOPE
from ckptq.validate import validate_folder

ROOT = Path(__file__).parent.parent


def edit_config(model: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((model / "config.json").read_text())
    change(config)
    (model / "config.json").write_text(json.dumps(config, indent=2))


def as_first_published(model: Path) -> None:
    """config.json as on the Hub: the language model's keys at the top, and older names for some."""

    def flatten(config: dict[str, Any]) -> None:
        text = config.pop("text_config")
        rope = text.pop("rope_parameters")
        for key in ("layer_types", "model_type", "pad_token_id", "tie_word_embeddings"):
            text.pop(key)
        config.update(text, torch_dtype=config.pop("dtype"), rope_theta=rope["rope_theta"])
        config["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        vision = config["vision_config"]
        vision["in_chans"] = vision.pop("in_channels")
        vision.pop("rope_parameters")

    edit_config(model, flatten)


def with_newer_names(model: Path) -> None:
    """Tensor names as transformers 4.52 began to save them, in one file."""
    tensors = {}
    for file in sorted(model.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (model / INDEX).unlink()
    save_file({newer(name): tensor for name, tensor in tensors.items()}, model / "model.safetensors", metadata={"format": "pt"})


def newer(name: str) -> str:
    return next((long + name[len(short) :] for long, short in reversed(SCOPE.generations) if name.startswith(short)), name)


def tied(model: Path) -> None:
    """No lm_head of its own, as the 3B."""
    index = json.loads((model / INDEX).read_text())
    file = model / index["weight_map"].pop("lm_head.weight")
    save_file({k: v for k, v in load_file(file).items() if k != "lm_head.weight"}, file, metadata={"format": "pt"})
    (model / INDEX).write_text(json.dumps(index))
    edit_config(model, lambda config: config.update(tie_word_embeddings=True))


def converted(model: Path, output: Path) -> dict[str, float]:
    """{observer: amax} of a finished, clean output."""
    recipe = load_recipe("demo", ["calibration.samples=4"], model=str(model), output=str(output))
    convert(prepare(recipe), resume=False, device="cpu", memory=None, console=Console(quiet=True))
    assert validate_folder(output, source=model) == []
    amax: dict[str, float] = json.loads((output / "ckptq.json").read_text())["amax"]
    return amax


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def amax(example_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return converted(example_model, tmp_path_factory.mktemp("plain") / "out")


def test_config_as_first_published(amax: dict[str, float], copy_model: Callable[[Path], Path], tmp_path: Path) -> None:
    as_first_published(model := copy_model(tmp_path))
    assert converted(model, tmp_path / "out") == amax


def test_newer_names(amax: dict[str, float], copy_model: Callable[[Path], Path], tmp_path: Path) -> None:
    with_newer_names(model := copy_model(tmp_path))
    found = converted(model, tmp_path / "out")
    assert found == {newer(name): value for name, value in amax.items()}
    assert all(name.startswith("model.language_model.layers.") for name in found)


def test_tied_head(amax: dict[str, float], copy_model: Callable[[Path], Path], tmp_path: Path) -> None:
    """Amaxes are those of the layers, which the head has no part in."""
    tied(model := copy_model(tmp_path))
    assert converted(model, tmp_path / "out") == amax


def test_tied_head_that_is_stored_too(amax: dict[str, float], copy_model: Callable[[Path], Path], tmp_path: Path) -> None:
    edit_config(model := copy_model(tmp_path), lambda config: config.update(tie_word_embeddings=True))
    assert converted(model, tmp_path / "out") == amax


def test_norms_stored_wider(amax: dict[str, float], copy_model: Callable[[Path], Path], tmp_path: Path) -> None:
    """Computed with in the model's dtype, as the server does; carried over as they are."""
    model = copy_model(tmp_path)
    for file in model.glob("*.safetensors"):
        tensors = {name: t.float() if "norm" in name else t for name, t in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    assert converted(model, tmp_path / "out") == amax


def test_equal_runs_write_equal_folders(example_model: Path, tmp_path: Path) -> None:
    """Whatever the output is called: no time, path or host gets into it."""
    for name in ("one", "another"):
        converted(example_model, tmp_path / name)
    one, another = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "another"))
    assert one == another
    assert not any(str(tmp_path).encode() in content for content in one.values())


# The validator before the arithmetic and after it


def add_tensor(model: Path, name: str) -> None:
    index = json.loads((model / INDEX).read_text())
    file = model / max(index["weight_map"].values())
    save_file(load_file(file) | {name: torch.ones(1)}, file, metadata={"format": "pt"})
    index["weight_map"][name] = file.name
    (model / INDEX).write_text(json.dumps(index))


def start(model: Path, output: Path, console: Console, *settings: str) -> Report:
    recipe = load_recipe("demo", ["calibration.samples=2", *settings], model=str(model), output=str(output))
    return convert(prepare(recipe), resume=False, device="cpu", memory=None, console=console)


def test_a_plan_that_would_not_be_served_right_costs_no_arithmetic(copy_model: Callable[[Path], Path], tmp_path: Path) -> None:
    add_tensor(model := copy_model(tmp_path), "visual.blocks.0.attn.k_proj.k_scale")
    console = Console(quiet=True)
    with pytest.raises(DataError, match=r"planned output would not be served right:\n  - layout\.kv-on-tower: visual") as caught:
        start(model, tmp_path / "out", console)
    assert "KeyError: 'blocks.0.attn.k_proj.k_scale'" in str(caught.value)
    assert console.seconds == {}, "a stage ran"
    assert not (tmp_path / "out").exists()


def test_warnings_of_the_plan_are_told_before_anything_runs(
    copy_model: Callable[[Path], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    add_tensor(model := copy_model(tmp_path), "lm_head.bias")
    report = start(model, tmp_path / "out", Console())
    assert report.carried == ("lm_head.bias",)
    bias = next(f for f in report.findings if f.code == "values.bias-dropped")
    assert bias.severity == "warning", "the source's own fault, which a conversion does not mend"
    first, *_ = capfd.readouterr().err.splitlines()
    assert first.startswith("warning: of the planned output: layout.unknown-tensor: lm_head.bias: stored: vLLM has no place ")


def test_all_experts_of_a_model_without_any_is_said_to_do_nothing(
    example_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    start(example_model, tmp_path / "out", Console(), "calibration.all_experts=true")
    assert "warning: calibration.all_experts does nothing here: this model has no routed experts" in capfd.readouterr().err


def test_an_output_that_would_not_be_served_right_is_not_published(
    example_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fp8.encode

    def zeros(values: Tensor, scheme: Scheme, whole: float, codes: Tensor, *others: Any) -> None:
        real(values, scheme, whole, codes, *others)
        codes.zero_()

    monkeypatch.setattr(fp8, "encode", zeros)
    with pytest.raises(DataError, match=r"failed validation and was not published:\n  - passthrough\.weight-error: model\.layers"):
        start(example_model, tmp_path / "out", Console(quiet=True))
    assert not (tmp_path / "out" / "config.json").exists()
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_copy_that_went_wrong_is_not_published(example_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests of copies are taken of the source, so that the files are held to it, not to what was written."""

    def nothing(source: int, target: int, count: int, at: int, to: int) -> int:
        return os.pwrite(target, bytes(count), to)

    monkeypatch.setattr(os, "copy_file_range", nothing)
    with pytest.raises(DataError, match=r"failed validation and was not published:\n(.*\n)*  - record\.tensor-changed: lm_head"):
        start(example_model, tmp_path / "out", Console(quiet=True))
    assert not (tmp_path / "out" / "config.json").exists()
