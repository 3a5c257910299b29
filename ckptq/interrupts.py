"""Ctrl-C and SIGTERM. The first unwinds, which waits for files that are being fetched; a second ends the process at once.

Nothing is lost by that: what `--resume` needs is complete on the disk at any moment.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

_LATER = 0.02
"""Seconds until the next try, where an exception would do harm or is lost."""


def unwind_on_signals(first: Callable[[], None], at_once: Callable[[], None]) -> Callable[[], bool]:
    """From now on the first signal calls `first` and raises KeyboardInterrupt in the main thread, a second calls `at_once`.

    Returns what says whether there was one. The process's SIGALRM is taken for it, and its hook for what can't be raised.
    """
    stopped: list[int] = []
    lost = sys.unraisablehook

    def stop(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGALRM:
            if stopped:
                at_once()
            stopped.append(number)
            first()
        if _importing(frame):
            signal.setitimer(signal.ITIMER_REAL, _LATER)
        else:
            raise KeyboardInterrupt

    def unraisable(what: Any) -> None:
        if stopped and isinstance(what.exc_value, KeyboardInterrupt):  # it came while an object was being freed
            signal.setitimer(signal.ITIMER_REAL, _LATER)
        else:
            lost(what)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, stop)
    sys.unraisablehook = unraisable
    return lambda: bool(stopped)


def _importing(frame: FrameType | None) -> bool:
    """Whether an import is under way. Interrupted there, CPython 3.11 may keep its lock, for which other threads then wait."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
