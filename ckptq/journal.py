"""What an unfinished job keeps in its staging folder, so that `--resume` goes on where a kill struck.

    job.json                 what the job is: plan, source, samples, versions; a resumed run must agree on all of it
    STAGE.json               the amaxes that a stage found; the digests of what a finished file holds
    calibration.safetensors  hidden states of the waiting samples before one layer, and the amaxes up to it
    model/                   finished output files under their final names, unfinished ones as *.partial
    publishing               present once the files in model/ are complete, checked and on their way out

Every file here appears whole or not at all.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptq.checkpoint import STAGING, TensorSpec
from ckptq.errors import OutputError
from ckptq.writer import TensorFile, sync_folder, write_text, writing

if TYPE_CHECKING:
    import torch

RECORD = "ckptq.json"
"""The file in a finished output that says how it was made; its `job` is the job.json of the run."""


class Journal:
    """The staging folder of one output, locked while this process works in it."""

    def __init__(self, output: Path, marker: str = "config.json") -> None:
        """`marker`: the file that is published last, and makes the output a checkpoint."""
        self.output = output
        self._marker = marker
        self.staging = output / STAGING
        self.model = self.staging / "model"
        self._job = self.staging / "job.json"
        self._publishing = self.staging / "publishing"
        self._lock = -1

    @property
    def publishing(self) -> bool:
        """Whether an earlier run had finished and begun to publish, so that nothing but `publish` is left to do."""
        return self._publishing.is_file()

    def refuse_existing(self, *, resume: bool) -> None:
        """Raises OutputError early for what `open` will refuse in any case."""
        if not self.staging.is_dir() and not resume:
            self._refuse_existing()

    def open(self, job: Mapping[str, Any], *, resume: bool) -> bool:
        """Begins the job, or takes up its interrupted run. Returns False where the output is already published whole.

        Raises OutputError for an output that exists (without `resume`), belongs to another job, or is being written now.
        """
        if not self.staging.is_dir():
            if resume and self._published_by(job):
                return False
            self._refuse_existing()
        with writing(self.staging):
            self.staging.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        try:
            return self._begin(job, resume)
        except BaseException:
            self.release()
            raise

    def _begin(self, job: Mapping[str, Any], resume: bool) -> bool:
        if self._job.is_file():
            if not resume:
                raise OutputError(f"{self.output}: an interrupted job is there", hint="add --resume to go on, or remove the folder")
            self._compare(json.loads(self._job.read_text(encoding="utf-8")), job)
        elif (self.output / self._marker).is_file():  # published; a kill struck while the staging folder was removed
            self._compare(self._record(), job)
            self.close()
            return False
        else:
            self._refuse_existing()
            write_text(self._job, json.dumps(job, indent=2) + "\n")
        with writing(self.model):
            self.model.mkdir(exist_ok=True)
        return True

    def _published_by(self, job: Mapping[str, Any]) -> bool:
        """Whether this job has published its output whole; a kill may have struck after its last step."""
        return (self.output / self._marker).is_file() and self._record() == job

    def _record(self) -> dict[str, Any]:
        """The job that a published output says it comes from."""
        record = self.output / RECORD
        job: dict[str, Any] = json.loads(record.read_text(encoding="utf-8")).get("job", {}) if record.is_file() else {}
        return job

    def load(self, stage: str) -> dict[str, Any] | None:
        """The table that a finished stage left: {observer name: amax}, or {tensor: digest} of a weight file."""
        path = self.staging / f"{stage}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def save(self, stage: str, table: Mapping[str, Any]) -> None:
        """Keeps a finished stage's table. A float32 survives the trip through JSON exactly."""
        write_text(self.staging / f"{stage}.json", json.dumps(dict(table), indent=1) + "\n")

    def written_bytes(self) -> int:
        """What the finished files of an interrupted run take, here or already published."""
        found = self.output.rglob("*.safetensors") if self.staging.is_dir() else ()
        return sum(p.stat().st_size for p in found if p.parent != self.staging and p.is_file())

    def forget_start(self) -> None:
        """Removes an output in which a resumed run would find nothing that cost time: no calibration state, no finished shard."""
        costly = ("*activations.json", "calibration.safetensors", "publishing")
        if any(any(self.staging.glob(name)) for name in costly) or any(self.model.rglob("*.safetensors")):
            return
        self.close()
        if not any(self.output.iterdir()):
            self.output.rmdir()

    def publish(self, last: tuple[str, ...]) -> None:
        """Moves the finished files out of staging, `last` at the end in this order, then removes the staging folder.

        A folder without config.json, or model_index.json, is no checkpoint to anybody: with that last no reader sees half of one.
        """
        write_text(self._publishing, "")
        files = [p.relative_to(self.model).as_posix() for p in sorted(self.model.rglob("*")) if p.is_file()]
        for names in ([f for f in files if f not in last], [f for f in last if f in files]):
            for name in names:
                target = self.output / name
                with writing(target):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    (self.model / name).replace(target)
            for folder in {self.output / parent for name in names for parent in Path(name).parents}:
                sync_folder(folder)  # those of components, too: after a loss of power no marker stands before what it speaks for
        self.close()

    def close(self) -> None:
        """Removes the staging folder, as after publishing. The order lets `open` tell a kill in here from any other."""
        for path in self.staging.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path not in (self._job, self._publishing):
                path.unlink()
        self._job.unlink(missing_ok=True)
        self._publishing.unlink(missing_ok=True)
        self.staging.rmdir()
        self.release()

    def release(self) -> None:
        """Lets another process work here."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _refuse_existing(self) -> None:
        if self.output.exists() and (not self.output.is_dir() or any(p.name != STAGING for p in self.output.iterdir())):
            raise OutputError(f"{self.output}: exists already", hint="choose another folder, or remove it")

    def _take_lock(self) -> None:
        self._lock = os.open(self.staging, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise OutputError(f"{self.output}: another ckptq is writing it now", hint="wait for it to end") from None

    def _compare(self, began: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        changed = list(_changes(began, now))
        if changed:
            changed = [
                c for c in changed if not c.startswith(("plan: ", "recipe.description: "))
            ] or changed  # what follows from others
            raise OutputError(
                f"{self.output}: the interrupted job there is another one\n" + "\n".join(f"  - {c}" for c in changed),
                hint="restore what changed and use --resume, or remove the folder and start again",
            )


def refuse_inside(output: Path, source: Path) -> None:
    """Raises OutputError for an output in the folder that it is made from: the source would no longer be what it was."""
    if output.absolute().resolve().is_relative_to(source.resolve()):
        raise OutputError(f"{output}: lies in the source, {source}", hint="choose a folder outside of it")


def _changes(began: Mapping[str, Any], now: Mapping[str, Any], at: str = "") -> Iterator[str]:
    """A line for every setting that differs, with its whole name."""
    for key in {**began, **now}:
        old, new = began.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _changes(old, new, f"{at}{key}.")
        elif old != new:
            yield f"{at}{key}: {old} then, {new} now"


@dataclass(frozen=True, slots=True)
class Progress:
    """Where calibration stands: samples before `first` are done; those of this wave wait before `layer`.

    hidden   [1, T, H] for each waiting sample, in order; empty at the start of a wave
    tokens   how many tokens reached each routed expert, by the module around them
    """

    first: int = 0
    layer: int = 0
    amax: Mapping[str, float] = field(default_factory=dict)
    hidden: list[torch.Tensor] = field(default_factory=list)
    tokens: Mapping[str, list[int]] = field(default_factory=dict)


class ProgressFile:
    """Keeps a calibration's Progress on disk, at most every `every` seconds."""

    def __init__(self, path: Path, every: float) -> None:
        self._path = path
        self._every = every
        self._last = time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self._last >= self._every

    def save(self, state: Progress) -> None:
        """Replaces what was kept. Memory: one hidden state at a time, on the host."""
        from ckptq.tensors import SAFETENSORS_DTYPES, raw

        specs = [TensorSpec(f"hidden.{i:06}", SAFETENSORS_DTYPES[t.dtype], tuple(t.shape)) for i, t in enumerate(state.hidden)]
        offsets, at = {}, 0
        for spec in specs:
            offsets[spec.name] = at
            at += spec.nbytes
        tables = {"amax": json.dumps(dict(state.amax)), "tokens": json.dumps(dict(state.tokens))}
        metadata = {"first": str(state.first), "layer": str(state.layer), **tables}
        with TensorFile(self._path, specs, offsets, metadata) as file:
            for spec, tensor in zip(specs, state.hidden, strict=True):
                file.write(spec.name, 0, raw(tensor.cpu().contiguous()))
            file.finish()
        self._last = time.monotonic()

    def load(self) -> Progress | None:
        """What an earlier run kept, or None."""
        if not self._path.is_file():
            return None
        from safetensors import safe_open

        with safe_open(self._path, framework="pt") as file:
            meta = file.metadata()
            hidden = [file.get_tensor(name) for name in sorted(file.keys())]
        tokens = json.loads(meta.get("tokens", "{}"))
        return Progress(int(meta["first"]), int(meta["layer"]), json.loads(meta["amax"]), hidden, tokens)
