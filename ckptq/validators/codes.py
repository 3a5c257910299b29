"""All codes of findings, joined from the modules that find them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType

import ckptq.validators
from ckptq.validators import Code


def _all() -> dict[str, Code]:
    found: dict[str, Code] = {}
    for module in sorted(m.name for m in pkgutil.walk_packages(ckptq.validators.__path__, "ckptq.validators.")):
        found |= getattr(importlib.import_module(module), "CODES", {}) if module != __name__ else {}
    return found


CATALOG: Mapping[str, Code] = MappingProxyType(_all())
