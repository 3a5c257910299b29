"""Files of the output: readable by safetensors itself, visible only when whole, under the umask's mode."""

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ckptq.checkpoint import TensorSpec, read_header
from ckptq.errors import OutputError
from ckptq.writer import TensorFile, copy_bytes, copy_file, reserve, write_text, writing

SPECS = (
    TensorSpec("scale", "F32", ()),
    TensorSpec("norm", "BF16", (3,)),
    TensorSpec("codes", "F8_E4M3", (2, 5)),
    TensorSpec("none", "BF16", (0, 4)),
)
OFFSETS = {"scale": 0, "norm": 4, "codes": 10, "none": 20}
DATA = {"scale": bytes([0, 0, 128, 63]), "norm": bytes(range(6)), "codes": bytes(range(10, 20)), "none": b""}


def fill(file: TensorFile, *, without: str = "") -> None:
    for spec in SPECS:
        if spec.name != without:
            file.write(spec.name, 0, memoryview(DATA[spec.name]))


@pytest.fixture(params=[0o077, 0o022])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_safetensors_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with TensorFile(path, SPECS, OFFSETS) as file:
        fill(file)
        file.finish()
    with safe_open(path, "pt") as found:
        assert found.metadata() == {"format": "pt"}
        assert set(found.keys()) == set(DATA)
        assert found.get_tensor("scale").item() == 1.0
        assert found.get_tensor("scale").shape == ()
        for spec in SPECS:
            tensor = found.get_tensor(spec.name)
            assert tuple(tensor.shape) == spec.shape
            assert bytes(tensor.flatten().view(dtype=torch.uint8).tolist()) == DATA[spec.name]
    assert {name: entry["dtype"] for name, entry in read_header(path).items()} == {s.name: s.dtype for s in SPECS}


@pytest.mark.parametrize("length", range(1, 10))
def test_the_data_begins_at_a_multiple_of_8(length: int, tmp_path: Path) -> None:
    name = "x" * length
    with TensorFile(tmp_path / "a", [TensorSpec(name, "F32", (1,))], {name: 0}) as file:
        file.write(name, 0, memoryview(bytes(4)))
        file.finish()
    assert read_header(tmp_path / "a")[name]["offset"] % 8 == 0


def test_bytes_may_come_in_pieces_and_in_any_order(tmp_path: Path) -> None:
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    with TensorFile(whole, SPECS, OFFSETS) as file:
        fill(file)
        file.finish()
    with TensorFile(pieces, SPECS, OFFSETS) as file:
        for spec in reversed(SPECS):
            for start in reversed(range(0, spec.nbytes, 3)):
                file.write(spec.name, start, memoryview(DATA[spec.name])[start : start + 3])
        file.finish()
    assert pieces.read_bytes() == whole.read_bytes()


def test_it_is_visible_only_when_finished(tmp_path: Path) -> None:
    with TensorFile(tmp_path / "a.safetensors", SPECS, OFFSETS) as file:
        fill(file)
        assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors.partial"]
        file.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_writer_that_dies_leaves_a_partial_alone(tmp_path: Path) -> None:
    with contextlib.suppress(RuntimeError), TensorFile(tmp_path / "a.safetensors", SPECS, OFFSETS) as file:
        fill(file)
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors.partial"]
    with TensorFile(tmp_path / "a.safetensors", SPECS, OFFSETS) as file:
        fill(file)
        file.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("name", ["scale", "codes"])
def test_an_incomplete_tensor_is_refused(name: str, tmp_path: Path) -> None:
    with TensorFile(tmp_path / "a", SPECS, OFFSETS) as file:
        fill(file, without=name)
        with pytest.raises(AssertionError, match=rf"a: {name} has \d+ bytes left to write"):
            file.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["a.partial"]


def test_bytes_written_twice_are_refused(tmp_path: Path) -> None:
    with TensorFile(tmp_path / "a", SPECS, OFFSETS) as file:
        fill(file)
        file.write("codes", 0, memoryview(DATA["codes"])[:3])
        with pytest.raises(AssertionError, match="codes has -3 bytes left"):
            file.finish()


def test_modes_follow_the_umask(umask: int, tmp_path: Path) -> None:
    with TensorFile(tmp_path / "tensors", SPECS, OFFSETS) as file:
        fill(file)
        file.finish()
    write_text(tmp_path / "text", "x")
    (tmp_path / "source").write_text("y")
    (tmp_path / "source").chmod(0o400)
    copy_file(tmp_path / "source", tmp_path / "deeper" / "copy")
    for name in ("tensors", "text", "deeper/copy"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask


def test_a_copy_follows_links(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(bytes(range(256)) * 10_000)
    (tmp_path / "link").symlink_to("blob")
    copy_file(tmp_path / "link", tmp_path / "copy")
    assert not (tmp_path / "copy").is_symlink()
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "blob").read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_text_is_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("before")
    write_text(tmp_path / "a", "é\n")
    assert (tmp_path / "a").read_bytes() == "é\n".encode()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("number", "message", "hint"),
    [
        (errno.ENOSPC, "no room left: No space left on device", "--resume"),
        (errno.EDQUOT, "no room left", "--resume"),
        (errno.EACCES, "can't be written: Permission denied", "--output"),
        (errno.EROFS, "can't be written: Read-only file system", "--output"),
        (errno.EIO, "can't be written: Input/output error", "None"),
    ],
)
def test_what_the_system_says(number: int, message: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError) as caught, writing(tmp_path / "a"):
        raise OSError(number, os.strerror(number))
    assert f"{tmp_path / 'a'}: {message}" in str(caught.value)
    assert hint in str(caught.value.hint)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="can't be written: No such file"):
        TensorFile(tmp_path / "missing" / "a", SPECS, OFFSETS)


# Copies by the kernel

CONTENT = bytes(range(256)) * 9000  # two blocks of a copy by hand, and some


@pytest.fixture
def files(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """(source, target), open; the source is longer than what is copied, the target has something in it."""
    (tmp_path / "source").write_bytes(b"before" + CONTENT + b"after")
    (tmp_path / "target").write_bytes(b"kept")
    source, target = os.open(tmp_path / "source", os.O_RDONLY), os.open(tmp_path / "target", os.O_RDWR)
    yield source, target
    os.close(source)
    os.close(target)


def refusing(number: int, after: int = 0) -> Callable[..., int]:
    """A system call that refuses, or does so after it has copied a little: an older kernel, another kind of file system."""
    left = [after]

    def call(*args: int) -> int:
        if not left[0]:
            raise OSError(number, os.strerror(number))
        count, left[0] = left[0], 0
        source, target, _, at, to = args
        return os.pwrite(target, os.pread(source, count, at), to)

    return call


REFUSALS = [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM]


def copied(files: tuple[int, int]) -> bytes:
    source, target = files
    copy_bytes(source, 6, target, 4, len(CONTENT))
    assert os.pread(target, 4, 0) == b"kept"
    return os.pread(target, len(CONTENT) + 9, 4)


def test_the_kernel_copies(files: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing passes through this process where it does."""
    monkeypatch.delattr(os, "pread")
    monkeypatch.delattr(os, "pwrite")
    source, target = files
    copy_bytes(source, 6, target, 4, len(CONTENT))
    monkeypatch.undo()
    assert os.pread(target, len(CONTENT) + 9, 4) == CONTENT


@pytest.mark.parametrize("after", [0, 100_000])
@pytest.mark.parametrize("number", REFUSALS)
def test_sendfile_where_copy_file_range_is_refused(
    files: tuple[int, int], monkeypatch: pytest.MonkeyPatch, number: int, after: int
) -> None:
    sent: list[int] = []
    inner = os.sendfile
    monkeypatch.setattr(os, "copy_file_range", refusing(number, after))
    monkeypatch.setattr(os, "sendfile", lambda *args: sent.append(inner(*args)) or sent[-1])
    assert copied(files) == CONTENT
    assert sum(sent) == len(CONTENT) - after


@pytest.mark.parametrize("number", REFUSALS)
def test_by_hand_where_both_are_refused(files: tuple[int, int], monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(os, "copy_file_range", refusing(number))
    monkeypatch.setattr(os, "sendfile", refusing(number))
    assert copied(files) == CONTENT


def test_by_hand_where_the_kernel_copies_nothing(files: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As of files of /proc, and of some FUSE file systems."""
    monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
    monkeypatch.setattr(os, "sendfile", lambda *_: 0)
    assert copied(files) == CONTENT


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_at_fault_is_no_refusal(files: tuple[int, int], monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(os, "copy_file_range", refusing(number))
    with pytest.raises(OSError, match=os.strerror(number)):
        copied(files)


def test_a_source_that_ends_early(files: tuple[int, int]) -> None:
    source, target = files
    with pytest.raises(OSError, match="the source ended while it was copied"):
        copy_bytes(source, 6, target, 4, len(CONTENT) + 6)


@pytest.mark.parametrize("way", ["copy_file_range", "sendfile", "by hand"])
def test_threads_copy_into_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Each to its own place, whatever the descriptor they share says of where it stands."""
    if way != "copy_file_range":
        monkeypatch.setattr(os, "copy_file_range", refusing(errno.EXDEV))
    if way == "by hand":
        monkeypatch.setattr(os, "sendfile", refusing(errno.EINVAL))
    (tmp_path / "source").write_bytes(CONTENT)
    spec, piece = TensorSpec("a", "U8", (len(CONTENT),)), 10_007
    source = os.open(tmp_path / "source", os.O_RDONLY)
    with TensorFile(tmp_path / "out", [spec], {"a": 0}) as file, ThreadPoolExecutor(8) as pool:
        starts = range(0, len(CONTENT), piece)
        list(pool.map(lambda at: file.copy("a", at, source, at, min(piece, len(CONTENT) - at)), starts))
        file.flush()
        file.finish()
    os.close(source)
    assert (tmp_path / "out").read_bytes().endswith(CONTENT)
    assert read_header(tmp_path / "out")["a"]["offset"] + len(CONTENT) == (tmp_path / "out").stat().st_size


def test_room_is_taken_at_the_start(tmp_path: Path) -> None:
    """So that a disk that is full says so before the work."""
    large = [TensorSpec("a", "U8", (1 << 22,))]
    with TensorFile(tmp_path / "a", large, {"a": 0}):
        found = (tmp_path / "a.partial").stat()
        assert found.st_size > 1 << 22
        assert found.st_blocks * 512 >= 1 << 22
    with pytest.raises(OutputError, match=r"can't be written: File too large|no room left"):
        TensorFile(tmp_path / "b", [TensorSpec("a", "U8", (1 << 62,))], {"a": 0})


def test_no_descriptor_stays_open_where_there_is_no_room(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(OutputError):
        TensorFile(tmp_path / "b", [TensorSpec("a", "U8", (1 << 62,))], {"a": 0})
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_file_system_that_takes_no_room() -> None:
    """The files of /proc can't."""
    fd = os.open("/proc/self/comm", os.O_WRONLY)
    reserve(fd, 100)
    os.close(fd)
