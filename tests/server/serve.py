"""Serves checkpoints with the real vLLM, watched: each in a process of its own, forked from one that has imported vLLM.

    python tests/server/serve.py JOBS.json [--jobs 1] [--limit 180]

JOBS.json: [{name, folder, result, engine}], `engine` being further arguments of vLLM's LLM. `result` gets what --generate of
ckptq/validators/vllm_child.py writes; where that process died or ran out of time, what it writes of a load alone. For each
checkpoint that is done stdout gets a line of JSON: {name, vllm, device, ended, said}, where `ended` is "" or how the process that
was to generate ended, `said` its last lines.

A fork costs nothing, an import of vLLM ten seconds; and what one checkpoint leaves behind in a process, a group of ranks or a
patched class, no other one meets. With a GPU, which survives no fork, every process begins anew; several share the GPU's memory, so
each gets a small part of it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)  # whatever vLLM prints

from behavior import vllm_child  # noqa: E402

ON_GPU: dict[str, Any] = {"kv_cache_memory_bytes": 2 << 30, "gpu_memory_utilization": 0.05}
SAID = 4000
"""Characters of what a process said that are kept."""
Job = dict[str, Any]


def start(job: Job, child: Any) -> int:
    """The process that serves it. `child`: the module, None where it is to be imported anew."""
    if pid := os.fork():
        return pid
    code = 70
    try:
        os.setsid()
        log = os.open(f"{job['result']}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if child is None:
            job = {**job, "engine": {**ON_GPU, **job["engine"]}}
            os.execv(sys.executable, [sys.executable, __file__, "--one", json.dumps(job)])
        code = one(job, child)
    finally:
        sys.stderr.flush()
        os._exit(code)


def one(job: Job, child: Any) -> int:
    arguments = child._arguments
    child._arguments = lambda folder: {**arguments(folder), **job["engine"]}
    code: int = child.main([job["folder"], job["result"], *job["options"]])
    return code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", type=Path, nargs="?")
    parser.add_argument("--jobs", dest="count", type=int, default=1)
    parser.add_argument("--limit", type=float, default=180)
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        os._exit(one(asked.one, vllm_child()))
    place = prepare()
    child = vllm_child() if place["device"] == "CPU" else None
    waiting = [{**job, "options": ["--generate"], "ended": ""} for job in json.loads(asked.jobs.read_text(encoding="utf-8"))]
    running: dict[int, tuple[Job, float]] = {}
    while waiting or running:
        while waiting and len(running) < asked.count:
            job = waiting.pop(0)
            running[start(job, child)] = job, time.monotonic()
        time.sleep(0.05)
        for pid, (job, began) in list(running.items()):
            ended = state(pid, time.monotonic() - began, asked.limit)
            if ended is None:
                continue
            del running[pid]
            if ended and job["options"]:
                waiting.insert(0, {**job, "options": [], "ended": ended})
            else:
                line = {"name": job["name"], **place, "ended": job["ended"], "said": said(job)}
                print(json.dumps(line), file=answers, flush=True)


def state(pid: int, seconds: float, limit: float) -> str | None:
    """None while it runs, "" where it ended well, else how it ended. One that runs for too long is killed, with all it started."""
    found, status = os.waitpid(pid, os.WNOHANG)
    if found:
        code = os.waitstatus_to_exitcode(status)
        return "" if code == 0 else f"ended with {code}" if code > 0 else f"died of signal {-code}"
    if seconds < limit:
        return None
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return f"no answer in {limit:g} s"


def said(job: Job) -> str:
    log = Path(f"{job['result']}.log")
    return log.read_text(encoding="utf-8", errors="replace")[-SAID:] if log.exists() else ""


def prepare() -> dict[str, str]:
    """Imports what every process would. {vllm, device}."""
    import vllm
    import vllm.v1.engine.llm_engine
    from vllm.platforms import current_platform

    device = "CPU" if current_platform.is_cpu() else current_platform.get_device_name()
    return {"vllm": vllm.__version__.partition("+")[0], "device": device}


if __name__ == "__main__":
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]
    main()
