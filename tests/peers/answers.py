"""Asks the real vLLM: its own functions, and what it loads. One process of its own environment for each kind of question."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import IO, Any, Literal

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
Answers = dict[str, Any]


def ask(question: dict[str, Any]) -> Answers:
    """The answer to one question, see tests/server/answers.py."""
    return _answer("answers.py", question)


@functools.cache
def trace(folder: Path) -> Answers:
    """What the tracker saw of a load, see tests/server/traces.py. Once a folder: one that is changed later needs another name."""
    return _answer("traces.py", {"folder": str(folder)})


def _answer(script: Literal["answers.py", "traces.py"], question: dict[str, Any]) -> Answers:
    process, errors = _process(script)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(question) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    assert line, f"vLLM's process ended with {process.wait()}:\n{Path(errors.name).read_text()[-3000:]}"
    found: Answers = json.loads(line)
    return found


@functools.cache
def _process(script: str) -> tuple[subprocess.Popen[str], IO[str]]:
    assert PYTHON.exists(), f"{PYTHON} is not there: `make test` sets it up"
    errors = tempfile.NamedTemporaryFile("w", prefix="ckptq-vllm-", suffix=".log")  # noqa: SIM115
    settings = {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
    paths = [str(ROOT / "tests/server/shim"), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [PYTHON, ROOT / "tests/server" / script],
        env={**os.environ, **settings, "PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
    )
    atexit.register(_end, process, errors)
    return process, errors


def _end(process: subprocess.Popen[str], errors: IO[str]) -> None:
    process.communicate()
    errors.close()
