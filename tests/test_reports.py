"""What a validation says, in each format: grouping, exit codes, and names from a checkpoint that try to be more than names."""

from __future__ import annotations

import ast
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
import torch
from hub_server import HubServer, commit_of
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from safetensors.torch import load_file, save_file

from ckptq.checkpoint import INDEX
from ckptq.cli import main
from ckptq.console import Console, amount
from ckptq.convert import convert, prepare
from ckptq.errors import SourceError
from ckptq.recipe import load_recipe
from ckptq.reports import Asked, Outcome, catalog, destinations, next_command, refused, verdict, written
from ckptq.reports.github import command
from ckptq.reports.human import show
from ckptq.reports.json import data
from ckptq.validate import Checked
from ckptq.validators import Finding, codes, error, has_errors, warning
from ckptq.validators.grouping import group
from ckptq.validators.servers import SERVERS, minor
from ckptq.validators.vllm_findings import other_version
from ckptq.validators.vllm_load import Served, version

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "tiny-qwen2.5-vl"
SCHEMA = json.loads((ROOT / "docs" / "validate.schema.json").read_text(encoding="utf-8"))
HOSTILE = (
    "a\x1b[31mred\x1b]0;title\x07",
    "b\n::add-mask::secret",
    "c ::error::x",
    "d##[add-mask]y",
    "e\u202egpj.x",
    "[bold]f[/bold]",
    "g\r\n</failure><script>&amp;]]>",
    "h" * 4500,
    "\u2028i\ufffe\x00\x7f",
)


ACTED_ON = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u206f]")


def fault(subject: str, found: str = "1", code: str = "layout.shape") -> Finding:
    return error(code, subject, "e", found, "f", "m")


# --- one fault at many places is one finding ---


def test_grouping_keeps_apart_what_is_not_the_same() -> None:
    faults = [
        warning("a", "x.layers.1.w", "e", "1", "f", "m"),
        error("a", "x.layers.0.w", "e", "1", "f", "m"),
        error("b", "y", "e", "1", "f", "m"),
    ]
    assert [(f.code, f.severity, f.count) for f in group(faults)] == [("a", "error", 1), ("b", "error", 1), ("a", "warning", 1)]
    assert has_errors(faults)
    assert not has_errors(faults[:1])
    for field in ("code", "expected", "effect", "mend"):
        assert len(group([faults[2], replace(faults[2], **{field: "other"})])) == 2


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 30), st.sampled_from(["1.5", "2", "gone"])), max_size=40))
def test_grouping_loses_no_place(places: list[tuple[str, int, str]]) -> None:
    joined = group(fault(f"m.layers.{layer}.{name}", found) for name, layer, found in places)
    assert sum(f.count for f in joined) == len(places)
    assert len(joined) <= 3 * 2


@settings(deadline=None)
@given(st.sets(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1))
def test_braces_stand_for_the_places_and_no_others(places: set[tuple[int, int]]) -> None:
    found = group(fault(f"m.{i}.e.{j}.w") for i, j in sorted(places))
    assert len(found) == 1
    assert found[0].count == len(places)
    shown, _, more = found[0].subject.partition(" and ")
    named = [place for name in shown.split(", ") for place in expanded(name)]
    assert len(named) == len(set(named))
    assert set(named) <= {f"m.{i}.e.{j}.w" for i, j in places}
    assert more or len(named) == len(places)


def expanded(name: str) -> list[str]:
    """As a shell expands braces."""
    match = re.search(r"\{([^}]*)\}", name)
    if match is None:
        return [name]
    numbers: list[int] = []
    for part in match[1].split(","):
        first, _, last = part.partition("..")
        numbers += range(int(first), int(last or first) + 1)
    return [end for n in numbers for end in expanded(name[: match.start()] + str(n) + name[match.end() :])]


def test_ranges_of_layers() -> None:
    assert group(fault(f"m.layers.{i}.w") for i in (0, 1, 2, 5, 7, 8))[0].subject == "m.layers.{0..2,5,7,8}.w"


def test_names_with_odd_numbers_are_left_alone() -> None:
    names = ["m.007.w", "m.8.w", "m.\u0669.w", f"m.{'9' * 5000}.w"]
    (found,) = group(map(fault, names))
    assert found.subject.startswith("m.007.w, m.8.w, m.\u0669.w and 1 more")


def test_figures_that_differ_are_one_finding_that_shows_the_first() -> None:
    (found,) = group(fault(f"m.layers.{i}.w", f"[{i}, 4]") for i in range(28))
    assert (found.subject, found.found, found.count) == ("m.layers.{0..27}.w", "[0, 4] (in the first)", 28)


def test_grouping_twice_is_grouping_once() -> None:
    once = group(fault(f"m.layers.{i}.w", f"{i}") for i in range(28))
    assert group(once) == once


# --- real runs ---


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def validate(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `ckptq validate` in this process."""
    monkeypatch.delenv("COLUMNS", raising=False)

    def run(*arguments: str | Path) -> Ran:
        with pytest.raises(SystemExit) as stop:
            main(["validate", *map(str, arguments)])
        out, err = capfd.readouterr()
        assert isinstance(stop.value.code, int)
        return Ran(stop.value.code, out, err)

    return run


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """An output of ckptq's, and broken copies of it."""
    root = tmp_path_factory.mktemp("reports")
    good = root / "good"
    few = "calibration={source: builtin, samples: 2, sequence_length: 16}"
    recipe = load_recipe("demo", [few], model=str(EXAMPLE), output=str(good))
    convert(prepare(recipe), resume=False, device="cpu", memory=None, console=Console(quiet=True))

    def copy(name: str) -> Path:
        return Path(shutil.copytree(good, root / name))

    exclude(copy("tower"), ["lm_head", "model.embed_tokens"])
    add(copy("kv"), {f"visual.blocks.{i}.attn.{k}_proj.{k}_scale": torch.tensor(0.01) for i in range(4) for k in "kv"})
    add(copy("hostile"), {name: torch.zeros(1) for name in HOSTILE if len(name) < 1000})
    lossy = copy("lossy")
    (lossy / "hf_quant_config.json").unlink()
    (lossy / "ckptq.json").unlink()
    (copy("unreadable") / "config.json").write_text("{")
    return {path.name: path for path in root.iterdir()}


def exclude(folder: Path, names: list[str]) -> None:
    for file, section, key in (
        ("config.json", "quantization_config", "ignore"),
        ("hf_quant_config.json", "quantization", "exclude_modules"),
    ):
        body = json.loads((folder / file).read_text())
        body[section][key] = names
        (folder / file).write_text(json.dumps(body))


def add(folder: Path, new: dict[str, torch.Tensor]) -> None:
    index = json.loads((folder / INDEX).read_text())
    file = max(index["weight_map"].values())
    save_file(load_file(folder / file) | new, folder / file, metadata={"format": "pt"})
    index["weight_map"] |= dict.fromkeys(new, file)
    (folder / INDEX).write_text(json.dumps(index))


CODES = {"good": 0, "lossy": 0, "tower": 1, "kv": 1, "hostile": 1, "unreadable": 2, "absent": 2}


@pytest.mark.parametrize(("name", "code"), CODES.items())
def test_exit_codes_and_reports(name: str, code: int, folders: Mapping[str, Path], validate: Run, tmp_path: Path) -> None:
    """Whatever happens the reports are written, say what stdout says, and hold to their formats."""
    folder = folders.get(name, tmp_path / "absent")
    kept = {format: tmp_path / f"report.{format}" for format in ("json", "junit")}
    ran = {
        format: validate(folder, "--format", format, *(f"--report={f}={path}" for f, path in kept.items()))
        for format in ("human", "json", "junit", "github")
    }
    assert {r.code for r in ran.values()} == {code}
    assert ran["json"].out == kept["json"].read_text(encoding="ascii")
    assert untimed(ran["junit"].out) == untimed(kept["junit"].read_text(encoding="ascii"))
    said = json.loads(ran["json"].out)
    check_json(said)
    check_junit(ran["junit"].out, said)
    check_github(ran["github"].out, said)
    assert (said["exit_code"], said["ok"], said["checkpoint"]) == (code, code == 0, str(folder))
    assert bool(said["error"]) == (code == 2)
    assert bool(ran["human"].out) == (code != 2)
    for r in ran.values():
        assert ("error: " in r.err) == (code == 2), "a refusal is told on stderr, whatever the format"
        assert not ACTED_ON.search(r.out + r.err), "something a terminal acts on"


def untimed(xml: str) -> str:
    return re.sub(r' time="[\d.]+"', "", xml)


def check_json(said: dict[str, Any]) -> None:
    """Against the schema, in which every key must be described."""
    closed = json.loads(json.dumps(SCHEMA))

    def close(node: Any) -> None:
        if isinstance(node, dict):
            if "properties" in node:
                node.setdefault("additionalProperties", False)
            for value in node.values():
                close(value)

    close(closed)
    Draft202012Validator(closed).validate(said)


def check_junit(xml: str, said: dict[str, Any]) -> None:
    """What GitLab's and Jenkins' readers want: names, class names, and counts that are those of the elements."""
    suites = ElementTree.fromstring(xml)
    (suite,) = suites
    assert (suites.tag, suite.tag) == ("testsuites", "testsuite")
    cases = suite.findall("testcase")
    for element in (suites, suite):
        assert element.attrib["name"]
        assert float(element.attrib["time"]) >= 0
        assert int(element.attrib["tests"]) == len(cases)
        for attribute, kind in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert int(element.attrib[attribute]) == sum(case.find(kind) is not None for case in cases)
    assert all(case.attrib["classname"] and case.attrib["name"] for case in cases)
    assert len({case.attrib["name"] for case in cases}) == len(cases)
    failing = {case.attrib["name"]: case.find("failure") for case in cases}
    counted = [f for f in said["findings"] if said["strict"] or f["severity"] == "error"]
    for name, failure in failing.items():
        codes = {f["code"] for f in counted if f["code"].partition(".")[0] == name}
        if failure is not None:
            assert failure.attrib["type"] in codes
            assert all(code in f"{failure.attrib['message']}{failure.text}" for code in codes)
    assert {f["code"].partition(".")[0] for f in counted} == {name for name, failure in failing.items() if failure is not None}
    assert (said["error"] is not None) == (cases[0].find("error") is not None)


LINE = re.compile(r"::(error|warning|notice) title=([^:,]*)(?:,file=([^:,]*))?::(.*)")


def check_github(text: str, said: dict[str, Any]) -> None:
    """Nothing but annotations of ours: one a line, and no other command inside."""
    lines = [LINE.fullmatch(line) for line in text.splitlines()]
    assert all(lines)
    shown = [(m[1], unquote(m[2]), unquote(m[4])) for m in lines if m]
    level = {"error": "error", "warning": "error" if said["strict"] else "warning"}
    if said["error"]:
        assert [level for level, _, _ in shown] == ["error"]
        return
    assert shown[-1][0] == "notice"
    assert len(shown) - 1 == len(said["findings"])
    for finding, (level_, title, message) in zip(sorted(said["findings"], key=lambda f: f["severity"]), shown[:-1], strict=True):
        assert (level_, title) == (level[finding["severity"]], finding["code"])
        assert finding["mend"] in message
        assert not re.search(r"(^|\s)::[a-z-]+[ :]|##\[", message)


def test_strict_makes_warnings_count(folders: Mapping[str, Path], validate: Run) -> None:
    strict = validate(folders["lossy"], "--strict", "--format", "json")
    said = json.loads(strict.out)
    check_json(said)
    assert (strict.code, said["ok"], said["strict"], said["counts"]["warnings"]) == (1, False, True, 1)
    assert said["findings"][0]["severity"] == "warning"
    check_junit(validate(folders["lossy"], "--strict", "--format", "junit").out, said)
    check_github(validate(folders["lossy"], "--strict", "--format", "github").out, said)
    assert "FAILED: 1 warning, which --strict counts as errors" in validate(folders["lossy"], "--strict").out
    assert validate(folders["good"], "--strict").code == 0


def test_the_summary_says_what_was_checked_and_what_not(folders: Mapping[str, Path], validate: Run) -> None:
    shown = " ".join(validate(folders["good"]).out.split())
    assert f"{folders['good']}: OK: no findings rules vLLM 0.32 (tried on the real one)" in shown
    assert "method modelopt: 42 linears in ModelOpt FP8; 23 not quantized; FP8 KV cache" in shown
    assert "checked layout (225 tensors), values (14.5 MB), changes since it was made (225 tensors) unchecked" in shown
    unchecked = shown.partition(" unchecked ")[2].partition(" next ")[0]
    for option in ("--source SRC", "--tp N or --ep", "--load"):
        assert option in unchecked
    assert shown.endswith(f"next ckptq validate {folders['good']} --source SRC")
    more = " ".join(validate(folders["good"], "--source", EXAMPLE, "--tp", "1", "--ep").out.split())
    assert "the source (14.5 MB), several GPUs (--tp 1 --ep)" in more
    assert "--source SRC" not in more
    read = next(server.version for server in SERVERS.values() if server.verified == "read")
    less = " ".join(validate(folders["good"], "--no-values", "--vllm", f"{read}.1").out.split())
    assert "unchecked values (left out by --no-values), changes since it was made (left out by --no-values), the source" in less
    assert "unchecked" not in validate(folders["tower"]).out, "there is something else to do first"
    bare = " ".join(validate(folders["lossy"]).out.split())
    assert "changes since it was made (no ckptq.json)" in bare
    assert f"rules vLLM {read} (read in its source, not tried)" in less


def test_a_fault_in_every_layer_is_told_once(folders: Mapping[str, Path], validate: Run) -> None:
    shown = validate(folders["tower"]).out
    assert shown.count("layout.not-excluded") == 1
    assert "(22 places)" in shown
    assert "visual.blocks.{0..3}.attn.qkv.weight" in shown
    assert "FAILED: 1 error at 22 places" in shown


def test_the_case_this_began_with_is_explained(folders: Mapping[str, Path], validate: Run) -> None:
    shown = " ".join(validate(folders["kv"]).out.split())
    assert "visual.blocks.{0..3}.attn.k_proj.k_scale" in shown
    assert "KeyError: 'blocks.0.attn.k_proj.k_scale'" in shown
    assert "`visual*` on the exclude list is no help" in shown


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--report", "xml=x"], "--report xml=x: expected FORMAT=FILE with json or junit"),
        (["--report", "junit="], "--report junit=: expected FORMAT=FILE"),
        (["--report", "json=no/where/x.json"], "can't be written: there is no folder no/where"),
        (["--vllm", "0.1"], "--vllm 0.1: the rules of this version are not known; known: " + ", ".join(SERVERS)),
        (["--tp", "0"], "Invalid value for '--tp'"),
        (["--vllm-python", "no/python", "--load"], "no program that can be run"),
    ],
)
def test_options_that_are_wrong(options: list[str], problem: str, folders: Mapping[str, Path], validate: Run) -> None:
    ran = validate(folders["good"], *options)
    assert ran.code == 2
    assert problem in ran.err


def test_why_a_check_did_not_run(folders: Mapping[str, Path], validate: Run, tmp_path: Path) -> None:
    def skipped(name: str, *options: str, **files: str) -> dict[str, str]:
        folder = Path(shutil.copytree(folders[name], tmp_path / f"{name}{len(list(tmp_path.iterdir()))}"))
        for stem, text in files.items():
            (folder / f"{stem}.json").write_text(text)
        check_json(said := json.loads(validate(folder, "--format", "json", *options).out))
        found: dict[str, str] = said["skipped"]
        return found

    assert "record" not in skipped("good")
    assert skipped("good", "--no-values")["record"] == "left out by --no-values"
    assert skipped("lossy")["record"] == "no ckptq.json"
    assert skipped("good", ckptq="{}")["record"] == "no digests in ckptq.json"
    assert skipped("good", ckptq="{")["record"] == "ckptq.json can't be read"
    assert "parallel" not in skipped("good", "--tp", "2")
    assert skipped("good")["parallel"] == "needs --tp N or --ep"
    config = json.loads((folders["good"] / "config.json").read_text())
    config["quantization_config"]["quant_algo"] = None
    unbuilt = skipped("good", "--tp", "2", config=json.dumps(config))
    assert {unbuilt[group] for group in ("layout", "kv", "parallel")} == {"the configs don't say what will be built"}
    refused = skipped("unreadable")
    assert set(refused.values()) == {"not reached"}
    assert {"layout", "record", "server"} <= set(refused)


def test_rules_of_another_version_than_the_one_that_loaded() -> None:
    """Here as text; the real one is asked for its version below."""
    for loaded in ("", "0.32.0", "0.32.1+cpu"):
        assert other_version(loaded, SERVERS["0.32"]) == []
    (found,) = other_version("0.32.0", SERVERS["0.20"])
    assert (found.code, found.severity) == ("server.version", "warning")
    assert "vLLM 0.20" in found.found
    assert version(Path(sys.executable)) == "", "there is none here"


def test_one_thing_is_in_the_singular() -> None:
    assert [amount(n, "steps") for n in (0, 1, 2)] == ["0 steps", "1 step", "2 steps"]
    assert amount(1, "bytes") == "1 B"


def test_a_wrong_version_is_in_the_report_too(folders: Mapping[str, Path], validate: Run, tmp_path: Path) -> None:
    assert validate(folders["good"], "--vllm", "0.1", f"--report=json={tmp_path / 'r.json'}").code == 2
    said = json.loads((tmp_path / "r.json").read_text())
    check_json(said)
    assert said["error"]["kind"] == "UnsupportedError"
    assert (said["rules"], said["asked"]["vllm"]) == (None, "0.1")


@pytest.mark.server
def test_the_real_server_is_in_the_report(folders: Mapping[str, Path], validate: Run, tmp_path: Path) -> None:
    """Of a sound checkpoint, and of one with a method that ckptq has no rules for, under another version's rules."""
    python = ROOT / ".venv-vllm" / "bin" / "python"
    options = ("--load", "--vllm-python", python, "--no-values")
    ran = validate(folders["good"], *options, f"--report=json={tmp_path / 'r.json'}")
    said = json.loads((tmp_path / "r.json").read_text())
    check_json(said)
    assert (ran.code, said["server"]["quantization"], said["skipped"].get("server")) == (0, "modelopt", None)
    assert version(python) == said["server"]["version"]
    assert said["rules"]["version"] == minor(said["server"]["version"])
    shown = " ".join(ran.out.split())
    assert "the real server unchecked values" in shown
    assert f"vLLM {said['server']['version']} on cpu loaded it as modelopt, KV cache fp8_e4m3, in " in shown
    other = Path(shutil.copytree(folders["good"], tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    assert validate(other).code == 2
    ran = validate(other, *options, "--vllm", "0.26", "--format", "json")
    check_json(said := json.loads(ran.out))
    assert (ran.code, [f["code"] for f in said["findings"]]) == (1, ["server.failed", "server.alone", "server.version"])


def test_headers_of_a_hub_model_are_enough_without_values(folders: Mapping[str, Path], tmp_path: Path) -> None:
    with HubServer("org/fp8", {"main": folders["good"]}) as hub:
        there = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        asked = [sys.executable, "-m", "ckptq", "validate", "org/fp8@main", "--no-values", "--format", "json"]
        done = subprocess.run(asked, cwd=ROOT, env={**os.environ, **there}, capture_output=True, text=True)
        sent = sum(n for file, n in hub.sent.items() if file.endswith(".safetensors"))
    check_json(said := json.loads(done.stdout))
    assert (done.returncode, said["checkpoint"], said["resolved"]) == (0, "org/fp8@main", f"org/fp8@{commit_of('main')}")
    assert 0 < sent < sum(path.stat().st_size for path in folders["good"].glob("*.safetensors")) / 10


# --- terminals and logs ---


def on_a_terminal(*arguments: str | Path, **environment: str) -> str:
    """stdout of `ckptq validate` in a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", **environment}
    command_line = [sys.executable, "-m", "ckptq", "validate", *map(str, arguments)]
    with subprocess.Popen(command_line, stdout=theirs, stderr=subprocess.DEVNULL, env=environment, cwd=ROOT) as process:
        os.close(theirs)
        shown = b"".join(iter(lambda: _read(ours), b""))
    os.close(ours)
    assert process.returncode in (0, 1)
    return shown.decode()


def _read(end: int) -> bytes:
    select.select([end], [], [])
    try:
        return os.read(end, 65536)
    except OSError:  # EIO: the other end is closed
        return b""


COLOR = re.compile(r"\x1b\[[\d;]*[34]\d[\d;]*m")


def test_colors_on_a_terminal_alone(folders: Mapping[str, Path], validate: Run) -> None:
    shown = on_a_terminal(folders["tower"])
    assert COLOR.search(shown)
    assert max(len(line) for line in re.sub(r"\x1b\[[\d;]*m", "", shown).splitlines()) <= 80 + len(str(folders["tower"]))
    assert not COLOR.search(on_a_terminal(folders["tower"], NO_COLOR="1"))
    assert "\x1b" not in on_a_terminal(folders["tower"], TERM="dumb")
    assert "\x1b" not in validate(folders["tower"]).out


# --- anything at all, in every format ---

ANYTHING = st.text(st.characters(), max_size=30) | st.sampled_from(HOSTILE)


def facts(served: Served) -> dict[str, Any]:
    return {key: value for key, value in asdict(served).items() if key != "findings"}


FINDINGS = st.builds(
    Finding,
    code=st.sampled_from([*sorted(codes.catalog())[:5], "values.not-finite"]),
    severity=st.sampled_from(["error", "warning"]),
    subject=ANYTHING,
    expected=ANYTHING,
    found=ANYTHING,
    effect=ANYTHING,
    mend=st.just("mend it"),
    count=st.integers(1, 30),
)
OUTCOMES = st.builds(
    Outcome,
    checkpoint=st.text(st.characters(), min_size=1, max_size=30),
    asked=st.builds(Asked, values=st.booleans(), strict=st.booleans(), load=st.booleans()),
    findings=st.lists(FINDINGS, max_size=4).map(tuple),
    checked=st.just((Checked("layout", 225, "tensors", 0.25),)),
    served=st.none()
    | st.builds(Served, findings=st.just(()), version=st.just("0.32.0"), load_seconds=st.floats(), text=ANYTHING).map(facts),
) | st.builds(lambda message: refused("somewhere", Asked(), SourceError(message, hint=message)), ANYTHING)


@settings(deadline=None)
@given(OUTCOMES)
def test_any_name_in_any_format(outcome: Outcome) -> None:
    said = json.loads(written("json", outcome))
    check_json(said)
    assert said == json.loads(json.dumps(data(outcome)))
    check_junit(written("junit", outcome), said)
    check_github(written("github", outcome), said)
    with redirect_stdout(StringIO()) as shown:
        show(Console(), outcome)
    assert not ACTED_ON.search(shown.getvalue())
    for format in ("json", "junit", "github"):
        text = written(format, outcome)
        assert "##[" not in text
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
        if format != "github":
            assert text.isascii()


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_the_runner_reads_back_what_was_meant(message: str, title: str) -> None:
    """Undone as the runner undoes it, each escape by itself, the percent sign last."""
    line = command("error", message, title=title)
    assert "\n" not in line
    assert "\r" not in line
    head, _, body = line.removeprefix("::error title=").partition("::")
    assert ":" not in head
    assert "," not in head
    for sign, escape in (("\r", "%0D"), ("\n", "%0A"), (":", "%3A"), (",", "%2C"), ("%", "%25")):
        head = head.replace(escape, sign)
        body = body.replace(escape, sign) if sign not in ":," else body
    assert (body, head) == (message, title)


def test_github_counts_what_it_does_not_show() -> None:
    many = tuple(fault(f"x{i}", code=f"layout.c{chr(97 + i)}") for i in range(25))
    lines = written("github", Outcome("x", findings=many)).splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["::error"] * 10 + ["::notice"]
    assert "16 more: layout.cj, " in lines[9]


def test_verdicts() -> None:
    one, many, soft = fault("x"), replace(fault("y"), count=28), warning("c", "s", "e", "f", "f", "m")
    assert verdict([]) == "OK: no findings"
    assert verdict([soft]) == "OK: 1 warning"
    assert verdict([one, many, soft, soft]) == "FAILED: 2 errors at 29 places, 2 warnings"
    assert verdict([soft], strict=True) == "FAILED: 1 warning, which --strict counts as errors"


def test_the_next_step_is_the_next_deeper_check() -> None:
    asked = Asked(values=False)
    assert next_command(Outcome("a b", asked)) == "ckptq validate 'a b'"
    asked = replace(asked, values=True)
    assert next_command(Outcome("d", asked)) == "ckptq validate d --source SRC"
    asked = replace(asked, source="s")
    assert next_command(Outcome("d", asked)) == "ckptq validate d --source s --load"
    asked = replace(asked, load=True, tp=4)
    assert next_command(Outcome("d", asked)) == "vllm serve d --tensor-parallel-size 4"
    assert next_command(Outcome("o/n@v1", asked, resolved="o/n@abc")) == "vllm serve o/n --revision v1 --tensor-parallel-size 4"


def test_reports_go_where_they_were_asked_to(tmp_path: Path) -> None:
    here = tmp_path / "a=b.xml"
    assert destinations([f"junit={here}", f"json={tmp_path / 'x'}"]) == {here: "junit", tmp_path / "x": "json"}


# --- what is documented ---


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)


def test_the_list_of_codes_is_current() -> None:
    assert (ROOT / "docs" / "findings.md").read_text(encoding="utf-8") == catalog.markdown(), "run `make docs`"


def test_every_code_that_is_given_is_listed() -> None:
    """And every listed one is of the form that the schema describes, with a meaning."""
    form = re.compile(SCHEMA["$defs"]["finding"]["properties"]["code"]["pattern"])
    for name, code in codes.catalog().items():
        assert form.match(name)
        assert code.meaning
        assert not code.meaning.endswith(".")
    assert set(_given()) <= set(codes.catalog())


def _given() -> Iterator[str]:
    for path in (ROOT / "ckptq" / "validators").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("error", "warning"):
                yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant))


def test_severities_are_read_off_the_source() -> None:
    found = catalog.severities()
    assert found["layout.not-excluded"] == "error"
    assert found["config.disagree"] == "warning"
    assert found["server.unwritten"] == "error or warning"
