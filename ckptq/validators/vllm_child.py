"""Loads a checkpoint with the real vLLM and says what its loader read and wrote. Runs in the interpreter that has vLLM.

    python vllm_child.py FOLDER RESULT.json [--generate]

It imports nothing of ckptq. Loading alone builds vLLM's config and model and runs its loader, without an engine: no KV cache, no
scheduler. With --generate the whole `LLM` is made, watched in the same way, and answers two prompts, of text and of images.
Written for vLLM 0.32.0; what it hooks into, by wrapping and never replacing: `BaseModelLoader.load_model` and
`.create_model`, `DefaultModelLoader.load_weights` and `.get_all_weights` (model_executor/model_loader/). Exit code 71: no vLLM; 72: one that can't be
imported. Everything else, a refused checkpoint too, is in RESULT.json; a file that isn't there means that the process died.

The trace, as JSON:
    version, platform, architecture, quantization, kv_cache_dtype
    stage       config, create, load, process, engine, generate or done: where it ended
    error       null, or {type, message, where, traceback}
    seconds     {create, load, model: both and the post-processing, generate, all: everything but imports}
    kernels     {name of the kernel that vLLM chose for linears: how many}
    stand_ins   what this CPU build of vLLM lacks and was stood in for; see `stand_in`
    problems    operations that the tracker could not follow; empty in every case that is known
    keys        {stored tensor: {dtype, shape, elements, read, times, unread, parameters, casts}}, see vllm_track.py
    parameters  {parameter: {dtype, shape, elements, written, unwritten, keys, exempt, missing}}; `exempt`: why nothing need write it,
                or "" (for "kv scale", `cache` is the dtype of that attention's KV cache); `missing`: [{part, rows, elements, of}] of the
                elements that nothing wrote: `part` as the checkpoint names it, [first, end) of the rows, how many of how many
    generated   with --generate: {text, vocabulary, logprobs, images}
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckptq.validators import vllm_track

NO_VLLM, BROKEN_VLLM = 71, 72
PROMPT = "The sea was calm and the sky was clear, so they put the boat into the water and"
KV_SCALE = "kv scale"
QUESTION = "Describe the image."
MAX_MODEL_LEN = 1024
NEW_TOKENS = 8
SIDE = 224
"""Pixels: a multiple of 28 and 32, few tokens for any processor."""
_LISTED = 64
"""Missing parts that are named of one parameter."""


@dataclass(slots=True)
class Loaded:
    """What became of one checkpoint. `model` after vLLM's post-processing, on its device; after a failure in it, `partial` instead."""

    trace: dict[str, Any]
    model: Any = None
    partial: Any = None
    vllm_config: Any = None


def load(folder: Path | str, *, stand_ins: bool = True) -> Loaded:
    """Loads without an engine. Again and again in one process, after failures too; raises for no fault of a checkpoint."""
    loaded = Loaded(_new_trace())
    with _watched(loaded, stand_ins):
        from vllm.config import set_current_vllm_config
        from vllm.engine.arg_utils import EngineArgs
        from vllm.model_executor.model_loader import get_model_loader

        config = loaded.vllm_config = EngineArgs(**_arguments(folder)).create_engine_config()
        with set_current_vllm_config(config):
            _distributed()
            loader = get_model_loader(config.load_config)
            loaded.model = loader.load_model(vllm_config=config, model_config=config.model_config)
        loaded.trace["stage"] = "done"
    return loaded


def serve(folder: Path | str, *, stand_ins: bool = True) -> Loaded:
    """Makes the engine and generates. Once a process."""
    loaded = Loaded(_new_trace())
    with _watched(loaded, stand_ins):
        from vllm import LLM

        llm = LLM(**_arguments(folder), max_logprobs=20, limit_mm_per_prompt={"image": 1, "video": 0})
        config = loaded.vllm_config = llm.llm_engine.vllm_config
        loaded.trace["stage"] = "generate"
        with _timed(loaded.trace, "generate"):
            loaded.trace["generated"] = _generate(llm, config)
        loaded.trace["stage"] = "done"
    return loaded


def effective(model: Any) -> Iterator[tuple[str, Any]]:
    """What the server computes with: parameters and buffers after post-processing, and attention's scales, on the CPU, by name."""
    import torch

    found: dict[str, Any] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, module in model.named_modules():
        for scale in ("_q_scale", "_k_scale", "_v_scale", "_prob_scale"):
            value = getattr(module, scale, None)
            if isinstance(value, torch.Tensor):
                found[f"{name}.{scale}"] = value
    for name in sorted(found):
        yield name, found[name].detach().cpu()


# --- the load, watched ---


def _arguments(folder: Path | str) -> dict[str, Any]:
    return {"model": str(folder), "enforce_eager": True, "max_model_len": MAX_MODEL_LEN, "max_num_seqs": 4, "seed": 0}


def _new_trace() -> dict[str, Any]:
    import vllm
    from vllm.platforms import current_platform

    return {
        "version": vllm.__version__, "platform": current_platform.device_type, "architecture": "", "quantization": None,
        "kv_cache_dtype": "", "stage": "config", "error": None, "seconds": {}, "kernels": {}, "stand_ins": [], "problems": [],
        "keys": {}, "parameters": {}, "generated": None,
    }  # fmt: skip


@contextmanager
def _timed(trace: dict[str, Any], stage: str) -> Iterator[None]:
    start = time.monotonic()
    try:
        yield
    finally:
        trace["seconds"][stage] = round(trace["seconds"].get(stage, 0.0) + time.monotonic() - start, 3)


@contextmanager
def _watched(loaded: Loaded, stand_ins: bool) -> Iterator[None]:
    """Within it vLLM's loader is wrapped, an exception is noted in the trace and goes no further."""
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    trace = loaded.trace
    tracker = _track().Tracker()
    whole, create = BaseModelLoader.load_model, BaseModelLoader.create_model
    read, weights = DefaultModelLoader.load_weights, DefaultModelLoader.get_all_weights

    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _timed(trace, "model"):
            model = whole(self, *args, **kwargs)
        trace.update(stage="engine", kernels=_kernels(model))
        return model

    def create_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        trace["stage"] = "create"
        with _timed(trace, "create"):
            return create(self, *args, **kwargs)

    def get_all_weights(self: Any, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        for key, tensor in weights(self, *args, **kwargs):
            tracker.source(key, tensor)
            yield key, tensor

    def load_weights(self: Any, model: Any, model_config: Any) -> None:
        cache = str(get_current_vllm_config().cache_config.cache_dtype)
        trace.update(stage="load", architecture=type(model).__name__, quantization=model_config.quantization, kv_cache_dtype=cache)
        tracker.begin(model.named_parameters())
        try:
            with _timed(trace, "load"), tracker.mode():
                read(self, model, model_config)
        finally:
            _describe(trace, tracker, model)
        trace["stage"], loaded.partial = "process", model

    BaseModelLoader.load_model, BaseModelLoader.create_model = load_model, create_model
    DefaultModelLoader.load_weights, DefaultModelLoader.get_all_weights = load_weights, get_all_weights
    start = time.monotonic()
    try:
        with stand_in(trace["stand_ins"]) if stand_ins else _nothing():
            yield
        loaded.partial = None
    except Exception as problem:
        trace["error"] = _described(problem)
        loaded.model = None
    finally:
        trace["seconds"]["all"] = round(time.monotonic() - start, 3)
        BaseModelLoader.load_model, BaseModelLoader.create_model = whole, create
        DefaultModelLoader.load_weights, DefaultModelLoader.get_all_weights = read, weights


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _described(problem: BaseException) -> dict[str, str]:
    """The exception, with its deepest frame: an AssertionError often has no message."""
    frames = traceback.extract_tb(problem.__traceback__)
    last = frames[-1] if frames else None
    where = f"{_short(last.filename)}:{last.lineno} {last.name}: {last.line}" if last else ""
    lines = [f"{_short(frame.filename)}:{frame.lineno} {frame.name}: {frame.line}" for frame in frames[-8:]]
    return {"type": type(problem).__name__, "message": str(problem)[:4000], "where": where, "traceback": "\n".join(lines)}


def _short(file: str) -> str:
    return file.rpartition("site-packages/")[2]


def _distributed() -> None:
    """One process that is its own group, as vLLM's layers want it: v1/worker/gpu_worker.py init_worker_distributed_environment."""
    import tempfile

    import torch
    from vllm.distributed import init_distributed_environment, initialize_model_parallel, model_parallel_is_initialized
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        # v1/worker/cpu_model_runner.py _set_torch_accelerator_to_noop: a loader asks for them whatever the device.
        torch.accelerator.empty_cache = torch.accelerator.synchronize = lambda *_, **__: None  # type: ignore[assignment]
    if model_parallel_is_initialized():
        return
    if current_platform.is_cuda_alike():
        torch.accelerator.set_device_index(0)
    file = Path(tempfile.mkdtemp(prefix="ckptq-")) / "group"
    init_distributed_environment(1, 0, f"file://{file}", 0, "gloo" if current_platform.is_cpu() else "nccl")
    initialize_model_parallel(1, 1)


def _track() -> Any:
    """vllm_track.py beside this file. By its path: the folder's other modules must not be found in the place of a library's."""
    name = "_ckptq_vllm_track"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("vllm_track.py"))
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


# --- what the tracker saw, in the terms of vLLM's modules ---


def _describe(trace: dict[str, Any], tracker: vllm_track.Tracker, model: Any) -> None:
    keys, parameters = tracker.finish(model.named_parameters())
    modules = dict(model.named_modules())
    packed: dict[str, Sequence[str]] = {}
    for module in modules.values():
        packed |= getattr(module, "packed_modules_mapping", None) or {}
    for name, parameter in parameters.items():
        owner, _, leaf = name.rpartition(".")
        parameter["exempt"] = exempt = exemption(modules[owner], leaf, parameter["elements"])
        if exempt == KV_SCALE:
            parameter["cache"] = str(getattr(modules[owner], "kv_cache_dtype", trace["kv_cache_dtype"]))
        parameter["missing"] = [*_parts(modules[owner], name, parameter, packed)][:_LISTED]
    trace |= {"keys": keys, "parameters": parameters, "problems": tracker.problems[:20]}


def exemption(module: Any, leaf: str, elements: int) -> str:
    """Why a checkpoint need not have the parameter `leaf` of `module`, or "".

    A tied lm_head needs none: it is the embeddings' parameter, or has its storage (model_executor/models/utils.py
    _get_tied_embedding_params). Nor do buffers, such as rotary caches: they are no parameters.
    """
    from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

    method = getattr(module, "quant_method", None)
    # kv_cache.py BaseKVCacheMethod.create_weights: q_scale, k_scale, v_scale and prob_scale have defaults.
    if isinstance(method, BaseKVCacheMethod):
        return KV_SCALE
    # The rest as default_loader.py track_weights_loading has it: quantized while loading; placeholders; built from the config.
    if getattr(method, "uses_meta_device", False):
        return "quantized while loading"
    if not elements:
        return "empty"
    return "from the config" if leaf == "input_scale_ub" else ""


def _parts(module: Any, name: str, parameter: Mapping[str, Any], packed: Mapping[str, Sequence[str]]) -> Iterator[dict[str, Any]]:
    """What of a parameter nothing wrote: rows of its first dimension, by shard of a fused linear or by expert."""
    shape, gaps = parameter["shape"], parameter["unwritten"]
    row = parameter["elements"] // shape[0] if shape else 1
    for part, start, stop in _shards(module, name, parameter, packed):
        missing = sum(max(0, min(b, stop) - max(a, start)) for a, b in gaps)
        if missing:
            yield {"part": part, "rows": [start // row, -(-stop // row)], "elements": missing, "of": stop - start}


def _shards(
    module: Any, name: str, parameter: Mapping[str, Any], packed: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, int, int]]:
    """(name of a part, first and end of its flat index): together the whole parameter."""
    shape, elements = parameter["shape"], parameter["elements"]
    owner, _, leaf = name.rpartition(".")
    parts = packed.get(owner.rpartition(".")[2], ())
    widths = getattr(module, "output_partition_sizes", ())
    if leaf.startswith(("w13_", "w2_")) and shape:
        yield from _experts(leaf, shape, elements)
    elif len(parts) > 1 and len(parts) == len(widths) and shape:
        # Rows of a weight or bias, blocks of rows of a block scale, or one scale a shard (linear.py, parameter.py).
        block = max(1, -(-sum(widths) // shape[0]))
        counts = [1] * len(parts) if shape[0] == len(parts) else [-(-width // block) for width in widths]
        if sum(counts) != shape[0]:
            yield "", 0, elements
            return
        at = 0
        for part, count in zip(parts, counts, strict=True):
            yield part, at * elements // shape[0], (at + count) * elements // shape[0]
            at += count
    else:
        yield "", 0, elements


def _experts(leaf: str, shape: Sequence[int], elements: int) -> Iterator[tuple[str, int, int]]:
    """fused_moe/routed_experts.py _load_w13: gate_proj is the first half of an expert's rows, up_proj the second."""
    one = elements // shape[0]
    for expert in range(shape[0]):
        if leaf.startswith("w2_"):
            yield f"{expert}.down_proj", expert * one, (expert + 1) * one
        elif len(shape) > 1 and shape[1] % 2 == 0:
            yield f"{expert}.gate_proj", expert * one, expert * one + one // 2
            yield f"{expert}.up_proj", expert * one + one // 2, (expert + 1) * one
        else:
            yield f"{expert}.gate_proj", expert * one, (expert + 1) * one


def _kernels(model: Any) -> dict[str, int]:
    """Kernels of the quantized linears: the attribute of the method or scheme that is one (model_executor/kernels/linear/)."""
    found: Counter[str] = Counter()
    for module in model.modules():
        for owner in (getattr(module, "quant_method", None), getattr(module, "scheme", None)):
            for value in vars(owner).values() if hasattr(owner, "__dict__") else ():
                if type(value).__module__.startswith("vllm.model_executor.kernels.linear") and type(value).__name__.endswith(
                    "Kernel"
                ):
                    found[type(value).__name__] += 1
    return dict(sorted(found.items()))


# --- what a CPU build lacks ---


@contextmanager
def stand_in(used: list[str]) -> Iterator[None]:
    """On a CPU, stands in for kernels that vLLM 0.32.0 has for GPUs alone, so that a checkpoint can be loaded here.

    scaled_fp8_quant  (_custom_ops.py) in torch: x / scale, clamped, to float8_e4m3fn. Fused linears whose shards differ in scale need it
    linear kernels    vLLM's own emulations for NVFP4 and MXFP8, and its torch kernel for FP8 blocks, which loads but can't compute
    FP8 MoE           no kernel: what its post-processing makes of weights and scales stays vLLM's
    Elsewhere it does nothing. `used` gets the names of those that were needed.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        yield
        return
    undo: list[Callable[[], None]] = []
    try:
        _stand_in_quant(used, undo)
        _stand_in_linears(used, undo)
        _stand_in_experts(used, undo)
        yield
    finally:
        for step in reversed(undo):
            step()


def _swap(undo: list[Callable[[], None]], owner: Any, name: str, value: Any) -> None:
    old = getattr(owner, name)
    setattr(owner, name, value)
    undo.append(lambda: setattr(owner, name, old))


def _use(used: list[str], name: str) -> None:
    if name not in used:
        used.append(name)


def _stand_in_quant(used: list[str], undo: list[Callable[[], None]]) -> None:
    import torch
    from vllm import _custom_ops

    real = _custom_ops.scaled_fp8_quant

    def scaled_fp8_quant(input: Any, scale: Any = None, *args: Any, **kwargs: Any) -> Any:
        if scale is None or scale.numel() != 1 or args or kwargs:
            return real(input, scale, *args, **kwargs)
        _use(used, "scaled_fp8_quant")
        limit = torch.finfo(torch.float8_e4m3fn).max
        return (input.float() / scale.float()).clamp(-limit, limit).to(torch.float8_e4m3fn), scale

    _swap(undo, _custom_ops, "scaled_fp8_quant", scaled_fp8_quant)


def _stand_in_linears(used: list[str], undo: list[Callable[[], None]]) -> None:
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.scaled_mm.pytorch import BlockWiseTorchFP8ScaledMMLinearKernel
    from vllm.platforms import PlatformEnum

    def standing_in(kernel: Any) -> Any:
        def supported(cls: Any, compute_capability: int | None = None) -> tuple[bool, str | None]:
            return True, None

        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            _use(used, kernel.__name__)
            kernel.__init__(self, *args, **kwargs)

        return type(kernel.__name__, (kernel,), {"is_supported": classmethod(supported), "__init__": init})

    for table, kernel in (
        ("_POSSIBLE_FP8_BLOCK_KERNELS", BlockWiseTorchFP8ScaledMMLinearKernel),
        ("_POSSIBLE_NVFP4_KERNELS", linear.EmulationNvFp4LinearKernel),
        ("_POSSIBLE_MXFP8_KERNELS", linear.EmulationMxfp8LinearKernel),
    ):
        possible = getattr(linear, table)
        before = possible.get(PlatformEnum.CPU)
        possible[PlatformEnum.CPU] = [*(before or ()), standing_in(kernel)]

        def restore(possible: Any = possible, before: Any = before) -> None:
            possible.pop(PlatformEnum.CPU)
            if before is not None:
                possible[PlatformEnum.CPU] = before

        undo.append(restore)


def _stand_in_experts(used: list[str], undo: list[Callable[[], None]]) -> None:
    from vllm.model_executor.layers.fused_moe.oracle import fp8

    nothing = fp8.Fp8MoeBackend.NONE
    choose, convert, make = fp8.select_fp8_moe_backend, fp8.convert_to_fp8_moe_kernel_format, fp8.make_fp8_moe_kernel

    def select_fp8_moe_backend(*args: Any, **kwargs: Any) -> Any:
        backend, experts = choose(*args, **kwargs)
        if backend == nothing:
            _use(used, "FP8 MoE")
        return backend, object if backend == nothing else experts

    def convert_to_fp8_moe_kernel_format(fp8_backend: Any, layer: Any, **kwargs: Any) -> Any:
        if fp8_backend != nothing:
            return convert(fp8_backend=fp8_backend, layer=layer, **kwargs)
        return kwargs["w13"], kwargs["w2"], kwargs["w13_scale"], kwargs["w2_scale"]

    def make_fp8_moe_kernel(*args: Any, **kwargs: Any) -> Any:
        return None if kwargs["experts_cls"] is object else make(*args, **kwargs)

    # The quantization methods import them by name.
    for real, new in ((choose, select_fp8_moe_backend), (convert, convert_to_fp8_moe_kernel_format), (make, make_fp8_moe_kernel)):
        for module in [m for name, m in sys.modules.items() if name.startswith("vllm.") and m is not None]:
            if vars(module).get(real.__name__) is real:
                _swap(undo, module, real.__name__, new)


# --- generation ---


def _generate(llm: Any, config: Any) -> dict[str, Any]:
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, logprobs=20, prompt_logprobs=1)
    output = llm.generate([PROMPT], settings, use_tqdm=False)[0]
    result = {
        "text": output.outputs[0].text,
        "vocabulary": config.model_config.get_vocab_size(),
        "logprobs": _logprobs(output),
        "images": [],
    }
    if placeholder := _placeholder(config.model_config):
        settings = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, logprobs=20)
        for image in _pictures():
            result["images"].append(_look(llm, settings, placeholder, image))
    return result


def _logprobs(output: Any) -> list[dict[str, float]]:
    """A place after the other, prompt and answer: {token: log-probability}."""
    places = [*(output.prompt_logprobs or [])[1:], *(output.outputs[0].logprobs or [])]
    return [{str(token): entry.logprob for token, entry in place.items()} for place in places]


def _placeholder(model_config: Any) -> str:
    """What stands for an image in this model's prompts, or "" where it takes none (models/interfaces.py SupportsMultiModal)."""
    from vllm.model_executor.model_loader import get_model_cls

    if not model_config.is_multimodal_model:
        return ""
    try:
        return get_model_cls(model_config).get_placeholder_str("image", 1) or ""
    except ValueError:
        return ""


def _look(llm: Any, settings: Any, placeholder: str, image: Any) -> dict[str, Any]:
    """Through the chat template where there is one."""
    if llm.get_tokenizer().chat_template:
        content = [{"type": "image_pil", "image_pil": image}, {"type": "text", "text": QUESTION}]
        output = llm.chat([{"role": "user", "content": content}], settings, use_tqdm=False)[0]
    else:
        prompt = {"prompt": f"{placeholder}{QUESTION}", "multi_modal_data": {"image": image}}
        output = llm.generate([prompt], settings, use_tqdm=False)[0]
    return {"text": output.outputs[0].text, "logprobs": _logprobs(output)}


def _pictures() -> Iterable[Any]:
    """Two that no working vision tower takes for the same."""
    from PIL import Image, ImageDraw

    red = Image.new("RGB", (SIDE, SIDE), "white")
    ImageDraw.Draw(red).ellipse((20, 20, 140, 140), fill="red")
    blue = Image.new("RGB", (SIDE, SIDE), "black")
    ImageDraw.Draw(blue).rectangle((90, 60, 210, 200), fill="blue")
    return red, blue


def main(arguments: Sequence[str]) -> int:
    folder, result = arguments[:2]
    if importlib.util.find_spec("vllm") is None:
        return NO_VLLM
    try:
        import vllm  # noqa: F401
        from vllm.engine.arg_utils import EngineArgs  # noqa: F401
    except Exception as problem:
        print(f"{type(problem).__name__}: {problem}", file=sys.stderr)
        return BROKEN_VLLM
    loaded = (serve if "--generate" in arguments else load)(folder)
    Path(result).write_text(json.dumps(loaded.trace), encoding="utf-8")
    return 0


if __name__ == "__main__":
    # Python has put this file's folder first: a neighbor must not take the place of a library's module of the same name.
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the engine's threads and its process group need no goodbye
