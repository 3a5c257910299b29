"""What goes wrong: each fault has a message that names it, an exit code, and leaves nothing that looks whole."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from faults import (
    EXAMPLE,
    ROOT,
    SHARDS,
    Kill,
    Runs,
    arguments,
    assert_not_whole,
    content,
    copy_example,
    mounted,
    shared_runs,
    until,
)
from hub_server import HubServer
from safetensors.torch import load_file, save_file

from ckptq.calibrate import calibrate
from ckptq.checkpoint import INDEX, STAGING, Reader, TensorSpec
from ckptq.cli import main
from ckptq.console import Console
from ckptq.convert import prepare
from ckptq.encode import stored_value
from ckptq.errors import DataError
from ckptq.journal import ProgressFile
from ckptq.plan import Observer, Scale
from ckptq.recipe import load_recipe
from ckptq.streamed import StreamedModel
from ckptq.validate import validate_folder
from ckptq.validators import has_errors

LAYER = "model.layers.2"
Edit = Callable[[Path], object]


@pytest.fixture(scope="module")
def runs() -> Runs:
    return shared_runs()


Ckptq = Callable[..., tuple[int, str]]


@pytest.fixture
def ckptq(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Ckptq]:
    """The command line in this process: exit code, and what went to stderr."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    before = signal.getsignal(signal.SIGTERM)

    def run(*argv: str) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert isinstance(stop.value.code, int)
        return stop.value.code, capsys.readouterr().err

    yield run
    signal.signal(signal.SIGTERM, before)


def shard_of(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def change(folder: Path, tensor: str, how: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Stores another tensor in the place of one, or none at all, in the shard and in the index."""
    path = shard_of(folder, tensor)
    tensors = load_file(path)
    changed = how(tensors.pop(tensor).clone())
    if changed is not None:
        tensors[tensor] = changed
    save_file(tensors, path, metadata={"format": "pt"})
    index = json.loads((folder / INDEX).read_text())
    if changed is None:
        del index["weight_map"][tensor]
    (folder / INDEX).write_text(json.dumps(index))


def spoil(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def how(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return how


def configure(folder: Path, **changes: Any) -> None:
    """Sets keys of config.json; a mapping is merged."""
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(config))


def reindex(folder: Path, entries: Mapping[str, str | None]) -> None:
    """Sets or, with None, removes entries of the index."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {k: v for k, v in {**index["weight_map"], **entries}.items() if v is not None}
    (folder / INDEX).write_text(json.dumps(index))


def drop(tensor: torch.Tensor) -> None:
    return None


def shorten(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:-64].contiguous()


UP, NORM, BIAS = f"{LAYER}.mlp.up_proj.weight", f"{LAYER}.input_layernorm.weight", f"{LAYER}.self_attn.k_proj.bias"

BROKEN_SOURCES: dict[str, tuple[Edit, int, str, str]] = {
    "missing shard": (
        lambda f: (f / SHARDS[1]).unlink(),
        2,
        f"{SHARDS[1]}: missing, named by {INDEX}; found {SHARDS[0]}",
        "fetch the checkpoint again",
    ),
    "truncated shard": (
        lambda f: os.truncate(f / SHARDS[1], 4_000_000),
        2,
        f"{SHARDS[1]}: truncated or overlong: the header describes 4728584 bytes, the file has 4000000",
        "fetch the file again",
    ),
    "shard truncated in its header": (
        lambda f: os.truncate(f / SHARDS[1], 100),
        2,
        f"{SHARDS[1]}: truncated or not a safetensors file: the header should be 3840 bytes long",
        "fetch the file again",
    ),
    "empty shard": (
        lambda f: os.truncate(f / SHARDS[1], 0),
        2,
        f"{SHARDS[1]}: truncated or not a safetensors file",
        "fetch the file again",
    ),
    "index names another shard": (
        lambda f: reindex(f, {UP: SHARDS[3]}),
        2,
        f"{UP}: the index says it is in {SHARDS[3]}, it is in {SHARDS[1]}",
        "",
    ),
    "index names a tensor that is not there": (
        lambda f: reindex(f, {"model.extra.weight": SHARDS[0]}),
        2,
        f"model.extra.weight: the index says it is in {SHARDS[0]}, which does not hold it",
        "fetch the checkpoint again",
    ),
    "index lacks a tensor": (
        lambda f: reindex(f, {UP: None}),
        2,
        f"{UP}: stored in {SHARDS[1]} but not in the index (1 such tensors)",
        "mend the index, or remove the tensor",
    ),
    "missing weight": (
        lambda f: change(f, UP, drop),
        2,
        f"{UP}: missing; config.json calls for 6 layers",
        "fetch the checkpoint again",
    ),
    "missing layer": (
        lambda f: configure(f, text_config={"num_hidden_layers": 7}),
        2,
        "model.layers.6.self_attn.q_proj.weight: missing; config.json calls for 7 layers",
        "fetch the checkpoint again",
    ),
    "a layer too many": (
        lambda f: configure(f, text_config={"num_hidden_layers": 5}),
        2,
        "model.layers.5.input_layernorm.weight: stored, but config.json has num_hidden_layers 5",
        "",
    ),
    "architecture without a scope": (
        lambda f: configure(f, architectures=["OlmoForCausalLM"], model_type="olmo"),
        2,
        "no scope for architectures ['OlmoForCausalLM']",
        "`ckptq inspect SRC` proposes a scope",
    ),
    "quantized already, by its config": (
        lambda f: configure(f, quantization_config={"quant_method": "modelopt"}),
        2,
        "the source is quantized already: config.json says quant_method 'modelopt'",
        "start from the BF16 checkpoint",
    ),
    "quantized already, by a weight": (
        lambda f: change(f, UP, lambda t: t.to(torch.float8_e4m3fn)),
        2,
        f"the source is quantized already: {UP} is F8_E4M3",
        "start from the BF16 checkpoint",
    ),
    "no config": (
        lambda f: (f / "config.json").unlink(),
        2,
        "has no config.json, so it is no Hugging Face checkpoint",
        "",
    ),
    "missing norm": (lambda f: change(f, NORM, drop), 1, f"{NORM}: expected a tensor [256], found not stored", ""),
    "missing bias": (lambda f: change(f, BIAS, drop), 1, f"{BIAS}: expected a tensor [128], found not stored", ""),
    "wrong shape of a weight": (
        lambda f: change(f, UP, shorten),
        1,
        f"{UP}: expected [768, 256], from config.json, found [704, 256]",
        "mend the sizes in config.json",
    ),
    "wrong shape of a norm": (
        lambda f: change(f, NORM, shorten),
        1,
        f"{NORM}: expected [256], from config.json, found [192]",
        "mend the sizes in config.json",
    ),
    "config of another size": (
        lambda f: configure(f, text_config={"hidden_size": 512}),
        1,
        "lm_head.weight: expected [4096, 512], from config.json, found [4096, 256]",
        "mend the sizes in config.json",
    ),
}


@pytest.mark.parametrize("fault", BROKEN_SOURCES)
def test_broken_source(ckptq: Ckptq, tmp_path: Path, fault: str) -> None:
    """Found from headers alone, before anything is written."""
    edit, expected, message, hint = BROKEN_SOURCES[fault]
    source, out = copy_example(tmp_path / "source"), tmp_path / "out"
    edit(source)
    code, err = ckptq(*arguments(out, model=source))
    assert message in err
    assert hint in err
    assert code == expected
    assert not out.exists()


@pytest.mark.parametrize(
    ("tensor", "value", "what"),
    [
        (UP, float("nan"), "NaN"),
        (UP, float("inf"), "infinite"),
        (NORM, float("nan"), "NaN"),
        ("lm_head.weight", float("-inf"), "infinite"),
        ("visual.blocks.1.attn.qkv.bias", float("nan"), "NaN"),
    ],
)
def test_weight_that_is_not_finite(ckptq: Ckptq, tmp_path: Path, tensor: str, value: float, what: str) -> None:
    """In any tensor, quantized or not: of the head before calibration, of the others by the time they are in memory."""
    source, out = copy_example(tmp_path / "source"), tmp_path / "out"
    change(source, tensor, spoil(value))
    for attempt in ("", "--resume"):
        code, err = ckptq(*arguments(out, *filter(None, [attempt]), model=source))
        assert code == 1
        assert f"error: {tensor}: holds {what} values (in {shard_of(source, tensor).name}); expected finite weights" in err
        assert "fetch it again or take another" in err
        assert_not_whole(out)


def test_all_zero_weight(runs: Runs, tmp_path: Path) -> None:
    """A pruned linear, a dead K and a dead V: scale 1, codes 0, and no finding."""
    source, out = copy_example(tmp_path / "source"), tmp_path / "out"
    dead = f"{LAYER}.self_attn"
    for name in (f"{LAYER}.mlp.down_proj.weight", f"{dead}.v_proj.weight", f"{dead}.v_proj.bias"):
        change(source, name, torch.zeros_like)
    ended = runs.convert(out, model=source)
    assert ended.code == 0, ended.err
    assert "warning" not in ended.err
    tensors = {name: t for shard in out.glob("*.safetensors") for name, t in load_file(shard).items()}
    assert tensors[f"{LAYER}.mlp.down_proj.weight_scale"] == 1.0
    assert not tensors[f"{LAYER}.mlp.down_proj.weight"].view(torch.uint8).any()
    assert not tensors[f"{dead}.v_proj.weight"].view(torch.uint8).any()
    assert tensors[f"{dead}.v_proj.weight_scale"] == tensors[f"{dead}.q_proj.weight_scale"] < 1
    assert tensors[f"{dead}.v_proj.v_scale"] == tensors[f"{dead}.o_proj.input_scale"] == 1.0
    assert not has_errors(validate_folder(out, source=source))


def test_recipe_with_three_mistakes(ckptq: Ckptq, tmp_path: Path) -> None:
    text = (ROOT / "recipes" / "demo.yaml").read_text()
    for right, wrong in (("scheme: fp8", "scheme: fp9"), ("samples: 64", "samples: none"), ("shard_size", "shard_sise")):
        assert right in text
        text = text.replace(right, wrong)
    (tmp_path / "my.yaml").write_text(text)
    code, err = ckptq("convert", "--recipe", str(tmp_path / "my.yaml"), "--output", str(tmp_path / "out"))
    assert code == 2
    assert "3 mistakes" in err
    assert err.count("\n  - ") == 3
    for part in ("scheme", "fp9", "calibration.samples", "none", "shard_sise", "did you mean shard_size?"):
        assert part in err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def two_scenes(tmp_path: Path) -> SimpleNamespace:
    """Two images with captions, to be changed, and the overrides that name them."""
    images, captions = tmp_path / "images", tmp_path / "captions.json"
    images.mkdir()
    names = sorted(p.name for p in (ROOT / "examples/scenes/calib").iterdir())[:2]
    for name in names:
        shutil.copy(ROOT / "examples/scenes/calib" / name, images)
    body = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [{"image_id": i, "caption": "a red square"} for i in range(2)],
    }
    captions.write_text(json.dumps(body))
    more = ["--set", f"calibration.images={images}", "--set", f"calibration.annotations={captions}"]
    return SimpleNamespace(images=images, captions=captions, names=names, body=body, more=more)


def test_no_samples(ckptq: Ckptq, tmp_path: Path, two_scenes: SimpleNamespace) -> None:
    two_scenes.captions.write_text(json.dumps({**two_scenes.body, "annotations": []}))
    code, err = ckptq(*arguments(tmp_path / "out", *two_scenes.more))
    assert code == 2
    assert "error: calibration source 'coco' holds no usable sample" in err
    assert not (tmp_path / "out").exists()


def test_image_that_cannot_be_decoded(ckptq: Ckptq, tmp_path: Path, two_scenes: SimpleNamespace) -> None:
    path = two_scenes.images / two_scenes.names[1]
    path.write_bytes(path.read_bytes()[:400])
    code, err = ckptq(*arguments(tmp_path / "out", *two_scenes.more))
    assert code == 2
    assert f"error: {path.name}: can't be decoded as an image: " in err
    assert f"fetch {path} again, or take it out of the calibration set" in err
    assert not (tmp_path / "out").exists()


def test_missing_image(ckptq: Ckptq, tmp_path: Path, two_scenes: SimpleNamespace) -> None:
    (two_scenes.images / two_scenes.names[1]).unlink()
    code, err = ckptq(*arguments(tmp_path / "out", *two_scenes.more))
    assert code == 2
    assert f"error: {two_scenes.names[1]}: no such file in {two_scenes.images}" in err
    assert not (tmp_path / "out").exists()


def test_sequence_length_below_an_image(runs: Runs, tmp_path: Path) -> None:
    """Known when the sample is encoded. Nothing is left then, so that the command with a length that fits just runs."""
    out = tmp_path / "out"
    ended = runs.convert(out, "--set", "calibration.sequence_length=8")
    assert ended.code == 2
    assert "image tokens end at token " in ended.err
    assert "after calibration.sequence_length = 8" in ended.err
    assert "set calibration.sequence_length to " in ended.err
    assert not out.exists()
    assert runs.convert(out).code == 0


def test_observer_that_no_sample_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    job = prepare(load_recipe("demo", output=str(tmp_path / "out")))
    component = job.inventory.main
    observers = [o for o in job.plan.observers if o.kind != "weight"]
    with Reader(job.source.root, component) as reader:
        streamed = StreamedModel(job.source.root, component, job.scope, reader, torch.device("cpu"))
        with pytest.raises(DataError, match=r"_amax: no calibration sample reached model\..* \(36 such observers\)") as caught:
            calibrate(streamed, observers, [], lambda n: {}, 1, ProgressFile(tmp_path / "state", 0), Console(quiet=True))
    assert caught.value.exit_code == 1
    assert caught.value.hint == "add samples that use it, or keep the module in the recipe"


def test_scale_of_an_observer_that_no_sample_reached() -> None:
    """Never a silent 1.0, not even from an amax table that lacks it."""
    here, there = Observer("model.layers.0.mlp.down_proj", "input", 0), Observer("model.layers.1.mlp.down_proj", "input", 1)
    with pytest.raises(DataError, match=r"^model\.layers\.1\.mlp\.down_proj\.input_amax: no calibration sample reached"):
        stored_value(Scale((here, there), 448.0, TensorSpec("s", "F32", ())), {here: 1.0})


def test_existing_output_is_refused(ckptq: Ckptq, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    before = out.stat().st_mtime_ns, content(out)
    for more in ([], ["--resume"]):
        code, err = ckptq(*arguments(out, *more))
        assert code == 2
        assert f"error: {out}: exists already" in err
        assert "choose another folder, or remove it" in err
        assert (out.stat().st_mtime_ns, content(out)) == before


def test_finished_output_is_refused_to_another_job(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert runs.convert(out).code == 0
    before = content(out)
    for more in ([], ["--resume", "--set", "calibration.seed=1"]):
        ended = runs.convert(out, *more)
        assert ended.code == 2
        assert f"error: {out}: exists already" in ended.err
        assert content(out) == before


def test_two_processes_on_one_output(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = runs.start(arguments(out), kill=Kill("calibrate", "replace", 2, signal.SIGSTOP))
    first.wait_until_stopped()
    for more in ([], ["--resume"]):
        second = runs.convert(out, *more)
        assert second.code == 2
        assert f"error: {out}: another ckptq is writing it now" in second.err
        assert "wait for it to end" in second.err
    os.kill(first.pid, signal.SIGCONT)
    assert first.end().code == 0
    assert not has_errors(validate_folder(out))


def test_disk_too_small(ckptq: Ckptq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs
    free = SimpleNamespace(f_bavail=1000, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda path: free if Path(path) == tmp_path else real(path))
    code, err = ckptq(*arguments(tmp_path / "some" / "out"))
    assert code == 2
    assert f"error: {tmp_path}/some/out: the output takes 14.5 MB, the disk has 4.1 MB free" in err
    assert "free some space, or choose another --output" in err
    assert not (tmp_path / "some").exists()


@pytest.mark.parametrize(
    ("room", "file"),
    [(1_000, "job.json"), (50_000, "calibration.safetensors"), (1_000_000, "model/model-00001-of-00005")],
)
def test_no_room_for_a_file(runs: Runs, whole: dict[str, bytes], tmp_path: Path, room: int, file: str) -> None:
    """In the middle of a write. With room, --resume goes on."""
    out = tmp_path / "out"
    ended = runs.convert(out, file_size=room)
    assert ended.code == 2
    assert f"error: {out}/{STAGING}/{file}" in ended.err
    assert "no room left: File too large" in ended.err
    assert "free some space, then run the same command with --resume" in ended.err
    assert_not_whole(out)
    ended = runs.convert(out, "--resume")
    assert ended.code == 0, ended.err
    assert content(out) == whole


@pytest.fixture(scope="module")
def whole(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run without faults writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert runs.convert(out).code == 0
    return content(out)


def test_read_only_target(runs: Runs, tmp_path: Path) -> None:
    """Mode bits hold for root, too, without its capabilities."""
    tmp_path.chmod(0o555)
    try:
        ended = runs.convert(tmp_path / "out", unprivileged=True)
    finally:
        tmp_path.chmod(0o755)
    assert ended.code == 2
    assert f"{tmp_path}/out/{STAGING}: can't be written: Permission denied" in ended.err
    assert "choose an --output you may write to" in ended.err
    assert not (tmp_path / "out").exists()


def test_target_that_can_be_no_folder(ckptq: Ckptq, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, err = ckptq(*arguments(tmp_path / "file" / "out"))
    assert code == 2
    assert f"error: {tmp_path}/file/out/{STAGING}: can't be written: Not a directory" in err


def test_target_on_a_file_system_of_the_system(ckptq: Ckptq) -> None:
    code, err = ckptq(*arguments(Path("/proc/ckptq-out")))
    assert code == 2
    assert "error: /proc/ckptq-out: the output takes 14.5 MB, the disk has 0 B free" in err


def _may_mount() -> bool:
    test = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return os.geteuid() == 0 and subprocess.run(test, capture_output=True).returncode == 0


@pytest.mark.parametrize("size", ["6m"] if _may_mount() else [])
def test_full_disk(runs: Runs, whole: dict[str, bytes], tmp_path: Path, size: str) -> None:
    """A real one, where the test may mount one. Another program fills it after the check."""
    with mounted(tmp_path / "disk", f"size={size}") as remount:
        out = tmp_path / "disk" / "out"
        ended = runs.convert(out, disk_looks_free=True)
        assert ended.code == 2
        assert f"error: {out}/{STAGING}/model/model-0000" in ended.err
        assert "no room left: No space left on device" in ended.err
        assert_not_whole(out)
        remount("size=64m")
        ended = runs.convert(out, "--resume")
        assert ended.code == 0, ended.err
        assert content(out) == whole
        remount("ro")
        ended = runs.convert(tmp_path / "disk" / "other")
        assert ended.code == 2
        assert "/disk/other/.ckptq-partial: can't be written: Read-only file system" in ended.err


def test_terminated(runs: Runs, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    running = runs.start(arguments(out), kill=Kill("calibrate", "replace", 2, signal.SIGTERM))
    ended = running.end()
    assert ended.code == 130
    assert "\ninterrupted\n  go on with: " in ended.err
    assert f"ckptq {shlex.join(arguments(out))} --resume\n" in ended.err
    assert_not_whole(out)
    assert runs.convert(out, "--resume").code == 0
    assert content(out) == whole


def test_interrupted(tmp_path: Path) -> None:
    """Ctrl-C in a process of its own, and then the command that it printed, quoted for a shell."""
    out = tmp_path / "an output"
    log = tmp_path / "log"
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as stderr:
        argv = ["ckptq", *arguments(out), "--set", "calibration.samples=16"]
        process = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=stderr, stderr=stderr)
        until(lambda: (out / STAGING / "calibration.safetensors").exists() or process.poll() is not None, log)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130, log.read_text()
    *_, said, hint = log.read_text().splitlines()
    assert said == "interrupted"
    command = hint.removeprefix("  go on with: ")
    assert command == f"{shlex.join(argv)} --resume"
    assert_not_whole(out)
    done = subprocess.run(command, shell=True, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not has_errors(validate_folder(out, source=EXAMPLE))


def test_interrupted_again_says_the_same(runs: Runs, tmp_path: Path) -> None:
    """--resume is not added twice, and a command that can't be resumed gets no such hint."""
    out = tmp_path / "out"
    ended = runs.start(arguments(out, "--resume"), kill=Kill("encode", "read", 5, signal.SIGINT)).end()
    assert ended.code == 130
    assert ended.err.count("--resume") == 1


def test_interrupted_twice_stops_at_once(hub_server: HubServer, tmp_path: Path) -> None:
    """Ctrl-C while a file is being fetched waits for that file; a second one doesn't."""
    log = tmp_path / "log"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "HF_ENDPOINT": hub_server.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    hub_server.hold(SHARDS[2], after=1 << 20)
    with log.open("wb") as stderr:
        argv = [sys.executable, "-m", "ckptq", *arguments(tmp_path / "out", model="org/tiny")]
        process = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=stderr, stderr=stderr)
        assert hub_server.held.wait(60)
        process.send_signal(signal.SIGINT)
        until(lambda: "once more stops at once" in log.read_text(), log)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130, log.read_text()
    hub_server.release.set()
    assert "  go on with: ckptq convert " in log.read_text()
    assert not (tmp_path / "out").exists()


@pytest.fixture
def hub_server() -> Iterator[HubServer]:
    with HubServer("org/tiny", {"main": EXAMPLE}) as server:
        yield server


@pytest.mark.parametrize("stage", ["open", "calibrate", "encode", "files", "validate", "commit"])
def test_interrupted_in_any_stage(runs: Runs, whole: dict[str, bytes], tmp_path: Path, stage: str) -> None:
    out = tmp_path / "out"
    ended = runs.start(arguments(out), kill=Kill(stage, None, 4, signal.SIGINT)).end()
    assert ended.code == 130, ended.err
    assert "go on with: " in ended.err
    assert_not_whole(out)
    assert runs.convert(out, "--resume").code == 0
    assert content(out) == whole


def test_validate_refuses_an_unfinished_output(ckptq: Ckptq, runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    runs.convert(out, kill=Kill("commit", "rmdir", 2))
    assert (out / "config.json").is_file()
    code, err = ckptq("validate", str(out))
    assert code == 2
    assert f"error: {out}: an unfinished conversion: it holds {STAGING}" in err


LATE = """
import os, signal, sys, time
from ckptq.interrupts import unwind_on_signals

class Gone:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        [None for _ in range(1000)]

stopped = unwind_on_signals(lambda: print("first"), lambda: print("second"))
try:
    {what}
    time.sleep(10)
    print("lost")
except KeyboardInterrupt:
    print("unwound", stopped(), "slow" in sys.modules)
"""


@pytest.mark.parametrize(("what", "imported"), [("import slow", True), ("Gone()", False)])
def test_an_interrupt_comes_late_where_it_would_do_harm(what: str, imported: bool, tmp_path: Path) -> None:
    """Within an import, whose lock could stay; while an object is freed, where no exception leaves."""
    (tmp_path / "slow.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.1)\n")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    argv = [sys.executable, "-c", LATE.format(what=what)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines() == ["first", f"unwound True {imported}"], done.stderr
