"""Wall time and peak memory of a whole process."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def measure(command: list[str]) -> tuple[float, int]:
    """(wall seconds, peak RSS in bytes) of one run. The caller must be small: a child begins as its copy, and with its peak."""
    start = time.perf_counter()
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - start
    if status != 0:
        raise SystemExit(f"{command[:4]} ended with {os.waitstatus_to_exitcode(status)}")
    return wall, usage.ru_maxrss * 1024
