"""Routed experts in NVFP4: a scale a group, one for the whole tensor, one for the input, and what vLLM does with each."""

from __future__ import annotations

import math

import torch

from corpus import derived
from corpus.edit import Edit, Tensors, alter, both, copy, drop, matching, restored, scalar, swap, tensors, times, to
from corpus.edit_files import elsewhere, groups, ignoring, other, section, setting
from corpus.mutants import fault
from corpus.mutants_families import listing
from corpus.mutants_groups import as_bytes, unpacked
from corpus.places import E0, L0, L1

MODELOPT, COMPRESSED = "moe-nvfp4 moe-w4a16", "moe-ct-nvfp4 moe-ct-nvfp4a16"
OURS = "moe-nvfp4-ours omni-moe-nvfp4"
EXPERTS, T0 = f"{L0}mlp.experts.", "thinker.model.layers.0.mlp.experts."
WHOLE, GLOBAL = ".weight_scale_2", ".weight_global_scale"
INPUT, INPUTS = ".input_scale", ".input_global_scale"
LOCAL = {"dynamic": "local"}
NVFP4 = {"quant_algo": "NVFP4", "group_size": 16}
GATE, UP, DOWN = (f"{E0}{name}_proj" for name in ("gate", "up", "down"))


def encoded_again(*modules: str) -> Edit:
    """The same values under a scale of the whole tensor that is twice as large, and scales of groups half as large."""

    def apply(stored: Tensors) -> None:
        for name in matching(stored, *(f"{module}.weight_scale" for module in modules)):
            stored[name] = (stored[name].float() / 2).to(stored[name].dtype)
            if (whole := f"{name}_2") in stored:
                stored[whole] = stored[whole] * 2
            else:
                whole = f"{name.removesuffix('_scale')}_global_scale"
                stored[whole] = stored[whole] / 2

    return tensors(apply)


def algo(name: str) -> Edit:
    """For all that is quantized, in both files."""
    return both(setting(quant_algo=name), other(lambda s: s.update(quant_algo=name)))


def popped(*parts: str, but: str = "nothing") -> Edit:
    """Off the list of what is quantized: names that hold such a part, but this one."""
    return listing(lambda each: [each.pop(n) for n in [*each] if any(p in n for p in parts) and but not in n])


MISSING = (
    *fault(
        "expert's weight_scale missing",
        bad={
            "moe-nvfp4": {
                "down": drop(f"{DOWN}.weight_scale"),
                "gate": drop(f"{GATE}.weight_scale"),
                "all": drop(f"{EXPERTS}*.weight_scale"),
            },
            "moe-w4a16 moe-ct-nvfp4": {"up": drop(f"{UP}.weight_scale")},
            "moe-ct-nvfp4a16": {"down": drop(f"{DOWN}.weight_scale")},
            "omni-moe-nvfp4": {"up": drop(f"{T0}1.up_proj.weight_scale")},
        },
        near={
            f"{MODELOPT} {COMPRESSED} moe-nvfp4-ours omni-moe-nvfp4": {"in a file of its own": elsewhere("*experts*.weight_scale")}
        },
    ),
    *fault(
        "expert's scale of the whole tensor missing",
        bad={
            MODELOPT: {"down": drop(f"{DOWN}{WHOLE}"), "gate": drop(f"{GATE}{WHOLE}")},
            "moe-nvfp4": {"gate and up": drop(f"{GATE}{WHOLE}", f"{UP}{WHOLE}"), "all": drop(f"{EXPERTS}*{WHOLE}")},
            COMPRESSED: {"down": drop(f"{DOWN}{GLOBAL}"), "gate": drop(f"{GATE}{GLOBAL}")},
            "omni-moe-nvfp4": {"gate": drop(f"{T0}1.gate_proj{WHOLE}")},
        },
        near={
            MODELOPT: {
                "in a file of its own": elsewhere(f"{EXPERTS}*{WHOLE}"),
                "up, where gate's counts": drop(f"{UP}{WHOLE}"),
            },
            COMPRESSED: {"in a file of its own": elsewhere(f"*{GLOBAL}"), "up, where gate's counts": drop(f"{UP}{GLOBAL}")},
        },
    ),
    *fault(
        "expert's input_scale missing",
        bad={
            "moe-nvfp4": {
                "down": drop(f"{DOWN}{INPUT}"),
                "gate": drop(f"{GATE}{INPUT}"),
                "up": drop(f"{UP}{INPUT}"),
                "an expert that no sample reached": drop(f"{E0}*{INPUT}"),
                "all": drop(f"{EXPERTS}*{INPUT}"),
            },
            "moe-ct-nvfp4": {"down": drop(f"{DOWN}{INPUTS}"), "up": drop(f"{UP}{INPUTS}")},
            "omni-moe-nvfp4": {"an expert's": drop(f"{T0}1.*{INPUT}")},
        },
        near={
            "moe-nvfp4 omni-moe-nvfp4": {"in a file of its own": elsewhere(f"*experts*{INPUT}")},
            "moe-w4a16": {"there, though nothing reads it": copy(f"{DOWN}{WHOLE}", f"{DOWN}{INPUT}")},
            "moe-ct-nvfp4a16": {"there, though nothing reads it": copy(f"{DOWN}{GLOBAL}", f"{DOWN}{INPUTS}")},
        },
    ),
)

VALUES = (
    *fault(
        "gate and up of other scales of the whole tensor",
        bad={f"{MODELOPT} {COMPRESSED}": {"up": encoded_again(UP), "gate of every expert": encoded_again(f"{EXPERTS}*.gate_proj")}},
        near={f"{MODELOPT} {COMPRESSED}": {"both": encoded_again(GATE, UP), "down": encoded_again(DOWN)}},
    ),
    *fault(
        "gate and up of other input scales",
        bad={},
        near={
            "moe-nvfp4": {"up's, loaded last, smaller in every expert": alter(times(0.5), f"{EXPERTS}*.up_proj{INPUT}")},
            "moe-ct-nvfp4": {"up's, loaded last, smaller in every expert": alter(times(2), f"{EXPERTS}*.up_proj{INPUTS}")},
        },
    ),
    *fault(
        "expert's scale of another value",
        bad={
            "moe-nvfp4": {
                "whole tensor, doubled": alter(times(2), f"{DOWN}{WHOLE}"),
                "groups, halved": alter(times(0.5), f"{DOWN}.weight_scale"),
                "two experts' traded": swap("experts.0", "experts.1", f"{DOWN}{WHOLE}"),
            },
            "moe-ct-nvfp4a16": {"whole tensor, halved": alter(times(0.5), f"{DOWN}{GLOBAL}")},
        },
        near={"moe-nvfp4": {"forth and back": both(*[swap("experts.0", "experts.1", f"{DOWN}{WHOLE}")] * 2)}},
        needs="source",
    ),
    *fault(
        "expert's scale without sense",
        bad={
            "moe-nvfp4": {
                "whole tensor, zero": alter(scalar(0), f"{DOWN}{WHOLE}"),
                "whole tensor, NaN": alter(scalar(math.nan), f"{GATE}{WHOLE}"),
                "whole tensor, its reciprocal": alter(lambda t: 1 / t, f"{DOWN}{WHOLE}"),
                "a group, NaN": alter(as_bytes(lambda t: torch.cat([torch.full_like(t[:1], 0x7F), t[1:]])), f"{UP}.weight_scale"),
                "input, infinite": alter(scalar(math.inf), f"{DOWN}{INPUT}"),
                "input, negative, of all": alter(times(-1), f"{EXPERTS}*.down_proj{INPUT}"),
            },
            "moe-ct-nvfp4": {"whole tensor, as ModelOpt has it": alter(lambda t: 1 / t, f"{DOWN}{GLOBAL}")},
        },
        near={"moe-nvfp4": {"in a list": alter(lambda t: t.reshape(1), f"{EXPERTS}*{WHOLE}", f"{EXPERTS}*{INPUT}")}},
    ),
    *fault(
        "scales of a linear under each other's names",
        bad={
            "moe-nvfp4": {
                "of groups and of the tensor": swap(".weight_scale", WHOLE, f"{DOWN}.weight_scale"),
                "of the tensor and of the input": swap(WHOLE, INPUT, f"{DOWN}{WHOLE}"),
            }
        },
        near={"moe-nvfp4": {"forth and back": both(*[swap(WHOLE, INPUT, f"{DOWN}{WHOLE}")] * 2)}},
        needs="source",
    ),
    *fault(
        "experts traded",
        bad={
            "moe-nvfp4": {
                "two experts": swap("experts.0", "experts.1", f"{E0}*"),
                "gate and up": swap("gate_proj", "up_proj", f"{GATE}.weight", f"{GATE}.weight_scale"),
            },
            "moe-ct-nvfp4": {"two experts": swap("experts.0", "experts.1", f"{DOWN}.weight_packed")},
        },
        near={"moe-nvfp4": {"forth and back": both(*[swap("experts.0", "experts.1", f"{E0}*")] * 2)}},
        needs="source",
    ),
)

SHAPES = (
    *fault(
        "expert of another shape",
        bad={
            "moe-nvfp4": {
                "down transposed": alter(lambda t: t.t(), f"{DOWN}.weight"),
                "up too short": alter(lambda t: t[32:], f"{UP}.weight"),
                "a code a byte": alter(unpacked, f"{UP}.weight"),
                "scales of half the rows": alter(as_bytes(lambda t: t[: len(t) // 2]), f"{UP}.weight_scale"),
                "scales of half the groups": alter(as_bytes(lambda t: t[:, ::2]), f"{DOWN}.weight_scale"),
                "one scale for all groups": alter(as_bytes(lambda t: t[0, 0]), f"{DOWN}.weight_scale"),
                "a scale of the tensor for each row": alter(lambda t: t.expand(256), f"{DOWN}{WHOLE}"),
            },
            "moe-ct-nvfp4": {"scales flat": alter(as_bytes(lambda t: t.flatten()), f"{DOWN}.weight_scale")},
        },
        near={"moe-nvfp4": {"twice transposed": alter(lambda t: t.t().contiguous().t(), f"{DOWN}.weight")}},
    ),
    *fault(
        "packed codes under another type",
        bad={},
        near={
            MODELOPT: {"I8, an expert's": alter(lambda t: t.view(torch.int8), f"{E0}*.weight")},
            COMPRESSED: {"I8, an expert's": alter(lambda t: t.view(torch.int8), f"{E0}*.weight_packed")},
        },
    ),
    *fault(
        "expert in BF16",
        bad={
            base: {
                "down": restored(lambda base=base: derived.source(base), DOWN),
                "an expert": restored(lambda base=base: derived.source(base), f"{E0}*_proj"),
            }
            for base in ("moe-nvfp4", "moe-ct-nvfp4a16")
        },
        near={"moe-nvfp4": {"the router, in F32": alter(to(torch.float32), f"{L0}mlp.gate.weight")}},
    ),
)

CONFIGS = (
    *fault(
        "router not excluded",
        bad={
            "moe-nvfp4 moe-w4a16 moe-ct-nvfp4": {"no entry": ignoring(lambda old: [e for e in old if "gate" not in e])},
            "omni-moe-nvfp4": {
                "but listed": both(
                    ignoring(lambda old: [e for e in old if "gate" not in e]),
                    listing(lambda each: each.update({"thinker.model.layers.0.mlp.gate": NVFP4})),
                )
            },
        },
        near={
            "moe-nvfp4": {"mlp.gate": ignoring(lambda old: [*(e for e in old if "gate" not in e), "mlp.gate"])},
            "omni-moe-nvfp4": {"where what is quantized is listed": ignoring(lambda old: [e for e in old if "gate" not in e])},
        },
    ),
    *fault(
        "experts excluded, yet quantized",
        bad={
            "moe-nvfp4": {
                "*experts*": ignoring(lambda old: [*old, "*mlp.experts*"]),
                "one expert": ignoring(lambda old: [*old, DOWN]),
            },
            "moe-w4a16": {"a layer's": ignoring(lambda old: [*old, f"{L1}mlp.experts"])},
            "moe-ct-nvfp4": {"re:": ignoring(lambda old: [*old, "re:.*mlp.experts.*"])},
            "omni-moe-nvfp4": {"not listed": popped("layers.0.mlp.experts.")},
        },
        near={
            "moe-nvfp4": {"those of a layer that is not there": ignoring(lambda old: [*old, "model.layers.9.mlp.experts*"])},
            "omni-moe-nvfp4": {
                "but one of a layer is listed": popped("layers.0.mlp.experts.", but="experts.2.up_proj"),
                "listed as one": both(popped("layers.0.mlp.experts."), listing(lambda each: each.update({T0[:-1]: NVFP4}))),
            },
        },
    ),
    *fault(
        "quantized_layers",
        bad={
            "omni-moe-nvfp4": {
                "the first expert in FP8": listing(lambda each: each.update({f"{T0}0.down_proj": {"quant_algo": "FP8"}})),
                "experts of weights alone": listing(
                    lambda each: [v.update(quant_algo="W4A16_NVFP4") for n, v in each.items() if ".experts." in n]
                ),
            }
        },
        near={
            "omni-moe-nvfp4": {
                "a later expert in FP8": listing(lambda each: each.update({f"{T0}3.up_proj": {"quant_algo": "FP8"}})),
            }
        },
    ),
    *fault(
        "quant_algo of another format",
        bad={
            "moe-nvfp4": {"FP8": algo("FP8"), "weights alone": algo("W4A16_NVFP4")},
            "moe-w4a16": {"activations, too": algo("NVFP4")},
        },
        near={"moe-nvfp4": {"in small letters": algo("nvfp4")}},
    ),
    *fault(
        "config groups that say weights alone",
        bad={"moe-nvfp4": {"no activations": groups(lambda g: g.update(input_activations=None))}},
        near={"moe-nvfp4": {"no groups": section(lambda s: s.pop("config_groups"))}},
    ),
    *fault(
        "what is said of activations",
        bad={
            "moe-ct-nvfp4": {"nothing": groups(lambda g: g.update(input_activations=None))},
            "moe-ct-nvfp4a16": {
                "those of NVFP4": groups(lambda g: g.update(input_activations={**g["weights"], "dynamic": "local"}))
            },
        },
        near={"moe-ct-nvfp4a16": {"no key": groups(lambda g: g.pop("input_activations"))}},
    ),
)
MUTANTS = (*MISSING, *VALUES, *SHAPES, *CONFIGS)
