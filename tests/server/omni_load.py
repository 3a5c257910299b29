"""Loads diffusion pipelines with the real vLLM-Omni, watched: the pipeline's class, its adapter and its loader, on the CPU.

Runs in the interpreter that has vLLM, with the folder of vllm_omni and diffusers on PYTHONPATH. A JSON line for each JSON line:
[folder, settings] -> what tests/server/omni.py makes a `Loaded` of. The settings are those of OmniDiffusionConfig, which a server's
flags become. It goes the way of
OMNI/diffusion/worker/diffusion_worker.py and diffusion_model_runner.py: OmniDiffusionConfig.enrich_config, then
DiffusersPipelineLoader.load_model with its initialize_model, load_weights and _process_weights_after_loading.

Beside what omni_stand_ins.py stands in for, linears are post-processed one by one, so that one failure doesn't hide another.
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

answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)  # whatever the server prints

import omni_stand_ins  # noqa: E402 - vLLM is imported in that environment
import torch  # noqa: E402
from behavior import vllm_child  # noqa: E402

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
        with (
            child._beside("vllm_stand_ins").stand_in([]),
            omni_stand_ins.of_folder(config),
            omni_stand_ins.surroundings(config, scratch),
        ):
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
                    stored = {
                        key.removeprefix(_key(source, "")): of for key, of in keys.items() if key.startswith(_key(source, ""))
                    }
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
                    if name.rpartition(".")[0] in linears:
                        continue  # of BAGEL's, whose second weight is a module within the linear: processed with it
                    before = _values(module)
                    try:
                        process(module, target_device)
                        linears[name]["drift"] = _drift(before, _values(module))
                    except Exception as problem:
                        linears[name]["process"] = f"{type(problem).__name__}: {problem}"

    return Loader(LoadConfig(), od_config=config)


def _component(model: Any, prefix: str, stored: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """`stored` and `parameters` as the tracker has them, of the component and of the whole pipeline."""
    own = {name.removeprefix(prefix): of for name, of in parameters.items() if name.startswith(prefix)}
    return {
        "class": type(model.get_submodule(prefix.rstrip("."))).__name__,
        "linears": {name: _linear(name, module, own) for name, module in _linears(model, prefix)},
        "unwritten": [name for name, of in own.items() if of["written"] < of["elements"]],
        "unread": [name for name, of in stored.items() if not of["parameters"]],
        "parameters": {name: of["keys"] for name, of in own.items()},
    }


def _linear(name: str, module: Any, own: Mapping[str, Any]) -> dict[str, Any]:
    tracked = {leaf: own[f"{name}.{leaf}"] for leaf, _ in module.named_parameters(recurse=False) if f"{name}.{leaf}" in own}
    weights = [of for leaf, of in tracked.items() if leaf.endswith("weight")]
    return {
        "prefix": getattr(module, "prefix", None) or getattr(module, "layer_name", None) or name,
        "method": type(getattr(module, "quant_method", module)).__name__,
        "dtype": weights[0]["dtype"].removeprefix("torch.") if weights else "none",
        "shape": weights[0]["shape"] if weights else (),
        "written": all(of["written"] == of["elements"] for of in weights),
        "scales": {leaf: _scale(getattr(module, leaf), of) for leaf, of in tracked.items() if "scale" in leaf},
        "process": None,
        "drift": None,
    }


def _scale(parameter: Any, tracked: Mapping[str, Any]) -> list[float] | None:
    """Its first values; None where the loader has left a part of it as it was."""
    values = parameter.detach().flatten().float()
    left = tracked["written"] < tracked["elements"] or bool((values == SENTINEL).any())
    return None if left else values[:SHOWN].tolist()


def _values(module: Any) -> Any:
    """F32 [out, in]: what its codes and scales stand for. None for experts, in full precision, of other scales and layouts."""
    weight, scale = getattr(module, "weight", None), getattr(module, "weight_scale", None)
    if weight is None or scale is None or weight.numel() != module.output_size_per_partition * module.input_size_per_partition:
        return None
    if weight.shape[0] != module.output_size_per_partition or not weight.is_contiguous():
        weight = weight.t()  # a kernel's: the post-processing of FP8 and of INT8 leaves a view
    scale = scale.float().flatten()
    if scale.numel() == len(module.logical_widths) > 1:
        scale = scale.repeat_interleave(torch.tensor(module.logical_widths))
    return weight.float() * scale.reshape(-1, 1) if scale.numel() in (1, len(weight)) else None


def _drift(before: Any, after: Any) -> float | None:
    """By how much the post-processing has changed what a weight stands for, in root mean square, relative to it."""
    return None if before is None or after is None else float((after - before).norm() / before.norm())


def _key(source: Any, name: str) -> str:
    return f"{source.subfolder or ''}/{name}"


def _linears(model: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """What multiplies: the experts of a layer count as one."""
    from torch.nn import Linear
    from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
    from vllm.model_executor.layers.linear import LinearMethodBase

    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        weighty = any(True for _ in module.parameters(recurse=False))
        multiplies = isinstance(module, Linear) or isinstance(method, LinearMethodBase | FusedMoEMethodBase)
        if name.startswith(prefix) and weighty and multiplies:
            yield name.removeprefix(prefix), module


def _method(config: Any) -> str | None:
    return None if config is None else config.get_name()


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        for line in sys.stdin:
            print(json.dumps(load(*json.loads(line), Path(scratch))), file=answers, flush=True)
            gc.collect()


if __name__ == "__main__":
    main()
