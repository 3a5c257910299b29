"""Records what the real vLLM makes of every mutant of the corpus: the table that tests/test_agreement.py holds the validator to.

    python tests/server/record_behavior.py [--check | --new] [PATTERN ...]

Writes tests/data/behavior-vllm-VERSION.json: all mutants, or those whose names match a pattern, as in a shell; with `--new` only
those that are not in the table. `--check` writes nothing, and exits with 1 where a label is another than the one written. vLLM is
the one of .venv-vllm, or of the interpreter that CKPTQ_VLLM_PYTHON names; its version names the table. The labels' rules are in
tests/server/behavior.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
sys.path.insert(0, str(TESTS))

from corpus import derived  # noqa: E402 - found by the line above
from corpus.agreement import read_table, table_of  # noqa: E402
from corpus.bases import BASES  # noqa: E402
from corpus.mutants import Mutant, mutants  # noqa: E402

PYTHON = Path(os.environ.get("CKPTQ_VLLM_PYTHON", ROOT / ".venv-vllm/bin/python"))
PROCESSES = 2
PATIENCE = 300
"""Seconds without a result after which a process is given up."""

Row = dict[str, Any]


def record(chosen: Sequence[Mutant]) -> dict[str, Row]:
    """{name: {label, evidence}}. The mutants lie on disk only while their process runs."""
    with ThreadPoolExecutor(PROCESSES) as pool:
        rows = [row for batch in pool.map(run_batch, batches(chosen)) for row in batch]
    return {row.pop("name"): row for row in sorted(rows, key=lambda row: row["name"])}


def batches(chosen: Sequence[Mutant]) -> Iterator[list[Mutant]]:
    """Whole good exports together, those with experts apart, in about as many batches as there are processes."""
    for experts in (True, False):
        found = sorted((m for m in chosen if BASES[derived.origin(m.base)].experts == experts), key=lambda m: m.base)
        count = Counter(m.base for m in found)
        piles: list[list[Mutant]] = [[] for _ in range(1 if experts else PROCESSES)]
        for base, _ in count.most_common():
            min(piles, key=len).extend(m for m in found if m.base == base)
        yield from filter(None, piles)


def run_batch(batch: Sequence[Mutant]) -> list[Row]:
    """Runs a process over the mutants, and another over the rest where one died: that mutant's row says how."""
    with tempfile.TemporaryDirectory(prefix="ckptq-mutants-") as name:
        work = Path(name)
        jobs = list(materialize(batch, work))
        rows: list[Row] = []
        while len(rows) < len(jobs):
            end = run_process(jobs[len(rows) :], work)
            rows += [json.loads(line) for line in (work / "results.jsonl").read_text(encoding="utf-8").splitlines()]
            if len(rows) < len(jobs):
                if "AssertionError" in end:
                    raise RuntimeError(f"{jobs[len(rows)]['name']}: {end}")
                rows.append({"name": jobs[len(rows)]["name"], "label": "refused", "error": end})
    return rows


def materialize(batch: Iterable[Mutant], work: Path) -> Iterator[dict[str, str]]:
    for number, mutant in enumerate(batch):
        good = work / f"good-{mutant.base}"
        if not good.exists():
            derived.make(mutant.base, good)
        folder = work / str(number)
        shutil.copytree(good, folder)
        try:
            mutant.edit(folder)
        except Exception as problem:
            problem.add_note(f"in the mutant {mutant.name}")
            raise
        yield {"name": mutant.name, "folder": str(folder), "good": str(good), "source": str(derived.source(mutant.base))}


def run_process(jobs: Sequence[Mapping[str, str]], work: Path) -> str:
    """How it ended, if not well. Its results lie in results.jsonl."""
    results = work / "results.jsonl"
    results.write_text("", encoding="utf-8")
    (work / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    command = [str(PYTHON), str(TESTS / "server/behavior.py"), str(work / "jobs.json"), str(results)]
    with (work / "log").open("wb") as log:
        shim = {**os.environ, "PYTHONPATH": str(TESTS / "server/shim")}
        process = subprocess.Popen(command, cwd=work, env=shim, stdout=log, stderr=log)
        size = -1
        while True:
            try:
                code = process.wait(PATIENCE)
                break
            except subprocess.TimeoutExpired:
                if size == (size := results.stat().st_size):
                    process.kill()
                    process.wait()
                    return f"no answer in {PATIENCE} s"
    if code < 0:
        return f"the process died of signal {-code}"
    lines = (work / "log").read_text(encoding="utf-8", errors="replace").splitlines()
    return "" if code == 0 else "AssertionError or the like in tests/server/behavior.py: " + "\n".join(lines[-12:])


def installed() -> str:
    """The version of vLLM that PYTHON has, as `0.32.0`."""
    ask = "from importlib.metadata import packages_distributions, version; print(version(packages_distributions()['vllm'][0]))"
    done = subprocess.run([PYTHON, "-c", ask], capture_output=True, text=True, check=True)
    return done.stdout.strip().partition("+")[0]


def write_table(rows: Mapping[str, Row], version: str) -> None:
    """One mutant a line, so that a change of one is one line's."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(rows.items()))
    table_of(short(version)).write_text(f'{{"vllm": "{version}", "mutants": {{\n{lines}\n}}}}\n', encoding="utf-8")


def short(version: str) -> str:
    """`0.32.0` as `0.32`."""
    return ".".join(version.split(".")[:2])


def changed(before: Mapping[str, Row], after: Mapping[str, Row]) -> list[str]:
    """What to say of labels that are not as they were."""
    return [
        f"{name}: {row['label']}, recorded as {before[name]['label'] if name in before else 'nothing'}: {row}"
        for name, row in after.items()
        if name not in before or before[name]["label"] != row["label"]
    ]


def main(arguments: Sequence[str]) -> int:
    check, new = "--check" in arguments, "--new" in arguments
    patterns = [argument for argument in arguments if not argument.startswith("--")]
    version = installed()
    every, before = list(mutants()), read_table(short(version))
    chosen = [m for m in every if not patterns or any(fnmatchcase(m.name, pattern) for pattern in patterns)]
    rows = record([m for m in chosen if not new or m.name not in before])
    news = changed(before, rows)
    print(*news, sep="\n")
    print(f"{len(rows)} mutants:", dict(Counter(row["label"] for row in rows.values())))
    if not check:
        names = {m.name for m in every}
        write_table({name: row for name, row in {**before, **rows}.items() if name in names}, version)
    return 1 if check and news else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
