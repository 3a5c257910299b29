"""Tiny checkpoints of architectures that ckptq has no scope for, and recipes for them that spell out a scope."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from families import END, TEXT_SAMPLES, VOCAB, write

SIZES: Mapping[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "eos_token_id": END,
    "pad_token_id": END,
    "bos_token_id": END,
    "tie_word_embeddings": False,
}
MODELS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "granite": ("GraniteForCausalLM", "GraniteConfig", {"residual_multiplier": 0.5, "attention_multiplier": 0.2}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {}),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", {"tie_word_embeddings": True}),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", {"no_rope_layer_interval": 2}),
    "ernie4_5_moe": (
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64, "moe_num_shared_experts": 1, "moe_layer_start_index": 0},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "num_hidden_layers": 2}),
}
"""{name: model class, configuration class, settings beside SIZES}."""


def make(name: str, folder: Path) -> Path:
    """Writes the checkpoint into a new folder."""
    import transformers

    model, config, settings = MODELS[name]
    folder.mkdir(parents=True)
    write(folder, model, getattr(transformers, config)(**{**SIZES, **settings}))
    return folder


def recipe(path: Path, source: Path, output: Path, scope: str = "", **settings: Any) -> Path:
    """Writes a recipe for FP8 with an FP8 KV cache, changed by `settings`, with the scope as `ckptq inspect` proposes it."""
    body = {
        "model": str(source),
        "output": str(output),
        "quantize": [{"modules": "model.layers.*", "scheme": "fp8"}],
        "keep": ["lm_head"],
        "kv_cache": "fp8",
        "calibration": dict(TEXT_SAMPLES),
        **settings,
    }
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in body.items()) + scope)
    return path
