"""What families' resident models measure on the samples of a recipe: ModelOpt's own calibration, or plain observation without it.

    PYTHONPATH=tests python tests/peers/resident.py --jobs JOBS.json

JOBS.json: `[{"family": NAME, "source": DIR, "settings": ["KEY=VALUE", ...], "output": FILE}, ...]`. FILE gets {name of ModelOpt's
quantizer: amax}: `model.layers.0.mlp.down_proj.input_quantizer`, `model.layers.0.self_attn.k_bmm_quantizer`.

Samples are those that ckptq calibrates on, read and encoded by it. Run it in a process of its own: ModelOpt patches transformers
and torch for good.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from families import Family, families
from peers.modelopt_export import encoded_samples
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ckptq.checkpoint import read_inventory
from ckptq.scopes import find_scope

Amaxes = dict[str, float]
Samples = Sequence[Mapping[str, torch.Tensor]]


def measure(family: Family, source: Path, settings: Sequence[str]) -> Amaxes:
    """The amaxes of all samples of the family's first recipe. `settings`: as `--set` takes them."""
    _, samples = encoded_samples(family.recipes[0], settings)
    model = family.resident(source) if family.resident else load(source)
    with torch.inference_mode():
        return observed(model, samples) if family.hooks else by_modelopt(model, samples, family.off)


def load(source: Path) -> Any:
    """The whole model in BF16."""
    import transformers

    scope = find_scope(read_inventory(source).main.config)
    return getattr(transformers, scope.auto_class).from_pretrained(source, dtype=torch.bfloat16).eval()


def by_modelopt(model: Any, samples: Samples, off: Sequence[str]) -> Amaxes:
    """ModelOpt's preset for FP8 with an FP8 KV cache, for all but what `off` matches: later entries win."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.nn import TensorQuantizer

    kept = [{"quantizer_name": pattern, "enable": False} for pattern in off]
    entries = [*mtq.FP8_DEFAULT_CFG["quant_cfg"], *mtq.FP8_KV_CFG["quant_cfg"], *kept]

    def forward_loop(model: Any) -> None:
        for sample in samples:
            model(**sample, use_cache=False)

    with contextlib.redirect_stdout(sys.stderr):
        model = mtq.quantize(model, {"quant_cfg": entries, "algorithm": "max"}, forward_loop)
    quantizers = {name: module for name, module in model.named_modules() if isinstance(module, TensorQuantizer)}
    return {name: float(q.amax) for name, q in quantizers.items() if q.amax is not None and q.amax.numel() == 1}


def observed(model: Any, samples: Samples) -> Amaxes:
    """Plain observation: what enters each linear, and what the model itself puts into its KV cache."""
    from transformers import DynamicCache

    watch = _Linears(model)
    attention = {m.layer_idx: name for name, m in model.named_modules() if name.endswith(".self_attn") and hasattr(m, "layer_idx")}
    found: Amaxes = {}
    for sample in samples:
        cache = DynamicCache()
        with watch:
            model(**sample, past_key_values=cache, use_cache=True)
        for index, layer in enumerate(cache.layers):
            for kind, values in (("k", layer.keys), ("v", layer.values)):
                name = f"{attention[index]}.{kind}_bmm_quantizer"
                found[name] = max(found.get(name, 0.0), float(values.abs().max()))
    return found | watch.amax


class _Linears(TorchFunctionMode):
    """Notes the largest magnitude of the inputs of every matrix product with a parameter, be it a linear's or of fused experts."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._names = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters()}
        self.amax: Amaxes = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear:
            module, _, leaf = self._names[args[1].untyped_storage().data_ptr()].rpartition(".")
            name = f"{module}.input_quantizer" if leaf == "weight" else f"{module}.{leaf}_input_quantizer"
            if args[0].numel():
                self.amax[name] = max(self.amax.get(name, 0.0), float(args[0].abs().max()))
        return func(*args, **(kwargs or {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", required=True, type=Path)
    jobs = json.loads(parser.parse_args().jobs.read_text(encoding="utf-8"))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    known = families()
    for job in jobs:
        found = measure(known[job["family"]], Path(job["source"]), job["settings"])
        Path(job["output"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
