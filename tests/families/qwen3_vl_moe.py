"""Qwen3-VL-MoE as the hub has it: the experts of a layer in one tensor, each lying transposed."""

from pathlib import Path
from typing import Any

from corpus.edit import drop, edit_json, tensors

from families import END, IMAGE_SAMPLES, IMAGES, TOKENIZER, VOCAB, Family, Mutant, write


def make(folder: Path) -> None:
    from transformers import Qwen3VLMoeConfig

    text = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts": 12,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "vocab_size": VOCAB,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [12, 10, 10], "mrope_interleaved": True},
        "eos_token_id": END,
        "tie_word_embeddings": False,
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
    whole = Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **tokens)
    write(folder, "Qwen3VLMoeForConditionalGeneration", whole, (*TOKENIZER, *IMAGES))
    edit_json(folder / "preprocessor_config.json", lambda data: data.update(processor_class="Qwen3VLProcessor", patch_size=16))
    # vLLM 0.32.0 models/qwen3_moe.py reads it, the hub's files have it, and transformers 5.17 neither.
    edit_json(folder / "config.json", lambda data: data["text_config"].update(norm_topk_prob=True))
    # The hub's files have it for vLLM, which asks for it; transformers 5.17 drops it.
    edit_json(folder / "config.json", lambda data: data["text_config"].update(norm_topk_prob=True))
    tensors(_turn)(folder)


def _turn(stored: dict[str, Any]) -> None:
    """transformers 5.17 saves experts as it has them in memory."""
    for name in [name for name in stored if ".mlp.experts." in name]:
        stored[name] = stored[name].transpose(1, 2).contiguous()


FAMILY = Family(
    make,
    ("qwen3vl-moe-fp8", "qwen3vl-moe-fp8-dynamic"),
    calibration=IMAGE_SAMPLES,
    off=("*visual*", "*lm_head*"),
    mutants=(
        Mutant("no scale of an expert's input", drop("*.0.mlp.experts.11.down_proj.input_scale"), "layout.missing-scale"),
        Mutant("a router missing", drop("*.2.mlp.gate.weight"), "layout.missing-tensor"),
    ),
)
