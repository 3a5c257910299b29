"""`validate --load` and `--generate`: the process, what the tracker sees, and what is said of the real vLLM's loads and answers."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus.bases import BASES, folder
from corpus.edit import Edit, alter, both, dequantized, drop, edit_json, put, rows, to
from hypothesis import given, settings
from hypothesis import strategies as st
from peers.answers import PYTHON, trace

import ckptq.validators
from ckptq.console import Console
from ckptq.convert import convert, prepare
from ckptq.errors import UnsupportedError
from ckptq.recipe import load_recipe
from ckptq.validate import group
from ckptq.validators import Finding, vllm_answers
from ckptq.validators.vllm_load import load, served
from ckptq.validators.vllm_storage import Intervals
from ckptq.validators.vllm_track import Tracker

ROOT = Path(__file__).parent.parent
SHIM = str(ROOT / "tests/server/shim")
DENSE, SHARDED, MOE = "vl-modelopt-fp8kv-ckptq-onefile", "vl-modelopt-fp8kv-ckptq", "moe-modelopt-fp8kv-peer"
NVFP4, W4A16, MXFP8 = "vl-modelopt-nvfp4kv-ckptq", "vl-modelopt-w4a16-peer", "vl-modelopt-mxfp8-peer"
INT8, CT_NVFP4, MXFP4 = "vl-ct-int8-ckptq", "vl-ct-nvfp4kv-peer", "vl-ct-mxfp4-ckptq"
MIXED = "vl-modelopt-mixedkv-peer"
MOE_NVFP4, MOE_W4A16, MOE_CT = "moe-modelopt-nvfp4kv-peer", "moe-ct-nvfp4a16-ckptq", "moe-ct-nvfp4kv-ckptq"
A = "model.layers.0.self_attn"
E = "model.layers.1.mlp.experts"
Said = set[tuple[str, str, str]]
"""(severity, code, subject)."""


def said(findings: Iterable[Finding]) -> Said:
    return {(f.severity, f.code.removeprefix("server."), f.subject) for f in group(findings)}


# --- sets of bytes, and the tracker, on torch alone ---

Span = st.tuples(st.integers(0, 60), st.integers(0, 60))


@settings(deadline=None)
@given(spans=st.lists(Span, max_size=12), window=Span.map(sorted))
def test_intervals_are_sets(spans: list[tuple[int, int]], window: list[int]) -> None:
    kept, expected = Intervals(), set[int]()
    for start, stop in spans:
        kept.add(start, stop)
        expected |= {*range(start, stop)}
    assert {i for a, b in kept.within(*window) for i in range(a, b)} == expected & {*range(*window)}
    assert {i for a, b in kept.gaps(*window) for i in range(a, b)} == {*range(*window)} - expected
    assert kept.count(*window) == len(expected & {*range(*window)})
    edges = [edge for pair in zip(kept.starts, kept.stops, strict=True) for edge in pair]
    assert edges == sorted({*edges}), "sorted, disjoint, and none touches another"


def track(
    stored: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor], work: Callable[[], object]
) -> tuple[Any, Any]:
    tracker = Tracker()
    tracker.begin(parameters.items())
    for key, tensor in stored.items():
        tracker.source(key, tensor)
    with tracker.mode():
        work()
    assert tracker.problems == []
    return tracker.finish(parameters.items())


@settings(deadline=None)
@given(data=st.data())
def test_every_element_that_a_copy_touches_is_known(data: st.DataObject) -> None:
    """A loader that narrows both sides, as those of fused and sharded linears do; the masks are filled beside it."""
    stored, parameter = torch.randn(8, 6), torch.zeros(9, 6)
    read, written = torch.zeros(8, 6, dtype=torch.bool), torch.zeros(9, 6, dtype=torch.bool)
    pieces = data.draw(st.lists(st.tuples(*(st.integers(0, n) for n in (7, 8, 5, 7, 5))), max_size=5))
    turned = data.draw(st.booleans())

    def work() -> None:
        for row, target, column, height, width in pieces:
            high, wide = min(height, 8 - row, 9 - target), min(width, 6 - column)
            across = slice(column, column + wide)
            source = stored.T[across].narrow(1, row, high).T if turned else stored[row : row + high, across]
            parameter.narrow(0, target, high)[:, across].copy_(source.to(torch.bfloat16))
            read[row : row + high, across] = True
            written[target : target + high, across] = True

    keys, parameters = track({"k": stored}, {"p": parameter}, work)
    assert mask(keys["k"]["unread"], read)
    assert keys["k"]["read"] == int(read.sum())
    assert mask(parameters["p"]["unwritten"], written)
    assert parameters["p"]["written"] == int(written.sum())


def mask(gaps: list[tuple[int, int]], expected: torch.Tensor) -> bool:
    found = torch.ones(expected.numel(), dtype=torch.bool)
    for first, end in gaps:
        found[first:end] = False
    return torch.equal(found, expected.reshape(-1))


def test_a_shape_is_no_read_and_a_template_no_copy() -> None:
    stored, parameter = torch.ones(4), torch.zeros(4)
    keys, parameters = track(
        {"k": stored}, {"p": parameter}, lambda: (stored[1:], torch.zeros_like(stored), parameter[:2].fill_(1.0))
    )
    assert keys["k"]["read"] == 0
    assert (parameters["p"]["written"], parameters["p"]["unwritten"], parameters["p"]["keys"]) == (2, [(2, 4)], [])


def test_values_that_a_cast_changes_are_counted() -> None:
    stored, parameter = torch.tensor([1.0, 1.0625, math.nan, 500.0]), torch.zeros(4, dtype=torch.float8_e4m3fn)
    keys, _ = track({"k": stored}, {"p": parameter}, lambda: parameter.copy_(stored))
    assert keys["k"]["casts"] == [{"to": "torch.float8_e4m3fn", "parameter": "p", "elements": 4, "changed": 2}]


def test_an_item_filled_in_is_its_tensors() -> None:
    stored, parameter = torch.tensor(0.25), torch.zeros(3)
    keys, parameters = track({"k": stored}, {"p": parameter}, lambda: parameter[1].fill_(stored.item()))
    assert keys["k"]["parameters"] == ["p"]
    assert parameters["p"]["unwritten"] == [(0, 1), (2, 3)]


def test_no_neighbor_of_the_child_has_the_name_of_a_standard_module() -> None:
    """Python puts the folder of vllm_child.py first on its path until the child takes it off."""
    names = {path.stem for path in Path(ckptq.validators.__path__[0]).iterdir()}
    assert names & sys.stdlib_module_names == set()


# --- log-probabilities ---


@pytest.mark.parametrize(
    ("logprobs", "codes"),
    [
        ([[-0.1], [-0.2, -3.0]], []),
        ([[-0.1, -math.inf]], []),
        ([[-0.1], [math.nan, -3.0]], ["not-finite"]),
        ([[math.inf]], ["not-finite"]),
        ([], ["not-finite"]),
        ([[-0.1, -0.1]], ["no-distribution"]),
        ([[0.5]], ["no-distribution"]),
        ([[math.log(0.6), math.log(0.4)]], []),
        ([[-math.log(512)], [-math.log(512), -math.log(512)]], ["flat"]),
        ([[-math.log(512)], [-1.0]], []),
    ],
)
def test_log_probabilities_are_judged(logprobs: list[list[float]], codes: list[str]) -> None:
    assert [f.code for f in vllm_answers.judge(logprobs, 512)] == [f"server.{code}" for code in codes]


LIKELY = {"7": -0.1, "8": -4.0}
GENERATED = {"text": "", "vocabulary": 512, "prompt": [-2.0, -3.0], "likeliest": ["7", "9"], "logprobs": [LIKELY], "images": []}


@pytest.mark.parametrize(
    ("change", "codes"),
    [
        ({}, []),
        ({"prompt": [-6.0, -6.4]}, []),  # chance is -6.24
        ({"prompt": [-6.0, -8.0]}, ["worse-than-chance"]),
        ({"prompt": [-1.0, -math.inf]}, ["worse-than-chance"]),
        ({"likeliest": ["7", "7"]}, ["constant"]),
        ({"prompt": [-6.0, -8.0], "likeliest": ["7", "7"]}, ["worse-than-chance"]),
        ({"images": [{"logprobs": [LIKELY]}, {"logprobs": [{**LIKELY, "8": -4.1}]}]}, []),
        ({"images": [{"logprobs": [LIKELY]}, {"logprobs": [LIKELY]}]}, ["blind"]),
        ({"images": [{"logprobs": [LIKELY]}, {"logprobs": [{"7": math.nan}]}]}, ["not-finite"]),
        (
            {"logprobs": [{"7": math.nan}], "images": [{"logprobs": [{"7": math.nan}]}, {"logprobs": [{"7": math.nan}]}]},
            ["not-finite"],
        ),
    ],
)
def test_answers_are_judged(change: Mapping[str, Any], codes: list[str]) -> None:
    assert [f.code for f in vllm_answers.check({**GENERATED, **change})] == [f"server.{code}" for code in codes]


# --- the process ---


def program(path: Path, text: str) -> Path:
    path.write_text(textwrap.dedent(text))
    path.chmod(0o755)
    return path


def test_what_is_no_program_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no program that can be run; expected a Python interpreter") as caught:
        load(tmp_path, tmp_path / "python")
    assert "--vllm-python" in str(caught.value.hint)


@pytest.mark.parametrize("code", [0, 3])
def test_a_program_that_is_no_interpreter_is_refused(tmp_path: Path, code: int) -> None:
    other = program(tmp_path / "other", f"#!/bin/sh\necho what is this\nexit {code}\n")
    with pytest.raises(UnsupportedError, match="no Python interpreter that ckptq can use: what is this") as caught:
        load(tmp_path, other)
    assert "--vllm-python" in str(caught.value.hint)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="can't be started: Exec format error"):
        load(tmp_path, program(tmp_path / "other", "\x7fELF"))


def test_an_interpreter_without_vllm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="has no vLLM") as caught:
        load(tmp_path, Path(sys.executable))
    assert "--vllm-python" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("raise OSError('libcudart.so: no such file')", "its vLLM can't be imported: OSError: libcudart.so: no such file"),
        ("__version__ = '0.2.0'", "no vLLM that ckptq can watch: vLLM 0.2.0: ModuleNotFoundError: No module named 'vllm.engine'"),
    ],
)
def test_a_vllm_that_cannot_be_used_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, init: str, message: str) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").write_text(init)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UnsupportedError, match=message):
        load(tmp_path, Path(sys.executable))


def test_a_death_is_said_with_the_last_words(tmp_path: Path) -> None:
    dies = program(tmp_path / "dies", '#!/bin/sh\n: >"$3"\necho first\necho out of memory >&2\nkill -9 $$\n')
    (finding,) = load(tmp_path, dies).findings
    assert (finding.code, finding.severity) == ("server.failed", "error")
    assert finding.found == "ended by signal 9; it said last:\nfirst\nout of memory"


# Starts another process, which would outlive it, and waits.
WAITS = '#!/bin/sh\n: >"$3"\nsleep 1000 &\necho $! >"{}"\necho waiting\nwait\n'


def test_after_the_time_limit_all_its_processes_are_gone(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    (finding,) = load(tmp_path, program(tmp_path / "waits", WAITS.format(pid)), timeout=0.5).findings
    assert finding.code == "server.timeout"
    assert finding.found == "not within 0.5 s; it said last:\nwaiting"
    assert gone(int(pid.read_text()))


def test_after_an_interrupt_all_its_processes_are_gone(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    waits = program(tmp_path / "waits", WAITS.format(pid))

    def interrupt(*_: object) -> None:
        if pid.exists() and pid.read_text():
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            load(tmp_path, waits)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert gone(int(pid.read_text()))


def test_it_does_not_outlive_a_ckptq_that_is_killed(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").write_text(
        f"import os, time\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\ntime.sleep(1000)\n"
    )
    code = (
        "import sys; from pathlib import Path; from ckptq.validators.vllm_load import load; load(Path('.'), Path(sys.executable))"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)}) as ckptq:
        while not (pid.exists() and pid.read_text()):
            assert ckptq.poll() is None
            time.sleep(0.05)
        ckptq.kill()
    assert gone(int(pid.read_text()))


def gone(pid: int) -> bool:
    """Within some seconds: an orphan is taken off the list by another process."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)
    return False


# --- what the real vLLM loads ---


def nothing(folder: Path) -> None:
    """Stays as it is."""


def no_cache(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config["quantization_config"].pop("kv_cache_scheme"))
    edit_json(folder / "hf_quant_config.json", lambda config: config["quantization"].pop("kv_cache_quant_algo"))


def without_a_file(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def another_goes_first(folder: Path) -> None:
    """Files of the name that Mistral's have are loaded in the place of all others."""
    before = (folder / "model.safetensors").read_bytes()
    put({"model.extra.weight": torch.zeros(2)})(folder)
    (folder / "consolidated.safetensors").write_bytes(before)


KV = "model.layers.{0,1}.self_attn.k_proj.k_scale, model.layers.{0,1}.self_attn.v_proj.v_scale"
LOADS: dict[str, tuple[str, Edit, Said]] = {
    "good": (DENSE, nothing, set()),
    "good shards": (SHARDED, nothing, set()),
    "good experts": (MOE, nothing, set()),
    "a norm in F32": (DENSE, alter(to(torch.float32), "model.norm.weight"), set()),
    "a scale in BF16": (DENSE, alter(to(torch.bfloat16), f"{A}.o_proj.weight_scale"), set()),
    "a KV scale of one element": (DENSE, alter(lambda t: t.reshape(1), f"{A}.k_proj.k_scale"), set()),
    "one shard's scale missing": (
        DENSE,
        drop(f"{A}.k_proj.weight_scale"),
        {("error", "unwritten", f"{A}.k_proj.weight_scale")},
    ),
    "one shard's input scale missing": (
        DENSE,
        drop(f"{A}.k_proj.input_scale"),
        {("warning", "unwritten", f"{A}.k_proj.input_scale")},
    ),
    "head missing": (DENSE, drop("lm_head.weight"), {("error", "unwritten", "lm_head.weight")}),
    "a bias missing": (DENSE, drop(f"{A}.q_proj.bias"), {("error", "unwritten", f"{A}.q_proj.bias")}),
    "too many rows": (DENSE, alter(rows(16), f"{A}.q_proj.weight"), {("error", "truncated", f"{A}.q_proj.weight")}),
    "BF16 where FP8 belongs": (DENSE, dequantized(f"{A}.o_proj.weight"), {("error", "lossy-cast", f"{A}.o_proj.weight")}),
    "codes as U8": (
        DENSE,
        alter(lambda t: t.view(torch.uint8), f"{A}.o_proj.weight"),
        {("error", "lossy-cast", f"{A}.o_proj.weight")},
    ),
    "values that BF16 rounds": (
        DENSE,
        alter(lambda t: t.float() * 1.001, "model.norm.weight"),
        {("warning", "lossy-cast", "model.norm.weight")},
    ),
    "a bias that no linear has": (
        DENSE,
        put({f"{A}.o_proj.bias": torch.zeros(256, dtype=torch.bfloat16)}),
        {("warning", "ignored-key", f"{A}.o_proj.bias")},
    ),
    "no FP8 cache for the scales": (DENSE, no_cache, {("warning", "ignored-key", KV)}),
    "no scales for the FP8 cache": (
        DENSE,
        drop("*.k_scale", "*.v_scale"),
        {("warning", "unwritten", "model.layers.{0,1}.self_attn.k_proj.k_scale, model.layers.{0,1}.self_attn.v_proj.v_scale")},
    ),
    "one scale missing for the FP8 cache": (
        DENSE,
        drop(f"{A}.v_proj.v_scale"),
        {("error", "unwritten", f"{A}.v_proj.v_scale")},
    ),
    "scales on the tower": (DENSE, put({"visual.blocks.0.attn.k_proj.k_scale": torch.tensor(0.01)}), {("error", "failed", "")}),
    "a file missing": (SHARDED, without_a_file, {("error", "failed", "")}),
    "another file goes first": (
        DENSE,
        another_goes_first,
        {("error", "ignored-key", "model.extra.weight")},
    ),
    **{f"good {base}": (base, nothing, set()) for base in (NVFP4, W4A16, MXFP8, MIXED, INT8, CT_NVFP4, MXFP4)},
    "NVFP4: one shard's input scale missing": (
        NVFP4,
        drop(f"{A}.k_proj.input_scale"),
        {("error", "unwritten", f"{A}.k_proj.input_scale")},
    ),
    "NVFP4: one shard's scale of the whole tensor missing": (
        W4A16,
        drop(f"{A}.v_proj.weight_scale_2"),
        {("error", "unwritten", f"{A}.v_proj.weight_scale_2")},
    ),
    "NVFP4: scales of groups missing": (
        NVFP4,
        drop(f"{A}.o_proj.weight_scale"),
        {("error", "failed", ""), ("error", "unwritten", f"{A}.o_proj.weight_scale")},
    ),
    "NVFP4: scales of groups in F32": (
        CT_NVFP4,
        alter(to(torch.float32), f"{A}.o_proj.weight_scale"),
        {("warning", "lossy-cast", f"{A}.o_proj.weight_scale")},
    ),
    "NVFP4: too many rows": (
        CT_NVFP4,
        alter(rows(16), f"{A}.q_proj.weight_packed"),
        {("error", "truncated", f"{A}.q_proj.weight_packed")},
    ),
    "mixed: a shard's scales of groups missing": (
        MIXED,
        drop("model.layers.0.mlp.up_proj.weight_scale"),
        {("error", "failed", ""), ("error", "unwritten", "model.layers.0.mlp.up_proj.weight_scale")},
    ),
    "MXFP8: one shard's scales missing": (
        MXFP8,
        drop(f"{A}.k_proj.weight_scale"),
        {("error", "unwritten", f"{A}.k_proj.weight_scale")},
    ),
    "MXFP8: codes as U8": (
        MXFP8,
        alter(lambda t: t.view(torch.uint8), f"{A}.o_proj.weight"),
        {("error", "lossy-cast", f"{A}.o_proj.weight")},
    ),
    "MXFP8: a scale as F8_E8M0": (
        MXFP8,
        alter(lambda t: t.view(torch.float8_e8m0fnu), f"{A}.o_proj.weight_scale"),
        {("error", "lossy-cast", f"{A}.o_proj.weight_scale")},
    ),
    "MXFP4: one shard's scales missing": (
        MXFP4,
        drop(f"{A}.v_proj.weight_scale"),
        {("error", "unwritten", f"{A}.v_proj.weight_scale")},
    ),
    "INT8: codes as U8": (
        INT8,
        alter(lambda t: t.view(torch.uint8), f"{A}.o_proj.weight"),
        {("warning", "lossy-cast", f"{A}.o_proj.weight")},
    ),
    "INT8: a shard's weight missing": (INT8, drop(f"{A}.v_proj.weight"), {("error", "unwritten", f"{A}.v_proj.weight")}),
    "an expert's half missing": (MOE, drop(f"{E}.2.up_proj.weight"), {("error", "unwritten", f"{E}.2.up_proj.weight")}),
    "an expert's scale missing": (
        MOE,
        drop(f"{E}.3.gate_proj.weight_scale"),
        {("error", "unwritten", f"{E}.3.gate_proj.weight_scale")},
    ),
    "an expert's input scale missing": (
        MOE,
        drop(f"{E}.0.down_proj.input_scale"),
        {("error", "unwritten", f"{E}.0.down_proj.input_scale")},
    ),
    **{f"good {base}": (base, nothing, set()) for base in (MOE_NVFP4, MOE_W4A16, MOE_CT)},
    "an NVFP4 expert's input scale missing": (
        MOE_NVFP4,
        drop(f"{E}.0.up_proj.input_scale"),
        {("error", "unwritten", f"{E}.0.up_proj.input_scale")},
    ),
    "an NVFP4 expert's scales of groups missing": (
        MOE_CT,
        drop(f"{E}.3.down_proj.weight_scale"),
        {("error", "unwritten", f"{E}.3.down_proj.weight_scale")},
    ),
    "up's scale of the whole tensor missing, where gate's counts": (
        MOE_W4A16,
        drop(f"{E}.1.up_proj.weight_global_scale"),
        {("warning", "unwritten", f"{E}.1.up_proj.weight_global_scale")},
    ),
    "gate's scale of the whole tensor missing": (
        MOE_NVFP4,
        drop(f"{E}.1.gate_proj.weight_scale_2"),
        {("error", "unwritten", f"{E}.1.gate_proj.weight_scale_2")},
    ),
}


Loaded = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def loads(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Loaded]:
    """loads(name) -> (folder, what the tracker saw)."""
    work = tmp_path_factory.mktemp("loads")

    @functools.cache
    def load(name: str) -> Loaded:
        base, edit, _ = LOADS[name]
        made = folder(base)
        if edit is not nothing:
            made = Path(shutil.copytree(made, work / name.replace(" ", "-").replace("'", "")))
            edit(made)
        return made, trace(made)

    return load


@pytest.mark.server
@pytest.mark.parametrize("name", LOADS)
def test_what_the_server_loaded(loads: Callable[[str], Loaded], name: str) -> None:
    path, seen = loads(name)
    found = served(seen, path)
    assert seen["problems"] == []
    assert said(found.findings) == {(s, code, subject or path.name) for s, code, subject in LOADS[name][2]}
    if not LOADS[name][2]:
        assert (seen["stage"], found.version) == ("done", "0.32.0")
        assert found.quantization.startswith(BASES[LOADS[name][0]].method)
        assert found.kernels or found.stand_ins


@pytest.mark.server
def test_findings_tell_what_vllm_said_and_which_rows(loads: Callable[[str], Loaded]) -> None:
    def found(name: str) -> str:
        path, seen = loads(name)
        return served(seen, path).findings[0].found

    assert "no module or parameter named 'blocks.0.attn.k_proj'" in found("scales on the tower")
    assert "models/utils.py" in found("scales on the tower")
    assert "rows 256..271" in found("too many rows")
    assert "qkv_proj.weight_scale" in found("one shard's scale missing")


# --- what it answers ---


def converted(source: Path, output: Path, *settings: str) -> Path:
    """The trained example, calibrated on few samples."""
    few = ("calibration.samples=4", "validation.values=false", "validation.passthrough=false")
    recipe = load_recipe("demo", [*few, *settings], model=str(source), output=str(output))
    convert(prepare(recipe), resume=False, device="cpu", memory=None, console=Console(quiet=True))
    return output


@pytest.fixture(scope="module")
def trained(example_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(example_model, tmp_path_factory.mktemp("trained") / "out")


@pytest.mark.server
def test_a_good_export_answers(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", SHIM)
    found = load(trained, PYTHON, generate=True)
    assert found.findings == ()
    assert (found.version, found.quantization, found.kv_cache_dtype) == ("0.32.0", "modelopt", "fp8_e4m3")
    assert found.kernels == {"PerTensorTorchFP8ScaledMMLinearKernel": 24}
    assert found.text
    assert found.positions > 30
    assert [text[:2] for text in found.image_texts] == ["A ", "A "]
    assert found.image_texts[0] != found.image_texts[1]


@pytest.mark.server
def test_where_this_machine_has_no_kernel_the_answers_are_said_not_to_be_the_servers(
    example_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of MXFP4, which no vLLM of a CPU computes with, and whose answers are nevertheless those of a model that sees."""
    monkeypatch.setenv("PYTHONPATH", SHIM)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # what it compiles, with a C++ compiler, the test above has compiled
    settings = ("quantize.0.scheme=mxfp4", "export.format=compressed-tensors")
    found = load(converted(example_model, tmp_path / "out", *settings), PYTHON, generate=True)
    assert said(found.findings) == {("warning", "no-kernel", "out")}
    assert "MarlinMxFp4LinearKernel" in found.findings[0].found
    assert found.stand_ins == ("MarlinMxFp4LinearKernel",)
    assert [text[:2] for text in found.image_texts] == ["A ", "A "]
    assert found.image_texts[0] != found.image_texts[1]


@pytest.mark.server
def test_a_broken_one_answers_noise_and_sees_nothing(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", SHIM)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    broken = Path(shutil.copytree(trained, tmp_path / "broken"))
    both(alter(torch.reciprocal, "*.o_proj.weight_scale"), alter(torch.zeros_like, "visual.merger.*"))(broken)
    assert {f.code for f in load(broken, PYTHON, generate=True).findings} == {"server.worse-than-chance", "server.blind"}
