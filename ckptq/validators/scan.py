"""One pass over every byte of a checkpoint: each tensor's extremes and, where asked for, its digest. Threads, and fixed buffers.

Extremes are told as bits. Floating numbers of one sign are ordered as their bits are, so the largest signed and the largest
unsigned integer of a buffer give the largest magnitude, exactly and at the speed of the processor's cache.
"""

from __future__ import annotations

import collections
import os
import queue
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from ckptq import digest
from ckptq.checkpoint import Component, Reader, SourceTensor
from ckptq.validators.scales import scale_kind

if TYPE_CHECKING:
    import numpy as np

    Bytes = np.ndarray[Any, np.dtype[np.uint8]]

Job = TypeVar("Job")
Desk = TypeVar("Desk")
Result = TypeVar("Result")
CHUNK = 1 << 20
"""Bytes a read: small enough to stay in the processor's cache while it is looked at."""
AHEAD = 8
"""Jobs a thread that wait to be done, or to be looked at."""
THREADS = 16
"""At most; a disk or the memory is the limit long before."""
COUNTED = 8
"""Chunks of a part in which codes at the largest value are all counted; of further ones it is every COUNTED-th."""

# bits of a number, and the bits of infinity or the first NaN without the sign. E4M3 "fn" has no infinity: 0x7F is NaN.
NUMBERS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "F64": (64, 0x7FF0 << 48),
        "F32": (32, 0x7F80 << 16),
        "BF16": (16, 0x7F80),
        "F16": (16, 0x7C00),
        "F8_E4M3": (8, 0x7F),
        "F8_E5M2": (8, 0x7C),
    }
)
LARGEST = 0x7E
"""The E4M3 code of 448."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a pass found in a tensor, in bits of its dtype; nothing but the digest for dtypes not in NUMBERS.

    top      the largest magnitude
    low      the smallest bits, of a scale alone
    signed   whether any number has its sign bit set
    nan      NaN codes of E4M3
    largest  codes of magnitude 448, and
    next     codes of the magnitude below it; both about right where there are many
    digest   "" where none was asked for
    """

    top: int = 0
    low: int = 0
    signed: bool = False
    nan: int = 0
    largest: int = 0
    next: int = 0
    digest: str = ""


@dataclass(frozen=True, slots=True)
class _Job:
    """Bytes that one thread reads: a part of one tensor, or several small tensors that lie side by side."""

    tensors: tuple[SourceTensor, ...]
    start: int
    nbytes: int


def threads() -> int:
    """How many threads look at a checkpoint."""
    return min(THREADS, os.cpu_count() or 1)


def scan(
    root: Path, component: Component, advance: Callable[[int], None] = lambda _: None, *, digests: bool = False
) -> Iterator[tuple[SourceTensor, Seen]]:
    """Every tensor with what was seen in it, in the order of the files. `advance` is told the bytes that were looked at."""
    import numpy as np

    parts: list[tuple[Seen, bytes]] = []
    with Reader(root, component) as reader:

        def look(job: _Job, desk: tuple[memoryview, Bytes]) -> tuple[_Job, list[tuple[Seen, bytes]]]:
            return job, _look(job, reader, *desk, digests)

        for job, found in in_order(look, _jobs(component), lambda: (memoryview(bytearray(CHUNK)), np.empty(2 * CHUNK, np.uint8))):
            if len(job.tensors) > 1 or job.nbytes == job.tensors[0].spec.nbytes:
                yield from ((t, _joined([part])) for t, part in zip(job.tensors, found, strict=True))
            else:
                parts += found
                if job.start + job.nbytes == job.tensors[0].spec.nbytes:
                    yield job.tensors[0], _joined(parts)
                    parts = []
            advance(job.nbytes)


def in_order(work: Callable[[Job, Desk], Result], jobs: Iterable[Job], desk: Callable[[], Desk]) -> Iterator[Result]:
    """work(job, desk) of each job by threads, in the order of the jobs; each thread has a desk. Only a few are ahead.

    numpy, xxhash and the system let go of the interpreter's lock, so threads do share the work.
    """
    desks: queue.SimpleQueue[Desk] = queue.SimpleQueue()
    for _ in range(threads()):
        desks.put(desk())

    def one(job: Job) -> Result:
        mine = desks.get()
        try:
            return work(job, mine)
        finally:
            desks.put(mine)

    waiting: collections.deque[Future[Result]] = collections.deque()
    with ThreadPoolExecutor(threads()) as pool:
        for job in jobs:
            waiting.append(pool.submit(one, job))
            if len(waiting) > AHEAD * threads():
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _jobs(component: Component) -> Iterator[_Job]:
    batch: list[SourceTensor] = []
    size = 0
    for tensor in sorted(component.tensors.values(), key=lambda t: (t.file, t.offset)):
        nbytes = tensor.spec.nbytes
        beside = batch and batch[0].file == tensor.file and batch[0].offset + size == tensor.offset
        if batch and not (beside and size + nbytes <= CHUNK):
            yield _Job(tuple(batch), 0, size)
            batch, size = [], 0
        if nbytes > CHUNK:
            yield from (_Job((tensor,), at, min(digest.PART, nbytes - at)) for at in range(0, nbytes, digest.PART))
        else:
            batch.append(tensor)
            size += nbytes
    if batch:
        yield _Job(tuple(batch), 0, size)


def _look(job: _Job, reader: Reader, buffer: memoryview, scratch: Bytes, digests: bool) -> list[tuple[Seen, bytes]]:
    """(what was seen, digest or b"") of each tensor, or of the part of the one."""
    first = job.tensors[0]
    if first.spec.nbytes > CHUNK:
        return [_look_at_part(first, job, reader, buffer, scratch, digests)]
    reader.read_into(first, 0, buffer[: job.nbytes])
    found, at = [], 0
    for tensor in job.tensors:
        piece = buffer[at : at + tensor.spec.nbytes]
        at += len(piece)
        total = digest.hasher(tensor.spec.dtype) if digests else None
        if total is not None:
            total.update(piece)
        found.append((_look_at(piece, tensor, scratch, True), total.digest() if total is not None else b""))
    return found


def _look_at_part(
    tensor: SourceTensor, job: _Job, reader: Reader, buffer: memoryview, scratch: Bytes, digests: bool
) -> tuple[Seen, bytes]:
    total = digest.hasher(tensor.spec.dtype) if digests else None
    seen: list[Seen] = []
    full = counted = 0
    for at in range(job.start, job.start + job.nbytes, CHUNK):
        piece = buffer[: min(CHUNK, job.start + job.nbytes - at)]
        reader.read_into(tensor, at, piece)
        if total is not None:
            total.update(piece)
        count = full < COUNTED or full % COUNTED == 0
        seen.append(_look_at(piece, tensor, scratch, count))
        full += seen[-1].top >= LARGEST - 1
        counted += count and seen[-1].top >= LARGEST - 1
    joined = _merged(seen)
    if counted < full:
        joined = _replaced_counts(joined, full / counted)
    return joined, total.digest() if total is not None else b""


def _look_at(piece: memoryview, tensor: SourceTensor, scratch: Bytes, count: bool) -> Seen:
    bits, _ = NUMBERS.get(tensor.spec.dtype, (0, 0))
    if not bits or not piece:
        return Seen()
    sign = 1 << (bits - 1)
    if len(piece) * 8 == bits:
        value = int.from_bytes(piece, "little")
        return Seen(value & (sign - 1), value, value >= sign, *_ends(value & 0x7F, tensor))
    import numpy as np

    unsigned = np.frombuffer(piece, f"<u{bits // 8}")
    positive, high = int(unsigned.view(f"<i{bits // 8}").max()), int(unsigned.max())
    top = max(positive, high - sign, 0)
    low = int(unsigned.min()) if scale_kind(tensor.spec.name) else 0
    if bits > 8 or top < LARGEST - 1 or not count or tensor.spec.dtype != "F8_E4M3":
        return Seen(top, low, high >= sign)
    codes, equal = scratch[: len(piece)], scratch[CHUNK : CHUNK + len(piece)].view(np.bool_)
    np.bitwise_and(unsigned, 0x7F, out=codes)
    nan, largest, below = (
        int(np.count_nonzero(np.equal(codes, code, out=equal))) if code <= top else 0 for code in (0x7F, LARGEST, LARGEST - 1)
    )
    return Seen(top, low, high >= sign, nan, largest, below)


def _ends(code: int, tensor: SourceTensor) -> tuple[int, int, int]:
    """(NaN, largest, next) for a tensor of one code."""
    return (code == 0x7F, code == LARGEST, code == LARGEST - 1) if tensor.spec.dtype == "F8_E4M3" else (0, 0, 0)


def _merged(seen: Sequence[Seen]) -> Seen:
    return Seen(
        max(s.top for s in seen),
        min(s.low for s in seen),
        any(s.signed for s in seen),
        sum(s.nan for s in seen),
        sum(s.largest for s in seen),
        sum(s.next for s in seen),
    )


def _replaced_counts(seen: Seen, times: float) -> Seen:
    nan, largest, below = (round(n * times) for n in (seen.nan, seen.largest, seen.next))
    return Seen(seen.top, seen.low, seen.signed, nan, largest, below)


def _joined(parts: Sequence[tuple[Seen, bytes]]) -> Seen:
    seen = _merged([s for s, _ in parts]) if len(parts) > 1 else parts[0][0]
    text = digest.join([d for _, d in parts]) if parts[0][1] else ""
    return Seen(seen.top, seen.low, seen.signed, seen.nan, seen.largest, seen.next, text)
