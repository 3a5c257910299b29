"""Gemma 3 with one layer that slides and one that sees all."""

from pathlib import Path

from corpus.edit import drop
from corpus.edit_files import config

from families import END, VOCAB, Family, Mutant, write


def make(folder: Path) -> None:
    from transformers import Gemma3TextConfig

    config = Gemma3TextConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        vocab_size=VOCAB,
        max_position_embeddings=512,
        eos_token_id=END,
    )
    write(folder, "Gemma3ForCausalLM", config)


FAMILY = Family(
    make,
    ("gemma3-text-fp8", "gemma3-text-fp8-dynamic"),
    mutants=(
        Mutant("no norm of what the MLP adds", drop("*.0.post_feedforward_layernorm.weight"), "layout.missing-tensor"),
        Mutant("lm_head said to be its own", config(lambda c: c.update(tie_word_embeddings=False)), "layout.missing-tensor"),
    ),
)
