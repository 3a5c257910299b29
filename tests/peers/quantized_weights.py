"""Single weights through a peer's own code, without a model around them.

    python tests/peers/quantized_weights.py {modelopt,llm-compressor} WEIGHTS.safetensors OUTPUT_DIR

WEIGHTS holds `<module>.weight` BF16 [n, k] of whole fused groups (q, k, v; gate, up). OUTPUT_DIR gains <format>.safetensors for
each of the peer's formats, with the tensors and names of its exports.

ModelOpt: mtq.quantize, then what torch/export/unified_export_hf.py does with the linears of a model: preprocess_linear_fusion for a
group, _export_quantized_weight for each. llm-compressor: ModelFreePtqConverter.process, which model_free_ptq gives each shard to.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from modelopt_export import PRESETS

if TYPE_CHECKING:
    import torch

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
SCHEMES = ("FP8", "FP8_DYNAMIC", "FP8_BLOCK", "INT8", "NVFP4A16", "MXFP8", "MXFP4")


def by_modelopt(weights: dict[str, torch.Tensor], format: str) -> dict[str, torch.Tensor]:
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export.quant_utils import postprocess_state_dict, preprocess_linear_fusion
    from modelopt.torch.export.unified_export_hf import _export_quantized_weight

    linears = torch.nn.ModuleDict({name.removesuffix(".weight").replace(".", "/"): _linear(w) for name, w in weights.items()})

    def forward_loop(linears: torch.nn.ModuleDict) -> None:
        for linear in linears.values():
            linear(torch.ones(1, linear.in_features, dtype=torch.bfloat16))

    with contextlib.redirect_stdout(sys.stderr):
        mtq.quantize(linears, {"quant_cfg": getattr(mtq, PRESETS[format])["quant_cfg"], "algorithm": "max"}, forward_loop)
    for name in list(linears):
        for first, *others in FUSED:
            if "nvfp4" in format and name.endswith(first):
                preprocess_linear_fusion([linears[name.removesuffix(first) + shard] for shard in (first, *others)])
    for linear in linears.values():
        _export_quantized_weight(linear, torch.bfloat16)
    tensors = postprocess_state_dict(linears.state_dict(), 448.0, None)
    return {name.replace("/", "."): tensor.contiguous() for name, tensor in tensors.items()}


def _linear(weight: torch.Tensor) -> torch.nn.Linear:
    import torch

    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight.data.copy_(weight)
    return linear


def by_llm_compressor(weights: dict[str, torch.Tensor], format: str) -> dict[str, torch.Tensor]:
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
    from llmcompressor.entrypoints.model_free.converter import ModelFreePtqConverter

    formats = {
        "INT8": "int-quantized",
        "NVFP4A16": "nvfp4-pack-quantized",
        "MXFP8": "mxfp8-quantized",
        "MXFP4": "mxfp4-pack-quantized",
    }
    scheme = preset_name_to_scheme(format, ["Linear"])
    scheme.format = CompressionFormat(formats.get(format, "float-quantized"))
    done = ModelFreePtqConverter(QuantizationConfig(config_groups={"group_0": scheme})).process(dict(weights))
    return {name: tensor.contiguous() for name, tensor in done.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=("modelopt", "llm-compressor"))
    parser.add_argument("weights", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    from safetensors.torch import load_file, save_file

    weights = load_file(options.weights)
    quantize, formats = (by_modelopt, tuple(PRESETS)) if options.peer == "modelopt" else (by_llm_compressor, SCHEMES)
    for format in formats:
        save_file(quantize(weights, format), options.output / f"{format}.safetensors")
    print(json.dumps(formats))


if __name__ == "__main__":
    main()
