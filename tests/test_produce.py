"""Writing while the samples run, as on a GPU: the same output, and what fails in one ends the other."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptq import produce
from ckptq.console import Console
from ckptq.convert import convert, prepare
from ckptq.errors import CalibrationError, DataError
from ckptq.recipe import load_recipe

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(produce, "at_once", lambda _: True)


def start(model: Path, output: Path, *settings: str, resume: bool = False) -> None:
    recipe = load_recipe(
        "demo", ["calibration.samples=4", "export.shard_size=2MB", *settings], model=str(model), output=str(output)
    )
    convert(prepare(recipe), resume=resume, device="cpu", memory=None, console=Console(quiet=True))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("scheme", ["fp8", "nvfp4", "mxfp8"])
def test_the_output_is_that_of_one_after_the_other(
    example_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """Weights under one scale, under two, and with no amax of their own; inputs and the KV cache measured meanwhile."""
    start(example_model, tmp_path / "both", f"quantize.0.scheme={scheme}")
    monkeypatch.setattr(produce, "at_once", lambda _: False)
    start(example_model, tmp_path / "turns", f"quantize.0.scheme={scheme}")
    assert contents(tmp_path / "both") == contents(tmp_path / "turns")


def test_an_odd_weight_ends_the_calibration(copy_model: Callable[[Path], Path], tmp_path: Path) -> None:
    """lm_head meets no sample: the thread that writes finds it."""
    model = copy_model(tmp_path / "model")
    file = next(path for path in model.glob("*.safetensors") if "lm_head.weight" in load_file(path))
    tensors = load_file(file)
    tensors["lm_head.weight"][7, 7] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    threads = threading.active_count()
    with pytest.raises(DataError, match=r"lm_head\.weight: holds NaN"):
        start(model, tmp_path / "out", "calibration.samples=64")
    assert threading.active_count() == threads
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.safetensors"))


def test_a_failed_calibration_ends_the_writing(example_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise CalibrationError("no more samples")

    monkeypatch.setattr(produce, "_calibrate", fail)
    threads = threading.active_count()
    with pytest.raises(CalibrationError, match="no more samples"):
        start(example_model, tmp_path / "out")
    assert threading.active_count() == threads
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_an_interrupt_ends_the_writing(example_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for what is left to write once the samples have run."""
    monkeypatch.setattr(produce, "_calibrate", lambda job, *_: {o.name: 1.0 for o in job.plan.observers})

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(produce._Tally, "show", interrupt)
    with pytest.raises(KeyboardInterrupt):
        start(example_model, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_a_killed_run_goes_on(example_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped when the amaxes are saved and no file is finished."""
    start(example_model, tmp_path / "whole")
    kept = produce._Tally.show

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(produce._Tally, "show", kill)
    with pytest.raises(KeyboardInterrupt):
        start(example_model, tmp_path / "out")
    monkeypatch.setattr(produce._Tally, "show", kept)
    start(example_model, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
