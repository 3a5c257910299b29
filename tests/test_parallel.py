"""Tensor and expert parallelism: each rule with a near miss, and the rules on blocks against the real functions."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from families import VOCAB, write
from hypothesis import given
from hypothesis import strategies as st
from transformers import Phi3Config

from ckptq.checkpoint import read_inventory
from ckptq.convert import prepare
from ckptq.errors import UnsupportedError
from ckptq.recipe import load_recipe
from ckptq.scopes.mixtral import SCOPE as MIXTRAL
from ckptq.scopes.phi3 import SCOPE as PHI3
from ckptq.scopes.qwen2_5_vl import SCOPE
from ckptq.scopes.qwen3_moe import SCOPE as MOE
from ckptq.validators import Finding
from ckptq.validators.formats import (
    CT_MXFP4,
    CT_MXFP8,
    CT_NVFP4,
    MODELOPT_BLOCK,
    MODELOPT_FP8,
    MODELOPT_MXFP8,
    MODELOPT_NVFP4,
    MODELOPT_NVFP4_A16,
    MODELOPT_PER_CHANNEL,
    Format,
    compressed_tensors,
    compressed_tensors_int8,
    native_block,
    of_experts,
)
from ckptq.validators.parallel import check
from ckptq.validators.servers import SERVERS
from ckptq.validators.vllm_rules import ServerLinear, server_linears

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "tiny-qwen2.5-vl"
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
NATIVE = native_block((128, 128))
COMPRESSED = compressed_tensors("block", static=False, block=(128, 128))
INT8 = compressed_tensors_int8("channel", static=False)
FORMATS = (None, MODELOPT_FP8, MODELOPT_PER_CHANNEL, MODELOPT_BLOCK, NATIVE, COMPRESSED, INT8, MODELOPT_NVFP4, CT_MXFP8)
BLOCKS = (MODELOPT_BLOCK, NATIVE, COMPRESSED)
GROUPS = (MODELOPT_NVFP4, MODELOPT_NVFP4_A16, CT_NVFP4, MODELOPT_MXFP8, CT_MXFP8, CT_MXFP4)

LAYER, AT = "model.layers.0", "language_model.model.layers.0"
QKV = ServerLinear(f"{AT}.self_attn.qkv_proj", tuple(f"{LAYER}.self_attn.{s}_proj" for s in "qkv"), "layers")
O = ServerLinear(f"{AT}.self_attn.o_proj", (f"{LAYER}.self_attn.o_proj",), "layers")  # noqa: E741
GATE_UP = ServerLinear(f"{AT}.mlp.gate_up_proj", (f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.up_proj"), "layers")
DOWN = ServerLinear(f"{AT}.mlp.down_proj", (f"{LAYER}.mlp.down_proj",), "layers")
VISUAL_QKV = ServerLinear("visual.blocks.0.attn.qkv", ("visual.blocks.0.attn.qkv",), "tower")
VISUAL_MLP = ServerLinear(
    "visual.blocks.0.mlp.gate_up_proj", ("visual.blocks.0.mlp.gate_proj", "visual.blocks.0.mlp.up_proj"), "tower"
)

# Sizes of the hub's files.
QWEN_3B = {"num_attention_heads": 16, "num_key_value_heads": 2, "num_hidden_layers": 36, "vocab_size": 151936, "hidden_size": 2048}
QWEN_3B["vision_config"] = {"num_heads": 16, "depth": 32, "hidden_size": 1280, "intermediate_size": 3420}  # type: ignore[assignment]
QWEN_7B = {**QWEN_3B, "num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 3584, "vocab_size": 152064}
MOE_30B = {
    "num_attention_heads": 32, "num_key_value_heads": 4, "num_hidden_layers": 48, "vocab_size": 151936, "hidden_size": 2048,
    "num_experts": 128, "moe_intermediate_size": 768,
}  # fmt: skip


def found(
    config: Mapping[str, Any],
    tp: int,
    linear: ServerLinear | None = None,
    sizes: Sequence[tuple[int, int]] = (),
    form: Format | None = None,
    **more: Any,
) -> list[Finding]:
    scope = more.pop("scope", SCOPE)
    built = [] if linear is None else [(linear, form)]
    shapes = dict(zip(linear.shards, sizes, strict=True)) if linear else {}
    return list(check(scope, config, built, shapes, tp, **more))


def codes(findings: Sequence[Finding]) -> list[str]:
    return [f"{f.severity} {f.code.removeprefix('parallel.')}" for f in findings]


@pytest.mark.parametrize(("tp", "expected"), [(1, []), (4, []), (7, ["error kv-heads"]), (8, ["error heads", "error tower-heads"])])
def test_attention_heads_are_shared_out_evenly(tp: int, expected: list[str]) -> None:
    config = {**QWEN_7B, "vocab_size": 448 * 64, "vision_config": {"num_heads": 28}}
    assert codes(found(config, tp)) == expected


@pytest.mark.parametrize(("heads", "kv", "tp", "fits"), [(16, 2, 2, True), (16, 2, 4, True), (24, 6, 4, False), (24, 3, 12, True),
                                                         (24, 3, 8, False), (24, 8, 8, True), (24, 1, 8, True)])  # fmt: skip
def test_kv_heads_are_shared_out_or_repeated(heads: int, kv: int, tp: int, fits: bool) -> None:
    config = {**QWEN_3B, "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": 192, "vision_config": {}}
    assert codes(found(config, tp)) == ([] if fits else ["error kv-heads"])


@pytest.mark.parametrize(
    ("vocab", "tp", "fits"), [(151936, 8, True), (151937, 64, True), (151936, 3, False), (192, 3, True), (129, 3, True)]
)
def test_the_vocabulary_is_padded_before_it_is_shared_out(vocab: int, tp: int, fits: bool) -> None:
    assert codes(found({"vocab_size": vocab}, tp)) == ([] if fits else ["error vocab"])


def test_a_tower_is_shared_out_too_unless_it_is_repeated() -> None:
    sizes = [(3420, 1280), (3420, 1280)]
    assert codes(found(QWEN_3B, 4, VISUAL_MLP, sizes)) == []
    assert codes(found(QWEN_3B, 8, VISUAL_MLP, sizes)) == ["error size"]
    assert codes(found(QWEN_3B, 8, VISUAL_MLP, sizes, tower_data_parallel=True)) == []
    odd = {**QWEN_3B, "vision_config": {"num_heads": 12}}
    assert codes(found(odd, 8, VISUAL_QKV, [(3 * 1280, 1280)], NATIVE)) == ["error tower-heads"]
    assert codes(found(odd, 8, VISUAL_QKV, [(3 * 1280, 1280)], NATIVE, tower_data_parallel=True)) == []


@pytest.mark.parametrize(("dim", "tp", "expected"), [(1280, 2, []), (1280, 4, ["error block-rows"]), (1152, 1, []), (1184, 1, [])])
def test_a_tower_that_stores_one_qkv_is_three_shards(dim: int, tp: int, expected: list[str]) -> None:
    assert codes(found(QWEN_3B, tp, VISUAL_QKV, [(3 * dim, 1280)], NATIVE)) == (["error block-rows"] if dim == 1184 else expected)


@pytest.mark.parametrize(("tp", "expected"), [(1, []), (2, ["error block-rows"])])
def test_one_qkv_of_fewer_kv_heads_is_three_shards(tp: int, expected: list[str]) -> None:
    """8 heads and 2 KV heads: of 64 rows each, one KV head is half a block."""
    whole = ServerLinear("model.layers.0.self_attn.qkv_proj", ("model.layers.0.self_attn.qkv_proj",), "layers")
    config = {"num_attention_heads": 8, "num_key_value_heads": 2}
    assert codes(found(config, tp, whole, [(12 * 128, 512)], NATIVE, scope=PHI3)) == []
    assert codes(found(config, tp, whole, [(12 * 64, 512)], NATIVE, scope=PHI3)) == expected


@pytest.mark.parametrize(("tp", "expected"), [(2, []), (4, []), (8, []), (16, ["error size"])])
def test_gate_and_up_stored_as_one_are_two_shards(tp: int, expected: list[str]) -> None:
    whole = ServerLinear("model.layers.0.mlp.gate_up_proj", ("model.layers.0.mlp.gate_up_proj",), "layers")
    assert codes(found({}, tp, whole, [(2 * 1032, 512)], None, scope=PHI3)) == expected


@pytest.mark.parametrize(("size", "expected"), [(14336, []), (14340, ["error expert-size"])])
def test_experts_of_mixtral_are_cut_by_its_own_key(size: int, expected: list[str]) -> None:
    assert codes(found({"num_local_experts": 8, "intermediate_size": size}, 8, scope=MIXTRAL)) == expected


@pytest.mark.parametrize("form", FORMATS)
def test_columns_that_do_not_divide_are_refused(form: Format | None) -> None:
    assert codes(found(QWEN_3B, 4, DOWN, [(2048, 1026)], form)) == ["error size"]
    assert codes(found(QWEN_3B, 4, DOWN, [(2048, 1024)], form)) == []


@pytest.mark.parametrize("form", BLOCKS)
def test_blocks_are_not_cut(form: Format) -> None:
    assert codes(found(QWEN_3B, 4, DOWN, [(2048, 11008)], form)) == ["error block-columns"]
    assert codes(found(QWEN_3B, 2, DOWN, [(2048, 11008)], form)) == []
    assert codes(found(QWEN_3B, 4, GATE_UP, [(11008, 2048)] * 2, form)) == ["error block-rows"]
    assert codes(found(QWEN_3B, 2, GATE_UP, [(11008, 2048)] * 2, form)) == []


@pytest.mark.parametrize("form", BLOCKS)
@pytest.mark.parametrize(("gate", "up", "expected"), [(256, 192, []), (192, 256, ["error block-rows"]), (256, 256, [])])
def test_only_the_last_shard_may_end_in_part_of_a_block(form: Format, gate: int, up: int, expected: list[str]) -> None:
    assert codes(found(QWEN_3B, 1, GATE_UP, [(gate, 256), (up, 256)], form)) == expected


def test_older_versions_take_no_part_of_a_block_in_modelopts_format() -> None:
    sizes = [(256, 256), (192, 256)]
    assert codes(found(QWEN_3B, 1, GATE_UP, sizes, MODELOPT_BLOCK, server=SERVERS["0.26"])) == ["error block-rows"]
    assert codes(found(QWEN_3B, 1, GATE_UP, sizes, NATIVE, server=SERVERS["0.26"])) == []


def test_modelopts_columns_are_whole_blocks_with_one_rank_too() -> None:
    assert codes(found(QWEN_3B, 1, DOWN, [(256, 192)], MODELOPT_BLOCK)) == ["error block-columns"]
    assert codes(found(QWEN_3B, 1, DOWN, [(256, 192)], NATIVE)) == []


@pytest.mark.parametrize("form", GROUPS)
def test_groups_are_not_cut_and_rows_can_be_cut_anywhere(form: Format) -> None:
    assert form.block is not None
    size = form.block[1]
    assert codes(found(QWEN_3B, 4, GATE_UP, [(11004, 2048)] * 2, form)) == []
    assert codes(found(QWEN_3B, 2, DOWN, [(2048, 4 * size)], form)) == []
    assert codes(found(QWEN_3B, 8, DOWN, [(2048, 4 * size)], form)) == ["error block-columns"]
    assert codes(found(QWEN_3B, 1, DOWN, [(2048, 4 * size - 8)], form)) == ["error block-columns"]


@pytest.mark.parametrize(("head", "tp", "expected"), [(128, 8, []), (64, 8, ["error block-rows"]), (64, 1, [])])
def test_a_repeated_kv_head_is_a_shard_of_its_own(head: int, tp: int, expected: list[str]) -> None:
    sizes = [(16 * head, 2048), (2 * head, 2048), (2 * head, 2048)]
    assert codes(found(QWEN_3B, tp, QKV, sizes, NATIVE)) == expected


@pytest.mark.parametrize(
    ("columns", "tp", "expected"),
    [(11008, 4, []), (11008, 16, []), (864, 4, ["warning alignment"]), (864, 2, []), (864, 1, []), (840, 1, [])],
)
def test_rows_and_columns_per_rank_are_multiples_of_16(columns: int, tp: int, expected: list[str]) -> None:
    assert codes(found(QWEN_3B, tp, DOWN, [(2048, columns)], MODELOPT_FP8)) == expected
    assert codes(found(QWEN_3B, tp, DOWN, [(2048, columns)], None)) == []


def expert(number: int) -> list[tuple[ServerLinear, list[tuple[int, int]]]]:
    at, prefix = f"model.layers.0.mlp.experts.{number}", "model.layers.0.mlp.experts"
    size, hidden = MOE_30B["moe_intermediate_size"], MOE_30B["hidden_size"]
    return [
        (ServerLinear(prefix, (f"{at}.gate_proj", f"{at}.up_proj"), "experts"), [(size, hidden)] * 2),
        (ServerLinear(prefix, (f"{at}.down_proj",), "experts"), [(hidden, size)]),
    ]


def moe(tp: int, form: Format | None, **more: Any) -> list[str]:
    pairs = [*expert(0), *expert(1)]
    shapes = {module: size for linear, sizes in pairs for module, size in zip(linear.shards, sizes, strict=True)}
    return codes(list(check(MOE, MOE_30B, [(linear, form) for linear, _ in pairs], shapes, tp, **more)))


def test_experts_are_cut_in_whole_blocks_or_not_at_all() -> None:
    assert moe(2, COMPRESSED) == moe(1, COMPRESSED) == []
    assert moe(4, COMPRESSED) == ["error expert-block"] * 2
    assert moe(4, COMPRESSED, ep=True) == []
    assert moe(4, MODELOPT_FP8) == moe(4, None) == []


def test_nothing_refuses_experts_in_groups_that_are_cut() -> None:
    form = of_experts(MODELOPT_NVFP4)
    assert moe(16, form) == moe(32, form, ep=True) == []  # 48 columns a rank, or all
    assert moe(32, form) == ["error expert-block"]  # 24
    pairs = expert(0)
    shapes = {module: size for linear, sizes in pairs for module, size in zip(linear.shards, sizes, strict=True)}
    (finding,) = check(MOE, MOE_30B, [(linear, form) for linear, _ in pairs], shapes, 32)
    assert finding.effect.startswith("vLLM refuses to load it, or computes with other scales")


def test_native_blocks_of_experts_are_refined_where_that_works() -> None:
    assert moe(4, NATIVE) == ["warning expert-refined"] * 2
    assert moe(4, NATIVE, server=SERVERS["0.26"]) == ["error expert-block"] * 2
    assert moe(32, NATIVE)[-2:] == ["error expert-block"] * 2  # 24 rows a rank: no block of 32 fits


def test_experts_and_ranks() -> None:
    assert codes(found({"num_experts": 6, "moe_intermediate_size": 768}, 8, scope=MOE)) == ["error experts"]
    assert codes(found({"num_experts": 6, "moe_intermediate_size": 768}, 4, scope=MOE, ep=True)) == []
    assert codes(found({"num_experts": 8, "moe_intermediate_size": 100}, 8, scope=MOE)) == ["error expert-size"]
    assert codes(found({"num_experts": 8, "moe_intermediate_size": 100}, 8, scope=MOE, ep=True)) == []
    assert codes(found(QWEN_3B, 1, ep=True)) == ["error no-experts"]


def test_the_numbers_of_ranks_that_fit_are_named() -> None:
    (finding,) = found(QWEN_3B, 3, DOWN, [(2048, 1026 * 4)])[:1]
    assert finding.mend == "serve with a --tensor-parallel-size that fits (1, 2, 4, 8)"
    assert {f.mend for f in found(QWEN_7B, 5)} >= {"serve with a --tensor-parallel-size that fits (1, 2, 4)"}
    (whole,) = found({}, 1, DOWN, [(256, 192)], MODELOPT_BLOCK)
    assert "that fits (none does), or quantize per tensor" in whole.mend


@pytest.mark.parametrize("tp", [0, -1, 65])
def test_a_number_of_ranks_that_nobody_has_is_refused(tp: int) -> None:
    with pytest.raises(UnsupportedError, match="1 to 64"):
        found(QWEN_3B, tp)


def test_every_linear_of_the_example_is_shared_out_as_its_scope_says() -> None:
    main = read_inventory(EXAMPLE).main
    linears = server_linears(SCOPE, main.config, main.tensors)
    shapes = {name.removesuffix(".weight"): tensor.spec.shape for name, tensor in main.tensors.items()}
    # 61 divides no dimension: whatever is cut is reported, once.
    cut = {f.subject.removesuffix(".weight") for f in check(SCOPE, {}, [(li, None) for li in linears], shapes, 61)}
    by_heads = [li for li in linears if li.prefix.endswith(("qkv_proj", "attn.qkv"))]
    assert cut == {li.shards[0] for li in linears if li not in by_heads and li.part != "head"}


JUNK = st.one_of(st.none(), st.integers(-3, 200), st.booleans(), st.text(max_size=3), st.lists(st.integers(), max_size=2))
KEYS = ("num_attention_heads", "num_key_value_heads", "vocab_size", "num_experts", "moe_intermediate_size", "vision_config")
SHAPES = st.lists(st.integers(0, 600), max_size=3).map(tuple)


@given(st.dictionaries(st.sampled_from(KEYS), JUNK), st.lists(SHAPES, min_size=3, max_size=3), st.sampled_from(FORMATS))
def test_one_rank_finds_nothing_where_there_are_no_blocks(config: Any, sizes: list[Any], form: Format | None) -> None:
    built = [(linear, form) for linear in (QKV, O, GATE_UP, DOWN, VISUAL_QKV, VISUAL_MLP)]
    shapes = {shard: size for linear, _ in built for shard, size in zip(linear.shards, sizes, strict=False)}
    for tp in (1, 6):
        findings = list(check(SCOPE, config, built, shapes, tp))
        assert tp > 1 or (form is not None and form.block is not None) or not findings


# --- against the real thing ---

ASK_VLLM = """
import json, sys
from types import SimpleNamespace
import torch
import vllm.distributed
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import linear, vocab_parallel_embedding
from vllm.model_executor import parameter
from vllm.model_executor.layers.fused_moe.oracle.fp8 import refine_fp8_moe_block_shape
from vllm.model_executor.layers.quantization import modelopt
from vllm.model_executor.layers.quantization.compressed_tensors import schemes
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.utils.fp8_utils import validate_fp8_block_shape, validate_fp8_block_shape_moe

BLOCK = [128, 128]

def world(tp, rank):  # the ranks are pretended; what each of them builds and loads is not
    for module in (linear, parameter, vllm.distributed, vocab_parallel_embedding):
        module.get_tensor_model_parallel_world_size = lambda: tp
        module.get_tensor_model_parallel_rank = lambda: rank

def build(case, quant_config=None):
    if case["kind"] == "qkv":
        return linear.QKVParallelLinear(case["k"], case["head"], case["heads"], case["kv"], bias=False, quant_config=quant_config)
    if case["kind"] == "merged":
        return linear.MergedColumnParallelLinear(case["k"], case["rows"], bias=False, quant_config=quant_config)
    return linear.RowParallelLinear(case["k"], case["rows"][0], bias=False, quant_config=quant_config)

def native(case):
    world(case["tp"], 0)
    layer = build(case)
    sizes = getattr(layer, "output_partition_sizes", [layer.output_size])
    validate_fp8_block_shape(layer, layer.input_size, layer.output_size, layer.input_size_per_partition, sizes, BLOCK)

def by_modelopt(case):
    # Each stored scale says its shard and its row of blocks; each row of a rank must meet its own.
    stored = [torch.arange(-(-n // 128), dtype=torch.float32).view(-1, 1, 1, 1).repeat(1, 1, case["k"] // 128, 1) + 1000 * s
              for s, n in enumerate(case["rows"])]
    for rank in range(case["tp"]):
        world(case["tp"], rank)
        layer = build(case, modelopt.ModelOptFp8Config("FP8_PB_WO", True, None, []))
        names = {"qkv": "qkv", "merged": range(len(stored)), "row": [None]}[case["kind"]]
        for name, scale in zip(names, stored):
            layer.weight_loader_v2(layer.weight_scale, scale, *([] if name is None else [name]))
        place = 0
        for shard, rows in enumerate(getattr(layer, "output_partition_sizes", case["rows"])):
            copies = layer.num_kv_head_replicas if case["kind"] == "qkv" and shard else 1
            first = 0 if case["kind"] == "row" else rank // copies * rows
            own = [1000 * shard + (first + row) // 128 for row in range(rows)]
            met = [layer.weight_scale[(place + row) // 128, 0, 0, 0].item() for row in range(rows)]
            assert own == met, "other rows' scales"
            place += rows

def by_groups(case, config, name, size):
    # Each stored scale says its shard, its row and its group; each code of a rank must meet its own.
    groups = torch.arange(-(-case["k"] // size))
    stored = [(torch.arange(n).view(-1, 1) + 10_000 * s) * 1000.0 + groups for s, n in enumerate(case["rows"])]
    for rank in range(case["tp"]):
        world(case["tp"], rank)
        layer = build(case, config)
        layer.weight_scale.data = torch.full(layer.weight_scale.shape, -1.0, dtype=torch.float64)
        names = {"qkv": "qkv", "merged": range(len(stored)), "row": [None]}[case["kind"]]
        for shard, scale in zip(names, stored):
            layer.weight_loader_v2(layer.weight_scale, scale.double(), *([] if shard is None else [shard]))
        columns = getattr(layer, name).shape[1] * (2 if getattr(layer, name).dtype == torch.uint8 else 1)
        start = rank * columns if case["kind"] == "row" else 0
        own, place = torch.arange(start, start + columns) // size, 0
        met = layer.weight_scale[:, torch.arange(columns) // size]
        for shard, rows in enumerate(getattr(layer, "output_partition_sizes", case["rows"])):
            copies = layer.num_kv_head_replicas if case["kind"] == "qkv" and shard else 1
            first = 0 if case["kind"] == "row" else rank // copies * rows
            wanted = (torch.arange(first, first + rows).view(-1, 1) + 10_000 * shard) * 1000.0 + own
            assert torch.equal(met[place : place + rows], wanted.double()), "other codes' scales"
            place += rows

def grouped(bits, size, **more):
    arguments = {"num_bits": bits, "type": "float", "strategy": "group", "group_size": size, **more}
    group = {"targets": ["Linear"], "weights": arguments, "input_activations": None}
    made = CompressedTensorsConfig.from_config({"format": "float-quantized", "config_groups": {"group_0": group}})
    made.packed_modules_mapping = {}
    return made

def experts(case):
    world(case["tp"], 0)
    size = case["size"] // case["tp"]
    config = SimpleNamespace(intermediate_size_per_partition=size, hidden_dim=case["hidden"], tp_size=case["tp"])
    if refine_fp8_moe_block_shape(config, BLOCK) is not None:
        return "refined"
    validate_fp8_block_shape_moe(size, BLOCK)

def vocabulary(case):
    world(case["tp"], 0)
    vocab_parallel_embedding.VocabParallelEmbedding(case["vocab"], 8)

def whole(case):  # heads, rows and columns of linears without any quantization
    world(case["tp"], 0)
    build(case)

def answer(ask, case):
    try:
        return ask(case) or "fits"
    except (AssertionError, ValueError, RuntimeError, IndexError):
        return "fails"

# This machine has no kernel for blocks; which one is chosen is no part of the question.
modelopt.select_linear_kernel = lambda *a, **k: None
modelopt.expose_input_quant_key = lambda *a: None
for module in vars(schemes).values():
    for name in ("init_nvfp4_linear_kernel", "init_mxfp4_linear_kernel", "init_mxfp8_linear_kernel", "expose_input_quant_key"):
        if hasattr(module, name):
            setattr(module, name, lambda *a, **k: None)
GROUPED = {
    "modelopt nvfp4": lambda: (modelopt.ModelOptNvFp4Config("NVFP4", True, None, [], 16), "weight", 16),
    "modelopt mxfp8": lambda: (modelopt.ModelOptMxFp8Config(True, None, []), "weight", 32),
    "nvfp4": lambda: (grouped(4, 16, strategy="tensor_group"), "weight_packed", 16),
    "mxfp4": lambda: (grouped(4, 32), "weight_packed", 32),
    "mxfp8": lambda: (grouped(8, 32, scale_dtype="torch.uint8"), "weight", 32),
}
case = json.load(open(sys.argv[1]))
with set_current_vllm_config(VllmConfig()), torch.device("cpu"):
    found = {"native": [answer(native, c) for c in case["linears"]],
             "modelopt": [answer(by_modelopt, c) for c in case["linears"]],
             "whole": [answer(whole, c) for c in case["linears"]],
             **{name: [answer(lambda c: by_groups(c, *made()), c) for c in case["linears"][:120]]
                for name, made in GROUPED.items()},
             "vocabulary": [answer(vocabulary, c) for c in case["vocabularies"]],
             "experts": [answer(experts, c) for c in case["experts"]]}
json.dump(found, open(sys.argv[2], "w"))
"""


def real_vllm(case: Mapping[str, Any], folder: Path) -> dict[str, list[str]]:
    question, answer, script = folder / "case.json", folder / "answer.json", folder / "ask.py"
    question.write_text(json.dumps(case), encoding="utf-8")
    script.write_text(ASK_VLLM, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "server" / "shim"), "HF_HUB_OFFLINE": "1",
                   "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}  # fmt: skip
    done = subprocess.run([VLLM_PYTHON, script, question, answer], env=environment, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[str]] = json.loads(answer.read_text(encoding="utf-8"))
    return found


def drawn_linears(count: int) -> Iterator[dict[str, Any]]:
    draw = random.Random(0)
    for _ in range(count):
        kind, tp = draw.choice(["qkv", "merged", "row"]), draw.choice([1, 1, 2, 3, 4, 8])
        k = draw.choice([128, 256, 384, 512, 192, 1024])
        if kind == "qkv":
            kv = draw.choice([1, 2, 4])
            heads, head = kv * draw.choice([1, 2, 4, 6]), draw.choice([32, 64, 128, 192])
            yield {
                "kind": kind,
                "tp": tp,
                "k": k,
                "head": head,
                "heads": heads,
                "kv": kv,
                "rows": [heads * head, kv * head, kv * head],
            }
        else:
            sizes = [draw.choice([64, 128, 192, 200, 256, 384, 400, 512, 1024]) for _ in range(2)]
            yield {"kind": kind, "tp": tp, "k": k, "rows": sizes[:1] if kind == "row" else sizes}


def our_answer(case: Mapping[str, Any], form: Format | None) -> str:
    linear = {"qkv": QKV, "merged": GATE_UP, "row": DOWN}[case["kind"]]
    config = {"num_attention_heads": case.get("heads"), "num_key_value_heads": case.get("kv")}
    return "fails" if found(config, case["tp"], linear, [(n, case["k"]) for n in case["rows"]], form) else "fits"


@pytest.mark.server
def test_the_rules_answer_as_the_real_vllm_does(tmp_path: Path) -> None:
    linears = list(drawn_linears(400))
    grid = itertools.product((64, 96, 128, 256, 768, 800, 1536), (128, 1024, 1040), (1, 2, 4, 8))
    sizes = [{"size": size, "hidden": hidden, "tp": tp} for size, hidden, tp in grid if size % tp == 0]
    vocabularies = [{"vocab": v, "tp": tp} for v in (64, 129, 151936, 151937, 152064, 100) for tp in (1, 2, 3, 4, 7, 8, 19, 64)]
    real = real_vllm({"linears": linears, "experts": sizes, "vocabularies": vocabularies}, tmp_path)
    assert real["vocabulary"] == ["fails" if found({"vocab_size": v["vocab"]}, v["tp"]) else "fits" for v in vocabularies]
    for form, name in ((None, "whole"), (NATIVE, "native"), (COMPRESSED, "native"), (MODELOPT_BLOCK, "modelopt")):
        ours = [our_answer(case, form) for case in linears]
        differ = [(case, theirs) for case, mine, theirs in zip(linears, ours, real[name], strict=True) if mine != theirs]
        assert not differ, f"{name}: {len(differ)} differ, the first {differ[:3]}"
        assert min(ours.count("fits"), ours.count("fails")) > 60
    of_groups = {
        "modelopt nvfp4": MODELOPT_NVFP4,
        "modelopt mxfp8": MODELOPT_MXFP8,
        "nvfp4": CT_NVFP4,
        "mxfp4": CT_MXFP4,
        "mxfp8": CT_MXFP8,
    }
    for name, form in of_groups.items():
        pairs = [(case, our_answer(case, form), theirs) for case, theirs in zip(linears, real[name], strict=False)]
        assert [pair for pair in pairs if pair[1] != pair[2]] == [], name
        assert min([mine for _, mine, _ in pairs].count(word) for word in ("fits", "fails")) > 20
    for case, theirs in zip(sizes, real["experts"], strict=True):
        shapes = [[(case["size"], case["hidden"])] * 2, [(case["hidden"], case["size"])]]
        findings = [f for (linear, _), at in zip(expert(0), shapes, strict=True) for f in found({}, case["tp"], linear, at, NATIVE)]
        mine = "fits" if not findings else "refined" if {f.severity for f in findings} == {"warning"} else "fails"
        assert mine == theirs, case


@pytest.mark.parametrize(("kv", "said"), [(2, ["layout.block-rows"]), (4, [])])
@pytest.mark.parametrize("format", ["modelopt", "compressed-tensors", "fp8"])
def test_a_block_in_two_shards_needs_no_ranks_to_be_refused(kv: int, said: list[str], format: str, tmp_path: Path) -> None:
    """Phi-3's q, k and v stored as one, with keys of 64 rows or 128. vLLM 0.32 loads none of the first and all of the second."""
    (source := tmp_path / "phi3").mkdir()
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    write(source, "Phi3ForCausalLM", Phi3Config(**sizes, num_key_value_heads=kv, pad_token_id=0, vocab_size=VOCAB))
    rules = 'quantize=[{"modules": "model.layers.*", "scheme": "fp8-block"}]'
    settings = [f"model={source}", f"output={tmp_path / 'out'}", f"export.format={format}", rules]
    assert [f.code for f in prepare(load_recipe("phi3-fp8-dynamic", settings)).findings] == said
