"""Loads diffusion pipelines with the real vLLM-Omni, watched: the pipeline's class, its adapter and its loader, on the CPU.

    python omni_load.py JOBS.json RESULTS.jsonl

Runs in the interpreter that has vLLM, with the folder of vllm_omni and diffusers on PYTHONPATH. JOBS.json: [[folder, settings]],
the settings those of OmniDiffusionConfig, which a server's flags become. RESULTS.jsonl gets a line a job, as soon as it is loaded,
of what tests/server/omni.py makes a `Loaded` of. It goes the way of
OMNI/diffusion/worker/diffusion_worker.py and diffusion_model_runner.py: OmniDiffusionConfig.enrich_config, then
DiffusersPipelineLoader.load_model with its initialize_model, load_weights and _process_weights_after_loading.

Beside what omni_stand_ins.py stands in for, two things are set apart: memory that nobody wrote is filled with NaN, so that it is the
same each time, and linears are post-processed one by one, so that one failure doesn't hide another.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "CRITICAL",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TQDM_DISABLE": "1",
}

import omni_stand_ins
import torch
from behavior import vllm_child

omni_stand_ins.install()
child = vllm_child()
SENTINEL = torch.finfo(torch.float32).min
"""What a scale holds until it is written: vLLM's layers/quantization/modelopt.py and fp8.py, `create_weights`."""
ITERATORS = ("safetensors_weights_iterator", "multi_thread_safetensors_weights_iterator")
SHOWN = 8
"""Values of a scale."""


def load(folder: str, settings: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
    """Raises for no fault of the folder's."""
    from vllm_omni.diffusion.data import OmniDiffusionConfig

    result: dict[str, Any] = {"stage": "config", "error": None, "pipeline": None, "quantization": None, "components": {}}
    try:
        config = OmniDiffusionConfig(model=folder, dtype=torch.bfloat16, enforce_eager=True, **settings)
        config.enrich_config()
        result |= {"stage": "create", "pipeline": config.model_class_name, "quantization": _method(config.quantization_config)}
        loader = _loader(config, result)
        with child._beside("vllm_stand_ins").stand_in([]), omni_stand_ins.of_folder(config):
            with omni_stand_ins.surroundings(config, scratch):
                loader.load_model("cpu", device=torch.device("cpu"))
        result["stage"] = "done"
    except Exception as problem:
        result["error"] = child._described(problem)
    return result


def _loader(config: Any, result: dict[str, Any]) -> Any:
    """The real one, which tells what it reads and writes."""
    from vllm.config.load import LoadConfig
    from vllm_omni.diffusion.model_loader import diffusers_loader
    from vllm_omni.diffusion.model_loader.checkpoint_adapters import modelopt

    tracker = child._beside("vllm_track").Tracker()
    dequantized: set[str] = set()
    adapted: set[str] = set()

    class Loader(diffusers_loader.DiffusersPipelineLoader):
        def _get_weights_iterator(self, source: Any, model: Any = None) -> Iterator[tuple[str, Any]]:
            # Beneath the adapter: the names and tensors of the files.
            real = {name: getattr(diffusers_loader, name) for name in ITERATORS}

            def told(iterator: Any, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
                for name, tensor in iterator(*args, **kwargs):
                    tracker.source(_key(source, name), tensor)
                    yield name, tensor

            for name, iterator in real.items():
                setattr(diffusers_loader, name, partial(told, iterator))
            try:
                return super()._get_weights_iterator(source, model)
            finally:
                for name, iterator in real.items():
                    setattr(diffusers_loader, name, iterator)

        def _get_checkpoint_adapter(self, model: Any, source: Any, use_safetensors: bool) -> Any:
            adapter = super()._get_checkpoint_adapter(model, source, use_safetensors)
            if isinstance(adapter, modelopt.ModelOptFp8CheckpointAdapter):
                adapted.add(source.prefix)
                dequantize = adapter._dequantize_weight

                def watched(name: str, *args: Any) -> Any:
                    dequantized.add(_key(source, name.removeprefix(source.prefix)))
                    return dequantize(name, *args)

                adapter._dequantize_weight = watched
            return adapter

        def load_weights(self, model: Any, **kwargs: Any) -> None:
            result["stage"] = "load"
            sources = self._get_weight_sources(model)
            tracker.begin(model.named_parameters())
            try:
                with tracker.mode():
                    super().load_weights(model, **kwargs)
            finally:
                keys, parameters = tracker.finish(model.named_parameters())
                result["problems"] = tracker.problems
                for source in sources:
                    stored = {key.removeprefix(_key(source, "")): of for key, of in keys.items() if key.startswith(_key(source, ""))}
                    result["components"][source.subfolder or ""] = {
                        "adapter": source.prefix in adapted,
                        "dequantized": sorted(name for name in stored if _key(source, name) in dequantized),
                        **_component(model, source.prefix, stored, parameters),
                    }

        def _process_weights_after_loading(self, model: Any, target_device: Any) -> None:
            result["stage"] = "process"
            process = super()._process_weights_after_loading
            for source in self._get_weight_sources(model):
                linears = result["components"][source.subfolder or ""]["linears"]
                for name, module in _linears(model, source.prefix):
                    try:
                        process(module, target_device)
                    except Exception as problem:
                        linears[name]["process"] = f"{type(problem).__name__}: {problem}"

    return Loader(LoadConfig(), od_config=config)


def _component(model: Any, prefix: str, stored: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """`stored` and `parameters` as the tracker has them, of the component and of the whole pipeline."""
    owner = model.get_submodule(prefix.rstrip("."))
    own = {name.removeprefix(prefix): of for name, of in parameters.items() if name.startswith(prefix)}
    linears = {}
    for name, module in _linears(model, prefix):
        values = {leaf: _scale(p, own[f"{name}.{leaf}"]) for leaf, p in module.named_parameters() if "scale" in leaf}
        weight = own.get(f"{name}.weight", {"dtype": "none", "shape": (), "elements": 0, "written": 0})
        linears[name] = {
            "prefix": getattr(module, "prefix", name), "method": type(getattr(module, "quant_method", module)).__name__,
            "dtype": weight["dtype"].removeprefix("torch."), "shape": weight["shape"],
            "written": weight["written"] == weight["elements"], "scales": values, "process": None,
        }  # fmt: skip
    return {
        "class": type(owner).__name__,
        "linears": linears,
        "unwritten": [name for name, of in own.items() if of["written"] < of["elements"]],
        "unread": [name for name, of in stored.items() if not of["parameters"]],
        "parameters": {name: of["keys"] for name, of in own.items()},
    }


def _scale(parameter: Any, tracked: Mapping[str, Any]) -> list[float] | None:
    """Its first values; None where the loader has left a part of it as it was."""
    values = parameter.detach().flatten().float()
    left = tracked["written"] < tracked["elements"] or bool((values == SENTINEL).any())
    return None if left else values[:SHOWN].tolist()


def _key(source: Any, name: str) -> str:
    return f"{source.subfolder or ''}/{name}"


def _linears(model: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    from torch.nn import Linear
    from vllm.model_executor.layers.linear import LinearBase

    for name, module in model.named_modules():
        if name.startswith(prefix) and isinstance(module, Linear | LinearBase):
            yield name.removeprefix(prefix), module


def _method(config: Any) -> str | None:
    return None if config is None else config.get_name()


def main() -> None:
    jobs, results = map(Path, sys.argv[1:])
    with tempfile.TemporaryDirectory() as scratch, results.open("w", encoding="utf-8") as out:
        for folder, settings in json.loads(jobs.read_text(encoding="utf-8")):
            print(json.dumps(load(folder, settings, Path(scratch))), file=out, flush=True)
            gc.collect()


if __name__ == "__main__":
    main()
