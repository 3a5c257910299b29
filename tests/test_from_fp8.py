"""FP8 sources: refused as they are, and with --from-fp8 seen as the BF16 checkpoint that they stand for."""

import json
import random
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.entrypoints.convert.converters import CompressedTensorsDequantizer, FP8BlockDequantizer
from hypothesis import given, settings
from hypothesis import strategies as st
from make_fp8 import FORMS, SINGLE, Tensors, make_fp8, read, write_dense
from safetensors.torch import load_file, save_file
from test_planner import OBJECTS

from ckptq import quantized
from ckptq.checkpoint import Codes, Inventory, Reader, SourceTensor, TensorSpec, fingerprint, read_inventory
from ckptq.config_text import insert_section, remove_section
from ckptq.console import Console
from ckptq.convert import Report, convert, prepare
from ckptq.dequantize import CHUNK
from ckptq.errors import CkptqError, DataError, RecipeError, SourceError, UnsupportedError
from ckptq.recipe import load_recipe, parse_recipe
from ckptq.tensors import raw
from ckptq.validate import examine

ROOT = Path(__file__).parent.parent
BLOCKS = """
from_fp8: true
quantize: [{modules: "model.layers.*", scheme: fp8-block}]
keep: ["model.visual*", "lm_head", "model.layers.0.*"]
export: {format: fp8, shard_size: 4MB}
"""


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="session")
def forms(example_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Tensors]]:
    """forms(name) -> (the example in that form, what its codes stand for). Read only."""
    made: dict[str, tuple[Path, Tensors]] = {}

    def form(name: str) -> tuple[Path, Tensors]:
        if name not in made:
            made[name] = make_fp8(example_model, tmp_path_factory.mktemp("fp8") / "model", FORMS[name])
        return made[name]

    return form


def dense(folder: Path) -> Inventory:
    return quantized.dense(read_inventory(folder))


def values(inventory: Inventory) -> Tensors:
    """All tensors as a reader gives them."""
    found = {}
    with Reader(inventory.root, inventory.main) as reader:
        for name, tensor in inventory.main.tensors.items():
            buffer = torch.empty(tensor.spec.nbytes, dtype=torch.uint8)
            reader.read_into(tensor, 0, raw(buffer))
            kinds = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}
            found[name] = buffer.view(kinds[tensor.spec.dtype]).view(tensor.spec.shape)
    return found


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int16 if tensor.itemsize == 2 else torch.int32)


# What is read


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_read_as_what_it_stands_for(
    name: str, forms: Callable[[str], tuple[Path, Tensors]], example_model: Path
) -> None:
    folder, stands_for = forms(name)
    found, plain = values(dense(folder)), read(example_model)
    assert set(found) == set(plain)
    assert len(stands_for) == 43
    for tensor, value in found.items():
        assert torch.equal(bits(value), bits(stands_for.get(tensor, plain[tensor]))), tensor
    assert dense(folder).main.config_text == (example_model / "config.json").read_text()
    assert dense(folder).main.sidecars == read_inventory(example_model).main.sidecars


@pytest.mark.parametrize("name", [name for name in FORMS if "block" in name or "compressed" in name])
def test_compressed_tensors_own_converters_get_the_same(name: str, forms: Callable[[str], tuple[Path, Tensors]]) -> None:
    folder, stands_for = forms(name)
    stored = load_file(folder / SINGLE)
    if "compressed" in name:
        kept = [n.removesuffix(".weight") for n in stored if n.endswith(".weight") and n not in stands_for]
        theirs = CompressedTensorsDequantizer(str(folder), ignore=kept).process(stored)
    else:
        size = tuple(FORMS[name].section.get("weight_block_size", (128, 128)))
        for scale in [n for n in stored if n.endswith("weight_scale")]:  # ModelOpt's name and shape
            stored[f"{scale}_inv"] = stored.pop(scale)[:, 0, :, 0]
        modules = [n.removesuffix(".weight") for n in stands_for]
        theirs = FP8BlockDequantizer(targets=modules, weight_block_size=size).process(stored)
    for tensor, value in values(dense(folder)).items():
        if tensor in stands_for:
            assert torch.equal(bits(value), bits(theirs[tensor])), tensor


def checkpoint(folder: Path, codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] = (128, 128)) -> Inventory:
    save_file({"a.weight": codes, "a.weight_scale": scale.contiguous()}, folder / SINGLE)
    section = {"quant_method": "fp8", "weight_block_size": list(block)}
    (folder / "config.json").write_text(json.dumps({"quantization_config": section}))
    return dense(folder)


SHAPES = st.sampled_from([(1, 1), (3, 5), (130, 7), (5, 300), (257, 384), (2, CHUNK + 3), (700, 1000)])


@given(shape=SHAPES, kind=st.sampled_from(["tensor", "rows", "block"]), seed=st.integers(0, 1 << 30))
@settings(max_examples=25, deadline=None)
def test_any_range_of_bytes(tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, int], kind: str, seed: int) -> None:
    """Of every code there is, NaN too; odd starts and ends, rows cut short, more than a chunk, from several threads."""
    n, k = shape
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).view(torch.float8_e4m3fn)
    high, wide = {"tensor": (n, k), "rows": (1, k), "block": (100, 48)}[kind]
    scale = torch.rand(-(-n // high), -(-k // wide), generator=generator) * 2.0 ** random.Random(seed).randint(-120, 20)
    inventory = checkpoint(tmp_path_factory.mktemp("range"), codes, scale, (100, 48))
    expected = (codes.float() * scale.repeat_interleave(high, 0)[:n].repeat_interleave(wide, 1)[:, :k]).bfloat16()
    nan = expected.isnan()
    tensor = inventory.main.tensors["a.weight"]
    wrong: list[str] = []
    with Reader(inventory.root, inventory.main) as reader:
        whole = torch.empty(tensor.spec.nbytes, dtype=torch.uint8)
        reader.read_into(tensor, 0, raw(whole))
        found = whole.view(torch.bfloat16).view(shape)
        assert torch.equal(found.isnan(), nan)
        assert torch.equal(bits(found)[~nan], bits(expected)[~nan])

        def look(own: random.Random) -> None:
            for _ in range(8):
                start = own.randrange(len(whole) + 1)
                end = min(len(whole), start + own.choice([0, 1, 2, 3, 2 * k, 10**6]))
                part = torch.full((end - start,), 7, dtype=torch.uint8)
                reader.read_into(tensor, start, raw(part))
                wrong.extend([f"{start}..{end}"] if not torch.equal(part, whole[start:end]) else [])

        threads = [threading.Thread(target=look, args=(random.Random(seed + i),)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


# Whole conversions


def run(recipe: str, source: Path, output: Path, *, text: bool = False, **top: Any) -> Report:
    given = {"model": str(source), "output": str(output), **top}
    parsed = parse_recipe(recipe, "r", **given) if text else load_recipe(recipe, ["calibration.samples=3"], **given)
    return convert(prepare(parsed), resume=False, device="cpu", memory=None, console=Console(quiet=True))


@pytest.mark.parametrize("recipe", ["demo", BLOCKS])
def test_the_same_bytes_as_from_the_dequantized_checkpoint(
    recipe: str, forms: Callable[[str], tuple[Path, Tensors]], example_model: Path, tmp_path: Path
) -> None:
    """Calibrated with a KV cache, and without, keeping a layer that was FP8."""
    fp8, stands_for = forms("modelopt")
    tensors = dense(fp8).main.tensors
    order = sorted(tensors, key=lambda name: tensors[name].offset)
    plain = write_dense(example_model, tmp_path / "plain", order, stands_for, fp8)
    report = run(recipe, fp8, tmp_path / "one", text=recipe == BLOCKS, from_fp8=True)
    run(recipe.replace("from_fp8: true\n", ""), plain, tmp_path / "two", text=recipe == BLOCKS)
    assert report.findings == ()
    assert report.source_bytes < (fp8 / SINGLE).stat().st_size < 0.85 * (plain / SINGLE).stat().st_size
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two"))
    records = [json.loads(files.pop("ckptq.json")) for files in (one, two)]
    assert one == two
    assert [r["job"]["recipe"]["from_fp8"] for r in records] == [True, False]
    assert records[0]["amax"] == records[1]["amax"]
    assert records[0]["dequantized"] == [
        "43 FP8 weights are dequantized to BF16",
        "43 input scales of the source left out",
        "12 KV scales of the source left out",
        "quantization_config taken out of config.json",
        "hf_quant_config.json left out",
    ]
    found = examine(tmp_path / "one", source=fp8)
    assert found.findings == ()
    assert "passthrough" not in found.skipped


def test_fp8_again_is_the_same_codes(example_model: Path, tmp_path: Path) -> None:
    run("demo", example_model, tmp_path / "once")
    run("demo", tmp_path / "once", tmp_path / "twice", from_fp8=True)
    once, twice = read(tmp_path / "once"), read(tmp_path / "twice")
    coded = [name for name, tensor in once.items() if tensor.dtype == torch.float8_e4m3fn]
    assert len(coded) == 42
    for name in coded:
        assert torch.equal(once[name].view(torch.uint8), twice[name].view(torch.uint8)), name
        assert torch.allclose(once[f"{name}_scale"], twice[f"{name}_scale"], rtol=2**-8)


def test_another_weight_than_the_fp8_source_has_is_found(forms: Callable[[str], tuple[Path, Tensors]], tmp_path: Path) -> None:
    fp8, _ = forms("native block")
    run(BLOCKS, fp8, tmp_path / "out", text=True)
    name = "model.layers.0.mlp.up_proj.weight"  # kept, so it is in BF16
    file = next(f for f in (tmp_path / "out").glob("*.safetensors") if name in load_file(f))
    tensors = load_file(file)
    tensors[name][3, 3] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    found = [f.code for f in examine(tmp_path / "out", source=fp8).findings]
    assert "passthrough.bytes" in found


# Refusals


def ckptq(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "ckptq", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_line(forms: Callable[[str], tuple[Path, Tensors]], example_model: Path, tmp_path: Path) -> None:
    fp8, _ = forms("modelopt")
    job = ("convert", "--recipe", "demo", "--output", str(tmp_path / "out"), "--dry-run", "--model")
    refused = ckptq(*job, str(fp8))
    assert refused.returncode == 2
    assert refused.stderr.startswith(
        "error: the source is quantized already: config.json says quant_method 'modelopt', FP8; 43 FP8 weights\n"
        "  add --from-fp8 to dequantize it on the way, or better start from the BF16 checkpoint"
    )
    taken = ckptq(*job, str(fp8), "--from-fp8", "--format", "json")
    assert taken.returncode == 0, taken.stderr
    data = json.loads(taken.stdout)
    assert data["source_bytes"] < (fp8 / SINGLE).stat().st_size
    assert data["dequantized"][0] == "43 FP8 weights are dequantized to BF16"
    idle = ckptq(*job, str(example_model), "--from-fp8")
    assert idle.returncode == 2
    assert idle.stderr.startswith("error: --from-fp8: the source is not quantized, so there is nothing to dequantize\n")
    assert "quantized: config.json says quant_method 'modelopt', FP8; 43 FP8 weights\n" in ckptq("inspect", str(fp8)).stdout


UP = "model.layers.1.mlp.up_proj."
WEIGHT = UP + "weight"
Change = Callable[[Tensors], object]


def put(leaf: str, value: Callable[[torch.Tensor], torch.Tensor], *, at: str = UP, instead: bool = False) -> Change:
    """Stores what `value` makes of the weight's codes."""

    def change(tensors: Tensors) -> None:
        codes = tensors.pop(WEIGHT) if instead else tensors[WEIGHT]
        tensors[at + leaf] = value(codes).clone()

    return change


def strip(tensors: Tensors) -> None:
    """All weights in BF16 and no scale, under a config that still calls them quantized."""
    for name in list(tensors):
        if name.endswith("_scale"):
            del tensors[name]
        elif tensors[name].dtype == torch.float8_e4m3fn:
            tensors[name] = tensors[name].bfloat16()


# fmt: off
REFUSALS: dict[str, tuple[Change, type[CkptqError], str]] = {
    "no scale": (lambda t: t.pop(UP + "weight_scale"), SourceError, f"{WEIGHT}: FP8 codes without weight_scale"),
    "two scales": (put("weight_scale_inv", lambda _: torch.ones(1)), SourceError, f"{WEIGHT}: FP8 codes with both weight_scale"),
    "a scale of another shape": (
        put("weight_scale", lambda _: torch.ones(7)), SourceError,
        f"{UP}weight_scale: shape [7] fits no weight of [768, 256]: expected one value, one for each row, or one for each block of",
    ),
    "a scale of nothing": (
        put("weight_scale", lambda _: torch.ones(1), at="model.norm."), SourceError,
        "model.norm.weight_scale: scales no FP8 weight",
    ),
    "E5M2": (put("weight", lambda t: t.float().to(torch.float8_e5m2)), UnsupportedError, f"{WEIGHT} is F8_E5M2"),
    "INT8": (put("weight", lambda t: t.view(torch.int8)), UnsupportedError, f"{WEIGHT} is I8"),
    "NVFP4": (put("weight", lambda t: t.view(torch.uint8)[:, :128]), UnsupportedError, f"{WEIGHT} is U8"),
    "NVFP4's scale": (put("weight_scale_2", lambda _: torch.ones(())), UnsupportedError, f"{UP}weight_scale_2 is stored"),
    "GPTQ": (put("qweight", lambda t: t.view(torch.int32), instead=True), UnsupportedError, f"{UP}qweight is stored"),
    "MXFP8": (
        put("weight_scale", lambda _: torch.ones(768, 8, dtype=torch.uint8)), UnsupportedError,
        f"{UP}weight_scale is U8, as in MXFP8",
    ),
    "AWQ": (put("pre_quant_scale", lambda _: torch.ones(256)), UnsupportedError, f"{UP}pre_quant_scale is stored"),
    "FP8 that is no weight": (put("experts", lambda t: t), UnsupportedError, f"{UP}experts is F8_E4M3"),
    "no FP8 weight at all": (strip, UnsupportedError, "no FP8 weight is stored"),
}
# fmt: on


@pytest.mark.parametrize("name", REFUSALS)
def test_what_can_not_be_dequantized(name: str, forms: Callable[[str], tuple[Path, Tensors]], tmp_path: Path) -> None:
    """With the flag it is refused with what was found; without it, without advice that would not help."""
    change, kind, expected = REFUSALS[name]
    folder = shutil.copytree(forms("modelopt")[0], tmp_path / "model")
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    with pytest.raises(kind) as caught:
        prepare(load_recipe("demo", model=str(folder), from_fp8=True))
    assert expected in str(caught.value)
    assert caught.value.hint in ("start from the BF16 checkpoint", "fetch the checkpoint again", None)
    with pytest.raises(UnsupportedError, match="the source is quantized already") as refused:
        prepare(load_recipe("demo", model=str(folder)))
    assert refused.value.hint == "start from the BF16 checkpoint"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_scale_that_is_no_scale(value: float, forms: Callable[[str], tuple[Path, Tensors]], tmp_path: Path) -> None:
    folder = shutil.copytree(forms("compressed channel")[0], tmp_path / "model")
    tensors = load_file(folder / SINGLE)
    tensors[UP + "weight_scale"][5] = value
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    with pytest.raises(DataError, match=f"{UP}weight_scale: expected scales that are finite and not negative, found {value}"):
        run(BLOCKS, folder, tmp_path / "out", text=True)
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_code_that_is_nan(forms: Callable[[str], tuple[Path, Tensors]], tmp_path: Path) -> None:
    folder = shutil.copytree(forms("native block")[0], tmp_path / "model")
    tensors = load_file(folder / SINGLE)
    tensors[UP + "weight"].view(torch.uint8)[5, 7] = 0xFF
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    with pytest.raises(DataError, match=f"{UP}weight: holds NaN values"):
        run(BLOCKS, folder, tmp_path / "out", text=True)


def test_rotated_weights(forms: Callable[[str], tuple[Path, Tensors]], tmp_path: Path) -> None:
    """They stand for the model only with the rotation that the server makes undone."""
    folder = shutil.copytree(forms("compressed channel")[0], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["transform_config"] = {"config_groups": {"u": {"type": "hadamard", "apply": []}}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=r"config\.json has a transform_config"):
        dense(folder)


def test_other_blocks_make_another_source(forms: Callable[[str], tuple[Path, Tensors]], tmp_path: Path) -> None:
    """Of the same bytes: 768 rows are six blocks of 128, and of 130."""
    folder = shutil.copytree(forms("native block")[0], tmp_path / "model")
    one = fingerprint(folder, dense(folder).main)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(re.sub(r"128,\s+128", "130, 130", text))
    other = dense(folder).main
    assert other.tensors[WEIGHT].codes != dense(forms("native block")[0]).main.tensors[WEIGHT].codes
    assert fingerprint(folder, other) != one


def test_the_flag_is_a_key_of_the_recipe() -> None:
    with pytest.raises(RecipeError, match=r"from_fp8 \(line 1\): .*expected"):
        parse_recipe("from_fp8: 3\nquantize: [{modules: a, scheme: fp8}]", "r")


def test_a_codes_tensor_counts_what_is_stored() -> None:
    stored, scale = (SourceTensor(TensorSpec(n, d, s), "f", 0) for n, d, s in (("w", "F8_E4M3", (4, 6)), ("s", "F32", (4,))))
    seen = SourceTensor(TensorSpec("w", "BF16", (4, 6)), "f", 0, Codes(stored, scale, 1, 6))
    assert (seen.spec.nbytes, seen.stored_bytes) == (48, 40)


# config.json


@given(
    data=OBJECTS,
    section=st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
    indent=st.sampled_from([None, 0, 2, "\t"]),
    ascii_only=st.booleans(),
)
def test_what_was_inserted_is_taken_out(data: dict[str, Any], section: dict[str, Any], indent: Any, ascii_only: bool) -> None:
    text = json.dumps(data, indent=indent, ensure_ascii=ascii_only)
    assert remove_section(insert_section(text, "added", section), ["added"]) == text


@pytest.mark.parametrize(
    ("text", "path", "expected"),
    [
        ('{"q": {"a": [1, "}"]}, "b": 1.0e-6}', "q", '{"b": 1.0e-6}'),
        ('{\n  "q": 1,\n  "b": 2\n}\n', "q", '{\n  "b": 2\n}\n'),
        ('{\n  "a": 1.50,\n  "q": {"q": 1},\n  "b": 2\n}\n', "q", '{\n  "a": 1.50,\n  "b": 2\n}\n'),
        ('{ "q" : null }', "q", "{ }"),
        ('{"t": {"a": "\\u00e9", "q": {}}, "q": 5}', "t.q", '{"t": {"a": "\\u00e9"}, "q": 5}'),
    ],
)
def test_a_section_is_taken_out_and_every_other_byte_stays(text: str, path: str, expected: str) -> None:
    assert remove_section(text, path.split(".")) == expected


def test_a_section_in_a_part_of_the_config(forms: Callable[[str], tuple[Path, Tensors]], tmp_path: Path) -> None:
    folder = shutil.copytree(forms("native block 64 x 96")[0], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    with pytest.raises(UnsupportedError, match=r"quant_method 'fp8' in text_config\.quantization_config; 43 FP8 weights"):
        prepare(load_recipe("demo", model=str(folder)))
    assert "quantization_config" not in dense(folder).main.config_text
