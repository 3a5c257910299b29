"""Qwen2.5-VL under the newer of its two kinds of names; the example has the hub's. Full and window attention in the tower."""

from pathlib import Path

from corpus.edit import rename
from corpus.edit_files import config, ignoring

from families import END, IMAGE_SAMPLES, IMAGES, TOKENIZER, VOCAB, Family, Mutant, write


def make(folder: Path) -> None:
    from transformers import Qwen2_5_VLConfig

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
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 2,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 2,
        "out_hidden_size": 128,
        "patch_size": 14,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    }
    tokens = {"vision_start_token_id": 4091, "vision_end_token_id": 4092, "image_token_id": 4094, "video_token_id": 4095}
    whole = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens)
    write(folder, "Qwen2_5_VLForConditionalGeneration", whole, (*TOKENIZER, *IMAGES))
    rename("model.", "model.language_model.", "model.*")(folder)
    rename("visual.", "model.visual.", "visual.*")(folder)


FAMILY = Family(
    make,
    ("qwen25vl-lm-fp8", "qwen25vl-lm-fp8-dynamic-compressed-tensors"),
    calibration=IMAGE_SAMPLES,
    off=("*visual*", "*lm_head*"),
    mutants=(
        Mutant("a tower of another width", config(lambda c: c["vision_config"].update(intermediate_size=128)), "layout.shape"),
        Mutant("the tower without its dot", ignoring(lambda _: ["lm_head", "model.visual"]), "layout.not-excluded"),
    ),
)
