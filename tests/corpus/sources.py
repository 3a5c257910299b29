"""The unquantized checkpoints that the corpus's good exports are made from: complete, tiny, and the same on every run.

    python -m corpus.sources --jobs JOBS.json     # [{"name": key of SOURCES, "output": DIR}, ...]

Every linear has a spread of its own, so that shards of a fused linear, experts and layers differ in amax, and a swap shows.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from make_checkpoint import EXAMPLE, INDEX, Shape, _language, _vision, config
from safetensors.torch import save_file

Family = Literal["vl", "moe"]
BYTES = 256
"""The example's tokenizer begins with one token a byte; merges make the others."""
VOCAB = 512
SPECIALS = 8

SPREAD = {"q_proj": 1.0, "k_proj": 1.6, "v_proj": 0.7, "gate_proj": 1.0, "up_proj": 1.8}
"""Standard deviations of a fused linear's shards, in units of 0.02."""


@dataclass(frozen=True, slots=True)
class Source:
    """One unquantized checkpoint.

    `intermediate`: of an expert where there are experts; layers in `dense` have none, and are twice as wide.
    `nested`: tensor names as `model.language_model.layers`. `shards`: how many files.
    """

    family: Family
    layers: int = 2
    hidden: int = 256
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 384
    experts: int = 0
    dense: tuple[int, ...] = ()
    tied: bool = False
    nested: bool = False
    shards: int = 1
    extra: Mapping[str, Any] = field(default_factory=dict)


SOURCES: Mapping[str, Source] = {
    "vl": Source("vl", shards=2),
    "vl-nested": Source("vl", nested=True),
    "vl-deep": Source("vl", layers=12, hidden=128, heads=2, kv_heads=1, intermediate=128),
    "vl-tied": Source("vl", hidden=128, heads=2, kv_heads=1, intermediate=256, tied=True),
    "moe": Source("moe", intermediate=128, experts=4, shards=2),
    "moe-mixed": Source("moe", intermediate=128, experts=4, dense=(0,)),
}


def make_source(name: str, folder: Path) -> Path:
    """Writes SOURCES[name] into the new folder `folder`, BF16, with config, index where there are shards, and tokenizer."""
    source = SOURCES[name]
    folder.mkdir(parents=True)
    tensors = weights(source)
    save(tensors, folder, source.shards)
    settings = vl_config(source) if source.family == "vl" else moe_config(source)
    write_json(folder / "config.json", settings)
    tokenizer(folder, processor=source.family == "vl")
    return folder


def weights(source: Source) -> dict[str, torch.Tensor]:
    """{name: BF16 tensor}; each tensor's values follow from its position in the list and nothing else."""
    tensors = {}
    for seed, (name, shape) in enumerate(shapes(source)):
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        norm = "norm" in name or "ln_q" in name
        tensors[stored_name(name, source)] = (1 + 0.1 * values if norm else 0.02 * spread(name) * values).bfloat16()
    return tensors


def shapes(source: Source) -> Iterator[tuple[str, Shape]]:
    """Every tensor of the checkpoint by the names that were used on the hub first."""
    if source.family == "moe":
        yield from moe_shapes(source)
        return
    yield from _language(source.layers, source.hidden, source.intermediate, source.heads, source.kv_heads, VOCAB)
    if not source.tied:
        yield "lm_head.weight", (VOCAB, source.hidden)
    yield from _vision(2, 64, 128, source.hidden).items()


def moe_shapes(source: Source) -> Iterator[tuple[str, Shape]]:
    """Qwen3-MoE as on the hub: one tensor an expert and projection, a norm on the heads of q and k, no biases."""
    head = source.hidden // source.heads
    rows = {"q": source.hidden, "k": source.kv_heads * head, "v": source.kv_heads * head, "o": source.hidden}
    yield "model.embed_tokens.weight", (VOCAB, source.hidden)
    for i in range(source.layers):
        at = f"model.layers.{i}."
        yield f"{at}input_layernorm.weight", (source.hidden,)
        yield f"{at}post_attention_layernorm.weight", (source.hidden,)
        for name, count in rows.items():
            yield f"{at}self_attn.{name}_proj.weight", (count, source.hidden)
        for name in "qk":
            yield f"{at}self_attn.{name}_norm.weight", (head,)
        if i in source.dense:
            yield from projections(f"{at}mlp.", source.hidden, 2 * source.intermediate)
            continue
        yield f"{at}mlp.gate.weight", (source.experts, source.hidden)
        for expert in range(source.experts):
            yield from projections(f"{at}mlp.experts.{expert}.", source.hidden, source.intermediate)
    yield "model.norm.weight", (source.hidden,)
    yield "lm_head.weight", (VOCAB, source.hidden)


def projections(at: str, hidden: int, intermediate: int) -> Iterator[tuple[str, Shape]]:
    """Of one expert, or of a layer without any."""
    for name in ("gate", "up"):
        yield f"{at}{name}_proj.weight", (intermediate, hidden)
    yield f"{at}down_proj.weight", (hidden, intermediate)


def spread(name: str) -> float:
    """A bias is as wide as what is added to it; layers and experts widen slowly."""
    parts = name.split(".")
    if parts[-1] == "bias":
        return 10.0
    places = [int(part) for part in parts if part.isdigit()]
    return SPREAD.get(parts[-2], 1.3) * math.prod(1 + 0.15 * place for place in places)


def stored_name(name: str, source: Source) -> str:
    if not source.nested or name.startswith("lm_head"):
        return name
    return f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1)


def save(tensors: Mapping[str, torch.Tensor], folder: Path, shards: int) -> None:
    """One file, or several of about equal counts with an index."""
    names = list(tensors)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return
    parts = [names[i * len(names) // shards : (i + 1) * len(names) // shards] for i in range(shards)]
    weight_map = {}
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


# --- configs and tokenizer ---


def vl_config(source: Source) -> dict[str, Any]:
    text = {
        "num_hidden_layers": source.layers,
        "hidden_size": source.hidden,
        "intermediate_size": source.intermediate,
        "vocab_size": VOCAB,
        "num_attention_heads": source.heads,
        "num_key_value_heads": source.kv_heads,
        "layer_types": ["full_attention"] * source.layers,
        **token_ids("bos_token_id", "eos_token_id"),
    }
    vision = {"depth": 2, "hidden_size": 64, "num_heads": 2, "out_hidden_size": source.hidden, "intermediate_size": 128}
    found = config(text, {**vision, "fullatt_block_indexes": [1]}, source.tied)
    keys = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {**found, **token_ids(*keys)}


def moe_config(source: Source) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "dtype": "bfloat16",
        "head_dim": source.hidden // source.heads,
        "hidden_act": "silu",
        "hidden_size": source.hidden,
        "intermediate_size": 2 * source.intermediate,
        "max_position_embeddings": 4096,
        "mlp_only_layers": list(source.dense),
        "moe_intermediate_size": source.intermediate,
        "norm_topk_prob": True,
        "num_attention_heads": source.heads,
        "num_experts": source.experts,
        "num_experts_per_tok": 2,
        "num_hidden_layers": source.layers,
        "num_key_value_heads": source.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "tie_word_embeddings": source.tied,
        "vocab_size": VOCAB,
        **token_ids("bos_token_id", "eos_token_id"),
    }


def token_ids(*keys: str) -> dict[str, int]:
    """The example's ids of special tokens, which end its vocabulary as they end this one."""
    stored = json.loads((EXAMPLE / "config.json").read_text())
    found = {**stored["text_config"], **stored}
    return {key: VOCAB - stored["text_config"]["vocab_size"] + found[key] for key in keys}


def tokenizer(folder: Path, *, processor: bool) -> None:
    """The example's tokenizer cut to VOCAB tokens: its first merges, and the special tokens moved to the end."""
    whole = json.loads((EXAMPLE / "tokenizer.json").read_text(encoding="utf-8"))
    model = whole["model"]
    kept = VOCAB - SPECIALS
    model["vocab"] = {token: id for token, id in model["vocab"].items() if id < kept}
    model["merges"] = model["merges"][: kept - BYTES]
    moved = {token["id"]: kept + i for i, token in enumerate(whole["added_tokens"])}
    for token in whole["added_tokens"]:
        token["id"] = moved[token["id"]]
    write_json(folder / "tokenizer.json", whole)
    settings = json.loads((EXAMPLE / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["added_tokens_decoder"] = {str(moved[int(id)]): token for id, token in settings["added_tokens_decoder"].items()}
    write_json(folder / "tokenizer_config.json", settings)
    if processor:
        for name in ("chat_template.json", "preprocessor_config.json"):
            shutil.copyfile(EXAMPLE / name, folder / name)


def write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", required=True, type=Path)
    for job in json.loads(parser.parse_args().jobs.read_text(encoding="utf-8")):
        make_source(job["name"], Path(job["output"]))


if __name__ == "__main__":
    main()
