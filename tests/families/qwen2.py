"""Qwen2.5 as the small sizes are: biases of q, k and v, and lm_head tied."""

from pathlib import Path

from corpus.edit import drop

from families import END, VOCAB, Family, Mutant, write


def make(folder: Path) -> None:
    from transformers import Qwen2Config

    config = Qwen2Config(
        hidden_size=128,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        vocab_size=VOCAB,
        max_position_embeddings=512,
        eos_token_id=END,
    )
    write(folder, "Qwen2ForCausalLM", config)


FAMILY = Family(
    make,
    ("qwen2-fp8", "qwen2-fp8-dynamic"),
    mutants=(Mutant("no bias of the keys", drop("*.1.self_attn.k_proj.bias"), "layout.missing-tensor"),),
)
