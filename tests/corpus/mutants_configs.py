"""What config.json and hf_quant_config.json say, other than the exclude list."""

from __future__ import annotations

from typing import Any

import torch

from corpus.edit import both, drop, edit_json, put
from corpus.edit_files import config, other, remove, section, setting
from corpus.mutants import fault
from corpus.places import KV

OTHER = "hf_quant_config.json"


def alone(change: Any) -> Any:
    """Edits the whole of hf_quant_config.json, on the export that has no section in config.json."""
    return lambda folder: edit_json(folder / OTHER, change)


NO_SECTION = config(lambda c: c.pop("quantization_config"))
KEYS = [f"model.layers.{n}.self_attn.k_scale" for n in (0, 1)]
FP8_SCHEME = {"dynamic": False, "num_bits": 8, "type": "float"}

MODELOPT = (
    *fault(
        "no quantization settings",
        bad={
            "vl-modelopt": {
                "neither file": both(NO_SECTION, remove(OTHER)),
                "empty section": config(lambda c: c.update(quantization_config={})),
            },
            "vl-pcpt": {"neither file": both(NO_SECTION, remove(OTHER))},
            "vl-ct-dynamic vl-fp8-block moe-ct": {"config.json": NO_SECTION},
        },
        near={
            "vl-modelopt vl-pcpt": {"config.json alone": remove(OTHER), "hf_quant_config.json alone": NO_SECTION},
            "moe-modelopt": {"config.json alone": remove(OTHER)},
        },
    ),
    *fault(
        "quant_method",
        bad={
            "vl-modelopt": {"absent": setting(quant_method=None), "unknown": setting(quant_method="fp8_static")},
            "vl-ct-dynamic vl-fp8-static": {"absent": setting(quant_method=None)},
        },
        near={"vl-modelopt": {"in capitals": setting(quant_method="MODELOPT")}},
    ),
    *fault(
        "another method's name",
        bad={
            "vl-modelopt": {
                "fp8": setting(quant_method="fp8", activation_scheme="static"),
                "compressed-tensors": setting(quant_method="compressed-tensors"),
            },
            "vl-fp8-static": {
                "modelopt": setting(quant_method="modelopt", quant_algo="FP8", ignore=["lm_head", "visual.blocks.0*"])
            },
            "vl-ct-block": {"fp8": setting(quant_method="fp8", activation_scheme="dynamic", weight_block_size=[128, 128])},
        },
        near={
            "vl-fp8-static": {
                "modelopt, and its list": setting(quant_method="modelopt", quant_algo="FP8", ignore=["lm_head", "visual*"])
            },
            "vl-modelopt": {"of its own for another format": setting(quant_method="modelopt_fp4")},
            "vl-ct-dynamic": {"with an underscore": setting(quant_method="compressed_tensors")},
        },
    ),
    *fault(
        "quant_algo",
        bad={
            "vl-modelopt": {
                "absent": setting(quant_algo=None),
                "unknown": setting(quant_algo="FP8_STATIC"),
                "a number": setting(quant_algo=8),
            },
            "vl-one-config": {"unknown": other(lambda q: q.update(quant_algo="INT8"))},
        },
        near={
            "vl-modelopt": {"in small letters": setting(quant_algo="fp8")},
            "vl-pb-wo": {"in capitals": setting(quant_algo="FP8_PB_WO")},
        },
    ),
    *fault(
        "quant_algo of another format",
        bad={
            "vl-modelopt": {
                name: setting(quant_algo=name) for name in ("FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "MXFP8")
            },
            "vl-pcpt": {"FP8": setting(quant_algo="FP8")},
            "vl-pb-wo": {"FP8": setting(quant_algo="FP8"), "per channel": setting(quant_algo="FP8_PER_CHANNEL_PER_TOKEN")},
        },
        near={"vl-modelopt": {"in the file that does not count": other(lambda q: q.update(quant_algo="NVFP4", group_size=16))}},
    ),
    *fault(
        "kv scheme",
        bad={
            "vl-modelopt": {
                "int8": setting(kv_cache_scheme={**FP8_SCHEME, "type": "int"}),
                "4 bits": setting(kv_cache_scheme={**FP8_SCHEME, "num_bits": 4}),
                "dynamic": setting(kv_cache_scheme={**FP8_SCHEME, "dynamic": True}),
                "bits alone": setting(kv_cache_scheme={"num_bits": 8}),
                "absent": setting(kv_cache_scheme=None),
            },
            "vl-ours vl-nested moe-modelopt": {"absent": setting(kv_cache_scheme=None)},
            "vl-one-config": {"absent": other(lambda q: q.update(kv_cache_quant_algo=None))},
            "vl-ct-kv": {
                "absent": setting(kv_cache_scheme=None),
                "int": section(lambda s: s["kv_cache_scheme"].update(type="int")),
                "16 bits": section(lambda s: s["kv_cache_scheme"].update(num_bits=16)),
                "asymmetric": section(lambda s: s["kv_cache_scheme"].update(symmetric=False)),
                "by channel": section(lambda s: s["kv_cache_scheme"].update(strategy="channel")),
            },
        },
        near={
            "vl-modelopt": {
                "with a key more": setting(kv_cache_scheme={**FP8_SCHEME, "note": "calibrated"}),
                "in the word of the other file": both(setting(kv_cache_scheme=None), setting(kv_cache_quant_algo="FP8")),
                "absent from the file that does not count": other(lambda q: q.update(kv_cache_quant_algo=None)),
            },
            "vl-fp8-static": {"scales for a cache that can't be declared": put(dict.fromkeys(KEYS, torch.tensor(0.01)))},
            "vl-no-kv": {"null": section(lambda s: s.update(kv_cache_scheme=None))},
        },
    ),
    *fault(
        "every kv scale missing",
        bad={
            "vl-no-kv": {"declared where none was calibrated": setting(kv_cache_scheme=FP8_SCHEME)},
            "vl-ct-kv": {"dropped": drop(*KV)},
        },
        near={"vl-no-kv": {"in the file that does not count": other(lambda q: q.update(kv_cache_quant_algo="FP8"))}},
    ),
    *fault(
        "config.json is wrong where hf_quant_config.json is right",
        bad={
            "vl-modelopt": {
                "excludes": setting(ignore=["lm_head"]),
                "format": setting(quant_algo="FP8_PB_WO", kv_cache_scheme=None),
            },
            "vl-ours": {"excludes": setting(ignore=[])},
        },
        near={
            "vl-modelopt": {
                "the other way about": other(lambda q: q.update(exclude_modules=[], quant_algo="NVFP4")),
                "an empty file": lambda folder: edit_json(folder / OTHER, lambda data: data.clear()),
            }
        },
    ),
    *fault(
        "hf_quant_config.json alone",
        bad={
            "vl-one-config": {
                "without a producer": alone(lambda c: c.pop("producer")),
                "of another producer": alone(lambda c: c.update(producer={"name": "ours"})),
                "MXFP8": other(lambda q: q.update(quant_algo="MXFP8")),
                "without excludes": other(lambda q: q.pop("exclude_modules")),
            }
        },
        near={"vl-one-config": {"of a later version": alone(lambda c: c["producer"].update(version="9.9"))}},
    ),
)

MUTANTS = MODELOPT
