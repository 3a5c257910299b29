"""What ckptq reads of a checkpoint, and every way in which one can be broken. Also the generator of large checkpoints."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_checkpoint import PRESETS, make_checkpoint
from safetensors.numpy import save_file

from ckptq.checkpoint import (
    INDEX,
    SINGLE,
    Reader,
    SourceTensor,
    TensorSpec,
    check_header,
    fingerprint,
    is_weight_copy,
    read_header,
    read_inventory,
)
from ckptq.errors import SourceError

EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny-qwen2.5-vl"
SHARDS = sorted(p.name for p in EXAMPLE.glob("*.safetensors"))
BEYOND_TINY = (*(f"model.layers.{i}." for i in range(2, 6)), "visual.blocks.2.", "visual.blocks.3.")
"""What the example has and the generator's preset `tiny` has not."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(EXAMPLE, tmp_path / "model")


def refused(folder: Path, *parts: str, hint: str | None = None) -> None:
    """The checkpoint is refused, in a message that has all of `parts`."""
    with pytest.raises(SourceError) as caught:
        read_inventory(folder)
    for part in parts:
        assert part in str(caught.value)
    if hint is not None:
        assert hint in str(caught.value.hint)


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def edit_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the header and leaves the data as it is."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])


def first_tensor(folder: Path, shard: str) -> str:
    return next(name for name, tensor in read_inventory(folder).main.tensors.items() if tensor.file == shard)


def test_the_example(folder: Path) -> None:
    component = read_inventory(folder).main
    index = json.loads((folder / INDEX).read_text())
    assert {name: tensor.file for name, tensor in component.tensors.items()} == index["weight_map"]
    assert component.nbytes == index["metadata"]["total_size"]
    assert component.weight_files == tuple(SHARDS)
    assert component.config == json.loads((folder / "config.json").read_text())
    expected = sorted({p.name for p in folder.iterdir()} - {*SHARDS, INDEX, "config.json"})
    assert component.sidecars == tuple(expected)
    assert component.left_out == ()
    assert component.tensors["lm_head.weight"].spec == TensorSpec("lm_head.weight", "BF16", (4096, 256))


def test_no_such_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no such folder", hint="org/name[@revision]")


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "has no config.json"), ("{", "can't be read as JSON"), ("[]", "expected a JSON object, found list")],
)
def test_config(text: str | None, message: str, folder: Path) -> None:
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    refused(folder, "config.json", message)


@pytest.mark.parametrize("size", [0, 7, 8, 1000])
def test_a_header_cut_short(size: int, folder: Path) -> None:
    os.truncate(folder / SHARDS[1], size)
    refused(folder, SHARDS[1], "truncated", hint="fetch the file again")


@pytest.mark.parametrize("change", [-1, 1, -1_000_000])
def test_data_cut_short_or_overlong(change: int, folder: Path) -> None:
    size = (folder / SHARDS[1]).stat().st_size
    os.truncate(folder / SHARDS[1], size + change)
    refused(folder, SHARDS[1], f"the header describes {size} bytes, the file has {size + change}")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "not a safetensors file"),
        (b"\x08" + bytes(7) + b"not JSON", "its header is not JSON"),
        (b"\x02" + bytes(7) + b"\xff\xfe", "its header is not JSON"),
        (b"\x02" + bytes(7) + b"[]", "its header is not a JSON object"),
    ],
)
def test_garbage_for_a_header(data: bytes, message: str, folder: Path) -> None:
    (folder / SHARDS[2]).write_bytes(data)
    refused(folder, SHARDS[2], message)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        {"dtype": "BF16", "shape": [1]},
        {"dtype": "BF17", "shape": [1], "data_offsets": [0, 2]},
        {"dtype": "BF16", "shape": [-2], "data_offsets": [0, -4]},
        {"dtype": "BF16", "shape": [1], "data_offsets": [-2, 0]},
        {"dtype": "BF16", "shape": [True], "data_offsets": [0, 2]},
        {"dtype": "BF16", "shape": [1.0], "data_offsets": [0, 2]},
        {"dtype": "BF16", "shape": [1] * 65, "data_offsets": [0, 2]},
        {"dtype": "BF16", "shape": [1 << 62, 1 << 62, 0], "data_offsets": [0, 0]},
        {"dtype": "F4", "shape": [1], "data_offsets": [0, 1]},
        {"dtype": "BF16", "shape": "", "data_offsets": [0, 2]},
        {"dtype": ["BF16"], "shape": [1], "data_offsets": [0, 2]},
        {"dtype": "BF16", "shape": ["x"], "data_offsets": [0, 2]},
        {"dtype": "BF16", "shape": [1], "data_offsets": [0]},
    ],
)
def test_a_header_entry_that_says_nothing(entry: object) -> None:
    with pytest.raises(SourceError, match=r"f: the header entry of a\.weight can't be understood"):
        check_header("f", {"a.weight": entry}, start=8, size=10)


@pytest.mark.parametrize(("shape", "offsets"), [((3,), (0, 4)), ((), (0, 4)), ((0,), (0, 4)), ((2,), (4, 0))])
def test_a_size_that_contradicts_the_shape(shape: tuple[int, ...], offsets: tuple[int, int]) -> None:
    with pytest.raises(SourceError, match="f: a should take"):
        check_header("f", {"a": {"dtype": "BF16", "shape": shape, "data_offsets": offsets}}, start=8, size=12)


@pytest.mark.parametrize("second", [3, 5])
def test_a_gap_or_an_overlap(second: int) -> None:
    raw = {
        "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
        "b": {"dtype": "U8", "shape": [1], "data_offsets": [second, second + 1]},
    }
    with pytest.raises(SourceError, match=f"f: b starts at byte {second} of the data, expected 4"):
        check_header("f", raw, start=8, size=8 + second + 1)


def test_a_dtype_changed_in_a_file(folder: Path) -> None:
    name = first_tensor(folder, SHARDS[0])
    edit_header(folder / SHARDS[0], lambda header: header[name].update(dtype="F32"))
    refused(folder, SHARDS[0], name, "should take")


def test_a_missing_shard(folder: Path) -> None:
    (folder / SHARDS[3]).unlink()
    refused(folder, f"{SHARDS[3]}: missing", INDEX, SHARDS[0], hint="fetch the checkpoint again")


def test_no_weights(folder: Path) -> None:
    for name in (*SHARDS, INDEX):
        (folder / name).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    refused(folder, f"{SINGLE}: missing", "found no *.safetensors", hint="ckptq reads safetensors checkpoints only")


def test_shards_without_their_index(folder: Path) -> None:
    (folder / INDEX).unlink()
    refused(folder, f"{SINGLE}: missing", SHARDS[0])


def test_one_file_without_an_index(folder: Path) -> None:
    (folder / INDEX).unlink()
    (folder / SHARDS[0]).rename(folder / SINGLE)
    component = read_inventory(folder).main
    assert component.weight_files == (SINGLE,)
    assert component.left_out == tuple(SHARDS[1:])


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": null}'])
def test_an_index_that_is_none(text: str, folder: Path) -> None:
    (folder / INDEX).write_text(text)
    refused(folder, INDEX)


@pytest.mark.parametrize("file", ["../x.safetensors", "sub/x.safetensors", "/x.safetensors", "..", "", "x.bin", 1, None])
def test_an_index_that_leaves_the_folder(file: Any, folder: Path) -> None:
    edit_index(folder, lambda weights: weights.update({"lm_head.weight": file}))
    refused(folder, "lm_head.weight is said to lie in", repr(file))


def test_the_index_names_a_tensor_that_is_not_stored(folder: Path) -> None:
    edit_index(folder, lambda weights: weights.update({"lm_head.bias": SHARDS[0]}))
    refused(folder, f"lm_head.bias: the index says it is in {SHARDS[0]}, which does not hold it")


def test_the_index_names_another_shard(folder: Path) -> None:
    name = first_tensor(folder, SHARDS[0])
    edit_index(folder, lambda weights: weights.update({name: SHARDS[1]}))
    refused(folder, f"{name}: the index says it is in {SHARDS[1]}, it is in {SHARDS[0]}")


def test_a_stored_tensor_that_the_index_does_not_name(folder: Path) -> None:
    edit_index(folder, lambda weights: weights.pop("lm_head.weight"))
    refused(folder, "lm_head.weight: stored in", "not in the index (1 such tensors)")


def test_a_tensor_stored_twice(folder: Path) -> None:
    name = first_tensor(folder, SHARDS[0])
    edit_header(folder / SHARDS[1], lambda header: header.update({name: header.pop(first_tensor(folder, SHARDS[1]))}))
    refused(folder, f"{name}: stored twice, in {SHARDS[0]} and in {SHARDS[1]}")


def test_further_copies_of_the_weights_are_left_out(folder: Path) -> None:
    copies = ["consolidated.safetensors", "extra.safetensors", "onnx/model.onnx", "original/params.json", "pytorch_model.bin"]
    copies += ["pytorch_model.bin.index.json", "x.gguf", "sub/consolidated.00.json"]
    kept = ["LICENSE", "code/modeling.py"]
    hidden = [".cache/state", "__pycache__/x.pyc"]
    for name in copies + kept + hidden:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    before, component = read_inventory(EXAMPLE).main, read_inventory(folder).main
    assert sorted(component.left_out) == sorted(copies)
    assert sorted(component.sidecars) == sorted([*before.sidecars, *kept])
    assert component.tensors == before.tensors


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.model", "bin.json", "merges.txt", "code/pt.py", "unoriginal/x.json", "spk_dict.pt"]
)
def test_not_a_copy_of_the_weights(name: str) -> None:
    assert not is_weight_copy(name)


def test_a_dangling_link(folder: Path) -> None:
    (folder / "README.md").symlink_to(folder / "blob")
    refused(folder, "README.md", "a dangling link?", hint="fetch the checkpoint again")


def test_a_link_inside_the_folder(folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / SHARDS[0]).rename(folder / "data" / "blob")
    (folder / SHARDS[0]).symlink_to("data/blob")
    assert read_inventory(folder).main.tensors == read_inventory(EXAMPLE).main.tensors
    (folder / "data" / "blob").unlink()
    refused(folder, SHARDS[0], "a dangling link?", hint="fetch the checkpoint again")


def print_of(folder: Path) -> str:
    return fingerprint(folder, read_inventory(folder).main)


def test_the_fingerprint_stays_with_a_copy(folder: Path) -> None:
    (folder / "notes.txt").write_text("a file that is no part of the model")
    assert print_of(folder) == print_of(EXAMPLE)


def scale_weights(folder: Path) -> None:
    """Another fine-tune: the same headers, other values."""
    for shard in SHARDS:
        with (folder / shard).open("r+b") as file:
            length = int.from_bytes(file.read(8), "little")
            file.seek(8 + length)
            data = np.frombuffer(file.read(), np.uint16) + np.uint16(1)
            file.seek(8 + length)
            file.write(data.tobytes())


def widen_config(folder: Path) -> None:
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")


def rename_tensor(folder: Path) -> None:
    (folder / INDEX).write_text((folder / INDEX).read_text().replace('"lm_head.weight"', '"lm_tail.weight"'))
    edit_header(folder / SHARDS[0], lambda header: header.update({"lm_tail.weight": header.pop("lm_head.weight")}))


@pytest.mark.parametrize("change", [scale_weights, widen_config, rename_tensor])
def test_the_fingerprint_changes_with_the_model(change: Callable[[Path], None], folder: Path) -> None:
    change(folder)
    assert print_of(folder) != print_of(EXAMPLE)


def read(reader: Reader, tensor: SourceTensor, start: int = 0, count: int | None = None) -> bytes:
    buffer = bytearray(tensor.spec.nbytes - start if count is None else count)
    reader.read_into(tensor, start, memoryview(buffer))
    return bytes(buffer)


def inventory_of(arrays: Mapping[str, Any], folder: Path) -> Path:
    save_file(dict(arrays), folder / SINGLE)
    (folder / "config.json").write_text("{}")
    return folder


DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "U64": "<u8", "I32": "<i4", "U32": "<u4", "I16": "<i2"}
DTYPES |= {"U16": "<u2", "I8": "|i1", "U8": "|u1", "BOOL": "|b1"}
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
SPECS = st.dictionaries(NAMES, st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=4)), max_size=8)


@settings(max_examples=80, deadline=None)
@given(specs=SPECS, seed=st.integers(0, 9))
def test_whatever_safetensors_writes_is_read_back(
    specs: dict[str, tuple[str, list[int]]], seed: int, tmp_path_factory: Any
) -> None:
    rng = np.random.default_rng(seed)
    arrays = {name: np.asarray(rng.random(shape) * 100).astype(DTYPES[dtype]) for name, (dtype, shape) in specs.items()}
    folder = inventory_of(arrays, tmp_path_factory.mktemp("any"))
    inventory = read_inventory(folder)
    tensors = inventory.main.tensors
    assert {n: (t.spec.dtype, list(t.spec.shape)) for n, t in tensors.items()} == specs
    with Reader(folder, inventory.main) as reader:
        assert {name: read(reader, tensor) for name, tensor in tensors.items()} == {n: a.tobytes() for n, a in arrays.items()}


def test_reading_a_part(tmp_path: Path) -> None:
    array = np.arange(1000, dtype=np.uint8).reshape(10, 100)
    folder = inventory_of({"a": array, "b": array + 1}, tmp_path)
    component = read_inventory(folder).main
    with Reader(folder, component) as reader:
        assert read(reader, component.tensors["b"], 250, 33) == (array + 1).tobytes()[250:283]
        assert read(reader, component.tensors["a"], 1000, 0) == b""


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    folder = inventory_of({"a": np.zeros(100_000, np.float32)}, tmp_path)
    component = read_inventory(folder).main
    with Reader(folder, component) as reader:
        os.truncate(folder / SINGLE, 1000)
        with pytest.raises(SourceError, match=f"{SINGLE}: ended while a was read"):
            read(reader, component.tensors["a"])


def test_the_generator_writes_what_the_index_says(tmp_path: Path) -> None:
    inventory = read_inventory(make_checkpoint(tmp_path / "dense", **PRESETS["tiny"], seed=1))
    assert len(inventory.main.weight_files) == 2
    example = read_inventory(EXAMPLE).main.tensors
    expected = {name: tensor.spec for name, tensor in example.items() if not name.startswith(BEYOND_TINY)}
    assert {name: tensor.spec for name, tensor in inventory.main.tensors.items()} == expected
    values = matrices_of(tmp_path / "dense" / inventory.main.weight_files[0])
    assert values.max() < 0.2
    assert abs(values.std() - 0.02) < 0.001


def matrices_of(path: Path) -> Any:
    """All values of a BF16 file's matrices as float32: their 16 bits are its upper half."""
    raw = np.fromfile(path, np.uint8)
    entries = [e for e in read_header(path).values() if len(e["shape"]) == 2]
    bits = [raw[e["offset"] : e["offset"] + 2 * int(np.prod(e["shape"]))].view(np.uint16) for e in entries]
    return (np.concatenate(bits).astype(np.uint32) << 16).view(np.float32)


def test_a_sparse_checkpoint_has_the_dense_one_s_headers(tmp_path: Path) -> None:
    dense = read_inventory(make_checkpoint(tmp_path / "dense", **PRESETS["tiny"]))
    sparse = read_inventory(make_checkpoint(tmp_path / "sparse", **PRESETS["tiny"], sparse=True))
    assert sparse.main == dense.main


def test_72b_takes_no_disk(tmp_path: Path) -> None:
    component = read_inventory(make_checkpoint(tmp_path, **PRESETS["72b"])).main
    assert component.nbytes == 146_821_554_688
    assert len(component.weight_files) == 38
    assert sum(p.stat().st_blocks for p in tmp_path.iterdir()) * 512 < 2_000_000
