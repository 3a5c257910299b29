"""Runs ckptq in children of one process that has imported everything heavy, and kills them at chosen points.

    runs = Runs()                       # python tests/faults.py, started once: importing torch and ModelOpt takes ten seconds
    ended = runs.convert(out, kill=Kill("encode", "replace", 2))

A child is a fork that has run no torch operation yet, so it is a process like any other from `ckptq.cli.main` on. It counts
the calls through which files change or are read, writes each to a trace, and may end itself by SIGKILL at one of them.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import functools
import gc
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from ckptq.checkpoint import STAGING
from ckptq.errors import SourceError
from ckptq.validate import validate_folder

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "tiny-qwen2.5-vl"
LAYERS = 6
SHARDS = sorted(p.name for p in EXAMPLE.glob("*.safetensors"))
SMALL = ("--set", "calibration.samples=5", "--set", "calibration.save_every=0", "--set", "calibration.sequence_length=80")
"""Few samples, of a length that lets at most two of them wait under the least --memory, and a saved state after each layer."""
TOO_LONG = 120


@dataclass(frozen=True, slots=True)
class Kill:
    """Before the `nth` call (from 1) of kind `op`, or of any kind, in `stage`. A write or a copy is done by half first."""

    stage: str
    op: str | None
    nth: int
    signal: int = signal.SIGKILL


@dataclass(frozen=True, slots=True)
class Event:
    """A call that changes or reads a file; `op` is also "layer", with the number in `what`, when a layer is read."""

    stage: str
    op: str
    what: str


@dataclass(frozen=True, slots=True)
class Ended:
    """How a child ended: its exit code, or minus the signal's number."""

    code: int
    out: str
    err: str
    events: tuple[Event, ...]

    @property
    def killed_at(self) -> Event:
        assert self.code == -signal.SIGKILL, self.err
        return self.events[-1]

    @property
    def layers(self) -> list[int]:
        return [int(e.what) for e in self.events if e.op == "layer"]


def arguments(out: Path, *more: str, recipe: str = "demo", model: Path | str = EXAMPLE) -> list[str]:
    return ["convert", "--recipe", recipe, "--model", str(model), "--output", str(out), *SMALL, *more]


class Runs:
    """The process that forks. `work` is a folder for traces and what children print."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._number = itertools.count()
        env = {k: v for k, v in os.environ.items() if k != "HF_TOKEN"}
        env |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(work / "hf")}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__], cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def stop(self) -> None:
        self._process.communicate()
        shutil.rmtree(self._work)

    def start(self, argv: Sequence[str], *, kill: Kill | None = None, hub: str = "", **settings: Any) -> Running:
        """Starts a child. `settings`: see _prepare_child."""
        base = self._work / str(next(self._number))
        task = {"argv": [*argv], "base": str(base), "kill": asdict(kill) if kill else None, "hub": hub, **settings}
        return Running(self, self._ask(task), base)

    def convert(self, out: Path, *more: str, model: Path | str = EXAMPLE, **settings: Any) -> Ended:
        return self.start(arguments(out, *more, model=model), **settings).end()

    def wait(self, pid: int) -> int:
        return self._ask({"wait": pid})

    def _ask(self, task: dict[str, Any]) -> int:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@dataclass(frozen=True, slots=True)
class Running:
    runs: Runs
    pid: int
    base: Path

    def end(self) -> Ended:
        """Waits for it."""
        status = self.runs.wait(self.pid)
        trace = self.base.with_suffix(".trace").read_text().splitlines()
        events = tuple(Event(*line.split(" ", 2)) for line in trace)
        out, err = (self.base.with_suffix(s).read_text() for s in (".out", ".err"))
        return Ended(os.waitstatus_to_exitcode(status), out, err, events)

    def wait_until_stopped(self) -> None:
        until(lambda: ") T " in Path(f"/proc/{self.pid}/stat").read_text(), self.base.with_suffix(".err"))


def until(condition: Callable[[], bool], log: Path) -> None:
    end = time.monotonic() + TOO_LONG
    while not condition():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.005)


def content(folder: Path) -> dict[str, bytes]:
    """{relative path: bytes} of every file, and {relative path + "/": b""} of every folder."""
    return {
        p.relative_to(folder).as_posix() + ("/" if p.is_dir() else ""): b"" if p.is_dir() else p.read_bytes()
        for p in sorted(folder.rglob("*"))
    }


def assert_not_whole(out: Path) -> None:
    """Nobody takes what is there for a checkpoint."""
    with pytest.raises(SourceError):
        validate_folder(out)
    if (out / "config.json").exists():  # the last file to come, and the staging folder is still there to say: not finished
        assert (out / STAGING).is_dir()
        assert not [p for p in (out / STAGING / "model").rglob("*") if p.is_file()]


def copy_example(folder: Path) -> Path:
    """The example to be changed: an own copy of every file."""
    return Path(shutil.copytree(EXAMPLE, folder))


@functools.cache
def shared_runs() -> Runs:
    """One for all test files."""
    runs = Runs(Path(tempfile.mkdtemp(prefix="ckptq-faults-")))
    atexit.register(runs.stop)
    return runs


# ---- from here on: the process that forks, and its children


def _serve() -> None:
    """One task a line on stdin; the answer is the child's pid or, to {"wait": pid}, its status."""
    from PIL import Image
    from transformers.models.auto import image_processing_auto, processing_auto  # noqa: F401
    from transformers.models.qwen2 import tokenization_qwen2  # noqa: F401
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl, processing_qwen2_5_vl  # noqa: F401
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl  # noqa: F401

    import ckptq.calibrate
    import ckptq.calibration.coco
    import ckptq.calibration.encode
    import ckptq.pipeline
    import ckptq.render_job
    import ckptq.validators.passthrough
    import ckptq.validators.values  # noqa: F401

    Image.init()
    gc.freeze()  # or each child's collector copies what they share
    for line in sys.stdin:
        task = json.loads(line)
        if "wait" in task:
            answer = os.waitpid(task["wait"], 0)[1]
        else:
            answer = os.fork()
            if not answer:
                try:
                    _child(task)
                finally:
                    os._exit(99)
        print(answer, flush=True)


def _child(task: dict[str, Any]) -> None:
    from ckptq import cli

    base = Path(task["base"])
    trace = os.open(base.with_suffix(".trace"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number, suffix in ((0, None), (1, ".out"), (2, ".err")):
        path = base.with_suffix(suffix) if suffix else Path(os.devnull)
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    if task.get("file_size"):  # the trace would grow beyond it, too
        os.dup2(os.open(os.devnull, os.O_WRONLY), trace)
    faulthandler.dump_traceback_later(TOO_LONG, exit=True)  # a child that hangs says where, and ends
    _watch(task, trace)
    _prepare_child(**task)
    code = 98
    try:
        cli.main(task["argv"])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 97
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _prepare_child(
    *, hub: str = "", cache: str = "", file_size: int = 0, unprivileged: bool = False, disk_looks_free: bool = False, **_: Any
) -> None:
    """hub, cache      the Hub to ask and the cache to use
    file_size          no file may grow beyond it: RLIMIT_FSIZE, whose signal is ignored
    unprivileged       mode bits hold for root, too: no capabilities
    disk_looks_free    the check before the job sees a large disk, as if another program filled it afterwards
    """
    if hub:
        from huggingface_hub import constants

        constants.ENDPOINT = hub
        constants.HUGGINGFACE_CO_URL_TEMPLATE = hub + "/{repo_id}/resolve/{revision}/{filename}"
        constants.HF_HUB_CACHE = cache
        constants.HF_HUB_DISABLE_IMPLICIT_TOKEN = True
    if file_size:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    if unprivileged:
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # capset(2), version 3
        assert ctypes.CDLL(None).capset(header, none) == 0
    if disk_looks_free:
        from ckptq import cost

        cost.check_space = lambda *_: None


def _watch(task: dict[str, Any], trace: int) -> None:
    """Wraps the calls through which files change or are read, and the functions where stages begin."""
    from ckptq import calibrate, hub, pipeline, produce, validate
    from ckptq.journal import Journal
    from ckptq.streamed import StreamedModel

    out = task["argv"][task["argv"].index("--output") + 1]
    roots = tuple(str(root) for root in (out, task.get("cache")) if root)
    kill = Kill(**task["kill"]) if task["kill"] else Kill("", None, 0)
    counts = itertools.count(1)
    stage = "start"

    def event(op: str, what: str, half: Callable[[], object] = lambda: None) -> None:
        os.write(trace, f"{stage} {op} {what}\n".encode())
        if kill.stage == stage and kill.op in (op, None) and next(counts) == kill.nth:
            half()
            os.kill(os.getpid(), kill.signal)

    def begin(owner: Any, name: str, label: str) -> None:
        inner = getattr(owner, name)

        def entered(*args: Any, **kwargs: Any) -> Any:
            nonlocal stage
            stage = label
            return inner(*args, **kwargs)

        setattr(owner, name, entered)

    begin(hub, "fetch", "fetch")
    begin(Journal, "open", "open")
    begin(calibrate, "calibrate", "calibrate")
    begin(pipeline, "write_shards", "encode")
    begin(produce, "write_files", "files")
    begin(validate, "examine", "validate")
    begin(Journal, "publish", "commit")

    def watch(name: str, op: str) -> None:
        inner = getattr(os, name)

        def call(first: Any, *args: Any, **kwargs: Any) -> Any:
            what = _path(first, kwargs.get("dir_fd") or kwargs.get("src_dir_fd"))
            if op == "read" or what.startswith(roots):
                half = (lambda: inner(first, args[0][: len(args[0]) // 2], *args[1:])) if op == "write" else (lambda: None)
                event(op, what, half)
            return inner(first, *args, **kwargs)

        setattr(os, name, call)

    for name, op in (
        ("pwrite", "write"), ("preadv", "read"), ("fsync", "fsync"), ("replace", "replace"), ("rename", "replace"),
        ("unlink", "unlink"), ("remove", "unlink"), ("rmdir", "rmdir"), ("mkdir", "mkdir"), ("symlink", "symlink"),
    ):  # fmt: skip
        watch(name, op)
    inner_copy = os.copy_file_range

    def copied(source: int, target: int, count: int, *at: int) -> int:
        event("copy", _path(target, None), lambda: inner_copy(source, target, count // 2, *at))
        return inner_copy(source, target, count, *at)

    os.copy_file_range = copied

    import builtins
    import io

    def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if set(mode) & set("wax+") and str(path).startswith(roots):
            event("open", str(path))
        return inner_open(path, mode, *args, **kwargs)

    inner_open, inner_layer = io.open, StreamedModel.read_layer
    builtins.open = io.open = opened

    def read_layer(self: Any, index: int) -> Any:
        event("layer", str(index))
        return inner_layer(self, index)

    StreamedModel.read_layer = read_layer  # type: ignore[method-assign]


def _path(first: Any, folder: int | None) -> str:
    if isinstance(first, int):
        return str(Path(f"/proc/self/fd/{first}").readlink())
    return str(first if folder is None else Path(f"/proc/self/fd/{folder}").readlink() / os.fspath(first))


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Callable[[str], None]]:
    """A tmpfs at `folder`; yields a way to mount it again with other options. Needs `can_mount`."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    try:
        yield lambda changed: subprocess.run(["mount", "-o", f"remount,{changed}", folder], check=True) and None
    finally:
        subprocess.run(["umount", folder], check=True)


if __name__ == "__main__":
    _serve()
