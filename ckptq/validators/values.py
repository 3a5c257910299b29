"""The numbers: scales and codes of every quantized tensor, streamed through one buffer."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ckptq.checkpoint import Component, Reader, SourceTensor
from ckptq.scopes import Scope
from ckptq.validators import Code, Finding, error, warning
from ckptq.validators.vllm_rules import server_linears

if TYPE_CHECKING:
    import numpy as np

CODES = {
    "values.not-finite": Code("a NaN or an infinity: a scale, a code, or an unquantized weight"),
    "values.not-positive": Code("a scale that is zero or negative"),
    "values.scale-range": Code("a scale that no sensible model leads to"),
    "values.all-zero": Code("codes that are all zero"),
    "values.saturated": Code("more codes at the largest value than a scale of amax / 448 leaves there"),
    "values.weight-scale-split": Code("shards of one fused linear with different weight scales"),
    "values.input-scale-split": Code("shards of one fused linear with different input scales"),
}

CHUNK = 1 << 20
"""Bytes a read: small enough to stay in the processor's cache while it is looked at."""
SCALE_KINDS = ("weight_scale", "input_scale", "k_scale", "v_scale")
# Ranges of scale = amax / 448. Weights of language models stay below 128, K and V below 4,480; inputs of down_proj reach 1e5.
PLAUSIBLE: Mapping[str, tuple[float, float]] = {
    "weight_scale": (1e-8, 128 / 448),
    "input_scale": (1e-7, 1e4),
    "k_scale": (1e-6, 10.0),
    "v_scale": (1e-6, 10.0),
}
SATURATED_SHARE = 0.05
"""Under amax / 448 only weights within 3.6 % of the largest get the code 448: even evenly spread weights leave no more there."""
_EXPONENTS = {"BF16": 0x7F80, "F16": 0x7C00}


@dataclass(frozen=True, slots=True)
class Codes:
    """What a tensor of FP8 codes holds: how many, how many NaN, how many of the largest magnitude, and whether any is not zero."""

    count: int
    nan: int
    largest: int
    nonzero: bool


def check(root: Path, component: Component, scope: Scope, advance: Callable[[int], None] = lambda _: None) -> Iterator[Finding]:
    """All findings on values. `advance` is told the bytes that were looked at."""
    buffer = memoryview(bytearray(CHUNK))
    scales: dict[str, float] = {}
    zeros: set[str] = set()
    with Reader(root, component) as reader:
        for name, tensor in sorted(component.tensors.items(), key=lambda item: (item[1].file, item[1].offset)):
            kind = name.rpartition(".")[2]
            if kind in SCALE_KINDS and tensor.spec.numel == 1 and tensor.spec.dtype in ("F32", "BF16", "F16"):
                scales[name] = read_scale(reader, tensor)
            elif tensor.spec.dtype == "F8_E4M3":
                codes = _scan_codes(reader, tensor, buffer)
                zeros |= set() if codes.nonzero else {name.removesuffix(".weight")}
                yield from _code_findings(name, codes)
            elif tensor.spec.dtype in ("BF16", "F16", "F32") and not _all_finite(reader, tensor, buffer):
                yield error(
                    "values.not-finite", name, "finite values", "NaN or infinity",
                    "the source holds them too, or the copy went wrong", "compare with --source",
                )  # fmt: skip
            advance(tensor.spec.nbytes)
    for name, value in scales.items():
        yield from _scale_findings(name, value, name.rpartition(".")[0] in zeros)
    for linear in server_linears(scope, component.config, component.tensors):
        yield from _group_findings(linear.shards, scales)


def read_scale(reader: Reader, tensor: SourceTensor) -> float:
    """The value of a tensor of one element, F32, F16 or BF16."""
    raw = bytearray(tensor.spec.nbytes)
    reader.read_into(tensor, 0, memoryview(raw))
    if tensor.spec.dtype == "F16":
        return float(struct.unpack("<e", raw)[0])
    return float(struct.unpack("<f", raw.rjust(4, b"\0"))[0])  # BF16 is the upper half of an F32


def chunks(reader: Reader, tensor: SourceTensor, buffer: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(byte offset, bytes) of the whole tensor, in pieces of the buffer's size."""
    for start in range(0, tensor.spec.nbytes, len(buffer)):
        piece = buffer[: min(len(buffer), tensor.spec.nbytes - start)]
        reader.read_into(tensor, start, piece)
        yield start, piece


def _scan_codes(reader: Reader, tensor: SourceTensor, buffer: memoryview) -> Codes:
    """E4M3 "fn": the magnitude 0x7F is NaN, 0x7E is 448, 0 is zero; the top bit is the sign."""
    import numpy as np

    nan = largest = top = 0
    for _, piece in chunks(reader, tensor, buffer):
        codes = np.frombuffer(piece, dtype=np.uint8)
        np.bitwise_and(codes, 0x7F, out=codes)
        high = int(codes.max())
        top = max(top, high)
        if high >= 0x7E:
            largest += int(np.count_nonzero(codes == 0x7E))
        if high == 0x7F:
            nan += int(np.count_nonzero(codes == 0x7F))
    return Codes(tensor.spec.numel, nan, largest, top > 0)


def _all_finite(reader: Reader, tensor: SourceTensor, buffer: memoryview) -> bool:
    import numpy as np

    for _, piece in chunks(reader, tensor, buffer):
        if tensor.spec.dtype == "F32":
            finite = bool(np.isfinite(np.frombuffer(piece, dtype=np.float32)).all())
        else:
            exponent = _EXPONENTS[tensor.spec.dtype]
            bits: np.ndarray[tuple[int], np.dtype[np.uint16]] = np.frombuffer(piece, dtype=np.uint16)
            finite = int(np.bitwise_and(bits, exponent, out=bits).max()) < exponent
        if not finite:
            return False
    return True


def _code_findings(name: str, codes: Codes) -> Iterator[Finding]:
    if codes.nan:
        yield error(
            "values.not-finite", name, "no NaN code (0x7F, 0xFF)", f"NaN among {codes.count} codes: {codes.nan}",
            "the weight was divided by zero or held NaN", "look at its amax in the source, then convert again",
        )  # fmt: skip
    if not codes.nonzero:
        yield warning(
            "values.all-zero", name, "codes other than zero", "all zero",
            "right only where the source's weight is all zero", "compare with --source",
        )  # fmt: skip
    if codes.largest > SATURATED_SHARE * codes.count and codes.count > 64:
        yield warning(
            "values.saturated", name, f"at most {SATURATED_SHARE:.0%} of the codes at the largest value",
            f"{codes.largest / codes.count:.1%}",
            "the scale is too small and cut the weights off", "weight_scale must be amax / 448",
        )  # fmt: skip


def _scale_findings(name: str, value: float, of_zeros: bool) -> Iterator[Finding]:
    kind = name.rpartition(".")[2]
    low, high = PLAUSIBLE[kind]
    if not math.isfinite(value):
        yield error(
            "values.not-finite",
            name,
            "a finite scale",
            str(value),
            "everything it touches becomes NaN",
            "calibrate and export again",
        )
    elif value <= 0:
        yield error(
            "values.not-positive", name, "a scale above zero", f"{value:g}",
            "vLLM computes with it, or takes a negative KV scale for a missing one, silently", "calibrate and export again",
        )  # fmt: skip
    elif not low <= value <= high and not (of_zeros and kind == "weight_scale"):
        yield warning(
            "values.scale-range", name, f"between {low:g} and {high:.3g}, as amax / 448 is", f"{value:g}",
            "an amax, or one divided by a scale, may stand where amax / 448 belongs", "compare with --source",
        )  # fmt: skip


def _group_findings(shards: tuple[str, ...], scales: Mapping[str, float]) -> Iterator[Finding]:
    for kind, effect, mend in (
        ("weight_scale", "vLLM decodes the shards and encodes them again under the largest scale, rounding twice; its CPU "
         "build can't",
         "this is how ModelOpt exports: convert with ckptq, which gives a fused linear one scale"),
        ("input_scale", "the shards read one input, and vLLM takes the largest scale for all", "calibrate them as one"),
    ):  # fmt: skip
        values = [scales[f"{m}.{kind}"] for m in shards if f"{m}.{kind}" in scales]
        if len(set(values)) > 1 and all(math.isfinite(v) and v > 0 for v in values):
            names = ",".join(m.rpartition(".")[2] for m in shards)
            yield warning(
                f"values.{kind.replace('_', '-')}-split", f"{shards[0].rpartition('.')[0]}.{{{names}}}.{kind}",
                "one value for the fused linear", f"values from {min(values):g} to {max(values):g}", effect, mend,
        )  # fmt: skip
