"""docs/served.md: that benchmarks/served.py makes it from docs/served.json, and makes these rows again with the real vLLM."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ckptq.recipe import shipped

ROOT = Path(__file__).parent.parent
RECORDED = ROOT / "docs" / "served.json"
INT8 = "CompressedTensorsLinearMethod > CompressedTensorsW8A8Int8 > CPUInt8ScaledMMLinearKernel"
KERNELS = {
    "qwen25vl-lm-fp8-dynamic-modelopt": "ModelOptLinearMethod > ChannelWiseTorchFP8ScaledMMLinearKernel",
    "qwen25vl-lm-int8-compressed-tensors": INT8,
}
LINEARS = ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("served", ROOT / "benchmarks" / "served.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["served"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def rows(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())
    return found


def test_the_table_says_what_the_runs_wrote(script: ModuleType) -> None:
    assert RECORDED.with_suffix(".md").read_text() == script.document(rows(RECORDED))


def test_the_table_speaks_of_every_recipe() -> None:
    wanted = {name for name in shipped() if name.startswith("qwen25vl-lm") and not name.endswith("-text")}
    assert {row["name"] for row in rows(RECORDED)} == {"bf16", *wanted}
    assert {row["name"] for row in rows(RECORDED) if "refused" not in row} == {"bf16", *wanted}, "each is served somewhere"
    assert all(row["exact"] == row["scenes"] for row in rows(RECORDED) if "refused" not in row)


def test_rows_are_merged_by_what_they_are_of(script: ModuleType, tmp_path: Path) -> None:
    here = {"device": "CPU", "vllm": "1", "name": "bf16", "without": "", "refused": "Error: first"}
    there = {**here, "device": "GPU", "refused": "Error: elsewhere"}
    table = tmp_path / "served.json"
    script.keep(table, [here, there])
    script.keep(table, [{**here, "refused": "Error: second"}])
    assert [row["refused"] for row in rows(table)] == ["Error: second", "Error: elsewhere"]
    text = table.with_suffix(".md").read_text()
    assert text.index("## GPU, vLLM 1") < text.index("## CPU, vLLM 1") < text.index("Error: second")


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        ("CompressedTensorsLinearMethod > CompressedTensorsW4A4Fp4 > MarlinNvFp4LinearKernel", "BF16: weights alone"),
        ("CompressedTensorsLinearMethod > CompressedTensorsW4A4Fp4 > EmulationNvFp4LinearKernel", "quantized"),
        ("ModelOptLinearMethod > EmulationMxfp8LinearKernel", "BF16: weights alone"),
        ("ModelOptFp8LinearMethod > CutlassFP8ScaledMMLinearKernel", "quantized"),
        ("UnquantizedLinearMethod", "BF16"),
    ],
)
def test_whether_a_kernel_quantizes_activations(kernel: str, said: str, script: ModuleType) -> None:
    assert script.activations(kernel) == said


@pytest.mark.server
def test_served_again(tmp_path: Path) -> None:
    """Two recipes whose kernels vLLM's CPU build has, nothing of vLLM changed: as the table says."""
    options = ["--scenes", "4", "--work", str(tmp_path), "--out", str(tmp_path / "served.json")]
    command = [sys.executable, "benchmarks/served.py", *KERNELS, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    recorded = {row["name"]: row for row in rows(RECORDED) if row["device"] == "CPU"}
    found = {row["name"]: row for row in rows(tmp_path / "served.json")}
    assert sorted(found) == sorted(KERNELS)
    for name, row in found.items():
        assert "refused" not in row, row["refused"]
        assert "stand_in" not in row
        assert row["linears"] == {KERNELS[name]: LINEARS} == recorded[name]["linears"]
        assert (row["exact"], row["scenes"]) == (4, 4)
        assert row["text_nll"] == pytest.approx(recorded[name]["text_nll"], rel=2e-3)
