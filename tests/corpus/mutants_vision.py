"""Vision-language models: towers that are cut or merged, projectors, key layouts of config.json, experts stored in one tensor.

Each export is ckptq's, of a tiny checkpoint of tests/families.
"""

from __future__ import annotations

import torch

from corpus.edit import Edit, Tensors, alter, both, copy, drop, put, rename, swap, tensors, times, to
from corpus.edit_files import config, elsewhere
from corpus.mutants import fault
from corpus.mutants_families import without
from corpus.mutants_plain import says

BF16 = torch.bfloat16
Q0, Q1 = "model.layers.0.", "model.layers.1."
"""Layers of Qwen2-VL."""
G0, G1 = "language_model.model.layers.0.", "language_model.model.layers.1."
"""Layers of Gemma 3 and LLaVA."""
M0 = "model.language_model.layers.0."
E0 = f"{M0}mlp.experts.0."
"""Of Qwen3-VL-MoE."""
BLOCKS = "vision_tower.vision_model.encoder.layers."


def inside(section: str, **values: object) -> Edit:
    """Keys of a section of config.json; None takes one away."""

    def apply(data: dict[str, object]) -> None:
        part = data[section]
        assert isinstance(part, dict)
        part |= values
        for key in [key for key, value in values.items() if value is None]:
            del part[key]

    return config(apply)


def text_inside(data: dict[str, object]) -> None:
    """The language model's keys in a section of their own, as transformers 5 writes them."""
    kept = ("architectures", "model_type", "vision_config", "quantization_config", "transformers_version", "dtype")
    tokens = [key for key in data if key.endswith("_token_id") and key.startswith(("image", "video", "vision"))]
    data["text_config"] = {key: data.pop(key) for key in [*data] if key not in (*kept, *tokens)}
    data["text_config"]["model_type"] = "qwen2_vl_text"


def text_outside(data: dict[str, object]) -> None:
    part = data.pop("text_config")
    assert isinstance(part, dict)
    data |= {key: value for key, value in part.items() if key not in ("architectures", "model_type")}


def both_places(data: dict[str, object]) -> dict[str, object]:
    """The language model's settings at the top, which stay there."""
    beside = dict(data)
    text_inside(beside)
    return {**beside["text_config"]}  # type: ignore[dict-item]


def stacked(stored: Tensors) -> None:
    """All experts of layer 0 in a tensor for gate and up and one for down, as transformers 5 saves them."""
    experts = sorted({int(name.split(".")[6]) for name in stored if name.startswith(f"{M0}mlp.experts.")})
    at = f"{M0}mlp.experts."

    def whole(number: int, part: str) -> torch.Tensor:
        return stored.pop(f"{at}{number}.{part}_proj.weight").view(torch.uint8)

    code = torch.float8_e4m3fn
    stored[f"{at}gate_up_proj"] = torch.stack([torch.cat([whole(e, "gate"), whole(e, "up")]) for e in experts]).view(code)
    stored[f"{at}down_proj"] = torch.stack([whole(e, "down") for e in experts]).view(code)


SCALES = (
    *fault(
        "weight_scale missing",
        bad={
            "qwen2vl": {"gate": drop(f"{Q0}mlp.gate_proj.weight_scale")},
            "gemma3": {"o": drop(f"{G0}self_attn.o_proj.weight_scale")},
            "llava": {"q, k and v": drop(f"{G0}self_attn.[qkv]_proj.weight_scale")},
            "qwen3vl-moe": {"q": drop(f"{M0}self_attn.q_proj.weight_scale")},
        },
        near={"qwen2vl gemma3 llava qwen3vl-moe": {"in a file of its own": elsewhere("*.o_proj.weight_scale")}},
    ),
    *fault(
        "input_scale missing",
        bad={"qwen2vl": {"down": drop(f"{Q1}mlp.down_proj.input_scale")}, "gemma3 llava": {"all": drop("*.input_scale")}},
        near={"llava": {"of one shard": drop(f"{G0}self_attn.k_proj.input_scale")}},
    ),
    *fault(
        "some kv scales missing",
        bad={
            "qwen2vl": {"v of a layer": drop(f"{Q1}*v_scale")},
            "gemma3": {"a layer's that sees all": drop(f"{G1}*k_scale", f"{G1}*v_scale")},
            "qwen3vl-moe": {"k of a layer": drop(f"{M0}*k_scale")},
        },
        near={"llava": {"in a file of its own": elsewhere("*.v_scale")}},
    ),
    *fault(
        "kv scales under each other's name",
        bad={"gemma3 qwen2vl": {"all": swap("k_proj.k_scale", "v_proj.v_scale", "*.k_proj.k_scale")}},
        near={"llava": {"twice": both(*[swap("k_proj.k_scale", "v_proj.v_scale", "*.k_proj.k_scale")] * 2)}},
        needs="record",
    ),
    *fault(
        "kv scales on the vision tower",
        bad={
            "llava": {
                "of a block": put({f"{BLOCKS}0.self_attn.{s}_proj.{s}_scale": torch.tensor(0.02) for s in "kv"}),
            },
            "gemma3": {"of a block": put({f"{BLOCKS}0.self_attn.{s}_proj.{s}_scale": torch.tensor(0.02) for s in "kv"})},
            "qwen2vl": {"of a block": put({"visual.blocks.0.attn.k_proj.k_scale": torch.tensor(0.02)})},
        },
        near={"llava": {"of a block that is cut off": put({f"{BLOCKS}2.self_attn.k_proj.k_scale": torch.tensor(0.02)})}},
    ),
    *fault(
        "weight's scale of another size",
        bad={
            "llava": {"of k alone, doubled": alter(times(2), f"{G0}self_attn.k_proj.weight_scale")},
            "gemma3": {"of q alone, halved": alter(times(0.5), f"{G0}self_attn.q_proj.weight_scale")},
        },
        near={"qwen2vl": {"a hundredth of a percent more": alter(times(1.0001), f"{Q0}mlp.down_proj.weight_scale")}},
        needs="source",
    ),
)

TOWERS = (
    *fault(
        "tower not excluded",
        bad={
            "qwen2vl": {"no entry": without("visual"), "blocks alone": without("visual", "visual.blocks*")},
            "llava": {
                "the projector": without("projector"),
                "a half of it": without("projector", "multi_modal_projector.linear_1"),
            },
            "qwen3vl-moe": {"no entry": without("visual"), "the mergers": without("visual", "model.visual.blocks*")},
        },
        near={
            "gemma3 llava": {"SigLIP or CLIP, which the server spares": without("vision_tower")},
            "gemma3": {"the projector, which has no linear": without("projector")},
            "llava": {"by the server's name": without("projector", "*projector*")},
        },
    ),
    *fault(
        "tower's tensor missing",
        bad={
            "qwen2vl": {"merger": drop("visual.merger.mlp.2.weight"), "patches": drop("visual.patch_embed.proj.weight")},
            "gemma3": {
                "the projection": drop("multi_modal_projector.mm_input_projection_weight"),
                "the last norm": drop("vision_tower.vision_model.post_layernorm.weight"),
            },
            "llava": {
                "a block that is used": drop(f"{BLOCKS}1.mlp.fc2.bias"),
                "a bias of the projector": drop("multi_modal_projector.linear_2.bias"),
                "the first norm, by its odd name": rename("pre_layrnorm", "pre_layernorm"),
            },
            "qwen3vl-moe": {"deepstack merger": drop("*visual.deepstack_merger_list.1.norm.weight")},
        },
        near={
            "llava": {
                "of the block that is cut off": drop(f"{BLOCKS}2.mlp.fc1.weight"),
                "the last norm, which is not read": drop("vision_tower.vision_model.post_layernorm.*"),
            }
        },
    ),
    *fault(
        "tower of another depth",
        bad={
            "llava": {
                "a feature from the last block": both(says(vision_feature_layer=-1), drop(f"{BLOCKS}2.mlp.fc1.weight")),
                "fewer blocks": inside("vision_config", num_hidden_layers=2),
            },
            "gemma3": {
                "more": inside("vision_config", num_hidden_layers=3),
                "fewer": inside("vision_config", num_hidden_layers=1),
            },
            "qwen2vl": {"fewer": inside("vision_config", depth=1)},
            "qwen3vl-moe": {"another deepstack": inside("vision_config", deepstack_visual_indexes=[0, 1, 2])},
        },
        near={"llava": {"a feature by its number": says(vision_feature_layer=2)}},
    ),
    *fault(
        "tower's feature from another block",
        bad={"llava": {"the first": says(vision_feature_layer=1)}},
        near={"llava": {"in a cache of training": says(use_cache=False)}},
        needs="source",
    ),
    *fault(
        "tower under another prefix",
        bad={
            "gemma3 llava": {"without vision_model": rename("vision_tower.vision_model.", "vision_tower.")},
            "qwen2vl": {"vision_tower": rename("visual.", "vision_tower.")},
        },
        near={
            "gemma3 llava": {
                "as transformers 4.52 writes": both(
                    rename("vision_tower.", "model.vision_tower.", "vision_tower.*"),
                    rename("multi_modal_projector.", "model.multi_modal_projector.", "multi_modal_projector.*"),
                    rename("language_model.model.", "model.language_model."),
                )
            },
            "qwen2vl": {
                "the second generation": both(
                    rename("model.", "model.language_model.", "model.*"), rename("visual.", "model.visual.", "visual.*")
                )
            },
        },
    ),
    *fault(
        "projector of another shape",
        bad={
            "gemma3": {"of half the rows": alter(lambda t: t[:64], "multi_modal_projector.mm_input_projection_weight")},
            "llava": {"of half the rows": alter(lambda t: t[:64], "multi_modal_projector.linear_2.weight")},
        },
        near={"gemma3 llava": {"in F32": alter(to(torch.float32), "multi_modal_projector.*")}},
    ),
)

MODELS = (
    *fault(
        "lm_head not excluded",
        bad={"qwen2vl llava qwen3vl-moe gemma3": {"no entry": without("lm_head")}},
        near={"llava qwen2vl": {"by the server's name": without("lm_head", "language_model.lm_head")}},
    ),
    *fault(
        "norm missing",
        bad={
            "gemma3": {"after the MLP": drop(f"{G1}post_feedforward_layernorm.weight")},
            "qwen3vl-moe": {"of the keys": drop(f"{M0}self_attn.k_norm.weight")},
        },
        near={"gemma3": {"in a file of its own": elsewhere("*feedforward_layernorm.weight")}},
    ),
    *fault(
        "text settings in the other place",
        bad={
            "qwen2vl": {
                "both, and they differ": config(lambda c: c.update(text_config={**both_places(c), "num_hidden_layers": 3}))
            },
            "gemma3 llava": {
                "at the top": config(text_outside),
                "at the top, model_type too": config(lambda c: c.update(c.pop("text_config"))),
            },
        },
        near={"qwen2vl": {"a section, as transformers 5 writes": config(text_inside)}},
    ),
    *fault(
        "widths and heads",
        bad={
            "gemma3": {"no head_dim, where 256 is taken": inside("text_config", head_dim=None)},
            "llava": {"fewer KV heads": inside("text_config", num_key_value_heads=2)},
            "qwen3vl-moe": {"wider experts": inside("text_config", moe_intermediate_size=96)},
        },
        near={"llava": {"a key of training": inside("text_config", attention_dropout=0.1)}},
    ),
    *fault(
        "tied embeddings",
        bad={
            "gemma3": {
                "said not to be, twice": both(says(tie_word_embeddings=False), inside("text_config", tie_word_embeddings=False))
            }
        },
        near={
            "gemma3": {
                "said not to be, in one place": inside("text_config", tie_word_embeddings=False),
                "stored, too": copy("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
            }
        },
    ),
)

EXPERTS = (
    *fault(
        "experts in one tensor",
        bad={"qwen3vl-moe": {"codes as transformers saves them": tensors(stacked)}},
        near={"qwen3vl-moe": {"one by one, in a file of their own": elsewhere(f"{M0}mlp.experts.*")}},
    ),
    *fault(
        "expert's tensor missing",
        bad={"qwen3vl-moe": {"down": drop(f"{E0}down_proj.weight"), "the router": drop(f"{M0}mlp.gate.weight")}},
        near={"qwen3vl-moe": {"an expert in a file of its own": elsewhere(f"{E0}*")}},
    ),
    *fault(
        "expert's weight_scale missing",
        bad={"qwen3vl-moe": {"up": drop(f"{E0}up_proj.weight_scale")}},
        near={"qwen3vl-moe": {"in a list": alter(lambda t: t.reshape(1), "*experts*.weight_scale")}},
    ),
    *fault(
        "expert's input_scale missing",
        bad={"qwen3vl-moe": {"an expert's": drop(f"{E0}*.input_scale")}},
        near={"qwen3vl-moe": {"in a list": alter(lambda t: t.reshape(1), "*experts*.input_scale")}},
    ),
    *fault(
        "expert's scale of another value",
        bad={"qwen3vl-moe": {"two experts' traded": swap("experts.0.", "experts.1.", f"{E0}down_proj.weight_scale")}},
        near={"qwen3vl-moe": {"forth and back": both(*[swap("experts.0.", "experts.1.", f"{E0}down_proj.weight_scale")] * 2)}},
        needs="source",
    ),
    *fault(
        "router not excluded",
        bad={"qwen3vl-moe": {"no entry": without("mlp.gate")}},
        near={"qwen3vl-moe": {"*mlp.gate": without("mlp.gate", "*mlp.gate")}},
    ),
    *fault(
        "expert under another name",
        bad={
            "qwen3vl-moe": {
                "without experts": rename("mlp.experts.", "mlp.", f"{M0}mlp.experts.*"),
                "beyond the last": rename("experts.11.", "experts.40.", "*experts.11.*"),
            }
        },
        near={"qwen3vl-moe": {"and back": both(rename("experts.0.", "experts.x."), rename("experts.x.", "experts.0."))}},
    ),
    *fault(
        "experts, of another number",
        bad={
            "qwen3vl-moe": {
                "more": inside("text_config", num_local_experts=16),
                "fewer": inside("text_config", num_local_experts=8),
            }
        },
        near={"qwen3vl-moe": {"a loss of training": inside("text_config", router_aux_loss_coef=0.5)}},
    ),
)

MUTANTS = (*SCALES, *TOWERS, *MODELS, *EXPERTS)
