"""`ckptq restore`: FP8 checkpoints back to BF16 ones that the libraries load."""

import functools
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
from pipelines import pipelines
from safetensors.torch import save_file
from test_storage import made, store

from ckptq import prepare as preparing
from ckptq import restore as restoring
from ckptq.checkpoint import read_inventory
from ckptq.console import Console
from ckptq.convert import convert
from ckptq.errors import DataError, OutputError, RecipeError, UnsupportedError
from ckptq.journal import STAGING, Journal
from ckptq.loading import load_component
from ckptq.recipe import load_recipe, parse_recipe
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


# Pipelines


CONVERTED = {
    "qwen_image": ("{transformer: fp8-dynamic, vae: fp8-storage, text_encoder: fp8-storage-channel}", "modelopt"),
    "omnigen2": ("{transformer: fp8-dynamic}", "modelopt"),  # whose linears are renamed, and joined
    "wan22": ("{transformer: fp8-dynamic, transformer_2: fp8-dynamic}", "modelopt"),
}
RENAMED = {
    "qwen_image": set(),
    "omnigen2": {"layers.0.feed_forward.gate_up_proj.weight", "layers.0.feed_forward.down_proj.weight"},
    "wan22": {"blocks.0.ffn.net_0.proj.weight", "blocks.0.ffn.net_2.weight"},
}


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """converted(name) -> (a pipeline, its conversion). Read only."""
    made = pipelines()

    @functools.cache
    def one(name: str) -> tuple[Path, Path]:
        root = tmp_path_factory.mktemp(name)
        made[name].make(root / "source")
        components, form = CONVERTED[name]
        recipe = f"model: {root}/source\noutput: {root}/fp8\ncomponents: {components}\nexport: {{format: {form}}}"
        job = preparing.prepare(parse_recipe(recipe, "r.yaml"))
        convert(job, resume=False, device="cpu", memory=None, console=Console(quiet=True))
        return root / "source", root / "fp8"

    return one


@pytest.mark.parametrize("name", CONVERTED)
def test_a_pipeline_comes_back_under_its_own_names(
    name: str, converted: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    source, fp8 = converted(name)
    stored = read(fp8 / "transformer")
    assert RENAMED[name] <= set(stored)
    report = run(fp8, tmp_path / "out")
    before, after = files(source), files(tmp_path / "out")
    assert set(before) == set(after)
    changed = {n for n in before if before[n] != after[n]}
    assert changed == {f"{folder}/{next((source / folder).glob('*.safetensors')).name}" for folder in report.weights}
    for folder, count in report.weights.items():
        plain, found = read(source / folder), read(tmp_path / "out" / folder)
        assert {n: (t.dtype, t.shape) for n, t in plain.items()} == {n: (t.dtype, t.shape) for n, t in found.items()}
        apart = {n: float((t.float() - plain[n].float()).norm() / plain[n].float().norm()) for n, t in found.items()}
        assert max(apart.values()) < 0.04
        other = {n for n in plain if not torch.equal(plain[n], found[n])}
        assert count <= len(other) <= 2 * count  # of two that were joined, one weight was stored


def test_diffusers_loads_what_comes_out(converted: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    """Of Wan, whose conversion it does not load: linears have other names there."""
    from diffusers import WanPipeline

    source, fp8 = converted("wan22")
    run(fp8, tmp_path / "out")
    found = WanPipeline.from_pretrained(tmp_path / "out", torch_dtype=torch.bfloat16)
    plain = WanPipeline.from_pretrained(source, torch_dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    latents, text = (
        torch.randn(1, 16, 1, 8, 8, generator=generator).bfloat16(),
        torch.randn(1, 6, 64, generator=generator).bfloat16(),
    )
    with torch.no_grad():
        ours, theirs = (pipeline.transformer(latents, torch.tensor([500]), text).sample.float() for pipeline in (found, plain))
    assert 0 < float((ours - theirs).norm() / theirs.norm()) < 0.1


def test_a_pipeline_takes_loaded_components(converted: Callable[[str], tuple[Path, Path]]) -> None:
    """The loader's few lines: without them the pipeline is refused, by the section that has no quant_method."""
    from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

    source, fp8 = converted("qwen_image")
    transformer = QwenImageTransformer2DModel.from_pretrained(source / "transformer", torch_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="quant_method"):
        QwenImagePipeline.from_pretrained(fp8, transformer=transformer, torch_dtype=torch.bfloat16)
    loaded = {name: load_component(fp8 / name, dtype=torch.bfloat16) for name in ("vae", "text_encoder")}
    pipeline = QwenImagePipeline.from_pretrained(fp8, transformer=transformer, torch_dtype=torch.bfloat16, **loaded)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red cube", num_inference_steps=1, height=32, width=32, output_type="np").images
    assert image.shape == (1, 32, 32, 3)


def test_our_language_model_comes_back(example_model: Path, tmp_path: Path) -> None:
    recipe = "qwen25vl-lm-fp8-dynamic-compressed-tensors"
    job = preparing.prepare(load_recipe(recipe, model=str(example_model), output=str(tmp_path / "fp8")))
    convert(job, resume=False, device="cpu", memory=None, console=Console(quiet=True))
    report = run(tmp_path / "fp8", tmp_path / "out")
    plain, found = read(example_model), read(tmp_path / "out")
    assert plain.keys() == found.keys()
    other = [n for n in plain if not torch.equal(plain[n], found[n])]
    assert len(other) == report.weights[""] > 20
    assert all(float((found[n].float() - plain[n].float()).norm() / plain[n].float().norm()) < 0.04 for n in other)
    assert {n for n in files(example_model) if ".safetensors" not in n} == {
        n for n in files(tmp_path / "out") if ".safetensors" not in n
    }


def test_experts_that_were_together_are_told_of(tmp_path: Path) -> None:
    weight = {"model.language_model.layers.0.mlp.experts.0.up_proj.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}
    weight |= {"model.language_model.layers.0.mlp.experts.0.up_proj.weight_scale": torch.ones(4, 1)}
    for name, count in (("Qwen3VLMoeForConditionalGeneration", 1), ("Qwen3MoeForCausalLM", 0)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"architectures": [name], "quantization_config": {"quant_method": "fp8"}}))
        save_file(weight, folder / "model.safetensors")
        assert len(prepare(str(folder)).notes) == count


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
    save_file({n.replace("q_proj.weight_scale", "q_proj.qzeros"): t for n, t in tensors.items()}, broken / "model.safetensors")
    with pytest.raises(UnsupportedError, match="only FP8"):
        prepare(str(broken))


def test_a_code_that_is_no_number_leaves_no_output(made: Callable[[str], Path], tmp_path: Path) -> None:
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


def test_no_tensor_is_whole_in_memory(tmp_path: Path) -> None:
    """One of 272 MB of codes, which become twice as much."""
    folder = tmp_path / "fp8"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    codes, scale = 9216 * 29568, 4 * 9216
    text = json.dumps(
        {
            "a.weight_scale": {"dtype": "F32", "shape": [9216, 1], "data_offsets": [0, scale]},
            "a.weight": {"dtype": "F8_E4M3", "shape": [9216, 29568], "data_offsets": [scale, scale + codes]},
        }
    ).encode()
    with (folder / "model.safetensors").open("wb") as file:  # its data is a hole, which takes no disk
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + scale + codes)
    done = command(folder, tmp_path / "out", "--format", "json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["peak_rss"] < 350e6
