"""Mixture-of-experts: routers, experts, and what vLLM does with their scales."""

from __future__ import annotations

import math

import torch

from corpus.edit import alter, both, dequantized, drop, put, rename, scalar, swap, times, to
from corpus.edit_files import config, elsewhere, ignoring
from corpus.mutants import fault
from corpus.places import E0, L0, L1, OUT

ROUTER = f"{L0}mlp.gate"
EXPERTS = f"{L0}mlp.experts."
SCALE = torch.tensor(0.01)


def experts(count: int) -> object:
    """config.json's number of experts, under either of its names."""
    return config(lambda c: c.update({key: count for key in ("num_experts", "num_local_experts") if key in c}))


MUTANTS = (
    *fault(
        "expert's tensor missing",
        bad={
            "moe-modelopt": {
                "down": drop(f"{E0}down_proj.weight"),
                "up": drop(f"{E0}up_proj.weight"),
                "an expert": drop(f"{E0}*"),
                "the router": drop(f"{ROUTER}.weight"),
                "norm of the keys": drop(f"{L0}self_attn.k_norm.weight"),
            },
            "moe-ct moe-fp8-block": {"gate": drop(f"{E0}gate_proj.weight")},
        },
        near={"moe-modelopt": {"an expert in a file of its own": elsewhere(f"{E0}*")}},
    ),
    *fault(
        "expert's weight_scale missing",
        bad={
            "moe-modelopt": {
                "down": drop(f"{E0}down_proj.weight_scale"),
                "gate": drop(f"{E0}gate_proj.weight_scale"),
                "gate and up": drop(f"{E0}gate_proj.weight_scale", f"{E0}up_proj.weight_scale"),
                "all": drop(f"{EXPERTS}*.weight_scale"),
            },
            "moe-ct": {"up": drop(f"{E0}up_proj.weight_scale")},
            "moe-fp8-block": {"down": drop(f"{E0}down_proj.weight_scale_inv")},
        },
        near={"moe-modelopt": {"in a file of its own": elsewhere(f"{EXPERTS}*.weight_scale")}},
    ),
    *fault(
        "expert's input_scale missing",
        bad={
            "moe-modelopt": {
                "down": drop(f"{E0}down_proj.input_scale"),
                "gate and up": drop(f"{E0}gate_proj.input_scale", f"{E0}up_proj.input_scale"),
                "an expert that no sample reached": drop(f"{E0}*.input_scale"),
                "all": drop(f"{EXPERTS}*.input_scale"),
            }
        },
        near={"moe-modelopt": {"in a file of its own": elsewhere(f"{EXPERTS}*.input_scale")}},
    ),
    *fault(
        "expert's scale of another value",
        bad={
            "moe-modelopt": {
                "weight, doubled": alter(times(2), f"{E0}down_proj.weight_scale"),
                "one of gate and up": alter(times(2), f"{E0}up_proj.weight_scale"),
                "two experts' traded": swap("experts.0", "experts.1", f"{E0}down_proj.weight_scale"),
            },
            "moe-ct": {"rows": alter(times(0.5), f"{E0}up_proj.weight_scale")},
            "moe-fp8-block": {"reciprocal": alter(lambda t: (1 / t.float()).to(t.dtype), f"{E0}down_proj.weight_scale_inv")},
        },
        near={"moe-modelopt": {"forth and back": both(*[swap("experts.0", "experts.1", f"{E0}down_proj.weight_scale")] * 2)}},
        needs="source",
    ),
    *fault(
        "expert's scale without sense",
        bad={
            "moe-modelopt": {
                "weight zero": alter(scalar(0), f"{E0}down_proj.weight_scale"),
                "weight NaN": alter(scalar(math.nan), f"{E0}up_proj.weight_scale"),
                "input infinite": alter(scalar(math.inf), f"{E0}down_proj.input_scale"),
                "input negative, of all": alter(times(-1), f"{EXPERTS}*.down_proj.input_scale"),
            },
            "moe-ct": {"a row NaN": alter(lambda t: torch.cat([t[:1] * math.nan, t[1:]]), f"{E0}down_proj.weight_scale")},
        },
        near={"moe-modelopt": {"in a list": alter(lambda t: t.reshape(1), f"{EXPERTS}*scale")}},
    ),
    *fault(
        "gate and up of other input scales",
        bad={
            "moe-modelopt": {
                "up's, loaded last, smaller in every expert": alter(times(0.25), f"{EXPERTS}*.up_proj.input_scale"),
            }
        },
        near={
            "moe-modelopt": {
                "gate's smaller": alter(times(0.5), f"{E0}gate_proj.input_scale"),
                "one expert's smaller": alter(times(0.5), f"{E0}gate_proj.input_scale", f"{E0}up_proj.input_scale"),
            }
        },
    ),
    *fault(
        "router not excluded",
        bad={
            "moe-modelopt": {
                "no entry": ignoring(lambda old: [e for e in old if "gate" not in e]),
                "of one layer": ignoring(lambda old: [e for e in old if "layers.1" not in e]),
                "re:": ignoring(lambda old: [*(e for e in old if "gate" not in e), "re:.*mlp.gate"]),
                "router": ignoring(lambda old: [*(e for e in old if "gate" not in e), "*router*"]),
            },
            "moe-ct": {"no entry": ignoring(lambda old: [e for e in old if "gate" not in e])},
            "moe-fp8-block": {"no entry": ignoring(lambda old: [e for e in old if "gate" not in e])},
        },
        near={
            "moe-modelopt": {
                name: ignoring(lambda old, name=name: [*(e for e in old if "gate" not in e), name])
                for name in ("mlp.gate", "*mlp.gate", "*mlp.gate*")
            },
            "moe-ct": {"re:.*gate$": ignoring(lambda old: [*(e for e in old if "gate" not in e), "re:.*gate$"])},
        },
    ),
    *fault(
        "experts excluded, yet quantized",
        bad={
            "moe-modelopt": {
                "*experts*": ignoring(lambda old: [*old, "*mlp.experts*"]),
                "a layer's": ignoring(lambda old: [*old, f"{L1}mlp.experts"]),
                "one expert": ignoring(lambda old: [*old, f"{E0}down_proj"]),
                "the whole MLP": ignoring(lambda old: [*old, f"{L0}mlp*"]),
            },
            "moe-ct": {"re:": ignoring(lambda old: [*old, "re:.*mlp.experts.*"])},
            "moe-fp8-block": {"a layer's": ignoring(lambda old: [*old, f"{L1}mlp.experts"])},
        },
        near={"moe-modelopt": {"those of a layer that is not there": ignoring(lambda old: [*old, "model.layers.9.mlp.experts*"])}},
    ),
    *fault(
        "expert in BF16",
        bad={
            "moe-modelopt": {
                "down, with scales": dequantized(f"{E0}down_proj.weight"),
                "an expert, without": both(dequantized(f"{E0}*.weight"), drop(f"{E0}*_scale")),
            },
            "moe-fp8-block": {"up, with scales": dequantized(f"{E0}up_proj.weight")},
        },
        near={"moe-modelopt": {"the router, in F32": alter(to(torch.float32), f"{ROUTER}.weight")}},
    ),
    *fault(
        "router in FP8",
        bad={
            "moe-modelopt": {
                "codes alone": alter(to(torch.float8_e4m3fn), f"{ROUTER}.weight"),
                "with scales": both(
                    alter(lambda t: (t.float() * 100).to(torch.float8_e4m3fn), f"{ROUTER}.weight"),
                    put({f"{ROUTER}.weight_scale": SCALE, f"{ROUTER}.input_scale": SCALE}),
                ),
            }
        },
        near={"moe-modelopt": {"in BF16 as before": alter(lambda t: t.clone(), f"{ROUTER}.weight")}},
    ),
    *fault(
        "module excluded, its scales dropped silently",
        bad={"moe-modelopt": {"o": ignoring(lambda old: [*old, OUT]), "a layer": ignoring(lambda old: [*old, "model.layers.1.*"])}},
        near={"moe-kept-o": {"BF16, and no scales": alter(lambda t: t.clone(), f"{L1}self_attn.o_proj.weight")}},
    ),
    *fault(
        "experts, of another number",
        bad={"moe-modelopt": {"more": experts(8), "fewer": experts(2)}, "moe-ct": {"more": experts(8)}},
        near={"moe-modelopt": {"a loss of training": config(lambda c: c.update(router_aux_loss_coef=0.5))}},
    ),
    *fault(
        "expert under another name",
        bad={
            "moe-modelopt": {
                "beyond the last": rename("experts.3.", "experts.7.", f"{EXPERTS}3.*"),
                "Mixtral's": rename("gate_proj", "w1", f"{EXPERTS}*"),
                "without experts": rename("mlp.experts.", "mlp.", f"{EXPERTS}*"),
                "router": rename("mlp.gate.", "mlp.router."),
            }
        },
        near={"moe-modelopt": {"one more bias": put({f"{ROUTER}.bias": torch.zeros(4)})}},
    ),
    *fault(
        "experts traded",
        bad={
            "moe-modelopt": {
                "two experts": swap("experts.0", "experts.1", f"{E0}*"),
                "gate and up": swap("gate_proj", "up_proj", f"{E0}gate_proj.weight"),
                "two layers' routers": swap("layers.0", "layers.1", f"{ROUTER}.weight"),
                "rows of the router": alter(lambda t: t.flip(0), f"{ROUTER}.weight"),
            },
            "moe-ct": {"two experts": swap("experts.0", "experts.1", f"{E0}down_proj.*")},
        },
        near={"moe-modelopt": {"forth and back": both(*[swap("experts.0", "experts.1", f"{E0}*")] * 2)}},
        needs="source",
    ),
    *fault(
        "expert of another shape",
        bad={
            "moe-modelopt": {
                "down transposed": alter(lambda t: t.t(), f"{E0}down_proj.weight"),
                "up too short": alter(lambda t: t[32:], f"{E0}up_proj.weight"),
                "scale a row": alter(lambda t: t.expand(256), f"{E0}down_proj.weight_scale"),
            },
            "moe-ct": {"scale flat": alter(lambda t: t.flatten(), f"{E0}down_proj.weight_scale")},
            "moe-fp8-block": {"scale flat": alter(lambda t: t.flatten(), f"{E0}down_proj.weight_scale_inv")},
        },
        near={"moe-modelopt": {"twice transposed": alter(lambda t: t.t().contiguous().t(), f"{E0}down_proj.weight")}},
    ),
)
