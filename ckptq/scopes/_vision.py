"""Vision towers that families share: what the server builds of them, and the names and dimensions of their parameters.

Each comes as a `Tower` and as a part of `Scope.parameters`, both for a canonical prefix. Not a scope.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from ckptq.scopes import Fused, Tower


def _in(prefix: str, names: Mapping[str, str]) -> dict[str, str]:
    return {f"{prefix}.{name}": dims for name, dims in names.items()}


def _same(*names: str, multiple: int = 1) -> tuple[Fused, ...]:
    """Linears that nothing is fused with: cut by rows and by columns in turn."""
    return tuple(Fused(name, (name,), "columns" if n % 2 else "rows", multiple) for n, name in enumerate(names))


_QWEN_SIZES = MappingProxyType(
    {
        "vision": "hidden_size",
        "vision_qkv": "3 * hidden_size",
        "vision_mlp": "intermediate_size",
        "vision_out": "out_hidden_size",
        "merged": "hidden_size * spatial_merge_size * spatial_merge_size",
        "patch": "patch_size",
        "frames": "temporal_patch_size",
        "channels": "in_channels",
        "positions": "num_position_embeddings",
    }
)
_QWEN_ATTENTION = MappingProxyType(
    {
        "attn.qkv.weight": "vision_qkv vision",
        "attn.qkv.bias": "vision_qkv",
        "attn.proj.weight": "vision vision",
        "attn.proj.bias": "vision",
    }
)
_LAYER_NORMS = MappingProxyType(
    {"norm1.weight": "vision", "norm1.bias": "vision", "norm2.weight": "vision", "norm2.bias": "vision"}
)
_MERGER = MappingProxyType(
    {
        "mlp.0.weight": "merged merged",
        "mlp.0.bias": "merged",
        "mlp.2.weight": "vision_out merged",
        "mlp.2.bias": "vision_out",
    }
)
_PATCHES = "vision channels frames patch patch"


def _mlp(first: str, second: str) -> dict[str, str]:
    return {
        f"{first}.weight": "vision_mlp vision",
        f"{first}.bias": "vision_mlp",
        f"{second}.weight": "vision vision_mlp",
        f"{second}.bias": "vision",
    }


# vLLM 0.32.0 models/qwen2_vl.py (Qwen2VisionTransformer). Here `hidden_size` is the width of what comes out.


def qwen2(prefix: str, section: str) -> Tower:
    """Qwen2-VL's tower, whose config is at `section` of config.json."""
    sizes = {
        **_QWEN_SIZES,
        "vision": "embed_dim",
        "vision_qkv": "3 * embed_dim",
        "vision_mlp": "embed_dim * mlp_ratio",
        "vision_out": "hidden_size",
        "merged": "embed_dim * spatial_merge_size * spatial_merge_size",
    }
    block = _same("blocks.{i}.attn.qkv", "blocks.{i}.attn.proj", "blocks.{i}.mlp.fc1", "blocks.{i}.mlp.fc2")
    assumed = {"in_channels": 3, "mlp_ratio": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 16}
    return Tower(prefix, f"{section}.depth", (*block, *_same("merger.mlp.0", "merger.mlp.2")), sizes, assumed)


def qwen2_parameters(prefix: str) -> dict[str, str]:
    """Its parameters."""
    block = {**_LAYER_NORMS, **_QWEN_ATTENTION, **_mlp("mlp.fc1", "mlp.fc2")}
    merger = {"ln_q.weight": "vision", "ln_q.bias": "vision", **_MERGER}
    names = {"patch_embed.proj.weight": _PATCHES, **_in("blocks.{i}", block), **_in("merger", merger)}
    return _in(prefix, names)


# vLLM 0.32.0 models/qwen2_5_vl.py (Qwen2_5_VisionTransformer).


def qwen2_5(prefix: str, section: str) -> Tower:
    """Qwen2.5-VL's tower, whose config is at `section` of config.json."""
    block = (
        Fused("blocks.{i}.attn.qkv", ("blocks.{i}.attn.qkv",), "heads"),
        Fused("blocks.{i}.attn.proj", ("blocks.{i}.attn.proj",), "columns"),
        Fused("blocks.{i}.mlp.gate_up_proj", ("blocks.{i}.mlp.gate_proj", "blocks.{i}.mlp.up_proj"), "rows"),
        Fused("blocks.{i}.mlp.down_proj", ("blocks.{i}.mlp.down_proj",), "columns"),
    )
    return Tower(prefix, f"{section}.depth", (*block, *_same("merger.mlp.0", "merger.mlp.2")), _QWEN_SIZES, {"in_channels": 3})


def qwen2_5_parameters(prefix: str) -> dict[str, str]:
    """Its parameters."""
    block = {
        "norm1.weight": "vision",
        "norm2.weight": "vision",
        **_QWEN_ATTENTION,
        **_mlp("mlp.gate_proj", "mlp.down_proj"),
        "mlp.up_proj.weight": "vision_mlp vision",
        "mlp.up_proj.bias": "vision_mlp",
    }
    merger = {"ln_q.weight": "vision", **_MERGER}
    return _in(prefix, {"patch_embed.proj.weight": _PATCHES, **_in("blocks.{i}", block), **_in("merger", merger)})


# vLLM 0.32.0 models/qwen3_vl.py (Qwen3_VisionTransformer).


def qwen3(prefix: str, section: str) -> Tower:
    """Qwen3-VL's tower, whose config is at `section` of config.json. Some of its blocks feed mergers of their own (deepstack)."""
    deepstack = "deepstack_merger_list"
    linears = (
        Fused("blocks.{i}.attn.qkv", ("blocks.{i}.attn.qkv",), "heads"),
        Fused("blocks.{i}.attn.proj", ("blocks.{i}.attn.proj",), "columns"),
        *_same("blocks.{i}.mlp.linear_fc1", "blocks.{i}.mlp.linear_fc2"),
        *_same("merger.linear_fc1", "merger.linear_fc2"),
        *_same(f"{deepstack}.{{i}}.linear_fc1", f"{deepstack}.{{i}}.linear_fc2"),
    )
    lists = {deepstack: f"{section}.deepstack_visual_indexes"}
    assumed = {"in_channels": 3, "num_position_embeddings": 2304, "spatial_merge_size": 2, "temporal_patch_size": 2}
    return Tower(prefix, f"{section}.depth", linears, _QWEN_SIZES, assumed, lists=lists)


def qwen3_parameters(prefix: str) -> dict[str, str]:
    """Its parameters."""
    block = {**_LAYER_NORMS, **_QWEN_ATTENTION, **_mlp("mlp.linear_fc1", "mlp.linear_fc2")}
    merger = {
        "linear_fc1.weight": "merged merged",
        "linear_fc1.bias": "merged",
        "linear_fc2.weight": "vision_out merged",
        "linear_fc2.bias": "vision_out",
    }
    names = {
        "patch_embed.proj.weight": _PATCHES,
        "patch_embed.proj.bias": "vision",
        "pos_embed.weight": "positions vision",
        **_in("blocks.{i}", block),
        **_in("merger", {"norm.weight": "vision", "norm.bias": "vision", **merger}),
        **_in("deepstack_merger_list.{i}", {"norm.weight": "merged", "norm.bias": "merged", **merger}),
    }
    return _in(prefix, names)


# vLLM 0.32.0 models/qwen3_omni_moe_thinker.py (Qwen3Omni_VisionTransformer): Qwen3-VL's tower under other names.


def qwen3_omni(prefix: str, section: str) -> Tower:
    """Qwen3-Omni's tower, whose config is at `section` of config.json."""
    deepstack, same = "merger_list", qwen3(prefix, section)
    linears = (
        *(fused for fused in same.linears if fused.runtime.startswith("blocks.")),
        *_same("merger.mlp.0", "merger.mlp.2", f"{deepstack}.{{i}}.mlp.0", f"{deepstack}.{{i}}.mlp.2"),
    )
    return replace(same, linears=linears, lists={deepstack: f"{section}.deepstack_visual_indexes"})


def qwen3_omni_parameters(prefix: str) -> dict[str, str]:
    """Its parameters."""
    same = {name: dims for name, dims in qwen3_parameters(prefix).items() if "merger" not in name}
    mergers = {
        **_in("merger", {"ln_q.weight": "vision", "ln_q.bias": "vision", **_MERGER}),
        **_in("merger_list.{i}", {"ln_q.weight": "merged", "ln_q.bias": "merged", **_MERGER}),
    }
    return {**same, **_in(prefix, mergers)}


# vLLM 0.32.0 models/clip.py (CLIPVisionTransformer), models/siglip.py (SiglipVisionTransformer): layers of the same names.

_ENCODER = "vision_model.encoder.layers.{i}"
_ENCODER_ATTENTION = (
    Fused(f"{_ENCODER}.self_attn.qkv_proj", tuple(f"{_ENCODER}.self_attn.{p}_proj" for p in "qkv"), "heads"),
    Fused(f"{_ENCODER}.self_attn.out_proj", (f"{_ENCODER}.self_attn.out_proj",), "columns"),
)
_ENCODER_MLP = (f"{_ENCODER}.mlp.fc1", f"{_ENCODER}.mlp.fc2")
_ENCODER_SIZES = MappingProxyType(
    {
        "vision": "hidden_size",
        "vision_mlp": "intermediate_size",
        "patch": "patch_size",
        "channels": "num_channels",
        "positions": "image_size / patch_size * image_size / patch_size",
    }
)


def _encoder_parameters() -> dict[str, str]:
    attention = {
        f"self_attn.{p}.{kind}": dims
        for p in ("q_proj", "k_proj", "v_proj", "out_proj")
        for kind, dims in (("weight", "vision vision"), ("bias", "vision"))
    }
    norms = {f"layer_norm{n}.{kind}": "vision" for n in (1, 2) for kind in ("weight", "bias")}
    return _in(_ENCODER, {**norms, **attention, **_mlp("mlp.fc1", "mlp.fc2")})


def _norm(name: str) -> dict[str, str]:
    return {f"vision_model.{name}.weight": "vision", f"vision_model.{name}.bias": "vision"}


def clip(prefix: str, section: str, used_to: str) -> Tower:
    """CLIP's tower up to the block that `used_to` names, whose config is at `section` of config.json."""
    sizes = {**_ENCODER_SIZES, "positions": f"{_ENCODER_SIZES['positions']} + 1"}
    return Tower(
        prefix,
        f"{section}.num_hidden_layers",
        (*_ENCODER_ATTENTION, *_same(*_ENCODER_MLP)),
        sizes,
        {"num_channels": 3, "vision_feature_layer": -2},
        heads="num_attention_heads",
        used_to=used_to,
        unread=("vision_model.post_layernorm.",),
    )


def clip_parameters(prefix: str) -> dict[str, str]:
    """Its parameters."""
    embeddings = {
        "vision_model.embeddings.class_embedding": "vision",
        "vision_model.embeddings.patch_embedding.weight": "vision channels patch patch",
        "vision_model.embeddings.position_embedding.weight": "positions vision",
    }
    return _in(prefix, {**embeddings, **_norm("pre_layrnorm"), **_encoder_parameters(), **_norm("post_layernorm")})


def siglip(prefix: str, section: str) -> Tower:
    """SigLIP's tower, whose config is at `section` of config.json, without the head that pools."""
    mlp = _same(*_ENCODER_MLP, multiple=64)
    depth, linears = f"{section}.num_hidden_layers", (*_ENCODER_ATTENTION, *mlp)
    return Tower(prefix, depth, linears, _ENCODER_SIZES, {"num_channels": 3}, heads="num_attention_heads")


def siglip_parameters(prefix: str) -> dict[str, str]:
    """Its parameters."""
    embeddings = {
        "vision_model.embeddings.patch_embedding.weight": "vision channels patch patch",
        "vision_model.embeddings.patch_embedding.bias": "vision",
        "vision_model.embeddings.position_embedding.weight": "positions vision",
    }
    return _in(prefix, {**embeddings, **_encoder_parameters(), **_norm("post_layernorm")})
