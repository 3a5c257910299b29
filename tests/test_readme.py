"""The README does what it says: its session is run and compared, its workflow's commands are run, its options and targets exist."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from ckptq.console import Console
from ckptq.convert import convert, prepare
from ckptq.recipe import load_recipe, shipped
from ckptq.scopes import all_scopes
from ckptq.validators.methods import known
from ckptq.validators.servers import DEFAULT, SERVERS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE = ROOT / "examples" / "tiny-qwen2.5-vl"
INSTALLED = ("ckptq", "recipes", "pyproject.toml", "README.md", "LICENSE")
FEW = "calibration={source: builtin, samples: 2, sequence_length: 16}"


def blocks(language: str) -> list[str]:
    return [m[2] for m in re.finditer(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL) if m[1] == language]


def environment(**more: str) -> dict[str, str]:
    """This one, with this interpreter's programs first and as narrow as a log."""
    here = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "PYTHONPATH", "FORCE_COLOR")}
    return {**here, "PATH": f"{Path(sys.executable).parent}:{here['PATH']}", "OMP_NUM_THREADS": "1", **more}


# --- the session that shows a failing checkpoint and how it is mended ---


def session() -> list[tuple[str, str]]:
    """(command, what it prints) of the block whose commands stand behind a `$`."""
    (block,) = (b for b in blocks("") if b.startswith("$ "))
    found = [part.partition("\n") for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
    return [(command, shown) for command, _, shown in found]


def test_the_session_prints_what_is_shown(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    recipe = load_recipe("demo", [FEW], model=str(EXAMPLE), output=str(tmp_path / "out" / "demo"))
    (tmp_path / "out").mkdir()
    convert(prepare(recipe), resume=False, device="cpu", memory=None, console=Console(quiet=True))
    steps = session()
    assert len(steps) > 3
    for command, shown in steps:
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True
        )
        assert done.stdout == shown, f"{command}:\n{done.stderr}"
    verdicts = [re.findall(r": (FAILED|OK)\b", shown) for _, shown in steps if shown]
    assert verdicts == [["FAILED"], ["OK"]]


# --- the workflow ---


@dataclass(frozen=True)
class Clone:
    """A checkout in which the workflow's first steps have run."""

    folder: Path
    job: Mapping[str, Any]
    environment: Mapping[str, str]

    def run(self, name: str) -> subprocess.CompletedProcess[str]:
        """The step of that name, as the runner starts it: a script for `bash -e`."""
        (script,) = (step["run"] for step in self.job["steps"] if step.get("name") == name)
        (self.folder / "step.sh").write_text(script, encoding="utf-8")
        command = ["bash", "-e", "step.sh"]
        return subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def workflow() -> dict[str, Any]:
    (found,) = (block for block in blocks("yaml") if "jobs:" in block)
    body: dict[str, Any] = yaml.safe_load(found)
    return body


@pytest.fixture(scope="module")
def clone(workflow: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """Installed from a copy of the repository into a folder of its own, without an index; the example in place of the model."""
    root = tmp_path_factory.mktemp("ci")
    folder = root / "clone"
    folder.mkdir()
    for part in INSTALLED:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder)
    (job,) = workflow["jobs"].values()
    settings = workflow["env"] | {"MODEL": str(EXAMPLE)}
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_TARGET": str(root / "site")}
    made = Clone(folder, job, environment(**settings, **offline, PYTHONPATH=str(root / "site"), HF_HUB_OFFLINE="1"))
    for name in ("Install", "Convert"):
        done = made.run(name)
        assert done.returncode == 0, done.stderr
    shutil.rmtree(folder / "ckptq")
    code = "import ckptq; print(ckptq.__file__)"
    used = subprocess.run([sys.executable, "-c", code], cwd=folder, env=made.environment, capture_output=True, text=True)
    assert used.stdout.strip() == str(root / "site" / "ckptq" / "__init__.py"), "what was installed is what runs"
    return made


def test_the_workflow_is_one(workflow: dict[str, Any], clone: Clone) -> None:
    assert set(workflow) == {"name", True, "env", "jobs"}  # YAML 1.1 takes `on` for true
    assert workflow["env"]["RECIPE"] in shipped()
    steps = clone.job["steps"]
    for step in steps:
        assert ("uses" in step) != ("run" in step)
        assert re.fullmatch(r"actions/[a-z-]+@v\d+", step.get("uses", "actions/x@v1"))
    order = [step.get("name") or step["uses"].partition("@")[0] for step in steps]
    assert order == [
        "actions/checkout", "actions/setup-python", "Install", "Convert", "Validate", "Keep the report", "Keep the checkpoint",
    ]  # fmt: skip
    assert [step.get("if") for step in steps if step.get("uses", "").startswith("actions/upload")] == ["always()", None]


def test_its_commands_end_with_a_clean_checkpoint(clone: Clone) -> None:
    done = clone.run("Validate")
    assert (done.returncode, re.findall(r"^::(\w+) ", done.stdout, re.MULTILINE)) == (0, ["notice"]), done.stdout + done.stderr
    said = json.loads((clone.folder / "out" / "validate.json").read_text(encoding="ascii"))
    Draft202012Validator(json.loads((ROOT / "docs" / "validate.schema.json").read_text())).validate(said)
    assert said["ok"]
    assert said["strict"]
    assert {"layout", "values", "passthrough"} <= {stage["what"] for stage in said["checked"]}
    kept = {step["name"]: step["with"]["path"] for step in clone.job["steps"] if "path" in step.get("with", {})}
    assert {p.name for p in clone.folder.glob(kept["Keep the report"])} == {"validate.json", "validate.xml"}
    assert (clone.folder / kept["Keep the checkpoint"] / "config.json").is_file()


def test_a_faulty_checkpoint_stops_it_and_the_report_is_kept(clone: Clone) -> None:
    config = clone.folder / "out" / "checkpoint" / "config.json"
    before = config.read_text()
    config.write_text(before.replace('"visual*"', '"visual.nothing"'))
    try:
        done = clone.run("Validate")
    finally:
        config.write_text(before)
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("::error title=layout.not-excluded::visual.blocks.")
    assert json.loads((clone.folder / "out" / "validate.json").read_text())["exit_code"] == 1
    assert '<failure type="layout.not-excluded"' in (clone.folder / "out" / "validate.xml").read_text()


# --- everything else ---


def commands() -> Iterator[list[str]]:
    """Every command line of ckptq's in a block, without its comment; lines that end in a backslash go on."""
    for language in ("", "yaml"):
        for block in blocks(language):
            for line in re.sub(r"\\\n\s*", "", block).splitlines():
                words = shlex.split(line.lstrip("$ "), comments=True) if re.match(r"[$ ]*(ckptq|\.venv/bin/ckptq) ", line) else []
                if words:
                    yield words[1:]


def test_every_option_that_is_shown_exists() -> None:
    shown = list(commands())
    assert len(shown) > 8
    for command in {words[0] for words in shown}:
        asked = [sys.executable, "-m", "ckptq", command, "--help"]
        done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True)
        used = {w.partition("=")[0] for words in shown if words[0] == command for w in words if w.startswith("--")}
        assert used <= set(re.findall(r"--[a-z-]+", done.stdout))


def test_every_target_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {m[1] for m in re.finditer(r"(?:`|^)make ([a-z]+)", README, re.MULTILINE)}
    assert named
    assert named <= targets


def test_every_link_leads_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)", README):
        assert link.startswith("https://") or (ROOT / link).is_file(), link


def test_the_versions_of_the_server_are_the_known_ones() -> None:
    rows = re.findall(r"^\| (`[\d.`, ]+`) \| (.*) \|$", README, re.MULTILINE)
    told = {version: how for versions, how in rows for version in re.findall(r"`([\d.]+)`", versions)}
    assert set(told) == set(SERVERS)
    for version, server in SERVERS.items():
        assert ("not tried" in told[version]) == (server.verified == "read")
    assert f"{DEFAULT.version} where nothing is said" in README


def test_what_it_knows_is_what_there_is() -> None:
    sentence = README[README.index("It knows `quant_method`") :].partition("\n\n")[0]
    assert set(re.findall(r"`([\w.-]+)`", sentence)) == {"quant_method", *known()}
    assert "the architectures of [Models](#models)" in sentence.replace("\n", " ")
    models = README[README.index("### Models") : README.index("### Calibration")]
    architectures = {name for scope in all_scopes() for name in scope.architectures}
    assert architectures - set(re.findall(r"`(\w+)`", models)) == set()
