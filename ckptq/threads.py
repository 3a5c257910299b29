"""Work shared out among threads: results come in the order in which the work was handed in, and only a little is ahead.

torch, numpy, xxhash and the system let go of the interpreter's lock, so threads do share the work.
"""

from __future__ import annotations

import collections
import os
import queue
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Generic, TypeVar

Job = TypeVar("Job")
Place = TypeVar("Place")
Result = TypeVar("Result")
AHEAD = 8
"""Small jobs a thread that wait to be done, or to be looked at."""
THREADS, READERS = 16, 8
"""At most; a disk or the memory is the limit long before. Those who only look are quicker, and wait for the interpreter's lock."""


def threads() -> int:
    """How many threads work on a checkpoint: as many as there are processors for this process."""
    return min(THREADS, len(os.sched_getaffinity(0)))


class Line(Generic[Place]):
    """Threads with a desk each, at which one piece of work is done at a time. Use it as a context, from one thread.

    What is handed in is begun in that order, so work may wait for the result of what was handed in before it. At most `ahead`
    pieces are begun or done and not yet taken. Leaving the context by an error drops what has not begun.
    """

    def __init__(self, desk: Callable[[], Place], count: int, ahead: int) -> None:
        self._desks: queue.SimpleQueue[Place] = queue.SimpleQueue()
        for _ in range(count):
            self._desks.put(desk())
        self._pool = ThreadPoolExecutor(count)
        self._ahead = ahead
        self._waiting: collections.deque[tuple[Future[Any] | None, Callable[[Any], object]]] = collections.deque()

    def put(self, work: Callable[[Place], Result], then: Callable[[Result], object] = lambda _: None) -> Future[Result]:
        """Hands in work. `then` gets its result in this thread, in turn. Raises what earlier work or its `then` raised."""
        future = self._pool.submit(self._at_a_desk, work)
        self._queue(future, then)
        return future

    def call(self, then: Callable[[], object]) -> None:
        """Calls `then` in this thread when all that was handed in before has been taken."""
        self._queue(None, lambda _: then())

    def drain(self) -> None:
        """Takes all that was handed in."""
        while self._waiting:
            self._take()

    def _queue(self, future: Future[Any] | None, then: Callable[[Any], object]) -> None:
        self._waiting.append((future, then))
        while len(self._waiting) > self._ahead:
            self._take()

    def _take(self) -> None:
        future, then = self._waiting.popleft()
        then(future.result() if future else None)

    def _at_a_desk(self, work: Callable[[Place], Result]) -> Result:
        desk = self._desks.get()
        try:
            return work(desk)
        finally:
            self._desks.put(desk)

    def __enter__(self) -> Line[Place]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)


def in_order(work: Callable[[Job, Place], Result], jobs: Iterable[Job], desk: Callable[[], Place]) -> Iterator[Result]:
    """work(job, desk) of each job by threads, in the order of the jobs; each thread has a desk. Only a few are ahead."""
    done: collections.deque[Result] = collections.deque()
    count = min(threads(), READERS)
    with Line(desk, count, AHEAD * count) as line:
        for job in jobs:
            line.put(lambda mine, job=job: work(job, mine), done.append)  # type: ignore[misc]
            while done:
                yield done.popleft()
        line.drain()
        yield from done
