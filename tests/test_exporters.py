"""ModelOpt's format, by the words of its own export (ModelOpt 0.47.0) and of the server that reads it (vLLM 0.32.0)."""

import pytest

from ckptq import __version__
from ckptq.checkpoint import TensorSpec
from ckptq.exporters import find_exporter
from ckptq.exporters.modelopt import exclude_modules, extra_files, kv_ops, linear_ops, quantization_config
from ckptq.plan import Encode, Layout, Observer, QuantizedGroup, Scale
from ckptq.schemes import SCHEMES

QKV = tuple(f"model.layers.7.self_attn.{n}_proj" for n in "qkv")
GROUP = QuantizedGroup(7, QKV, SCHEMES["fp8"])
NUMBERS = {"dynamic": False, "num_bits": 8, "type": "float"}
PRODUCER = {"name": "modelopt", "version": f"ckptq-{__version__}"}


def layout(*kept_linears: str, kv_cache: str | None = "fp8") -> Layout:
    return Layout((GROUP,), ("lm_head", "model.embed_tokens", "visual"), kept_linears, kv_cache)


def test_a_linear() -> None:
    weight, weight_scale, input_scale = linear_ops(QKV[1], TensorSpec(f"{QKV[1]}.weight", "BF16", (128, 256)), GROUP)
    shared = tuple(Observer(module, "weight", 7) for module in QKV)
    assert weight == Encode(f"{QKV[1]}.weight", GROUP.scheme, shared, TensorSpec(f"{QKV[1]}.weight", "F8_E4M3", (128, 256)))
    assert weight_scale == Scale(shared, TensorSpec(f"{QKV[1]}.weight_scale", "F32", ()))
    assert input_scale == Scale((Observer(QKV[0], "input", 7),), TensorSpec(f"{QKV[1]}.input_scale", "F32", ()))


def test_kv_scales() -> None:
    k, v = Observer(QKV[1], "k", 7), Observer(QKV[2], "v", 7)
    assert kv_ops(k, v) == (
        Scale((k,), TensorSpec("model.layers.7.self_attn.k_proj.k_scale", "F32", ())),
        Scale((v,), TensorSpec("model.layers.7.self_attn.v_proj.v_scale", "F32", ())),
    )


def test_the_section_of_config_json() -> None:
    assert quantization_config(layout()) == {
        "config_groups": {"group_0": {"input_activations": NUMBERS, "weights": NUMBERS, "targets": ["Linear"]}},
        "ignore": ["lm_head", "model.embed_tokens", "visual*"],
        "quant_algo": "FP8",
        "kv_cache_scheme": NUMBERS,
        "producer": PRODUCER,
        "quant_method": "modelopt",
    }
    assert "kv_cache_scheme" not in quantization_config(layout(kv_cache=None))


@pytest.mark.parametrize(("kv_cache", "algorithm"), [("fp8", "FP8"), (None, None)])
def test_hf_quant_config(kv_cache: str | None, algorithm: str | None) -> None:
    quantization = {
        "quant_algo": "FP8",
        "kv_cache_quant_algo": algorithm,
        "exclude_modules": ["lm_head", "model.embed_tokens", "visual*"],
    }
    assert extra_files(layout(kv_cache=kv_cache)) == {"hf_quant_config.json": {"producer": PRODUCER, "quantization": quantization}}


def test_kept_linears_are_excluded_by_their_exact_names() -> None:
    """A glob on a shard of a fused linear matches nothing in vLLM 0.32.0 quantization/modelopt.py."""
    kept = tuple(f"model.layers.3.self_attn.{n}_proj" for n in "qkv")
    assert exclude_modules(layout(*kept)) == sorted(["lm_head", "model.embed_tokens", "visual*", *kept])


def test_an_exporter_is_found_by_its_name() -> None:
    assert find_exporter("modelopt").linear_ops(QKV[0], TensorSpec("w", "BF16", (1, 1)), GROUP)
