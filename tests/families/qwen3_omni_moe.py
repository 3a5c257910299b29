"""Qwen3-Omni: thinker with routed experts, talker and code2wav in one checkpoint. Samples as for Qwen2.5-Omni."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from corpus.edit import drop
from corpus.edit_files import section

from families import END, Family, Mutant, write
from families.qwen2_5_omni import MEL, SAMPLES, TOKENS, VOCAB, processor, thinker

PATCH = 16


def make(folder: Path) -> None:
    from transformers import Qwen3OmniMoeConfig

    config = Qwen3OmniMoeConfig(thinker_config=_thinker(), talker_config=_talker(), code2wav_config=_code2wav())
    write(folder, "Qwen3OmniMoeForConditionalGeneration", config, ("vocab.json", "merges.txt"))
    processor(folder, "Qwen3OmniMoeProcessor", PATCH)
    _as_the_hub_has_it(folder / "config.json")


def _as_the_hub_has_it(path: Path) -> None:
    """The hub's files have these for vLLM, which asks for them; transformers 5.17 drops them."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["thinker_config"]["vision_config"] |= {"image_size": 4 * PATCH, "apply_vit_abs_pos_embed": True}
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _experts() -> dict[str, Any]:
    return {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}


def _thinker() -> dict[str, Any]:
    text = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": VOCAB,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "eos_token_id": END,
        "mlp_only_layers": [1],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [6, 5, 5], "mrope_interleaved": True},
        **_experts(),
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": PATCH,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    audio = {
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "num_mel_bins": MEL,
        "max_source_positions": 100,
        "output_dim": 64,
        "downsample_hidden_size": 8,
    }
    return {"text_config": text, "vision_config": vision, "audio_config": audio, **TOKENS}


def _talker() -> dict[str, Any]:
    decoder = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 64,
    }
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = {**decoder, **_experts(), "shared_expert_intermediate_size": 32, "rope_parameters": rope}
    return {
        "text_config": text,
        "code_predictor_config": {**decoder, "num_code_groups": 2},
        "num_code_groups": 2,
        "thinker_hidden_size": 64,
        "accept_hidden_layer": 1,
        "spatial_merge_size": 2,
    }


def _code2wav() -> dict[str, Any]:
    return {
        "codebook_size": 16,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_quantizers": 2,
        "decoder_dim": 16,
        "upsample_rates": [2, 2],
        "upsampling_ratios": [2],
    }


def _listed_without(name: str) -> Any:
    def change(quantization: dict[str, Any]) -> None:
        for key in [key for key in quantization["quantized_layers"] if name in key]:
            del quantization["quantized_layers"][key]

    return section(change)


def _plain_fp8(quantization: dict[str, Any]) -> None:
    del quantization["quantized_layers"]
    quantization["quant_algo"] = "FP8"


FAMILY = Family(
    make,
    ("qwen3omni-fp8", "qwen3omni-fp8-dynamic", "qwen3omni-nvfp4"),
    calibration=SAMPLES,
    resident=lambda source: thinker(source, "Qwen3OmniMoeThinkerForConditionalGeneration"),
    off=("*lm_head*", "*visual*", "*audio_tower*"),
    others=("talker.*", "code2wav.*"),
    harmless=("nothing excluded",),  # quantized_layers decides
    mutants=(
        Mutant("lm_head, which no exclude list reaches", section(_plain_fp8), "layout.not-excluded"),
        Mutant("a linear not listed", _listed_without("layers.2.self_attn.o_proj"), "layout.excluded"),
        Mutant("a merger of deepstack missing", drop("*visual.merger_list.1.mlp.2.weight"), "layout.missing-tensor"),
    ),
)
