"""All codes of findings, joined from the modules that find them."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType

import ckptq.validators
from ckptq.validators import Code


@functools.cache
def catalog() -> Mapping[str, Code]:
    """{code: what it means}. Imports every validator, so it is not asked for before there is something to look up."""
    found: dict[str, Code] = {}
    for module in sorted(m.name for m in pkgutil.walk_packages(ckptq.validators.__path__, "ckptq.validators.")):
        found |= getattr(importlib.import_module(module), "CODES", {}) if module != __name__ else {}
    return MappingProxyType(found)
