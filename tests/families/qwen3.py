"""Qwen3 with heads wider than hidden_size / num_attention_heads, as the published sizes have them; tied, as the small ones are."""

from pathlib import Path

from corpus.edit import drop
from corpus.edit_files import config

from families import END, VOCAB, Family, Mutant, write


def make(folder: Path) -> None:
    from transformers import Qwen3Config

    config = Qwen3Config(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=VOCAB,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=END,
    )
    write(folder, "Qwen3ForCausalLM", config)


FAMILY = Family(
    make,
    ("qwen3-fp8", "qwen3-fp8-dynamic"),
    mutants=(
        Mutant("no norm of the queries", drop("*.1.self_attn.q_norm.weight"), "layout.missing-tensor"),
        Mutant("heads of another width", config(lambda c: c.pop("head_dim")), "layout.shape"),
    ),
)
