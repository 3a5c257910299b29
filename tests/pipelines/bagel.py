"""BAGEL: a language model whose every linear there is twice, for text and for image, with a tower and FLUX's VAE beside it.

diffusers has no class of it: the names are the hub's, by hand. Its VAE has a file of its own.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import Pipeline

if TYPE_CHECKING:
    from pipelines import parts

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD, LATENT, TOWER = 64, 128, 4, 2, 16, 16, 32


def make(folder: Path, layers: int = 2) -> None:
    import json
    import shutil

    from safetensors.torch import save_file

    from pipelines import parts

    folder.mkdir(parents=True, exist_ok=True)
    for name, config in configs(layers).items():
        (folder / name).write_text(json.dumps(config, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(parts.EXAMPLE / name, folder / name)
    resampled = {"encoder.down.0.downsample.conv": 32, "decoder.up.1.upsample.conv": 32}
    tower = parts.siglip("vit_model.vision_model.", TOWER, (3, 14, 14))
    files = {
        "ema.safetensors": parts.tensors(dict([*_language(layers), *_core(), *tower])),
        "ae.safetensors": parts.tensors(dict(parts.resnet_vae(2, 32, LATENT, resampled)), seed=2),
    }
    for file, tensors in files.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    size = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def configs(layers: int) -> dict[str, dict[str, Any]]:
    language = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": layers, "rms_norm_eps": 1e-6, "vocab_size": 4096, "max_position_embeddings": 1024,
        "rope_theta": 1e6, "bos_token_id": 4088, "eos_token_id": 4090, "max_window_layers": layers, "sliding_window": 1024,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False,
    }  # fmt: skip
    return {
        "config.json": {
            "architectures": ["BagelForConditionalGeneration"], "model_type": "bagel", "connector_act": "gelu_pytorch_tanh",
            "interpolate_pos": False, "latent_patch_size": 2, "max_latent_size": 4, "timestep_shift": 1.0, "visual_gen": True,
            "visual_und": True, "vit_max_num_patch_per_side": 4, "vae_config": {"z_channels": LATENT, "downsample": 8},
            "vit_config": {"patch_size": 14, "hidden_size": TOWER}, "llm_config": language,
        },
        "llm_config.json": language,
        "vit_config.json": {
            "model_type": "siglip_vision_model", "hidden_size": TOWER, "intermediate_size": TOWER, "num_attention_heads": 2,
            "num_hidden_layers": 1, "image_size": 56, "patch_size": 14,
        },
        "preprocessor_config.json": {
            "image_processor_type": "SiglipImageProcessor", "do_normalize": True, "do_rescale": True, "do_resize": True,
            "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 56, "width": 56},
        },
    }  # fmt: skip


def _language(layers: int) -> "parts.Shapes":
    from pipelines.parts import biased

    yield "language_model.model.embed_tokens.weight", (4096, HIDDEN)
    for layer in range(layers):
        at = f"language_model.model.layers.{layer}."
        for path in ("", "_moe_gen"):
            yield from biased(f"{at}self_attn.q_proj{path}", HEADS * HEAD, HIDDEN)
            yield from biased(f"{at}self_attn.k_proj{path}", KV_HEADS * HEAD, HIDDEN)
            yield from biased(f"{at}self_attn.v_proj{path}", KV_HEADS * HEAD, HIDDEN)
            yield f"{at}self_attn.o_proj{path}.weight", (HIDDEN, HEADS * HEAD)
            yield f"{at}self_attn.q_norm{path}.weight", (HEAD,)
            yield f"{at}self_attn.k_norm{path}.weight", (HEAD,)
            yield f"{at}mlp{path}.gate_proj.weight", (INTERMEDIATE, HIDDEN)
            yield f"{at}mlp{path}.up_proj.weight", (INTERMEDIATE, HIDDEN)
            yield f"{at}mlp{path}.down_proj.weight", (HIDDEN, INTERMEDIATE)
            yield f"{at}input_layernorm{path}.weight", (HIDDEN,)
            yield f"{at}post_attention_layernorm{path}.weight", (HIDDEN,)
    yield "language_model.model.norm.weight", (HIDDEN,)
    yield "language_model.model.norm_moe_gen.weight", (HIDDEN,)
    yield "language_model.lm_head.weight", (4096, HIDDEN)


def _core() -> "parts.Shapes":
    from pipelines.parts import biased

    yield from biased("time_embedder.mlp.0", HIDDEN, 256)
    yield from biased("time_embedder.mlp.2", HIDDEN, HIDDEN)
    yield from biased("vae2llm", HIDDEN, 4 * LATENT)
    yield from biased("llm2vae", 4 * LATENT, HIDDEN)
    yield "latent_pos_embed.pos_embed", (16, HIDDEN)
    yield from biased("connector.fc1", HIDDEN, TOWER)
    yield from biased("connector.fc2", HIDDEN, HIDDEN)
    yield "vit_pos_embed.pos_embed", (16, HIDDEN)


PIPELINE = Pipeline(make, ("",), "", "BagelPipeline")
