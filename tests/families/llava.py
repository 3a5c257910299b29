"""LLaVA 1.5: CLIP, of which the last block is not used, and two linears between it and a Llama; names as the hub has them."""

import json
from pathlib import Path

from corpus.edit import both, drop, edit_json, rename
from corpus.edit_files import config, ignoring

from families import END, IMAGE_SAMPLES, TOKENIZER, VOCAB, Family, Mutant, write

TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() }}: {% for c in m['content'] if c['type'] == 'image' %}<|image_pad|>\n{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def make(folder: Path) -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    text = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=VOCAB,
        max_position_embeddings=1024,
        eos_token_id=END,
        architectures=["LlamaForCausalLM"],
    )
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
    )
    whole = LlavaConfig(text_config=text, vision_config=vision, image_token_index=4094, image_seq_length=16)
    write(folder, "LlavaForConditionalGeneration", whole, TOKENIZER)
    # transformers 5.17 leaves the part out where it made the model itself, and vLLM 0.32.0 does not read that.
    rename("vision_tower.", "vision_tower.vision_model.", "vision_tower.*")(folder)
    pixels = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 56},
        "crop_size": {"height": 56, "width": 56},
        "processor_class": "LlavaProcessor",
    }
    processor = {
        "image_token": "<|image_pad|>",
        "num_additional_image_tokens": 1,
        "patch_size": 14,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": "default",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    edit_json(folder / "tokenizer_config.json", lambda data: data.update(chat_template=TEMPLATE))


FAMILY = Family(
    make,
    ("llava-fp8", "llava-fp8-dynamic"),
    calibration=IMAGE_SAMPLES,
    off=("*vision_tower*", "*multi_modal_projector*", "*lm_head*"),
    mutants=(
        Mutant(
            "the projector not excluded",
            ignoring(lambda entries: [entry for entry in entries if "projector" not in entry]),
            "layout.not-excluded",
        ),
        Mutant("no block that is used", drop("vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight"), "layout.missing-tensor"),
        Mutant(
            "a feature from further on",
            both(
                config(lambda c: c.update(vision_feature_layer=-1)),
                drop("vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight"),
            ),
            "layout.missing-tensor",
        ),
    ),
)
