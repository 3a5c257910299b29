"""Wall and CPU time and peak memory of a whole process."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class Run:
    """Seconds and bytes of one run, and what it printed."""

    wall: float
    user: float
    system: float
    rss: int
    out: str

    @property
    def cpu(self) -> float:
        return self.user + self.system


def run(command: Sequence[str | Path]) -> Run:
    """One run. The caller must be small: a child begins as its copy, and with its peak."""
    start = time.perf_counter()
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert child.stdout is not None
    out = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - start
    if status != 0:
        raise SystemExit(f"{' '.join(map(str, command))[:300]} ended with {os.waitstatus_to_exitcode(status)}")
    return Run(wall, usage.ru_utime, usage.ru_stime, usage.ru_maxrss * 1024, out)


def measure(command: list[str]) -> tuple[float, int]:
    """(wall seconds, peak RSS in bytes) of one run."""
    found = run(command)
    return found.wall, found.rss
