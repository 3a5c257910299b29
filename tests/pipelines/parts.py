"""What pipelines share: weights, text encoders, tokenizers, VAEs, schedulers, each tiny and of the real classes."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen2.5-vl"
VOCAB = 4096
"""The example's tokenizer: its last eight tokens are special ones."""
SPECIAL = {"vision_start_token_id": 4091, "vision_end_token_id": 4092, "image_token_id": 4094, "video_token_id": 4095}


def filled(module: Any, seed: int = 0) -> Any:
    """The module in BF16 with the values of `tensors`. What its class keeps in float32 stays so, as diffusers loads it."""
    kept = getattr(module, "_keep_in_fp32_modules", None) or ()
    values = tensors({name: tuple(parameter.shape) for name, parameter in module.named_parameters()}, seed)
    for name, parameter in module.named_parameters():
        wide = any(part in name.split(".") for part in kept)
        parameter.data = values[name].float() if wide else values[name]
    return module.eval()


def tensors(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    """BF16: matrices that keep the size of what passes, norms near one, biases near zero; one generator for all."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            values /= max(1, math.prod(shape[1:])) ** 0.5
        elif name.endswith("bias"):
            values *= 0.02
        else:
            values = 1 + values * 0.1
        result[name] = values.to(torch.bfloat16)
    return result


def index(folder: Path, pipeline: str, components: Mapping[str, tuple[str, str]], **more: Any) -> None:
    """model_index.json, where no class of diffusers writes it."""
    listed = {name: list(pair) for name, pair in components.items()}
    rows = {"_class_name": pipeline, "_diffusers_version": "0.42.1", **more, **listed}
    (folder / "model_index.json").write_text(json.dumps(rows, indent=2) + "\n")


def amend(folder: Path, **entries: Any) -> None:
    """Entries of model_index.json that its pipeline's class can't write here."""
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries, indent=2) + "\n")


def scheduler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def shifting_scheduler() -> Any:
    """Whose shift depends on the size of the image."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)


def tokenizer() -> Any:
    from transformers import Qwen2Tokenizer

    return Qwen2Tokenizer.from_pretrained(EXAMPLE)


def qwen_processor(folder: Path) -> None:
    """The example's files, which are Qwen2.5-VL's."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.json"):
        shutil.copyfile(EXAMPLE / name, folder / name)


def pixtral_processor(folder: Path) -> None:
    """Makes FLUX.2's of the tokenizer that lies in the folder, by hand: the class itself wants torchvision."""
    image = {"image_processor_type": "PixtralImageProcessor", "patch_size": {"height": 14, "width": 14}}
    image |= {"size": {"longest_edge": 56}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    marks = {"image_token": "<|image_pad|>", "image_break_token": "<|vision_start|>", "image_end_token": "<|vision_end|>"}
    whole = {"processor_class": "PixtralProcessor", "patch_size": 14, "spatial_merge_size": 2, **marks, "image_processor": image}
    (folder / "processor_config.json").write_text(json.dumps(whole, indent=2) + "\n")
    (folder / "preprocessor_config.json").unlink(missing_ok=True)
    amend(folder.parent, **{folder.name: ["transformers", "PixtralProcessor"]})


def qwen2_5_vl(hidden: int = 64, layers: int = 2) -> Any:
    """Qwen-Image's and OmniGen2's text encoder; one layer of vision."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": hidden // 32,
        "vocab_size": VOCAB,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        "bos_token_id": None,
        "eos_token_id": 4090,
        "tie_word_embeddings": False,
    }
    vision = {
        "depth": 1,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": hidden,
        "patch_size": 14,
        "window_size": 56,
        "fullatt_block_indexes": [0],
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **SPECIAL)
    return filled(Qwen2_5_VLForConditionalGeneration(config), seed=1)


def qwen3(hidden: int = 64, layers: int = 3) -> Any:
    """Z-Image's text encoder. Input and output embeddings are one, as the hub's."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=VOCAB,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=4090,
        tie_word_embeddings=True,
    )
    return filled(Qwen3ForCausalLM(config), seed=1)


def mistral3(hidden: int = 32, layers: int = 30) -> Any:
    """FLUX.2's text encoder, which takes the states after layers 10, 20 and 30."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    text = {
        "model_type": "mistral",
        "hidden_size": hidden,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": VOCAB,
        "max_position_embeddings": 2048,
        "bos_token_id": None,
        "eos_token_id": 4090,
        "tie_word_embeddings": False,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 16,
        "image_size": 56,
        "patch_size": 14,
    }
    config = Mistral3Config(
        text_config=text, vision_config=vision, image_token_index=4094, spatial_merge_size=2, tie_word_embeddings=False
    )
    return filled(Mistral3ForConditionalGeneration(config), seed=1)


def glm_image_writer() -> Any:
    """The language model that writes GLM-Image's image tokens, with a tower."""
    from transformers import GlmImageConfig, GlmImageForConditionalGeneration

    text = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": VOCAB,
        "vision_vocab_size": 128,
        "max_position_embeddings": 1024,
        "pad_token_id": 4089,
        "eos_token_id": 65,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6], "partial_rotary_factor": 1.0},
    }
    vision = {"depth": 1, "hidden_size": 64, "num_heads": 2, "intermediate_size": 64, "image_size": 64, "patch_size": 16}
    vq = {"embed_dim": 64, "num_embeddings": 64, "latent_channels": 64}
    tokens = {"image_token_id": 4094, "image_start_token_id": 64, "image_end_token_id": 65}
    config = GlmImageConfig(text_config=text, vision_config=vision, vq_config=vq, **tokens)
    return filled(GlmImageForConditionalGeneration(config), seed=4)


def qwen_vae() -> Any:
    """Sixteen latent channels, as the statistics in its config have."""
    from diffusers import AutoencoderKLQwenImage

    return filled(AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 2, 2, 2], num_res_blocks=1), seed=2)


def kl_vae(latent: int = 16) -> Any:
    from diffusers import AutoencoderKL

    return filled(
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 16, 16),
            latent_channels=latent,
            norm_num_groups=4,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        seed=2,
    )


def t5_tokenizer() -> Any:
    """UMT5's kind: single characters, for lack of the published pieces."""
    from transformers import T5Tokenizer

    letters = [(chr(code), -4.0) for code in range(33, 127)]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -2.0), *letters], extra_ids=0)


def t5(kind: str, hidden: int = 64, vocab: int = 384) -> Any:
    """`kind`: "T5" (GLM-Image's, of bytes) or "UMT5" (Wan's)."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        d_model=hidden, d_kv=16, d_ff=2 * hidden, num_layers=2, num_heads=4, vocab_size=vocab, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )  # fmt: skip
    return filled(getattr(transformers, f"{kind}EncoderModel")(config), seed=1)


def wan_vae() -> Any:
    from diffusers import AutoencoderKLWan

    return filled(AutoencoderKLWan(base_dim=8, dim_mult=[1, 2, 2, 2], num_res_blocks=1), seed=2)


# --- names by hand, for checkpoints that no class here writes ---

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def biased(name: str, *shape: int) -> Shapes:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def resnet_vae(dims: int, channels: int, latent: int, resampled: Mapping[str, int]) -> Shapes:
    """Of latent diffusion's names: two levels of one resnet each, two in the decoder. `resampled`: {convolution: its outputs}."""
    kernel, point = (3,) * dims, (1,) * dims
    for part, levels, first, last in (("encoder", "down", 3, 2 * latent), ("decoder", "up", latent, 3)):
        yield from biased(f"{part}.conv_in", channels, first, *kernel)
        blocks = [f"{part}.{levels}.{level}.block.{i}" for level in range(2) for i in range(1 if part == "encoder" else 2)]
        for block in (*blocks, f"{part}.mid.block_1", f"{part}.mid.block_2"):
            for place in "12":
                yield from biased(f"{block}.norm{place}", channels)
                yield from biased(f"{block}.conv{place}", channels, channels, *kernel)
        for linear in ("q", "k", "v", "proj_out"):
            yield from biased(f"{part}.mid.attn_1.{linear}", channels, channels, *point)
        yield from biased(f"{part}.mid.attn_1.norm", channels)
        yield from biased(f"{part}.norm_out", channels)
        yield from biased(f"{part}.conv_out", last, channels, *kernel)
    for name, outputs in resampled.items():
        yield from biased(name, outputs, channels, *kernel)


def siglip(at: str, hidden: int, patch: tuple[int, ...]) -> Shapes:
    """A tower of one layer, of 16 patches."""
    layer = f"{at}encoder.layers.0."
    yield from biased(f"{at}embeddings.patch_embedding", hidden, *patch)
    yield f"{at}embeddings.position_embedding.weight", (16, hidden)
    for linear in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"):
        yield from biased(f"{layer}{linear}", hidden, hidden)
    for norm in (f"{layer}layer_norm1", f"{layer}layer_norm2", f"{at}post_layernorm"):
        yield from biased(norm, hidden)
