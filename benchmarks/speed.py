"""ckptq, ModelOpt's own flow and the floor on one checkpoint and the same samples, alternating.

    python benchmarks/speed.py [--rounds 5] [--layers 20] [--samples 32] [--length 256] [--threads N] [--work DIR]
    python benchmarks/speed.py --device cuda --preset 7b --samples 128 --length 512 --rounds 3

modelopt  load, insert quantizers, calibrate, export: what examples/hf_ptq/hf_ptq.py of ModelOpt 0.47 does, less its two sample
          generations; on a GPU in batches of 8
floor     read the source once, run the base model forward on the samples in BF16, write the output's size once, with fsync

Every sample has `length` tokens. Imports are left out of all three, and shown in `process`, the wall time of the whole process; on
a GPU ckptq is measured by that alone.
Goals, on the ratio of the fastest rounds: at most 0.90 of ModelOpt and at most 1.15 of the floor; on a GPU, without the floor, at
most half of ModelOpt by whole processes, and at most 6 GB of the GPU's memory. Exits with 1 where one is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from make_checkpoint import PRESETS, make_checkpoint  # noqa: E402
from measure import Run, run  # noqa: E402

SHAPE = {"hidden": 1024, "intermediate": 4096, "heads": 16, "kv_heads": 4, "vocab": 65536, "vision_depth": 8, "vision_hidden": 640}
TEXTS = (ROOT / "tests/data/heldout.txt", ROOT / "ckptq/calibration/builtin.txt")
KINDS = {"cpu": ("floor", "ckptq", "modelopt"), "cuda": ("ckptq", "modelopt")}
MOST_GPU = 6e9


def main() -> None:
    """Runs the rounds and prints minima, medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=tuple(KINDS), default="cpu")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="a published size in place of --layers")
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        runs = measure(Path(work), args)
    report(runs, args)
    sys.exit(0 if reached(runs, args.device) else 1)


def reached(runs: dict[str, list[dict[str, Any]]], device: str) -> bool:
    """Whether all goals are."""
    if device == "cuda":
        return ratio(runs, "modelopt", "process") <= 0.5 and max(r["gpu"] for r in runs["ckptq"]) <= MOST_GPU
    return ratio(runs, "modelopt", "wall") <= 0.9 and ratio(runs, "floor", "wall") <= 1.15


def measure(work: Path, args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """{kind: one result a round}."""
    from ckptq.convert import prepare
    from ckptq.recipe import load_recipe

    model = work / "model"
    make_checkpoint(model, **(PRESETS[args.preset] if args.preset else {"layers": args.layers, **SHAPE}))
    texts = write_texts(work / "texts.jsonl", args.samples, args.length)
    planned = prepare(load_recipe("qwen25vl-lm-fp8-text", model=str(model), output="unused")).plan.nbytes
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS[args.device]}
    for number in range(args.rounds):
        for kind in runs:
            job = {"model": str(model), "output": str(work / "out"), "text": [str(texts)],
                   "samples": args.samples, "length": args.length, "threads": args.threads, "output_bytes": planned,
                   "device": args.device, "batch": 8 if args.device == "cuda" else 1}  # fmt: skip
            (work / "job.json").write_text(json.dumps(job))
            shutil.rmtree(work / "out", ignore_errors=True)
            os.sync()  # else one run's unwritten bytes would be flushed at the next one's cost
            done = run(command(kind, job, work / "job.json"))
            result = results(done)
            runs[kind].append(result)
            stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in result["stages"].items())
            times = f"{done.wall:.2f} s process, {result['wall']:.2f} s wall, {result['cpu']:.2f} s CPU"
            line = f"round {number + 1} {kind}: {times} ({stages})"
            print(line, file=sys.stderr, flush=True)
    return runs


def command(kind: str, job: dict[str, Any], file: Path) -> list[str | Path]:
    """The process that is measured: on a GPU, where imports weigh most, ckptq as a user starts it."""
    if kind != "ckptq" or job["device"] == "cpu":
        return [sys.executable, ROOT / "benchmarks/child.py", kind, file]
    calibration = {"source": "text", "files": job["text"], "samples": job["samples"], "sequence_length": job["length"]}
    settings = ["--set", f"calibration={json.dumps(calibration)}", "--model", job["model"], "--output", job["output"]]
    return [sys.executable, "-m", "ckptq", "convert", "--recipe", "qwen25vl-lm-fp8-text", *settings, "--device", "cuda",
            "--format", "json"]  # fmt: skip


def results(done: Run) -> dict[str, Any]:
    """What child.py measured of itself, or what ckptq reports, whose wall time is then that of the whole process."""
    last = done.out.splitlines()[-1]
    if last.startswith("{"):
        return {**json.loads(last), "process": done.wall}
    told = json.loads(done.out)
    return {"wall": done.wall, "cpu": done.cpu, "process": done.wall, "rss": done.rss, "baseline": 0, "gpu": told["peak_gpu"],
            "stages": told["seconds"]}  # fmt: skip


def write_texts(path: Path, count: int, length: int) -> Path:
    """`count` samples of more than `length` tokens each, which the encoder cuts."""
    text = "\n".join(file.read_text(encoding="utf-8") for file in TEXTS)
    lines = (json.dumps({"text": (text[at:] + text)[: 8 * length]}) for at in (997 * i % len(text) for i in range(count)))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def report(runs: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> None:
    """The table."""
    print(
        f"{args.preset or f'{args.layers} layers'}, {args.samples} samples of {args.length} tokens, {args.device}, "
        f"{args.threads} threads, {args.rounds} rounds"
    )
    heads = ("wall min", "median", "CPU min", "median", "process", "peak RSS", "less imports", "GPU")
    print(f"{'':10}" + "".join(f"{head:>13}" for head in heads))
    for kind, results in runs.items():
        walls, cpus = ([r[key] for r in results] for key in ("wall", "cpu"))
        rss, own = (statistics.median(r["rss"] - less * r["baseline"] for r in results) / 1e6 for less in (0, 1))
        seconds = (min(walls), statistics.median(walls), min(cpus), statistics.median(cpus), min(r["process"] for r in results))
        sizes = (rss, own, max(r["gpu"] for r in results) / 1e6)
        print(f"{kind:10}" + "".join(f"{s:11.2f} s" for s in seconds) + "".join(f"{s:10.0f} MB" for s in sizes))
    for peer in (kind for kind in runs if kind != "ckptq"):
        keys = (("wall", "wall"), ("CPU", "cpu"), ("process", "process"), ("peak RSS", "rss"))
        ratios = ", ".join(f"{name} {ratio(runs, peer, key):.2f}" for name, key in keys)
        print(f"ckptq / {peer}: {ratios}")


def ratio(runs: dict[str, list[dict[str, Any]]], peer: str, key: str) -> float:
    """The ratio of the minima."""
    return min(r[key] for r in runs["ckptq"]) / min(r[key] for r in runs[peer])


if __name__ == "__main__":
    main()
