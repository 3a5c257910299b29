"""Conversions without samples: ckptq, llm-compressor's model_free_ptq and the floor, turn about on one generated checkpoint.

    python benchmarks/data_free.py [--size 2|8|large|72] [--rounds 5] [--schemes fp8-dynamic,...] [--device cpu] [--alone]
                                   [--work DIR]

size   2 and 8 GB; large: one decoder layer of a 72B, with tensors of 969 MB; 72: a 72B's 147 GB, for ckptq's memory alone. Its data
       is a hole, which takes no disk, and the output must fit the disk
floor  read the source warm, write half of its size, fsync

Every run is a process of its own, from its start to its end. The peer has no per-tensor scheme: FP8_DYNAMIC stands against it.
Goals on 8 GB, on the ratios of the fastest rounds: 8 times faster than the peer by wall, 6 times by CPU and 10 times by user CPU
(5 times by wall for 4 bits); at most 1.5 times the floor; at most 350 MB, or 130 MB over `import torch` where that takes more than
220 MB. Exits with 1 where one is missed; of other sizes, for memory alone.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from measure import ROOT, Run, run

SMALL = {"vocab": 32768, "vision_depth": 2, "vision_hidden": 320, "vision_heads": 4, "vision_intermediate": 864}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {**SMALL, "layers": 2, "hidden": 1024, "intermediate": 4096, "heads": 8, "kv_heads": 2, "vocab": 4096},
    "2": {**SMALL, "layers": 11, "hidden": 2048, "intermediate": 11008, "heads": 16, "kv_heads": 2},
    "8": {**SMALL, "layers": 16, "hidden": 3584, "intermediate": 18944, "heads": 28, "kv_heads": 4, "shards": 4},
    "16": {"layers": 28, "hidden": 3584, "intermediate": 18944, "heads": 28, "kv_heads": 4, "vocab": 152064, "shards": 5},
    "large": {**SMALL, "layers": 1, "hidden": 8192, "intermediate": 29568, "heads": 64, "kv_heads": 8},
    "72": {"layers": 80, "hidden": 8192, "intermediate": 29568, "heads": 64, "kv_heads": 8, "vocab": 152064, "shards": 38,
           "sparse": True},
}  # fmt: skip
PEERS = {
    "fp8-tensor": "FP8_DYNAMIC",
    "fp8-dynamic": "FP8_DYNAMIC",
    "fp8-block": "FP8_BLOCK",
    "nvfp4a16": "NVFP4A16",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
}
"""Scheme: what the peer calls it, or what of the peer's comes nearest."""
RECIPES = {
    "fp8-tensor": "qwen25vl-lm-fp8-tensor-fp8",
    "fp8-dynamic": "qwen25vl-lm-fp8-dynamic-compressed-tensors",
    "fp8-block": "qwen25vl-lm-fp8-block-compressed-tensors",
    "nvfp4a16": "qwen25vl-lm-nvfp4a16-compressed-tensors",
    "mxfp4": "qwen25vl-lm-mxfp4-compressed-tensors",
    "mxfp8": "qwen25vl-lm-mxfp8-compressed-tensors",
}
FOUR_BITS = ("nvfp4a16", "mxfp4")
RSS, OVER_TORCH = 350e6, 130e6

PEER = """
import sys, time
from llmcompressor import model_free_ptq
source, output, scheme, device = sys.argv[1:]
ignore = ["re:.*visual.*", "re:.*lm_head.*", "re:.*embed_tokens.*"]
model_free_ptq(source, output, scheme=scheme, ignore=ignore, device=device, max_workers=8 if device != "cpu" else 1)
if device != "cpu":
    import json, torch
    print(json.dumps({"peak_gpu": torch.cuda.max_memory_allocated()}))
"""
FLOOR = """
import os, sys
from pathlib import Path
buffer, total = bytearray(1 << 20), 0
for file in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    with file.open("rb", buffering=0) as reader:
        while count := reader.readinto(buffer):
            total += count
left = total // 2
with open(sys.argv[2], "wb", buffering=0) as writer:
    while left > 0:
        left -= writer.write(memoryview(buffer)[: min(left, len(buffer))])
    os.fsync(writer.fileno())
"""
IMPORTS = {"torch": "import torch", "ckptq": "import torch, ckptq.convert, ckptq.pipeline",
           "peer": "from llmcompressor import model_free_ptq"}  # fmt: skip


def main() -> None:
    """Generates the checkpoint, runs the rounds scheme by scheme, prints a table each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--schemes", default=",".join(s for s in PEERS if s != "mxfp8"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--alone", action="store_true", help="leave the peer out")
    parser.add_argument("--work", type=Path, help="where the checkpoints go; the system's folder for temporary files")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        work = Path(name)
        make = f"import sys; sys.path[:0] = {[str(ROOT / 'tests')]!r}\nfrom make_checkpoint import make_checkpoint\n"
        make += f"from pathlib import Path\nmake_checkpoint(Path({str(work / 'in')!r}), **{SIZES[args.size]!r})"
        subprocess.run([sys.executable, "-c", make], check=True)
        size = sum(f.stat().st_size for f in (work / "in").glob("*.safetensors"))
        imports = {name: min((run([sys.executable, "-c", code]) for _ in range(3)), key=lambda r: r.wall)
                   for name, code in IMPORTS.items() if not args.alone or name != "peer"}  # fmt: skip
        print(f"{size / 1e9:.2f} GB, {os.cpu_count()} CPUs, {args.device}, {args.rounds} rounds; imports: ", end="")
        print(", ".join(f"{name} {found.wall:.1f} s {found.rss / 1e6:.0f} MB" for name, found in imports.items()), flush=True)
        limit = max(RSS, imports["torch"].rss + OVER_TORCH)
        schemes, strict = args.schemes.split(","), args.size == "8" and args.device == "cpu"
        runs = rounds(work, schemes, args)
        missed = [line for scheme in schemes for line in report(scheme, of_scheme(scheme, runs), imports, limit, strict=strict)]
    print("\n".join(["", *(f"MISSED: {line}" for line in missed)] if missed else ["", "all goals reached"]))
    sys.exit(1 if missed else 0)


def rounds(work: Path, schemes: Sequence[str], args: argparse.Namespace) -> dict[str, list[Run]]:
    """{who: one run a round}, turn about, each into an empty folder, with nothing of an earlier run left to be written."""
    source, output = work / "in", work / "out"
    peer_device = "cpu" if args.device == "cpu" else "cuda:0"
    commands: dict[str, list[str | Path]] = {"floor": [sys.executable, "-c", FLOOR, source, output]}
    for scheme in schemes:
        commands[f"ckptq {scheme}"] = [
            sys.executable, "-m", "ckptq", "convert", "--recipe", RECIPES[scheme], "--model", source, "--output", output,
            "--device", args.device, "--format", "json"]  # fmt: skip
    for peer in dict.fromkeys(PEERS[scheme] for scheme in schemes):
        commands[f"peer {peer}"] = [sys.executable, "-c", PEER, source, output, peer, peer_device]
    if args.alone or args.size == "72":
        commands = {who: command for who, command in commands.items() if not who.startswith("peer")}
    if args.size == "72":  # a floor would write 73 GB of nothing
        del commands["floor"]
    found: dict[str, list[Run]] = {who: [] for who in commands}
    for number in range(args.rounds):
        for who, command in commands.items():
            os.sync()
            found[who].append(run(command))
            print(f"  round {number + 1} {who}: {found[who][-1].wall:.2f} s", file=sys.stderr, flush=True)
            shutil.rmtree(output) if output.is_dir() else output.unlink()
    return found


def of_scheme(scheme: str, runs: dict[str, list[Run]]) -> dict[str, list[Run]]:
    """What belongs in a scheme's table."""
    names = {"floor": "floor", "ckptq": f"ckptq {scheme}", "peer": f"peer {PEERS[scheme]}"}
    return {short: runs[who] for short, who in names.items() if who in runs}


def report(scheme: str, runs: dict[str, list[Run]], imports: dict[str, Run], limit: float, *, strict: bool) -> list[str]:
    """Prints the table; the goals that were missed."""
    print(f"\n{scheme}, the peer's {PEERS[scheme]}")
    print(f"{'':8}{'wall min':>10}{'median':>9}{'- imports':>11}{'user':>9}{'system':>9}{'CPU':>9}{'peak RSS':>11}{'peak GPU':>11}")
    for who, found in runs.items():
        wall, less = least(found, lambda r: r.wall), imports[who].wall if who in imports else 0.0
        times = "".join(f"{least(found, key):8.2f}s" for key in (lambda r: r.user, lambda r: r.system, lambda r: r.cpu))
        rss, gpu = max(r.rss for r in found) / 1e6, max(_peak_gpu(r) for r in found) / 1e6
        median = statistics.median(r.wall for r in found)
        print(f"{who:8}{wall:9.2f}s{median:8.2f}s{wall - less:10.2f}s{times}{rss:8.0f} MB{gpu:8.0f} MB")
    if stages := json.loads(runs["ckptq"][-1].out).get("seconds"):
        print("ckptq's stages: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in stages.items()))
    missed = []
    rss = max(r.rss for r in runs["ckptq"])
    if rss > limit and strict:
        missed.append(f"{scheme}: {rss / 1e6:.0f} MB, {limit / 1e6:.0f} wanted")
    for name, ratio, wanted, more in _ratios(scheme, runs):
        print(f"{name}: {ratio:.2f}, {'at least' if more else 'at most'} {wanted:g} wanted on 8 GB")
        if strict and (ratio < wanted if more else ratio > wanted):
            missed.append(f"{scheme}: {name} {ratio:.2f}")
    return missed


def _ratios(scheme: str, runs: dict[str, list[Run]]) -> list[tuple[str, float, float, bool]]:
    """(name, ratio of the minima, what is wanted, whether more is better)."""
    goals: list[tuple[str, Callable[[Run], float], float]] = [("wall", lambda r: r.wall, 8), ("CPU", lambda r: r.cpu, 6)]
    goals.append(("user CPU", lambda r: r.user, 10))
    if scheme in FOUR_BITS:
        goals = [("wall", lambda r: r.wall, 5)]
    found = [
        (f"peer / ckptq, {name}", least(runs["peer"], key) / least(runs["ckptq"], key), wanted, True)
        for name, key, wanted in goals
        if "peer" in runs
    ]
    if "floor" in runs and scheme not in FOUR_BITS:
        times = [least(runs[who], lambda r: r.wall) for who in ("ckptq", "floor")]
        found.append(("ckptq / floor, wall", times[0] / times[1], 1.5, False))
    return found


def least(found: list[Run], key: Callable[[Run], float]) -> float:
    """Of the best round."""
    return min(key(r) for r in found)


def _peak_gpu(found: Run) -> float:
    last = found.out.strip().rpartition("\n{")
    try:
        return float(json.loads("{" + last[2] if last[1] else last[2]).get("peak_gpu", 0))
    except (ValueError, AttributeError):
        return 0.0


if __name__ == "__main__":
    main()
