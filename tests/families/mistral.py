"""Mistral with a head_dim of its own, as Nemo has one, and a window shorter than the samples."""

from pathlib import Path

from corpus.edit_files import beside

from families import END, VOCAB, Family, Mutant, write


def make(folder: Path) -> None:
    from transformers import MistralConfig

    config = MistralConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=16,
        vocab_size=VOCAB,
        max_position_embeddings=512,
        eos_token_id=END,
    )
    write(folder, "MistralForCausalLM", config)


FAMILY = Family(
    make,
    ("mistral-fp8", "mistral-fp8-dynamic"),
    mutants=(
        Mutant(
            "a file in Mistral's own format",
            beside("consolidated.safetensors", lambda t: t, "lm_head.weight"),
            "files.consolidated",
        ),
    ),
)
