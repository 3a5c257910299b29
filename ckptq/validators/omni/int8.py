"""Int8's scales of fused linears, which the server takes for something else than they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ckptq.checkpoint import Component, Reader
from ckptq.validators import Code, Finding, error
from ckptq.validators.formats import Format
from ckptq.validators.omni.built import Built, Linear
from ckptq.validators.omni.server import OMNI
from ckptq.validators.scales import read_scales

CODES = {
    "values.omni-int8-rows": Code(
        "rows of a fused Int8 linear with scales of their own, of which the server takes the first few for whole shards",
        f"{OMNI} quantization/int8_config.py Int8LinearMethod; vLLM 0.32.0 model_executor/kernels/linear/scaled_mm/cutlass.py "
        "process_weights_after_loading",
    ),
}


def check(root: Path, component: Component, at: Built) -> Iterator[Finding]:
    """Findings on the scales of fused linears: a kernel that is told of scales for shards finds one for each row."""
    with Reader(root, component) as reader:
        fused = [x for x in at.linears if len(x.shards) > 1 and isinstance(at.treatment[x.prefix], Format)]
        for linear in fused if at.section.method == "int8" else ():
            if _differ(linear, component, at, reader):
                yield error(
                    "values.omni-int8-rows", f"{linear.prefix}.weight_scale",
                    "one scale for all rows of a fused linear, in each row", "several",
                    "on CUDA every row of shard i is multiplied with the scale in row i of the fused linear, silently: the images "
                    "are noise. NPUs take each row's own",
                    "encode the fused linear again under its largest amax, as `ckptq convert` does",
                )  # fmt: skip


def _differ(linear: Linear, component: Component, at: Built, reader: Reader) -> bool:
    found: set[float] = set()
    for names in at.units(linear):
        spec = at.find(names, "weight_scale")
        values = read_scales(reader, component.tensors[spec.name]) if spec is not None else None
        found |= {float(values.min()), float(values.max())} if values is not None else set()
    return len(found) > 1
