"""Asks vLLM's own functions: tests/server/answers.py in one process of vLLM's own environment, for as long as the tests run."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"


def ask(question: dict[str, Any]) -> dict[str, Any]:
    """The answer to one question, see tests/server/answers.py."""
    process, errors = _process()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(question) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    assert line, f"vLLM's process ended with {process.wait()}:\n{Path(errors.name).read_text()[-3000:]}"
    found: dict[str, Any] = json.loads(line)
    return found


@functools.cache
def _process() -> tuple[subprocess.Popen[str], IO[str]]:
    assert PYTHON.exists(), f"{PYTHON} is not there: `make test` sets it up"
    errors = tempfile.NamedTemporaryFile("w", prefix="ckptq-vllm-", suffix=".log")  # noqa: SIM115
    settings = {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
    paths = [str(ROOT / "tests/server/shim"), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [PYTHON, ROOT / "tests/server/answers.py"],
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
