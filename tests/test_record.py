"""ckptq.json: what it says of the output, and that every later change is seen and nothing else is."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from make_quantized import make_quantized
from safetensors.torch import load_file, save_file

from ckptq import digest
from ckptq.checkpoint import INDEX, read_inventory
from ckptq.console import Console
from ckptq.convert import convert, prepare
from ckptq.journal import Journal
from ckptq.recipe import load_recipe
from ckptq.validate import validate_folder
from ckptq.validators import Finding, record

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "tiny-qwen2.5-vl"
WEIGHTS, RECORD = "model.safetensors", "ckptq.json"
NORM = "model.norm.weight"
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_quantized(EXAMPLE, tmp_path_factory.mktemp("record") / "good", "export.shard_size=5GB")


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "out"))


def findings(folder: Path, *, values: bool = True) -> list[tuple[str, str]]:
    """(code, severity) of what the record tells."""
    return [(f.code, f.severity) for f in validate_folder(folder, values=values) if f.code.startswith("record.")]


def edit(folder: Path, change: Callable[[Any], object], name: str = RECORD) -> None:
    data = json.loads((folder / name).read_text(encoding="utf-8"))
    change(data)
    (folder / name).write_text(json.dumps(data), encoding="utf-8")


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def apply(folder: Path) -> None:
        stored = load_file(folder / WEIGHTS)
        change(stored)
        save_file({name: t.clone().contiguous() for name, t in stored.items()}, folder / WEIGHTS)

    return apply


# --- written ---


def test_convert_records_what_it_wrote(example_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the one pass in which it writes; a resumed run knows the files of the killed one, even that of the last moment."""
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(
        "demo", ["calibration.samples=2", "export.shard_size=1MB"], model=str(example_model), output=str(tmp_path / "a")
    )
    run = {"device": "cpu", "memory": None, "console": Console(quiet=True)}
    convert(prepare(recipe), resume=False, **run)
    data = json.loads((tmp_path / "a" / RECORD).read_text())
    shards = sorted((tmp_path / "a").glob("*.safetensors"))
    assert len(shards) > 3
    assert data["digests"]["tensors"] == {name: found for shard in shards for name, found in digest.of_shard(shard).items()}
    assert data["digests"]["files"] == digest.of_files(tmp_path / "a", data["digests"]["files"])
    assert {"config.json", "hf_quant_config.json", "tokenizer.json", "preprocessor_config.json"} <= data["digests"]["files"].keys()
    assert not {INDEX, RECORD, "README.md"} & data["digests"]["files"].keys()

    class Killed(BaseException):
        pass

    def save(self: Journal, stage: str, table: dict[str, Any], real: Callable[..., None] = Journal.save) -> None:
        if stage.startswith("model-00003"):
            raise Killed
        real(self, stage, table)

    again = recipe.model_copy(update={"output": str(tmp_path / "b")})
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "save", save)
        with pytest.raises(Killed):
            convert(prepare(again), resume=False, **run)
    convert(prepare(again), resume=True, **run)
    assert (tmp_path / "b" / RECORD).read_bytes() == (tmp_path / "a" / RECORD).read_bytes()


@settings(max_examples=50, deadline=None)
@given(size=st.integers(0, 400), cuts=st.lists(st.integers(0, 400), max_size=8))
def test_pieces_do_not_matter(size: int, cuts: list[int]) -> None:
    data = bytes(n * n % 251 for n in range(size))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digest, "PART", 64)
        whole, pieces = digest.Running("BF16"), digest.Running("BF16")
        whole.update(memoryview(data))
        places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
        for begin, end in itertools.pairwise(places):
            pieces.update(memoryview(data)[begin:end])
        other = digest.Running("F16")
        other.update(memoryview(data))
    assert whole.hexdigest() == pieces.hexdigest() != other.hexdigest()


def test_the_digest_is_what_it_was() -> None:
    """Changing it would make every record that is out there wrong."""
    total = digest.Running("BF16")
    total.update(memoryview(bytes(range(256))))
    assert total.hexdigest() == xxhash.xxh3_128_hexdigest(b"BF16" + bytes(range(256))) == "d6c3185411bf87709913239c55666e73"
    assert digest.PART == 1 << 26


# --- changed ---


def resharded(folder: Path) -> None:
    stored = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(stored)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: stored[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def one_bit(name: str) -> Change:
    return tensors(lambda t: t[name].view(torch.uint8).view(-1)[-1:].bitwise_xor_(1))


CHANGES: dict[str, tuple[Change, list[tuple[str, str]]]] = {
    "one bit of codes": (one_bit("model.layers.1.mlp.up_proj.weight"), [("record.tensor-changed", "error")]),
    "one bit of a norm": (one_bit(NORM), [("record.tensor-changed", "error")]),
    "another dtype": (tensors(lambda t: t.update({NORM: t[NORM].float()})), [("record.tensor-changed", "error")]),
    "input scale inverted": (
        tensors(lambda t: t["model.layers.1.mlp.up_proj.input_scale"].reciprocal_()),
        [("record.tensor-changed", "error")],
    ),
    "tensor gone": (tensors(lambda t: t.pop(NORM)), [("record.tensor-missing", "error")]),
    "tensor added": (tensors(lambda t: t.update(x=t[NORM])), [("record.tensor-added", "warning")]),
    "tokenizer changed": (
        lambda folder: edit(folder, lambda data: data.update(version="x"), "tokenizer.json"),
        [("record.file-changed", "warning")],
    ),
    "config changed": (
        lambda folder: edit(folder, lambda data: data.update(vision_start_token_id=1), "config.json"),
        [("record.file-changed", "warning")],
    ),
    "tokenizer gone": (lambda folder: (folder / "tokenizer.json").unlink(), [("record.file-missing", "warning")]),
    "chat template added": (
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
        [("record.file-added", "warning")],
    ),
    "nothing": (lambda folder: None, []),
    "JSON in other words": (
        lambda folder: (folder / "config.json").write_text(
            json.dumps(json.loads((folder / "config.json").read_text()), indent=7, sort_keys=True)
        ),
        [],
    ),
    "split into other files": (resharded, []),
    "scales [1]": (tensors(lambda t: t.update({n: v.view(1) for n, v in t.items() if v.ndim == 0})), []),
    "a document added": (lambda folder: (folder / "README.md").write_text("hello"), []),
    "no record": (lambda folder: (folder / RECORD).unlink(), []),
    "a record of before there were digests": (lambda folder: edit(folder, lambda data: data.pop("digests")), []),
}


@pytest.mark.parametrize(("change", "expected"), CHANGES.values(), ids=CHANGES)
def test_what_changed_since(copy: Path, change: Change, expected: list[tuple[str, str]]) -> None:
    change(copy)
    assert findings(copy) == expected


def test_without_values_names_and_files_are_compared(copy: Path) -> None:
    tensors(lambda t: (t.pop(NORM), t["lm_head.weight"].zero_()))(copy)
    edit(copy, lambda data: data.update(version="x"), "tokenizer.json")
    assert findings(copy, values=False) == [("record.tensor-missing", "error"), ("record.file-changed", "warning")]


# --- calibrated KV scales ---


def kv_names(folder: Path) -> list[str]:
    return [name for name in read_inventory(folder).main.tensors if name.endswith(("k_scale", "v_scale"))]


@pytest.mark.parametrize("digests", [True, False])
def test_kv_scales_that_were_calibrated_must_be_there(copy: Path, digests: bool) -> None:
    edit(copy, lambda data: data.update(amax={"model.layers.0.self_attn.k_proj.k_amax": 3.0}))
    if not digests:
        edit(copy, lambda data: data.pop("digests"))
    assert findings(copy) == []
    tensors(lambda t: [t.pop(name) for name in kv_names(copy)])(copy)
    assert findings(copy) == [("record.kv-absent", "error")]


def test_kv_scales_that_were_not_calibrated_need_not_be_there(copy: Path) -> None:
    edit(copy, lambda data: data.update(amax={"model.layers.0.self_attn.k_proj.weight_amax": 3.0}, digests=None))
    tensors(lambda t: [t.pop(name) for name in kv_names(copy)])(copy)
    assert findings(copy) == []


# --- hostile ---

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("0" * 32),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*"ab", NORM, "../config.json", "tokenizer.json"]), inner)
    ),
    max_leaves=8,
)
RECORDS = JSON | st.fixed_dictionaries(
    {}, optional={"digests": JSON | st.fixed_dictionaries({"tensors": JSON, "files": JSON}), "amax": JSON, "job": JSON}
)


@settings(max_examples=150, deadline=None)
@given(data=RECORDS)
def test_any_json_is_read_without_a_crash(good: Path, data: Any) -> None:
    main = read_inventory(good).main
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "read_json", lambda *_: data)
        written, odd = record.read(good)
    found = odd + (list(record.check(written, good, main, dict.fromkeys(main.tensors, "1" * 32))) if written else [])
    assert all(isinstance(f, Finding) and f.subject.isprintable() for f in found)
    if not isinstance(data, dict):
        assert [f.code for f in found] == ["record.unreadable"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"digests": []}', '{"digests": {"tensors": {"a": 1}, "files": {}}}', '{"digests": {"tensors": {}}}',
     '{"digests": {"files": {"config.json": "zz"}, "tensors": {}}}', '{"amax": [1]}', '{"a": NaN}', '{"a": 1, "a": 2}',
     "[" * 100_000, "\xff"],
)  # fmt: skip
def test_a_record_that_makes_no_sense_is_a_warning(copy: Path, text: str) -> None:
    (copy / RECORD).write_text(text, encoding="latin-1")
    assert ("record.unreadable", "warning") in findings(copy)
    assert not [f for f in findings(copy) if f[1] == "error"]
