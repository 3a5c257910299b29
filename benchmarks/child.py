"""One measured run in a process of its own: `python benchmarks/child.py KIND JOB.json` prints one JSON line.

KIND is a key of RUNS. The clock starts when all that a kind needs is imported. JOB.json: model, output, text,
samples, length, threads, device (cpu or cuda), batch (samples of one length that ModelOpt gets at once), recipe (of ckptq).
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import resource
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line sets it; the same for every peer

MODEL = (
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.auto.modeling_auto",
    "ckptq.convert",
    "ckptq.calibration.encode",
)
IMPORTS = {
    "floor": MODEL,
    "ckptq": (*MODEL, "ckptq.calibrate"),
    "modelopt": (*MODEL, "modelopt.torch.quantization", "modelopt.torch.export"),
    "forward": MODEL,
    "streamed": (*MODEL, "ckptq.compare.sides"),
    "compare": ("ckptq.compare",),
}
"""What each kind would import later."""


def main() -> None:
    """Imports, runs, and prints wall and CPU seconds, peak RSS and the baseline after the imports."""
    kind, job = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for module in IMPORTS[kind]:
            importlib.import_module(module)
    import torch

    from ckptq.cost import peak_rss

    torch.set_num_threads(job["threads"])
    baseline = peak_rss()
    shutil.rmtree(job["output"], ignore_errors=True)
    wall, cpu = time.perf_counter(), _cpu()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        stages = RUNS[kind](job)
    wall = time.perf_counter() - wall - stages.pop("uncounted wall", 0.0)
    cpu = _cpu() - cpu - stages.pop("uncounted CPU", 0.0)
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    result = {"wall": wall, "cpu": cpu, "rss": peak_rss(), "baseline": baseline, "gpu": gpu, "stages": stages}
    print(json.dumps(result))


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def run_ckptq(job: dict[str, Any]) -> dict[str, float]:
    """The command `ckptq convert`, as a user runs it: scan, calibration, encoding, validation, publishing."""
    from ckptq.console import Console
    from ckptq.convert import convert, prepare
    from ckptq.recipe import load_recipe

    calibration = {"source": "text", "files": job["text"], "samples": job["samples"], "sequence_length": job["length"]}
    overrides = [f"calibration={json.dumps(calibration)}", "export.shard_size=5GB"]
    recipe = load_recipe(job.get("recipe", "qwen25vl-lm-fp8-text"), overrides, model=job["model"], output=job["output"])
    console = Console(quiet=True)
    convert(prepare(recipe), resume=False, device=job.get("device", "cpu"), memory=job.get("memory"), console=console)
    return console.seconds


def run_modelopt(job: dict[str, Any]) -> dict[str, float]:
    """ModelOpt's resident flow on the same samples: load, quantize with calibration, export."""
    from peers.modelopt_export import export

    start = time.perf_counter()
    export(Path(job["model"]), Path(job["output"]), _batches(_inputs(job), job.get("batch", 1)), device=job.get("device", "cpu"))
    return {"all": time.perf_counter() - start}


def run_floor(job: dict[str, Any]) -> dict[str, float]:
    """Read the source once, run the base model forward on the samples, write as many bytes as the output once.

    Tokenizing the samples and loading the model are not counted: its weights are in memory before the forward begins.
    """
    import torch
    import transformers

    before, cpu_before = time.perf_counter(), _cpu()
    inputs = _inputs(job)
    model = transformers.AutoModelForImageTextToText.from_pretrained(job["model"], dtype=torch.bfloat16).model
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # out of the file's mapping, so that the forward reads nothing
    start, cpu_start = time.perf_counter(), _cpu()
    buffer = bytearray(1 << 20)  # larger ones are slower here: they leave the cache
    for file in sorted(Path(job["model"]).glob("*.safetensors")):
        with file.open("rb", buffering=0) as reader:
            while reader.readinto(buffer):
                pass
    read = time.perf_counter()
    with torch.inference_mode():
        for sample in inputs:
            model(**sample, use_cache=False)
    forwarded = time.perf_counter()
    output = Path(job["output"])
    output.mkdir()
    left = job["output_bytes"]
    with (output / "floor").open("wb", buffering=0) as writer:
        while left > 0:
            left -= writer.write(memoryview(buffer)[: min(left, len(buffer))])
        os.fsync(writer.fileno())
    written = time.perf_counter()
    uncounted = {"uncounted wall": start - before, "uncounted CPU": cpu_start - cpu_before}
    return {"read": read - start, "forward": forwarded - read, "write": written - forwarded, **uncounted}


def run_forward(job: dict[str, Any]) -> dict[str, float]:
    """One BF16 forward of each sample, logits included, by transformers' own resident model."""
    import torch
    import transformers

    inputs = _inputs(job)
    model = transformers.AutoModelForImageTextToText.from_pretrained(job["model"], dtype=torch.bfloat16).to(job["device"])
    start = time.perf_counter()
    with torch.inference_mode():
        for sample in inputs:
            logits = model(**{name: tensor.to(job["device"]) for name, tensor in sample.items()}, use_cache=False).logits
            float(logits[0, 0, 0])  # on a GPU, wait for it
    return {
        "forward": time.perf_counter() - start,
    }


def run_streamed(job: dict[str, Any]) -> dict[str, float]:
    """The same through the layers alone, in lock-step, from disk."""
    import torch

    from ckptq.calibration.encode import Encoder
    from ckptq.compare.sides import open_side
    from ckptq.console import Console
    from ckptq.lockstep import Wave

    encoder, samples, console = Encoder(Path(job["model"]), None, job["length"]), _samples(job), Console(quiet=True)
    start = time.perf_counter()
    with (
        torch.inference_mode(),
        open_side(Path(job["model"]), torch.device(job["device"])) as side,
        Wave(side.model, lambda number: encoder.encode(samples[number])) as wave,
    ):
        wave.enter(range(len(samples)), 1 << 62, console)
        for _ in wave.layers():
            wave.step()
    return {
        "forward": time.perf_counter() - start,
    }


def run_compare(job: dict[str, Any]) -> dict[str, float]:
    """`ckptq compare` of `model` and `candidate`, and of that what the samples took: towers, layers and heads of both."""
    from ckptq.compare import Asked, compare
    from ckptq.console import Console
    from ckptq.sections import TextCalibration

    settings = TextCalibration(source="text", files=job["text"], samples=job["samples"], sequence_length=job["length"])
    console = Console(quiet=True)
    compare(Asked(job["model"], job["candidate"], samples=settings, device=job["device"], memory=job.get("memory")), console)
    return {**console.seconds, "forward": sum(console.seconds[stage] for stage in ("enter", "compare", "heads"))}


def _inputs(job: dict[str, Any]) -> list[dict[str, Any]]:
    from ckptq.calibration.encode import Encoder

    encoder = Encoder(Path(job["model"]), None, job["length"])
    return [encoder.encode(sample) for sample in _samples(job)]


def _samples(job: dict[str, Any]) -> list[Any]:
    from ckptq.calibration import load_samples
    from ckptq.sections import TextCalibration

    return load_samples(TextCalibration(source="text", files=job["text"], samples=job["samples"], sequence_length=job["length"]))


def _batches(inputs: list[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """Up to `size` samples of one length in each, so that none is padded."""
    import torch

    if size == 1:
        return inputs
    by_length: dict[int, list[Any]] = {}
    for sample in inputs:
        by_length.setdefault(sample["input_ids"].shape[1], []).append(sample["input_ids"])
    return [{"input_ids": torch.cat(same[at : at + size])} for same in by_length.values() for at in range(0, len(same), size)]


RUNS = {"ckptq": run_ckptq, "modelopt": run_modelopt, "floor": run_floor, "forward": run_forward, "streamed": run_streamed,
        "compare": run_compare}  # fmt: skip

if __name__ == "__main__":
    main()
