"""Qwen2.5-Omni: thinker, talker and token2wav in one checkpoint, calibrated on audio, an image, both together and text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from corpus.edit import drop
from corpus.edit_files import ignoring

from families import END, EXAMPLE, ROOT, Family, Mutant, write

VOCAB = 4160
AUDIO = {"audio_token": "<|audio_pad|>", "audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>"}
VISION = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
}
TOKENS = {
    "image_token_id": 4094,
    "video_token_id": 4095,
    "audio_token_id": 4096,
    "audio_start_token_id": 4097,
    "audio_end_token_id": 4098,
    "vision_start_token_id": 4091,
    "vision_end_token_id": 4092,
}
MEL = 16
SAMPLES = {"source": "media", "files": str(ROOT / "tests/data/omni/samples.jsonl"), "samples": 4, "sequence_length": 512}
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] == 'audio' %}<|audio_start|><|audio_pad|><|audio_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
)


def make(folder: Path) -> None:
    from transformers import Qwen2_5OmniConfig

    config = Qwen2_5OmniConfig(thinker_config=_thinker(), talker_config=_talker(), token2wav_config=_token2wav())
    write(folder, "Qwen2_5OmniForConditionalGeneration", config, ("vocab.json", "merges.txt"))
    processor(folder, "Qwen2_5OmniProcessor", 14)
    import torch

    torch.save({"Nobody": {"bos_token": 1}}, folder / "spk_dict.pt")


def _thinker() -> dict[str, Any]:
    text = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": VOCAB,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "eos_token_id": END,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
    }
    audio = {
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "num_mel_bins": MEL,
        "n_window": 10,
        "max_source_positions": 10,
        "output_dim": 64,
    }
    return {"text_config": text, "vision_config": vision, "audio_config": audio, **TOKENS}


def _talker() -> dict[str, Any]:
    return {
        "embedding_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    }


def _token2wav() -> dict[str, Any]:
    dit = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 16,
        "emb_dim": 16,
        "num_embeds": 32,
        "mel_dim": 8,
        "enc_emb_dim": 8,
        "enc_dim": 8,
        "enc_channels": [8, 8, 8, 8, 24],
        "enc_attention_channels": 8,
        "enc_se_channels": 8,
    }
    vocoder = {
        "mel_dim": 8,
        "upsample_initial_channel": 16,
        "upsample_rates": [2, 2],
        "upsample_kernel_sizes": [4, 4],
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1, 3, 5]],
    }
    return {"dit_config": dit, "bigvgan_config": vocoder}


def processor(folder: Path, name: str, patch: int) -> None:
    """Tokenizer and processor files: the example's tokenizer with tokens for audio, and Whisper's features of 2 s at most."""
    tokenizer = json.loads((EXAMPLE / "tokenizer.json").read_text(encoding="utf-8"))
    settings = json.loads((EXAMPLE / "tokenizer_config.json").read_text(encoding="utf-8"))
    for number, token in enumerate(AUDIO.values(), TOKENS["audio_token_id"]):
        entry = {**tokenizer["added_tokens"][-1], "id": number, "content": token}
        tokenizer["added_tokens"].append(entry)
        settings["added_tokens_decoder"][str(number)] = {key: value for key, value in entry.items() if key != "id"}
    del settings["additional_special_tokens"]
    settings |= {"extra_special_tokens": {**VISION, **AUDIO}, "chat_template": _TEMPLATE, "processor_class": name}
    features = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": MEL,
        "sampling_rate": 16000,
        "hop_length": 160,
        "n_fft": 400,
        "chunk_length": 2,
        "n_samples": 32000,
        "nb_max_frames": 200,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
        "dither": 0.0,
    }
    images = json.loads((EXAMPLE / "preprocessor_config.json").read_text(encoding="utf-8"))
    for file, content in (
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", settings),
        ("preprocessor_config.json", {**images, **features, "patch_size": patch, "processor_class": name}),
        ("chat_template.json", {"chat_template": _TEMPLATE}),
    ):
        (folder / file).write_text(json.dumps(content, indent=1), encoding="utf-8")


def thinker(source: Path, name: str) -> Any:
    """The resident thinker, from the checkpoint of all stages."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(source).thinker_config
    settings = {"config": config, "dtype": torch.bfloat16, "experts_implementation": "eager"}
    return getattr(transformers, name).from_pretrained(source, **settings).eval()


FAMILY = Family(
    make,
    ("qwen25omni-fp8", "qwen25omni-fp8-dynamic", "qwen25omni-nvfp4"),
    calibration=SAMPLES,
    resident=lambda source: thinker(source, "Qwen2_5OmniThinkerForConditionalGeneration"),
    off=("*lm_head*", "*visual*", "*audio_tower*"),
    others=("talker.*", "token2wav.*"),
    mutants=(
        Mutant(
            "the talker not excluded", ignoring(lambda names: [n for n in names if "talker" not in n]), "layout.draft-not-excluded"
        ),
        Mutant("no bias in the audio tower", drop("*audio_tower.layers.1.fc1.bias"), "layout.missing-tensor"),
        Mutant(
            "the vision tower not excluded", ignoring(lambda names: [n for n in names if "visual" not in n]), "layout.not-excluded"
        ),
    ),
)
