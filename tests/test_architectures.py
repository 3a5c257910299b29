"""docs/architectures.md: that benchmarks/architectures.py makes it from its JSON, and sees again what the JSON says."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from families import families

ROOT = Path(__file__).parent.parent
RECORDED = ROOT / "docs" / "architectures.json"
AGAIN = "phi3"
"""The family that is served again: its linears are fused in the file."""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("architectures", ROOT / "benchmarks" / "architectures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["architectures"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def rows(path: Path = RECORDED) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())
    return found


def test_the_table_says_what_the_runs_wrote(script: ModuleType) -> None:
    assert RECORDED.with_suffix(".md").read_text() == script.document(rows())


def test_the_readme_has_the_table(script: ModuleType, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text((ROOT / "README.md").read_text())
    assert script.summary(rows()) in readme.read_text(), "benchmarks/architectures.py --merge --readme"
    script.put(script.summary([]), readme)
    assert script.summary([]) in readme.read_text()
    script.put(script.summary(rows()), readme)
    assert readme.read_text() == (ROOT / "README.md").read_text()


def test_nothing_that_was_tried_failed_but_what_failed_unquantized() -> None:
    """vLLM 0.26.0 refuses LLaVA under transformers 5.17, whose modeling_pixtral lacks a class that it imports."""
    failed = {(row["device"], row["vllm"], row["family"], row["recipe"]) for row in rows() if row["state"] == "failed"}
    assert [key for key in failed if (*key[:3], "bf16") not in failed] == []
    assert {key[2] for key in failed} <= {"llava"}


def test_every_recipe_of_every_family_was_loaded_whole() -> None:
    wanted = {(name, recipe) for name, family in families().items() for recipe in family.recipes}
    assert {(row["family"], row["recipe"]) for row in rows()} - {(name, "bf16") for name in families()} == wanted


def test_a_recipe_without_a_row_is_in_the_last_column(script: ModuleType) -> None:
    row = {"device": "CPU", "vllm": "1", "family": "phi3", "recipe": "phi3-fp8", "state": "loaded"}
    lines = script.summary([row]).splitlines()
    phi3 = next(line for line in lines if "Phi3ForCausalLM" in line)
    assert phi3 == "| `Phi3ForCausalLM` |  | modelopt fp8 + KV (CPU 1) | compressed-tensors fp8-dynamic |"
    generated = script.summary([row, {**row, "device": "NVIDIA H200", "state": "generated"}]).splitlines()
    assert "| `Phi3ForCausalLM` | modelopt fp8 + KV (H200 1) |  | compressed-tensors fp8-dynamic |" in generated


def test_rows_are_merged_by_what_they_are_of(script: ModuleType, tmp_path: Path) -> None:
    row = {"device": "CPU", "vllm": "1", "family": "phi3", "recipe": "phi3-fp8", "state": "failed", "why": "first"}
    table = tmp_path / "architectures.json"
    script.keep(table, [row, {**row, "device": "GPU", "why": "elsewhere"}, {**row, "recipe": "of old", "why": "gone"}])
    script.keep(table, [{**row, "why": "second"}])
    assert [found["why"] for found in rows(table)] == ["second", "elsewhere"]
    text = table.with_suffix(".md").read_text()
    assert text.index("## GPU, vLLM 1") < text.index("## CPU, vLLM 1") < text.index("second")


ANSWERS = {"prompt": [-8.0, -9.0], "images": [{"logprobs": [{"7": -2.0, "8": -3.0}]}]}


def test_answers_are_compared_with_the_sources(script: ModuleType) -> None:
    others = {"prompt": [-8.5, -8.5], "images": [{"logprobs": [{"7": -2.25, "9": -3.0}]}]}
    assert script.differences(ANSWERS, others) == (0.5, 0.25)
    assert script.differences({**ANSWERS, "images": []}, {**others, "images": []}) == (0.5, None)


@pytest.mark.server
def test_served_again(tmp_path: Path) -> None:
    out = tmp_path / "architectures.json"
    options = ["--jobs", "2", "--work", str(tmp_path), "--out", str(out)]
    command = [sys.executable, "benchmarks/architectures.py", AGAIN, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    recorded = [row for row in rows() if row["device"] == "CPU" and row["family"] == AGAIN]
    assert [without_noise(row) for row in rows(out)] == [without_noise(row) for row in recorded]
    assert all(row["state"] == "generated" for row in recorded)


def without_noise(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "apart"}
