"""What benchmarks/pipelines.py runs in processes of their own: `python benchmarks/pipeline_child.py KIND DIR NUMBER`.

make                     writes a pipeline of NUMBER blocks into DIR
ckptq, modelopt, floor   converts the one in DIR with NUMBER prompts to `out` beside it, and prints one JSON line. The clock starts
                         when all that a kind needs is imported
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line sets it; the same for every peer
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SHAPE = {"num_attention_heads": 24, "attention_head_dim": 128, "axes_dims_rope": (16, 56, 56), "joint_attention_dim": 1024}
"""Qwen-Image's, but for the width of the text encoder: a small one, of 0.35 GB, stays."""
STEPS, SIDE, GUIDANCE = 2, 128, 4.0
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
    kind, folder, number = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    make(folder, number) if kind == "make" else measure_self(kind, folder, number)


def make(folder: Path, blocks: int) -> None:
    """Writes the pipeline. The transformer's weights, normal values of deviation 1/sqrt(inputs), are never all in memory."""
    import torch
    from diffusers import QwenImageTransformer2DModel
    from pipelines import parts, pipelines

    from ckptq.checkpoint import TensorSpec
    from ckptq.writer import TensorFile

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


def measure_self(kind: str, folder: Path, prompts: int) -> None:
    """Imports, runs, and prints wall and CPU seconds, peak RSS and the baseline after the imports."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        import diffusers
        import transformers

        import ckptq.convert
        import ckptq.denoise  # noqa: F401

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
    texts = [f"{words[i % 4]}, take {i}" for i in range(prompts)]
    settings = {"source": "prompts", "prompts": texts, "samples": len(texts), "steps": STEPS, "height": SIDE, "width": SIDE,
                "guidance": GUIDANCE}  # fmt: skip
    baseline, wall, before = peak_rss(), time.perf_counter(), cpu_seconds()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        stages = RUNS[kind](folder, folder.with_name("out"), PromptCalibration.model_validate(settings))
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


RUNS = {"ckptq": run_ckptq, "modelopt": run_modelopt, "floor": run_floor}


if __name__ == "__main__":
    main()
