"""Pipelines judged by what is in them: values, the record, the source, other components, and what is no diffusion pipeline."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus import edit
from families import families
from hub_server import HubServer
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from omni_mutants import config, kept, listed, make_base, plus, setting, within
from pipelines import pipelines

from ckptq.cli import main
from ckptq.console import Console
from ckptq.convert import convert, prepare
from ckptq.errors import CkptqError, UnsupportedError
from ckptq.recipe import load_recipe
from ckptq.scopes.denoisers import all_denoisers, find_denoiser
from ckptq.validate import examine
from ckptq.validators.omni.parameters import parameters

Edit = Callable[[Path], object]
OUT = "transformer_blocks.0.attn.to_out.0"
CONFIGS = ("config.json", "model_index.json", "ckptq.json")


@pytest.fixture(scope="module")
def goods(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """(output, source) of a base of tests/omni_mutants.py."""
    work = tmp_path_factory.mktemp("pipelines")

    def good(name: str) -> tuple[Path, Path]:
        output = work / name
        return (output if output.exists() else make_base(name, work / "sources", output)), work / "sources"

    return good


def found(folder: Path, **options: Any) -> list[tuple[str, str]]:
    """(severity, code) of each finding."""
    return [(f.severity, f.code) for f in examine(folder, **options).findings]


def command(arguments: list[str]) -> int:
    """The exit code."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def text(name: str, content: str) -> Edit:
    return lambda folder: (folder / name).write_text(content)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (within(edit.alter(edit.code(0x7F), f"{OUT}.weight")), "values.not-finite"),
        (within(edit.alter(edit.times(float("inf")), "norm_out.linear.weight")), "values.not-finite"),
        (within(edit.alter(edit.times(0), f"{OUT}.weight_scale")), "values.not-positive"),
        (within(edit.alter(edit.times(1e5), f"{OUT}.weight_scale")), "values.scale-range"),
        (within(edit.alter(edit.times(float("nan")), "encoder.conv_in.weight"), folder="vae"), "values.not-finite"),
    ],
)
def test_values_of_every_component_are_looked_at(
    goods: Callable[[str], tuple[Path, Path]], tmp_path: Path, change: Edit, code: str
) -> None:
    folder = Path(shutil.copytree(goods("qwen-native")[0], tmp_path / "out"))
    (folder / "ckptq.json").unlink()
    change(folder)
    assert code in {c for severity, c in found(folder) if severity == "error"}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (within(edit.alter(edit.times(2), f"{OUT}.bias")), "record.tensor-changed"),
        (within(edit.drop("txt_norm.weight")), "record.tensor-missing"),
        (within(edit.put({"foreign.weight": torch.ones(2)})), "record.tensor-added"),
        (within(config(lambda c: c.update(patch_size=4))), "record.file-changed"),
        (within(edit.alter(edit.times(2), "lm_head.weight"), folder="text_encoder"), "record.file-changed"),
        (text("scheduler/scheduler_config.json", "{}"), "record.file-changed"),
        (lambda folder: (folder / "vae/config.json").unlink(), "refused"),
        (lambda folder: (folder / "tokenizer/tokenizer_config.json").unlink(), "record.file-missing"),
        (text("ckptq.json", "[]"), "record.unreadable"),
        (text("ckptq.json", '{"components": 3}'), "record.unreadable"),
    ],
)
def test_the_record_sees_every_change(goods: Callable[[str], tuple[Path, Path]], tmp_path: Path, change: Edit, code: str) -> None:
    folder = Path(shutil.copytree(goods("qwen-native")[0], tmp_path / "out"))
    assert found(folder) == []
    change(folder)
    if code == "refused":
        assert command(["validate", str(folder)]) == 2
    else:
        assert code in {c for _, c in found(folder)}


@pytest.mark.parametrize(
    ("change", "codes"),
    [
        (within(edit.alter(edit.times(2), f"{OUT}.bias")), {"passthrough.bytes"}),
        (within(edit.alter(edit.times(1.5), f"{OUT}.weight_scale")), {"passthrough.weight-error"}),
        (within(edit.alter(edit.to(torch.float32), "txt_norm.weight")), {"passthrough.cast"}),
        (within(config(lambda c: c.update(patch_size=4))), {"passthrough.config", "layout.omni-shape"}),
        (within(edit.alter(edit.times(2), "lm_head.weight"), folder="text_encoder"), {"passthrough.bytes"}),
        (text("text_encoder/config.json", "{}"), {"passthrough.file"}),
        (text("scheduler/scheduler_config.json", "{}"), {"passthrough.file"}),
        (lambda folder: (folder / "tokenizer/tokenizer_config.json").unlink(), {"passthrough.file"}),
        (lambda folder: shutil.rmtree(folder / "vae"), {"passthrough.component", "files.omni-component"}),
    ],
)
def test_the_source_sees_what_changed(
    goods: Callable[[str], tuple[Path, Path]], tmp_path: Path, change: Edit, codes: set[str]
) -> None:
    good, sources = goods("qwen-native")
    folder = Path(shutil.copytree(good, tmp_path / "out"))
    (folder / "ckptq.json").unlink()
    change(folder)
    assert {c for _, c in found(folder, source=sources / "qwen_image")} == codes


@pytest.mark.parametrize("base", ["omnigen", "wan"])
def test_renamed_and_joined_tensors_are_compared_with_the_source(
    goods: Callable[[str], tuple[Path, Path]], tmp_path: Path, base: str
) -> None:
    """OmniGen2's gate_up_proj is the source's linear_1 and linear_3, Wan's net_0 its net.0."""
    good, sources = goods(base)
    folder = Path(shutil.copytree(good, tmp_path / "out"))
    (folder / "ckptq.json").unlink()
    source = sources / {"omnigen": "omnigen2", "wan": "wan22"}[base]
    assert [c for severity, c in found(folder, source=source) if severity == "error"] == []
    name = {"omnigen": "layers.0.feed_forward.gate_up_proj", "wan": "blocks.0.ffn.net_0.proj"}[base]
    within(edit.alter(lambda t: torch.cat([t[1:], t[:1]]), f"{name}.weight"))(folder)
    assert [c for _, c in found(folder, source=source) if c.startswith("passthrough.")] == ["passthrough.weight-error"]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (text("model.gguf", "GGUF"), "model.gguf: GGUF"),
        (text("transformer/quant_model_description.json", "{}"), "quant_model_description.json: msModelSlim"),
        (within(setting(quant_method="auto-round")), "auto_round: not checked by ckptq"),
        (within(setting(quant_method="svdquant")), "svdquant: not checked by ckptq"),
        (within(setting(quant_method="modelopt", quant_algo="NVFP4")), "NVFP4: not checked by ckptq"),
        (lambda folder: edit.edit_json(folder / "model_index.json", lambda i: i.update(_class_name="MyPipeline")), "MyPipeline"),
    ],
)
def test_what_ckptq_does_not_know_is_named(
    goods: Callable[[str], tuple[Path, Path]], tmp_path: Path, change: Edit, code: str
) -> None:
    folder = Path(shutil.copytree(goods("qwen-native")[0], tmp_path / "out"))
    change(folder)
    with pytest.raises(UnsupportedError, match=code):
        examine(folder)


@pytest.mark.parametrize(
    ("base", "change", "code"),
    [
        ("qwen-native", text("hf_quant_config.json", "{}"), "warning config.omni-unread"),
        ("qwen-native", within(lambda f: (f / "hf_quant_config.json").write_text("{}")), "warning config.omni-unread"),
        ("qwen-native", within(edit.alter(edit.to(torch.float8_e4m3fn), "lm_head.weight"), folder="text_encoder"),
         "error layout.omni-component"),
        ("qwen-native", within(config(lambda c: c.update(quantization_config={"quant_method": "bitsandbytes"})),
                               folder="text_encoder"), "warning config.omni-unchecked"),
        ("qwen-native", within(config(lambda c: c.update(quantization_config={"ckptq": "fp8-storage"})), folder="vae"),
         "error layout.omni-storage"),
        ("z-native", within(edit.alter(edit.to(torch.float8_e4m3fn), "model.layers.0.mlp.up_proj.weight"), folder="text_encoder"),
         "error layout.omni-encoder"),
        ("wan", within(kept("blocks.1.attn2.to_q"), listed("ignore", plus("blocks.1.attn2.to_q")), folder="transformer_2"),
         "warning config.omni-other"),
        ("wan", within(kept("blocks.1.attn2.to_q"), listed("ignore", plus("blocks.1.attn2.to_q")), folder="transformer_2"),
         "error layout.omni-not-ignored"),
        ("qwen-int8", within(edit.alter(lambda t: torch.cat([t[:1] * 0.9, t[1:]]), "transformer_blocks.0.attn.to_q.weight_scale")),
         "error values.omni-int8-rows"),
    ],
)  # fmt: skip
def test_components_are_seen_beside_one_another(
    goods: Callable[[str], tuple[Path, Path]], tmp_path: Path, base: str, change: Edit, code: str
) -> None:
    folder = Path(shutil.copytree(goods(base)[0], tmp_path / "out"))
    (folder / "ckptq.json").unlink()
    before = {f"{severity} {c}" for severity, c in found(folder)}
    change(folder)
    assert code in {f"{severity} {c}" for severity, c in found(folder)} - before


def test_one_scale_for_all_rows_of_a_fused_int8_linear_is_sound(goods: Callable[[str], tuple[Path, Path]]) -> None:
    assert found(goods("qwen-int8")[0]) == []


@pytest.mark.parametrize("name", [d.name for d in all_denoisers() if d.pipelines])
def test_the_table_of_parameters_is_that_of_the_real_classes(name: str, tmp_path: Path) -> None:
    made = pipelines()[name]
    made.make(tmp_path / "tiny")
    for folder in made.denoisers:
        settings = json.loads((tmp_path / "tiny" / folder / "config.json").read_text())
        denoiser = find_denoiser(settings, made.server)
        assert denoiser is not None
        stored = edit.read(next((tmp_path / "tiny" / folder).glob("*.safetensors")))
        table = parameters(denoiser, settings)
        assert table.keys() == stored.keys()
        odd = [n for n, p in table.items() if len(p.shape) != stored[n].dim()
               or any(want not in (None, have) for want, have in zip(p.shape, stored[n].shape, strict=True))]  # fmt: skip
        assert odd == []


def test_the_command_line_says_whose_rules_it_went_by(
    goods: Callable[[str], tuple[Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    good, sources = goods("qwen-native")
    assert command(["validate", str(good), "--source", str(sources / "qwen_image"), "--format", "json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["rules"] == {"server": "vLLM-Omni", "version": "0.30", "verified": "loaded"}
    assert (said["scope"]["name"], said["findings"]) == ("qwen_image", [])
    assert said["quantization"]["linears"] == {"fp8, dynamic activations": 24}
    assert command(["validate", str(good), "--target", "vllm-omni"]) == 0
    assert "vLLM-Omni 0.30" in capsys.readouterr().out
    for options in (["--target", "vllm"], ["--load"], ["--vllm", "0.32"]):
        assert command(["validate", str(good), *options]) == 2
    assert command(["validate", str(sources / "qwen_image")]) == 2, "nothing is quantized in it"


def test_a_talker_counts_where_vllm_omni_is_to_serve_it(tmp_path: Path) -> None:
    """A Qwen2.5-Omni whose list lacks `talker*`: vLLM passes the talker over, vLLM-Omni casts it to codes."""
    families()["qwen2_5_omni"].make(tmp_path / "source")
    recipe = load_recipe("qwen25omni-fp8-dynamic", model=str(tmp_path / "source"), output=str(tmp_path / "out"))
    convert(prepare(recipe), resume=False, device="cpu", memory=None, console=Console(quiet=True))
    for name, key in (("config.json", "quantization_config"), ("hf_quant_config.json", "quantization")):
        edit.edit_json(
            tmp_path / "out" / name,
            lambda said, key=key: said[key].update(
                {k: [e for e in said[key][k] if "talker" not in e] for k in ("ignore", "exclude_modules") if k in said[key]}
            ),
        )
    found_by_vllm, found_by_omni = (found(tmp_path / "out", values=False, target=t) for t in ("vllm", "vllm-omni"))
    assert ("warning", "layout.draft-not-excluded") in found_by_vllm
    assert ("error", "layout.omni-talker") in found_by_omni


def test_headers_alone_are_enough_for_the_layout(goods: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(goods("z-native")[0], tmp_path / "out"))
    within(edit.drop("layers.0.feed_forward.w2.weight_scale"))(folder)
    assert ("error", "layout.omni-missing-scale") in found(folder, values=False)


ODD = st.sampled_from(
    [
        None,
        True,
        -1,
        3,
        10**30,
        float("inf"),
        "",
        "fp8",
        "modelopt",
        [],
        [[]],
        [None],
        ["*"],
        {},
        {"quant_algo": "FP8"},
        [{"a": []}],
    ]
)


@given(data=st.data(), base=st.sampled_from(["qwen", "z-native", "wan", "hunyuan"]))
@settings(max_examples=60, deadline=None)
def test_whatever_the_configs_say_there_is_a_verdict_or_a_refusal(
    goods: Callable[[str], tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, base: str
) -> None:
    folder = tmp_path_factory.mktemp("odd") / "out"
    shutil.copytree(goods(base)[0], folder, copy_function=os.link)
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.json") if p.name in CONFIGS)
    path = folder / data.draw(st.sampled_from(files))
    config = json.loads(path.read_text())
    at = data.draw(st.sampled_from([*_places(config)]))
    value: Any = config
    for key in at[:-1]:
        value = value[key]
    if data.draw(st.booleans()):
        del value[at[-1]]
    else:
        value[at[-1]] = data.draw(ODD)
    path.unlink()  # it is a link to the good one's
    path.write_text(json.dumps(config))
    with contextlib.suppress(CkptqError):
        examine(folder, values=False)


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything in a parsed JSON file, of long lists the beginning."""
    inside = value.items() if isinstance(value, dict) else enumerate(value[:4]) if isinstance(value, list) else ()
    for key, below in inside:
        yield (*at, key)
        yield from _places(below, (*at, key))


def test_a_pipeline_on_the_hub_is_judged_by_its_headers(
    goods: Callable[[str], tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = goods("qwen-native")[0]
    with HubServer("org/tiny", {"main": good}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        assert command(["validate", "org/tiny", "--no-values"]) == 0
    assert "24 linears in fp8, dynamic activations" in capsys.readouterr().out
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
