"""Qwen3-VL: two blocks of the tower feed what is added after the first two of three layers; heads wider than hidden / heads."""

from pathlib import Path
from typing import Any

from corpus.edit import drop, edit_json
from corpus.edit_files import config

from families import END, IMAGE_SAMPLES, IMAGES, TOKENIZER, VOCAB, Family, Mutant, write


def make(folder: Path) -> None:
    from transformers import Qwen3VLConfig

    text = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": VOCAB,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [12, 10, 10], "mrope_interleaved": True},
        "eos_token_id": END,
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 3,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 2,
        "out_hidden_size": 128,
        "patch_size": 16,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    tokens = {"vision_start_token_id": 4091, "vision_end_token_id": 4092, "image_token_id": 4094, "video_token_id": 4095}
    whole = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens)
    write(folder, "Qwen3VLForConditionalGeneration", whole, (*TOKENIZER, *IMAGES))
    edit_json(folder / "preprocessor_config.json", published)


def published(data: dict[str, Any]) -> None:
    """The image processor in the words of the hub's files."""
    del data["min_pixels"], data["max_pixels"]
    data |= {"size": {"longest_edge": 16777216, "shortest_edge": 4096}, "patch_size": 16}
    data |= {"image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor"}


FAMILY = Family(
    make,
    ("qwen3vl-fp8", "qwen3vl-fp8-dynamic"),
    calibration=IMAGE_SAMPLES,
    off=("*visual*", "*lm_head*"),
    mutants=(
        Mutant("a merger too few", config(lambda c: c["vision_config"]["deepstack_visual_indexes"].pop()), "layout.unknown-tensor"),
        Mutant("a merger without its norm", drop("model.visual.deepstack_merger_list.1.norm.weight"), "layout.missing-tensor"),
    ),
)
