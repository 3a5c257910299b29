"""`ckptq restore`: FP8 checkpoints back to BF16 ones that the libraries load."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from make_fp8 import FORMS, make_fp8, read
from test_storage import made, store

from ckptq import restore as restoring
from ckptq.checkpoint import read_inventory
from ckptq.console import Console
from ckptq.errors import DataError, OutputError, RecipeError, UnsupportedError
from ckptq.journal import STAGING, Journal
from ckptq.loading import load_component
from ckptq.restore import prepare, restore
from ckptq.storage import STORAGES

__all__ = ["made"]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::FutureWarning:diffusers")


def run(source: Path, output: Path, **options: Any) -> restoring.Restored:
    job = prepare(str(source), options.pop("shard_size", restoring.SHARD_SIZE))
    return restore(job, output, Console(quiet=True), **options)


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# Language models


@pytest.mark.parametrize("name", FORMS)
def test_a_language_model_comes_back_with_every_other_byte_as_it_was(name: str, example_model: Path, tmp_path: Path) -> None:
    source, stands_for = make_fp8(example_model, tmp_path / "fp8", FORMS[name])
    report = run(source, tmp_path / "out")
    plain, found = read(example_model), read(tmp_path / "out")
    assert set(found) == set(plain)
    assert report.weights == {"": len(stands_for)}
    for tensor, value in found.items():
        assert torch.equal(value, stands_for.get(tensor, plain[tensor])), tensor
        assert value.dtype == plain[tensor].dtype
    kept = {n: b for n, b in files(example_model).items() if ".safetensors" not in n}
    assert {n: b for n, b in files(tmp_path / "out").items() if ".safetensors" not in n} == kept


def test_transformers_loads_what_comes_out(example_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    source, _ = make_fp8(example_model, tmp_path / "fp8", FORMS["modelopt"])
    run(source, tmp_path / "out", shard_size=4_000_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    original = AutoModelForImageTextToText.from_pretrained(example_model)
    assert model.dtype == torch.bfloat16
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        ours, theirs = model(tokens).logits.float(), original(tokens).logits.float()
    assert float((ours - theirs).norm() / theirs.norm()) < 0.1


# Components


@pytest.mark.parametrize("action", STORAGES)
@pytest.mark.parametrize("name", ["qwen_vae", "qwen3", "clip"])
def test_the_loaders_model_is_that_of_the_restored_files(
    name: str, action: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    import diffusers
    import transformers

    cls, options = {
        "qwen_vae": (diffusers.AutoencoderKLQwenImage, {"torch_dtype": torch.bfloat16}),
        "qwen3": (transformers.Qwen3ForCausalLM, {"dtype": torch.bfloat16}),
        "clip": (transformers.CLIPTextModelWithProjection, {}),
    }[name]
    store(read_inventory(made(name)), tmp_path / "fp8", action)
    run(tmp_path / "fp8", tmp_path / "out")
    plain = cls.from_pretrained(tmp_path / "out", **options)
    for given in (None, cls):
        model = load_component(tmp_path / "fp8", given, dtype=torch.bfloat16 if options else None)
        assert type(model) is cls
        ours, theirs = dict(model.state_dict()), dict(plain.state_dict())
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours)
        assert {n: p.dtype for n, p in model.named_buffers()} == {n: p.dtype for n, p in plain.named_buffers()}
    original = json.loads((made(name) / "config.json").read_text())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == original
    if name == "qwen_vae":
        latents = torch.randn(1, 16, 1, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
        with torch.no_grad():
            assert torch.equal(model.decode(latents).sample, plain.decode(latents).sample)


# A run of it


def test_a_finished_output_is_not_written_again(made: Callable[[str], Path], tmp_path: Path) -> None:
    store(read_inventory(made("clip")), tmp_path / "fp8", "fp8-storage")
    run(tmp_path / "fp8", tmp_path / "out")
    before = files(tmp_path / "out")
    with pytest.raises(OutputError, match="exists already"):
        run(tmp_path / "fp8", tmp_path / "out")
    assert files(tmp_path / "out") == before
    assert not (tmp_path / "out" / STAGING).exists()


def test_what_was_finished_is_not_done_again(made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that dies between two files goes on with the second, to the same bytes."""
    from ckptq import pipeline

    store(read_inventory(made("qwen_vae")), tmp_path / "fp8", "fp8-storage")
    run(tmp_path / "fp8", tmp_path / "whole", shard_size=100_000)
    write = pipeline.write_shards

    def first(folder: Path, plan: Any, shards: Any, *rest: Any) -> None:
        write(folder, plan, shards[:1], *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "write_shards", first)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "fp8", tmp_path / "out", shard_size=100_000)
    assert not list((tmp_path / "out").glob("*"))[1:]
    with pytest.raises(OutputError, match="an interrupted job is there"):
        run(tmp_path / "fp8", tmp_path / "out", shard_size=100_000)
    done: list[str] = []

    def rest(folder: Path, plan: Any, shards: Any, *more: Any) -> None:
        done.extend(shard.file for shard in shards)
        write(folder, plan, shards, *more)

    monkeypatch.setattr(pipeline, "write_shards", rest)
    with pytest.raises(OutputError, match="another one"):
        run(tmp_path / "fp8", tmp_path / "out", shard_size=200_000, resume=True)
    run(tmp_path / "fp8", tmp_path / "out", shard_size=100_000, resume=True)
    whole = files(tmp_path / "whole")
    assert files(tmp_path / "out") == whole
    assert len(done) == sum(n.endswith(".safetensors") for n in whole) - 1


def test_what_is_not_fp8_is_refused(made: Callable[[str], Path], example_model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is not quantized, so there is nothing to restore"):
        prepare(str(example_model))
    store(read_inventory(made("clip")), tmp_path / "fp8", "fp8-storage")
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    broken = shutil.copytree(tmp_path / "fp8", tmp_path / "other")
    tensors = read(broken)
    from safetensors.torch import save_file

    save_file({n.replace("q_proj.weight_scale", "q_proj.qzeros"): t for n, t in tensors.items()}, broken / "model.safetensors")
    with pytest.raises(UnsupportedError, match="only FP8"):
        prepare(str(broken))


def test_a_code_that_is_no_number_leaves_no_output(made: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    store(read_inventory(made("clip")), tmp_path / "fp8", "fp8-storage")
    tensors = read(tmp_path / "fp8")
    tensors["text_projection.weight"].view(torch.uint8)[1, 1] = 0x7F
    save_file(tensors, tmp_path / "fp8" / "model.safetensors")
    with pytest.raises(DataError, match=r"text_projection.weight: holds NaN"):
        run(tmp_path / "fp8", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# The command


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "ckptq", "restore", *map(str, arguments)], capture_output=True, text=True)


def test_the_command(made: Callable[[str], Path], tmp_path: Path) -> None:
    store(read_inventory(made("clip")), tmp_path / "fp8", "fp8-storage")
    planned = command(tmp_path / "fp8", tmp_path / "out", "--dry-run", "--format", "json")
    assert planned.returncode == 0, planned.stderr
    plan = json.loads(planned.stdout)
    assert plan["restored"][""]["weights"] == 13
    assert not (tmp_path / "out").exists()
    human = command(tmp_path / "fp8", tmp_path / "out", "--dry-run")
    assert "13 FP8 weights are dequantized to BF16" in " ".join(human.stdout.split())
    done = command(tmp_path / "fp8", tmp_path / "out", "--format", "json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["weights"] == {"": 13}
    assert plan["output_bytes"] == report["output_bytes"]
    again = command(tmp_path / "fp8", tmp_path / "out")
    assert (again.returncode, again.stdout) == (2, "")
    assert "exists already" in again.stderr
    nothing = command(tmp_path / "out", tmp_path / "twice")
    assert (nothing.returncode, nothing.stdout) == (2, "")
    assert "nothing to restore" in nothing.stderr
    assert Journal(tmp_path / "out").written_bytes() == 0
