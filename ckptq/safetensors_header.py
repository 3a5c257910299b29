"""Headers of safetensors files: 8 bytes little-endian length N, N bytes of JSON {name: {dtype, shape, data_offsets}}, then the
data without gaps (safetensors 0.8 format description). What is accepted here, safetensors 0.8.0 accepts too.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ckptq.errors import SourceError
from ckptq.folder import open_regular, printable
from ckptq.json_file import parse, short

HEADER_LIMIT = 100_000_000
"""safetensors 0.8.0 src/tensor.rs MAX_HEADER_SIZE."""
NAME_LIMIT = 1000
"""Characters of a tensor's name. safetensors has no such limit; the longest that are published have some 150."""
RANK_LIMIT = 64
"""NumPy's. safetensors has none."""
_SIZE_LIMIT = 1 << 63

DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {
        **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
        **dict.fromkeys(("F32", "I32", "U32"), 32),
        **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
        **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
        **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
        "F4": 4,
    }
)
"""Every dtype of safetensors 0.8.0 (src/tensor.rs Dtype). Elements of 4 and 6 bits are packed."""
DTYPE_BYTES: Mapping[str, int] = MappingProxyType({name: bits // 8 for name, bits in DTYPE_BITS.items() if bits % 8 == 0})
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a safetensors header says of a tensor. `dtype` is safetensors' own word, for example "BF16" or "F8_E4M3"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A stored tensor: `offset` is in bytes from the start of `file`, which is relative to the checkpoint's folder.

    codes   how it is stored, where `spec` says what it is once dequantized: then no byte at `offset` is one of `spec`'s
    stride  of a matrix that lies transposed: its value [i, j] is the file's number j * stride + i from `offset` on
    parts   of one that is seen in place of several: what its rows are, one behind another
    """

    spec: TensorSpec
    file: str
    offset: int
    codes: Codes | None = None
    stride: int = 0
    parts: tuple[SourceTensor, ...] = ()

    @property
    def as_stored(self) -> bool:
        """Whether the bytes at `offset` are the tensor's."""
        return self.codes is None and not self.stride and not self.parts

    @property
    def stored_bytes(self) -> int:
        """What is read of the disk for it."""
        if self.parts:
            return sum(part.stored_bytes for part in self.parts)
        return self.spec.nbytes if self.codes is None else self.codes.stored.spec.nbytes + self.codes.scale.spec.nbytes


@dataclass(frozen=True, slots=True)
class Codes:
    """A weight in FP8 codes [..., k], seen as rows of k: value = code * scale, one scale for each `high` rows by `wide` columns."""

    stored: SourceTensor
    scale: SourceTensor
    high: int
    wide: int


Header = Mapping[str, Any]


def read_header(path: Path) -> Header:
    """The JSON header of a safetensors file, {name: {dtype, shape, offset}}, checked against the file's size.

    Raises SourceError for what is no regular file of its folder, is too short, is no safetensors file, or whose tensors leave
    gaps or overlap.
    """
    name = printable(path.name)
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = header_length(path.name, file.read(8), size)
            raw = file.read(length)
    except OSError as error:
        raise SourceError(f"{name}: can't be read: {error.strerror}", hint="fetch the file again") from error
    return parse_header(path.name, raw, length=length, size=size)


def header_length(name: str, start: bytes, size: int) -> int:
    """The length of the header in a file of `size` bytes that begins with `start`, checked before anything is read for it."""
    length = int.from_bytes(start[:8], "little")
    if size < 8 or len(start) < 8 or length > size - 8:
        raise SourceError(
            f"{printable(name)}: truncated or not a safetensors file: the header should be {length} bytes long, "
            f"the file has {max(size - 8, 0)} after its length field",
            hint="fetch the file again",
        )
    if length > HEADER_LIMIT:
        raise SourceError(f"{printable(name)}: expected a header of at most {HEADER_LIMIT} bytes, found one of {length}")
    return length


def parse_header(name: str, raw: bytes, *, length: int, size: int) -> Header:
    """The checked header of a file of `size` bytes, from the `length` bytes after its length field."""
    if len(raw) < length:
        raise SourceError(f"{printable(name)}: ended while its header was read; was it changed meanwhile?")
    try:
        header = parse(raw)
    except ValueError as error:
        raise SourceError(f"{printable(name)}: its header is not JSON: {error}", hint="fetch the file again") from error
    return check_header(name, header, start=8 + length, size=size)


def check_header(name: str, raw: Any, *, start: int, size: int) -> Header:
    """`raw` with offsets made absolute, after checking every dtype, shape and range. Pure but for its errors."""
    file = printable(name)
    if not isinstance(raw, dict):
        raise SourceError(f"{file}: its header is not a JSON object")
    metadata = raw.get("__metadata__")  # null is taken, as safetensors takes it
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise SourceError(f"{file}: __metadata__: expected names with texts, found {short(metadata)}")
    entries: dict[str, Any] = {}
    spans: list[tuple[int, int, str]] = []
    for key, value in raw.items():
        if key == "__metadata__":
            continue
        if len(key) > NAME_LIMIT:
            raise SourceError(f"{file}: {printable(key)}: expected a name of at most {NAME_LIMIT} characters, found {len(key)}")
        spec, begin, end = _entry(file, key, value)
        if end - begin != spec.nbytes:
            raise SourceError(
                f"{file}: {printable(key)} should take {spec.nbytes} bytes ({spec.dtype} {list(spec.shape)}), "
                f"the header gives it {end - begin}"
            )
        entries[key] = {"dtype": spec.dtype, "shape": spec.shape, "offset": start + begin}
        spans.append((begin, end, key))
    at = 0
    for begin, end, key in sorted(spans):
        if begin != at:
            raise SourceError(
                f"{file}: {printable(key)} starts at byte {begin} of the data, expected {at}: a gap or an overlap",
                hint="fetch the file again",
            )
        at = end
    if start + at != size:
        raise SourceError(
            f"{file}: truncated or overlong: the header describes {start + at} bytes, the file has {size}",
            hint="fetch the file again",
        )
    return entries


def _entry(file: str, key: str, value: Any) -> tuple[TensorSpec, int, int]:
    """(spec, begin, end) of one tensor. Raises SourceError for anything but a known dtype and sizes that are whole numbers."""
    where = f"{file}: the header entry of {printable(key)} can't be understood"
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise SourceError(f"{where}: expected dtype, shape and data_offsets, found {short(value)}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise SourceError(
            f"{where}: expected a dtype of {', '.join(DTYPE_BITS)}, found {short(dtype)}",
            hint="safetensors 0.8, and with it the server, does not know this dtype either",
        )
    if not _sizes(shape) or len(shape) > RANK_LIMIT:
        raise SourceError(f"{where}: expected a shape of at most {RANK_LIMIT} whole numbers, found {short(shape)}")
    if not _sizes(offsets) or len(offsets) != 2:
        raise SourceError(f"{where}: expected data_offsets [begin, end], found {short(offsets)}")
    bits = DTYPE_BITS[dtype]
    for n in shape:
        bits *= n
        if bits >= _SIZE_LIMIT:
            raise SourceError(f"{where}: its shape {short(shape)} is larger than any file")
    if bits % 8:
        raise SourceError(f"{where}: {dtype} {short(shape)} takes {bits} bits, expected whole bytes")
    return TensorSpec(key, dtype, tuple(shape)), offsets[0], offsets[1]


def _sizes(value: Any) -> bool:
    """Whether it is a list or tuple of whole numbers from 0 on. `true` is none, though Python takes it for 1."""
    return isinstance(value, (list, tuple)) and all(type(n) is int and 0 <= n < _SIZE_LIMIT for n in value)
