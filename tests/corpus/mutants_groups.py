"""Tensors of INT8 and of formats with a scale a group: NVFP4, with one for the whole tensor on top, MXFP8 and MXFP4."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from corpus import derived
from corpus.edit import Edit, alter, both, copy, drop, put, rename, restored, rows, shape, to
from corpus.edit_files import elsewhere
from corpus.mutants import fault
from corpus.places import DOWN, GATE, KV, L0, OUT, UP, K, Q, V

MODELOPT = "vl-nvfp4 vl-w4a16 vl-mxfp8"
COMPRESSED = "vl-ct-int8 vl-ct-nvfp4 vl-ct-nvfp4a16 vl-ct-mxfp8 vl-ct-mxfp4"
OURS = " ".join(name for name in derived.SHORT if name.startswith("our-") and name != "our-fp8-block")
WHOLE, GLOBAL = ".weight_scale_2", ".weight_global_scale"
QKV = f"{L0}self_attn.[qkv]_proj"
E8M0 = torch.float8_e8m0fnu


def as_bytes(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Of types that torch can't do much with."""
    return lambda t: change(t.view(torch.uint8)).view(t.dtype)


def unpacked(t: torch.Tensor) -> torch.Tensor:
    """A code a byte."""
    return torch.stack([t & 15, t >> 4], -1).reshape(t.shape[0], -1)


def as_powers(t: torch.Tensor) -> torch.Tensor:
    """U8 exponents as the numbers they mean."""
    return (t.float() - 127).exp2()


def first_row(value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The first row's bytes become `value`."""
    return as_bytes(lambda t: torch.cat([torch.full_like(t[:1], value), t[1:]]))


def as_source(base: str, *modules: str) -> Edit:
    return restored(lambda: _source(base), *modules)


def _source(base: str) -> Path:
    return derived.source(base)


MISSING = (
    *fault(
        "weight_scale missing",
        bad={
            f"{MODELOPT} {COMPRESSED} vl-mixed vl-ct-mixed": {"down": drop(f"{DOWN}.weight_scale")},
            "vl-nvfp4 vl-ct-nvfp4 vl-ct-int8 vl-mxfp8": {"q": drop(f"{Q}.weight_scale")},
            "vl-w4a16 vl-ct-mxfp4": {"k": drop(f"{K}.weight_scale")},
            "vl-mxfp8 vl-ct-nvfp4a16 vl-ct-mxfp8": {"v, the last shard": drop(f"{V}.weight_scale")},
        },
        near={
            f"{MODELOPT} {COMPRESSED} vl-mixed vl-ct-mixed {OURS}": {"in a file of its own": elsewhere("*.weight_scale")},
            "our-fp8-block": {"in a file of its own": elsewhere("*.weight_scale_inv")},
        },
    ),
    *fault(
        "scale of the whole tensor missing",
        bad={
            "vl-nvfp4 vl-w4a16": {
                "down": drop(f"{DOWN}{WHOLE}"),
                "q": drop(f"{Q}{WHOLE}"),
                "v, the last shard": drop(f"{V}{WHOLE}"),
                "all": drop(f"*{WHOLE}"),
            },
            "vl-ct-nvfp4 vl-ct-nvfp4a16": {
                "o": drop(f"{OUT}{GLOBAL}"),
                "k": drop(f"{K}{GLOBAL}"),
                "up, the last shard": drop(f"{UP}{GLOBAL}"),
            },
            "vl-mixed": {"gate": drop(f"{GATE}{WHOLE}")},
        },
        near={
            "vl-nvfp4": {"in a file of its own": elsewhere(f"*{WHOLE}")},
            "vl-ct-nvfp4": {"in a file of its own": elsewhere(f"*{GLOBAL}")},
        },
    ),
    *fault(
        "input_scale missing",
        bad={
            "vl-nvfp4": {
                "down": drop(f"{DOWN}.input_scale"),
                "of one shard": drop(f"{Q}.input_scale"),
                "of the last shard": drop(f"{V}.input_scale"),
                "all": drop("*.input_scale"),
            },
            "vl-ct-nvfp4": {
                "o": drop(f"{OUT}.input_global_scale"),
                "of one shard": drop(f"{GATE}.input_global_scale"),
                "all": drop("*.input_global_scale"),
            },
            "vl-mixed": {"o, in FP8": drop(f"{OUT}.input_scale"), "down, in NVFP4": drop(f"{DOWN}.input_scale")},
            "vl-ct-mixed": {"down": drop(f"{DOWN}.input_global_scale")},
        },
        near={
            "vl-mixed": {"of one shard, in FP8": drop(f"{Q}.input_scale")},
            "vl-w4a16": {"there, though nothing reads it": copy(f"{OUT}{WHOLE}", f"{OUT}.input_scale")},
        },
    ),
    *fault(
        "some kv scales missing",
        bad={
            "vl-nvfp4 vl-mixed": {"v of a layer": drop(f"{V}.v_scale"), "k of a layer": drop(f"{K}.k_scale")},
            "vl-ct-nvfp4": {"v of a layer": drop(f"{L0}self_attn.v_scale"), "a layer's": drop(f"{L0}self_attn.[kv]_scale")},
        },
        near={"vl-nvfp4 vl-mixed vl-ct-nvfp4 our-nvfp4 our-ct-mixed": {"in a file of its own": elsewhere(*KV)}},
    ),
    *fault(
        "every kv scale missing",
        bad={"vl-nvfp4 vl-mixed vl-ct-nvfp4": {"declared": drop(*KV)}},
        near={"vl-ct-nvfp4": {"in a file of its own": elsewhere("*.k_scale")}},
    ),
)

NAMES = (
    *fault(
        "scale under another name",
        bad={
            "vl-nvfp4": {
                "weight_global_scale": rename("weight_scale_2", "weight_global_scale"),
                "input_global_scale": rename("input_scale", "input_global_scale"),
                "weight_scale_inv": rename("weight_scale", "weight_scale_inv", "*.weight_scale"),
            },
            "vl-ct-nvfp4": {
                "weight_scale_2": rename("weight_global_scale", "weight_scale_2"),
                "input_scale": rename("input_global_scale", "input_scale"),
            },
            "vl-mxfp8 vl-ct-mxfp4 vl-ct-int8": {"weight_scale_inv": rename("weight_scale", "weight_scale_inv")},
        },
        near={"vl-mxfp8": {"and back": both(rename("weight_scale", "scale"), rename(".scale", ".weight_scale"))}},
    ),
    *fault(
        "packed weight under another name",
        bad={
            "vl-nvfp4 vl-w4a16": {"weight_packed": rename(".weight", ".weight_packed", "*layers.*_proj.weight")},
            "vl-ct-nvfp4 vl-ct-nvfp4a16 vl-ct-mxfp4 vl-ct-mixed": {"weight": rename("weight_packed", "weight")},
            "vl-ct-mxfp8 vl-ct-int8": {"weight_packed": rename(".weight", ".weight_packed", f"{OUT}.weight")},
        },
        near={"vl-ct-nvfp4": {"in a file of its own": elsewhere("*.weight_packed")}},
    ),
    *fault(
        "tensor that no module has",
        bad={
            "vl-mxfp8": {"a scale of the whole tensor": put({f"{OUT}{WHOLE}": torch.tensor(1.0)})},
            "vl-ct-nvfp4a16": {"a scale of activations": put({f"{OUT}.input_global_scale": torch.ones(1)})},
            "vl-ct-mxfp4": {"a global scale": put({f"{DOWN}{GLOBAL}": torch.ones(1)})},
            "vl-ct-int8": {"a zero point": put({f"{OUT}.weight_zero_point": torch.zeros(256, 1, dtype=torch.int8)})},
            "vl-ct-nvfp4": {"the unpacked shape": put({f"{OUT}.weight_shape": torch.tensor([256, 256])})},
        },
        near={"vl-nvfp4": {"a key's zero point": put({f"{L0}self_attn.k_zero_point": torch.tensor(0.0)})}},
    ),
)

SHAPES = (
    *fault(
        "scales of groups in another shape",
        bad={
            "vl-nvfp4 vl-ct-nvfp4 vl-ct-mxfp4": {
                "every other group": alter(as_bytes(lambda t: t[:, ::2].contiguous()), f"{OUT}.weight_scale"),
                "transposed": alter(as_bytes(lambda t: t.t().contiguous()), f"{DOWN}.weight_scale"),
            },
            "vl-w4a16 vl-mxfp8 vl-ct-mxfp8": {
                "a group short": alter(as_bytes(lambda t: t[:, 1:].contiguous()), f"{K}.weight_scale"),
                "flat": alter(lambda t: t.flatten(), f"{OUT}.weight_scale"),
            },
            "vl-ct-nvfp4a16": {"a row short": alter(as_bytes(lambda t: t[1:]), f"{OUT}.weight_scale")},
            "vl-mxfp8": {"three dimensions": alter(lambda t: t[..., None], f"{DOWN}.weight_scale")},
        },
        near={"vl-nvfp4": {"the same bytes": alter(as_bytes(lambda t: t.clone()), "*.weight_scale")}},
    ),
    *fault(
        "scales a row in another shape",
        bad={
            "vl-ct-int8": {
                "[N]": alter(lambda t: t.flatten(), "*.weight_scale"),
                "one": alter(lambda t: t[0], f"{OUT}.weight_scale"),
                "a row short": alter(lambda t: t[1:], f"{K}.weight_scale"),
            }
        },
        near={"vl-ct-int8": {"in F32": alter(to(torch.float32), "*.weight_scale")}},
    ),
    *fault(
        "scale of the whole tensor in another shape",
        bad={
            "vl-nvfp4 vl-w4a16": {"[1, 1]": alter(shape(1, 1), f"{OUT}{WHOLE}"), "[2]": alter(shape(2), f"{DOWN}{WHOLE}")},
            "vl-ct-nvfp4": {"[N, 1]": alter(shape(256, 1), f"{OUT}{GLOBAL}")},
        },
        near={
            "vl-nvfp4": {"in a list": alter(shape(1), f"*{WHOLE}", "*.input_scale")},
            "vl-ct-nvfp4": {"bare": alter(shape(), f"*{GLOBAL}", "*.input_global_scale")},
        },
    ),
    *fault(
        "packed weight of another width",
        bad={
            "vl-nvfp4 vl-w4a16": {
                "a code a byte": alter(unpacked, f"{OUT}.weight"),
                "without the last group": alter(lambda t: t[:, :-8].contiguous(), f"{DOWN}.weight"),
            },
            "vl-ct-nvfp4 vl-ct-mxfp4": {
                "a code a byte": alter(unpacked, f"{K}.weight_packed"),
                "without the last group": alter(lambda t: t[:, :-16].contiguous(), f"{DOWN}.weight_packed"),
            },
            "vl-mxfp8 vl-ct-int8": {
                "without the last columns": alter(as_bytes(lambda t: t[:, :-32].contiguous()), f"{OUT}.weight")
            },
        },
        near={"vl-nvfp4": {"packed again": alter(lambda t: unpacked(t)[:, ::2] | unpacked(t)[:, 1::2] << 4, f"{OUT}.weight")}},
    ),
    *fault(
        "weight of too many rows",
        bad={
            "vl-nvfp4": {"q": alter(rows(32), f"{Q}.weight", f"{Q}.weight_scale"), "o": alter(rows(32), f"{OUT}.weight")},
            "vl-ct-mxfp4": {"gate": alter(rows(32), f"{GATE}.weight_packed", f"{GATE}.weight_scale")},
            "vl-ct-int8": {"k": alter(lambda t: torch.cat([t[:32], t]), f"{K}.weight", f"{K}.weight_scale")},
        },
        near={"vl-ct-mxfp4": {"a file in another order": elsewhere(f"{Q}.weight_packed", f"{GATE}.weight_packed")}},
    ),
    *fault(
        "square weight transposed",
        bad={"vl-mxfp8 vl-ct-int8 our-ct-mxfp8 our-ct-int8": {"o": alter(as_bytes(lambda t: t.t().contiguous()), f"{OUT}.weight")}},
        near={"vl-ct-int8": {"twice": alter(lambda t: t.t().contiguous().t(), f"{OUT}.weight")}},
        needs="source",
    ),
)

TYPES = (
    *fault(
        "packed codes under another type",
        bad={
            "vl-nvfp4": {"F8": alter(lambda t: t.view(torch.float8_e4m3fn), f"{OUT}.weight")},
            "vl-ct-nvfp4 vl-ct-mxfp4": {"F8": alter(lambda t: t.view(torch.float8_e4m3fn), f"{DOWN}.weight_packed")},
            "vl-ct-nvfp4a16": {"I32, four bytes each": alter(lambda t: t.view(torch.int32), f"{OUT}.weight_packed")},
        },
        near={"vl-nvfp4": {"I8": alter(lambda t: t.view(torch.int8), f"{OUT}.weight")}},
    ),
    *fault(
        "codes under another type",
        bad={
            "vl-mxfp8 vl-ct-mxfp8": {"U8": alter(lambda t: t.view(torch.uint8), f"{OUT}.weight")},
            "vl-ct-int8": {
                "F8": alter(lambda t: t.float().to(torch.float8_e4m3fn), f"{OUT}.weight"),
                "F8 of the same bits": alter(lambda t: t.view(torch.float8_e4m3fn), f"{K}.weight"),
            },
        },
        near={"vl-ct-int8": {"U8 of the same bits": alter(lambda t: t.view(torch.uint8), f"{OUT}.weight")}},
    ),
    *fault(
        "scale of another type",
        bad={
            "vl-nvfp4 vl-ct-nvfp4": {"U8 of the same bits": alter(lambda t: t.view(torch.uint8), f"{OUT}.weight_scale")},
            "vl-mxfp8 vl-ct-mxfp8 vl-ct-mxfp4": {
                "F8_E8M0 of the same bits": alter(lambda t: t.view(E8M0), "*.weight_scale"),
                "F32 of what they mean": alter(as_powers, f"{OUT}.weight_scale"),
            },
            "vl-ct-mxfp4": {"F8_E4M3 of the same bits": alter(lambda t: t.view(torch.float8_e4m3fn), f"{K}.weight_scale")},
        },
        near={
            "vl-nvfp4 vl-ct-nvfp4a16": {"F32": alter(to(torch.float32), "*.weight_scale")},
            "vl-w4a16 vl-ct-nvfp4": {"BF16": alter(to(torch.bfloat16), f"{OUT}.weight_scale")},
            "vl-mxfp8": {"I8 of the same bits": alter(lambda t: t.view(torch.int8), "*.weight_scale")},
            "vl-ct-nvfp4": {"the whole tensor's in F64": alter(to(torch.float64), f"*{GLOBAL}")},
        },
    ),
    *fault(
        "weight of a quantized module in BF16",
        bad={
            "vl-nvfp4 vl-w4a16 vl-ct-nvfp4 vl-ct-mxfp4 vl-mixed": {"down": as_source("vl-nvfp4", DOWN)},
            "vl-mxfp8 vl-ct-mxfp8 vl-ct-int8": {"o": as_source("vl-mxfp8", OUT), "a shard": as_source("vl-mxfp8", UP)},
        },
        near={"vl-nvfp4": {"the norms, in F32": alter(to(torch.float32), "*norm.weight")}},
    ),
)

MUTANTS = (*MISSING, *NAMES, *SHAPES, *TYPES)
