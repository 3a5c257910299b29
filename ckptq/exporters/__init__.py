"""Exporters: one module per on-disk format, with the functions of `ckptq.plan.Exporter`. Found by file name."""

from __future__ import annotations

import importlib
import pkgutil
from typing import cast

from ckptq.plan import Exporter


def all_formats() -> tuple[str, ...]:
    """The formats, as recipes name them."""
    return tuple(sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(__path__)))


def find_exporter(name: str) -> Exporter:
    """The exporter module `ckptq/exporters/<name>.py`. The recipe's schema has made sure that it exists."""
    return cast(Exporter, importlib.import_module(f"{__name__}.{name.replace('-', '_')}"))
