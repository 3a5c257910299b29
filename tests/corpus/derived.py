"""Further good exports, each an edit of one in corpus/bases.py: what exporters write for modules that stay as they were."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from corpus.bases import BASES, folder
from corpus.edit import Edit, both, drop, restored
from corpus.edit_files import config, ignoring, other, remove, section

SHORT: Mapping[str, str] = {
    "vl-modelopt": "vl-modelopt-fp8kv-peer",
    "vl-cast": "vl-modelopt-fp8cast-peer",
    "vl-ours": "vl-modelopt-fp8kv-ckptq",
    "vl-nested": "vl-modelopt-fp8kv-ckptq-nested",
    "vl-deep": "vl-modelopt-fp8kv-ckptq-deep",
    "vl-tied": "vl-modelopt-fp8kv-ckptq-tied",
    "vl-pcpt": "vl-modelopt-pcpt-peer",
    "vl-pb-wo": "vl-modelopt-pbwo-peer",
    "vl-modelopt-tied": "vl-modelopt-fp8-peer-tied",
    "moe-modelopt": "moe-modelopt-fp8kv-peer",
    "moe-mixed": "moe-modelopt-fp8-peer-mixed",
    "vl-ct-static": "vl-ct-fp8-peer",
    "vl-ct-kv": "vl-ct-fp8kv-peer",
    "vl-ct-dynamic": "vl-ct-dynamic-peer",
    "vl-ct-block": "vl-ct-block-peer",
    "vl-ct-tied": "vl-ct-dynamic-peer-tied",
    "vl-ct-files": "vl-ct-dynamic-peer-files",
    "vl-ct-nested": "vl-ct-dynamic-peer-nested",
    "moe-ct": "moe-ct-dynamic-peer",
    "moe-ct-block": "moe-ct-block-peer",
    "vl-fp8-static": "vl-fp8-static-relabeled",
    "vl-fp8-dynamic": "vl-fp8-dynamic-relabeled",
    "vl-fp8-block": "vl-fp8-block-relabeled",
    "moe-fp8-dynamic": "moe-fp8-dynamic-relabeled",
    "moe-fp8-block": "moe-fp8-block-relabeled",
    "vl-nvfp4": "vl-modelopt-nvfp4kv-peer",
    "vl-w4a16": "vl-modelopt-w4a16-peer",
    "vl-mxfp8": "vl-modelopt-mxfp8-peer",
    "vl-mixed": "vl-modelopt-mixedkv-peer",
    "vl-ct-int8": "vl-ct-int8-peer",
    "vl-ct-nvfp4": "vl-ct-nvfp4kv-peer",
    "vl-ct-nvfp4a16": "vl-ct-nvfp4a16-peer-files",
    "vl-ct-mxfp8": "vl-ct-mxfp8-peer-files",
    "vl-ct-mxfp4": "vl-ct-mxfp4-peer-files",
    "vl-ct-mixed": "vl-ct-mixed-peer",
    "our-pcpt": "vl-modelopt-pcpt-ckptq",
    "our-pb-wo": "vl-modelopt-pbwo-ckptq",
    "our-nvfp4": "vl-modelopt-nvfp4kv-ckptq",
    "our-w4a16": "vl-modelopt-w4a16-ckptq",
    "our-mxfp8": "vl-modelopt-mxfp8-ckptq",
    "our-mixed": "vl-modelopt-mixedkv-ckptq",
    "our-ct-kv": "vl-ct-fp8kv-ckptq",
    "our-ct-dynamic": "vl-ct-dynamic-ckptq",
    "our-ct-block": "vl-ct-block-ckptq",
    "our-ct-int8": "vl-ct-int8-ckptq",
    "our-ct-nvfp4": "vl-ct-nvfp4kv-ckptq",
    "our-ct-nvfp4a16": "vl-ct-nvfp4a16-ckptq",
    "our-ct-mxfp8": "vl-ct-mxfp8-ckptq",
    "our-ct-mxfp4": "vl-ct-mxfp4-ckptq",
    "our-ct-mixed": "vl-ct-mixedkv-ckptq",
    "our-fp8-static": "vl-fp8-static-ckptq",
    "our-fp8-dynamic": "vl-fp8-dynamic-ckptq",
    "our-fp8-block": "vl-fp8-block-ckptq",
    "phi3": "phi3-modelopt-fp8kv-ckptq",
    "qwen3vl": "qwen3vl-modelopt-fp8kv-ckptq",
    "mixtral": "mixtral-modelopt-fp8kv-ckptq",
    "omni": "omni-modelopt-fp8kv-ckptq",
    "omni-moe": "omni-moe-modelopt-fp8kv-ckptq",
    "moe-nvfp4": "moe-modelopt-nvfp4kv-peer",
    "moe-w4a16": "moe-modelopt-w4a16-ckptq",
    "moe-ct-nvfp4": "moe-ct-nvfp4kv-ckptq",
    "moe-ct-nvfp4a16": "moe-ct-nvfp4a16-ckptq",
    "moe-nvfp4-ours": "moe-modelopt-nvfp4kv-ckptq",
    "omni-moe-nvfp4": "omni-moe-modelopt-nvfp4kv-ckptq",
    "llama": "llama-modelopt-fp8kv-ckptq",
    "mistral": "mistral-modelopt-fp8kv-ckptq",
    "qwen2": "qwen2-modelopt-fp8kv-ckptq",
    "qwen3": "qwen3-modelopt-fp8kv-ckptq",
    "gemma3text": "gemma3text-modelopt-fp8kv-ckptq",
    "qwen2vl": "qwen2vl-modelopt-fp8kv-ckptq",
    "gemma3": "gemma3-modelopt-fp8kv-ckptq",
    "llava": "llava-modelopt-fp8kv-ckptq",
    "qwen3vl-moe": "qwen3vl-moe-modelopt-fp8kv-ckptq",
    "vl-quark": "vl-quark-fp8-relabeled",
    "vl-quark-channel": "vl-quark-channel-relabeled",
}
"""Names of good exports in the mutants' names -> in corpus/bases.py."""

O1 = "model.layers.1.self_attn.o_proj"
QKV0 = tuple(f"model.layers.0.self_attn.{s}_proj" for s in "qkv")


def kept(base: str, patterns: tuple[str, ...], *modules: str) -> Edit:
    """The modules as in the source, and the exclude list says so."""
    return both(restored(lambda: source(base), *modules), ignoring(lambda old: [*old, *patterns]))


DERIVED: Mapping[str, tuple[str, Edit]] = {
    "vl-kept-o": ("vl-modelopt", kept("vl-modelopt", (O1,), O1)),
    "vl-kept-qkv": ("vl-modelopt", kept("vl-modelopt", QKV0, *QKV0)),
    # Without the record, which would say that it was changed.
    "vl-deep-kept": ("vl-deep", both(kept("vl-deep", ("model.layers.1.*",), "model.layers.1.*_proj"), remove("ckptq.json"))),
    "vl-no-kv": (
        "vl-modelopt",
        both(
            drop("*.k_scale", "*.v_scale"),
            section(lambda s: s.pop("kv_cache_scheme")),
            other(lambda s: s.update(kv_cache_quant_algo=None)),
        ),
    ),
    "vl-ct-kept": ("vl-ct-dynamic", kept("vl-ct-dynamic", QKV0, *QKV0)),
    "vl-fp8-kept": ("vl-fp8-dynamic", kept("vl-fp8-dynamic", QKV0, *QKV0)),
    "vl-nvfp4-kept": ("vl-nvfp4", kept("vl-nvfp4", QKV0, *QKV0)),
    "vl-ct-nvfp4-kept": ("vl-ct-nvfp4", kept("vl-ct-nvfp4", QKV0, *QKV0)),
    "vl-ct-int8-kept": ("vl-ct-int8", kept("vl-ct-int8", (O1,), O1)),
    "vl-quark-kept": ("vl-quark", kept("vl-quark", QKV0, *QKV0)),
    "moe-kept-o": ("moe-modelopt", kept("moe-modelopt", (O1,), O1)),
    "vl-one-config": ("vl-modelopt", config(lambda c: c.pop("quantization_config"))),
}


def names() -> tuple[str, ...]:
    """Every good export: its short name."""
    return (*SHORT, *DERIVED)


def origin(name: str) -> str:
    """The name in corpus/bases.py that a short or derived name leads to."""
    return SHORT[DERIVED[name][0] if name in DERIVED else name]


def source(name: str) -> Path:
    """The unquantized checkpoint of a good export."""
    return BASES[origin(name)].source


def make(name: str, target: Path) -> Path:
    """Copies the good export to the new folder `target`."""
    shutil.copytree(folder(origin(name)), target)
    if name in DERIVED:
        DERIVED[name][1](target)
    return target
