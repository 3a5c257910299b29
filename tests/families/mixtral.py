"""Mixtral: w1, w2 and w3 of eleven experts, in a module that transformers calls otherwise."""

from pathlib import Path

from corpus.edit import drop

from families import END, VOCAB, Family, Mutant, write


def make(folder: Path) -> None:
    from transformers import MixtralConfig

    config = MixtralConfig(
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=11,
        num_experts_per_tok=2,
        vocab_size=VOCAB,
        max_position_embeddings=512,
        eos_token_id=END,
    )
    write(folder, "MixtralForCausalLM", config)


FAMILY = Family(
    make,
    ("mixtral-fp8", "mixtral-fp8-dynamic"),
    mutants=(
        Mutant("no scale of an expert's input", drop("*.0.block_sparse_moe.experts.10.w2.input_scale"), "layout.missing-scale"),
        Mutant("no gate of an expert", drop("*.1.block_sparse_moe.experts.3.w1.*"), "layout.missing-tensor"),
        Mutant("no router", drop("*.1.block_sparse_moe.gate.weight"), "layout.missing-tensor"),
    ),
)
