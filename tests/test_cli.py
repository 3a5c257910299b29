"""The command line as a user meets it: exit codes, what goes to which stream, both formats, and what is not imported."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from make_checkpoint import PRESETS, make_checkpoint
from make_quantized import make_quantized

from ckptq import __version__
from ckptq.cli import main
from ckptq.console import duration, size
from ckptq.recipe import shipped

REPOSITORY = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "modelopt", "greenlet", "pyarrow", "numpy", "PIL")
TEXT = ("--set", "calibration={source: builtin, samples: 2, sequence_length: 16}")
Run = Callable[..., "Result"]


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def ckptq(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Runs a command line in this process, from the repository's root."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.delenv("COLUMNS", raising=False)
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: str | Path) -> Result:
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        assert isinstance(stop.value.code, int)
        return Result(stop.value.code, out, err)

    yield run
    signal.signal(signal.SIGTERM, before)


CHILD = """\
import json, sys
from ckptq.cli import main
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as stop:
        peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
        print(json.dumps({"code": stop.code, "modules": sorted(sys.modules), "peak": peak * 1024}), file=sys.stderr)
"""


def child(*commands: tuple[str | Path, ...]) -> list[dict[str, Any]]:
    """Runs the commands one after the other in a process of its own; says of each: exit code, modules imported, peak memory."""
    arguments = json.dumps([[str(a) for a in command] for command in commands])
    done = subprocess.run([sys.executable, "-c", CHILD, arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stderr.splitlines() if line.startswith('{"code"')]


# What is printed where


def test_help(ckptq: Run) -> None:
    shown = ckptq("--help")
    assert (shown.code, shown.err) == (0, "")
    for command in ("convert", "validate", "inspect", "recipes"):
        assert re.search(rf"^  {command}  .*[.]$", shown.out, re.MULTILINE), f"{command}: no whole sentence about it"
        of_it = ckptq(command, "-h")
        assert (of_it.code, of_it.err) == (0, "")
        assert of_it.out.startswith(f"Usage: ckptq {command} ")
    assert "org/name[@revision]" in ckptq("convert", "--help").out


def test_no_command(ckptq: Run) -> None:
    shown = ckptq()
    assert (shown.code, shown.out) == (2, "")
    assert "Usage: " in shown.err
    assert "error" not in shown.err


def test_version(ckptq: Run) -> None:
    assert ckptq("--version") == Result(0, f"{__version__}\n", "")


@pytest.mark.parametrize("name", sorted(shipped()))
def test_a_recipe_is_printed_as_it_is(name: str, ckptq: Run) -> None:
    shown = ckptq("recipes", name)
    assert shown == Result(0, (REPOSITORY / "recipes" / f"{name}.yaml").read_text(), "")
    assert ckptq("recipes", f"{name}.yaml") == shown
    assert {"quantize", "components"} & yaml.safe_load(shown.out).keys()


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["recipes", "qwen25vl-lm-mxfp4"], "no shipped recipe 'qwen25vl-lm-mxfp4'; did you mean qwen25vl-lm-mxfp4-compress", ""),
        (["convret"], "No such command 'convret'. Did you mean 'convert'?", "--help"),
        (["convert"], "Missing option '--recipe'.", "convert --help"),
        (["inspect"], "Missing argument 'SRC'.", "inspect --help"),
        (["convert", "--recipe", "demo", "--bogus"], "No such option: --bogus", "convert --help"),
        (
            ["convert", "--recipe", "demo", "--format", "yaml"],
            "Invalid value for '--format': 'yaml' is not one of",
            "convert --help",
        ),
        (
            ["convert", "--recipe", "dmo"],
            "dmo: no such file, and no shipped recipe of that name; did you mean demo?",
            "ckptq recipes",
        ),
        (["recipes", "dmo"], "no shipped recipe 'dmo'; did you mean demo?", "ckptq recipes"),
        (["recipes", "zzz"], "no shipped recipe 'zzz'", "ckptq recipes"),
        (["convert", "--recipe", "demo", "--set", "model=", "--dry-run"], "the recipe names no model", "--model SRC"),
        (["convert", "--recipe", "demo", "--set", "output="], "the recipe names no output", "--output OUT"),
        (["convert", "--recipe", "demo", "--memory", "3x"], "--memory: expected a size such as 5GB or 512MiB, found '3x'", ""),
        (["convert", "--recipe", "demo", "--memory", "3MB"], "--memory 3 MB: too little: ", "give --memory "),
        (["convert", "--recipe", "demo", "--device", "abacus"], "--device abacus: no such device", "auto, cpu or cuda:N"),
        (["convert", "--recipe", "demo", "--model", "no/where/at/all"], "no/where/at/all: no such folder", "org/name"),
        (["inspect", "no/where/at/all"], "no/where/at/all: no such folder", "org/name"),
        (["validate", "no/where/at/all"], "no/where/at/all: no such folder", "org/name"),
        (
            ["convert", "--recipe", "demo", "--set", "keep=[visula]", "--dry-run"],
            "keep pattern 'visula' matches no module",
            "inspect",
        ),
    ],
)
def test_usage_errors(arguments: list[str], error: str, hint: str, ckptq: Run, tmp_path: Path) -> None:
    """Exit code 2, nothing on stdout, the error first and then what to do; and nothing is written."""
    if arguments[0] == "convert" and "output=" not in arguments:
        arguments = [*arguments, "--output", str(tmp_path / "out")]
    shown = ckptq(*arguments)
    assert (shown.code, shown.out) == (2, "")
    first, *rest = [line for line in shown.err.splitlines() if not line.startswith("warning: ")]
    assert first.startswith(f"error: {error}")
    assert hint in " ".join(rest)
    assert not (tmp_path / "out" / "config.json").exists()


def test_mistakes_of_a_recipe_are_listed(ckptq: Run, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("quantise: []\nkeep: 3\nkv_cache: fp4\n")
    shown = ckptq("convert", "--recipe", tmp_path / "r.yaml", "--dry-run")
    assert (shown.code, shown.out) == (2, "")
    assert shown.err.splitlines() == [
        f"error: {tmp_path / 'r.yaml'}: 4 mistakes",
        "  - quantize: is required",
        "  - keep (line 2): expected a valid list, found 3",
        "  - kv_cache (line 3): expected 'fp8', found 'fp4'",
        "  - quantise (line 1): unknown key; did you mean quantize?",
    ]


# Both formats

Facts = Callable[[Mapping[str, Any]], list[str]]


def of_plan(data: Mapping[str, Any]) -> list[str]:
    calibration = data["calibration"]
    return [
        size(data["source_bytes"]),
        size(data["output_bytes"]),
        f"{len(data['shards'])} files",
        data["scope"],
        data["format"],
        *data["config_changes"],
        *data["files_copied"],
        *data["files_left_out"],
        *{d["rule"].partition(": ")[2] for d in data["decisions"] if d["action"] != "keep"},
        *{d["action"] for d in data["decisions"]},
        size(data["peak_memory_bytes"]),
        size(data["peak_memory_one_sample_a_wave_bytes"]),
        *(
            [
                f"{calibration['samples']} samples",
                f"{calibration['tokens_at_most']} tokens",
                f"{calibration['flops_at_most']:.3g} FLOPs",
            ]
        ),
        *finding_words(data["findings"]),
    ]


def of_report(data: Mapping[str, Any]) -> list[str]:
    tensors = [f"{count} {dtype}" for dtype, count in data["tensors"].items()]
    sizes = [size(data["source_bytes"]), size(data["output_bytes"])]
    return [data["output"], *sizes, *tensors, data["serve"], *finding_words(data["findings"])]


def of_inspect(data: Mapping[str, Any]) -> list[str]:
    facts = [data["checkpoint"], *data["architectures"], *data["files_left_out"]]
    facts += [data["scope"], data["scope_source"], f"{data['layers']} layers"] if data["scope"] else [data["no_scope"]]
    for name, part in data["parts"].items():
        facts += [name, str(part["tensors"]), f"{part['parameters']:,}", size(part["bytes"]), *part["dtypes"]]
    fitting = {name: touched["rules"] for name, touched in data["recipes"].items() if not touched["error"]}
    for name in data["suggested"] or fitting:
        facts += [*fitting[name], *map(str, fitting[name].values())]
    reasons = {touched["error"] for touched in data["recipes"].values()} - {None}
    return [*facts, *fitting, *(reasons if len(reasons) == 1 and not fitting else [])]


def of_validate(data: Mapping[str, Any]) -> list[str]:
    return [data["checkpoint"], "OK" if data["ok"] else "FAILED", *finding_words(data["findings"])]


def finding_words(findings: list[Mapping[str, Any]]) -> list[str]:
    return [str(f[key]) for f in findings for key in ("code", "severity", "subject", "expected", "found", "mend")]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, copy_model: Callable[[Path], Path]) -> dict[str, str]:
    """Folders that the commands below speak of: the example with a stray copy of its weights, one without scope, an output."""
    root = tmp_path_factory.mktemp("cli")
    model = copy_model(root)
    (model / "consolidated.00.pth").write_bytes(b"x")
    other = shutil.copytree(model, root / "other")
    (other / "config.json").write_text((model / "config.json").read_text().replace("Qwen2_5_VLFor", "SomethingFor"))
    return {"MODEL": str(model), "OTHER": str(other), "OUT": str(root / "out")}


COMMANDS: list[tuple[str, Facts]] = [
    ("recipes", lambda data: [*data, *(word for text in data.values() for word in text.split())]),
    ("recipes demo", lambda data: [data["text"]]),
    ("inspect MODEL", of_inspect),
    ("inspect MODEL --recipe demo", of_inspect),
    ("inspect OTHER", of_inspect),
    ("convert --recipe demo --model MODEL --dry-run", of_plan),
    ("convert --recipe demo --model MODEL --output OUT --resume TEXT", of_report),
    ("validate OUT", of_validate),
    ("validate OUT --source MODEL", of_validate),
    ("inspect OUT", of_inspect),
]


@pytest.mark.parametrize(("command", "facts"), COMMANDS, ids=[c for c, _ in COMMANDS])
def test_both_formats_say_the_same(command: str, facts: Facts, places: dict[str, str], ckptq: Run) -> None:
    """JSON is one object and all of stdout; each of its facts is in the tables too; talk is on stderr alone."""
    arguments = [places.get(word, word) for word in command.split() if word != "TEXT"] + (list(TEXT) if "TEXT" in command else [])
    as_json, human = ckptq(*arguments, "--format", "json"), ckptq(*arguments)
    assert as_json.code == human.code
    assert as_json.code == 0
    data = json.loads(as_json.out)
    assert isinstance(data, dict)
    shown = squeezed(human.out)
    for fact in facts(data):
        assert squeezed(fact) in shown
    assert not human.out.startswith("{")


def squeezed(text: str) -> str:
    """Without spaces and rules, at which a table may fold a text."""
    return re.sub(r"[\s─]", "", text)


@pytest.mark.parametrize("columns", [80, 120])
def test_tables_fit(columns: int, places: dict[str, str], ckptq: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for command in ("recipes", "convert --recipe demo --dry-run --model MODEL"):
        lines = ckptq(*[places.get(word, word) for word in command.split()]).out.splitlines()
        assert max(map(len, lines)) <= columns
    assert any("model.layers.{0..5}.post_attention_layernorm " in line for line in lines), "a name is folded"


# What it costs


def test_no_heavy_imports(example_model: Path, tmp_path: Path) -> None:
    """Help, recipes, inspect, a dry run, findings and errors import nothing that takes long."""
    faulty = make_quantized(example_model, tmp_path / "faulty", sparse=True)
    config = (faulty / "config.json").read_text()
    (faulty / "config.json").write_text(config.replace('"visual*"', '"visual.nothing"'))
    light = child(
        ("--help",),
        ("convert", "--help"),
        ("recipes",),
        ("recipes", "demo"),
        ("inspect", example_model),
        ("inspect", example_model, "--recipe", "demo", "--format", "json"),
        ("convert", "--recipe", "demo", "--dry-run"),
        ("convert", "--recipe", "demo", "--dry-run", "--format", "json"),
        ("convert", "--recipe", "demo", "--set", "x=3"),
        ("validate", "--help"),
        *(("validate", faulty, "--no-values", "--format", format) for format in ("human", "json", "junit", "github")),
    )
    assert [done["code"] for done in light] == [0] * 8 + [2, 0] + [1] * 4
    for done in light:
        assert not set(HEAVY) & set(done["modules"])
    assert "rich" not in light[1]["modules"]


def test_without_calibration_nothing_asks_for_its_memory(ckptq: Run, tmp_path: Path) -> None:
    """What only samples need is neither promised nor asked for; a path given for nothing is said to be so."""
    job = ("convert", "--recipe", "qwen25vl-lm-fp8-block-fp8", "--model", "examples/tiny-qwen2.5-vl", "--output", tmp_path / "out")
    plan = ckptq(*job, "--dry-run")
    assert plan.code == 0
    assert re.search(r"peak memory +about \d+ MB *\n", plan.out)
    assert re.search(r"output +\S+ MB in 1 file, format fp8", plan.out)
    data = json.loads(ckptq(*job, "--dry-run", "--format", "json").out)
    assert data["peak_memory_one_sample_a_wave_bytes"] == data["peak_memory_bytes"] < 400e6
    (tmp_path / "ckptq.json").write_text('{"job": {}, "amax": {}}')
    assert re.search(r"calibration +not needed", ckptq(*job, "--dry-run", "--amax", tmp_path).out)
    made = ckptq(*job, "--memory", "1MB")
    assert (made.code, made.err.count("error")) == (0, 0)


def test_dry_run_of_a_checkpoint_of_72b(tmp_path: Path) -> None:
    """147 GB by its headers: planned and checked in 150 MB, without torch. benchmarks measure the time."""
    model = make_checkpoint(tmp_path / "72b", **PRESETS["72b"])
    (done,) = child(("convert", "--recipe", "qwen25vl-lm-fp8", "--model", model, "--dry-run"))
    assert done["code"] == 0
    assert done["peak"] < 150e6
    assert not set(HEAVY) & set(done["modules"])


# How things are worded


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1234567, "1.23 MB"),
        (999_600_000, "1 GB"),
        (147e9, "147 GB"),
        (2.5e15, "2500 TB"),
    ],
)
def test_size(nbytes: float, text: str) -> None:
    assert size(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (60, "1 min 00 s"), (75.2, "1 min 15 s"), (3600, "1 h 00 min"), (75060, "20 h 51 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


INTERRUPTED = """\
import os, signal, sys
from importlib.abc import MetaPathFinder
from ckptq.cli import main

class Broken(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "transformers":
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                raise ImportError("a library half imported") from None

sys.meta_path.insert(0, Broken())
main(sys.argv[1:])
"""


def test_interrupted_in_an_import_that_makes_an_error_of_it() -> None:
    model = str(REPOSITORY / "examples/tiny-qwen2.5-vl")
    arguments = [sys.executable, "-c", INTERRUPTED, "compare", model, model, "--samples", "1"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.endswith("stopping; once more stops at once\ninterrupted\n")
    assert "Traceback" not in done.stderr
