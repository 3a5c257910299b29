"""The mutation corpus: good exports of corpus/bases.py, each broken in one way, and near misses that look broken and are not.

A fault's name is its class: the same fault in many layers, formats or spellings is one. What real vLLM makes of each mutant is
recorded in tests/data by tests/server/record_behavior.py; nothing here says what is right.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from corpus.edit import Edit

Needs = Literal["source", "record"]
PARTS = (
    "tensors",
    "shapes",
    "values",
    "configs",
    "formats",
    "models",
    "excludes",
    "files",
    "moe",
    "moe_nvfp4",
    "quark",
    "groups",
    "group_values",
    "mixed",
    "families",
    "plain",
    "vision",
)


@dataclass(frozen=True, slots=True)
class Mutant:
    """One edit of a good export.

    name       base/fault/what exactly; near misses have `near` before the last part
    fault      its class
    base       the good export's name: short, as in corpus/derived.py
    edit       changes a copy of the base
    near_miss  looks like the fault, and the server serves it
    needs      what alone can reveal it: the checkpoint it was made from, or the record in ckptq.json
    """

    name: str
    fault: str
    base: str
    edit: Callable[[Path], None]
    near_miss: bool = False
    needs: Needs | None = None


Edits = Mapping[str, Mapping[str, Edit]]
"""{base or several, parted by spaces: {what exactly: edit}}"""


def fault(name: str, *, bad: Edits, near: Edits, needs: Needs | None = None) -> tuple[Mutant, ...]:
    """All mutants of one class of fault."""
    return tuple(
        Mutant(f"{base}/{name}/{'near ' * miss}{what}", name, base, edit, miss, needs)
        for miss, edits in ((False, bad), (True, near))
        for bases, found in edits.items()
        for base in bases.split()
        for what, edit in found.items()
    )


def mutants() -> Iterator[Mutant]:
    """Every mutant of every part, in the order of the files."""
    for part in PARTS:
        yield from importlib.import_module(f"corpus.mutants_{part}").MUTANTS
