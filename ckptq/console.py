"""What a run says: the result on stdout, talk on stderr. Bars on a terminal, one short line a stage in a log.

`human` results are rich tables; `json` is one object on stdout and nothing else there.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.table import Table

Unit = Literal["bytes", "layers", "rows", "samples", "steps", "tensors", "units"]
Advance = Callable[[int], None]
LOG_EVERY = 30.0
"""Seconds between two lines of one stage in a log."""


class Console:
    """The only place that prints. Quiet ones are for library use and tests. `seconds`: of each stage that ended."""

    def __init__(self, format: Literal["human", "json"] = "human", *, quiet: bool = False) -> None:
        self.format = format
        self.quiet = quiet
        self.seconds: dict[str, float] = {}

    def note(self, text: str) -> None:
        """One line of talk."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """One line that the reader should not miss."""
        self.note(f"warning: {text}")

    @contextmanager
    def stage(self, name: str, total: int, unit: Unit = "steps") -> Iterator[Advance]:
        """Shows progress of `total` units while the block runs; keeps its seconds. Yields `advance(n)`."""
        start = time.monotonic()
        shown = self._log if self.quiet or not sys.stderr.isatty() else self._bar
        with shown(name, total, unit) as advance:
            yield advance
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start

    @contextmanager
    def _bar(self, name: str, total: int, unit: Unit) -> Iterator[Advance]:
        from rich.console import Console as Terminal
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )  # fmt: skip

        counts = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(), TextColumn(unit))
        columns = (TextColumn("{task.description:<12}"), BarColumn(), *counts, TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Terminal(stderr=True)) as progress:
            task = progress.add_task(name, total=total)
            yield lambda n: progress.advance(task, n)

    @contextmanager
    def _log(self, name: str, total: int, unit: Unit) -> Iterator[Advance]:
        start = last = time.monotonic()
        done = 0

        def advance(n: int) -> None:
            nonlocal done, last
            done += n
            now = time.monotonic()
            if now - last >= LOG_EVERY and 0 < done < total:
                last = now
                left = (now - start) * (total - done) / done
                self.note(f"{name}: {amount(done, unit)} of {amount(total, unit)}, {duration(left)} left")

        yield advance
        self.note(f"{name}: {amount(done, unit)} in {duration(time.monotonic() - start)}")

    def result(self, data: dict[str, Any], human: Callable[[], None]) -> None:
        """The command's result: `data` as one JSON object, or whatever `human` prints."""
        if self.format == "json":
            print(json.dumps(data, indent=2))
        else:
            human()

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[object]],
        right: Sequence[int] = (),
        whole: Sequence[int] = (),
    ) -> None:
        """A table on stdout. `right` numbers the right-aligned columns, `whole` those whose cells are never folded.

        Where no column has a name there is no header.
        """
        from rich import box
        from rich.table import Table

        headed = any(columns)
        look = box.SIMPLE_HEAD if headed else None
        table: Table = Table(title=title or None, title_justify="left", title_style="bold", box=look, show_header=headed)
        table.show_edge = table.pad_edge = False
        table.collapse_padding = headed
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if i in right else "left", overflow="fold", no_wrap=i in whole)
        for row in rows:
            table.add_row(*(str(cell) for cell in row))
        self.show(table)
        self.show("")

    def show(self, what: object) -> None:
        """Prints on stdout, as wide as the terminal or COLUMNS says, or 120 columns where neither does."""
        from rich.console import Console as Terminal

        width = None if sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdecimal() else 120
        Terminal(width=width, highlight=False, markup=False, soft_wrap=isinstance(what, str)).print(what)


def size(nbytes: float) -> str:
    """1234567 -> '1.23 MB'. Decimal units, as disks and model cards use them."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 999.5:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.4g} TB"


def number_runs(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> `{0..2,5}`, as brace expansion has it; one number stands alone."""
    ordered = sorted(set(numbers))
    runs: list[list[int]] = []
    for n in ordered:
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    text = ",".join(f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)
    return text if len(ordered) == 1 else f"{{{text}}}"


def duration(seconds: float) -> str:
    """75.2 -> '1 min 15 s'."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60) if seconds >= 3600 else int(seconds // 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if seconds >= 3600 else f"{minutes} min {int(seconds % 60):02} s"


def amount(n: int, unit: Unit) -> str:
    """A count with its unit, which one thing has in the singular; bytes as sizes."""
    return size(n) if unit == "bytes" else f"{n} {unit.removesuffix('s') if n == 1 else unit}"
