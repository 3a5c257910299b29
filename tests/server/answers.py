"""Answers questions about quantization with vLLM's own functions: a JSON line for each JSON line, in the interpreter that has vLLM.

    {"family": "vl" | "moe", "section": {...}, "linears": [[prefix, class], ...], "attention": prefix}
        -> {"refused": "why"} where the section is, else {"linears": [...]}: of each "kept", "refused: why", or what is built:
        {parameter: [dtype, shape]}, for routed experts [weight, input] as strings
    {"names": [...], "scales": [...], "method": ...}
        -> the same lists under the models' and the method's mappers, and packed_modules_mapping
    {} -> the names of all methods
    {"architecture": NAME, "names": [...]}
        -> the names as the quantization config of that model maps its lists, packed_modules_mapping, and whether
        --mm-encoder-tp-mode data repeats its towers

Layers are vLLM's own, of ROWS rows a shard and COLUMNS columns, with one rank. Stood in for: the choice of a kernel, which is
this machine's and no matter of the checkpoint, and the experts' methods, of which the arguments are taken.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from types import SimpleNamespace
from typing import Any, get_args

answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)  # whatever vLLM prints

import torch  # noqa: E402
from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.distributed import init_distributed_environment, initialize_model_parallel  # noqa: E402
from vllm.model_executor.layers import linear  # noqa: E402
from vllm.model_executor.layers.attention import Attention  # noqa: E402
from vllm.model_executor.layers.fused_moe import RoutedExperts  # noqa: E402
from vllm.model_executor.layers.quantization import (  # noqa: E402
    QuantizationMethods,
    fp8,
    get_quantization_config,
    modelopt,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (  # noqa: E402
    compressed_tensors_moe,
    compressed_tensors_moe_w4a4_nvfp4,
    compressed_tensors_moe_w8a8_fp8,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (  # noqa: E402
    compressed_tensors_w4a4_mxfp4,
    compressed_tensors_w4a4_nvfp4,
    compressed_tensors_w8a8_fp8,
    compressed_tensors_w8a8_int8,
    compressed_tensors_w8a8_mxfp8,
    compressed_tensors_w8a16_fp8,
)
from vllm.model_executor.layers.quantization.quark import quark, quark_moe  # noqa: E402
from vllm.model_executor.layers.quantization.quark.schemes import quark_w8a8_fp8  # noqa: E402
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticChannelSym, kFp8StaticTensorSym  # noqa: E402
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead  # noqa: E402
from vllm.model_executor.model_loader.utils import configure_quant_config  # noqa: E402
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM  # noqa: E402
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration  # noqa: E402
from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM  # noqa: E402
from vllm.model_executor.models.registry import ModelRegistry  # noqa: E402
from vllm.model_executor.parameter import BasevLLMParameter  # noqa: E402
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase  # noqa: E402

ROWS, COLUMNS = 128, 256
# In the order in which vLLM makes them.
FAMILIES = {"vl": (Qwen2_5_VLForConditionalGeneration, Qwen2ForCausalLM), "moe": (Qwen3MoeForCausalLM,)}
CLAIMANTS = ("modelopt", "modelopt_fp4", "modelopt_mxfp8", "mxfp8", "modelopt_mixed")
Built = dict[str, tuple[str, list[int]]]


class Experts(Exception):  # noqa: N818
    """Thrown by the method of routed experts with what it was made from."""


def throw(what: Any) -> Any:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        raise Experts(what(args, kwargs))

    return init


def stand_in() -> None:
    modelopt.select_linear_kernel = lambda *a, **k: None
    for module in (modelopt, fp8, compressed_tensors_w8a8_fp8, quark_w8a8_fp8):
        module.init_fp8_linear_kernel = lambda *a, **k: None
        module.expose_input_quant_key = lambda *a: None
    compressed_tensors_w8a16_fp8.init_wfp8_a16_linear_kernel = lambda *a, **k: None
    compressed_tensors_w8a8_int8.init_int8_linear_kernel = lambda *a, **k: None
    compressed_tensors_w8a8_mxfp8.init_mxfp8_linear_kernel = lambda *a, **k: None
    compressed_tensors_w4a4_mxfp4.init_mxfp4_linear_kernel = lambda *a, **k: None
    compressed_tensors_w4a4_nvfp4.init_nvfp4_linear_kernel = lambda *a, **k: None
    compressed_tensors_w4a4_nvfp4.expose_input_quant_key = lambda *a: None
    for module in (modelopt, fp8, compressed_tensors_moe, quark):
        if hasattr(module, "UnquantizedFusedMoEMethod"):
            module.UnquantizedFusedMoEMethod = throw_call(lambda k: "kept")
    modelopt.ModelOptFp8MoEMethod.__init__ = throw(lambda a, k: ["tensor", "static"])
    modelopt.ModelOptNvFp4FusedMoE.__init__ = throw(lambda a, k: of_groups(k["quant_config"].quant_method == "W4A16_NVFP4"))
    nvfp4 = compressed_tensors_moe_w4a4_nvfp4.CompressedTensorsW4A4Nvfp4MoEMethod
    nvfp4.__init__ = throw(lambda a, k: of_groups(k["use_a16"]))
    fp8.Fp8MoEMethod.__init__ = throw(lambda a, k: of_native(a[0]))
    quark_moe.select_fp8_moe_backend = throw_call(lambda k: [of_key(k["weight_key"]), of_activation(k["activation_key"])])
    compressed_tensors_moe_w8a8_fp8.select_fp8_moe_backend = quark_moe.select_fp8_moe_backend


def throw_call(what: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> None:
        raise Experts(what(kwargs))

    return call


def of_groups(weights_alone: bool) -> list[str]:
    return ["group", "none" if weights_alone else "static"]


def of_native(config: Any) -> list[str]:
    return ["block" if config.weight_block_size else "tensor", config.activation_scheme]


def of_key(key: Any) -> str:
    return {kFp8StaticTensorSym: "tensor", kFp8StaticChannelSym: "channel"}.get(key, "block")


def of_activation(key: Any) -> str:
    return "static" if key.scale.static else "dynamic"


def layer(kind: str, prefix: str, config: Any) -> Any:
    """A layer of the class `kind`, which asks the config for its method and creates its parameters."""
    common = {"bias": False, "quant_config": config, "prefix": prefix}
    if kind == "qkv":
        return linear.QKVParallelLinear(COLUMNS, ROWS // 2, 2, 2, **common)
    if kind == "gate_up":
        return linear.MergedColumnParallelLinear(COLUMNS, [ROWS] * 2, **common)
    if kind == "rows":
        return linear.ColumnParallelLinear(COLUMNS, ROWS, **common)
    if kind == "router":
        return linear.ReplicatedLinear(COLUMNS, ROWS, **common)
    if kind == "head":
        return ParallelLMHead(ROWS, COLUMNS, **common)
    assert kind == "columns"
    return linear.RowParallelLinear(COLUMNS, ROWS, **common)


def bare(kind: type[Any]) -> Any:
    """A module that was never built, for those who only ask what it is."""
    module = kind.__new__(kind)
    torch.nn.Module.__init__(module)
    return module


def experts(prefix: str, config: Any) -> list[str] | str:
    module = bare(RoutedExperts)
    module.moe_config = SimpleNamespace(has_bias=False, is_act_and_mul=True)
    module.ckpt_gate_proj_name, module.ckpt_up_proj_name, module.ckpt_down_proj_name = "gate_proj", "up_proj", "down_proj"
    try:
        config.get_quant_method(module, prefix)
    except Experts as found:
        return found.args[0]
    return "kept"


def built(prefix: str, kind: str, config: Any) -> Any:
    try:
        if kind == "experts":
            return experts(prefix, config)
        made = layer(kind, prefix, config)
    except Exception as refusal:
        if type(refusal) is AttributeError and "'VllmConfig'" in str(refusal):
            raise
        return f"refused: {type(refusal).__name__}: {refusal}"[:300]
    weight = getattr(made, "weight", None)
    if weight is not None and (not isinstance(weight, BasevLLMParameter) or weight.dtype == torch.bfloat16):
        return "kept"
    return {name: [str(p.dtype).removeprefix("torch."), list(p.shape)] for name, p in made.named_parameters()}


def chosen(section: dict[str, Any]) -> str:
    """config/model.py ModelConfig._verify_quantization: the first that claims the section, else its own word."""
    found = (get_quantization_config(name).override_quantization_method(section, None, hf_config=None) for name in CLAIMANTS)
    return next((name for name in found if name is not None), section["quant_method"])


def configured(family: str, section: dict[str, Any]) -> Any:
    section = ModelArchConfigConvertorBase._normalize_quantization_config(None, SimpleNamespace(quantization_config=section))
    config = get_quantization_config(chosen(section)).from_config(section)
    for model in FAMILIES[family]:
        before = dict(config.packed_modules_mapping)
        configure(config, model)
        config.packed_modules_mapping = {**before, **config.packed_modules_mapping}
    if family == "moe":  # Qwen3MoeForCausalLM.__init__, where there are dense layers
        config.packed_modules_mapping["gate_up_proj"] = ["gate_proj", "up_proj"]
    return config


def configure(config: Any, model: Any) -> None:
    """SupportsQuant.__new__ does the same for models that have it: model_executor/models/interfaces.py."""
    if hasattr(model, "hf_to_vllm_mapper"):
        config.apply_vllm_mapper(model.hf_to_vllm_mapper.get_rename_mapper())
    configure_quant_config(config, model)
    config.packed_modules_mapping = dict(getattr(model, "packed_modules_mapping", {}))


def of_model(architecture: str, names: list[str]) -> dict[str, Any]:
    """What interfaces.py SupportsQuant and model_loader/utils.py configure_quant_config take from the model's class."""
    model = ModelRegistry.models[architecture].load_model_cls()
    mapper = model.hf_to_vllm_mapper.get_rename_mapper() if hasattr(model, "hf_to_vllm_mapper") else None
    packed = {key: list(value) for key, value in getattr(model, "packed_modules_mapping", {}).items()}
    repeats = bool(getattr(model, "supports_encoder_tp_data", False))
    return {"names": [mapper.map_name(name) if mapper else name for name in names], "packed": packed, "repeats": repeats}


def answer(question: dict[str, Any]) -> dict[str, Any]:
    if not question:
        return {"methods": get_args(QuantizationMethods)}
    if "architecture" in question:
        return of_model(question["architecture"], question["names"])
    if "names" in question:
        model = FAMILIES["vl"][0]
        mapper = get_quantization_config(question["method"]).get_cache_scale_mapper()
        return {
            "names": [model.hf_to_vllm_mapper.map_name(name) for name in question["names"]],
            "scales": [mapper.map_name(name) for name in question["scales"]],
            "packed": {key: list(value) for key, value in model.packed_modules_mapping.items()},
        }
    try:
        config = configured(question["family"], question["section"])
        config.get_quant_method(bare(Attention), question["attention"])
    except Exception as refusal:
        return {"refused": f"{type(refusal).__name__}: {refusal}"[:300]}
    return {"linears": [built(prefix, kind, config) for prefix, kind in question["linears"]]}


def main() -> None:
    stand_in()
    config = VllmConfig()
    torch.set_default_dtype(torch.bfloat16)
    with set_current_vllm_config(config), tempfile.NamedTemporaryFile() as meeting:
        init_distributed_environment(1, 0, f"file://{meeting.name}", 0, "gloo")
        initialize_model_parallel(1, 1)
        model = SimpleNamespace(dtype=torch.bfloat16, hf_config=SimpleNamespace(model_type="qwen"))
        object.__setattr__(config, "model_config", model)
        for line in sys.stdin:
            print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
