"""`ckptq compare` against one BF16 forward of the same samples, and its memory against `ckptq convert`'s.

    python benchmarks/compare.py [--rounds 2] [--layers 4] [--samples 8] [--length 512] [--threads N] [--work DIR]
    python benchmarks/compare.py --device cuda --preset 7b --layers 8 --samples 64

A checkpoint of Qwen2.5-VL's shape, of random weights, is converted to FP8 static with FP8 KV and to FP8 dynamic. Then, each in a
process of its own, turn about:

forward   transformers' resident model: from_pretrained, the samples one at a time, logits included
streamed  the same layers from disk, one at a time, without the output head: what the engine of `convert` takes
static    ckptq compare SOURCE STATIC --text ...: the weights of both, both models on the samples, both output heads
dynamic   the same of the other

Wall and user CPU are of whole processes, imports included; `forwards` is the wall time of the forwards alone, of a comparison that
of both models and their heads; `weights` what of it the comparison of the weights takes. The goal is on the fastest rounds: a
comparison takes at most 2.5 times the wall time of one forward, the whole process beside the whole process, and on a CPU the
forwards beside the forwards, too.
Then peak memory at that depth and at twice that depth, beside that of `convert` with the same samples, and under --memory. Exits
with 1 where the goal is missed, twice the depth changes the peak by 5 % or more, or --memory is not kept.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from make_checkpoint import PRESETS, make_checkpoint  # noqa: E402
from measure import Run, run  # noqa: E402
from speed import write_texts  # noqa: E402

SHAPE = {"hidden": 2048, "intermediate": 11008, "heads": 16, "kv_heads": 2, "vocab": 32768, "vision_depth": 4, "vision_hidden": 640}
RECIPES = {"static": "qwen25vl-lm-fp8-text", "dynamic": "qwen25vl-lm-fp8-dynamic-modelopt"}
GOAL = 2.5


def main() -> None:
    """Makes the checkpoints, runs the rounds, prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="layers of a published size")
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        good = measure(Path(work), args)
    sys.exit(0 if good else 1)


def measure(work: Path, args: argparse.Namespace) -> bool:
    """Whether all goals are reached."""
    texts = write_texts(work / "texts.jsonl", args.samples, args.length)
    depths = (args.layers, 2 * args.layers)
    shape = {**PRESETS[args.preset]} if args.preset else SHAPE
    models = {layers: make_checkpoint(work / f"model-{layers}", **{**shape, "layers": layers}) for layers in depths}
    converted = {layers: convert(model, "static", texts, args) for layers, model in models.items()}
    source = models[args.layers]
    convert(source, "dynamic", texts, args)
    runs: dict[str, list[dict[str, Any]]] = {}
    for number in range(args.rounds):
        for kind in ("forward", "streamed", "static", "dynamic"):
            found = compared(source, kind, texts, args) if kind in RECIPES else child(kind, source, texts, args)
            runs.setdefault(kind, []).append(found)
            print(f"round {number + 1} {kind}: " + ", ".join(f"{k} {v:.4g}" for k, v in found.items()), file=sys.stderr, flush=True)
    good = report(runs, args)
    deep = compared(models[depths[1]], "static", texts, args)
    rss = [max(found["rss"] for found in runs["static"]), deep["rss"]]
    good = deeper(rss, [found.rss for found in converted.values()], args) and good
    if args.device == "cpu":  # elsewhere it limits what the device gives
        limit = int(0.9 * rss[0])
        tight = compared(source, "static", texts, args, memory=limit)["rss"]
        print(f"compare --memory {limit / 1e6:.0f}MB: {tight / 1e6:.0f} MB")
        good = tight <= limit and good
    return good


def convert(model: Path, kind: str, texts: Path, args: argparse.Namespace) -> Run:
    """`ckptq convert` of the model, beside which the output lies."""
    calibration = {"source": "text", "files": [str(texts)], "samples": args.samples, "sequence_length": args.length}
    settings = ["--set", f"calibration={json.dumps(calibration)}"] if kind == "static" else []
    return run([sys.executable, "-m", "ckptq", "convert", "--recipe", RECIPES[kind], *settings, "--model", model,
                "--output", f"{model}-{kind}", "--device", args.device])  # fmt: skip


def compared(model: Path, kind: str, texts: Path, args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """`ckptq compare` of the model and what it was converted to."""
    return child("compare", model, texts, args, candidate=f"{model}-{kind}", **more)


def child(kind: str, model: Path, texts: Path, args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """One run of benchmarks/child.py."""
    job = {"model": str(model), "output": "unused", "text": [str(texts)], "samples": args.samples, "length": args.length,
           "threads": args.threads, "device": args.device, **more}  # fmt: skip
    file = model.with_name("job.json")
    file.write_text(json.dumps(job))
    found = run([sys.executable, ROOT / "benchmarks/child.py", kind, file])
    stages = json.loads(found.out)["stages"]
    return {"wall": found.wall, "user": found.user, "rss": found.rss, "forwards": stages["forward"],
            "weights": stages.get("weights", 0.0)}  # fmt: skip


def report(runs: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> bool:
    """Prints what was measured. Whether comparisons are fast enough."""
    what = f"{args.layers} layers of {args.preset}" if args.preset else f"{args.layers} layers"
    print(f"{what}, {args.samples} samples of {args.length} tokens, {args.device}, {args.threads} threads, {args.rounds} rounds")
    keys = ("wall", "user", "forwards", "weights")
    print(f"{'':10}" + "".join(f"{key:>12}" for key in (*keys, "peak RSS")))
    for kind, found in runs.items():
        times = [f"{least(found, key):.2f} s" for key in keys]
        print(f"{kind:10}" + "".join(f"{text:>12}" for text in (*times, f"{least(found, 'rss') / 1e6:.0f} MB")))
    good, once = True, runs["forward"]
    for kind in RECIPES:
        wall, user, forwards = (least(runs[kind], key) / least(once, key) for key in ("wall", "user", "forwards"))
        met = wall <= GOAL and (forwards <= GOAL or args.device != "cpu")
        print(f"{kind} / forward: whole processes {wall:.2f}, of their user CPU {user:.2f}, forwards {forwards:.2f} "
              f"(at most {GOAL} wanted: {'reached' if met else 'MISSED'})")  # fmt: skip
        good = good and met
    return good


def least(found: list[dict[str, Any]], key: str) -> float:
    return float(min(each[key] for each in found))


def deeper(ours: list[float], theirs: list[float], args: argparse.Namespace) -> bool:
    """Prints the peaks of compare and convert at both depths. Whether compare's is the same."""
    told = [f"{a / 1e6:.0f} and {b / 1e6:.0f} MB ({b / a - 1:+.1%})" for a, b in (ours, theirs)]
    print(f"peak RSS, {args.layers} and {2 * args.layers} layers: compare {told[0]}, convert {told[1]}")
    return ours[1] / ours[0] < 1.05


if __name__ == "__main__":
    main()
