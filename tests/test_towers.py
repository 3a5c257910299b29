"""Towers of the vision families, by the published config.json of each: their sizes, and that every exporter excludes them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest

from ckptq.checkpoint import Component, SourceTensor, TensorSpec
from ckptq.errors import UnsupportedError
from ckptq.exporters import find_exporter
from ckptq.planner import build_plan
from ckptq.recipe import load_recipe
from ckptq.scopes import Scope, find_scope
from ckptq.validate import validate_plan
from ckptq.validators import Stored, configs
from ckptq.validators.expected import Expected, expect
from ckptq.validators.servers import DEFAULT
from ckptq.validators.vllm_rules import parameters, server_linears

# The keys that ckptq reads of the published files, as they are there: two leave much to the defaults of transformers' classes.
QWEN2_VL_7B = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
    "vision_config": {
        "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3, "hidden_size": 3584, "patch_size": 14,
        "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2,
    },
}  # fmt: skip
QWEN3_VL_8B = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "text_config": {
        "attention_bias": False, "head_dim": 128, "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32,
        "num_hidden_layers": 36, "num_key_value_heads": 8, "vocab_size": 151936,
    },
    "tie_word_embeddings": False,
    "vision_config": {
        "deepstack_visual_indexes": [8, 16, 24], "depth": 27, "hidden_size": 1152, "in_channels": 3, "intermediate_size": 4304,
        "num_heads": 16, "num_position_embeddings": 2304, "out_hidden_size": 4096, "patch_size": 16, "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}  # fmt: skip
GEMMA_3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "mm_tokens_per_image": 256,
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "sliding_window": 1024,
    },
    "vision_config": {
        "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "model_type": "siglip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
    },
}  # fmt: skip
LLAVA_7B = {
    "architectures": ["LlavaForConditionalGeneration"],
    "text_config": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32064},
    "vision_config": {
        "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {"qwen2vl": QWEN2_VL_7B, "qwen3vl": QWEN3_VL_8B, "gemma3": GEMMA_3_4B, "llava": LLAVA_7B}

# Canonical prefix -> prefix in the files: the hub's first, then those of files written since transformers 4.52.
NEWER_JOINED = {
    "model.": "model.language_model.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}
HUB_JOINED = {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
SPELLINGS: dict[str, list[dict[str, str]]] = {
    "qwen2vl": [{}, {"model.": "model.language_model.", "visual.": "model.visual."}],
    "qwen3vl": [{}],
    "gemma3": [HUB_JOINED, NEWER_JOINED],
    "llava": [HUB_JOINED, NEWER_JOINED],
}
CASES = [(name, spelling) for name, spellings in SPELLINGS.items() for spelling in spellings]


def component(name: str, spelling: Mapping[str, str]) -> Component:
    """The published checkpoint, without its data."""
    config = CONFIGS[name]
    scope = find_scope(config)
    found = {}
    for at, parameter in enumerate(p for p in parameters(scope, config, ()) if p.required or "lm_head" not in p.name):
        assert None not in parameter.shape, parameter.name
        prefix = next((short for short in spelling if parameter.name.startswith(short)), "")
        spec = TensorSpec(
            spelling.get(prefix, "") + parameter.name.removeprefix(prefix),
            "BF16",
            tuple(n for n in parameter.shape if n is not None),
        )
        found[spec.name] = SourceTensor(spec, "model.safetensors", at)
    tensors = MappingProxyType(found)
    return Component("", json.dumps(config), MappingProxyType(config), tensors, ("model.safetensors",), (), ())


@pytest.mark.parametrize(
    ("name", "tensors", "weights"),
    [
        ("qwen2vl", 730, 8_291_375_616),
        ("qwen3vl", 750, 8_767_123_696),
        ("gemma3", 883, 4_300_079_472),
        ("llava", 686, 7_063_427_072),
    ],
)
def test_sizes_are_those_of_the_published_checkpoint(name: str, tensors: int, weights: int) -> None:
    """The number of tensors in its index, and of parameters as the Hub counts them."""
    found = component(name, {}).tensors
    assert (len(found), sum(math.prod(t.spec.shape) for t in found.values())) == (tensors, weights)


def planned(name: str, spelling: Mapping[str, str], kind: str) -> tuple[Scope, Expected]:
    """What the server makes of a shipped recipe's output, in the format `kind`. The validator has nothing against it."""
    rule = {
        "modelopt": "fp8",
        "compressed-tensors": "fp8-dynamic",
        "fp8": "fp8-tensor",
    }
    source = component(name, spelling)
    scope = find_scope(source.config)
    recipe = load_recipe(
        f"{name}-fp8" if kind == "modelopt" else f"{name}-fp8-dynamic",
        [f"export.format={kind}", f"quantize=[{{modules: {scope.layers}.*, scheme: {rule[kind]}}}]"],
    )
    plan = build_plan(recipe, source, scope, find_exporter(kind))
    assert validate_plan(plan, scope) == []
    stored = Stored(json.loads(plan.files["config.json"]), None, plan.tensors)
    settings, _ = configs.read(stored, scope, DEFAULT)
    assert settings is not None
    return scope, expect(stored, scope, settings)


@pytest.mark.parametrize("kind", ["modelopt", "compressed-tensors", "fp8"])
@pytest.mark.parametrize(("name", "spelling"), CASES)
def test_no_exporter_lets_the_server_reach_a_tower(name: str, spelling: dict[str, str], kind: str) -> None:
    scope, at = planned(name, spelling, kind)
    parts = {linear.prefix: linear.part for linear in at.linears.values()}
    assert {prefix for prefix, built in at.built.items() if built == "kept"} == {p for p, part in parts.items() if part != "layers"}
    towers = [tower.prefix.removeprefix("model.") for tower in scope.towers if tower.linears]
    assert {p.split(".")[0] for p, part in parts.items() if part == "tower"} == set(towers)
    assert list(parts.values()).count("head") == 1
    assert list(parts.values()).count("layers") == 4 * scope.layer_count(CONFIGS[name])


def test_of_clip_the_blocks_after_the_feature_are_neither_built_nor_needed() -> None:
    scope = find_scope(LLAVA_7B)
    for said, last in ((-2, 22), (-1, 23), (-24, 0), (1, 0), ([3, -4], 20), ([], 23)):
        names = {p.name: p.required for p in parameters(scope, {**LLAVA_7B, "vision_feature_layer": said}, ())}
        blocks = {int(n.split(".")[4]) for n, required in names.items() if ".encoder.layers." in n and required}
        assert blocks == set(range(last + 1)), said
        assert not names["vision_tower.vision_model.post_layernorm.weight"]
        assert names["vision_tower.vision_model.pre_layrnorm.weight"]


def test_of_siglip_the_server_quantizes_no_mlp_of_an_odd_size() -> None:
    """models/siglip.py SiglipMLP: sizes that are no multiples of 64, as the published 4304, are left alone, listed or not."""
    scope = find_scope(GEMMA_3_4B)
    for size, count in ((4304, 0), (4352, 2 * 27)):
        config = {**GEMMA_3_4B, "vision_config": {**GEMMA_3_4B["vision_config"], "intermediate_size": size}}  # type: ignore[dict-item]
        assert sum(".mlp." in linear.prefix for linear in server_linears(scope, config, ()) if linear.part == "tower") == count


@pytest.mark.parametrize(
    ("section", "kind"), [("text_config", "qwen2"), ("vision_config", "siglip_vision_model"), ("vision_config", "pixtral")]
)
def test_a_llava_of_other_parts_is_refused_by_name(section: str, kind: str) -> None:
    config = {**LLAVA_7B, section: {**LLAVA_7B[section], "model_type": kind}}  # type: ignore[dict-item]
    with pytest.raises(UnsupportedError, match=f"{section}.model_type '{kind}'"):
        find_scope(config)


@pytest.mark.parametrize("odd", [None, "3", -1, 0, 1.5, [], {}, True, 10**30])
def test_odd_sizes_are_survived(odd: Any) -> None:
    """What is no size is not known, or makes a size that nothing has; nothing is raised, and nothing runs for long."""
    for config in CONFIGS.values():
        for key in config["vision_config"]:
            vision = {**config["vision_config"], key: odd}
            parameters(find_scope(config), {**config, "vision_config": vision, "vision_feature_layer": odd}, ())
