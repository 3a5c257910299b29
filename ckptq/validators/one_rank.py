"""Blocks of scales that do not end where a shard of a fused linear does: one rank refuses them, and no number of ranks helps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ckptq.validators import Code, Finding, parallel
from ckptq.validators.expected import Expected
from ckptq.validators.formats import Format
from ckptq.validators.vllm_rules import ServerLinear

_UTILS = "vLLM 0.32.0 model_executor/layers/quantization/utils/fp8_utils.py"
CODES = {
    "layout.block-rows": Code(
        "a block of scales that would lie in two shards of a fused linear, or in q, k and v stored as one",
        f"{_UTILS} validate_fp8_block_shape; model_executor/parameter.py load_qkv_weight",
    ),
    "layout.expert-block": Code("an expert's intermediate size that is no whole blocks", f"{_UTILS} validate_fp8_block_shape_moe"),
}
_ALSO = {"parallel.block-rows": "layout.block-rows", "parallel.expert-block": "layout.expert-block"}


def check(at: Expected, config: Mapping[str, Any]) -> Iterator[Finding]:
    """What remains of `parallel.check` where nothing is shared out. Other shapes are layout.py's and linears.py's."""
    mend = "keep all that is built as one linear, or quantize it per tensor or per channel"
    for found in parallel.check(at.scope, config, built(at), shapes(at), 1, server=at.settings.server):
        if found.code in _ALSO:
            yield replace(found, code=_ALSO[found.code], expected=found.expected.replace(" and rank", ""), mend=mend)


def built(at: Expected) -> Iterator[tuple[ServerLinear, Format | None]]:
    """Every linear with its format, as `parallel.check` takes them."""
    return ((linear, at.format_of(linear.shards[0])) for linear in dict.fromkeys(at.linears.values()))


def shapes(at: Expected) -> dict[str, tuple[int, ...]]:
    return {module: shape for module in at.linears if (shape := at.weight_shape(module)) is not None}
