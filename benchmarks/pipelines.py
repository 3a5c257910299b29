"""Diffusion pipelines: conversions with and without prompts, on generated ones of Qwen-Image's shape, with some blocks and with twice as many.

    python benchmarks/pipelines.py [--blocks 3] [--rounds 3] [--prompts 4] [--only data-free|static] [--work DIR]

data-free  qwen-image-fp8-dynamic, and one scale a tensor, in the rounds of benchmarks/data_free.py on twice the blocks: whole processes
           beside llm-compressor's model_free_ptq on the transformer's folder, with a copy of what stays, and the floor, which reads
           the transformer warm, writes half of it and copies what stays, all with fsync. On 12 blocks, 8.2 GB, the goals
           of that script hold, on fewer its bound of memory
static     qwen-image-fp8 of all blocks, two steps at 128 x 128, guidance 4. Peak RSS is bounded by what the imports take, what is
           beside the blocks, two blocks, what waits between them and 256 MB. Turn about on --blocks with ModelOpt's flow, which
           loads the pipeline, calibrates and exports, and a floor, which reads the transformer once a step, runs the prompts
           in BF16 on a pipeline in memory, writes half of the transformer and copies what stays. Goals as in
           benchmarks/speed.py: at most 0.90 of ModelOpt and 1.15 of the floor, imports left out

With twice the blocks the peak may differ by less than 5 %. A block takes 0.68 GB. Exits with 1 where a goal is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_free import IMPORTS, OVER_TORCH, RSS, least
from measure import ROOT, Run, run

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line sets it; the same for every peer
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SHAPE = {"num_attention_heads": 24, "attention_head_dim": 128, "axes_dims_rope": (16, 56, 56), "joint_attention_dim": 1024}
"""Qwen-Image's, but for the width of the text encoder: a small one, of 0.35 GB, stays."""
STEPS, SIDE, GUIDANCE = 2, 128, 4.0
STRICT = 12
"""Blocks of which the goals of speed hold: 8.2 GB."""
SLACK = 256e6
RECIPE = ["--recipe", "qwen-image-fp8-dynamic", "--device", "cpu", "--format", "json"]
DATA_FREE: Mapping[str, Sequence[str]] = {
    "fp8-dynamic": [*RECIPE],
    "fp8-tensor": [*RECIPE, "--set", "components.transformer=fp8-tensor", "--set", "export.format=fp8"],
}


def make(folder: Path, blocks: int) -> None:
    """Writes the pipeline. The transformer's weights, normal values of deviation 1/sqrt(inputs), are never all in memory."""
    import torch
    from diffusers import QwenImageTransformer2DModel

    from ckptq.checkpoint import TensorSpec
    from ckptq.writer import TensorFile
    from pipelines import parts, pipelines

    pipelines()["qwen_image"].make(folder, layers=1)
    shutil.rmtree(folder / "text_encoder")
    parts.qwen2_5_vl(hidden=SHAPE["joint_attention_dim"], layers=16).save_pretrained(folder / "text_encoder")
    with torch.device("meta"):
        model = QwenImageTransformer2DModel(num_layers=blocks, **SHAPE)
    model.save_config(folder / "transformer")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    specs = [TensorSpec(name, "BF16", shape) for name, shape in shapes.items()]
    half, total, at = sum(s.nbytes for s in specs) / 2, 0, 0
    files: tuple[list[TensorSpec], list[TensorSpec]] = ([], [])
    for spec in specs:
        files[total > half].append(spec)
        total += spec.nbytes
    drawn = torch.randn(1 << 25, generator=torch.Generator().manual_seed(0))
    values = {k: (drawn / k**0.5).bfloat16() for k in {s.shape[1] for s in specs if len(s.shape) > 1}}
    (folder / "transformer/diffusion_pytorch_model.safetensors").unlink()
    names = [f"diffusion_pytorch_model-{i:05}-of-00002.safetensors" for i in (1, 2)]
    for name, held in zip(names, files, strict=True):
        offsets = dict(zip((s.name for s in held), _sums(s.nbytes for s in held), strict=False))
        with TensorFile(folder / "transformer" / name, held, offsets) as file:
            for spec in held:
                start = 0
                while len(spec.shape) > 1 and start < spec.nbytes:
                    source = memoryview(values[spec.shape[1]].view(torch.uint8).numpy())[2 * at :][: spec.nbytes - start]
                    file.write(spec.name, start, source)
                    start, at = start + len(source), (at + len(source) // 2) % len(drawn)
                if len(spec.shape) == 1:
                    filled = torch.full(spec.shape, float(spec.name.endswith("weight")), dtype=torch.bfloat16)
                    file.write(spec.name, 0, memoryview(filled.view(torch.uint8).numpy()))
            file.finish()
    weight_map = {spec.name: name for name, held in zip(names, files, strict=True) for spec in held}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "transformer/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _sums(sizes: Iterator[int]) -> Iterator[int]:
    at = 0
    for size in sizes:
        yield at
        at += size


PEER = """
import shutil, sys
from pathlib import Path
from llmcompressor import model_free_ptq
source, output = map(Path, sys.argv[1:])
ignore = ["re:.*_mod.1", "re:img_in", "re:txt_in", "re:time_text_embed.*", "re:.*norm_.*", "re:proj_out"]
shutil.copytree(source, output, ignore=lambda folder, names: ["transformer"] if Path(folder) == source else [])
model_free_ptq(source / "transformer", output / "transformer", scheme="FP8_DYNAMIC", ignore=ignore, device="cpu")
"""
FLOOR = """
import os, sys
from pathlib import Path
source, output = map(Path, sys.argv[1:])
buffer, total = bytearray(1 << 20), 0
for file in sorted((source / "transformer").glob("*.safetensors")):
    with file.open("rb", buffering=0) as reader:
        while count := reader.readinto(buffer):
            total += count
output.mkdir()
left = total // 2
with (output / "half").open("wb", buffering=0) as writer:
    while left > 0:
        left -= writer.write(memoryview(buffer)[: min(left, len(buffer))])
    os.fsync(writer.fileno())
for file in (f for folder in ("text_encoder", "vae") for f in (source / folder).iterdir()):
    with file.open("rb") as reader, (output / file.name).open("wb") as writer:
        while os.copy_file_range(reader.fileno(), writer.fileno(), 1 << 30):
            pass
        os.fsync(writer.fileno())
"""


def main() -> None:
    """Generates both pipelines, runs what is asked for, prints tables."""
    if len(sys.argv) == 4 and sys.argv[1] in CHILDREN:
        CHILDREN[sys.argv[1]](Path(sys.argv[2]), sys.argv[3])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--only", choices=("data-free", "static"))
    parser.add_argument("--work", type=Path, help="where the pipelines go; the system's folder for temporary files")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        work, missed = Path(name), []
        for blocks in (args.blocks, 2 * args.blocks):
            run(child("make", work / f"{blocks}", blocks))
        if args.only != "static":
            missed += data_free(work, args)
        if args.only != "data-free":
            missed += static(work, args)
    print("\n".join(["", *(f"MISSED: {line}" for line in missed)] if missed else ["", "all goals reached"]))
    sys.exit(1 if missed else 0)


def child(kind: str, folder: Path, given: object) -> list[str | Path]:
    """This script as a process of its own."""
    return [sys.executable, ROOT / "benchmarks/pipelines.py", kind, folder, str(given)]


def data_free(work: Path, args: argparse.Namespace) -> list[str]:
    """Runs turn about and prints the tables; the goals that were missed."""
    few, many = (work / f"{blocks}" for blocks in (args.blocks, 2 * args.blocks))
    output = work / "out"
    own = {scheme: [sys.executable, "-m", "ckptq", "convert", *given, "--output", output] for scheme, given in DATA_FREE.items()}
    commands: dict[str, list[str | Path]] = {"floor": [sys.executable, "-c", FLOOR, many, output]}
    commands |= {scheme: [*command, "--model", many] for scheme, command in own.items()}
    commands["peer"] = [sys.executable, "-c", PEER, many, output]
    imports = {name: min((run([sys.executable, "-c", IMPORTS[key]]) for _ in range(3)), key=lambda r: r.wall)
               for name, key in {"torch": "torch", **dict.fromkeys(own, "ckptq"), "peer": "peer"}.items()}  # fmt: skip
    found = rounds(commands, output, args.rounds)
    smaller = rounds({scheme: [*command, "--model", few] for scheme, command in own.items()}, output, 2)
    print(f"\ndata-free, {2 * args.blocks} blocks: {heading(many)}, {args.rounds} rounds; ", end="")
    print(
        f"imports: torch {imports['torch'].rss / 1e6:.0f} MB, ckptq {imports['fp8-tensor'].wall:.1f} s, peer {imports['peer'].wall:.1f} s"
    )
    table(found, imports)
    limit, missed = max(RSS, imports["torch"].rss + OVER_TORCH), []
    for scheme in own:
        peaks = [max(r.rss for r in runs[scheme]) for runs in (smaller, found)]
        missed += flat(f"data-free {scheme}", peaks, args.blocks)
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
            if 2 * args.blocks >= STRICT and (ratio < goal if goal > 0 else ratio > -goal):
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


def flat(what: str, peaks: Sequence[float], blocks: int) -> list[str]:
    """Prints both peaks. What is missed where they differ by 5 % or more."""
    growth = peaks[1] / peaks[0] - 1
    print(f"{what}: peak RSS {peaks[0] / 1e6:.0f} MB with {blocks} blocks, {peaks[1] / 1e6:.0f} MB with {2 * blocks}: ", end="")
    print(f"{growth:+.1%}, less than 5 % wanted")
    return [f"{what}: {growth:+.1%} of memory with twice the blocks"] if abs(growth) >= 0.05 else []


def heading(folder: Path) -> str:
    sizes = [sum(f.stat().st_size for f in (folder / part).glob("*.safetensors")) / 1e9 for part in ("transformer", "text_encoder")]
    return f"transformer {sizes[0]:.2f} GB, what stays {sizes[1]:.2f} GB, {os.cpu_count()} CPUs"


def static(work: Path, args: argparse.Namespace) -> list[str]:
    """Memory of both pipelines against the bound, times of the smaller one; the goals that were missed."""
    from ckptq.checkpoint import read_inventory

    folders = [work / f"{blocks}" for blocks in (args.blocks, 2 * args.blocks)]
    kinds = ("floor", "static", "modelopt")
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for number in range(args.rounds):
        for kind in kinds:
            runs[kind].append(measured(kind, folders[0], args.prompts, number + 1))
    larger = measured("static", folders[1], args.prompts, 1)
    print(f"\nstatic, {args.blocks} blocks: {heading(folders[0])}, {args.prompts} prompts, {STEPS} steps, {args.rounds} rounds")
    print(f"{'':10}{'wall min':>10}{'median':>9}{'CPU':>9}{'process':>9}{'peak RSS':>11}{'imports':>11}")
    for kind, found in runs.items():
        seconds = (min(r["wall"] for r in found), statistics.median(r["wall"] for r in found))
        seconds += (min(r["cpu"] for r in found), min(r["process"] for r in found))
        print(f"{kind:10}" + "".join(f"{s:8.2f}s" for s in seconds), end="")
        print("".join(f"{max(r[key] for r in found) / 1e6:8.0f} MB" for key in ("rss", "baseline")))
    print("its stages: " + ", ".join(f"{name} {s:.2f} s" for name, s in runs["static"][-1]["stages"].items()))
    missed = []
    for peer, goal in (("modelopt", 0.9), ("floor", 1.15)):
        ratios = {key: min(r[key] for r in runs["static"]) / min(r[key] for r in runs[peer]) for key in ("wall", "cpu", "process")}
        print(f"ckptq / {peer}: " + ", ".join(f"{key} {r:.2f}" for key, r in ratios.items()) + f"; wall at most {goal} wanted")
        missed += [f"static: {ratios['wall']:.2f} of {peer}"] if ratios["wall"] > goal else []
    for blocks, folder, found in zip((args.blocks, 2 * args.blocks), folders, (runs["static"], [larger]), strict=True):
        transformer = read_inventory(folder).component("transformer").tensors
        block = sum(t.spec.nbytes for name, t in transformer.items() if name.startswith("transformer_blocks.0."))
        resident = sum(t.spec.nbytes for name, t in transformer.items() if not name.startswith("transformer_blocks."))
        tokens = (SIDE // 16) ** 2 + 64
        terms = {"imports": max(r["baseline"] for r in found), "resident": resident, "two blocks": 2 * block,
                 "waiting": 2 * args.prompts * tokens * 3072 * 4, "slack": SLACK}  # fmt: skip
        peak = max(r["rss"] for r in found)
        print(f"{blocks} blocks: peak RSS {peak / 1e6:.0f} MB, bound {sum(terms.values()) / 1e6:.0f} MB (", end="")
        print(", ".join(f"{name} {nbytes / 1e6:.0f}" for name, nbytes in terms.items()) + ")")
        missed += [f"static: {peak / 1e6:.0f} MB with {blocks} blocks"] if peak > sum(terms.values()) else []
    return missed + flat("static", [max(r["rss"] for r in runs["static"]), larger["rss"]], args.blocks)


def measured(kind: str, folder: Path, prompts: int, number: int) -> dict[str, Any]:
    """What a child measured of itself, and the wall time of the whole process."""
    os.sync()
    found = run(child(kind, folder, prompts))
    result: dict[str, Any] = {**json.loads(found.out.splitlines()[-1]), "process": found.wall}
    print(f"  round {number} {kind}, {folder.name} blocks: {result['wall']:.2f} s", file=sys.stderr, flush=True)
    shutil.rmtree(folder.with_name("out"))
    return result


# --- in processes of their own ---


def measure_self(kind: str, folder: Path, prompts: str) -> None:
    """Imports, runs, and prints wall and CPU seconds, peak RSS and the baseline after the imports."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        import diffusers
        import transformers

        import ckptq.convert
        import ckptq.denoise

        _ = diffusers.QwenImagePipeline, transformers.Qwen2_5_VLForConditionalGeneration
        if kind == "modelopt":
            import modelopt.torch.export
            import modelopt.torch.quantization  # noqa: F401
    from ckptq.cost import peak_rss
    from ckptq.sections import PromptCalibration

    words = (
        "A red door in a white wall",
        "Two gulls over a grey harbor",
        "A bowl of ripe plums",
        "An old tram at night in the rain",
    )
    texts = [f"{words[i % 4]}, take {i}" for i in range(int(prompts))]
    settings = {"source": "prompts", "prompts": texts, "samples": len(texts), "steps": STEPS, "height": SIDE, "width": SIDE,
                "guidance": GUIDANCE}  # fmt: skip
    baseline, wall, before = peak_rss(), time.perf_counter(), cpu_seconds()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        stages = STATIC[kind](folder, folder.with_name("out"), PromptCalibration.model_validate(settings))
    wall = time.perf_counter() - wall - stages.pop("uncounted wall", 0.0)
    cpu = cpu_seconds() - before - stages.pop("uncounted CPU", 0.0)
    print(json.dumps({"wall": wall, "cpu": cpu, "rss": peak_rss(), "baseline": baseline, "stages": stages}))


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def run_ckptq(folder: Path, output: Path, settings: Any) -> dict[str, float]:
    """The command `ckptq convert`: plan, prompts, encoding, copies, validation, publishing."""
    from ckptq.console import Console
    from ckptq.convert import convert, prepare
    from ckptq.recipe import load_recipe

    given = [f"calibration={settings.model_dump_json(exclude_unset=True)}", 'components.transformer="fp8"']
    recipe = load_recipe("qwen-image-fp8", given, model=str(folder), output=str(output))
    console = Console(quiet=True)
    convert(prepare(recipe), resume=False, device="cpu", memory=None, console=console)
    return console.seconds


def run_modelopt(folder: Path, output: Path, settings: Any) -> dict[str, float]:
    """What examples/diffusers/quantization of ModelOpt 0.47 does: load, quantize with calibration, export the pipeline."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from peers.resident_pipeline import load, run

    start = time.perf_counter()
    pipeline = load(folder)
    loaded = time.perf_counter()
    stay = ("*_mod.1*", "*img_in*", "*txt_in*", "*time_text_embed*", "*norm_out*", "*proj_out*")
    rules = [*mtq.FP8_DEFAULT_CFG["quant_cfg"], *({"quantizer_name": name, "enable": False} for name in stay)]
    mtq.quantize(pipeline.transformer, {"quant_cfg": rules, "algorithm": "max"}, lambda model: run(pipeline, settings))
    calibrated = time.perf_counter()
    export_hf_checkpoint(pipeline, export_dir=output)
    return {"load": loaded - start, "calibrate": calibrated - loaded, "export": time.perf_counter() - calibrated}


def run_floor(folder: Path, output: Path, settings: Any) -> dict[str, float]:
    """Runs the prompts on a pipeline that is in memory, then does what data-free runs call the floor; loading is not counted."""
    import torch
    from peers.resident_pipeline import load, run

    before, cpu_before = time.perf_counter(), cpu_seconds()
    pipeline = load(folder)
    for model in (pipeline.text_encoder, pipeline.transformer):
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # out of the file's mapping, so that the forward reads nothing
    start, cpu_start = time.perf_counter(), cpu_seconds()
    with torch.inference_mode():
        run(pipeline, settings)
    ran = time.perf_counter()
    for _ in range(STEPS - 1):
        for file in (folder / "transformer").glob("*.safetensors"):
            with file.open("rb", buffering=0) as reader:
                buffer = bytearray(1 << 20)
                while reader.readinto(buffer):
                    pass
    sys.argv = ["floor", str(folder), str(output)]
    exec(FLOOR, {})
    stages = {"run": ran - start, "read and write": time.perf_counter() - ran}
    return {**stages, "uncounted wall": start - before, "uncounted CPU": cpu_start - cpu_before}


STATIC = {"static": run_ckptq, "modelopt": run_modelopt, "floor": run_floor}
GOALS: Sequence[tuple[str, Callable[[Run], float], float]] = (
    ("wall", lambda r: r.wall, 8),
    ("CPU", lambda r: r.cpu, 6),
    ("user CPU", lambda r: r.user, 10),
)
CHILDREN: Mapping[str, Callable[[Path, str], None]] = {
    "make": lambda folder, blocks: make(folder, int(blocks)),
    **{kind: lambda folder, prompts, kind=kind: measure_self(kind, folder, prompts) for kind in STATIC},
}

if __name__ == "__main__":
    main()
