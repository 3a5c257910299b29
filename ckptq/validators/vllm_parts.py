"""What the tracker saw, in the terms of vLLM's modules: shards of fused linears, experts, and what no checkpoint need have.

Runs in the interpreter that has vLLM. Nothing of it is asked before vllm_child.py has loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .vllm_track import Tracker

KV_SCALE = "kv scale"
_LISTED = 64
"""Missing parts that are named of one parameter."""


def describe(trace: dict[str, Any], tracker: Tracker, model: Any) -> None:
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
    # models/utils.py WeightsMapper. Its substrings and suffixes don't change how a name begins.
    trace["prefixes"] = {
        old: new for old, new in getattr(getattr(model, "hf_to_vllm_mapper", None), "orig_to_new_prefix", {}).items() if new
    }
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
    if leaf == "input_scale_ub":
        return "from the config"
    # Of weight-only NVFP4, for older exports that have one: modelopt.py _DropInputScale, in 0.26.0 a method of its own; for experts
    # ModelOptNvFp4FusedMoE, and CompressedTensorsW4A4Nvfp4MoEMethod, which in 0.26.0 remembers its kernel alone.
    dropping = {type(getattr(method, "fmt", None)).__name__, type(method).__name__}
    if leaf == "input_scale" and dropping & {"_DropInputScale", "ModelOptNvFp4W4A16LinearMethod"}:
        return "dropped"
    marlin = getattr(getattr(method, "nvfp4_backend", None), "value", "") == "MARLIN"
    experts = leaf.startswith(("w13_input", "w2_input")) and getattr(method, "use_a16", marlin)
    return "dropped" if experts else ""


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
        yield from _experts(module, leaf, shape, elements)
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


def _experts(module: Any, leaf: str, shape: Sequence[int], elements: int) -> Iterator[tuple[str, int, int]]:
    """fused_moe/routed_experts.py _load_w13: gate_proj is the first half of an expert's rows, up_proj the second.

    It knows what checkpoints call them: Mixtral's w1, w3 and w2.
    """
    gate, up, down = (getattr(module, f"ckpt_{part}_proj_name", f"{part}_proj") for part in ("gate", "up", "down"))
    one = elements // shape[0]
    for expert in range(shape[0]):
        if leaf.startswith("w2_"):
            yield f"{expert}.{down}", expert * one, (expert + 1) * one
        elif len(shape) > 1 and shape[1] % 2 == 0:
            yield f"{expert}.{gate}", expert * one, expert * one + one // 2
            yield f"{expert}.{up}", expert * one + one // 2, (expert + 1) * one
        else:
            yield f"{expert}.{gate}", expert * one, (expert + 1) * one


def kernels(model: Any) -> dict[str, int]:
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
