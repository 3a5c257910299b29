"""Llama with biases everywhere, which its config can ask for, and lm_head of its own."""

from pathlib import Path

from corpus.edit_files import config

from families import END, VOCAB, Family, Mutant, write


def make(folder: Path) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
        vocab_size=VOCAB,
        max_position_embeddings=512,
        eos_token_id=END,
    )
    write(folder, "LlamaForCausalLM", config)


FAMILY = Family(
    make,
    ("llama-fp8", "llama-fp8-dynamic"),
    mutants=(Mutant("biases that config.json denies", config(lambda c: c.update(attention_bias=False)), "layout.unknown-tensor"),),
)
