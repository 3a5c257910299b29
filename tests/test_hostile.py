"""Checkpoints made to do harm: each ends in findings (exit code 1) or a refusal (2), in bounded memory, and nothing in it runs.

What tests/test_checkpoint.py tries on the reader alone is tried here through the command line. Random breakage, for longer than
a test may take: tests/fuzz_validate.py.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fuzz_validate
import pytest
from corpus.bases import folder
from fuzz_validate import INDEX, OWN, SECTIONS, TARGETS, Attack, Room, harmless
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptq.cli import main
from ckptq.folder import printable
from ckptq.validate import group
from ckptq.validators import error

SHARDED, ONE_FILE = OWN
WEIGHTS = "model.safetensors"
OTHER = "hf_quant_config.json"
Change = Callable[[Path], object]


@pytest.fixture
def at(tmp_path: Path) -> Path:
    """A good export in one file, free to break."""
    return shutil.copytree(folder(ONE_FILE), tmp_path / "out")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return shutil.copytree(folder(SHARDED), tmp_path / "sharded")


@pytest.fixture(scope="module")
def room() -> Iterator[Room]:
    with Room() as made:
        yield made


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


@pytest.fixture
def validate(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Said]]:
    """Runs `ckptq validate` in this process. No traceback, no fault of ours, and nothing that a terminal acts on."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def run(at: Path, *options: str) -> Said:
        with pytest.raises(SystemExit) as stop:
            main(["validate", str(at), *options])
        out, err = capfd.readouterr()
        harmless(out + err)
        assert "Traceback" not in err
        assert stop.value.code in (0, 1, 2), err
        return Said(int(stop.value.code), out, err)

    yield run
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)


def child(at: Path, *options: str) -> tuple[Said, int]:
    """(what it said, peak memory in MB) of a process with limits on its memory and its time."""
    limits = "import resource as r; r.setrlimit(r.RLIMIT_AS, (4 << 30,) * 2); r.setrlimit(r.RLIMIT_CPU, (120, 120))"
    # Not ru_maxrss, which keeps the peak of the process that started this one.
    peak = "print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0], file=sys.stderr)"
    script = f"{limits}\nimport sys\nfrom ckptq.cli import main\ntry:\n    main(sys.argv[1:])\nfinally:\n    {peak}\n"
    done = subprocess.run(
        [sys.executable, "-c", script, "validate", str(at), *options],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    err, _, last = done.stderr.rstrip("\n").rpartition("\n")
    harmless(done.stdout + err)
    assert "Traceback" not in err
    return Said(done.returncode, done.stdout, err), int(last) >> 10


# --- edits ---


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def write_header(path: Path, header: bytes, data: bytes = b"") -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def header(change: Callable[[dict[str, Any]], object], more: bytes = b"") -> Change:
    """Changes the header and leaves the data, to which `more` is added."""

    def apply(at: Path) -> None:
        entries, data = header_of(at / WEIGHTS)
        change(entries)
        write_header(at / WEIGHTS, json.dumps(entries).encode(), data + more)

    return apply


def added(name: str, dtype: str, shape: list[int], nbytes: int) -> Change:
    """One more tensor at the end of the file."""

    def put(entries: dict[str, Any]) -> None:
        end = max(e["data_offsets"][1] for n, e in entries.items() if n != "__metadata__")
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}

    return header(put, b"\x01" * nbytes)


def first(change: Callable[[dict[str, Any]], object]) -> Change:
    return header(lambda entries: change(next(e for n, e in entries.items() if n != "__metadata__")))


def replaced(file: str, old: str, new: str) -> Change:
    def apply(at: Path) -> None:
        text = (at / file).read_text()
        assert old in text
        (at / file).write_text(text.replace(old, new, 1))

    return apply


def config(change: Callable[[dict[str, Any]], object], file: str = "config.json") -> Change:
    def apply(at: Path) -> None:
        data = json.loads((at / file).read_text())
        change(data)
        (at / file).write_text(json.dumps(data))

    return apply


def raw_header(text: bytes) -> Change:
    return lambda at: write_header(at / WEIGHTS, text)


# --- headers ---

HEADERS: dict[str, tuple[Change, str]] = {
    "longer than the file": (lambda at: (at / WEIGHTS).write_bytes(b"\xff" * 8 + b"{}"), "truncated"),
    "longer than allowed, in a sparse file": (
        lambda at: ((at / WEIGHTS).write_bytes((1 << 39).to_bytes(8, "little")), os.truncate(at / WEIGHTS, 1 << 40)),
        "at most 100000000 bytes",
    ),
    "empty file": (lambda at: (at / WEIGHTS).write_bytes(b""), "truncated"),
    "overlap": (first(lambda e: e.update(data_offsets=[n - 2 for n in e["data_offsets"]])), "understood"),
    "gap": (header(lambda _: None, b"more"), "truncated or overlong"),
    "beyond the end": (first(lambda e: e.update(data_offsets=[n + (1 << 40) for n in e["data_offsets"]])), "a gap or an overlap"),
    "backwards": (first(lambda e: e.update(data_offsets=e["data_offsets"][::-1])), "should take"),
    "offsets beyond 64 bits": (first(lambda e: e.update(data_offsets=[0, 1 << 64])), "understood"),
    "sizes that overflow": (first(lambda e: e.update(shape=[1 << 33, 1 << 33])), "larger than any file"),
    "a dtype nobody knows": (first(lambda e: e.update(dtype="F8_E9M9")), "expected a dtype of"),
    "65 dimensions": (first(lambda e: e.update(shape=[1] * 65)), "at most 64"),
    "half a byte": (added("x", "F4", [3], 2), "whole bytes"),
    "a long name": (added("x" * 1001, "F32", [], 4), "at most 1000 characters"),
    "a key twice": (
        lambda at: write_header(at / WEIGHTS, b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}'), "stands twice",
    ),
    "NaN": (raw_header(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,0]}}'), "NaN is no JSON number"),
    "5,000 digits": (raw_header(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}}'), "5000 digits"),
    "100,000 brackets": (raw_header(b"[" * 100_000), "not JSON"),
    "half a surrogate pair": (raw_header(b'{"\\ud800":{}}'), "surrogate"),
    "not UTF-8": (raw_header(b'{"\xff":{}}'), "not UTF-8"),
    "metadata with numbers": (header(lambda e: e.update(__metadata__={"a": 1})), "__metadata__"),
    "a list": (raw_header(b"[]"), "not a JSON object"),
    "names with escapes": (raw_header(b'{"\\u001b[31m\\u0007":7}'), "\\x1b[31m"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), HEADERS.values(), ids=HEADERS)
def test_a_header_that_can_not_be_read(change: Change, message: str, at: Path, validate: Callable[..., Said]) -> None:
    change(at)
    said = validate(at)
    assert said.code == 2
    assert WEIGHTS in said.err
    assert message in said.err
    assert json.loads(validate(at, "--format", "json").out)["error"]["kind"] == "SourceError"


ODD: dict[str, tuple[Change, str]] = {
    "no tensor at all": (raw_header(b"{}"), "layout.missing-tensor"),
    "no size": (added("model.layers.0.x", "F32", [0, 7], 0), "layout.unknown-tensor"),
    "no size, and 2^60 columns": (added("model.layers.0.self_attn.k_proj.x_scale", "U8", [0, 1 << 60], 0), "layout.unknown-tensor"),
    "a scalar weight": (added("model.layers.0.mlp.x.weight", "F8_E4M3", [], 1), "layout.unknown-tensor"),
    "an empty name": (added("", "F32", [], 4), "layout.unknown-tensor"),
    "a number that int() does not read": (added("model.layers." + "9" * 900 + ".x", "F32", [], 4), "layout.unknown-tensor"),
    "digits of another script": (added("model.layers.\u0663.self_attn.k_proj.k_scale", "F32", [], 4), "layout.stray-scale"),
    "a layer without end": (added("model.layers." + "1." * 400 + "k_scale", "F32", [], 4), "layout.stray-scale"),
    "six-bit codes": (added("model.layers.0.x", "F6_E2M3", [4], 3), "layout.unknown-tensor"),
    "a complex scale": (added("model.layers.0.y.k_scale", "C64", [], 8), "layout.stray-scale"),
    "64 dimensions": (added("visual.blocks.0.attn.k_scale", "F32", [1] * 64, 4), "layout.kv-on-tower"),
}


@pytest.mark.parametrize(("change", "code"), ODD.values(), ids=ODD)
def test_odd_tensors_are_findings(change: Change, code: str, at: Path, validate: Callable[..., Said]) -> None:
    change(at)
    said = validate(at, "--format", "json")
    assert said.code == 1
    assert code in {f["code"] for f in json.loads(said.out)["findings"]}


EVIL = "model.\x1b[2J\x07\r\nlayers\u202e.\x00::error file=x::##[add-mask]\u2028.k_scale"


@pytest.mark.parametrize("format", ["human", "json", "junit", "github"])
def test_names_do_nothing_to_a_terminal_or_a_runner(format: str, sharded: Path, validate: Callable[..., Said]) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"][EVIL] = next(iter(index["weight_map"].values()))
    (sharded / INDEX).write_text(json.dumps(index))
    (sharded / os.fsdecode(b"evil\x1b[31m\n::error::\xff.bin")).write_bytes(b"")
    section = json.loads((sharded / "config.json").read_text())["quantization_config"]
    config(lambda data: data.update(quantization_config={**section, "quant_algo": EVIL}))(sharded)
    said = validate(sharded, "--format", format)
    assert said.code == 1
    lines = [line for line in said.out.splitlines() if line.lstrip().startswith(("::", "##"))]
    assert all(line.startswith(("::error title=", "::warning title=", "::notice title=")) for line in lines)
    assert not lines or format == "github"
    assert "##[" not in said.out


@pytest.mark.parametrize("where", ["tensor", "refusal"])
def test_names_in_a_header_do_nothing_either(where: str, at: Path, validate: Callable[..., Said]) -> None:
    (added(EVIL, "F32", [], 4) if where == "tensor" else added(EVIL, "F32", [2], 4))(at)
    for format in ("human", "json", "junit", "github"):
        assert validate(at, "--format", format).code == (1 if where == "tensor" else 2)


@given(st.text(max_size=300))
def test_printable_text_stays_on_its_line(text: str) -> None:
    said = printable(text)
    assert said.isprintable()
    assert 1 <= len(said) <= 10 * 200
    assert said == text or not text.isprintable() or len(text) > 200 or not text


def test_names_of_a_thousand_numbers_are_joined() -> None:
    findings = [error("layout.unknown-tensor", f"{'1.' * 900}{i}", "x", "y", "z", "mend") for i in range(3)]
    assert [f.count for f in group(findings)] == [3]


# --- JSON ---

TEXTS: dict[str, str] = {
    "NaN": '{"architectures": NaN}',
    "Infinity": '{"architectures": -Infinity}',
    "a number out of range": '{"a": 1e999}',
    "41 digits": '{"a": ' + "1" * 41 + "}",
    "a key twice": '{"a": 1, "a": 2}',
    "a key twice, deep": '{"a": [{"b": 1, "b": 1}]}',
    "101 deep": '{"a":' * 101 + "1" + "}" * 101,
    "100,000 deep": "[" * 100_000,
    "half a surrogate pair": '{"a": "\\udc00"}',
    "a comment": '{"a": 1} // so',
    "a comma too many": '{"a": 1,}',
    "cut off": '{"a": ',
    "empty": "",
    "a byte order mark": '\ufeff{"a": 1}',
    "NUL": '{"a": "\0"}',
    "no object": "7",
}


@pytest.mark.parametrize("file", ["config.json", "hf_quant_config.json", INDEX])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_files_that_are_no_json(text: str, file: str, sharded: Path, validate: Callable[..., Said]) -> None:
    if file == OTHER:
        config(lambda data: data.pop("quantization_config"))(sharded)  # else the file counts for nothing
    (sharded / file).write_text(text)
    said = validate(sharded, "--no-values")
    assert said.code == 2
    assert file in said.err


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_file_that_counts_for_nothing_is_a_warning(text: str, sharded: Path, validate: Callable[..., Said]) -> None:
    (sharded / OTHER).write_text(text)
    said = validate(sharded, "--no-values")
    assert said.code == 0
    assert "config.hf-quant-config" in said.out


@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_files_in_another_encoding(file: str, sharded: Path, validate: Callable[..., Said]) -> None:
    (sharded / file).write_bytes("{}".encode("utf-16"))
    assert validate(sharded, "--no-values").code == 2


PLACES = [
    "../out/x.safetensors",
    "/etc/x.safetensors",
    "sub/x.safetensors",
    "..",
    "",
    "\x1b[31m.safetensors",
    "x" * 300,
    7,
    None,
    [],
]


@pytest.mark.parametrize("place", PLACES)
def test_an_index_that_leads_out_of_the_folder(place: Any, sharded: Path, validate: Callable[..., Said]) -> None:
    config(lambda index: index["weight_map"].update({"lm_head.weight": place}), INDEX)(sharded)
    said = validate(sharded)
    assert said.code == 2
    assert "lm_head.weight is said to lie in" in said.err


# --- what lies in the folder ---


def test_a_folder_of_the_hub_s_cache_is_read_through_its_links(tmp_path: Path, validate: Callable[..., Said]) -> None:
    """models--org--name/{blobs,snapshots/REVISION}: every file a link to ../../blobs/DIGEST."""
    blobs, snapshot = tmp_path / "models--o--n" / "blobs", tmp_path / "models--o--n" / "snapshots" / ("a" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder(SHARDED).iterdir())):
        shutil.copy(file, blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    assert validate(snapshot).code == 0
    (snapshot / "README.md").symlink_to("../../blobs/../../secret")
    (tmp_path / "secret").write_text("x")
    assert validate(snapshot).code == 2


LINKED = [WEIGHTS, "config.json", "hf_quant_config.json", "tokenizer.json", "a.bin"]


@pytest.mark.parametrize("name", LINKED)
def test_a_link_out_of_the_folder_is_refused(name: str, at: Path, tmp_path: Path, validate: Callable[..., Said]) -> None:
    target = tmp_path / "elsewhere"
    shutil.copy(folder(ONE_FILE) / name if (at / name).exists() else at / "config.json", target)
    (at / name).unlink(missing_ok=True)
    (at / name).symlink_to(target)
    said = validate(at)
    assert said.code == 2
    assert f"{name}: a link out of the folder" in said.err


@pytest.mark.parametrize("target", ["/dev/zero", "/proc/self/mem", "/etc/passwd", "nowhere", WEIGHTS])
def test_weights_that_are_a_link_to_something_else(target: str, at: Path, validate: Callable[..., Said]) -> None:
    (at / WEIGHTS).unlink()
    (at / WEIGHTS).symlink_to(target)
    assert validate(at).code == 2


KINDS: dict[str, Callable[[Path], object]] = {
    "folder": Path.mkdir,
    "named pipe": os.mkfifo,
    "socket": lambda path: socket.socket(socket.AF_UNIX).bind(os.path.relpath(path)),
}


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "hf_quant_config.json", INDEX])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file(kind: str, name: str, at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: whoever opens the pipe waits forever."""
    monkeypatch.chdir(at)
    (at / name).unlink(missing_ok=True)
    KINDS[kind](at / name)
    said, _ = child(at)
    assert said.code == (0 if (kind, name) == ("folder", OTHER) else 2)
    assert name in said.out + said.err


def test_pipes_among_other_files(at: Path) -> None:
    os.mkfifo(at / "pytorch_model.bin")
    said, _ = child(at)
    assert (said.code, "expected a regular file, found a named pipe" in said.err) == (2, True)


def test_a_circle_of_links_and_deep_folders(at: Path, validate: Callable[..., Said]) -> None:
    (at / "loop").symlink_to(".")
    assert validate(at).code == 0
    (at / "/".join("d" * 40)).mkdir(parents=True)
    said = validate(at)
    assert (said.code, "at most 32 deep" in said.err) == (2, True)


class Mine:
    """Unpickled, it would run a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


WATCHED = """\
import os, sys
opened = []
sys.addaudithook(lambda event, arguments: opened.append((event, str(arguments[0]))) if event in WATCHED else None)
WATCHED = {"open", "pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "socket.connect", "ctypes.dlopen"}
from ckptq.cli import main
try:
    main(sys.argv[1:])
finally:
    for event, what in opened:
        print(event, what, file=sys.stderr)
"""


def test_nothing_is_unpickled_imported_or_run(at: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    run = f"open({str(marker)!r}, 'w')\n"
    for name in ("tokenizer.py", "modeling_x.py", "configuration_x.py", "sitecustomize.py", "__init__.py", "setup.py"):
        (at / name).write_text(run)
    for name in ("pytorch_model.bin", "model.pt", "optimizer.pt", "x.ckpt", "original/consolidated.00.pth"):
        (at / name).parent.mkdir(exist_ok=True)
        (at / name).write_bytes(pickle.dumps(Mine(marker)))
    (at / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    own = {key: f"{module}.X" for key, module in (("AutoConfig", "configuration_x"), ("AutoModel", "modeling_x"))}
    config(lambda data: data.update(auto_map=own, trust_remote_code=True))(at)
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, "validate", str(at), "--source", str(fuzz_validate.BASES[ONE_FILE].source)],
        cwd=at, env={**os.environ, "PYTHONSAFEPATH": "1"}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    assert not marker.exists()
    events = [
        line.split(" ", 1) for line in done.stderr.splitlines() if line.startswith(("open ", "pickle", "os.", "sub", "socket"))
    ]
    opened = {Path(what).name for event, what in events if event == "open" and Path(what).is_relative_to(at)}
    assert {"config.json"} <= opened
    assert not {name for name in opened if name.endswith((".py", ".bin", ".pt", ".pth", ".ckpt"))}
    assert {event for event, _ in events} == {"open"}


# --- sizes ---


def excluding(count: int, text: str, times: int = 1) -> Change:
    return config(lambda data: data["quantization_config"].update(ignore=[f"{text * times}{i}" for i in range(count)]))


def many_tensors(count: int, name: str) -> Change:
    def apply(at: Path) -> None:
        one = '"%s":{"dtype":"F32","shape":[],"data_offsets":[%d,%d]}'
        text = "{" + ",".join(one % (name % i, 4 * i, 4 * i + 4) for i in range(count)) + "}"
        write_header(at / WEIGHTS, text.encode(), bytes(4 * count))

    return apply


def experts(layers: int, count: int) -> Change:
    return config(
        lambda data: (
            data.update(architectures=["Qwen3MoeForCausalLM"], num_experts=count, num_hidden_layers=layers),
            data.pop("text_config", None),
        )
    )


BOMBS: dict[str, tuple[Change, int]] = {
    "a header of spaces": (lambda at: write_header(at / WEIGHTS, b"{}" + b" " * 60_000_000), 1),
    "a header of one text": (lambda at: write_header(at / WEIGHTS, b'{"a":"' + b"x" * 60_000_000 + b'"}'), 2),
    "a header of brackets": (lambda at: write_header(at / WEIGHTS, b"[" * 60_000_000), 2),
    "a header of empty objects": (lambda at: write_header(at / WEIGHTS, b"[" + b"{}," * 30_000_000 + b"0]"), 2),
    "100,000 tensors": (many_tensors(100_000, "model.layers.%d.x.k_scale"), 1),
    "a config of wide characters": (lambda at: (at / "config.json").write_text('{"a":"' + "\U0001f600" * 3_900_000 + '"}'), 2),
    "a config longer than allowed": (lambda at: os.truncate(at / "config.json", 1 << 40), 2),
    "a config of 900,000 keys": (config(lambda data: data.update({str(i): i for i in range(900_000)})), 0),
    "a config of 3,000,000 deep": (lambda at: (at / "config.json").write_text('{"a":' * 3_000_000), 2),
    "a million names of architectures": (config(lambda data: data.update(architectures=["A"] * 1_000_000)), 2),
    "4,096 layers": (config(lambda data: [d.update(num_hidden_layers=4096) for d in (data, data["text_config"])]), 1),
    "4,096 experts in each of 4,096 layers": (experts(4096, 4096), 2),
    "65,536 experts": (experts(128, 512), 1),
    "a million exclusions": (excluding(1_000_000, "q"), 2),
    "20,000 exclusions": (excluding(20_000, "visual.x"), 1),
    "an exclusion of 15 MB": (excluding(1, "*a", 7_500_000), 2),
    "an exclusion of many stars": (excluding(1, "*a", 2000), 1),
}  # fmt: skip
MOST_MB = 450


@pytest.mark.parametrize(("change", "code"), BOMBS.values(), ids=BOMBS)
def test_memory_stays_bounded(change: Change, code: int, at: Path) -> None:
    change(at)
    said, peak = child(at, "--no-values")
    assert said.code == code, said.err
    assert peak < MOST_MB


def test_the_pass_over_values_takes_no_memory_for_a_large_tensor(at: Path) -> None:
    """2 GB of zeros that take no disk, in one tensor of the checkpoint's last file."""
    size = 2 << 30
    text = json.dumps({"x": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}).encode()
    write_header(at / WEIGHTS, text)
    os.truncate(at / WEIGHTS, 8 + len(text) + size)
    said, peak = child(at)
    assert said.code == 1
    assert peak < MOST_MB


EXPRESSIONS = [
    "re:(.|.|.)*$^",
    "re:(a*)*b",
    "re:[",
    "re:" + "(" * 2000,
    "re:((((a{1,999}){1,999}){1,999}){1,999}){1,999}",
    "re:(?R)",
    "re:(a|(?1))*$",
    "re:",
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions_that_take_forever_are_given_up(expression: str, at: Path) -> None:
    config(lambda data: data.update(quantization_config=section("compressed-tensors", ignore=[expression])))(at)
    said, peak = child(at, "--no-values")
    assert said.code in (1, 2)
    assert peak < MOST_MB


# --- any value anywhere ---


def section(method: str, **changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(SECTIONS[method]), **changes}


WRONG: tuple[Any, ...] = (None, True, -1, 10**39, 1e308, "", "x\x1b", [], {}, [None], [[]], [-1, "x"], {"": {"": None}}, "re:[")


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*at, key)
        yield from paths(value[key], (*at, key))


def with_value(data: Any, path: tuple[Any, ...], value: Any) -> bytes:
    data = copy.deepcopy(data)
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return json.dumps(data).encode()


def own_config() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder(ONE_FILE) / "config.json").read_text())
    return data


@pytest.mark.parametrize("method", ["modelopt", *SECTIONS])
def test_every_field_of_a_section_with_every_wrong_type(method: str, room: Room) -> None:
    data = {**own_config(), **({} if method == "modelopt" else {"quantization_config": section(method)})}
    for path in paths(data["quantization_config"]):
        for value in WRONG:
            fuzz_validate.run(Attack(ONE_FILE, "config.json", 0, with_value(data, ("quantization_config", *path), value)), room)


def test_every_field_of_the_model_with_every_wrong_type(room: Room) -> None:
    data = own_config()
    ends = set()
    for path in paths({key: value for key, value in data.items() if key != "quantization_config"}):
        for mode, value in enumerate(WRONG):
            ends.add(fuzz_validate.run(Attack(ONE_FILE, "config.json", mode * 2, with_value(data, path, value)), room))
    assert {"findings", "clean", "SourceError", "UnsupportedError"} <= ends


def test_every_field_of_a_model_of_experts_with_every_wrong_type(room: Room) -> None:
    data = own_config()
    text = data.pop("text_config", {})
    data |= {**text, "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "moe_intermediate_size": 128}
    data |= {"decoder_sparse_step": 1, "mlp_only_layers": [0], "head_dim": 64}
    for key in ("num_experts", "moe_intermediate_size", "decoder_sparse_step", "mlp_only_layers", "head_dim", "hidden_size"):
        for mode, value in enumerate((*WRONG, 0, 1 << 62, [10**39, True, "0"])):
            fuzz_validate.run(Attack(ONE_FILE, "config.json", mode * 2, with_value(data, (key,), value)), room)


NUMBERS = st.integers(-(10**39), 10**39) | st.floats(allow_nan=False, allow_infinity=False)
NAMES = st.sampled_from(fuzz_validate.KEYS) | st.text(max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(method=st.sampled_from(["modelopt", *SECTIONS]), value=JSON, place=st.integers(0, 999), mode=st.integers(0, 139))
def test_any_json_anywhere_in_a_config(method: str, value: Any, place: int, mode: int, room: Room) -> None:
    data = {**own_config(), **({} if method == "modelopt" else {"quantization_config": section(method)})}
    every = list(paths(data))
    fuzz_validate.run(Attack(ONE_FILE, "config.json", mode, with_value(data, every[place % len(every)], value)), room)


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    base=st.sampled_from(OWN),
    target=st.sampled_from(TARGETS),
    mode=st.integers(0, 139),
    seed=st.integers(0, 1 << 32),
    raw=st.booleans(),
)
def test_fuzzed_files_end_in_findings_or_a_refusal(base: str, target: str, mode: int, seed: int, raw: bool, room: Room) -> None:
    """The short form of fuzz_validate.py, the same on each run."""
    content = fuzz_validate.good(base, target)
    if content is not None:
        rng = random.Random(seed)
        changed = fuzz_validate.scrambled(content, rng) if raw else fuzz_validate.mutated(content, rng)
        fuzz_validate.run(Attack(base, target, mode, changed), room)


def test_the_seeds_of_the_fuzzer_are_read(room: Room) -> None:
    """Else it would fuzz refusals alone."""
    for attack in fuzz_validate.seeds(OWN)[: -len(SECTIONS)]:
        assert fuzz_validate.run(Attack(attack.base, attack.target, 0, attack.content), room) == "clean"
    assert fuzz_validate.read_attack(fuzz_validate.seeds(OWN)[0].raw()) == fuzz_validate.seeds(OWN)[0]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10 < 4096
