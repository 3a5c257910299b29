"""Every tensor of a denoiser that vLLM-Omni reads, without scales: names and shapes, from its config.json.

Data, in few words: `dim` and the like are sizes, products and quotients of config.json's keys. A `linear` has a bias, a `plain` one
has none; a `norm` has a weight, `norms` a bias too; `tensor` is one of that very name. After ` if ` comes the key of config.json
without which there is none. `{i}` stands for a block's number. Read in the classes of diffusers 0.42.1 that a denoiser's `builder`
names; OmniGen2's in vLLM-Omni.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptq.scopes.denoisers import Denoiser
from ckptq.validators.towers import size
from ckptq.validators.vllm_rules import Parameter


@dataclass(frozen=True, slots=True)
class Tensors:
    """Of one denoiser. `blocks` are by the prefixes of stacks, and by more of them where they share some."""

    sizes: Mapping[str, str]
    others: Mapping[str, str]
    blocks: Mapping[tuple[str, ...], Mapping[str, str]] = field(default_factory=dict)


_HEADS = "num_attention_heads * attention_head_dim"
_TABLE: Mapping[str, Tensors] = {
    "qwen_image": Tensors(
        sizes={
            "dim": _HEADS, "2dim": f"2 * {_HEADS}", "4dim": f"4 * {_HEADS}", "6dim": f"6 * {_HEADS}", "head": "attention_head_dim",
            "in": "in_channels", "text": "joint_attention_dim", "out": "patch_size * patch_size * out_channels",
        },
        others={
            "img_in": "linear dim in", "txt_in": "linear dim text", "txt_norm": "norm text", "norm_out.linear": "linear 2dim dim",
            "proj_out": "linear out dim", "time_text_embed.timestep_embedder.linear_1": "linear dim 256",
            "time_text_embed.timestep_embedder.linear_2": "linear dim dim",
            "time_text_embed.addition_t_embedding": "norm 2 dim if use_additional_t_cond",
        },
        blocks={
            ("transformer_blocks",): {
                **{f"attn.{name}": "linear dim dim" for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")},
                **{f"attn.add_{name}_proj": "linear dim dim" for name in "qkv"},
                **{f"attn.norm_{name}": "norm head" for name in ("q", "k", "added_q", "added_k")},
                **{f"{side}_mlp.net.0.proj": "linear 4dim dim" for side in ("img", "txt")},
                **{f"{side}_mlp.net.2": "linear dim 4dim" for side in ("img", "txt")},
                **{f"{side}_mod.1": "linear 6dim dim" for side in ("img", "txt")},
            }
        },
    ),
    "z_image": Tensors(
        sizes={"dim": "dim", "4dim": "4 * dim", "ffn": "dim / 3 * 8", "head": "dim / n_heads", "text": "cap_feat_dim"},
        others={
            "all_x_embedder.2-1": "linear dim ?", "all_final_layer.2-1.linear": "linear ? dim",
            "all_final_layer.2-1.adaLN_modulation.1": "linear dim ?", "cap_embedder.0": "norm text",
            "cap_embedder.1": "linear dim text",
            "t_embedder.mlp.0": "linear 1024 256", "t_embedder.mlp.2": "linear ? 1024", "x_pad_token": "tensor 1 dim",
            "cap_pad_token": "tensor 1 dim",
        },
        blocks={
            ("layers", "noise_refiner", "context_refiner"): {
                **{f"attention.{name}": "plain dim dim" for name in ("to_q", "to_k", "to_v", "to_out.0")},
                **{f"attention.norm_{name}": "norm head" for name in "qk"},
                **{f"{part}_norm{n}": "norm dim" for part in ("attention", "ffn") for n in (1, 2)},
                **{f"feed_forward.w{n}": "plain ffn dim" for n in (1, 3)}, "feed_forward.w2": "plain dim ffn",
            },
            ("layers", "noise_refiner"): {"adaLN_modulation.0": "linear 4dim ?"},
        },
    ),
    "flux2": Tensors(
        sizes={
            "dim": _HEADS, "2dim": f"2 * {_HEADS}", "3dim": f"3 * {_HEADS}", "6dim": f"6 * {_HEADS}", "head": "attention_head_dim",
            "in": "in_channels", "text": "joint_attention_dim", "time": "timestep_guidance_channels",
        },
        others={
            "x_embedder": "plain dim in", "context_embedder": "plain dim text", "norm_out.linear": "plain 2dim dim",
            "proj_out": "plain ? dim", "double_stream_modulation_img.linear": "plain 6dim dim",
            "double_stream_modulation_txt.linear": "plain 6dim dim", "single_stream_modulation.linear": "plain 3dim dim",
            "time_guidance_embed.timestep_embedder.linear_1": "plain dim time",
            "time_guidance_embed.timestep_embedder.linear_2": "plain dim dim",
            "time_guidance_embed.guidance_embedder.linear_1": "plain dim time if guidance_embeds",
            "time_guidance_embed.guidance_embedder.linear_2": "plain dim dim if guidance_embeds",
        },
        blocks={
            ("transformer_blocks",): {
                **{f"attn.{name}": "plain dim dim" for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")},
                **{f"attn.add_{name}_proj": "plain dim dim" for name in "qkv"},
                **{f"attn.norm_{name}": "norm head" for name in ("q", "k", "added_q", "added_k")},
                **{f"{part}.linear_in": "plain ? dim" for part in ("ff", "ff_context")},
                **{f"{part}.linear_out": "plain dim ?" for part in ("ff", "ff_context")},
            },
            ("single_transformer_blocks",): {
                "attn.to_qkv_mlp_proj": "plain ? dim", "attn.to_out": "plain dim ?",
                "attn.norm_q": "norm head", "attn.norm_k": "norm head",
            },
        },
    ),
    "omnigen2": Tensors(
        sizes={
            "dim": "hidden_size", "4dim": "4 * hidden_size", "head": "hidden_size / num_attention_heads", "text": "text_feat_dim",
            "kv": "hidden_size / num_attention_heads * num_kv_heads", "patch": "patch_size * patch_size * in_channels",
        },
        others={
            "x_embedder": "linear dim patch", "ref_image_patch_embedder": "linear dim patch",
            "image_index_embedding": "tensor 5 dim",
            "norm_out.linear_1": "linear dim ?", "norm_out.linear_2": "linear ? dim",
            "time_caption_embed.caption_embedder.0": "norm text", "time_caption_embed.caption_embedder.1": "linear dim text",
            "time_caption_embed.timestep_embedder.linear_1": "linear ? 256",
            "time_caption_embed.timestep_embedder.linear_2": "linear ? ?",
        },
        blocks={
            ("layers", "noise_refiner", "ref_image_refiner", "context_refiner"): {
                "attn.to_q": "plain dim dim", "attn.to_k": "plain kv dim", "attn.to_v": "plain kv dim",
                "attn.to_out.0": "plain dim dim",
                "attn.norm_q": "norm head", "attn.norm_k": "norm head", "feed_forward.linear_1": "plain ? dim",
                "feed_forward.linear_2": "plain dim ?", "feed_forward.linear_3": "plain ? dim",
                **dict.fromkeys(("ffn_norm1", "ffn_norm2", "norm2"), "norm dim"),
            },
            ("layers", "noise_refiner", "ref_image_refiner"): {"norm1.linear": "linear 4dim ?", "norm1.norm": "norm dim"},
            ("context_refiner",): {"norm1": "norm dim"},
        },
    ),
    "wan22": Tensors(
        sizes={
            "dim": _HEADS, "6dim": f"6 * {_HEADS}", "ffn": "ffn_dim", "freq": "freq_dim", "text": "text_dim", "in": "in_channels",
            "added": "added_kv_proj_dim", "image": "image_dim",
        },
        others={
            "patch_embedding": "linear dim in ? ? ?", "proj_out": "linear ? dim", "scale_shift_table": "tensor 1 2 dim",
            "condition_embedder.time_embedder.linear_1": "linear dim freq",
            "condition_embedder.time_embedder.linear_2": "linear dim dim", "condition_embedder.time_proj": "linear 6dim dim",
            "condition_embedder.text_embedder.linear_1": "linear dim text",
            "condition_embedder.text_embedder.linear_2": "linear dim dim",
            "condition_embedder.image_embedder.norm1": "norms image if image_dim",
            "condition_embedder.image_embedder.ff.net.0.proj": "linear image image if image_dim",
            "condition_embedder.image_embedder.ff.net.2": "linear dim image if image_dim",
            "condition_embedder.image_embedder.norm2": "norms dim if image_dim",
            "condition_embedder.image_embedder.pos_embed": "tensor 1 ? ? if pos_embed_seq_len",
        },
        blocks={
            ("blocks",): {
                **{f"attn{n}.{name}": "linear dim dim" for n in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")},
                **{f"attn{n}.norm_{name}": "norm dim" for n in (1, 2) for name in "qk"},
                **{f"attn2.add_{name}_proj": "linear dim added if added_kv_proj_dim" for name in "kv"},
                "attn2.norm_added_k": "norm dim if added_kv_proj_dim", "norm2": "norms dim if cross_attn_norm",
                "ffn.net.0.proj": "linear ffn dim", "ffn.net.2": "linear dim ffn", "scale_shift_table": "tensor 1 6 dim",
            }
        },
    ),
    "glm_image": Tensors(
        sizes={
            "dim": _HEADS, "2dim": f"2 * {_HEADS}", "4dim": f"4 * {_HEADS}", "12dim": f"12 * {_HEADS}", "time": "time_embed_dim",
            "text": "text_embed_dim", "patch": "patch_size * patch_size * in_channels",
            "out": "patch_size * patch_size * out_channels",
            "condition": "4 * condition_dim", "prior": "prior_vq_quantizer_codebook_size",
        },
        others={
            "image_projector.proj": "linear dim patch", "glyph_projector.net.0.proj": "linear text text",
            "glyph_projector.net.2": "linear dim text", "prior_projector.net.0.proj": "linear dim dim",
            "prior_projector.net.2": "linear dim dim", "prior_token_embedding": "norm prior dim",
            "norm_out.linear": "linear 2dim time",
            "proj_out": "linear out dim", "time_condition_embed.timestep_embedder.linear_1": "linear time time",
            "time_condition_embed.timestep_embedder.linear_2": "linear time time",
            "time_condition_embed.condition_embedder.linear_1": "linear time condition",
            "time_condition_embed.condition_embedder.linear_2": "linear time time",
        },
        blocks={
            ("transformer_blocks",): {
                **{f"attn1.{name}": "linear dim dim" for name in ("to_q", "to_k", "to_v", "to_out.0")},
                "ff.net.0.proj": "linear 4dim dim", "ff.net.2": "linear dim 4dim", "norm1.linear": "linear 12dim time",
            }
        },
    ),
}  # fmt: skip


def parameters(denoiser: Denoiser, config: Mapping[str, Any]) -> dict[str, Parameter]:
    """By the name as stored; nothing for a denoiser without a table. Raises SourceError for a config without numbers of blocks."""
    table = _TABLE.get(denoiser.name)
    if table is None:
        return {}
    sizes = {word: size(terms, config) for word, terms in table.sizes.items()}
    found = [p for name, said in table.others.items() for p in _expanded(name, said, sizes, config)]
    for stack in denoiser.stacks:
        for prefixes, block in table.blocks.items():
            inside = [p for name, said in block.items() for p in _expanded(name, said, sizes, config)]
            numbers = range(stack.count(config)) if stack.prefix in prefixes else ()
            found += [Parameter(f"{stack.prefix}.{i}.{p.name}", p.shape) for i in numbers for p in inside]
    return {p.name: p for p in found}


def _expanded(name: str, said: str, sizes: Mapping[str, int | None], config: Mapping[str, Any]) -> Iterator[Parameter]:
    """What an entry stands for."""
    words, _, flag = said.partition(" if ")
    if flag and not config.get(flag):
        return
    kind, *dims = words.split()
    shape = tuple(int(d) if d.isdecimal() else sizes.get(d) for d in dims)
    yield Parameter(name if kind == "tensor" else f"{name}.weight", shape)
    if kind in ("linear", "norms"):
        yield Parameter(f"{name}.bias", shape[:1])
