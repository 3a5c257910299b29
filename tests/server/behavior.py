"""What the real vLLM makes of checkpoint folders, each compared with a good one. Runs in the interpreter that has vLLM.

    python tests/server/behavior.py JOBS.json RESULTS.jsonl

JOBS.json: [{name, folder, good, source}], the jobs of one good export in a row. RESULTS.jsonl gets one line a job, as soon as it is
done: {name, label, ...evidence}. A process that dies has written what came before. All jobs of a process are of models with
experts, or all of such without: vLLM makes the group of expert parallelism once, for the first model.

Two things are set apart from a server's own run. Memory that nobody wrote is filled with NaN (torch's deterministic mode), which
makes what it holds the same each time. And the CPU build's own packing of unquantized and of INT8 weights is left out, which would
hide them; nor are those of MXFP8 dequantized.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "CRITICAL",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TQDM_DISABLE": "1",
    "VLLM_MXFP8_EMULATION_DEQUANT_AT_LOAD": "0",
}

import torch

CHILD = Path(__file__).parents[2] / "ckptq/validators/vllm_child.py"
CODE_STEP = 2.0**-3
"""Between neighboring E4M3 codes, relative to the smaller one, at most."""
SMALLEST = 2.0**-9
"""The smallest E4M3 value above zero, and the step between the smallest codes."""
TWICE_ROUNDED = 0.04
"""Rounding to E4M3 errs by 2.6 % in root mean square; two roundings of one weight under two scales differ by 3.7 %."""
BF16_STEP = 2.0**-7
LOSS = 1.1
"""A weight whose error against the source has grown by this factor has lost bits."""
SHOWN = 2
GONE = "not there"
EXPERTS, PARTS = ("w13_weight", "w2_weight"), ("_scale", "_scale_2")
OF_INPUTS = (".input_global_scale", ".input_global_scale_inv", ".alpha", ".w13_input_scale", ".w2_input_scale")
WEIGHTS_ALONE = ".is_w4a16_nvfp4"
"""Tensors of NVFP4 alone that weight-only kernels do without, and the layer's mark that it has such a kernel."""
WITHIN = ("weight_scale", "weight_scale_inv", "weight_global_scale", "alpha", "azp_adj")
"""Tensors that follow from weights or are parts of them."""
READ_BEFORE = tuple(f"{part}_{of}_global_scale" for part in ("w13", "w2") for of in ("weight", "input"))
"""Of compressed-tensors' NVFP4 experts, what others were made from and nothing reads any more."""

Values = dict[str, torch.Tensor]


def label(found: Mapping[str, Any]) -> str:
    """The rules, in their order. Each goes by what was measured; none knows what the mutant was meant to be.

    refused   vLLM raised, or its process died, before the model was ready
    wrong     after vLLM's post-processing, something it computes with differs from the good export's beyond rounding:
              - it has another dtype or shape, is not there, or is a setting of a module (heads, widths, the KV cache's dtype)
              - a quantized weight, which is its codes times their scales, of whatever format: a value differs by more than one
                step of E4M3, for FP8 under the coarser of both scales, or all of them by more than 4 % in root mean square, as no
                rounding to FP8 does
              - any other tensor, scales of activations, keys and values among them: a value differs by more than one step of BF16
              - something that was finite is not, among it all memory that nothing wrote
    degraded  none of that, and
              - FP8 is declared for the KV cache and no layer has a scale for it, so that vLLM takes 1.0: this alone is not called
                wrong, because it is what an exporter writes who does not calibrate the cache, or
              - a quantized weight lies farther from the source's, in root mean square, by the factor 1.1 or more, or
              - scales of activations that the good export has are gone, and nothing else: the server leaves activations as they are
    harmless  everything else: all that vLLM computes with is the good export's, up to rounding
    """
    if found["error"]:
        return "refused"
    if found["differ"]:
        return "wrong"
    return "degraded" if found["kv_absent"] or found["lost"] or found["unscaled"] else "harmless"


def vllm_child() -> Any:
    spec = importlib.util.spec_from_file_location("vllm_child", CHILD)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["vllm_child"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepare() -> None:
    """Sets up the process, once."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    from vllm.model_executor.layers import linear, utils, vocab_parallel_embedding

    for module in (linear, utils, vocab_parallel_embedding):
        if hasattr(module, "dispatch_cpu_unquantized_gemm"):
            module.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: None  # type: ignore[attr-defined]
    from vllm.model_executor.kernels.linear.scaled_mm import cpu

    kernel: Any = cpu.CPUInt8ScaledMMLinearKernel
    pack = kernel.process_weights_for_onednn

    def process_weights_for_onednn(self: Any, layer: Any) -> None:
        codes = layer.weight.data
        pack(self, layer)
        layer.weight = torch.nn.Parameter(codes.t(), requires_grad=False)

    kernel.process_weights_for_onednn = process_weights_for_onednn
    cpu.check_cpu_sgl_kernel = lambda *_: False  # type: ignore[assignment]


# --- what vLLM computes with ---


def effective(model: Any) -> Values:
    """Parameters and buffers after post-processing, and attention's scales, on the CPU."""
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, module in model.named_modules():
        scales = {f"{name}.{scale}": getattr(module, scale, None) for scale in ("_q_scale", "_k_scale", "_v_scale", "_prob_scale")}
        scales |= {f"{name}.{scale}": getattr(module, scale, None) for scale in ("w13_input_scale", "w2_input_scale")}
        found |= {key: value for key, value in scales.items() if isinstance(value, torch.Tensor)}
    return {name: found[name].detach().cpu() for name in sorted(found)}


def computed(model: Any) -> tuple[Values, dict[str, str], dict[str, Any], dict[str, float]]:
    """(float32 values, dtypes, settings of modules, smallest steps of quantized weights, 0 where not FP8), each by name.

    A quantized weight is its codes times their scales.
    """
    shared = {name: p.detach().cpu() for name, p in model.named_parameters(remove_duplicate=False)}
    stored = {name: tensor for name, tensor in {**shared, **effective(model)}.items() if not name.endswith(READ_BEFORE)}
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in stored.items()}
    values: Values = {}
    steps = {}
    for name, tensor in stored.items():
        scale = scale_of(name, stored)
        values[name] = tensor.float() if scale is None else decoded(tensor) * scale
        if scale is not None:
            steps[name] = SMALLEST * float(scale.abs().max()) if tensor.dtype == torch.float8_e4m3fn else 0.0
    of_experts = [f"{n}{end}" for n in stored if stored[n].dtype == torch.uint8 and n.endswith(EXPERTS) for end in PARTS]
    for name in [name for name in stored if name.rpartition(".")[2] in WITHIN or name in of_experts]:
        del values[name]
    return values, dtypes, dict(settings(model)), steps


def scale_of(name: str, stored: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """What multiplies with the codes of a quantized weight, in their shape or one that broadcasts to it."""
    if not name.endswith("weight") or stored[name].dtype not in (torch.float8_e4m3fn, torch.int8, torch.uint8):
        return None
    found = next((stored[s] for s in (f"{name}_scale", f"{name}_scale_inv") if s in stored), None)
    if found is None:
        return None
    scale = (found.float() - 127).exp2() if found.dtype == torch.uint8 else found.float()
    whole = stored.get(f"{name}_global_scale")
    if name.endswith(EXPERTS) and f"{name}_scale_2" in stored:  # one an expert
        whole = stored[f"{name}_scale_2"].reshape(-1, 1, 1)
    return spread(scale, decoded(stored[name])) * (1.0 if whole is None else whole.float())


def decoded(codes: torch.Tensor) -> torch.Tensor:
    """Float32: of U8 two E2M1 values each, the first one in the low bits."""
    if codes.dtype != torch.uint8:
        return codes.float()
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    return torch.cat([table, -table])[torch.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], -1).long()]


def spread(scale: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The scale in a shape that multiplies with `codes`: one; one a column of a transposed weight; one a block; one an expert."""
    if scale.numel() == 1:
        return scale.reshape(())
    if codes.ndim == 3 and scale.numel() == codes.shape[0]:
        return scale.reshape(-1, 1, 1)
    if codes.ndim == 2 and scale.numel() == codes.shape[1] and (scale.ndim == 1 or scale.shape[1] == 1):
        return scale.reshape(1, -1)
    for dim in (-2, -1):
        if scale.shape[dim] not in (1, codes.shape[dim]):
            block = 128 if -(-codes.shape[dim] // 128) == scale.shape[dim] else -(-codes.shape[dim] // scale.shape[dim])
            scale = scale.repeat_interleave(block, dim).narrow(dim, 0, codes.shape[dim])
    return scale


def settings(model: Any) -> Iterator[tuple[str, Any]]:
    """Numbers and names that modules hold, other than tensors: heads, widths, epsilons, dtypes of the KV cache."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if not key.startswith("_") and type(value) in (int, float, str, bool):
                yield f"{name}.{key}", value


# --- the comparison ---


def compare(good: Any, found: Any, absent: bool) -> Iterator[tuple[str, str]]:
    """(name, how it differs beyond rounding). `absent`: scales and dtype of the KV cache are not to be looked at."""
    (b_values, b_dtypes, b_settings, b_steps), (a_values, a_dtypes, a_settings, a_steps) = good, found
    for name in sorted(b_dtypes.keys() | a_dtypes.keys()):
        if name not in a_dtypes or name not in b_dtypes:
            yield name, GONE if name in b_dtypes else "not in the good export"
        elif a_dtypes[name] != b_dtypes[name]:
            yield name, f"{a_dtypes[name]}, not {b_dtypes[name]}"
        elif name in b_values and not (absent and name.endswith(("._k_scale", "._v_scale"))):
            step = max(a_steps.get(name, 0.0), b_steps[name]) if name in b_steps else None
            yield from differs(name, a_values[name], b_values[name], step)
    # What only one of them has tells of classes, and those show in tensors.
    for name in sorted(b_settings.keys() & a_settings.keys()):
        if b_settings[name] != a_settings[name] and not (absent and name.endswith(".kv_cache_dtype")):
            yield name, f"{a_settings[name]!r}, not {b_settings[name]!r}"


def differs(name: str, a: torch.Tensor, b: torch.Tensor, step: float | None) -> Iterator[tuple[str, str]]:
    """`step`: the smallest one of a quantized weight."""
    if a.numel() == b.numel() == 1:
        a, b = a.reshape(()), b.reshape(())
    if a.shape != b.shape:
        yield name, f"shape {list(a.shape)}, not {list(b.shape)}"
        return
    lost = int((b.isfinite() & ~a.isfinite()).sum())
    if lost:
        yield name, f"{lost} of {a.numel()} not finite"
        return
    both = torch.maximum(a.abs(), b.abs())
    beyond = (a - b).abs() > (both * BF16_STEP if step is None else both * CODE_STEP + step)
    apart = 0.0 if step is None else float((a - b).norm() / b.norm())
    if apart > TWICE_ROUNDED:
        yield name, f"by {apart:.2g} in root mean square"
    elif beyond.any():
        ratio = ((a - b).abs() / b.abs().clamp_min(float(b.abs().max()) * 1e-3)).max()
        shown = (
            f"{a.item():.3g}, not {b.item():.3g}" if a.numel() == 1 else f"{int(beyond.sum())} of {a.numel()} by up to {ratio:.2g}"
        )
        yield name, shown


def losses(values: Values, steps: Mapping[str, float], source: Values, turned: Mapping[str, bool] | None) -> dict[str, Any]:
    """{quantized weight: (relative RMS error against the source's, whether it is stored transposed)}."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name not in steps or name not in source:
            continue
        whole = source[name]
        ways = (False, True) if turned is None else (turned.get(name, False),)
        errors = {
            way: float((value - right).norm() / right.norm())
            for way in ways
            if (right := whole.transpose(-1, -2) if way else whole).shape == value.shape
        }
        if errors:
            way = min(errors, key=lambda w: errors[w])
            found[name] = errors[way], way
    return found


# --- jobs ---


class Session:
    """The good export of the current jobs, and what the process needs."""

    def __init__(self) -> None:
        self.child = vllm_child()
        self.paths = ("", "")
        self.good: Any = None
        self.source: Values = {}
        self.losses: dict[str, Any] = {}
        self.casts: frozenset[str] = frozenset()
        self.kv_absent = False

    def load(self, folder: str) -> tuple[Any, dict[str, Any]]:
        loaded = self.child.load(folder)
        found = None if loaded.model is None else computed(loaded.model)
        del loaded.model
        gc.collect()
        gc.freeze()  # what is left stays: vLLM looks through all of it twice in a load, which took most of its time
        return found, loaded.trace

    def use(self, good: str, source: str) -> None:
        if self.paths == (good, source):
            return
        self.good, trace = self.load(good)
        assert self.good is not None, f"{good}: {trace['error']}"
        again, _ = self.load(good)
        assert not (noise := list(compare(self.good, again, False))), f"{good}: differs from itself: {noise}"
        assert not (gaps := list(unwritten(trace))), f"{good}: nothing wrote {gaps}"
        self.casts, self.kv_absent = frozenset(casts(trace)), kv_absent(trace)
        if self.paths[1] != source:
            (self.source, *_), _ = self.load(source)
        self.losses = losses(self.good[0], self.good[3], self.source, None)
        self.paths = (good, source)

    def run(self, job: Mapping[str, str]) -> dict[str, Any]:
        """The mutant's row: its name, label and evidence."""
        self.use(job["good"], job["source"])
        found, trace = self.load(job["folder"])
        assert not trace["problems"], trace["problems"]
        evidence: dict[str, Any] = {"error": None, "differ": [], "kv_absent": False, "lost": [], "unscaled": []}
        if error := trace["error"]:
            evidence["error"] = f"{error['type']}: {error['message']}".replace(job["folder"], "FOLDER")[:160]
            file = error["where"].partition(":")[0]
            evidence["where"] = f"{trace['stage']}: {Path(file).name if file.startswith('/') else file}"
        else:
            evidence["kv_absent"] = absent = kv_absent(trace) and not self.kv_absent
            every = list(compare(self.good, found, absent))
            evidence["unscaled"] = gone = [(name, how) for name, how in every if name.endswith(OF_INPUTS) and how == GONE]
            evidence["differ"] = [
                (name, how) for name, how in every if (name, how) not in gone and not name.endswith(WEIGHTS_ALONE)
            ]
            evidence["lost"] = [] if evidence["differ"] else list(self.lost(found))
        evidence["unwritten"] = list(unwritten(trace))
        evidence["ignored"] = [key for key, seen in trace["keys"].items() if not seen["parameters"]]
        evidence["unread"] = [key for key, seen in trace["keys"].items() if seen["parameters"] and seen["read"] < seen["elements"]]
        evidence["casts"] = [cast for cast in casts(trace) if cast not in self.casts]
        return {"name": job["name"], "label": label(evidence), **compact(evidence)}

    def lost(self, found: Any) -> Iterator[tuple[str, str]]:
        """(quantized weight, how much farther from the source's it lies)."""
        turned = {name: way for name, (_, way) in self.losses.items()}
        for name, (loss, _) in losses(found[0], found[3], self.source, turned).items():
            before, _ = self.losses.get(name, (loss, False))
            if loss > LOSS * before:
                yield name, f"error {loss:.3f}, not {before:.3f}"


def unwritten(trace: Mapping[str, Any]) -> Iterator[str]:
    for name, parameter in trace["parameters"].items():
        if not parameter["exempt"]:
            yield from (f"{name} {part['part']}".strip() for part in parameter["missing"])


def kv_absent(trace: Mapping[str, Any]) -> bool:
    """FP8 is declared for the KV cache, and no layer's scale of keys or values was written."""
    scales = [p for name, p in trace["parameters"].items() if name.endswith((".k_scale", ".v_scale")) and p["exempt"] == "kv scale"]
    return bool(scales) and not any(p["written"] for p in scales) and trace["kv_cache_dtype"].startswith("fp8")


def casts(trace: Mapping[str, Any]) -> list[str]:
    """Stored tensors whose values the server's copy did not keep."""
    return [
        f"{key} {seen['dtype'].removeprefix('torch.')} -> {cast['to'].removeprefix('torch.')}"
        for key, seen in trace["keys"].items()
        for cast in seen["casts"]
        if cast["changed"]
    ]


def compact(evidence: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is empty; of long lists the first entries and their number."""
    kept: dict[str, Any] = {}
    for key, value in evidence.items():
        if isinstance(value, list) and value:
            shown = [" ".join(entry) if isinstance(entry, tuple) else entry for entry in value[:SHOWN]]
            kept[key] = [*shown, f"and {len(value) - SHOWN} more"] if len(value) > SHOWN else shown
        elif value and not isinstance(value, list):
            kept[key] = value
    return kept


def main(jobs: str, results: str) -> None:
    prepare()
    session = Session()
    with Path(results).open("a", encoding="utf-8") as file:
        for job in json.loads(Path(jobs).read_text(encoding="utf-8")):
            file.write(json.dumps(session.run(job)) + "\n")
            file.flush()
    os._exit(0)  # the process group needs no goodbye


if __name__ == "__main__":
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]
    main(*sys.argv[1:])
