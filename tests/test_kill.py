"""Killed at any moment and resumed, a job writes the same bytes as if nothing had happened, and shows nothing whole before.

88 kills or more: 42 + 11 at points of every stage, at least 30 one after the other in one job, at least 5 while fetching.
"""

import itertools
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from faults import (
    EXAMPLE,
    LAYERS,
    SHARDS,
    SMALL,
    Ended,
    Event,
    Kill,
    Runs,
    arguments,
    assert_not_whole,
    content,
    copy_example,
    shared_runs,
)
from hub_server import HubServer

from ckptq.calibrate import calibrate
from ckptq.calibration import load_samples
from ckptq.calibration.encode import Encoder
from ckptq.checkpoint import STAGING, Reader
from ckptq.console import Console
from ckptq.convert import prepare
from ckptq.journal import ProgressFile
from ckptq.recipe import load_recipe
from ckptq.streamed import StreamedModel

STAGES = ("open", "calibrate", "encode", "files", "validate", "commit")


class Job:
    """An output folder, what a run without faults writes there, and how often this job was killed."""

    def __init__(self, runs: Runs, out: Path, whole: SimpleNamespace) -> None:
        self.runs, self.out, self.whole = runs, out, whole
        self.kills: list[Event] = []

    def kill(self, kill: Kill, *more: str) -> Ended:
        """Runs or resumes until the kill; what it leaves is never taken for a checkpoint."""
        ended = self.runs.convert(self.out, "--resume", *more, kill=kill)
        if ended.code < 0:
            self.kills.append(ended.killed_at)
            assert ended.killed_at.stage == kill.stage
            assert_not_whole(self.out)
        return ended

    def finish(self, *more: str) -> Ended:
        ended = self.runs.convert(self.out, "--resume", *more)
        assert ended.code == 0, ended.err
        assert content(self.out) == self.whole.content
        return ended


@pytest.fixture(scope="module")
def runs() -> Runs:
    return shared_runs()


@pytest.fixture(scope="module")
def whole(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run without faults: its output and its events."""
    out = tmp_path_factory.mktemp("whole") / "out"
    ended = runs.convert(out)
    assert ended.code == 0, ended.err
    assert [stage for stage, _ in itertools.groupby(e.stage for e in ended.events)] == list(STAGES)
    calls = Counter((e.stage, e.op) for e in ended.events)
    return SimpleNamespace(content=content(out), events=Counter(e.stage for e in ended.events), calls=calls)


@pytest.fixture
def job(runs: Runs, tmp_path: Path, whole: SimpleNamespace) -> Job:
    return Job(runs, tmp_path / "out", whole)


@pytest.mark.parametrize("seed", range(6))
def test_killed_once_in_every_stage(job: Job, seed: int) -> None:
    draw = random.Random(seed)
    for stage in STAGES:
        job.kill(Kill(stage, None, draw.randint(1, job.whole.events[stage])))
    job.finish()
    assert [event.stage for event in job.kills] == list(STAGES)


@pytest.mark.parametrize(
    ("stage", "op", "nth"),
    [
        ("open", "mkdir", 3),  # the output folder is there and empty
        ("open", "replace", 1),  # job.json is complete, under another name
        ("calibrate", "read", 0.3),  # embeddings and vision tower are being read
        ("calibrate", "write", 3),  # half of the header of the first saved state
        ("encode", "write", 0.5),  # half of a tensor
        ("encode", "copy", 0.5),  # half of one that the kernel copies
        ("files", "fsync", 1),
        ("validate", "read", 0.5),
        ("commit", "replace", 1.0),  # all is published but config.json
        ("commit", "unlink", 1.0),  # all is published, the staging folder no longer says which job
        ("commit", "rmdir", 1.0),  # all is published, the staging folder is empty
    ],
)
def test_killed_once(job: Job, stage: str, op: str, nth: float) -> None:
    """`nth` is a part of all calls, where it is no whole number."""
    count = nth if isinstance(nth, int) else int(nth * job.whole.calls[stage, op])
    assert job.kill(Kill(stage, op, count)).killed_at.op == op
    job.finish()


def test_killed_again_and_again(job: Job) -> None:
    """One file further each time: a layer's state, a shard, a published file. A kill costs that much and no more."""
    for layer in range(LAYERS - 1):
        ended = job.kill(Kill("calibrate", "replace", 2))
        assert min(ended.layers) == layer
        assert max(ended.layers) <= layer + 2  # two computed, one being read
    assert set(job.kill(Kill("calibrate", "replace", 2)).layers) == {LAYERS - 1}
    shards = sum(name.endswith(".safetensors") for name in job.whole.content)
    for done in range(shards - 1):
        job.kill(Kill("encode", "replace", 2))
        assert len([*(job.out / STAGING / "model").glob("*.safetensors")]) == done + 1
    job.kill(Kill("files", "replace", 8))
    job.kill(Kill("validate", "read", job.whole.calls["validate", "read"]))
    for done in range(1, len(job.whole.content)):
        ended = job.kill(Kill("commit", "replace", 3))
        assert done == 1 or {e.stage for e in ended.events} == {"open", "commit"}
        assert len([p for p in job.out.iterdir() if p.name != STAGING]) == done
    assert any(job.kill(Kill("commit", "unlink", 2)).code == 0 for _ in range(20)), "it never comes to an end"
    assert content(job.out) == job.whole.content
    assert len(job.kills) >= 30
    assert job.runs.convert(job.out, "--resume").code == 0, "a kill after the last step: nothing left to do"
    assert content(job.out) == job.whole.content


@pytest.fixture(scope="module")
def one_at_a_time() -> str:
    """--memory that lets one sample wait at a time, or few."""
    recipe = load_recipe("demo", SMALL[1::2], model=str(EXAMPLE), output="out")
    needs = prepare(recipe).cost
    return str(needs.fixed + needs.sample)


def test_killed_in_a_later_wave(job: Job, one_at_a_time: str) -> None:
    memory = ("--memory", one_at_a_time)
    ended = job.kill(Kill("calibrate", "replace", LAYERS + 3), *memory)
    assert ended.layers[: LAYERS + 2] == [*range(LAYERS), 0, 1]
    ended = job.finish(*memory)
    assert ended.layers[:4] == [2, 3, 4, 5]
    assert ended.layers.count(0) >= 1, "there is a third wave"


def test_killed_in_a_wave_and_resumed_without_waves(job: Job, one_at_a_time: str) -> None:
    job.kill(Kill("calibrate", "replace", LAYERS + 3), "--memory", one_at_a_time)
    assert Counter(job.finish().layers) == {0: 1, 1: 1, **dict.fromkeys(range(2, LAYERS), 2)}


def test_waves_and_order_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLE.parent.parent)
    prepared = prepare(load_recipe("demo", ["calibration.samples=5"], output=str(tmp_path / "out")))
    samples = load_samples(prepared.recipe.calibration)
    encoder = Encoder(EXAMPLE, None, 512)
    observers = [o for o in prepared.plan.observers if o.kind != "weight"]

    def run(name: str, memory: int, order: list[int]) -> dict[str, float]:
        component = prepared.inventory.main
        with Reader(EXAMPLE, component) as reader:
            streamed = StreamedModel(EXAMPLE, component, prepared.scope, reader, torch.device("cpu"))
            kept = ProgressFile(tmp_path / name, 0)
            names = [samples[i].name for i in order]
            table = calibrate(
                streamed, observers, names, lambda n: encoder.encode(samples[order[n]]), memory, kept, Console(quiet=True)
            )
        return {o.name: value for o, value in table.items()}

    together = run("together", 1 << 40, [0, 1, 2, 3, 4])
    assert len(together) == len(observers) == 6 * LAYERS
    assert run("waves of one", 1, [0, 1, 2, 3, 4]) == together
    assert run("waves of one, shuffled", 1, [3, 0, 4, 2, 1]) == together
    assert run("fewer", 1, [0]) != together


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("calibration.samples=3", "recipe.calibration.samples: 5 then, 3 now"),
        ("calibration.seed=1", "recipe.calibration.seed: 0 then, 1 now"),
        ("kv_cache=null", "recipe.kv_cache: fp8 then, None now"),
        ("export.shard_size=5MB", "recipe.export.shard_size: 4000000 then, 5000000 now"),
        ('keep=["model.visual*","lm_head","model.layers.0.mlp"]', "recipe.keep: "),
    ],
)
def test_a_changed_setting_is_refused(started: Job, override: str, named: str) -> None:
    before = content(started.out)
    ended = started.runs.convert(started.out, "--resume", "--set", override)
    assert ended.code == 2
    assert f"{started.out}: the interrupted job there is another one" in ended.err
    assert named in ended.err
    assert "restore what changed and use --resume, or remove the folder" in ended.err
    assert content(started.out) == before


@pytest.mark.parametrize(("file", "named"), [("weights", "source_fingerprint"), ("tokenizer_config.json", "source_files")])
def test_another_source_is_refused(started: Job, tmp_path: Path, file: str, named: str) -> None:
    other = copy_example(tmp_path / "other")
    if file == "weights":  # a fine-tune: equal names, shapes and sizes
        data = bytearray((other / SHARDS[1]).read_bytes())
        data[-1_000_000:] = bytes(1_000_000)
        (other / SHARDS[1]).write_bytes(data)
    else:
        (other / file).write_text((other / file).read_text() + "\n")
    ended = started.runs.convert(started.out, "--resume", model=other)
    assert ended.code == 2
    assert "the interrupted job there is another one" in ended.err
    assert f"- {named}: " in ended.err
    assert_not_whole(started.out)


@pytest.fixture(scope="module")
def started(runs: Runs, tmp_path_factory: pytest.TempPathFactory, whole: SimpleNamespace) -> Job:
    """A job killed in its calibration."""
    job = Job(runs, tmp_path_factory.mktemp("started") / "out", whole)
    job.kill(Kill("calibrate", "replace", 2))
    return job


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer("org/tiny", {"main": EXAMPLE}) as server:
        yield server


@pytest.fixture(scope="module")
def fetched(runs: Runs, hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run from the Hub without faults writes."""
    work = tmp_path_factory.mktemp("fetched")
    ended = runs.convert(work / "out", model="org/tiny", hub=hub.url, cache=str(work / "cache"))
    assert ended.code == 0, ended.err
    return content(work / "out")


def test_killed_while_fetching(runs: Runs, hub: HubServer, fetched: dict[str, bytes], tmp_path: Path) -> None:
    out, cache = tmp_path / "out", str(tmp_path / "cache")
    kills = 0
    for attempt in range(60):
        kill = Kill("fetch", None, 6 + 4 * attempt)
        ended = runs.convert(out, "--resume", model="org/tiny", hub=hub.url, cache=cache, kill=kill)
        if ended.code == 0:
            break
        assert ended.killed_at.stage == "fetch"
        assert_not_whole(out)
        kills += 1
    assert kills >= 5
    assert content(out) == fetched


def test_killed_within_a_download(runs: Runs, hub: HubServer, fetched: dict[str, bytes], tmp_path: Path) -> None:
    out, settings = tmp_path / "out", {"hub": hub.url, "cache": str(tmp_path / "cache")}
    hub.hold(SHARDS[2], after=1 << 20)
    running = runs.start(arguments(out, model="org/tiny"), **settings)
    assert hub.held.wait(60)
    os.kill(running.pid, signal.SIGKILL)
    assert running.end().code == -signal.SIGKILL
    hub.release.set()
    assert_not_whole(out)
    ended = runs.convert(out, "--resume", model="org/tiny", **settings)
    assert ended.code == 0, ended.err
    assert content(out) == fetched
