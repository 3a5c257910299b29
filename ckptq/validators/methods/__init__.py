"""Quantization methods of the server: one file for each value of `quant_method`, found by its name.

A file here says how that method reads its section of config.json, which linears it then builds quantized, and in which format.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ckptq.scopes import Scope
from ckptq.validators import Finding
from ckptq.validators.formats import Format
from ckptq.validators.servers import Server
from ckptq.validators.vllm_rules import ServerLinear

Treatment = Format | Literal["kept", "refused"]
"""A format: built quantized, from these tensors. kept: as in the source. refused: vLLM raises, as a list splits a fused linear."""

Matcher = Callable[[ServerLinear], Treatment]

MIXED = "MIXED_PRECISION"
"""ModelOpt's word for settings that name each linear's own algorithm."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the server reads from the section that counts.

    file     where the section lies, for messages
    method   the value of quant_method
    format   the number format in the file's own word: quant_algo, or the strategies
    exclude  the entries that keep modules out, as written
    key      the name of the list they are in
    kv_fp8   the KV cache will be FP8 and wants scales
    kv_key   the setting that makes it so, or "" where the file can't say it
    section  the whole section, for the method's own use
    server   whose rules count
    dtypes   in which the server runs this method: what is not quantized, and activations outside the kernels
    """

    file: str
    method: str
    format: str
    exclude: tuple[str, ...]
    key: str
    kv_fp8: bool
    kv_key: str
    section: Mapping[str, Any]
    server: Server
    dtypes: frozenset[str] = frozenset({"float16", "bfloat16"})


class Method(Protocol):
    """A module of this folder."""

    def check(self, section: Mapping[str, Any], file: str, server: Server) -> Iterator[Finding]:
        """What is wrong with the section itself."""

    def read(self, section: Mapping[str, Any], file: str, server: Server) -> Settings | None:
        """The settings, or None where `check` has said why the server can't read them.

        Raises UnsupportedError for a format that vLLM serves and ckptq does not know.
        """

    def matcher(self, settings: Settings, scope: Scope) -> Matcher:
        """How each linear is built."""


def find_method(name: str) -> Method | None:
    """The module for a `quant_method`, or None."""
    if name.replace("-", "_") not in {m.name for m in pkgutil.iter_modules(__path__)}:
        return None
    return load_method(name)


def load_method(name: str) -> Method:
    """The module for a `quant_method` that is one of `known`."""
    method: Method = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    return method


def known() -> tuple[str, ...]:
    """The values of quant_method that can be checked, as config.json writes them."""
    return tuple(m.name.replace("_", "-") for m in pkgutil.iter_modules(__path__))


def exclude_list(section: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """The entries under `key` that are strings; a list that holds anything else is the method's `check` to report."""
    entries = section.get(key)
    return tuple(e for e in entries if isinstance(e, str)) if isinstance(entries, list) else ()


def is_names(value: Any) -> bool:
    """Whether it is a list of texts and nothing else."""
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)


def as_json(value: Any) -> str:
    """A value of config.json as the file spells it."""
    return json.dumps(value)


def spelled(section: Mapping[str, Any], key: str) -> str:
    """The value under `key` as the file spells it, or "absent"."""
    return as_json(section[key]) if key in section else "absent"
