"""Numbers of INT8, NVFP4, MXFP8 and MXFP4: tensors of the right name, shape and type that hold other ones."""

from __future__ import annotations

import torch

from corpus.edit import Edit, alter, both, put, scalar, swap, tensors, times, to
from corpus.edit_files import elsewhere
from corpus.mutants import fault
from corpus.mutants_groups import GLOBAL, WHOLE, as_bytes, first_row
from corpus.places import DOWN, GATE, OUT, UP, K, Q, V


def nibbles(t: torch.Tensor) -> torch.Tensor:
    """The two codes of each byte in the other order."""
    return (t >> 4) | (t << 4)


def reciprocal(t: torch.Tensor) -> torch.Tensor:
    return 1 / t


def whole_times(factor: float, *modules: str, part: str = WHOLE) -> Edit:
    """The scale of the whole tensor grows by a power of two, those of the groups shrink by it: each module stays what it is."""

    def apply(stored: dict[str, torch.Tensor]) -> None:
        for module in modules:
            stored[module + part] = stored[module + part] * factor
            scale = stored[f"{module}.weight_scale"]
            stored[f"{module}.weight_scale"] = (scale.float() * (factor if part == GLOBAL else 1 / factor)).to(scale.dtype)

    return tensors(apply)


MUTANTS = (
    *fault(
        "reciprocal of a scale",
        bad={
            "vl-nvfp4 vl-w4a16": {"all": alter(reciprocal, f"*{WHOLE}")},
            "vl-ct-nvfp4 vl-ct-nvfp4a16": {"all": alter(reciprocal, f"*{GLOBAL}")},
            "vl-ct-mixed": {"down": alter(reciprocal, f"{DOWN}{GLOBAL}")},
        },
        near={"vl-nvfp4": {"of the reciprocal": alter(lambda t: reciprocal(reciprocal(t)), f"*{WHOLE}", "*.input_scale")}},
    ),
    *fault(
        "reciprocal of an activation's scale",
        bad={
            "our-nvfp4": {"all": alter(reciprocal, "*.input_scale")},
            "our-ct-nvfp4": {"all": alter(reciprocal, "*.input_global_scale"), "o": alter(reciprocal, f"{OUT}.input_global_scale")},
        },
        near={"vl-ct-nvfp4": {"of the reciprocal": alter(lambda t: reciprocal(reciprocal(t)), "*.input_global_scale")}},
        needs="record",
    ),
    *fault(
        "amax in place of a weight's scale",
        bad={
            "vl-nvfp4 vl-w4a16": {"all": alter(times(2688), f"*{WHOLE}")},
            "vl-ct-nvfp4": {"all": alter(lambda t: 2688 / t, f"*{GLOBAL}")},
            "vl-ct-int8": {"all": alter(times(127), "*.weight_scale")},
        },
        near={"vl-nvfp4": {"the same, in F64": alter(to(torch.float64), f"*{WHOLE}")}},
        needs="source",
    ),
    *fault(
        "amax in place of an activation's scale",
        bad={
            "our-nvfp4": {"input": alter(times(2688), "*.input_scale")},
            "our-ct-nvfp4": {"input": alter(lambda t: 2688 / t, "*.input_global_scale")},
        },
        near={"vl-nvfp4": {"input in F64": alter(to(torch.float64), "*.input_scale")}},
        needs="record",
    ),
    *fault(
        "scales of a linear under each other's names",
        bad={
            "vl-nvfp4": {
                "of groups and whole": swap("weight_scale", "weight_scale_2", f"{OUT}.weight_scale"),
                "of weight and input": swap("weight_scale_2", "input_scale", f"{OUT}{WHOLE}"),
            },
            "vl-ct-nvfp4": {"of weight and input": swap("weight_", "input_", f"{OUT}{GLOBAL}")},
        },
        near={"vl-nvfp4": {"twice": both(*[swap("weight_scale_2", "input_scale", f"{OUT}{WHOLE}")] * 2)}},
        needs="source",
    ),
    *fault(
        "scales of the whole tensor that differ in a fused linear",
        bad={
            "vl-nvfp4 vl-w4a16": {
                "q's, its groups' halved": whole_times(2, Q),
                "all but v's, their groups' halved": whole_times(2, Q, K),
            },
            "vl-ct-nvfp4 vl-ct-nvfp4a16": {"gate's, its groups' halved": whole_times(0.5, GATE, part=GLOBAL)},
        },
        near={
            "vl-nvfp4 vl-w4a16": {"of all three": whole_times(2, Q, K, V), "of one that stands alone": whole_times(2, OUT)},
            "vl-ct-nvfp4": {"of both": whole_times(0.5, GATE, UP, part=GLOBAL)},
        },
    ),
    *fault(
        "activation's scale of another size",
        bad={
            "our-nvfp4": {"input of down, halved": alter(times(0.5), f"{DOWN}.input_scale")},
            "our-ct-nvfp4": {"input of a shard, tenfold": alter(times(10), f"{Q}.input_global_scale")},
            "our-mixed": {"input of o, doubled": alter(times(2), f"{OUT}.input_scale")},
        },
        near={
            "vl-nvfp4": {"input of one shard, smaller than the others'": alter(times(0.5), f"{Q}.input_scale")},
            "vl-ct-nvfp4": {"input of one shard, smaller than the others'": alter(times(0.5), f"{Q}.input_global_scale")},
        },
        needs="record",
    ),
    *fault(
        "weight's scale of another size",
        bad={
            "vl-nvfp4": {"doubled": alter(times(2), f"{OUT}{WHOLE}")},
            "vl-ct-nvfp4": {"doubled": alter(times(2), f"{DOWN}{GLOBAL}")},
            "vl-mxfp8 vl-ct-mxfp4": {"exponents, one more": alter(lambda t: t + 1, f"{OUT}.weight_scale")},
            "vl-ct-int8": {"a row's, doubled": alter(lambda t: torch.cat([t[:1] * 2, t[1:]]), f"{OUT}.weight_scale")},
        },
        near={"vl-ct-int8": {"a hundredth of a percent more": alter(lambda t: t.float() * 1.0001, f"{OUT}.weight_scale")}},
        needs="source",
    ),
    *fault(
        "scale zero",
        bad={
            "vl-nvfp4": {"the whole tensor's": alter(scalar(0), f"{OUT}{WHOLE}"), "input": alter(scalar(0), f"{DOWN}.input_scale")},
            "vl-ct-nvfp4": {"the whole tensor's": alter(scalar(0), f"{OUT}{GLOBAL}")},
            "vl-nvfp4 vl-ct-int8": {
                "a row": alter(lambda t: torch.cat([(t[:1].float() * 0).to(t.dtype), t[1:]]), f"{OUT}.weight_scale")
            },
        },
        near={"vl-nvfp4": {"a bias of zeros where there is none": put({f"{DOWN}.bias": torch.zeros(256).bfloat16()})}},
    ),
    *fault(
        "scale not finite",
        bad={
            "vl-nvfp4 vl-ct-nvfp4": {"a row of groups NaN": alter(first_row(0x7F), f"{OUT}.weight_scale")},
            "vl-nvfp4": {"the whole tensor's NaN": alter(times(float("nan")), f"{Q}{WHOLE}")},
            "vl-ct-nvfp4": {"input infinite": alter(times(float("inf")), f"{DOWN}.input_global_scale")},
            "vl-mxfp8 vl-ct-mxfp4": {"a row of exponents 255": alter(first_row(255), f"{OUT}.weight_scale")},
            "vl-ct-int8": {"NaN": alter(times(float("nan")), f"{OUT}.weight_scale")},
        },
        near={"vl-mxfp8": {"in a file of its own": elsewhere(f"{OUT}.weight_scale")}},
    ),
    *fault(
        "scale negative",
        bad={
            "vl-nvfp4": {
                "the whole tensor's": alter(times(-1), f"{OUT}{WHOLE}"),
                "groups'": alter(times(-1), f"{OUT}.weight_scale"),
            },
            "vl-ct-int8": {"all rows": alter(times(-1), f"{DOWN}.weight_scale")},
        },
        near={},
    ),
    *fault(
        "codes of two in a byte traded",
        bad={
            "vl-nvfp4 vl-w4a16": {"o": alter(nibbles, f"{OUT}.weight"), "all": alter(nibbles, "*layers.*_proj.weight")},
            "vl-ct-nvfp4 vl-ct-mxfp4": {"all": alter(nibbles, "*.weight_packed")},
        },
        near={"vl-nvfp4": {"twice": alter(lambda t: nibbles(nibbles(t)), "*layers.*_proj.weight")}},
        needs="source",
    ),
    *fault(
        "rows of scales in another order",
        bad={
            "vl-nvfp4 vl-mxfp8 vl-ct-mxfp4": {"reversed": alter(as_bytes(lambda t: t.flip(0)), f"{OUT}.weight_scale")},
            "vl-ct-nvfp4": {
                "in tiles of 128 x 4, as a kernel wants them": alter(
                    as_bytes(lambda t: t.reshape(2, 4, 32, -1, 4).permute(0, 3, 2, 1, 4).reshape(t.shape)), f"{OUT}.weight_scale"
                )
            },
        },
        near={"vl-mxfp8": {"reversed twice": alter(as_bytes(lambda t: t.flip(0).flip(0)), f"{OUT}.weight_scale")}},
        needs="source",
    ),
    *fault(
        "codes and values changed",
        bad={
            "vl-nvfp4 vl-w4a16": {"a code": alter(first_row(0x77), f"{OUT}.weight")},
            "vl-ct-mxfp4": {"a row": alter(first_row(0x77), f"{OUT}.weight_packed")},
            "vl-ct-int8": {"a row": alter(first_row(0x40), f"{OUT}.weight")},
        },
        near={"vl-ct-int8": {"rewritten": alter(lambda t: t.clone(), "*")}},
        needs="source",
    ),
)
