"""ckptq, ModelOpt's own flow and the floor on one checkpoint and the same samples, alternating.

    python benchmarks/speed.py [--rounds 5] [--layers 20] [--samples 32] [--length 256] [--threads N] [--work DIR]

modelopt  load, insert quantizers, calibrate, export: what examples/hf_ptq/hf_ptq.py of ModelOpt 0.47 does, on a CPU, less its
          two sample generations
floor     read the source once, run the base model forward on the samples in BF16, write the output's size once, with fsync

Goals, on the ratio of the fastest rounds: at most 0.90 of ModelOpt and at most 1.15 of the floor. Exits with 1 where one is
missed. Imports are left out of all three.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from make_checkpoint import make_checkpoint  # noqa: E402

SHAPE = {"hidden": 1024, "intermediate": 4096, "heads": 16, "kv_heads": 4, "vocab": 65536, "vision_depth": 8, "vision_hidden": 640}
TEXTS = [str(ROOT / "tests/data/heldout.txt"), str(ROOT / "ckptq/calibration/builtin.txt")]
KINDS = ("floor", "ckptq", "modelopt")


def main() -> None:
    """Runs the rounds and prints minima, medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        runs = measure(Path(work), args)
    report(runs, args)
    sys.exit(0 if ratio(runs, "modelopt", "wall") <= 0.9 and ratio(runs, "floor", "wall") <= 1.15 else 1)


def measure(work: Path, args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """{kind: one result a round}."""
    from ckptq.convert import prepare
    from ckptq.recipe import load_recipe

    model = work / "model"
    make_checkpoint(model, layers=args.layers, **SHAPE)
    planned = prepare(load_recipe("qwen25vl-lm-fp8-text", model=str(model), output="unused")).plan.nbytes
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for number in range(args.rounds):
        for kind in KINDS:
            job = {"model": str(model), "output": str(work / "out"), "text": TEXTS,
                   "samples": args.samples, "length": args.length, "threads": args.threads, "output_bytes": planned}  # fmt: skip
            (work / "job.json").write_text(json.dumps(job))
            shutil.rmtree(work / "out", ignore_errors=True)
            os.sync()  # else one run's unwritten bytes would be flushed at the next one's cost
            child = [sys.executable, str(ROOT / "benchmarks/child.py"), kind, str(work / "job.json")]
            result = json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            runs[kind].append(result)
            stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in result["stages"].items())
            line = f"round {number + 1} {kind}: {result['wall']:.2f} s wall, {result['cpu']:.2f} s CPU ({stages})"
            print(line, file=sys.stderr, flush=True)
    return runs


def report(runs: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> None:
    """The table."""
    print(
        f"{args.layers} layers, {args.samples} samples of at most {args.length} tokens, {args.threads} threads, "
        f"{args.rounds} rounds"
    )
    print(f"{'':10}{'wall min':>10}{'median':>10}{'CPU min':>10}{'median':>10}{'peak RSS':>12}{'less imports':>14}")
    for kind, results in runs.items():
        walls, cpus = ([r[key] for r in results] for key in ("wall", "cpu"))
        rss, own = (statistics.median(r["rss"] - less * r["baseline"] for r in results) / 1e6 for less in (0, 1))
        print(
            f"{kind:10}{min(walls):9.2f}s{statistics.median(walls):9.2f}s{min(cpus):9.2f}s{statistics.median(cpus):9.2f}s"
            f"{rss:9.0f} MB{own:11.0f} MB"
        )
    for peer in ("modelopt", "floor"):
        ratios = ", ".join(
            f"{name} {ratio(runs, peer, key):.2f}" for name, key in (("wall", "wall"), ("CPU", "cpu"), ("peak RSS", "rss"))
        )
        print(f"ckptq / {peer}: {ratios}")


def ratio(runs: dict[str, list[dict[str, Any]]], peer: str, key: str) -> float:
    """The ratio of the minima."""
    return min(r[key] for r in runs["ckptq"]) / min(r[key] for r in runs[peer])


if __name__ == "__main__":
    main()
