"""Fetching from a Hub: the real huggingface_hub against a server on the loopback, with a cache of its own for each test."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer, commit_of
from huggingface_hub import close_session, constants

from ckptq import hub
from ckptq.checkpoint import INDEX, SINGLE, read_header, read_inventory
from ckptq.errors import CkptqError, OutputError, SourceError

EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny-qwen2.5-vl"
SHARDS = sorted(p.name for p in EXAMPLE.glob("*.safetensors"))
SMALL = sorted(p.name for p in EXAMPLE.iterdir() if p.suffix != ".safetensors")
COPIES = ["consolidated.safetensors", "pytorch_model.bin", "model-extra.safetensors", "original/params.json", "onnx/model.onnx"]
REPO = "org/tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example as a Hub has it: with further copies of its weights, and code in a subfolder."""
    folder = tmp_path_factory.mktemp("repo") / "tiny"
    shutil.copytree(EXAMPLE, folder)
    for name in [*COPIES, "code/modeling.py"]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not for us")
    return folder


Serve = Callable[..., HubServer]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Starts a Hub and points huggingface_hub, in this process, at it and at a cache in tmp_path.

    huggingface_hub reads its environment when it is imported, so its constants are set here; `command` sets the environment.
    """
    running: list[HubServer] = []

    def start(revisions: dict[str, Path], **options: Any) -> HubServer:
        server = HubServer(REPO, revisions, **options)
        running.append(server)
        server.__enter__()
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        return server

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "home" / "harnesses.json"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    yield start
    close_session()
    for server in running:
        server.stop()


def command(tmp_path: Path, url: str, code: str, *, offline: bool = False) -> list[str]:
    """Python running `code` in a process of its own, pointed at `url` by its environment, with this test's cache."""
    env = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": url, "HF_HUB_OFFLINE": str(int(offline)), "HF_HUB_DISABLE_XET": "1"}
    return ["env", "-u", "HF_TOKEN", *(f"{k}={v}" for k, v in env.items()), sys.executable, "-c", code]


FETCH = f"""
import json, sys
from ckptq import checkpoint, errors, hub
try:
    source = hub.fetch({REPO!r})
    names = list(checkpoint.read_inventory(source.root, source.header).main.tensors)
    print(json.dumps({{"label": source.label, "tensors": len(names), "torch": "torch" in sys.modules}}))
except errors.CkptqError as error:
    print(json.dumps({{"error": type(error).__name__, "message": str(error), "hint": error.hint}}))
"""


def run(tmp_path: Path, url: str, code: str = FETCH, **options: bool) -> dict[str, Any]:
    done = subprocess.run(command(tmp_path, url, code, **options), capture_output=True, text=True, timeout=120, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def asked(server: HubServer) -> list[str]:
    """The files of which anything was sent."""
    return sorted(server.sent)


def files_of(root: Path) -> list[str]:
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())


def test_a_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = hub.fetch(str(EXAMPLE))
    assert (source.root, source.label, source.header) == (EXAMPLE, None, read_header)
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.fetch("org/tiny").label is None


@pytest.mark.parametrize("src", ["", "nowhere", "./org/tiny", "../tiny", "/no/such/folder", "org/tiny@", "a/b/c"])
def test_neither_folder_nor_hub_id(src: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="no such folder") as caught:
        hub.fetch(src)
    assert caught.value.hint is not None
    assert "org/name[@revision]" in caught.value.hint


def test_the_hub_is_not_asked_for_a_mistyped_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve, folder: Path
) -> None:
    """Its name is nobody else's business. With a revision it is a model's."""
    server = serve({"main": folder})
    (tmp_path / "org").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="org/tiny: no such folder in org") as caught:
        hub.fetch(REPO)
    assert f"{REPO}@main" in str(caught.value.hint)
    assert server.sent == {}
    assert str(hub.fetch(f"{REPO}@main").label).startswith(f"{REPO}@")


def test_a_file_is_no_checkpoint() -> None:
    with pytest.raises(SourceError, match="expected a folder, found a file"):
        hub.fetch(str(EXAMPLE / "config.json"))


def test_only_what_is_needed_is_fetched(serve: Serve, folder: Path) -> None:
    server = serve({"main": folder})
    source = hub.fetch(REPO)
    assert source.label == f"{REPO}@{commit_of('main')}"
    assert asked(server) == files_of(source.root) == sorted([*SMALL, *SHARDS, "code/modeling.py"])
    inventory = read_inventory(source.root, source.header)
    assert inventory.main.tensors == read_inventory(EXAMPLE).main.tensors
    assert "code/modeling.py" in inventory.main.sidecars


def test_one_file_of_weights_without_an_index(serve: Serve, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "single", ignore=lambda _, names: {n for n in names if n in (*SHARDS, INDEX)})
    shutil.copy(folder / SHARDS[0], tmp_path / "single" / SINGLE)
    server = serve({"main": tmp_path / "single"})
    source = hub.fetch(REPO)
    assert read_inventory(source.root, source.header).main.weight_files == (SINGLE,)
    assert not set(asked(server)) & set(COPIES)


@pytest.mark.parametrize("ranges", [True, False])
def test_headers_only(ranges: bool, serve: Serve, folder: Path) -> None:
    server = serve({"main": folder}, ranges=ranges)
    source = hub.fetch(REPO, weights=False)
    assert files_of(source.root) == sorted([*SMALL, "code/modeling.py"])
    assert read_inventory(source.root, source.header).main.tensors == read_inventory(EXAMPLE).main.tensors
    limit = hub._FIRST_BYTES
    if ranges:
        assert {server.sent[shard] for shard in SHARDS} == {limit}
    else:  # the connection is dropped early; what its buffers hold is on the way already
        assert all(server.sent[shard] < (EXAMPLE / shard).stat().st_size for shard in SHARDS)


def test_headers_only_takes_what_the_cache_has(serve: Serve, folder: Path) -> None:
    server = serve({"main": folder})
    hub.fetch(REPO)
    server.sent.clear()
    source = hub.fetch(REPO, weights=False)
    assert read_inventory(source.root, source.header).main.tensors == read_inventory(EXAMPLE).main.tensors
    assert not server.sent


def test_a_header_longer_than_the_first_read(serve: Serve, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_FIRST_BYTES", 100)
    server = serve({"main": folder})
    source = hub.fetch(REPO, weights=False)
    assert read_inventory(source.root, source.header).main.tensors == read_inventory(EXAMPLE).main.tensors
    with (EXAMPLE / SHARDS[0]).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    assert server.sent[SHARDS[0]] == 100 + 8 + length


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "truncated or not a safetensors file"),
        (b"\xff" * 64, "truncated or not a safetensors file"),
        (b"\x08" + bytes(7) + b"not JSON", "not JSON"),
        (b"\x02" + bytes(7) + b"{}more", "truncated or overlong"),
    ],
)
def test_headers_only_of_a_broken_file(data: bytes, message: str, serve: Serve, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "broken")
    (tmp_path / "broken" / SHARDS[1]).write_bytes(data)
    serve({"main": tmp_path / "broken"})
    with pytest.raises(SourceError, match=message) as caught:
        hub.fetch(REPO, weights=False)
    assert SHARDS[1] in str(caught.value)


def test_a_revision_is_pinned(serve: Serve, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "old")
    config = (tmp_path / "old" / "config.json").read_text().replace('"use_cache": true', '"use_cache": false')
    (tmp_path / "old" / "config.json").write_text(config)
    serve({"main": folder, "v1": tmp_path / "old"})
    for revision in ("v1", commit_of("v1")):
        source = hub.fetch(f"{REPO}@{revision}")
        assert source.label == f"{REPO}@{commit_of('v1')}"
        assert (source.root / "config.json").read_text() == config


@pytest.mark.parametrize("weights", [True, False])
def test_a_shard_that_the_index_names_is_not_there(weights: bool, serve: Serve, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "less", ignore=lambda *_: {SHARDS[2]})
    serve({"main": tmp_path / "less"})
    with pytest.raises(SourceError, match=f"has no {SHARDS[2]}, which its {INDEX} names"):
        hub.fetch(REPO, weights=weights)


@pytest.mark.parametrize("weights", [True, False])
def test_no_safetensors_at_all(weights: bool, serve: Serve, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "bin", ignore=lambda _, names: {n for n in names if n in (*SHARDS, INDEX)})
    serve({"main": tmp_path / "bin"})
    with pytest.raises(SourceError, match="has neither") as caught:
        hub.fetch(REPO, weights=weights)
    assert caught.value.hint == "ckptq reads safetensors checkpoints only"


def test_what_the_hub_does_not_know(serve: Serve, folder: Path) -> None:
    serve({"main": folder})
    with pytest.raises(SourceError, match="org/tinny: no folder of that name, and no such model on the Hub") as caught:
        hub.fetch("org/tinny")
    assert caught.value.hint is not None
    assert "spelling" in caught.value.hint
    assert "hf auth login" in caught.value.hint
    with pytest.raises(SourceError, match=f"{REPO}@v9: the model has no such revision"):
        hub.fetch(f"{REPO}@v9")


@pytest.mark.parametrize("weights", [True, False])
def test_gated(weights: bool, serve: Serve, folder: Path) -> None:
    server = serve({"main": folder}, gated=True)
    with pytest.raises(SourceError, match=f"{REPO}: gated") as caught:
        hub.fetch(REPO, weights=weights)
    assert caught.value.hint == f"ask for it on {server.url}/{REPO}, then `hf auth login`"


@pytest.mark.parametrize(("status", "message"), [(503, "the Hub answered 503"), (403, "the Hub refuses access")])
def test_the_hub_refuses(status: int, message: str, serve: Serve, folder: Path) -> None:
    serve({"main": folder}).broken = status
    with pytest.raises(SourceError, match=message):
        hub.fetch(REPO)


def test_no_network(serve: Serve, folder: Path) -> None:
    server = serve({"main": folder})
    server.stop()
    with pytest.raises(SourceError, match=f"{REPO}: the Hub can't be reached, and the cache .* does not have all of it"):
        hub.fetch(REPO)


@pytest.mark.parametrize("revision", ["", "@main", f"@{commit_of('main')}"])
def test_a_warm_cache_is_enough_without_a_network(revision: str, serve: Serve, folder: Path) -> None:
    server = serve({"main": folder})
    first = hub.fetch(REPO)
    server.stop()
    assert hub.fetch(REPO + revision) == first
    assert hub.fetch(REPO + revision, weights=False).label == first.label


def test_a_cache_that_lists_no_files_is_enough_for_a_pinned_commit(serve: Serve, folder: Path) -> None:
    server = serve({"main": folder})
    first = hub.fetch(REPO)
    shutil.rmtree(first.root.parent.parent / "trees")
    from huggingface_hub import _tree_cache

    _tree_cache._IN_MEMORY_TREE_CACHE.clear()
    server.stop()
    assert hub.fetch(f"{REPO}@{commit_of('main')}") == first


@pytest.mark.parametrize("weights", [True, False])
def test_a_cache_without_the_weights_is_not_enough(
    weights: bool, serve: Serve, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve({"main": folder})
    hub.fetch(REPO, weights=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # without a network huggingface_hub tries again for 20 s
    with pytest.raises(SourceError, match="can't be reached"):
        hub.fetch(REPO, weights=weights)


def test_set_by_the_environment_and_without_torch(tmp_path: Path, folder: Path) -> None:
    expected = {"label": f"{REPO}@{commit_of('main')}", "tensors": len(read_inventory(EXAMPLE).main.tensors), "torch": False}
    with HubServer(REPO, {"main": folder}) as server:
        assert run(tmp_path, server.url, offline=True)["error"] == "SourceError"
        assert not server.requests
        assert run(tmp_path, server.url) == expected
        server.requests.clear()
        assert run(tmp_path, server.url, offline=True) == expected
        assert not server.requests


def test_a_killed_fetch_goes_on_with_the_files_it_lacks(tmp_path: Path, folder: Path) -> None:
    with HubServer(REPO, {"main": folder}) as server:
        server.hold(SHARDS[1], after=1_000_000)
        process = subprocess.Popen(command(tmp_path, server.url, FETCH), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        assert server.held.wait(60)
        snapshot = tmp_path / "home" / "hub" / "models--org--tiny" / "snapshots" / commit_of("main")
        others = [shard for shard in SHARDS if shard != SHARDS[1]]
        wait_for(lambda: all((snapshot / shard).exists() for shard in others))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (snapshot / SHARDS[1]).exists()
        server.hold("", 0)
        server.release.set()
        server.sent.clear()
        assert run(tmp_path, server.url)["tensors"] == len(read_inventory(EXAMPLE).main.tensors)
        assert asked(server) == [SHARDS[1]]
        assert (snapshot / SHARDS[1]).read_bytes() == (EXAMPLE / SHARDS[1]).read_bytes()


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("waited in vain")


def test_a_cache_that_takes_no_file_of_that_size(tmp_path: Path, folder: Path) -> None:
    """As a full disk, by a limit that a test may set: writing fails with EFBIG."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
    with HubServer(REPO, {"main": folder}) as server:
        result = run(tmp_path, server.url, limit + FETCH)
    assert result["error"] == "OutputError"
    assert "takes no file of that size" in result["message"]
    assert "HF_HOME" in result["hint"]
    assert str(tmp_path) in result["message"]


def test_a_cache_that_cannot_be_written(serve: Serve, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    serve({"main": folder})
    with pytest.raises(OutputError, match="can't be written: Not a directory"):
        hub.fetch(REPO)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, os.strerror(28)), OutputError),
        (RuntimeError("Task error: I/O error: No space left on device (os error 28)"), OutputError),
        (RuntimeError("Task error: request failed"), SourceError),
    ],
)
def test_errors_that_no_server_here_can_cause(error: Exception, expected: type[CkptqError]) -> None:
    explained = hub._explain(error, REPO, REPO)
    assert type(explained) is expected
    assert explained.hint


def test_mistakes_of_ours_are_not_explained_away() -> None:
    with pytest.raises(KeyError), hub._explained(REPO, REPO):
        raise KeyError("a bug")
