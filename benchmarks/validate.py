"""How fast `ckptq validate` reads values, against `cat` of the same files; and how long it takes over the layout of a 72B.

    python benchmarks/validate.py [--rounds 5] [--layers 40] [--recipe NAME ...] [--work DIR]

values  a made-up checkpoint in the page cache, in FP8 or in what the recipes make of it, by turns: `cat FILE... > /dev/null`,
        `ckptq validate` with a ckptq.json whose digests it checks, without one, and without values, which is what starting takes
layout  the FP8 output for Qwen2.5-VL-72B (real headers over sparse files), `ckptq validate --no-values`

Each is a process of its own, and counts from its start to its end. Goals, for the fastest rounds: values at 0.7 of the speed of
cat or more, in under 400 MB; layout under 1 s and 100 MB, without torch.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import ROOT, measure

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

SHAPE = {"hidden": 4096, "intermediate": 14336, "heads": 32, "kv_heads": 8, "vocab": 32768, "vision_depth": 8, "vision_hidden": 640}
VALIDATE = [sys.executable, "-m", "ckptq", "validate"]
RECORD, CAT, START = "ckptq.json", "cat", "validate --no-values"


def main() -> None:
    """Makes both checkpoints, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--recipe", action="append", help="a shipped recipe, in place of demo; may be given several times")
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        work = Path(name)
        for recipe in args.recipe or ["demo"]:
            subprocess.run([sys.executable, "-c", MAKE, work, str(args.layers), recipe], cwd=ROOT, check=True)
            values(work / recipe, args.rounds)
            shutil.rmtree(work / recipe)
        subprocess.run([sys.executable, "-c", MAKE_72B, work], cwd=ROOT, check=True)
        layout(work / "fp8-72b", args.rounds)


# In a process of its own: what torch takes there must not count as the peak of a child that begins as this one's copy.
_MAKE = f"""
import sys
from pathlib import Path
sys.path[:0] = {sys.path[:2]!r}
from make_checkpoint import PRESETS, make_checkpoint
from make_quantized import make_quantized
work, one = Path(sys.argv[1]), "export.shard_size=5GB"
"""
MAKE = f"""{_MAKE}
source = work / "bf16"
if not source.exists():
    make_checkpoint(source, layers=int(sys.argv[2]), sparse=True, **{SHAPE!r})
make_quantized(source, work / sys.argv[3], one, name=sys.argv[3])
"""
MAKE_72B = f"""{_MAKE}
make_quantized(make_checkpoint(work / "bf16-72b", **PRESETS["72b"]), work / "fp8-72b", one, sparse=True)
"""


def values(folder: Path, rounds: int) -> None:
    """cat, a scan with digests and one without, and the same command without values: what starting and the layout take."""
    files = sorted(folder.glob("*.safetensors"))
    nbytes = sum(f.stat().st_size for f in files)
    record = (folder / RECORD).read_bytes()
    scan = [*VALIDATE, str(folder)]
    cat = ["sh", "-c", 'cat "$@" > /dev/null', "sh", *map(str, files)]
    commands = {CAT: cat, "validate, with digests": scan, "validate, without": scan}
    commands[START] = [*scan, "--no-values"]
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
    measure(commands[CAT])  # brings the files into the cache
    for _ in range(rounds):
        for name, command in commands.items():
            (folder / RECORD).unlink(missing_ok=True)
            if name == "validate, with digests":
                (folder / RECORD).write_bytes(record)
            found[name].append(measure(command))
    least = {name: min(wall for wall, _ in runs) for name, runs in found.items()}
    print(f"values, {folder.name}: {nbytes / 1e9:.2f} GB in {len(files)} files, {os.cpu_count()} CPUs, {rounds} rounds")
    for name, wall in least.items():
        speed = f", {nbytes / wall / 1e9:.1f} GB/s: {least[CAT] / wall:.2f} of cat" if name not in (CAT, START) else ""
        speed += f", {least[CAT] / (wall - least[START]):.2f} less the start" if speed else ""
        print(f"  {name}: {wall:.2f} s{speed}, {peak(found[name]):.0f} MB")


def layout(folder: Path, rounds: int) -> None:
    """The whole process, headers and index of a 72B included."""
    files = sorted(folder.glob("*.safetensors"))
    nbytes = sum(f.stat().st_size for f in files)
    runs = [measure([*VALIDATE, str(folder), "--no-values"]) for _ in range(rounds)]
    print(f"layout: {nbytes / 1e9:.0f} GB in {len(files)} sparse files")
    print(f"  validate --no-values: {min(wall for wall, _ in runs):.2f} s, {peak(runs):.0f} MB")


def peak(runs: list[tuple[float, int]]) -> float:
    """The largest of all rounds, in MB."""
    return max(rss for _, rss in runs) / 1e6


if __name__ == "__main__":
    main()
