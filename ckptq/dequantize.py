"""FP8 codes back to BF16, any range of bytes at a time: code * scale in float32, rounded once."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from ckptq.checkpoint import Codes, SourceTensor
from ckptq.errors import DataError
from ckptq.folder import printable
from ckptq.tensors import TORCH_DTYPES, raw

CHUNK = 1 << 18
"""Codes at a time: with what becomes of them they take 1.8 MB, which stays in the cache."""
KEPT_SCALES = 32
"""Scale tensors that are held at once: more than there are threads, each of which reads one weight."""

ReadStored = Callable[[SourceTensor, int, memoryview], None]


class Dequantizer:
    """Reads weights that are stored as codes, for `Reader`, from any thread. Holds one set of buffers a thread."""

    def __init__(self, read: ReadStored) -> None:
        self._read = read
        self._local = threading.local()
        self._lock = threading.Lock()
        self._scales: dict[str, torch.Tensor] = {}

    def read_into(self, tensor: SourceTensor, start: int, buffer: memoryview) -> None:
        """Fills `buffer` with bytes of the BF16 weight from byte `start` on.

        Raises DataError for a scale that is not finite, or negative, which no quantizer writes.
        """
        codes, view = tensor.codes, buffer.cast("B")
        assert codes is not None
        if not view:
            return
        end = start + len(view)
        first, last = -(-start // 2), end // 2  # the values that lie in it whole
        self._fill(codes, first, view[2 * first - start : 2 * last - start])
        for at in {start, end - 1}:  # and those cut in two by an odd start or end
            if not first <= at // 2 < last:
                value = memoryview(bytearray(2))
                self._fill(codes, at // 2, value)
                view[at - start] = value[at % 2]

    def _fill(self, codes: Codes, at: int, view: memoryview) -> None:
        """Fills `view` with BF16 values from the weight's value number `at` on: whole rows together, rows cut short alone."""
        k, end, begin = codes.stored.spec.shape[-1], at + len(view) // 2, at
        scales = self._scales_of(codes)
        while at < end:
            column = at % k
            rows = min((end - at) // k, CHUNK // k) if column == 0 else 0
            count = rows * k or min(end - at, k - column, CHUNK)
            out = torch.frombuffer(view, dtype=torch.bfloat16, count=count, offset=2 * (at - begin))
            values = self._values(codes, at, count).view(max(rows, 1), -1)
            _multiply(values, scales, codes, at // k, column)
            out.view(values.shape).copy_(values)
            at += count

    def _values(self, codes: Codes, at: int, count: int) -> torch.Tensor:
        """What `count` codes stand for without their scale, F32 [count]. Each step is five times faster than torch's own cast.

        The bits of an E4M3 number, moved into those of an F16, are that number / 256, the small ones too.
        """
        stored, halves, values = self._buffers()
        self._read(codes.stored, at, raw(stored)[:count])
        stored, halves, values = stored[:count], halves[:count], values[:count]
        halves.copy_(stored.view(torch.int8))
        halves.bitwise_left_shift_(7).bitwise_and_(-0x4080)  # 0xBF80: the sign was spread over the bit next to it
        values.copy_(halves.view(torch.float16)).mul_(256.0)
        stored.bitwise_and_(0x7F)
        if int(stored.max()) == 0x7F:
            values.masked_fill_(stored == 0x7F, torch.nan)
        return values

    def _buffers(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if not hasattr(self._local, "buffers"):
            sizes = (torch.uint8, torch.int16, torch.float32)
            self._local.buffers = tuple(torch.empty(CHUNK, dtype=dtype) for dtype in sizes)
        held: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = self._local.buffers
        return held

    def _scales_of(self, codes: Codes) -> torch.Tensor:
        """The scales, F32 [rows / high, columns / wide]."""
        name = codes.scale.spec.name
        with self._lock:
            if (held := self._scales.get(name)) is not None:
                return held
        spec = codes.scale.spec
        stored = torch.empty(spec.numel, dtype=TORCH_DTYPES[spec.dtype])
        self._read(codes.scale, 0, raw(stored))
        values = stored.float()
        odd = ~(torch.isfinite(values) & (values >= 0))
        if bool(odd.any()):
            raise DataError(
                f"{printable(name)}: expected scales that are finite and not negative, found {float(values[odd][0])}",
                hint="the source is damaged; fetch it again or start from the BF16 checkpoint",
            )
        values = values.view(-1, -(-codes.stored.spec.shape[-1] // codes.wide))
        with self._lock:
            while len(self._scales) >= KEPT_SCALES:
                del self._scales[next(iter(self._scales))]
            self._scales[name] = values
        return values


def _multiply(values: torch.Tensor, scales: torch.Tensor, codes: Codes, row: int, column: int) -> None:
    """Multiplies values [r, c], which begin at `row` and `column` of the weight, with their scales in place."""
    count, width = values.shape
    if scales.shape[1] == 1:
        values.mul_(scales[torch.arange(row, row + count) // codes.high])
        return
    for block in range(row // codes.high, (row + count - 1) // codes.high + 1):
        spread = scales[block].repeat_interleave(codes.wide)[column : column + width]
        values[max(block * codes.high - row, 0) : (block + 1) * codes.high - row].mul_(spread)
