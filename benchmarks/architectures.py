"""Every architecture with its recipes, converted, loaded and asked by a real vLLM: makes docs/architectures.md from its JSON alone.

    python benchmarks/architectures.py [NAME...] [--vllm-python PY] [--jobs 1] [--limit 180] [--work DIR]
                                       [--out docs/architectures.json]
    python benchmarks/architectures.py --merge FILE... [--readme]    # rows that other machines wrote; without any the table alone

The tiny checkpoint of each of tests/families is made and converted with each of its recipes, calibrated on its own samples. vLLM,
which needs nothing of ckptq, does with it and with its source what `ckptq validate --generate` has it do: it loads, watched, and
answers a text, and two images where there is a tower. A row of the JSON is one family and recipe, `bf16` for the source, on one
device with one version of vLLM; a new run replaces rows of the same key and keeps the others. NAME may be part of a family's or a
recipe's name.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from families import families  # noqa: E402 - found by the line above

from ckptq.recipe import load_recipe  # noqa: E402
from ckptq.validators import vllm_answers  # noqa: E402
from ckptq.validators.vllm_load import served  # noqa: E402
from ckptq.validators.vllm_stand_ins import AS_GOOD  # noqa: E402

SOURCE = "bf16"
"""What takes a recipe's place in the rows of the source."""
LOADED = ("engine", "generate", "done")
"""Stages of vllm_child.py's trace that come after a whole load."""
APART = 0.25
"""Nats: log-probabilities that are farther from the source's, on average, are no answers of the same model. Of these models, whose
weights are random, those of two tokens of the prompt are 0.7 to 1.4 apart."""
APART_FP4 = 0.4
"""The same for weights of four bits, which alone, computed with in BF16, move the answers of these models by 0.22."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Trial:
    """A family's tiny checkpoint as it was made, or converted with a recipe."""

    family: str
    recipe: str

    @property
    def name(self) -> str:
        return f"{self.family} {self.recipe}"

    def folder(self, work: Path) -> Path:
        return work / self.family / self.recipe


def main() -> int:
    """Runs and merges. Returns 1 where a checkpoint could not be made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--vllm-python", type=Path, default=ROOT / ".venv-vllm/bin/python")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=int, default=180, help="seconds for one checkpoint")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/architectures.json")
    parser.add_argument("--merge", nargs="*", type=Path)
    parser.add_argument("--readme", action="store_true", help="put the first of the tables into README.md, too")
    args = parser.parse_args()
    if args.merge is not None:
        keep(args.out, [row for path in args.merge for row in json.loads(path.read_text())])
        if args.readme:
            put(summary(json.loads(args.out.read_text())), ROOT / "README.md")
        return 0
    with tempfile.TemporaryDirectory(dir=args.work) as scratch:
        work = Path(scratch)
        found = [*trials(args.names)]
        made = [t for t in found if make(t, work)]
        for row in serve(made, work, args.vllm_python, args.jobs, args.limit):
            print(json.dumps(row), file=sys.stderr, flush=True)
            keep(args.out, [row])
    return 0 if made == found else 1


# --- checkpoints ---


def trials(names: Sequence[str]) -> Iterator[Trial]:
    """Of every family that has to do with these names, the source and then what it becomes."""
    for name, family in families().items():
        every = [Trial(name, recipe) for recipe in family.recipes]
        found = [t for t in every if not names or any(part in t.name for part in names)]
        yield from (Trial(name, SOURCE), *found) if found else ()


def make(trial: Trial, work: Path) -> bool:
    """Makes the checkpoint; says why where it can't."""
    from ckptq.console import Console
    from ckptq.convert import convert, prepare

    family, folder = families()[trial.family], trial.folder(work)
    try:
        if trial.recipe == SOURCE:
            folder.mkdir(parents=True)
            family.make(folder)
        else:
            recipe = load_recipe(trial.recipe, family.settings(trial.recipe, Trial(trial.family, SOURCE).folder(work), folder))
            convert(prepare(recipe), resume=False, device="cpu", memory=None, console=Console(quiet=True))
    except Exception as problem:
        print(f"{trial.name}: not made: {type(problem).__name__}: {problem}", file=sys.stderr, flush=True)
        return False
    return True


# --- the server ---


def serve(found: Sequence[Trial], work: Path, python: Path, jobs: int, limit: int) -> Iterator[Row]:
    """A row for each, as soon as it is done. Raises SystemExit where that Python has no vLLM that runs."""
    engines = {name: dict(family.engine) for name, family in families().items()}
    results = {t.name: work / f"{i}.json" for i, t in enumerate(found)}
    listed = [
        {"name": t.name, "folder": str(t.folder(work)), "result": str(results[t.name]), "engine": engines[t.family]} for t in found
    ]
    (work / "jobs.json").write_text(json.dumps(listed))
    command = [str(python), "tests/server/serve.py", str(work / "jobs.json"), "--jobs", str(jobs), "--limit", str(limit)]
    by_name = {t.name: t for t in found}
    waiting: list[tuple[Trial, Mapping[str, Any]]] = []
    done: set[str] = set()
    with (work / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            answer = json.loads(line)
            waiting.append((by_name.pop(answer["name"]), answer))
            done.add(answer["name"])
            ready = [pair for pair in waiting if Trial(pair[0].family, SOURCE).name in done]
            waiting = [pair for pair in waiting if pair not in ready]
            for trial, answer in ready:
                trace, source = (read(results[t.name]) for t in (trial, Trial(trial.family, SOURCE)))
                yield row_of(trial, answer, trace, source, trial.folder(work))
    if process.wait() or by_name:
        raise SystemExit(f"{python} ended with {process.returncode}:\n{(work / 'log').read_text()[-4000:]}")


def environment() -> dict[str, str]:
    """As of vllm_load.py's process, with one thread each: two that wait for each other are many times slower."""
    shim = str(ROOT / "tests/server/shim")
    paths = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), shim]))
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    return {**os.environ, **settings, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def read(result: Path) -> Mapping[str, Any] | None:
    """The trace of vllm_child.py, None of a process that died."""
    text = result.read_text() if result.exists() else ""
    return json.loads(text) if text else None


def row_of(
    trial: Trial, answer: Mapping[str, Any], trace: Mapping[str, Any] | None, source: Mapping[str, Any] | None, folder: Path
) -> Row:
    """What vLLM made of it.

    state       the most that was seen: generated, loaded or failed. Loaded: every parameter was written, every element of it, and
                every stored tensor read. Generated: with kernels of the server's own, and answers like the source's
    why         nothing more was, in vLLM's words
    parameters  of vLLM's model, that a checkpoint has to fill
    tensors     stored, that were read
    left        stored, of parts that this server does not build: a talker
    apart       mean difference of log-probabilities from the source's, in nats: of the prompt's tokens, and of the likeliest first
                tokens after two images, null without any
    """
    config = json.loads((folder / "config.json").read_text())
    row: Row = {"family": trial.family, "recipe": trial.recipe, "architecture": config["architectures"][0]}
    row |= {"device": answer["device"], "vllm": answer["vllm"]}
    if trace is None:
        return {**row, "state": "failed", "why": one_line(f"{answer['ended']}: {last(answer['said'])}")}
    findings = served(trace, folder).findings
    errors = [f for f in findings if f.severity == "error" and f.code != "server.failed"]
    of_load = [f"{f.code} {f.subject}: {f.found}" for f in errors if f.code not in vllm_answers.CODES]
    row |= {
        "parameters": sum(not p["exempt"] for p in trace["parameters"].values()),
        "tensors": sum(bool(key["read"]) for key in trace["keys"].values()),
        "left": sum(f.code == "server.ignored-key" and f.severity == "warning" for f in findings),
        "kernels": trace["kernels"],
        "kv_cache": trace["kv_cache_dtype"],
    }
    if trace["stage"] not in LOADED or trace["problems"] or of_load:
        return {**row, "state": "failed", "why": one_line([*of_load, *trace["problems"], stopped(trace)][0])}
    lacking = [kernel for kernel in trace["stand_ins"] if kernel not in AS_GOOD]
    if trace["generated"] is None or lacking:
        why = f"no kernel of its own: {', '.join(lacking)}" if lacking else answer["ended"] or stopped(trace)
        return {**row, "state": "loaded", "why": one_line(why)}
    apart = differences(trace["generated"], (source or trace)["generated"] or trace["generated"])
    row |= {"apart": [None if d is None else round(d, 4) for d in apart], "stand_ins": trace["stand_ins"]}
    # A model of random weights may well say one thing to everything, and worse than chance: that is no fault where its source does.
    usual = {f.code for f in vllm_answers.check(source["generated"])} if source and source["generated"] else set()
    wrong = [f"{f.code}: {f.found}" for f in errors if f.code not in usual]
    limit = APART_FP4 if "fp4" in trial.recipe else APART
    wrong += ["answers unlike the source's"] if any(d is not None and d > limit for d in apart) else []
    wrong += ["after an image other tokens are likely than the source's"] if source and not alike(trace, source) else []
    wrong += ["the source was not served"] if source is None or source["generated"] is None else []
    return {**row, "state": "loaded", "why": one_line(wrong[0])} if wrong else {**row, "state": "generated"}


def differences(answers: Mapping[str, Any], others: Mapping[str, Any]) -> tuple[float, float | None]:
    """(of the prompt's tokens, of the first tokens after the images, of those that both list), each the mean absolute one."""
    text = statistics.fmean(abs(a - b) for a, b in zip(answers["prompt"], others["prompt"], strict=True))
    looks = [(a["logprobs"][0], b["logprobs"][0]) for a, b in zip(answers["images"], others["images"], strict=True)]
    seen = [abs(a[token] - b[token]) for a, b in looks for token in a.keys() & b.keys()]
    return text, statistics.fmean(seen) if seen else None


def alike(trace: Mapping[str, Any], source: Mapping[str, Any]) -> bool:
    """Whether of the likeliest first tokens after each image half are the same."""
    images = [(t["generated"] or {"images": []})["images"] for t in (trace, source)]
    looks = [(a["logprobs"][0], b["logprobs"][0]) for a, b in zip(*images, strict=False)]
    return all(2 * len(a.keys() & b.keys()) >= len(b) for a, b in looks)


def stopped(trace: Mapping[str, Any]) -> str:
    problem = trace["error"]
    return f"{problem['type']}: {last(problem['message'])}" if problem else "it was only loaded"


def last(said: str) -> str:
    """Its last line that says something; pydantic's errors end with an address."""
    lines = [line for line in said.splitlines() if line.strip() and "For further information visit" not in line]
    return (lines or ["it said nothing"])[-1]


def one_line(text: str) -> str:
    return " ".join(text.split())[:300]


# --- the table ---


def key(row: Row) -> tuple[str, ...]:
    """What a row is of."""
    return tuple(str(row[part]) for part in ("device", "vllm", "family", "recipe"))


def keep(path: Path, rows: Iterable[Row]) -> None:
    """Puts rows into the JSON, in place of those of the same key, and writes the table beside it. Those of families and recipes
    that are no more go."""
    known = {key(row): row for row in json.loads(path.read_text())} if path.exists() else {}
    known |= {key(row): row for row in rows}
    there = {(name, recipe) for name, family in families().items() for recipe in (SOURCE, *family.recipes)}
    found = [known[k] for k in sorted(known) if (k[2], k[3]) in there]
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in found) + "\n]\n")
    path.with_suffix(".md").write_text(document(found))


def put(table: str, path: Path) -> None:
    """The table in the place of the one that begins alike."""
    text = path.read_text()
    start = text.index(table.splitlines()[0])
    path.write_text(text[:start] + table + text[text.index("\n\n", start) + 1 :])


HEAD = """# What a real vLLM made of every architecture

Written by `python benchmarks/architectures.py` from `docs/architectures.json`, which its runs wrote. Of each architecture a tiny
checkpoint with random weights, under the names of the hub's files, was converted with its recipes and given to vLLM, with nothing
of vLLM changed, but where a row says so.

- **generated**: loaded, and it answered a text, and two images where there is a tower, as its source did: the mean difference of
  log-probabilities is below {apart} nats, with weights of four bits below {fp4}.
  Rows that say *stand-in* lack an operator of vLLM's CPU build, `silu_and_mul_quant`, with which Llama's MLP quantizes for its last
  linear: `ckptq validate` had that linear do it, as everywhere else.
- **loaded**: every element of every parameter of vLLM's was written, and every stored tensor read.
- **keys only**: no run of it is recorded. Names, dtypes and shapes are what the rules of `ckptq validate` expect of that version.

""".replace("{apart}", str(APART)).replace("{fp4}", str(APART_FP4))


def document(rows: Sequence[Row]) -> str:
    """docs/architectures.md."""
    places = sorted({(row["device"], row["vllm"]) for row in rows}, key=lambda place: (place[0] == "CPU", place))
    sections = [section(place, [r for r in rows if (r["device"], r["vllm"]) == place]) for place in places]
    return HEAD + "\n".join([summary(rows), *sections])


def summary(rows: Sequence[Row]) -> str:
    """Each format of an architecture in the column of the most that was seen of it. The README has this table."""
    lines = ["| architecture | generated | loaded | keys only |", "|---|---|---|---|"]
    for name, family in families().items():
        cells: dict[str, list[str]] = {"generated": [], "loaded": [], "keys": []}
        for recipe in family.recipes:
            seen = {state: where(rows, name, recipe, state) for state in ("generated", "loaded")}
            state = next((state for state, places in seen.items() if places), "keys")
            cells[state].append(form(recipe) + (f" ({', '.join(seen[state])})" if state in seen else ""))
        scope = importlib.import_module(f"ckptq.scopes.{name}").SCOPE
        lines.append("| " + " | ".join((f"`{scope.architectures[0]}`", *("<br>".join(cell) for cell in cells.values()))) + " |")
    return "\n".join(lines) + "\n"


def where(rows: Sequence[Row], family: str, recipe: str, state: str) -> list[str]:
    """`CPU 0.32.0`, `H200 0.26.0`: where that state was reached."""
    found = [row for row in rows if (row["family"], row["recipe"], row["state"]) == (family, recipe, state)]
    return [
        f"{row['device'].rpartition(' ')[2]} {row['vllm']}{' *stand-in*' if row.get('stand_ins') else ''}"
        for row in sorted(found, key=lambda row: row["device"] == "CPU")
    ]


def form(name: str) -> str:
    """`modelopt fp8 + KV`."""
    recipe = load_recipe(name)
    schemes = " + ".join(dict.fromkeys(rule.scheme for rule in recipe.quantize))
    return f"{recipe.export.format} {schemes}{' + KV' if recipe.kv_cache else ''}"


COLUMNS = ("architecture", "recipe", "", "parameters", "tensors", "text", "images", "kernels", "KV cache")


def section(place: tuple[str, str], rows: Sequence[Row]) -> str:
    """One device with one version of vLLM."""
    seen = [row for row in rows if row["state"] != "failed"]
    lines = [f"## {place[0]}, vLLM {place[1]}", "", "| " + " | ".join(COLUMNS) + " |", "|---|---|---|---:|---:|---:|---:|---|---|"]
    lines += ["| " + " | ".join(cells_of(row)) + " |" for row in sorted(seen, key=order)]
    less = [f"- {title(row)}: {row['state']}: {row['why'].replace('|', '/')}" for row in sorted(rows, key=order) if "why" in row]
    if less:
        lines += ["", "Not generated there, and why:", "", *less]
    return "\n".join(lines) + "\n"


def order(row: Row) -> tuple[str, bool, str]:
    return row["family"], row["recipe"] != SOURCE, row["recipe"]


def title(row: Row) -> str:
    return f"{row['family']}, BF16" if row["recipe"] == SOURCE else f"`{row['recipe']}`"


def cells_of(row: Row) -> Iterator[str]:
    """A row of the table. Differences from the source's answers are in nats."""
    source = row["recipe"] == SOURCE
    yield f"`{row['architecture']}`" if source else ""
    yield "BF16, the source" if source else f"`{row['recipe']}`"
    yield row["state"] + (" *stand-in*" if row.get("stand_ins") else "")
    yield str(row["parameters"])
    yield f"{row['tensors']}" + (f", {row['left']} left" if row["left"] else "")
    apart = row.get("apart") or [None, None]
    yield from ("" if d is None else ("0" if source else f"{d:.3f}") for d in apart)
    yield "<br>".join(f"{name} x {count}" for name, count in row["kernels"].items()) or "BF16"
    yield "FP8" if row["kv_cache"].startswith("fp8") else "as the model"


if __name__ == "__main__":
    sys.exit(main())
