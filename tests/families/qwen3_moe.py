"""Qwen3-MoE with a layer without experts between two with twelve, so that the order of their numbers counts: 10 comes after 9."""

from pathlib import Path

from corpus.edit import drop
from corpus.edit_files import config, ignoring

from families import END, VOCAB, Family, Mutant, write


def make(folder: Path) -> None:
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        hidden_size=64,
        intermediate_size=160,
        moe_intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=12,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        mlp_only_layers=[1],
        vocab_size=VOCAB,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        eos_token_id=END,
    )
    write(folder, "Qwen3MoeForCausalLM", config)


FAMILY = Family(
    make,
    ("qwen3-moe-fp8", "qwen3-moe-fp8-dynamic", "qwen3-moe-nvfp4"),
    mutants=(
        Mutant("no scale of an expert's input", drop("*.0.mlp.experts.11.down_proj.input_scale"), "layout.missing-scale"),
        Mutant("an expert missing", drop("*.2.mlp.experts.10.*"), "layout.missing-tensor"),
        Mutant("a router not excluded", ignoring(lambda old: [e for e in old if "2.mlp.gate" not in e]), "layout.not-excluded"),
        Mutant("experts excluded", ignoring(lambda old: [*old, "model.layers.0.mlp.experts"]), "layout.excluded"),
        Mutant("a layer of experts said to be dense", config(lambda c: c["mlp_only_layers"].append(2)), "layout.missing-tensor"),
    ),
)
