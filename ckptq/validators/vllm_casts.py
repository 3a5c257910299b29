"""What vLLM's loader copied into another dtype: which numbers that changes, and whether the server still holds what was meant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckptq.validators import Code, Finding, error, warning
from ckptq.validators.vllm_parts import KV_SCALE

CODES = {
    "server.lossy-cast": Code(
        "vLLM's loader copied values into a dtype that changes them",
        "vLLM 0.32.0 model_executor/models/utils.py AutoWeightsLoader._load_param",
    ),
}

_WIDE = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}
"""Formats that hold numbers as they are, with the bits of their significands."""
_SAME_BITS = {"int8", "uint8"}
"""Torch's copy from one to the other wraps around."""


def check(trace: Mapping[str, Any]) -> Iterator[Finding]:
    """Findings on the trace of vllm_child.py."""
    for key, entry in trace["keys"].items():
        for cast in entry["casts"]:
            parameter = trace["parameters"].get(cast["parameter"], {})
            before, after = (name.removeprefix("torch.") for name in (entry["dtype"], cast["to"]))
            if before == after or (before in _WIDE and after in _WIDE and not cast["changed"]):
                continue
            # attention.py makes the parameter in the default dtype, so F32 is always rounded to BF16: as good as exact.
            if parameter.get("exempt") == KV_SCALE and before in _WIDE and after in _WIDE:
                continue
            changed = f"{cast['changed']} of {cast['elements']} values changed" if cast["changed"] else "no value changed"
            yield (warning if _benign(key, before, after, cast["changed"]) else error)(
                "server.lossy-cast", key, f"{after}, the dtype of the server's parameter" if cast["parameter"] else after,
                f"{before}; {changed}", _cast_effect(before, after),
                "store the dtype that the config declares, or mend the config's list of what stays unquantized",
            )  # fmt: skip


def _benign(key: str, before: str, after: str, changed: int) -> bool:
    """Whether the server still holds what was meant: in a scale the numbers count, in codes the bits."""
    if (before in _WIDE and after in _WIDE) or {before, after} == _SAME_BITS:
        return True
    scale = "scale" in key.rpartition(".")[2]
    numbers = (before in _WIDE and after.startswith("float8")) or (before in ("int32", "int64") and after == "uint8")
    return not changed and ((scale and numbers) or before[:6] == after[:6] == "float8")


def _cast_effect(before: str, after: str) -> str:
    if {before, after} == _SAME_BITS:
        return "the bits stay what they are"
    if before in _WIDE and after in _WIDE:
        return "the values are rounded"
    if before in _WIDE:
        return "the numbers are cast to codes as they are, with no scale of their own"
    if before.startswith("float8") and after.startswith("float8"):
        return "the codes are cast to another format's"
    return "the codes are taken for numbers"
