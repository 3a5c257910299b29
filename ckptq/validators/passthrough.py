"""The output against its source: what was to stay is byte for byte the same, and what was quantized still says the same."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptq.checkpoint import DTYPE_BYTES, FLOATS, Inventory, Reader, SourceTensor
from ckptq.validators import Code, Finding, error, warning
from ckptq.validators.values import CHUNK, SCALE_KINDS, chunks, read_scale

if TYPE_CHECKING:
    import numpy as np

    F32 = np.ndarray[Any, np.dtype[np.float32]]

CODES = {
    "passthrough.missing": Code("a tensor of the source is not in the output"),
    "passthrough.extra": Code("a tensor that is neither the source's nor a scale"),
    "passthrough.form": Code("a tensor with another shape, or another dtype than FP8 or the source's"),
    "passthrough.bytes": Code("an unquantized tensor whose bytes differ"),
    "passthrough.weight-error": Code("a quantized weight further from the source than FP8 rounds"),
    "passthrough.config": Code("config.json differs in more than quantization_config"),
    "passthrough.sidecar-missing": Code("a file of the source did not come along"),
    "passthrough.sidecar": Code("a file that came along, changed"),
}

PIECE = 1 << 17
"""Weights compared at a time: the arrays stay in the processor's cache."""
GENERATED = ("hf_quant_config.json", "ckptq.json")

# |w - q*s| for x = w/s and q = the nearest E4M3 value. Three bits of fraction: for |x| >= 2^-6 the spacing is 2^-3 of the power of
# two below |x|, so the error is at most 2^-4 |x|; below, the spacing is 2^-9 and the error at most 2^-10. ModelOpt rounds x to BF16
# first, which moves it by 2^-9 |x| more. float32 adds 2^-22 |x|. Hence |w - q*s| <= max(RELATIVE |w|, ABSOLUTE s), with room left.
RELATIVE = 2.0**-4 + 2.0**-8
ABSOLUTE = 2.0**-10 * (1 + 2.0**-4)


def check(output: Inventory, source: Inventory, advance: Callable[[int], None] = lambda _: None) -> Iterator[Finding]:
    """All findings against the source. Reads both through fixed buffers; `advance` is told the output's bytes compared."""
    ours, theirs = output.main, source.main
    for name in (n for n in theirs.tensors if n not in ours.tensors):
        yield error(
            "passthrough.missing", name, "every tensor of the source", "not stored",
            "vLLM would leave the memory as it found it", "take the tensor over",
        )  # fmt: skip
    for name in (n for n in ours.tensors if n not in theirs.tensors):
        if name.rpartition(".")[2] not in SCALE_KINDS:
            yield error(
                "passthrough.extra",
                name,
                "the source's tensors and scales",
                "a further tensor",
                "vLLM raises at a name that it does not know",
                "remove it",
            )
    yield from _config_findings(output, source)
    yield from _sidecar_findings(output, source)
    with Reader(output.root, ours) as reader, Reader(source.root, theirs) as original:
        advance(sum(t.spec.nbytes for name, t in ours.tensors.items() if name not in theirs.tensors))
        shared = sorted((t for name, t in ours.tensors.items() if name in theirs.tensors), key=lambda t: (t.file, t.offset))

        def compare(tensor: SourceTensor) -> tuple[SourceTensor, list[Finding]]:
            return tensor, list(_tensor_findings(tensor, theirs.tensors[tensor.spec.name], output, reader, original))

        # numpy lets go of the interpreter's lock in every array operation, so threads share the work.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for tensor, findings in pool.map(compare, shared):
                yield from findings
                advance(tensor.spec.nbytes)


def _tensor_findings(
    tensor: SourceTensor, before: SourceTensor, output: Inventory, reader: Reader, original: Reader
) -> Iterator[Finding]:
    name, dtype = tensor.spec.name, tensor.spec.dtype
    encoded = dtype == "F8_E4M3" and before.spec.dtype in FLOATS
    if tensor.spec.shape != before.spec.shape or not (encoded or dtype == before.spec.dtype):
        yield error(
            "passthrough.form", name, f"{before.spec.dtype} {list(before.spec.shape)} or F8_E4M3 of that shape",
            f"{dtype} {list(tensor.spec.shape)}", "this is not that tensor",
            "convert again from this source, or name the source that it was made from",
        )  # fmt: skip
    elif not encoded:
        if not _same_bytes(tensor, before, reader, original):
            yield error(
                "passthrough.bytes", name, "the source's bytes", "other bytes",
                "the tensor was not to be changed", "convert again, or name the source that it was made from",
            )  # fmt: skip
    else:
        scale = output.main.tensors.get(name.removesuffix("weight") + "weight_scale")
        if scale is not None and scale.spec.numel == 1 and scale.spec.dtype in ("F32", "F16", "BF16"):
            factor = read_scale(reader, scale)
            if math.isfinite(factor):
                yield from _weight_findings(tensor, before, factor, reader, original)


def _same_bytes(tensor: SourceTensor, before: SourceTensor, reader: Reader, original: Reader) -> bool:
    import numpy as np

    ours, theirs = memoryview(bytearray(CHUNK)), memoryview(bytearray(CHUNK))
    pairs = zip(chunks(reader, tensor, ours), chunks(original, before, theirs), strict=True)
    return all(np.array_equal(np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)) for (_, a), (_, b) in pairs)


def _weight_findings(
    tensor: SourceTensor, before: SourceTensor, scale: float, reader: Reader, original: Reader
) -> Iterator[Finding]:
    import numpy as np

    width = DTYPE_BYTES[before.spec.dtype]
    codes, raw = memoryview(bytearray(PIECE)), memoryview(bytearray(PIECE * width))
    decoded, weight, limit = (np.empty(PIECE, np.float32) for _ in range(3))
    beyond, first, worst = 0, -1, 0.0
    for (start, ours), (_, theirs) in zip(chunks(reader, tensor, codes), chunks(original, before, raw), strict=True):
        off, w, most = decoded[: len(ours)], weight[: len(ours)], limit[: len(ours)]
        decode(ours, off)
        as_float32(theirs, before.spec.dtype, w)
        np.multiply(off, np.float32(scale), out=off)
        np.subtract(off, w, out=off)
        np.abs(off, out=off)
        np.abs(w, out=w)
        np.multiply(w, np.float32(RELATIVE), out=most)
        np.maximum(most, np.float32(ABSOLUTE * scale), out=most)
        wrong = ~(off <= most)  # a NaN is wrong too
        if not math.isfinite(w.max()):
            wrong |= ~np.isfinite(w)
        count = int(np.count_nonzero(wrong))
        if count:
            first = first if beyond else start + int(wrong.argmax())
            with np.errstate(invalid="ignore"):  # infinity by infinity
                worst = max(worst, float((off[wrong] / most[wrong]).max()))
            beyond += count
    if beyond:
        at = np.unravel_index(first, tensor.spec.shape) if tensor.spec.shape else ()
        yield error(
            "passthrough.weight-error", tensor.spec.name,
            "code * weight_scale within FP8's rounding of the source's weight: 2^-4 of it, or half the smallest step",
            f"{beyond} of {tensor.spec.numel} weights are not, first {[int(i) for i in at]}, worst {worst:.3g} times the limit",
            "the scale, the codes or their order are not this weight's (an amax stored as scale, a transposed or another tensor)",
            "convert again, or name the source that it was made from",
        )  # fmt: skip


def decode(codes: memoryview, out: F32) -> None:
    """out [n] = the values of n E4M3 codes. A NaN code becomes 480; values.py looks for those.

    A code's 4 exponent and 3 fraction bits, moved to where float32 has its own, read as the value times 2^-120: 120 is the
    difference of the exponents' biases, and subnormal codes become subnormal floats. Sign extension leaves the sign on top.
    """
    import numpy as np

    bits = out.view(np.int32)
    np.copyto(bits, np.frombuffer(codes, np.int8))
    np.left_shift(bits, 20, out=bits)
    np.bitwise_and(bits, np.uint32(0x87F00000).view(np.int32), out=bits)
    np.multiply(out, np.float32(2.0**120), out=out)


def as_float32(data: memoryview, dtype: str, out: F32) -> None:
    """out [n] = the values of n numbers in BF16, F16, F32 or F64."""
    import numpy as np

    if dtype == "BF16":
        bits = out.view(np.uint32)
        np.copyto(bits, np.frombuffer(data, np.uint16))
        np.left_shift(bits, 16, out=bits)
        return
    kinds: dict[str, type[np.floating[Any]]] = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
    np.copyto(out, np.frombuffer(data, kinds[dtype]), casting="same_kind")


def _config_findings(output: Inventory, source: Inventory) -> Iterator[Finding]:
    """A value that changed is an error. A key that came or went is a warning: transformers adds and drops defaults."""
    ours, theirs = (_leaves({k: v for k, v in i.main.config.items() if k != "quantization_config"}) for i in (output, source))
    for key in sorted(ours.keys() | theirs.keys()):
        if key in ours and key in theirs and ours[key] == theirs[key]:
            continue
        changed = key in ours and key in theirs and key != "transformers_version"
        yield (error if changed else warning)(
            "passthrough.config", f"config.json: {key}", repr(theirs[key]) if key in theirs else "absent",
            repr(ours[key]) if key in ours else "absent",
            "only quantization_config may be added", "take the rest of config.json over from the source",
        )  # fmt: skip


def _leaves(config: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """{dotted key: value} of everything in nested objects that is no object itself; an empty one counts as a value."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= _leaves(value, f"{at}{key}.") if isinstance(value, Mapping) and value else {f"{at}{key}": value}
    return found


def _sidecar_findings(output: Inventory, source: Inventory) -> Iterator[Finding]:
    for name in source.main.sidecars:
        path, before = output.root / name, source.root / name
        if name in GENERATED:
            continue
        if not path.is_file():
            yield error(
                "passthrough.sidecar-missing", name, "the source's file", "absent",
                "tokenizer, processor and the like must come along", "copy it from the source",
            )  # fmt: skip
        elif not _same_file(path, before):
            yield error(
                "passthrough.sidecar",
                name,
                "the source's bytes",
                "other bytes",
                "the server would see another file than the source's users",
                "copy the file from the source again",
            )


def _same_file(a: Path, b: Path) -> bool:
    if a.stat().st_size != b.stat().st_size:
        return False
    with a.open("rb") as first, b.open("rb") as second:
        while block := first.read(CHUNK):
            if block != second.read(CHUNK):
                return False
    return True
