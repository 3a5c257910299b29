"""The one pass over the weights: amaxes where a scheme needs them, then codes, scales and copies, by as many threads as there are.

The main thread hands out pieces of work in the order of the output and takes what comes back in that order; workers read,
compute and write. The weights of a fused group are measured right before they are encoded, so that their second reading comes
from the system's cache: a checkpoint that is larger than memory is read from the disk once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType

import torch

from ckptq import digest
from ckptq.checkpoint import Component, Reader
from ckptq.console import Advance
from ckptq.encode import GPU_WORKERS, Bench, Encoded, copy, encode, measure, multiplier, parts, stored_value
from ckptq.plan import Copy, Encode, Observer, Plan, Scale, ShardSpec
from ckptq.tensors import raw
from ckptq.threads import Line, threads
from ckptq.writer import TensorFile

AHEAD = 3
"""Pieces a thread that are begun, or done and not yet taken; the scales of one take up to 8 MB."""
FLUSH = 1 << 27
"""Bytes of a file after which they are sent to the disk, so that little is left to wait for when it is finished."""

Finished = Callable[[ShardSpec, Mapping[str, str]], object]


def write_shards(
    folder: Path,
    plan: Plan,
    shards: Sequence[ShardSpec],
    component: Component,
    reader: Reader,
    amax: MutableMapping[Observer, float],
    finished: Finished,
    advance: Advance,
    *,
    activations: Callable[[], Mapping[Observer, float]] | None = None,
    device: torch.device | str = "cpu",
    workers: int | None = None,
) -> None:
    """Writes these files of the plan's into `folder`.

    amax         of all activations, and of the weights that are known; gains all others that the plan observes
    finished     is told of every file, with its tensors' digests, once it is on the disk under its name; by another thread
    advance      is told the source's bytes that are done
    activations  where `amax` has none of them: asked when all weights are written, so that they may be measured meanwhile

    Raises DataError naming a tensor with a NaN or an infinity, or an observer that nothing reached; OutputError; SourceError.
    """
    count = workers or min(threads(), GPU_WORKERS if torch.device(device).type == "cuda" else threads())
    with (
        _one_thread_each(),
        ExitStack() as files,
        Disk() as disk,
        Line(lambda: Bench(torch.device(device)), count, AHEAD * count) as line,
    ):
        amaxes = Amaxes(amax, component, reader, line)
        wholes = (op.whole for shard in shards for op in shard.ops if isinstance(op, Encode) and op.whole)
        amaxes.ask(next(wholes, None))
        unscaled: list[Output] = []
        for shard in shards:
            specs = [spec for op in shard.ops for spec in op.outputs]
            file = files.enter_context(TensorFile(folder / shard.file, specs, shard.offsets))
            output = Output(shard, file, component, reader, line, disk, advance)
            for op in shard.ops:
                if isinstance(op, Encode):
                    if op.whole:  # the next one is measured while this one is encoded, so that no worker waits
                        amaxes.ask(next(wholes, None))
                    output.encode(op, amaxes)
                elif isinstance(op, Copy):
                    output.copy(op)
            if activations is None:
                line.call(partial(output.finish, amax, finished))
            else:
                unscaled.append(output)
        amaxes.ask_all(plan.observers)  # those of files that an interrupted run has finished
        line.drain()
        if activations is not None:
            amax.update(activations())
        for output in unscaled:
            output.finish(amax, finished)
        disk.drain()


class Amaxes:
    """The amax of every weight under a scale of the whole tensor: known from calibration, or measured when it is asked for."""

    def __init__(self, known: MutableMapping[Observer, float], component: Component, reader: Reader, line: Line[Bench]) -> None:
        self._known, self._component, self._reader, self._line = known, component, reader, line
        self._coming: dict[Observer, list[Future[float]]] = {}

    def ask(self, scale: Scale | None) -> None:
        """Hands in the work for this scale, unless that is done already."""
        self.ask_all(scale.amax if scale else ())

    def ask_all(self, observers: Iterable[Observer]) -> None:
        """The same for the weights among these."""
        for observer in observers:
            if observer.kind == "weight" and observer not in self._known and observer not in self._coming:
                source = self._component.tensors[f"{observer.module}.weight"]
                values = range(source.spec.numel)
                pieces = (values[at : at + digest.PART] for at in range(0, len(values), digest.PART))
                self._coming[observer] = [self._line.put(partial(measure, source, self._reader, piece)) for piece in pieces]
                self._line.call(partial(self._keep, observer))

    def multiplier(self, scale: Scale) -> float:
        """What the server multiplies with. In any thread: waits for what was asked for, and raises what that raised."""
        known = {o: self._known[o] for o in scale.amax if o in self._known}
        return multiplier(scale, known | {o: self._measured(o) for o in scale.amax if o not in known and o in self._coming})

    def _keep(self, observer: Observer) -> None:
        self._known[observer] = self._measured(observer)

    def _measured(self, observer: Observer) -> float:
        return max(piece.result() for piece in self._coming[observer])


class Output:
    """A file that is being written, and the digests of its tensors."""

    def __init__(
        self,
        shard: ShardSpec,
        file: TensorFile,
        component: Component,
        reader: Reader,
        line: Line[Bench],
        disk: Disk,
        advance: Advance,
    ) -> None:
        self._shard, self._file, self._component, self._reader = shard, file, component, reader
        self._line, self._disk, self._advance = line, disk, advance
        self._parts: dict[str, list[bytes]] = {}
        self._digests: dict[str, str] = {}
        self._unflushed = 0

    def copy(self, op: Copy) -> None:
        """Hands in the work for a tensor that stays as it is."""
        source = self._component.tensors[op.source]
        for part in parts(op.output):
            work = partial(copy, source, op.output.name, self._reader, self._file, part)
            self._line.put(work, partial(self._take, op.output.name, len(part), len(part)))

    def encode(self, op: Encode, amaxes: Amaxes) -> None:
        """Hands in the work for a weight."""
        source = self._component.tensors[op.source]
        scales = digest.Running(op.local.dtype if op.local else "")

        def work(part: range, bench: Bench) -> Encoded:
            whole = amaxes.multiplier(op.whole) if op.whole else None
            return encode(op, source, self._reader, whole, self._file, part, bench)

        def take(part: range, done: Encoded) -> None:
            if op.local:
                self._file.write(op.local.name, scales.nbytes, memoryview(done.scales))
                scales.update(memoryview(done.scales))
                self._digests[op.local.name] = scales.hexdigest()
            before, after = (edge * source.spec.nbytes // op.codes.nbytes for edge in (part.start, part.stop))
            self._take(op.codes.name, after - before, len(part), done.digest)

        for part in parts(op.codes):
            self._line.put(partial(work, part), partial(take, part))

    def finish(self, amax: Mapping[Observer, float], finished: Finished) -> None:
        """Writes the scales of whole tensors, when all else is written, and lets the file go to the disk."""
        for op in self._shard.ops:
            if isinstance(op, Scale):
                data = raw(torch.full((op.output.numel,), stored_value(op, amax), dtype=torch.float32))
                self._file.write(op.output.name, 0, data)
                self._parts[op.output.name] = [digest.of_bytes(op.output.dtype, data)]
        digests = self._digests | {name: digest.join(found) for name, found in self._parts.items()}
        self._disk.finish(self._file, partial(finished, self._shard, digests))

    def _take(self, name: str, read: int, written: int, found: bytes) -> None:
        self._parts.setdefault(name, []).append(found)
        self._advance(read)
        self._unflushed += written
        if self._unflushed >= FLUSH and self._disk.flush(self._file):
            self._unflushed = 0


class Disk:
    """A thread that waits for the disk, so that no other has to."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._waiting: list[Future[None]] = []

    def flush(self, file: TensorFile) -> bool:
        """Begins to send what is written to the disk, unless the thread is at work. Returns whether it did.

        Raises what earlier work raised.
        """
        if not self._idle():
            return False
        self._waiting.append(self._pool.submit(file.flush))
        return True

    def finish(self, file: TensorFile, then: Callable[[], object]) -> None:
        """Finishes the file, then calls `then` in the thread."""
        self._idle()
        self._waiting.append(self._pool.submit(self._finish, file, then))

    def drain(self) -> None:
        """Waits for all of it."""
        for future in self._waiting:
            future.result()

    def _idle(self) -> bool:
        while self._waiting and self._waiting[0].done():
            self._waiting.pop(0).result()
        return not self._waiting

    @staticmethod
    def _finish(file: TensorFile, then: Callable[[], object]) -> None:
        file.finish()
        then()

    def __enter__(self) -> Disk:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """torch's own threads would stand in the workers' way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
