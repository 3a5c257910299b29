"""HunyuanImage-3.0: a language model with experts that denoises, with its VAE and tower beside it in one checkpoint.

diffusers has no class of it: the names are the hub's, by hand.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import Pipeline

if TYPE_CHECKING:
    from pipelines import parts

HIDDEN, HEADS, KV_HEADS, HEAD, EXPERTS, CHANNELS, LATENT, TOWER = 64, 4, 2, 16, 4, 32, 16, 32
"""CHANNELS: of the VAE and the patch embedding, whose norms have 32 groups."""


def make(folder: Path, layers: int = 2) -> None:
    import json
    import shutil

    from safetensors.torch import save_file

    from pipelines import parts

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(layers), indent=2) + "\n")
    (folder / "generation_config.json").write_text('{"bos_token_id": 4088, "eos_token_id": 4090, "pad_token_id": 4089}\n')
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(parts.EXAMPLE / name, folder / name)
    vae = parts.resnet_vae(3, CHANNELS, LATENT, {"encoder.down.0.downsample.conv": 8, "decoder.up.0.upsample.conv": 128})
    shapes = dict([*_language(layers), *_patches(), *parts.siglip("vision_model.", TOWER, (192,))])
    shapes |= {f"vae.{name}": shape for name, shape in vae}
    save_file(parts.tensors(shapes), folder / "model.safetensors", metadata={"format": "pt"})


def config(layers: int) -> Mapping[str, Any]:
    vae = {
        "in_channels": 3, "out_channels": 3, "latent_channels": LATENT, "block_out_channels": [CHANNELS, CHANNELS],
        "layers_per_block": 1, "ffactor_spatial": 2, "ffactor_temporal": 1, "sample_size": 32, "sample_tsize": 1,
        "scaling_factor": 0.5, "downsample_match_channel": True, "upsample_match_channel": True,
    }  # fmt: skip
    vit = {
        "model_type": "siglip2_vision_model", "hidden_size": TOWER, "intermediate_size": TOWER, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_channels": 3, "num_patches": 16, "patch_size": 8, "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6, "attention_dropout": 0.0, "output_attentions": False, "output_hidden_states": False,
        "use_return_dict": True,
    }  # fmt: skip
    pixels = {
        "do_resize": True, "do_rescale": True, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "max_num_patches": 16, "patch_size": 8, "resample": 2, "rescale_factor": 1 / 255,
    }  # fmt: skip
    return {
        "architectures": ["HunyuanImage3ForCausalMM"], "model_type": "hunyuan_image_3_moe", "dtype": "bfloat16",
        "vocab_size": 4096, "hidden_size": HIDDEN, "intermediate_size": HIDDEN, "moe_intermediate_size": [HIDDEN] * layers,
        "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "attention_head_dim": HEAD,
        "head_dim": HEAD, "hidden_act": "silu", "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "use_qk_norm": True,
        "pad_token_id": 4089, "bos_token_id": 4088, "eos_token_id": 4090, "tie_word_embeddings": False, "rope_theta": 10000.0,
        "rope_scaling": {"type": "custom", "alpha": 1000.0, "factor": 1.0}, "num_experts": EXPERTS, "use_mixed_mlp_moe": True,
        "num_shared_expert": [1] * layers, "moe_topk": [2] * layers, "moe_layer_num_skipped": 0, "norm_topk_prob": True,
        "use_cla": False, "cla_share_factor": 1, "img_proj_type": "unet", "patch_size": 1, "patch_embed_hidden_dim": CHANNELS,
        "image_base_size": 64, "vae_downsample_factor": [2, 2], "vae": vae, "vit": vit, "vit_processor": pixels,
        "vit_aligner": {"projector_type": "mlp_gelu", "input_dim": TOWER, "n_embed": HIDDEN, "depth": 2},
    }  # fmt: skip


def _language(layers: int) -> "parts.Shapes":
    """q, k and v are one tensor, of a group of heads after the other; gate and up too."""
    yield "model.wte.weight", (4096, HIDDEN)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        yield f"{at}self_attn.qkv_proj.weight", ((HEADS + 2 * KV_HEADS) * HEAD, HIDDEN)
        yield f"{at}self_attn.o_proj.weight", (HIDDEN, HEADS * HEAD)
        yield f"{at}self_attn.query_layernorm.weight", (HEAD,)
        yield f"{at}self_attn.key_layernorm.weight", (HEAD,)
        yield f"{at}mlp.gate.wg.weight", (EXPERTS, HIDDEN)
        for mlp in ("shared_mlp", *(f"experts.{expert}" for expert in range(EXPERTS))):
            yield f"{at}mlp.{mlp}.gate_and_up_proj.weight", (2 * HIDDEN, HIDDEN)
            yield f"{at}mlp.{mlp}.down_proj.weight", (HIDDEN, HIDDEN)
        yield f"{at}input_layernorm.weight", (HIDDEN,)
        yield f"{at}post_attention_layernorm.weight", (HIDDEN,)
    yield "model.ln_f.weight", (HIDDEN,)
    yield "lm_head.weight", (4096, HIDDEN)


def _patches() -> "parts.Shapes":
    from pipelines.parts import biased

    for name in ("timestep_emb", "time_embed", "time_embed_2"):
        yield from biased(f"{name}.mlp.0", HIDDEN, 256)
        yield from biased(f"{name}.mlp.2", HIDDEN, HIDDEN)
    for name, first, last in (("patch_embed.model.1", CHANNELS, HIDDEN), ("final_layer.model.0", HIDDEN, CHANNELS)):
        yield from biased(f"{name}.in_layers.0", first)
        yield from biased(f"{name}.in_layers.2", last, first, 3, 3)
        yield from biased(f"{name}.emb_layers.1", 2 * last, HIDDEN)
        yield from biased(f"{name}.out_layers.0", last)
        yield from biased(f"{name}.out_layers.3", last, last, 3, 3)
        yield from biased(f"{name}.skip_connection", last, first, 1, 1)
    yield from biased("vision_aligner.layers.0", HIDDEN, TOWER)
    yield from biased("vision_aligner.layers.2", HIDDEN, HIDDEN)
    yield from biased("patch_embed.model.0", CHANNELS, LATENT, 3, 3)
    yield from biased("final_layer.model.1.0", CHANNELS)
    yield from biased("final_layer.model.1.2", LATENT, CHANNELS, 3, 3)


PIPELINE = Pipeline(make, ("",), "", "HunyuanImage3ForCausalMM")
