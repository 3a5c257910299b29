"""One pass over every byte of a checkpoint: each tensor's extremes and, where asked for, its digest. Threads, and fixed buffers.

Extremes are told as bits. Floating numbers of one sign are ordered as their bits are, so the largest signed and the largest
unsigned integer of a buffer give the largest magnitude, exactly and at the speed of the processor's cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ckptq import digest
from ckptq.checkpoint import Component, Reader, SourceTensor
from ckptq.threads import in_order
from ckptq.validators.scales import EXPONENTS, scale_kind

if TYPE_CHECKING:
    import numpy as np

    Bytes = np.ndarray[Any, np.dtype[np.uint8]]

CHUNK = 1 << 21
"""Bytes a read: small enough to stay in the processor's cache while it is looked at."""
COUNTED = 8
"""Chunks of a part in which codes at the largest value are all counted; of further ones it is every COUNTED-th."""
PACKED_COUNTED = 1 << 14
"""Bytes of packed codes that are counted, of each chunk: counting takes as long a byte as all the rest together."""

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
LARGEST_INT8 = 127
_NEXT = {"F8_E4M3": LARGEST - 1, "I8": LARGEST_INT8 - 1}
"""From which magnitude on a chunk's codes are counted."""
_COUNTS = ("nan", "largest", "next", "filled")


@dataclass(frozen=True, slots=True)
class Seen:
    """What a pass found in a tensor, in bits of its dtype; nothing but the digest for dtypes that no weight or scale has.

    top      the largest magnitude; of packed E2M1 codes the largest of those that were counted, and 0 where all codes are zero
    low      the smallest bits, of a scale alone
    signed   whether any number has its sign bit set
    nan      NaN codes of E4M3
    largest  codes of the largest magnitude there is (448, 127, 6), and
    next     codes of the magnitude below it; both about right where there are many
    filled   packed codes other than zero, about
    digest   "" where none was asked for
    """

    top: int = 0
    low: int = 0
    signed: bool = False
    nan: int = 0
    largest: int = 0
    next: int = 0
    filled: int = 0
    digest: str = ""


@dataclass(frozen=True, slots=True)
class _Job:
    """Bytes that one thread reads: a part of one tensor, or several small tensors that lie side by side."""

    tensors: tuple[SourceTensor, ...]
    start: int
    nbytes: int


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
        is_full = seen[-1].top >= _NEXT.get(tensor.spec.dtype, 1 << 64)
        full += is_full
        counted += count and is_full
    joined = _merged(seen)
    if counted < full:
        joined = _times(joined, full / counted)
    return joined, total.digest() if total is not None else b""


def _look_at(piece: memoryview, tensor: SourceTensor, scratch: Bytes, count: bool) -> Seen:
    dtype = tensor.spec.dtype
    bits, _ = NUMBERS.get(dtype, (0, 0))
    if not piece:
        return Seen()
    if dtype in EXPONENTS and scale_kind(tensor.spec.name):
        return _exponents(piece)
    if dtype == "U8":
        return _packed(piece)
    if dtype == "I8":
        return _int8(piece, scratch, count)
    if not bits:
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


def _exponents(piece: memoryview) -> Seen:
    import numpy as np

    values = np.frombuffer(piece, np.uint8)
    return Seen(int(values.max()), int(values.min()))


def _int8(piece: memoryview, scratch: Bytes, count: bool) -> Seen:
    import numpy as np

    values = np.frombuffer(piece, np.int8)
    low, high = int(values.min()), int(values.max())
    top = max(high, -low)
    if not count or top < LARGEST_INT8 - 1:
        return Seen(top, 0, low < 0)
    sizes, equal = scratch[: len(piece)], scratch[CHUNK : CHUNK + len(piece)].view(np.bool_)
    np.absolute(values, out=sizes.view(np.int8))  # of -128 it is -128, which is 128 among bytes
    largest = int(np.count_nonzero(np.greater_equal(sizes, LARGEST_INT8, out=equal)))
    return Seen(top, 0, low < 0, 0, largest, int(np.count_nonzero(np.equal(sizes, LARGEST_INT8 - 1, out=equal))))


def _packed(piece: memoryview) -> Seen:
    """Of two codes a byte. The largest byte tells whether there is anything but zeros, unless it is made of zeros itself."""
    import numpy as np

    values = np.frombuffer(piece, np.uint8)
    if int(values.max()) & 0x77 == 0 and not (values & 0x77).any():
        return Seen()
    part = values[:PACKED_COUNTED]
    bytes_ = np.bincount(part, minlength=256).reshape(16, 16)
    codes = bytes_.sum(0) + bytes_.sum(1)
    sizes = codes[:8] + codes[8:]
    top = max(int(np.flatnonzero(sizes)[-1]), 1)
    times = len(values) / len(part)
    return Seen(top, largest=round(sizes[7] * times), next=round(sizes[6] * times), filled=round(sizes[1:].sum() * times))


def _ends(code: int, tensor: SourceTensor) -> tuple[int, int, int]:
    """(NaN, largest, next) for a tensor of one code."""
    return (code == 0x7F, code == LARGEST, code == LARGEST - 1) if tensor.spec.dtype == "F8_E4M3" else (0, 0, 0)


def _merged(seen: Sequence[Seen]) -> Seen:
    return Seen(
        max(s.top for s in seen),
        min(s.low for s in seen),
        any(s.signed for s in seen),
        *(sum(getattr(s, name) for s in seen) for name in _COUNTS),
    )


def _times(seen: Seen, times: float) -> Seen:
    return dataclasses.replace(seen, **{name: round(getattr(seen, name) * times) for name in _COUNTS})


def _joined(parts: Sequence[tuple[Seen, bytes]]) -> Seen:
    seen = _merged([s for s, _ in parts]) if len(parts) > 1 else parts[0][0]
    return dataclasses.replace(seen, digest=digest.join([d for _, d in parts]) if parts[0][1] else "")
