"""The validator says of every mutant of tests/omni_mutants.py what the real vLLM-Omni makes of it.

pytest tests/test_omni_agreement.py -m "not server"     # without a server: its side is recorded in tests/data
pytest tests/test_omni_agreement.py -m server           # records a part of it again
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from omni_mutants import BASES, make_base, mutants
from server import record_omni_behavior

from ckptq.errors import CkptqError
from ckptq.validate import examine

EVERY = tuple(mutants())
LABELS = record_omni_behavior.read_table()
REFUSALS = ("UnsupportedError: not a quantized pipeline", "SourceError: ")
"""Of what vLLM-Omni refuses: how the validator's own refusals begin. The command ends with 2 then."""


@pytest.fixture(scope="module")
def goods(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    work = tmp_path_factory.mktemp("omni")
    return {name: make_base(name, work / "sources", work / name) for name in BASES}


def said(folder: Path, source: Path | None = None) -> tuple[str, list[str]]:
    """(worst severity, findings), without the record, which would see any change."""
    (folder / "ckptq.json").unlink(missing_ok=True)
    try:
        found = examine(folder, source=source).findings
    except CkptqError as problem:
        return "refused", [f"{type(problem).__name__}: {problem}"]
    worst = "error" if any(f.severity == "error" for f in found) else "warning" if found else "nothing"
    return worst, [f"{f.severity} {f.code} {f.subject}" for f in found]


def agrees(label: str, worst: str, findings: list[str]) -> bool:
    """Errors for what is refused or wrong, at least a warning for what is worse, no error for the rest."""
    if worst == "refused":
        return label == "refused" and findings[0].startswith(REFUSALS)
    return worst in {"refused": ("error",), "wrong": ("error",), "degraded": ("error", "warning")}.get(
        label, ("warning", "nothing")
    )


def test_the_validator_agrees_with_vllm_omni(goods: Mapping[str, Path], tmp_path: Path) -> None:
    """Mutants are made of links to the good export's files: an edit puts a new file in the place of what it changes."""
    bad = []
    for mutant in EVERY:
        folder = tmp_path / "mutant"
        shutil.copytree(goods[mutant.base], folder, copy_function=os.link)
        mutant.edit(folder)
        source = goods[mutant.base].parent / "sources" / BASES[mutant.base].pipeline
        worst, findings = said(folder, source if mutant.source else None)
        if not agrees(LABELS[mutant.name]["label"], worst, findings):
            bad.append(f"{mutant.name}: vLLM-Omni {LABELS[mutant.name]}; validator says {worst}: {findings[:4]}")
        shutil.rmtree(folder)
    assert bad == []


@pytest.mark.parametrize("name", BASES)
def test_good_exports_have_no_errors(goods: Mapping[str, Path], name: str) -> None:
    """With the record and the source."""
    found = examine(goods[name], source=goods[name].parent / "sources" / BASES[name].pipeline)
    assert [f for f in found.findings if f.severity == "error"] == []
    assert {c.what for c in found.checked} == {"layout", "values", "record", "passthrough"}
    assert found.built is not None
    assert found.built["linears"]


def test_the_table_is_as_large_as_it_should_be() -> None:
    assert set(LABELS) == {m.name for m in EVERY}, "record what is new: tests/server/record_omni_behavior.py"
    assert {m.base for m in EVERY} == set(BASES)
    assert sum(row["label"] != "harmless" for row in LABELS.values()) >= 130
    assert {row["label"] for row in LABELS.values()} == {"refused", "wrong", "degraded", "harmless"}
    assert [m.name for m in EVERY if m.near_miss and LABELS[m.name]["label"] != "harmless"] == []
    assert [m.name for m in EVERY if not m.near_miss and LABELS[m.name]["label"] == "harmless"] == []


@pytest.mark.server
def test_vllm_omni_does_what_was_recorded() -> None:
    """A mutant of each base. For all of them, which takes minutes: `tests/server/record_omni_behavior.py --check`."""
    sample = {mutant.base: mutant for mutant in EVERY}
    after = record_omni_behavior.record([*sample.values()])
    assert len(after) == len(BASES)
    assert record_omni_behavior.changed(LABELS, after) == []
