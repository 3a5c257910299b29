"""Loads a checkpoint with the real vLLM and says what its loader read and wrote. Runs in the interpreter that has vLLM.

    python vllm_child.py FOLDER RESULT.json [--generate]

It imports nothing of ckptq, and of its folder only the files that are named in `_beside`. Loading alone builds vLLM's config and
model and runs its loader, without an engine: no KV cache, no scheduler. With --generate the whole `LLM` is made, watched in the
same way, and answers two prompts, of text and of images. Written for vLLM 0.32.0, and runs with 0.26.0; what it hooks into, by
wrapping and never replacing: `BaseModelLoader.load_model` and, where there is one, `.create_model`,
`DefaultModelLoader.load_weights` and `.get_all_weights` (model_executor/model_loader/). Exit code 71: no vLLM; 72: one that
can't be imported; 73: one without these. Everything else, a refused checkpoint too, is in RESULT.json: empty from the start, so a
process that dies leaves it empty, and what is no Python leaves none.

The trace, as JSON:
    version, platform, architecture, quantization, kv_cache_dtype
    stage       config, create, load, process, engine, generate or done: where it ended
    error       null, or {type, message, where, traceback}
    seconds     {create (of vLLM with `create_model`), load, model: both and the post-processing, generate, all: all but imports}
    kernels     {name of the kernel that vLLM chose for linears: how many}
    stand_ins   what this CPU build of vLLM lacks and was stood in for; see vllm_stand_ins.py
    problems    operations that the tracker could not follow; empty in every case that is known
    prefixes    {how the checkpoint's names begin: how this model of vLLM's calls that}
    keys        {stored tensor: {dtype, shape, elements, read, times, unread, parameters, casts}}, see vllm_track.py
    parameters  {parameter: {dtype, shape, elements, written, unwritten, keys, exempt, missing}}; `exempt`: why nothing need write
                it, or "" (for "kv scale", `cache` is the dtype of that attention's KV cache); `missing`: [{part, rows, elements,
                of}] of what nothing wrote: `part` as the checkpoint names it, [first, end) of the rows, how many of how many
    generated   with --generate: see vllm_generate.py
"""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

NO_VLLM, BROKEN_VLLM, OTHER_VLLM = 71, 72, 73
_MAX_MODEL_LEN = 1024


@dataclass(slots=True)
class Loaded:
    """What became of one checkpoint. `model` after vLLM's post-processing, on its device; after a failure in that, `partial`."""

    trace: dict[str, Any]
    model: Any = None
    partial: Any = None
    vllm_config: Any = None


def load(folder: Path | str, *, stand_ins: bool = True) -> Loaded:
    """Loads without an engine. Again and again in one process, after failures too; raises for no fault of a checkpoint."""
    loaded = Loaded(_new_trace())
    with _watched(loaded, stand_ins):
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader import get_model_loader

        config = loaded.vllm_config = _config(folder)
        with set_current_vllm_config(config):
            _distributed(config)
            loader = get_model_loader(config.load_config)
            loaded.model = loader.load_model(vllm_config=config, model_config=config.model_config)
        loaded.trace["stage"] = "done"
    return loaded


def serve(folder: Path | str, *, stand_ins: bool = True) -> Loaded:
    """Makes the engine and generates. Once a process."""
    loaded = Loaded(_new_trace())
    with _watched(loaded, stand_ins):
        from vllm import LLM

        model = _config(folder).model_config
        # Short, for a small KV cache; and of images one at a time, as large as they come.
        length = min(_MAX_MODEL_LEN, model.max_model_len)
        images = {"limit_mm_per_prompt": {"image": 1, "video": 0}} if model.is_multimodal_model else {}
        llm = LLM(**_arguments(folder), max_model_len=length, max_logprobs=20, skip_mm_profiling=True, **images)
        config = loaded.vllm_config = llm.llm_engine.vllm_config
        loaded.trace["stage"] = "generate"
        with _timed(loaded.trace, "generate"):
            loaded.trace["generated"] = _beside("vllm_generate").generate(llm, config)
        loaded.trace["stage"] = "done"
    return loaded


# --- the load, watched ---


def _arguments(folder: Path | str) -> dict[str, Any]:
    return {"model": str(folder), "enforce_eager": True, "max_num_seqs": 4, "seed": 0}


def _config(folder: Path | str) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(**_arguments(folder)).create_engine_config()


def _new_trace() -> dict[str, Any]:
    import vllm
    from vllm.platforms import current_platform

    return {
        "version": vllm.__version__, "platform": current_platform.device_type, "architecture": "", "quantization": None,
        "kv_cache_dtype": "", "stage": "config", "error": None, "seconds": {}, "kernels": {}, "stand_ins": [],
        "problems": [], "prefixes": {}, "keys": {}, "parameters": {}, "generated": None,
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
    tracker, parts = _beside("vllm_track").Tracker(), _beside("vllm_parts")
    whole = BaseModelLoader.load_model
    create: Any = getattr(BaseModelLoader, "create_model", None)
    read, weights = DefaultModelLoader.load_weights, DefaultModelLoader.get_all_weights

    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        trace["stage"] = "create"
        with _timed(trace, "model"):
            model = whole(self, *args, **kwargs)
        trace.update(stage="engine", kernels=parts.kernels(model))
        return model

    def create_model(self: Any, *args: Any, **kwargs: Any) -> Any:
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
            parts.describe(trace, tracker, model)
        trace["stage"], loaded.partial = "process", model

    BaseModelLoader.load_model = load_model
    if create is not None:  # vLLM 0.26.0 has none: its load_model makes the model itself
        BaseModelLoader.create_model = create_model
    DefaultModelLoader.load_weights, DefaultModelLoader.get_all_weights = load_weights, get_all_weights
    start = time.monotonic()
    try:
        with _beside("vllm_stand_ins").stand_in(trace["stand_ins"]) if stand_ins else nullcontext():
            yield
        loaded.partial = None
    except Exception as problem:
        trace["error"] = _described(problem)
        loaded.model = None
    finally:
        trace["seconds"]["all"] = round(time.monotonic() - start, 3)
        BaseModelLoader.load_model = whole
        if create is not None:
            BaseModelLoader.create_model = create
        DefaultModelLoader.load_weights, DefaultModelLoader.get_all_weights = read, weights


def _described(problem: BaseException) -> dict[str, str]:
    """The exception, with its deepest frame: an AssertionError often has no message."""
    frames = traceback.extract_tb(problem.__traceback__)
    last = frames[-1] if frames else None
    where = f"{_short(last.filename)}:{last.lineno} {last.name}: {last.line}" if last else ""
    lines = [f"{_short(frame.filename)}:{frame.lineno} {frame.name}: {frame.line}" for frame in frames[-8:]]
    return {"type": type(problem).__name__, "message": str(problem)[:4000], "where": where, "traceback": "\n".join(lines)}


def _short(file: str) -> str:
    return file.rpartition("site-packages/")[2]


def _distributed(config: Any) -> None:
    """One process that is its own group, as vLLM's layers want it: v1/worker/gpu_worker.py init_worker_distributed_environment."""
    import tempfile

    import torch
    from vllm.distributed import destroy_model_parallel, init_distributed_environment, initialize_model_parallel, parallel_state
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        # v1/worker/cpu_model_runner.py _set_torch_accelerator_to_noop: a loader asks for them whatever the device.
        torch.accelerator.empty_cache = torch.accelerator.synchronize = lambda *_, **__: None
    if parallel_state.model_parallel_is_initialized():
        if parallel_state._EP is not None or not config.model_config.is_moe:
            return
        destroy_model_parallel()  # those of a model without experts lack the expert parallel group
    if current_platform.is_cuda_alike():
        torch.accelerator.set_device_index(0)
    folder = tempfile.mkdtemp(prefix="ckptq-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # where main ends, the whole TMPDIR goes
    init_distributed_environment(1, 0, f"file://{folder}/group", 0, "gloo" if current_platform.is_cpu() else "nccl")
    initialize_model_parallel(1, 1)


def _beside(name: Literal["vllm_track", "vllm_parts", "vllm_stand_ins", "vllm_generate"]) -> Any:
    """A file of this folder, in a package that this process alone knows: none of them can take the place of a library's module."""
    package = "_ckptq_vllm"
    if package not in sys.modules:
        sys.modules[package] = module = ModuleType(package)
        module.__path__ = [str(Path(__file__).parent)]
    return importlib.import_module(f"{package}.{name}")


def _end_with_parent() -> None:
    """However ckptq ends, a server that nobody waits for must not hold a GPU. linux/prctl.h PR_SET_PDEATHSIG."""
    if sys.platform == "linux":
        import ctypes
        import signal

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def main(arguments: Sequence[str]) -> int:
    folder, result = arguments[:2]
    _end_with_parent()
    Path(result).touch()
    if importlib.util.find_spec("vllm") is None:
        return NO_VLLM
    try:
        import vllm
    except Exception as problem:
        print(f"{type(problem).__name__}: {problem}", file=sys.stderr)
        return BROKEN_VLLM
    try:
        import vllm.engine.arg_utils
        from vllm.model_executor.model_loader.base_loader import BaseModelLoader
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

        _ = (
            BaseModelLoader.load_model,
            DefaultModelLoader.load_weights,
            DefaultModelLoader.get_all_weights,
        )
    except Exception as problem:
        print(f"vLLM {vllm.__version__}: {type(problem).__name__}: {problem}", file=sys.stderr)
        return OTHER_VLLM
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
