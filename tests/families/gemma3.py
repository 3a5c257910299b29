"""Gemma 3 with SigLIP: tokens of an image see one another, in layers with a window and without; heads of their own width."""

import json
from pathlib import Path

from corpus.edit import drop, edit_json, rename
from corpus.edit_files import config

from families import END, IMAGE_SAMPLES, TOKENIZER, VOCAB, Family, Mutant, write

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|>{% else %}{{ c['text'] | trim }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
NAMES = {"boi_token": "<|vision_start|>", "eoi_token": "<|vision_end|>", "image_token": "<|image_pad|>"}
LINES = ("\n", "\n\n", "\n\n\n", "\n\n\n\n")
"""Tokens of Gemma's vocabulary, which vLLM asks for: vLLM 0.32.0 models/gemma3_mm.py _apply_token_matches."""


def make(folder: Path) -> None:
    from transformers import Gemma3Config

    text = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "query_pre_attn_scalar": 128,
        "vocab_size": VOCAB + 8,
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": END,
    }
    vision = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "vision_use_head": False,
    }
    tokens = {"boi_token_index": 4091, "eoi_token_index": 4092, "image_token_index": 4094}
    whole = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)
    write(folder, "Gemma3ForConditionalGeneration", whole, TOKENIZER)
    # transformers 5.17 leaves the part out where it made the model itself, and vLLM 0.32.0 does not read that.
    rename("vision_tower.", "vision_tower.vision_model.", "vision_tower.*")(folder)
    pixels = {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 56, "width": 56}, "image_seq_length": 4}
    (folder / "preprocessor_config.json").write_text(json.dumps({**pixels, "processor_class": "Gemma3Processor"}))
    (folder / "processor_config.json").write_text(json.dumps({"image_seq_length": 4, "processor_class": "Gemma3Processor"}))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    added = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": False}
    lines = [{"id": VOCAB + i, "content": line, **added} for i, line in enumerate(LINES)]
    edit_json(folder / "tokenizer.json", lambda data: data["added_tokens"].extend(lines))
    named = {str(line.pop("id")): line for line in lines}

    def name(data: dict[str, object]) -> None:
        data |= {**NAMES, "extra_special_tokens": NAMES, "chat_template": TEMPLATE}
        data["added_tokens_decoder"] |= named  # type: ignore[operator]

    edit_json(folder / "tokenizer_config.json", name)


FAMILY = Family(
    make,
    ("gemma3-fp8", "gemma3-fp8-dynamic"),
    calibration=IMAGE_SAMPLES,
    off=("*vision_tower*", "*multi_modal_projector*", "*lm_head*"),
    mutants=(
        Mutant("no projection", drop("multi_modal_projector.mm_input_projection_weight"), "layout.missing-tensor"),
        Mutant("a tower of more blocks", config(lambda c: c["vision_config"].update(num_hidden_layers=3)), "layout.missing-tensor"),
    ),
)  # fmt: skip
