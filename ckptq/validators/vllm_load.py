"""Loads the checkpoint with the real vLLM, in a process of the interpreter that has it, and on demand generates from it.

vllm_child.py does it and says which elements vLLM's loader wrote and read; here that becomes findings. vLLM itself checks none of it
for a quantized checkpoint (0.32.0 model_executor/model_loader/default_loader.py load_weights: tracking is on for unquantized ones).
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptq.checkpoint import read_inventory
from ckptq.errors import CkptqError, UnsupportedError
from ckptq.validators import Code, Finding, error, warning
from ckptq.validators.vllm_child import BROKEN_VLLM, KV_SCALE, NO_VLLM

_LOADER = "vLLM 0.32.0 model_executor/"
CODES = {
    "server.failed": Code("vLLM stopped with an error"),
    "server.timeout": Code("vLLM did not end within the time limit"),
    "server.ignored-key": Code("vLLM's loader never read a stored tensor", _LOADER + "models/utils.py AutoWeightsLoader._load_module"),
    "server.unwritten": Code(
        "nothing wrote a parameter of vLLM's, or a part of it", _LOADER + "model_loader/default_loader.py DefaultModelLoader.load_weights"
    ),
    "server.truncated": Code("vLLM's loader left a part of a stored tensor out", _LOADER + "parameter.py _ColumnvLLMParameter"),
    "server.lossy-cast": Code(
        "vLLM's loader copied values into a dtype that changes them", _LOADER + "models/utils.py AutoWeightsLoader._load_param"
    ),
    "server.no-kernel": Code("this machine's vLLM can load the format but not compute with it"),
    "server.not-finite": Code("a log-probability is NaN or infinite where it can't be"),
    "server.flat": Code("every token is as likely as any other, at every position"),
    "server.blind": Code("two different images give the same log-probabilities"),
}

TIME_LIMIT = 1800.0
"""Seconds: some minutes of loading and compiling are usual, half an hour is not."""
# One process, so that the loading can be watched; offline; and on a CPU a small KV cache.
_DEFAULTS = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
_FORCED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
_LINES = 12
"""Lines of the server's stderr that a finding shows."""
_TAIL = 1 << 16
_FLAT = 0.01
"""Nats: log-probabilities of all likeliest tokens this close to -ln(vocabulary) say that the logits are constant."""
_SAME = 1e-6
"""Nats: a first token's log-probabilities from two images that differ by less come from a tower that sees neither."""

_LOADED = ("process", "engine", "generate", "done")
_DOING = {
    "config": "reading the config", "create": "building the model", "load": "loading the weights",
    "process": "processing the loaded weights", "engine": "starting the engine", "generate": "generating",
}  # fmt: skip


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


def default_python() -> Path:
    """The interpreter that runs this."""
    return Path(sys.executable)


def load(folder: Path, python: Path, *, generate: bool = False, timeout: float = TIME_LIMIT) -> Served:
    """Loads `folder` with the vLLM of the interpreter `python`, in the caller's environment; with `generate` makes the engine too.

    Nothing of the checkpoint is executed: vLLM's trust_remote_code stays off. `timeout` in seconds, for all of it.
    Raises UnsupportedError where there is no such interpreter, or no vLLM in it that can be imported.
    """
    with tempfile.TemporaryDirectory(prefix="ckptq-") as scratch:
        result = Path(scratch) / "result.json"
        code, said = _run(folder, python, result, generate, timeout)
        if code is None:
            return Served((_timed_out(folder, timeout, said),))
        if code == NO_VLLM:
            raise UnsupportedError(f"{python}: has no vLLM", hint="name the interpreter that has it: --vllm-python PATH")
        if code == BROKEN_VLLM:
            last = (said.strip() or "no message").splitlines()[-1]
            raise UnsupportedError(
                f"{python}: its vLLM can't be imported: {last}", hint=f"make `{python} -c 'import vllm'` work first"
            )
        if code != 0 or not result.is_file():
            return Served((_died(folder, code, said),))
        trace = json.loads(result.read_text(encoding="utf-8"))
    return served(trace, folder, _stored(folder))


def served(trace: Mapping[str, Any], folder: Path, stored: Sequence[str]) -> Served:
    """The trace of vllm_child.py as findings and figures. `stored`: names of the checkpoint's tensors, as its headers have them."""
    generated = trace["generated"] or {"text": "", "logprobs": [], "images": []}
    images = generated["images"]
    return Served(
        tuple(_findings(trace, folder, stored)),
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


def _stored(folder: Path) -> list[str]:
    try:
        return list(read_inventory(folder).main.tensors)
    except CkptqError:
        return []  # said elsewhere; what vLLM itself met is in the trace


# --- the process ---


def _run(folder: Path, python: Path, result: Path, generate: bool, timeout: float) -> tuple[int | None, str]:
    """(exit code, or None where the time was over; the end of what it said)."""
    # absolute() and not resolve(): the link in a virtual environment's bin is what makes it that environment.
    child = Path(__file__).with_name("vllm_child.py").resolve()
    command = [str(python.absolute()), str(child), str(folder.resolve()), str(result), *(["--generate"] if generate else [])]
    log = result.with_name("log.txt")
    with log.open("wb") as out:
        try:
            # In the result's own folder: a module that lies where ckptq was started must not take the place of a library's.
            process = subprocess.Popen(  # noqa: S603  the user names the interpreter
                command,
                env={**_DEFAULTS, **os.environ, **_FORCED},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=result.parent,
                start_new_session=True,
            )
        except OSError as problem:
            raise UnsupportedError(
                f"{python}: can't be started: {problem.strerror}", hint="name the interpreter that has vLLM: --vllm-python PATH"
            ) from problem
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


def _last(said: str) -> str:
    return "\n".join([line for line in said.splitlines() if line.strip()][-_LINES:])


def _timed_out(folder: Path, timeout: float, said: str) -> Finding:
    return error(
        "server.timeout", folder.name, "vLLM loads the checkpoint", f"not within {timeout:g} s; it said last:\n{_last(said)}",
        "nobody knows whether it can be served", "look at what it waits for; a slow disk or a first compilation may need a longer limit",
    )  # fmt: skip


def _died(folder: Path, code: int, said: str) -> Finding:
    ended = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
    return error(
        "server.failed", folder.name, "vLLM loads the checkpoint", f"{ended}:\n{_last(said)}", "it can't be served",
        "mend the other findings first; without any, the fault may lie with this vLLM, its settings or too little memory",
    )  # fmt: skip


