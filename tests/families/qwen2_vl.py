"""Qwen2-VL with config.json as the hub has it: the language model's keys at the top, and a tower that calls its width embed_dim."""

from pathlib import Path
from typing import Any

from corpus.edit import edit_json
from corpus.edit_files import config

from families import END, IMAGE_SAMPLES, IMAGES, TOKENIZER, VOCAB, Family, Mutant, write


def make(folder: Path) -> None:
    from transformers import Qwen2VLConfig

    text = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        "bos_token_id": None,
        "eos_token_id": END,
    }
    vision = {"depth": 2, "embed_dim": 128, "hidden_size": 128, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    tokens = {"vision_start_token_id": 4091, "vision_end_token_id": 4092, "image_token_id": 4094, "video_token_id": 4095}
    whole = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **tokens)
    write(folder, "Qwen2VLForConditionalGeneration", whole, (*TOKENIZER, *IMAGES))
    edit_json(folder / "config.json", flat)
    edit_json(folder / "preprocessor_config.json", lambda data: data.update(processor_class="Qwen2VLProcessor"))


def flat(data: dict[str, Any]) -> None:
    """As published: no text_config, and the rotary embedding in transformers 4's words."""
    text = data.pop("text_config")
    rope = text.pop("rope_parameters")
    data |= {key: value for key, value in text.items() if key not in ("model_type", "layer_types")}
    data |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}


FAMILY = Family(
    make,
    ("qwen2vl-fp8", "qwen2vl-fp8-dynamic"),
    calibration=IMAGE_SAMPLES,
    off=("*visual*", "*lm_head*"),
    mutants=(
        Mutant("a tower of another width", config(lambda c: c["vision_config"].update(mlp_ratio=4)), "layout.shape"),
        Mutant("a tower of fewer blocks", config(lambda c: c["vision_config"].update(depth=1)), "layout.unknown-tensor"),
    ),
)
