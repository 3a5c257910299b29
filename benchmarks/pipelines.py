"""Diffusion pipelines: conversions with and without prompts, of generated ones in Qwen-Image's shape.

    python benchmarks/pipelines.py [--blocks 3] [--rounds 3] [--prompts 4] [--only data_free|static] [--work DIR]

data_free  qwen-image-fp8-dynamic, and one scale a tensor, turn about on four times --blocks, as in benchmarks/data_free.py: whole
           processes, llm-compressor's model_free_ptq on the transformer's folder with a copy of what stays, and a floor: read the
           transformer warm, write half of it, copy what stays, with fsync. The goals of that script; those of speed hold for 12
           blocks, 8.2 GB, that of memory for any number
static     qwen-image-fp8 of all blocks, two steps at 128 x 128 with guidance, turn about on --blocks: ModelOpt's flow, which loads
           the pipeline, calibrates and exports, and a floor: run the prompts in BF16 on a pipeline in memory, read the transformer
           once a step, end as the other floor. Imports are left out. The goals of benchmarks/speed.py, and of
           benchmarks/memory.py: the imports, what is beside the blocks, two blocks, what waits between them, and 256 MB

Peaks of twice the blocks and of half of them, --blocks and more, may differ by less than 5 %. A block takes 0.68 GB.
Exits with 1 where a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_free import IMPORTS, OVER_TORCH, RSS, least
from measure import ROOT, Run, run
from pipeline_child import FLOOR, SIDE, STEPS

sys.path.insert(0, str(ROOT))

STRICT = 12
"""Blocks of which the goals of speed hold without prompts."""
SLACK = 256e6
COMMAND = ["--recipe", "qwen-image-fp8-dynamic", "--device", "cpu", "--format", "json"]
DATA_FREE: Mapping[str, Sequence[str]] = {
    "fp8-dynamic": COMMAND,
    "fp8-tensor": [*COMMAND, "--set", "components.transformer=fp8-tensor", "--set", "export.format=fp8"],
}
GOALS: Sequence[tuple[str, Callable[[Run], float], float]] = (
    ("wall", lambda r: r.wall, 8),
    ("CPU", lambda r: r.cpu, 6),
    ("user CPU", lambda r: r.user, 10),
)
PEER = """
import shutil, sys
from pathlib import Path
from llmcompressor import model_free_ptq
source, output = map(Path, sys.argv[1:])
ignore = ["re:.*_mod.1", "re:img_in", "re:txt_in", "re:time_text_embed.*", "re:.*norm_.*", "re:proj_out"]
shutil.copytree(source, output, ignore=lambda folder, names: ["transformer"] if Path(folder) == source else [])
model_free_ptq(source / "transformer", output / "transformer", scheme="FP8_DYNAMIC", ignore=ignore, device="cpu")
"""


def main() -> None:
    """Generates both pipelines, runs what is asked for, prints tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--only", choices=[part.__name__ for part in PARTS])
    parser.add_argument("--work", type=Path, help="where the pipelines go; the system's folder for temporary files")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        work, missed = Path(name), []
        for part, times in PARTS.items():
            if args.only in (part.__name__, None):
                missed += part(*(made(work, n * args.blocks) for n in times), args)
    print("\n".join(["", *(f"MISSED: {line}" for line in missed)] if missed else ["", "all goals reached"]))
    sys.exit(1 if missed else 0)


def made(work: Path, blocks: int) -> Path:
    """A pipeline's folder, called after its number of blocks."""
    if not (work / f"{blocks}").is_dir():
        run(child("make", work / f"{blocks}", blocks))
    return work / f"{blocks}"


def child(kind: str, folder: Path, given: int) -> list[str | Path]:
    """pipeline_child.py."""
    return [sys.executable, ROOT / "benchmarks/pipeline_child.py", kind, folder, str(given)]


def data_free(few: Path, many: Path, args: argparse.Namespace) -> list[str]:
    """Runs turn about and prints the tables; the goals that were missed."""
    output = few.with_name("out")
    own = {scheme: [sys.executable, "-m", "ckptq", "convert", *given, "--output", output] for scheme, given in DATA_FREE.items()}
    commands: dict[str, list[str | Path]] = {"floor": [sys.executable, "-c", FLOOR, many, output]}
    commands |= {scheme: [*command, "--model", many] for scheme, command in own.items()}
    commands["peer"] = [sys.executable, "-c", PEER, many, output]
    imports = {name: min((run([sys.executable, "-c", IMPORTS[key]]) for _ in range(3)), key=lambda r: r.wall)
               for name, key in {"torch": "torch", **dict.fromkeys(own, "ckptq"), "peer": "peer"}.items()}  # fmt: skip
    found = rounds(commands, output, args.rounds)
    smaller = rounds({scheme: [*command, "--model", few] for scheme, command in own.items()}, output, 2)
    print(f"\ndata_free: {heading(many)}, {args.rounds} rounds")
    print(f"imports: torch {imports['torch'].rss / 1e6:.0f} MB; ", end="")
    print(", ".join(f"{who} {imports[key].wall:.1f} s" for who, key in (("ckptq", "fp8-tensor"), ("peer", "peer"))))
    table(found, imports)
    limit, missed = max(RSS, imports["torch"].rss + OVER_TORCH), []
    for scheme in own:
        peaks = [max(r.rss for r in runs[scheme]) for runs in (smaller, found)]
        missed += flat(scheme, peaks, (few, many))
        if peaks[1] > limit:
            missed.append(f"{scheme}: {peaks[1] / 1e6:.0f} MB, {limit / 1e6:.0f} wanted")
        stages = json.loads(found[scheme][-1].out)["seconds"]
        print("its stages: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in stages.items()))
        ratios = [
            (f"peer / ckptq, {what}", least(found["peer"], key) / least(found[scheme], key), goal) for what, key, goal in GOALS
        ]
        ratios.append(("ckptq / floor, wall", least(found[scheme], GOALS[0][1]) / least(found["floor"], GOALS[0][1]), -1.5))
        for what, ratio, goal in ratios:
            print(f"{what}: {ratio:.2f}, {'at least' if goal > 0 else 'at most'} {abs(goal):g} wanted of {STRICT} blocks")
            if int(many.name) >= STRICT and (ratio < goal if goal > 0 else ratio > -goal):
                missed.append(f"{scheme}: {what} {ratio:.2f}")
    return missed


def rounds(commands: Mapping[str, list[str | Path]], output: Path, count: int) -> dict[str, list[Run]]:
    """{who: one run a round}, turn about, each into an empty folder, with nothing of an earlier run left to be written."""
    found: dict[str, list[Run]] = {who: [] for who in commands}
    for number in range(count):
        for who, command in commands.items():
            os.sync()
            found[who].append(run(command))
            print(f"  round {number + 1} {who}: {found[who][-1].wall:.2f} s", file=sys.stderr, flush=True)
            shutil.rmtree(output)
    return found


def table(runs: Mapping[str, Sequence[Run]], imports: Mapping[str, Run]) -> None:
    print(f"{'':12}{'wall min':>10}{'median':>9}{'- imports':>11}{'user':>9}{'system':>9}{'CPU':>9}{'peak RSS':>11}")
    for who, found in runs.items():
        less = imports[who].wall if who in imports else 0.0
        walls = (least(found, GOALS[0][1]), statistics.median(r.wall for r in found), least(found, GOALS[0][1]) - less)
        times = (*walls, *(least(found, key) for key in (lambda r: r.user, lambda r: r.system, lambda r: r.cpu)))
        widths = (9, 8, 10, 8, 8, 8)
        print(f"{who:12}" + "".join(f"{t:{w}.2f}s" for t, w in zip(times, widths, strict=True)), end="")
        print(f"{max(r.rss for r in found) / 1e6:8.0f} MB")


def flat(what: str, peaks: Sequence[float], folders: Sequence[Path]) -> list[str]:
    """Prints both peaks. What is missed where they differ by 5 % or more."""
    growth = peaks[1] / peaks[0] - 1
    each = (f"{peak / 1e6:.0f} MB with {folder.name} blocks" for peak, folder in zip(peaks, folders, strict=True))
    print(f"{what}: peak RSS {', '.join(each)}: {growth:+.1%}, less than 5 % wanted")
    return [f"{what}: {growth:+.1%} of memory with twice the blocks"] if abs(growth) >= 0.05 else []


def heading(folder: Path) -> str:
    sizes = [sum(f.stat().st_size for f in (folder / part).glob("*.safetensors")) / 1e9 for part in ("transformer", "text_encoder")]
    return f"{folder.name} blocks, {sizes[0]:.2f} GB, what stays {sizes[1]:.2f} GB, {os.cpu_count()} CPUs"


def static(few: Path, many: Path, args: argparse.Namespace) -> list[str]:
    """Memory of both pipelines against the bound, times of the smaller one; the goals that were missed."""
    from ckptq.checkpoint import read_inventory

    kinds = ("floor", "ckptq", "modelopt")
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for number in range(args.rounds):
        for kind in kinds:
            runs[kind].append(measured(kind, few, args.prompts, number + 1))
    larger = measured("ckptq", many, args.prompts, 1)
    print(f"\nstatic: {heading(few)}, {args.prompts} prompts, {STEPS} steps, {args.rounds} rounds")
    print(f"{'':10}{'wall min':>10}{'median':>9}{'CPU':>9}{'process':>9}{'peak RSS':>11}{'imports':>11}")
    for kind, found in runs.items():
        seconds = (min(r["wall"] for r in found), statistics.median(r["wall"] for r in found))
        seconds += (min(r["cpu"] for r in found), min(r["process"] for r in found))
        print(f"{kind:10}" + "".join(f"{s:8.2f}s" for s in seconds), end="")
        print("".join(f"{max(r[key] for r in found) / 1e6:8.0f} MB" for key in ("rss", "baseline")))
    print("its stages: " + ", ".join(f"{name} {s:.2f} s" for name, s in runs["ckptq"][-1]["stages"].items()))
    missed = []
    for peer, goal in (("modelopt", 0.9), ("floor", 1.15)):
        ratios = {key: min(r[key] for r in runs["ckptq"]) / min(r[key] for r in runs[peer]) for key in ("wall", "cpu", "process")}
        print(f"ckptq / {peer}: " + ", ".join(f"{key} {r:.2f}" for key, r in ratios.items()) + f"; wall at most {goal} wanted")
        missed += [f"static: {ratios['wall']:.2f} of {peer}"] if ratios["wall"] > goal else []
    for folder, found in ((few, runs["ckptq"]), (many, [larger])):
        transformer = read_inventory(folder).component("transformer").tensors
        block = sum(t.spec.nbytes for name, t in transformer.items() if name.startswith("transformer_blocks.0."))
        resident = sum(t.spec.nbytes for name, t in transformer.items() if not name.startswith("transformer_blocks."))
        tokens = (SIDE // 16) ** 2 + 64
        terms = {"imports": max(r["baseline"] for r in found), "resident": resident, "two blocks": 2 * block,
                 "waiting": 2 * args.prompts * tokens * 3072 * 4, "slack": SLACK}  # fmt: skip
        peak = max(r["rss"] for r in found)
        print(f"{folder.name} blocks: peak RSS {peak / 1e6:.0f} MB, bound {sum(terms.values()) / 1e6:.0f} MB (", end="")
        print(", ".join(f"{name} {nbytes / 1e6:.0f}" for name, nbytes in terms.items()) + ")")
        missed += [f"static: {peak / 1e6:.0f} MB with {folder.name} blocks"] if peak > sum(terms.values()) else []
    return missed + flat("static", [max(r["rss"] for r in runs["ckptq"]), larger["rss"]], (few, many))


def measured(kind: str, folder: Path, prompts: int, number: int) -> dict[str, Any]:
    """What a child measured of itself, and the wall time of the whole process."""
    os.sync()
    found = run(child(kind, folder, prompts))
    result: dict[str, Any] = {**json.loads(found.out.splitlines()[-1]), "process": found.wall}
    print(f"  round {number} {kind}, {folder.name} blocks: {result['wall']:.2f} s", file=sys.stderr, flush=True)
    shutil.rmtree(folder.with_name("out"))
    return result


PARTS: Mapping[Callable[..., list[str]], tuple[int, int]] = {data_free: (2, 4), static: (1, 2)}
"""How many times --blocks each takes."""

if __name__ == "__main__":
    main()
