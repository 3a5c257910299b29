"""Phi-3: fused matrices on disk."""

from pathlib import Path

from corpus.edit import Tensors, tensors

from families import END, VOCAB, Family, Mutant, write


def make(folder: Path) -> None:
    from transformers import Phi3Config

    config = Phi3Config(
        hidden_size=128,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        vocab_size=VOCAB,
        max_position_embeddings=512,
        eos_token_id=END,
    )
    write(folder, "Phi3ForCausalLM", config)


def split(stored: Tensors) -> None:
    """A layer's attention as Llama's files have it."""
    at = "model.layers.1.self_attn."
    parts = stored.pop(f"{at}qkv_proj.weight").split([128, 64, 64])
    stored.update({f"{at}{name}_proj.weight": part for name, part in zip("qkv", parts, strict=True)})


FAMILY = Family(
    make,
    ("phi3-fp8", "phi3-fp8-dynamic"),
    mutants=(Mutant("q, k and v by themselves", tensors(split), "layout.unknown-tensor"),),
)
