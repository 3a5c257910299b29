"""Files of other tools' quantized checkpoints, known by their names: for errors that say what a folder is, not what it lacks."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from pathlib import Path

from ckptq.errors import UnsupportedError
from ckptq.folder import printable

HINT = "start from the BF16 checkpoint"
METHODS = {
    "auto-round": "AutoRound's: integers in groups, or MX formats, as it has tuned them",
    "auto_round": "AutoRound's: integers in groups, or MX formats, as it has tuned them",
    "awq": "AWQ's: 4-bit integers under scales and zero points of groups",
    "bitsandbytes": "bitsandbytes': 4-bit or 8-bit codes under scales of their own",
    "gguf": "GGUF: blocks of integers",
    "gptq": "GPTQ's: integers under scales and zero points of groups",
    "svdquant": "SVDQuant's: 4-bit codes beside a part of low rank",
    "torchao": "torchao's: tensors of its own classes",
}
"""{quant_method: whose form it is}."""
TENSORS = {
    "absmax": METHODS["bitsandbytes"],
    "SCB": METHODS["bitsandbytes"],
    "wscales": METHODS["svdquant"],
    "smooth_factor": METHODS["svdquant"],
    "qzeros": "GPTQ's, AWQ's or AutoRound's: integers under scales and zero points of groups",
    "qweight": "packed integers, as GPTQ, AWQ, AutoRound and SVDQuant store them",
    "weight_offset": "msModelSlim's, for Ascend NPUs",
    "deq_scale": "msModelSlim's, for Ascend NPUs",
}
"""{last part of a tensor's name: whose form it is}. One of them tells, whatever config.json says."""


def whose(names: Iterable[str]) -> str:
    """Of which tool these files are, "" where none of those known has written them."""
    for name in sorted(names):
        if fnmatch.fnmatchcase(name, "quant_model_description*.json"):
            return f"{printable(name)} is msModelSlim's, which quantizes for Ascend NPUs"
        if name.endswith(".gguf"):
            return f"{printable(name)} is GGUF, whose blocks of integers ckptq does not read"
    return ""


def refuse_foreign(base: Path) -> None:
    """Raises UnsupportedError for a folder without safetensors of a form that ckptq reads, where its files say whose it is."""
    if found := whose(path.name for path in base.iterdir()):
        raise UnsupportedError(f"{base}: {found}", hint=HINT)
