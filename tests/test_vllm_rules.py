"""The model as vLLM builds it: its linears, parameters and names, by the rules as read and, where marked, by the real functions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from peers.answers import ask

from ckptq.checkpoint import read_inventory
from ckptq.plan import module_of
from ckptq.scopes import Scope, all_scopes
from ckptq.scopes.qwen2_5_vl import SCOPE
from ckptq.validators import Stored, configs
from ckptq.validators.expected import expect, idle_entries
from ckptq.validators.kv import kv_slot
from ckptq.validators.servers import DEFAULT
from ckptq.validators.vllm_rules import packed_modules, parameters, server_linears, server_name

EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny-qwen2.5-vl"
ENDINGS = (
    "k_proj.k_scale", "v_proj.k_scale", "v_proj.v_scale", "kv_scale", "k_cache.scale", "v_cache.scale", "attn.v_scale",
    "qkv_proj.v_scale", "v_scale", "k_proj.bias", "k_proj.weight_scale", "k_proj.output_scale", "v_proj.output_scale",
    "q_proj.k_scale", "o_proj.output_scale",
)  # fmt: skip


def test_prefix_rules_need_their_dot() -> None:
    assert server_name("model.language_model.layers.0", SCOPE) == "language_model.model.layers.0"
    assert server_name("lm_head", SCOPE) == "lm_head"
    assert server_name("lm_head.weight", SCOPE) == "language_model.lm_head.weight"
    assert server_name("model.visual.blocks.0", SCOPE) == "visual.blocks.0"
    assert server_name("model.visual", SCOPE) == "language_model.model.visual"


def test_every_linear_of_the_example_is_known() -> None:
    main = read_inventory(EXAMPLE).main
    linears = server_linears(SCOPE, main.config, main.tensors)
    shards = [module for linear in linears for module in linear.shards]
    two_dimensional = {n.removesuffix(".weight") for n, t in main.tensors.items() if len(t.spec.shape) == 2}
    assert len(shards) == len(set(shards)) == 6 * 7 + 4 * 5 + 2 + 1
    assert set(shards) == two_dimensional - {"model.embed_tokens"}
    assert {linear.prefix for linear in linears if linear.part == "head"} == {"language_model.lm_head"}


@pytest.mark.parametrize("renamed", [False, True])
def test_parameters_are_exactly_the_tensors_of_the_example(renamed: bool) -> None:
    main = read_inventory(EXAMPLE).main
    shapes = {second_generation(n) if renamed else n: t.spec.shape for n, t in main.tensors.items()}
    assert {p.name: p.shape for p in parameters(SCOPE, main.config, shapes)} == shapes


def second_generation(name: str) -> str:
    """A name as files written since transformers 4.52 may have it."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name if name.startswith("lm_head") else name.replace("model.", "model.language_model.", 1)


def test_a_tensor_that_is_absent_is_spelled_like_its_neighbors() -> None:
    main = read_inventory(EXAMPLE).main
    names = [second_generation(n) for n in main.tensors if "layers.3." not in n]
    wanted = {p.name for p in parameters(SCOPE, main.config, names)} - set(names)
    assert wanted == {second_generation(n) for n in main.tensors if "layers.3." in n}


def test_a_tied_head_is_optional_and_a_linear_all_the_same() -> None:
    main = read_inventory(EXAMPLE).main
    config = {**main.config, "tie_word_embeddings": True}
    assert [p.name for p in parameters(SCOPE, config, main.tensors) if not p.required] == ["lm_head.weight"]
    names = [n for n in main.tensors if n != "lm_head.weight"]
    assert server_linears(SCOPE, config, names)[-1].shards == ("lm_head",)


def test_idle_entries_are_those_that_keep_nothing() -> None:
    main = read_inventory(EXAMPLE).main
    entries = ["visual*", "model.visual", "re:visual.*", "lm_head", "*q_proj*", "model.embed_tokens"]
    section = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": entries}
    stored = Stored({**main.config, "quantization_config": section}, None, {n: t.spec for n, t in main.tensors.items()})
    settings, _ = configs.read(stored, SCOPE, DEFAULT)
    assert settings is not None
    assert idle_entries(expect(stored, SCOPE, settings)) == ("model.visual", "re:visual.*", "*q_proj*", "model.embed_tokens")


@pytest.mark.parametrize("head", ["lm_head", "re:.*lm_head"])
@pytest.mark.parametrize("method", ["fp8", "compressed-tensors", "quark"])
def test_an_entry_for_what_is_kept_anyway_is_not_idle(method: str, head: str) -> None:
    weights = {"type": "float", "num_bits": 8, "strategy": "tensor"}
    spec = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False}
    said = {
        "fp8": {"activation_scheme": "dynamic"},
        "compressed-tensors": {
            "format": "float-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        },
        "quark": {
            "export": {"kv_cache_group": []},
            "global_quant_config": {"weight": spec, "input_tensors": spec},
            "layer_quant_config": {},
            "layer_type_quant_config": {},
        },
    }
    key = {"fp8": "ignored_layers", "compressed-tensors": "ignore", "quark": "exclude"}[method]
    section = {"quant_method": method, **said[method], key: [head, "visual"]}
    main = read_inventory(EXAMPLE).main
    stored = Stored({**main.config, "quantization_config": section}, None, {n: t.spec for n, t in main.tensors.items()})
    settings, _ = configs.read(stored, SCOPE, DEFAULT)
    assert settings is not None
    assert idle_entries(expect(stored, SCOPE, settings)) == ("visual",)


@pytest.mark.parametrize(
    ("name", "kind", "misplaced"),
    [
        ("self_attn.k_proj.k_scale", "k", False),
        ("self_attn.v_proj.v_scale", "v", False),
        ("self_attn.k_proj.v_scale", "v", True),
        ("self_attn.v_proj.k_scale", "k", True),
        ("self_attn.k_scale", "k", False),
        ("self_attn.attn.v_scale", "v", False),
        ("self_attn.qkv_proj.v_scale", "v", False),
        ("self_attn.v_cache.scale", "v", False),
        ("self_attn.kv_scale", "k", False),
    ],
)
def test_names_of_kv_scales(name: str, kind: str, misplaced: bool) -> None:
    slot = kv_slot(f"model.layers.0.{name}")
    assert slot is not None
    assert (slot.attention, slot.kind, slot.misplaced) == ("model.layers.0.self_attn", kind, misplaced)


@pytest.mark.parametrize(
    "name", ["self_attn.k_proj.weight", "self_attn.q_proj.k_scale", "self_attn.k_proj.weight_scale", "attn.k_scale"]
)
def test_other_tensors_are_no_kv_scales(name: str) -> None:
    assert kv_slot(f"model.layers.0.{name}") is None


# --- against the real thing ---


@pytest.mark.server
@pytest.mark.parametrize("method", ["modelopt", "fp8", "compressed-tensors", "quark"])
def test_names_are_mapped_as_the_real_vllm_maps_them(method: str) -> None:
    main = read_inventory(EXAMPLE).main
    names = [*main.tensors, *map(second_generation, main.tensors), "model.visual", "lm_head", "model", "visual.model.x"]
    found = ask({"names": names, "scales": [f"model.layers.0.self_attn.{e}" for e in ENDINGS], "method": method})
    assert found["names"] == [server_name(name, SCOPE) for name in names]
    assert {name: list(shards) for name, shards in packed_modules(SCOPE).items()}.items() <= found["packed"].items()
    for ending, mapped in zip(ENDINGS, found["scales"], strict=True):
        slot = kv_slot(f"model.layers.0.self_attn.{ending}")
        taken = slot is not None and (method in ("fp8", "quark") or not slot.native)
        kind = slot.kind if slot and taken else "[kv]"
        assert bool(re.fullmatch(rf"model\.layers\.0\.self_attn\.attn\.{kind}_scale", mapped)) == taken, ending


def named(value: str | Scope) -> str:
    return value if isinstance(value, str) else value.name


@pytest.mark.server
@pytest.mark.parametrize(("name", "scope"), [(name, scope) for scope in all_scopes() for name in scope.architectures], ids=named)
def test_the_server_names_and_fuses_as_the_scope_says(name: str, scope: Scope) -> None:
    """By vLLM's own class: its mapper of names, and what it packs. Language models inside pack for themselves."""
    canonical = [tensor.replace("{i}", "0").replace("{e}", "0") for tensor in scope.parameters]
    names = sorted({spelling for tensor in canonical for spelling in scope.spellings(tensor)})
    found = ask({"architecture": name, "names": names})
    assert dict(zip(names, found["names"], strict=True)) == {n: server_name(n, scope) for n in names}
    assert found["repeats"] == scope.repeats_towers
    ours = {last: list(shards) for last, shards in packed_modules(scope).items()}
    assert {last: found["packed"].get(last, shards) for last, shards in ours.items()} == ours
    linears = {module_of(tensor).rpartition(".")[2] for tensor in canonical}
    assert {last for last, shards in found["packed"].items() if len(shards) > 1 and linears.issuperset(shards)} <= ours.keys()
