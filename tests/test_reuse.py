"""--amax: another static format of the same source from the amaxes of an earlier run."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptq.console import Console
from ckptq.convert import Prepared, Report, convert, prepare
from ckptq.errors import CkptqError, DataError, OutputError, RecipeError
from ckptq.recipe import load_recipe
from ckptq.validate import examine

ROOT = Path(__file__).parent.parent
NVFP4 = ("quantize.0.scheme=nvfp4", "kv_cache=null")
COMPRESSED = ("export.format=compressed-tensors",)
FP8 = ("export.format=fp8", "kv_cache=null", "keep=[lm_head, visual, model.layers.1]")


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FP8 with an FP8 KV cache, in ModelOpt's format, calibrated. Read only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        run(output := tmp_path_factory.mktemp("first") / "out")
        return output


def planned(output: Path, *settings: str, amax: Path | None = None, **top: Any) -> Prepared:
    return prepare(load_recipe("demo", ["calibration.samples=3", *settings], output=str(output), **top), amax)


def run(output: Path, *settings: str, amax: Path | None = None, resume: bool = False, **top: Any) -> Report:
    job = planned(output, *settings, amax=amax, **top)
    return convert(job, resume=resume, device="cpu", memory=None, console=Console(quiet=True))


def record(folder: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((folder / "ckptq.json").read_text())
    return body


@pytest.mark.parametrize("settings", [NVFP4, COMPRESSED, FP8], ids=["nvfp4", "compressed-tensors", "fp8"])
def test_the_same_bytes_as_a_calibration(settings: tuple[str, ...], first: Path, tmp_path: Path) -> None:
    run(tmp_path / "fresh", *settings)
    report = run(tmp_path / "reused", *settings, amax=first / "ckptq.json")
    assert not {"enter", "calibrate"} & report.seconds.keys()
    fresh, reused = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("fresh", "reused"))
    one, two = (json.loads(files.pop("ckptq.json")) for files in (fresh, reused))
    assert fresh == reused
    assert one["amax"] == two["amax"]
    assert examine(tmp_path / "reused").findings == ()
    job, before = two["job"], record(first)["job"]
    assert job["samples"] is None
    assert "calibration" not in job["recipe"]
    assert job["amax"]["samples"] == before["samples"] == one["job"]["samples"]
    assert job["amax"]["calibration"] == before["recipe"]["calibration"]


def test_where_amaxes_come_from_is_told_over_many_runs(first: Path, tmp_path: Path) -> None:
    run(tmp_path / "second", *COMPRESSED, amax=first)
    run(tmp_path / "third", *NVFP4, amax=tmp_path / "second")
    run(tmp_path / "direct", *NVFP4, amax=first)
    third, direct = ((tmp_path / name / "ckptq.json").read_bytes() for name in ("third", "direct"))
    assert third == direct


# What is refused


def edited(first: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    folder.mkdir()
    body = record(first)
    change(body)
    (folder / "ckptq.json").write_text(json.dumps(body))
    return folder


def test_amaxes_that_are_not_there(first: Path, tmp_path: Path) -> None:
    run(tmp_path / "half", *FP8, amax=first)
    with pytest.raises(RecipeError) as caught:
        planned(tmp_path / "out", "keep=[lm_head, visual]", "kv_cache=null", amax=tmp_path / "half")
    assert "the recipe needs 4 amaxes that are not in it: model.layers.1.mlp.down_proj.input_amax, " in str(caught.value)
    assert str(caught.value).endswith(" and 1 more")
    assert caught.value.hint == "leave --amax out to calibrate"
    with pytest.raises(
        RecipeError, match=r"needs 12 amaxes that are not in it: model\.layers\.0\.self_attn\.k_proj\.k_amax"
    ) as caught:
        planned(tmp_path / "out", "keep=[lm_head, visual, model.layers.1]", amax=tmp_path / "half")
    assert caught.value.hint == "that run had no FP8 KV cache: add --set kv_cache=null, or leave --amax out to calibrate"


def raised(amaxes: dict[str, float]) -> None:
    amaxes["model.layers.3.mlp.up_proj.weight_amax"] *= 2


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], type[CkptqError], str]] = {
    "another source": (
        lambda b: b["job"].update(source_fingerprint="0" * 64, source="org/other@abc"), RecipeError,
        "measured on another checkpoint: org/other@abc, fingerprint 000000000000 then, local folder, fingerprint ",
    ),
    "a source that was FP8": (
        lambda b: b["job"].update(source_fingerprint="0" * 64, recipe={"from_fp8": True}), RecipeError,
        "one of them with from_fp8: True then, False now",
    ),
    "a weight that has changed": (
        lambda b: raised(b["amax"]), DataError, "model.layers.3.mlp.up_proj.weight_amax: ",
    ),
    "a negative amax": (
        lambda b: b["amax"].update({"model.layers.0.mlp.down_proj.input_amax": -1}), DataError,
        "model.layers.0.mlp.down_proj.input_amax: expected a finite number from 0 on, found -1",
    ),
    "an amax beyond float32": (
        lambda b: b["amax"].update({"model.layers.0.mlp.down_proj.input_amax": 1e39}), DataError,
        "model.layers.0.mlp.down_proj.input_amax: expected a finite number from 0 on, found 1e+39",
    ),
    "a text": (lambda b: b["amax"].update(a="1"), DataError, "a: expected a finite number from 0 on, found '1'"),
    "no amaxes": (lambda b: b.pop("amax"), RecipeError, "expected a ckptq.json with job and amax"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_can_not_be_reused(name: str, first: Path, tmp_path: Path) -> None:
    change, kind, expected = CHANGES[name]
    with pytest.raises(kind) as caught:
        run(tmp_path / "out", *COMPRESSED, amax=edited(first, tmp_path / "amax", change))
    assert expected in str(caught.value)
    assert f"--amax {tmp_path / 'amax'}: " in str(caught.value)
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_resumed_run_notices_other_amaxes(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ckptq.produce.write_files", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", *COMPRESSED, amax=first)
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    other = edited(first, tmp_path / "amax", lambda b: b["amax"].update({"model.layers.0.mlp.down_proj.input_amax": 1.0}))
    with pytest.raises(OutputError, match=r"the interrupted job there is another one\n  - amax\.digest: "):
        run(tmp_path / "out", *COMPRESSED, amax=other, resume=True)
    copied = shutil.copy(first / "ckptq.json", tmp_path / "moved.json")
    run(tmp_path / "out", *COMPRESSED, amax=Path(copied), resume=True)
    assert examine(tmp_path / "out").findings == ()


def test_the_command_line(first: Path, tmp_path: Path) -> None:
    def ckptq(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = (sys.executable, "-m", "ckptq", "convert", "--recipe", "demo", "--output", str(tmp_path / "out"), *arguments)
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    plan = ckptq("--amax", str(first), "--set", "export.format=compressed-tensors", "--dry-run", "--format", "json")
    assert plan.returncode == 0, plan.stderr
    found = json.loads(plan.stdout)["calibration"]
    assert (found["needed"], found["samples"], found["amaxes_from"]) == (False, 0, str(first))
    assert "none, amaxes from" in ckptq("--amax", str(first), "--dry-run").stdout
    absent = ckptq("--amax", str(tmp_path / "nothing"))
    assert absent.returncode == 2
    assert absent.stderr == (
        f"error: --amax {tmp_path / 'nothing'}: no such file\n  give a folder that ckptq has written, or the ckptq.json in it\n"
    )
