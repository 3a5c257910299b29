"""What native fp8 and compressed-tensors say of formats in config.json."""

from __future__ import annotations

from typing import Any

from corpus.edit import both
from corpus.edit_files import groups, section, setting
from corpus.mutants import fault


def weights(**values: Any) -> Any:
    return groups(lambda g: g["weights"].update(values))


MUTANTS = (
    *fault(
        "activation scheme",
        bad={
            "vl-fp8-static": {
                "absent": setting(activation_scheme=None),
                "dynamic": setting(activation_scheme="dynamic"),
                "token": setting(activation_scheme="token"),
            },
            "vl-fp8-dynamic": {"static": setting(activation_scheme="static")},
            "vl-fp8-block": {"static": setting(activation_scheme="static")},
        },
        near={"vl-fp8-dynamic": {"a key that nobody reads": setting(activation_dtype="fp8")}},
    ),
    *fault(
        "block size",
        bad={
            "vl-fp8-block": {
                "absent": setting(weight_block_size=None),
                "64 x 64": setting(weight_block_size=[64, 64]),
                "256 x 128": setting(weight_block_size=[256, 128]),
                "one number": setting(weight_block_size=128),
                "three": setting(weight_block_size=[1, 128, 128]),
            },
            "vl-ct-block": {"64 x 64": weights(block_structure=[64, 64]), "absent": weights(block_structure=None)},
        },
        near={"vl-fp8-block": {"with a type": setting(fmt="e4m3", scale_fmt="float")}},
    ),
    *fault(
        "strategy",
        bad={
            "vl-ct-dynamic": {
                "tensor": weights(strategy="tensor"),
                "block": weights(strategy="block", block_structure=[128, 128]),
                "group": weights(strategy="group", group_size=128),
            },
            "vl-ct-static": {"channel": weights(strategy="channel")},
            "vl-ct-block": {"channel": weights(strategy="channel"), "tensor": weights(strategy="tensor")},
        },
        near={"vl-ct-dynamic": {"with an observer": weights(observer="minmax")}},
    ),
    *fault(
        "what is said of activations",
        bad={
            "vl-ct-dynamic": {"static": groups(lambda g: g["input_activations"].update(dynamic=False, strategy="tensor"))},
            "vl-ct-static": {
                "dynamic": groups(lambda g: g["input_activations"].update(dynamic=True, strategy="token")),
                "nothing": groups(lambda g: g.update(input_activations=None)),
            },
        },
        near={"vl-ct-static": {"nothing of outputs": groups(lambda g: g.pop("output_activations", None))}},
    ),
    *fault(
        "number type",
        bad={
            "vl-ct-static vl-ct-dynamic": {
                "int": weights(type="int"),
                "asymmetric": weights(symmetric=False),
            },
            "vl-ct-dynamic": {"dynamic": weights(dynamic=True)},
        },
        near={"vl-ct-static": {"a dtype of scales": weights(scale_dtype="torch.bfloat16")}},
    ),
    *fault(
        "compression format",
        bad={
            "vl-ct-static vl-ct-dynamic": {
                "packed": both(setting(format="pack-quantized"), groups(lambda g: g.update(format="pack-quantized"))),
                "absent": both(section(lambda s: s.pop("format")), groups(lambda g: g.pop("format"))),
            }
        },
        near={
            "vl-ct-static": {
                "the naive one": both(setting(format="naive-quantized"), groups(lambda g: g.update(format="naive-quantized")))
            }
        },
    ),
    *fault(
        "targets",
        bad={
            "vl-ct-dynamic": {
                "none": groups(lambda g: g.update(targets=[])),
                "a class that is not there": groups(lambda g: g.update(targets=["Conv2d"])),
                "attention alone": groups(lambda g: g.update(targets=["re:.*self_attn.*"])),
                "no groups": setting(config_groups={}),
            }
        },
        near={"vl-ct-dynamic": {"by expression": groups(lambda g: g.update(targets=["re:.*_proj$"]))}},
    ),
)
