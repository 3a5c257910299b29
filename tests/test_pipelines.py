"""Whole pipelines through `convert`: what is routed where, what stays byte for byte, what is refused, what a killed run leaves."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from huggingface_hub import constants
from pipelines import pipelines
from safetensors.torch import load_file, save_file

from ckptq import hub, restore, writer
from ckptq.checkpoint import read_inventory
from ckptq.cli import main
from ckptq.console import Console
from ckptq.convert import Report, convert
from ckptq.errors import CkptqError, DataError, OutputError, SourceError
from ckptq.prepare import prepare
from ckptq.recipe import parse_recipe
from ckptq.scopes.denoisers import all_denoisers
from ckptq.validate import examine
from ckptq.validators import has_errors

DYNAMIC = "components: {transformer: fp8-dynamic, text_encoder: keep, vae: keep}\n"
STATIC = "components: {transformer: fp8}\ncalibration: {source: prompts, samples: 2, steps: 2, height: 64, width: 64}\n"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines") / "qwen-image"
    pipelines()["qwen_image"].make(folder)
    return folder


def job(recipe: str, source: Path, output: Path) -> Any:
    return prepare(parse_recipe(recipe, "recipe", model=str(source), output=str(output)))


def run(recipe: str, source: Path, output: Path, *, resume: bool = False) -> Report:
    return convert(job(recipe, source, output), resume=resume, device="cpu", memory=None, console=Console(quiet=True))


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", [d.name for d in all_denoisers() if d.pipelines])
def test_what_no_line_names_stays_byte_for_byte(name: str, tmp_path: Path) -> None:
    """Every file outside the denoisers is equal, and a denoiser's config.json gains its section and nothing else."""
    made = pipelines()[name]
    made.make(source := tmp_path / "source")
    denoiser = next(d for d in all_denoisers() if d.name == name)
    form, scheme = next((f, s) for f, schemes in denoiser.formats.items() for s in ("fp8-dynamic", "fp8-tensor") if s in schemes)
    components = ", ".join(f"{folder}: {scheme}" for folder in made.denoisers)
    run(f"components: {{{components}}}\nexport: {{format: {form}}}\n", source, tmp_path / "out")
    before, after = files(source), files(tmp_path / "out")
    assert {n: d for n, d in after.items() if not n.startswith(made.denoisers) and n != "ckptq.json"} == {
        n: d for n, d in before.items() if not n.startswith(made.denoisers)
    }
    for folder in made.denoisers:
        config = json.loads(after[f"{folder}/config.json"])
        assert config.pop("quantization_config")["quant_method"] == form
        assert config == json.loads(before[f"{folder}/config.json"])
    expected = {"omnigen2": {"layout.omni-alignment"}}  # 2520 of the real one is no multiple of 16, nor is the tiny one's size
    found = examine(tmp_path / "out", source=source).findings
    assert {finding.code for finding in found} - {"config.omni-option"} == expected.get(name, set())
    assert not has_errors(found)


def test_unquantized_tensors_of_a_denoiser_are_the_sources(qwen: Path, tmp_path: Path) -> None:
    run(DYNAMIC, qwen, tmp_path / "out")
    before = load_file(qwen / "transformer" / "diffusion_pytorch_model.safetensors")
    after = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    codes = {name for name, tensor in after.items() if tensor.dtype == torch.float8_e4m3fn}
    assert codes == {n for n in before if n.endswith(".weight") and (".attn.to_" in n or ".attn.add_" in n or "_mlp.net." in n)}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name not in codes)
    scales = {f"{name.removesuffix('weight')}weight_scale" for name in codes}
    assert set(after) == {*before, *scales}


@pytest.mark.parametrize(
    ("recipe", "said", "hint"),
    [
        (
            "components: {tranformer: fp8-dynamic}",
            "components.tranformer: QwenImagePipeline has no such component; did you mean",
            "vae",
        ),
        (
            "components: {transformer: fp9}",
            "components.transformer (line 1): expected keep, a scheme, a storage form or a section",
            "",
        ),
        ("components: {transformer: {schem: fp8}}", "components.transformer.schem (line 1): unknown key; did you mean scheme?", ""),
        ("components: {scheduler: fp8-storage}", "components.scheduler: it has no weights in safetensors", "text_encoder"),
        (
            "components: {text_encoder: fp8-dynamic}",
            "no server is known that takes a quantized Qwen2_5_VLForConditionalGeneration",
            "fp8-storage",
        ),
        ("components: {transformer: keep}", "converts nothing", None),
        (
            "components: {transformer: {quantize: [{modules: '*.attn.*', scheme: fp8}, {modules: '*mlp.*', scheme: fp8-dynamic}]}}",
            "schemes fp8, fp8-dynamic: vLLM-Omni builds all linears of a denoiser in one",
            "one scheme",
        ),
        ("from_fp8: true\n" + DYNAMIC, "no component that the recipe converts is quantized", "leave --from-fp8 out"),
        ("components: {transformer: nvfp4}", "vLLM-Omni has no nvfp4 in the format modelopt for qwen_image", "another scheme"),
        (
            "components: {transformer: fp8}\ncalibration: {source: builtin}",
            "a denoiser is calibrated on prompts",
            "source: prompts",
        ),
        (
            "components: {transformer: {action: keep, quantize: [{modules: x, scheme: fp8}]}}",
            "expected one of action, scheme and",
            "",
        ),
        (
            "components: {transformer: {scheme: fp8-dynamic, keep: [blocks.0]}}",
            "keep pattern 'blocks.0' matches no module",
            "inspect",
        ),
        (
            "components: {transformer: {quantize: [{modules: 'img_in', scheme: fp8-dynamic}]}}",
            "matches no linear of the denoiser",
            "inspect",
        ),
        (
            "components: {transformer: {quantize: [{modules: '*', scheme: fp8-dynamic}]}}",
            "matches img_in, which is outside the denoiser's blocks",
            "transformer_blocks",
        ),
        (
            "components: {transformer: {scheme: fp8-dynamic, keep: ['*.to_q']}}",
            "the server fuses transformer_blocks.0.attn.to_q",
            "one rule",
        ),
        ("quantize: [{modules: transformer, scheme: fp8}]", "the source is a pipeline, QwenImagePipeline", "components:"),
        (DYNAMIC + "kv_cache: fp8", "kv_cache: belongs to a plain language model", None),
        (
            DYNAMIC + "quantize: [{modules: 'vae.decoder', scheme: fp8}]",
            "quantize (line 2): expected no rule for a component that is to be kept, found the pattern 'vae.decoder'",
            "",
        ),
        (DYNAMIC + "quantize: [{modules: 'transformer', scheme: fp8}]", "each has its own, under components.NAME.quantize", ""),
    ],
)
def test_routing_errors(recipe: str, said: str, hint: str | None, qwen: Path, tmp_path: Path) -> None:
    with pytest.raises(CkptqError) as caught:
        job(recipe + "\n", qwen, tmp_path / "out")
    assert said in str(caught.value)
    assert hint is None or hint in (caught.value.hint or "")


def test_settings_of_the_other_kind(qwen: Path, tmp_path: Path) -> None:
    example = Path(__file__).parent.parent / "examples" / "tiny-qwen2.5-vl"
    with pytest.raises(CkptqError, match="prompts: is for a pipeline's denoiser"):
        job("quantize: [{modules: model.layers, scheme: fp8}]\ncalibration: {source: prompts}\n", example, tmp_path / "out")
    with pytest.raises(CkptqError, match=r"calibration.all_experts \(line 2\): unknown key here; it belongs to source"):
        job("components: {transformer: fp8}\ncalibration: {source: prompts, all_experts: true}\n", qwen, tmp_path / "out")


def test_components_of_a_plain_model(tmp_path: Path) -> None:
    example = Path(__file__).parent.parent / "examples" / "tiny-qwen2.5-vl"
    with pytest.raises(CkptqError, match="is no pipeline: it has no model_index"):
        job(DYNAMIC, example, tmp_path / "out")


def test_what_a_pipeline_does_without_is_no_component(qwen: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen, source := tmp_path / "source")
    index = json.loads((source / "model_index.json").read_text()) | {"transformer_2": [None, None], "boundary_ratio": 0.9}
    (source / "model_index.json").write_text(json.dumps(index))
    for name in ("transformer_2", "boundary_ratio"):
        with pytest.raises(CkptqError, match=f"components.{name}: QwenImagePipeline has no such component"):
            job(f"components: {{{name}: fp8-dynamic}}", source, tmp_path / "out")


def test_a_linked_component_is_refused_where_its_files_would_not_travel(qwen: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen, source := tmp_path / "source")
    (source / "tokenizer").rename(source / "shared")
    (source / "tokenizer").symlink_to("shared")
    with pytest.raises(SourceError, match="tokenizer: a link to a folder"):
        job(DYNAMIC, source, tmp_path / "out")


def test_what_one_component_does_to_another_is_found_before_anything_is_written(tmp_path: Path) -> None:
    """With ModelOpt's format vLLM-Omni builds both transformers of Wan as the first one's section says."""
    pipelines()["wan22"].make(source := tmp_path / "source")
    planned = job("components: {transformer: fp8-dynamic}", source, tmp_path / "out")
    assert "config.omni-other" in {finding.code for finding in planned.findings if finding.severity == "error"}
    with pytest.raises(DataError, match="the planned output would not be served right"):
        convert(planned, resume=False, device="cpu", memory=None, console=Console(quiet=True))
    assert not (tmp_path / "out").exists()


def test_prompts_do_not_run_through_codes(qwen: Path, tmp_path: Path) -> None:
    run("components: {text_encoder: fp8-storage}", qwen, tmp_path / "stored")
    config = tmp_path / "stored" / "text_encoder" / "config.json"
    section = {"quant_method": "fp8", "activation_scheme": "dynamic"}  # as others store one
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": section}))
    with pytest.raises(CkptqError, match="text_encoder, which prompts run through, is quantized"):
        job(STATIC, tmp_path / "stored", tmp_path / "out")


def test_too_little_memory_leaves_nothing_behind(qwen: Path, tmp_path: Path) -> None:
    with pytest.raises(CkptqError, match="--memory 100 MB: too little"):
        convert(job(STATIC, qwen, tmp_path / "out"), resume=False, device="cpu", memory=10**8, console=Console(quiet=True))
    assert not (tmp_path / "out").exists()


def broken(source: Path, folder: Path, component: str, **change: Any) -> Path:
    shutil.copytree(source, folder)
    file = folder / component / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | change, file, metadata={"format": "pt"})
    return folder


def test_bad_input_never_yields_output(qwen: Path, tmp_path: Path) -> None:
    name = "transformer_blocks.0.attn.to_q.weight"
    weight = load_file(qwen / "transformer" / "diffusion_pytorch_model.safetensors")[name].clone()
    weight[0, 0] = float("nan")
    odd = broken(qwen, tmp_path / "nan", "transformer", **{name: weight})
    with pytest.raises(DataError, match=name):
        run(DYNAMIC, odd, tmp_path / "out")
    assert not (tmp_path / "out" / "model_index.json").exists()
    short = broken(qwen, tmp_path / "short", "transformer")
    file = short / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(SourceError, match="diffusion_pytorch_model"):
        run(DYNAMIC, short, tmp_path / "out2")
    shutil.rmtree(short / "vae")
    with pytest.raises(SourceError, match="names the component vae: no such folder"):
        run(DYNAMIC, short, tmp_path / "out2")
    assert not (tmp_path / "out2").exists()
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        run(DYNAMIC, qwen, tmp_path / "there")


def test_a_copy_that_went_wrong_is_never_published(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests are taken of the source's bytes: they tell even where nothing else is compared with the source."""
    right = writer.copy_bytes

    def wrong(source: int, at: int, target: int, to: int, count: int) -> None:
        right(source, at, target, to, count)
        if count > 1 << 12:
            os.pwrite(target, b"\x11\x22", to + count - 2)

    monkeypatch.setattr(writer, "copy_bytes", wrong)
    with pytest.raises(DataError) as caught:
        run(DYNAMIC + "validation: {passthrough: false}\n", qwen, tmp_path / "out")
    assert "record.file-changed: text_encoder/model.safetensors" in str(caught.value)
    assert "record.tensor-changed: transformer/" in str(caught.value)
    assert not (tmp_path / "out" / "model_index.json").exists()


def test_files_beside_the_components(qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Further copies of the weights stay in a kept component's folder; elsewhere they are left out, and named."""
    shutil.copytree(qwen, source := tmp_path / "source")
    (source / "text_encoder" / "pytorch_model.bin").write_bytes(b"a copy")
    (source / "all-in-one.safetensors").write_bytes(b"another")
    run(DYNAMIC, source, tmp_path / "out")
    assert (tmp_path / "out" / "text_encoder" / "pytorch_model.bin").read_bytes() == b"a copy"
    assert not (tmp_path / "out" / "all-in-one.safetensors").exists()
    with pytest.raises(SystemExit):
        main(["convert", "--recipe", "qwen-image-fp8-dynamic", "--model", str(source), "--output", "x", "--dry-run"])
    assert "all-in-one.safetensors" in capsys.readouterr().out.partition("left out")[2]


def test_an_odd_entry_of_the_index(qwen: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen, source := tmp_path / "source")
    index = json.loads((source / "model_index.json").read_text())
    (source / "model_index.json").write_text(json.dumps(index | {"vae": "diffusers"}))
    with pytest.raises(SourceError, match=r"vae: expected \[library, class\], found 'diffusers'"):
        job(DYNAMIC, source, tmp_path / "out")


def test_what_no_server_reads_is_not_called_good(qwen: Path, tmp_path: Path) -> None:
    """A component in FP8 storage stays out of a pipeline that is to be served."""
    stored = run("components: {vae: fp8-storage}", qwen, tmp_path / "stored")
    assert stored.serve == ""
    with pytest.raises(CkptqError, match="vae: in ckptq's form for storage") as caught:
        job(DYNAMIC, tmp_path / "stored", tmp_path / "out")
    assert "ckptq restore" in (caught.value.hint or "")


def test_storage_coded_anew(qwen: Path, tmp_path: Path) -> None:
    """From one storage form to the other, of the same names and dtypes; in a pipeline of which nothing is known, too."""
    shutil.copytree(qwen, source := tmp_path / "source")
    index = json.loads((source / "model_index.json").read_text())
    (source / "model_index.json").write_text(json.dumps(index | {"_class_name": "NobodysPipeline"}))
    run("components: {vae: fp8-storage-channel}", source, tmp_path / "one")
    run("components: {vae: fp8-storage}\nfrom_fp8: true", tmp_path / "one", tmp_path / "other")
    stored = load_file(tmp_path / "other" / "vae" / "diffusion_pytorch_model.safetensors")
    assert {t.numel() for n, t in stored.items() if n.endswith("weight_scale")} == {1}


def test_an_output_in_its_own_source(qwen: Path) -> None:
    with pytest.raises(OutputError, match="lies in the source"):
        run(DYNAMIC, qwen, qwen / "out")


def test_errors_name_the_component(qwen: Path, tmp_path: Path) -> None:
    short = broken(qwen, tmp_path / "short", "vae")
    file = short / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(SourceError, match=r"^vae: diffusion_pytorch_model\.safetensors"):
        job(DYNAMIC, short, tmp_path / "out")
    with pytest.raises(CkptqError, match="is a component of a pipeline"):
        job("quantize: [{modules: '*', scheme: fp8}]\n", qwen / "transformer", tmp_path / "out")


def test_a_resumed_run_ends_with_the_same_bytes(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(STATIC, qwen, tmp_path / "whole")
    from ckptq import finish

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(finish, "_copy_kept", stop)
        with pytest.raises(KeyboardInterrupt):
            run(STATIC, qwen, tmp_path / "out")
    assert not (tmp_path / "out" / "model_index.json").exists()
    with pytest.raises(OutputError, match="an interrupted job is there"):
        run(STATIC, qwen, tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr("ckptq.denoise.measure", stop)  # what was measured is known
        run(STATIC, qwen, tmp_path / "out", resume=True)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_amaxes_of_an_earlier_run(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(STATIC, qwen, tmp_path / "first")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("ckptq.denoise.measure", never)
    other = parse_recipe(
        "components: {transformer: fp8}\nexport: {format: fp8}\n", "r", model=str(qwen), output=str(tmp_path / "out")
    )
    convert(prepare(other, tmp_path / "first"), resume=False, device="cpu", memory=None, console=Console(quiet=True))
    first, second = (load_file(tmp_path / n / "transformer" / "diffusion_pytorch_model.safetensors") for n in ("first", "out"))
    assert {n for n in first if n.endswith("input_scale")}
    assert all(torch.equal(second[name].float(), first[name].float()) for name in first)
    assert examine(tmp_path / "out", source=qwen).findings == ()


@contextmanager
def on_the_hub(repo: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with HubServer(repo, {"main": folder}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        yield


def test_a_pipeline_on_the_hub(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run fetches headers alone; a run fetches all that the pipeline names, and no further copy of the weights."""
    shutil.copytree(qwen, served := tmp_path / "served")
    (served / "qwen-image.safetensors").write_bytes(b"all in one, for other programs")
    (served / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"not for us")
    with on_the_hub("org/tiny", served, tmp_path, monkeypatch):
        opened = hub.fetch("org/tiny", weights=False)
        seen = read_inventory(opened.root, opened.header)
        assert not list(opened.root.rglob("*.safetensors"))
        local = read_inventory(qwen)
        assert [c.tensors for c in seen.components] == [c.tensors for c in local.components]
        whole = hub.fetch("org/tiny", weights=True)
    assert {p.relative_to(whole.root).as_posix() for p in whole.root.rglob("*.*") if p.is_file()} == set(files(qwen))


def test_a_pipeline_on_the_hub_with_a_pickle_is_refused(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not fetched would be absent from the output, in silence."""
    shutil.copytree(qwen, served := tmp_path / "served")
    (served / "vae" / "diffusion_pytorch_model.safetensors").rename(served / "vae" / "diffusion_pytorch_model.bin")
    with (
        on_the_hub("org/pickled", served, tmp_path, monkeypatch),
        pytest.raises(SourceError, match=r"vae/.*model\.bin"),
    ):
        hub.fetch("org/pickled", weights=False)


def test_what_stays_of_a_pipeline_on_the_hub_is_restored_too(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("components: {vae: fp8-storage}", qwen, tmp_path / "stored")
    with on_the_hub("org/stored", tmp_path / "stored", tmp_path, monkeypatch):
        restore.restore(restore.prepare("org/stored"), tmp_path / "out", Console(quiet=True))
    assert files(tmp_path / "out").keys() == files(qwen).keys()
    kept = [name for name in files(qwen) if name.partition("/")[0] != "vae"]
    assert all(files(tmp_path / "out")[name] == files(qwen)[name] for name in kept)


def test_the_command_line(qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text(DYNAMIC)
    asked = ["convert", "--recipe", str(tmp_path / "r.yaml"), "--model", str(qwen), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as planned:
        main([*asked, "--dry-run", "--format", "json"])
    plan = json.loads(capsys.readouterr().out)
    assert planned.value.code == 0
    assert set(plan["components"]) == {"transformer"}
    assert "vae/config.json" in plan["kept"]
    with pytest.raises(SystemExit) as converted:
        main(asked)
    out = capsys.readouterr().out
    assert converted.value.code == 0
    assert f"serve it: vllm serve {tmp_path / 'out'} --omni" in out
    with pytest.raises(SystemExit) as validated:
        main(["validate", str(tmp_path / "out"), "--source", str(qwen)])
    assert validated.value.code == 0
    with pytest.raises(SystemExit) as inspected:
        main(["inspect", str(qwen)])
    out = capsys.readouterr().out
    assert inspected.value.code == 0
    assert "denoiser qwen_image" in out
    assert "qwen-image-fp8-dynamic" in out
