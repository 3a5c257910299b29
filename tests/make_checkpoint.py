"""Writes checkpoints of Qwen2.5-VL's shape and any size, without holding them: random weights, or holes in sparse files.

    python tests/make_checkpoint.py DIR --preset mid      # 2.5 GB of weights, for measurements
    python tests/make_checkpoint.py DIR --preset 72b      # 147 GB by its headers, no data at all on the disk

Weights repeat one block of normal values: right for sizes, speed and memory, worthless as a model.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny-qwen2.5-vl"
INDEX = "model.safetensors.index.json"
BLOCK = 1 << 26
"""Bytes in the block that all weights repeat."""

# The four published sizes, from their config.json, and two for measurements. The 3B ties lm_head to the embeddings.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "tiny": {"layers": 2, "hidden": 256, "intermediate": 768, "heads": 4, "kv_heads": 2, "vocab": 4096,
                 "vision_depth": 2, "vision_hidden": 192, "vision_heads": 3, "vision_intermediate": 512, "shards": 2},
        "mid": {"layers": 24, "hidden": 2048, "intermediate": 5632, "heads": 16, "kv_heads": 4, "vocab": 4096,
                "vision_depth": 4, "vision_hidden": 320, "vision_heads": 4, "vision_intermediate": 864, "shards": 3},
        "3b": {"layers": 36, "hidden": 2048, "intermediate": 11008, "heads": 16, "kv_heads": 2, "vocab": 151936,
               "vision_intermediate": 3420, "shards": 2, "tied": True},
        "7b": {"layers": 28, "hidden": 3584, "intermediate": 18944, "heads": 28, "kv_heads": 4, "vocab": 152064,
               "vision_intermediate": 3420, "shards": 5},
        "32b": {"layers": 64, "hidden": 5120, "intermediate": 27648, "heads": 40, "kv_heads": 8, "vocab": 152064, "shards": 18},
        "72b": {"layers": 80, "hidden": 8192, "intermediate": 29568, "heads": 64, "kv_heads": 8, "vocab": 152064,
                "shards": 38, "sparse": True},
    }
)  # fmt: skip

Shape = tuple[int, ...]
DTYPES = {"BF16": ("bfloat16", b"\x80\x3f"), "F16": ("float16", b"\x00\x3c"), "F32": ("float32", b"\x00\x00\x80\x3f")}
"""{safetensors' word: config.json's, and the bytes of 1.0}."""


def make_checkpoint(
    folder: Path,
    *,
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    vision_depth: int = 32,
    vision_hidden: int = 1280,
    vision_heads: int = 16,
    vision_intermediate: int = 3456,
    shards: int = 2,
    sparse: bool = False,
    seed: int = 0,
    tied: bool = False,
    dtype: str = "BF16",
) -> Path:
    """Writes a checkpoint with the hub's names, config and index, and the example's tokenizer and processor files.

    `dtype` is one of DTYPES. `vocab` is at least the example's 4096, whose tokenizer it gets. `sparse` writes headers and leaves
    the data a hole: it reads as zeros and takes no disk. Memory stays near one block. Returns `folder`.
    """
    assert vocab >= 4096
    assert hidden % heads == vision_hidden % vision_heads == heads % kv_heads == 0
    folder.mkdir(parents=True, exist_ok=True)
    for path in EXAMPLE.iterdir():
        if path.suffix != ".safetensors" and path.name not in ("config.json", INDEX, "training_stats.json"):
            shutil.copyfile(path, folder / path.name)
    text: dict[str, Any] = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "vocab_size": vocab,
    }
    text |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "layer_types": ["full_attention"] * layers}
    vision: dict[str, Any] = {
        "depth": vision_depth,
        "hidden_size": vision_hidden,
        "num_heads": vision_heads,
        "out_hidden_size": hidden,
    }
    vision |= {"intermediate_size": vision_intermediate, "fullatt_block_indexes": list(range(vision_depth))[7::8] or [0]}
    (folder / "config.json").write_text(json.dumps(config(text, vision, tied) | {"dtype": DTYPES[dtype][0]}, indent=2) + "\n")

    shapes = dict(_language(layers, hidden, intermediate, heads, kv_heads, vocab))
    if not tied:
        shapes["lm_head.weight"] = (vocab, hidden)
    shapes |= _vision(vision_depth, vision_hidden, vision_intermediate, hidden)
    block = None if sparse else _block(seed, dtype)
    files = _split(shapes, shards)
    names = [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    for name, part in zip(names, files, strict=True):
        _write(folder / name, part, block, dtype)
    weight_map = {tensor: name for name, part in zip(names, files, strict=True) for tensor in part}
    metadata = {"total_size": sum(_nbytes(shape, dtype) for shape in shapes.values())}
    (folder / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n")
    return folder


def make_experts(
    folder: Path, *, layers: int, hidden: int, moe: int, experts: int, chosen: int, heads: int, kv_heads: int, vocab: int = 4096
) -> Path:
    """The same of Qwen3-MoE's shape: a language model alone, each expert by itself, `chosen` of them for each token."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        shutil.copyfile(EXAMPLE / name, folder / name)
    sizes = {"hidden_size": hidden, "moe_intermediate_size": moe, "num_experts": experts, "num_experts_per_tok": chosen}
    heads_of = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": hidden // heads}
    rest = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "bfloat16", "intermediate_size": 2 * moe}
    rest |= {"num_hidden_layers": layers, "vocab_size": vocab, "decoder_sparse_step": 1, "mlp_only_layers": []}
    (folder / "config.json").write_text(json.dumps({**rest, **sizes, **heads_of, "norm_topk_prob": True}, indent=2) + "\n")
    shapes: dict[str, Shape] = {}
    for name, shape in _language(layers, hidden, moe, heads, kv_heads, vocab):
        if name.endswith(".bias"):
            continue
        if ".mlp." not in name:
            shapes[name] = shape
            continue
        at, _, linear = name.partition("mlp.")
        shapes |= {f"{at}mlp.gate.weight": (experts, hidden)}
        shapes |= {f"{at}mlp.experts.{e}.{linear}": shape for e in range(experts)}
        shapes |= {f"{at}self_attn.{part}_norm.weight": (hidden // heads,) for part in "qk"}
    _write(folder / "model.safetensors", {**shapes, "lm_head.weight": (vocab, hidden)}, _block(0, "BF16"), "BF16")
    return folder


def config(text: Mapping[str, Any], vision: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """The example's config.json with these sizes; the rotary sections keep their proportions (2:3:3) for another head size."""
    result: dict[str, Any] = json.loads((EXAMPLE / "config.json").read_text())
    result["text_config"] |= {**text, "tie_word_embeddings": tied}
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    result["text_config"]["rope_parameters"]["mrope_section"] = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]
    result["vision_config"] |= vision
    result["tie_word_embeddings"] = tied
    return result


def _language(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int) -> Iterator[tuple[str, Shape]]:
    kv = hidden // heads * kv_heads
    yield "model.embed_tokens.weight", (vocab, hidden)
    for i in range(layers):
        at = f"model.layers.{i}."
        yield at + "input_layernorm.weight", (hidden,)
        for name, rows in (("q", hidden), ("k", kv), ("v", kv)):
            yield f"{at}self_attn.{name}_proj.weight", (rows, hidden)
            yield f"{at}self_attn.{name}_proj.bias", (rows,)
        yield at + "self_attn.o_proj.weight", (hidden, hidden)
        yield at + "post_attention_layernorm.weight", (hidden,)
        yield at + "mlp.gate_proj.weight", (intermediate, hidden)
        yield at + "mlp.up_proj.weight", (intermediate, hidden)
        yield at + "mlp.down_proj.weight", (hidden, intermediate)
    yield "model.norm.weight", (hidden,)


def _vision(depth: int, hidden: int, intermediate: int, out: int) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {"visual.patch_embed.proj.weight": (hidden, 3, 2, 14, 14)}
    linears: dict[str, Shape] = {}
    for i in range(depth):
        at = f"visual.blocks.{i}."
        shapes |= {at + "norm1.weight": (hidden,), at + "norm2.weight": (hidden,)}
        linears |= {at + "attn.qkv": (3 * hidden, hidden), at + "attn.proj": (hidden, hidden)}
        linears |= {at + "mlp.gate_proj": (intermediate, hidden), at + "mlp.up_proj": (intermediate, hidden)}
        linears[at + "mlp.down_proj"] = (hidden, intermediate)
    shapes["visual.merger.ln_q.weight"] = (hidden,)
    linears |= {"visual.merger.mlp.0": (4 * hidden, 4 * hidden), "visual.merger.mlp.2": (out, 4 * hidden)}
    for name, (rows, columns) in linears.items():
        shapes |= {name + ".weight": (rows, columns), name + ".bias": (rows,)}
    return shapes


def _nbytes(shape: Shape, dtype: str) -> int:
    return (4 if dtype == "F32" else 2) * math.prod(shape)


def _split(shapes: Mapping[str, Shape], count: int) -> list[dict[str, Shape]]:
    """The tensors in order, in at most `count` files of about equal size."""
    total, done = sum(map(math.prod, shapes.values())), 0
    files: list[dict[str, Shape]] = [{} for _ in range(count)]
    for name, shape in shapes.items():
        files[done * count // total][name] = shape
        done += math.prod(shape)
    return [file for file in files if file]


def _block(seed: int, dtype: str) -> memoryview:
    """Normal values of deviation 0.02. BF16 is the high half of a float32, rounded towards zero."""
    import numpy as np

    generator = np.random.default_rng(seed)
    block = bytearray()
    while len(block) < BLOCK:
        values = generator.standard_normal(1 << 20, dtype=np.float32) * np.float32(0.02)
        kinds = {"BF16": values.view(np.uint16)[1::2], "F16": values.astype(np.float16), "F32": values}
        block += kinds[dtype].tobytes()
    return memoryview(block)


def _write(path: Path, shapes: Mapping[str, Shape], block: memoryview | None, dtype: str) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    size = 0
    for name, shape in shapes.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [size, size + _nbytes(shape, dtype)]}
        size += _nbytes(shape, dtype)
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        if block is None:
            file.truncate(8 + len(raw) + size)
            return
        at = 0
        for name, shape in shapes.items():
            left = _nbytes(shape, dtype)
            if "norm" in name or "ln_q" in name:
                file.write(DTYPES[dtype][1] * math.prod(shape))
                continue
            while left:
                count = file.write(block[at : at + left])
                left -= count
                at = (at + count) % len(block)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", choices=PRESETS, default="mid")
    parser.add_argument("--layers", type=int, help="another depth than the preset's")
    parser.add_argument("--sparse", action="store_true", help="headers alone; the data is a hole that takes no disk")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sizes = dict(PRESETS[given.preset]) | ({"layers": given.layers} if given.layers else {})
    make_checkpoint(given.folder, **{**sizes, "sparse": given.sparse or sizes.get("sparse", False)}, seed=given.seed)
    found = [p.stat() for p in given.folder.glob("*.safetensors")]
    size, on_disk = sum(f.st_size for f in found) / 1e9, sum(f.st_blocks for f in found) * 512 / 1e9
    print(f"{given.folder}: {len(found)} shards, {size:.2f} GB, of which {on_disk:.2f} GB on the disk")


if __name__ == "__main__":
    main()
