"""Tensors of another shape or type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from corpus.edit import alter, both, dequantized, drop, rows, shape, to
from corpus.edit_files import config, elsewhere
from corpus.mutants import fault
from corpus.places import DOWN, GATE, KV, OUT, TOWER, UP, K, Q, V


def typed(dtype: str) -> Callable[[dict[str, Any]], None]:
    """Of the model and its parts."""

    def apply(config: dict[str, Any]) -> None:
        for part in (config, config["text_config"], config["vision_config"]):
            part["dtype"] = dtype

    return apply


HALF_A_BLOCK = both(
    alter(lambda t: t[:64], "model.layers.*.[kv]_proj.weight", "model.layers.*.[kv]_proj.bias"),
    config(lambda c: c["text_config"].update(num_key_value_heads=1)),
)
"""One KV head of 64 rows: the block of K's scales would go on into V's."""

SHAPES = (
    *fault(
        "block that lies in two shards",
        bad={"vl-pb-wo vl-ct-block vl-fp8-block": {"of keys and values": HALF_A_BLOCK}},
        near={"vl-pb-wo vl-ct-block vl-fp8-block": {"a key of training": config(lambda c: c.update(attention_dropout=0.1))}},
    ),
    *fault(
        "one scale in two dimensions",
        bad={
            "vl-modelopt": {
                "o": alter(shape(1, 1), f"{OUT}.weight_scale"),
                "q": alter(shape(1, 1), f"{Q}.weight_scale"),
                "input of down": alter(shape(1, 1), f"{DOWN}.input_scale"),
            },
            "vl-ct-static vl-fp8-static": {"o": alter(shape(1, 1), f"{OUT}.weight_scale")},
        },
        near={
            "vl-modelopt vl-fp8-static": {"in a list": alter(shape(1), "*.weight_scale", "*.input_scale")},
            "vl-ct-static": {"bare": alter(shape(), "*.weight_scale", "*.input_scale")},
        },
    ),
    *fault(
        "scale a row where one a tensor belongs",
        bad={
            "vl-modelopt": {"[N]": alter(shape(256), f"{OUT}.weight_scale"), "[N, 1]": alter(shape(256, 1), f"{OUT}.weight_scale")},
            "vl-fp8-static vl-ct-static": {"[N, 1]": alter(shape(256, 1), f"{DOWN}.weight_scale")},
            "vl-fp8-dynamic": {"[N]": alter(shape(128), f"{K}.weight_scale")},
        },
        near={"vl-modelopt": {"in a list": alter(shape(1), f"{OUT}.weight_scale")}},
    ),
    *fault(
        "scales a row in another shape",
        bad={
            "vl-pcpt": {
                "[N, 1]": alter(lambda t: t.reshape(-1, 1), "*.weight_scale"),
                "[1, N]": alter(lambda t: t.reshape(1, -1), f"{OUT}.weight_scale"),
                "one": alter(lambda t: t[0].reshape(()), f"{OUT}.weight_scale"),
                "one in a list": alter(lambda t: t[:1], f"{K}.weight_scale"),
                "a row short": alter(lambda t: t[1:], f"{OUT}.weight_scale"),
            },
            "vl-ct-dynamic": {
                "[N]": alter(lambda t: t.flatten(), "*.weight_scale"),
                "[1, N]": alter(lambda t: t.reshape(1, -1), f"{OUT}.weight_scale"),
                "one": alter(lambda t: t[0].reshape(()), f"{OUT}.weight_scale"),
                "a row short": alter(lambda t: t[1:], f"{DOWN}.weight_scale"),
            },
        },
        near={
            "vl-pcpt vl-ct-dynamic": {"in F64": alter(to(torch.float64), "*.weight_scale")},
        },
    ),
    *fault(
        "block scales in another shape",
        bad={
            "vl-pb-wo": {
                "[N/128, K/128]": alter(lambda t: t.reshape(t.shape[0], -1), "*.weight_scale"),
                "[N/128, K/128, 1, 1]": alter(lambda t: t.transpose(1, 2), f"{DOWN}.weight_scale"),
                "transposed": alter(lambda t: t.transpose(0, 2), f"{DOWN}.weight_scale"),
                "one": alter(lambda t: t.flatten()[0].reshape(()), f"{OUT}.weight_scale"),
            },
            "vl-ct-block": {
                "transposed": alter(lambda t: t.t(), f"{DOWN}.weight_scale"),
                "flat": alter(lambda t: t.flatten(), f"{OUT}.weight_scale"),
                "4-D": alter(lambda t: t[:, None, :, None], f"{OUT}.weight_scale"),
                "one": alter(lambda t: t.flatten()[0].reshape(()), f"{OUT}.weight_scale"),
                "a block short": alter(lambda t: t[:, 1:], f"{DOWN}.weight_scale"),
            },
            "vl-fp8-block": {
                "transposed": alter(lambda t: t.t(), f"{DOWN}.weight_scale_inv"),
                "4-D": alter(lambda t: t[:, None, :, None], f"{OUT}.weight_scale_inv"),
                "a block more": alter(lambda t: torch.cat([t[:, 1:], t], 1), f"{OUT}.weight_scale_inv"),
            },
        },
        near={
            "vl-pb-wo vl-ct-block": {"in F64": alter(to(torch.float64), "*.weight_scale")},
            "vl-fp8-block": {"in F64": alter(to(torch.float64), "*.weight_scale_inv")},
        },
    ),
    *fault(
        "two values in a kv scale",
        bad={
            "vl-modelopt": {"[2]": alter(shape(2), f"{K}.k_scale"), "a head": alter(shape(2, 1), *KV)},
            "moe-modelopt": {"[2]": alter(shape(2), f"{K}.k_scale")},
        },
        near={
            "vl-modelopt": {"one in a list": alter(shape(1), *KV), "one in two dimensions": alter(shape(1, 1), *KV)},
        },
    ),
    *fault(
        "weight of too many rows",
        bad={
            "vl-modelopt": {
                "q": alter(rows(32), f"{Q}.weight"),
                "gate": alter(rows(32), f"{GATE}.weight"),
                "o": alter(rows(32), f"{OUT}.weight"),
            },
            "vl-ct-dynamic": {
                "up": both(alter(rows(32), f"{UP}.weight"), alter(lambda t: torch.cat([t[:32], t]), f"{UP}.weight_scale"))
            },
            "moe-modelopt": {"v": alter(rows(32), f"{V}.weight")},
        },
        near={"vl-modelopt": {"a file in another order": elsewhere(f"{Q}.weight", f"{GATE}.weight")}},
    ),
    *fault(
        "weight of too few rows",
        bad={
            "vl-modelopt": {
                "q": alter(lambda t: t[32:], f"{Q}.weight"),
                "down": alter(lambda t: t[32:], f"{DOWN}.weight"),
                "bias": alter(lambda t: t[32:], f"{K}.bias"),
            }
        },
        near={"vl-modelopt": {"a norm in a row": alter(lambda t: t.reshape(1, -1)[0], "model.norm.weight")}},
    ),
    *fault(
        "vocabulary of another size",
        bad={
            "vl-modelopt": {
                "lm_head of more rows": alter(lambda t: torch.cat([t, t[:64]]), "lm_head.weight"),
                "lm_head of fewer": alter(lambda t: t[:-64], "lm_head.weight"),
                "embeddings of fewer": alter(lambda t: t[:-64], "model.embed_tokens.weight"),
                "config of more": config(lambda c: c["text_config"].update(vocab_size=c["text_config"]["vocab_size"] + 64)),
            }
        },
        near={"vl-modelopt": {"a key that nobody reads": config(lambda c: c.update(padded_vocab_size=576))}},
    ),
    *fault(
        "weight transposed",
        bad={
            "vl-modelopt": {"down": alter(lambda t: t.t(), f"{DOWN}.weight"), "k": alter(lambda t: t.t(), f"{K}.weight")},
            "vl-fp8-dynamic": {"gate": alter(lambda t: t.t(), f"{GATE}.weight")},
        },
        near={"vl-modelopt": {"stored column by column and named so": alter(lambda t: t.t().contiguous().t(), f"{DOWN}.weight")}},
    ),
    *fault(
        "square weight transposed",
        bad={
            "vl-modelopt vl-ct-dynamic vl-fp8-block": {"o": alter(lambda t: t.t(), f"{OUT}.weight")},
            "vl-ours": {"q": alter(lambda t: t.t(), f"{Q}.weight")},
        },
        near={"vl-modelopt": {"twice": alter(lambda t: t.t().contiguous().t(), f"{OUT}.weight")}},
        needs="source",
    ),
)

TYPES = (
    *fault(
        "FP8 codes under another type",
        bad={
            "vl-modelopt": {
                "U8": alter(lambda t: t.view(torch.uint8), f"{OUT}.weight"),
                "I8": alter(lambda t: t.view(torch.int8), "model.layers.*_proj.weight"),
                "U8 of a shard": alter(lambda t: t.view(torch.uint8), f"{K}.weight"),
            },
            "vl-pcpt vl-fp8-block vl-ct-static": {"U8": alter(lambda t: t.view(torch.uint8), f"{DOWN}.weight")},
        },
        near={"vl-modelopt": {"the same codes": alter(lambda t: t.view(torch.uint8).clone().view(t.dtype), f"{OUT}.weight")}},
    ),
    *fault(
        "weight in E5M2",
        bad={
            "vl-modelopt": {"o": alter(lambda t: t.float().to(torch.float8_e5m2), f"{OUT}.weight")},
            "vl-fp8-dynamic": {"all": alter(lambda t: t.float().to(torch.float8_e5m2), "model.layers.*_proj.weight")},
        },
        near={"vl-modelopt": {"E4M3 by another road": alter(lambda t: t.float().to(t.dtype), f"{OUT}.weight")}},
    ),
    *fault(
        "weight of a quantized module in BF16",
        bad={
            "vl-modelopt": {
                "dequantized, with scales": dequantized(f"{DOWN}.weight"),
                "dequantized, without": both(dequantized(f"{DOWN}.weight"), drop(f"{DOWN}.weight_scale", f"{DOWN}.input_scale")),
                "a shard": dequantized(f"{V}.weight"),
            },
        },
        near={"vl-modelopt": {"the norms, in F32": alter(to(torch.float32), "*norm.weight")}},
    ),
    *fault(
        "scale of another type",
        bad={
            "vl-modelopt": {
                "I32": alter(to(torch.int32), f"{OUT}.weight_scale"),
                "U8 exponent": alter(lambda t: (t.log2().round() + 127).to(torch.uint8), f"{OUT}.weight_scale"),
                "F8": alter(to(torch.float8_e4m3fn), f"{DOWN}.weight_scale"),
                "kv F8": alter(to(torch.float8_e4m3fn), *KV),
            },
            "vl-fp8-block": {"U8 exponents": alter(lambda t: (t.log2().round() + 127).to(torch.uint8), "*.weight_scale_inv")},
        },
        near={
            "vl-modelopt": {
                "BF16": alter(to(torch.bfloat16), "*.weight_scale", "*.input_scale"),
                "F16": alter(to(torch.float16), "*.weight_scale"),
            },
            "vl-ct-block vl-pcpt": {"BF16": alter(to(torch.bfloat16), "*.weight_scale")},
            "vl-fp8-block": {"BF16": alter(to(torch.bfloat16), "*.weight_scale_inv")},
            "vl-modelopt vl-fp8-static": {"F64": alter(to(torch.float64), "*.weight_scale", "*.input_scale")},
            "vl-modelopt vl-ours": {"kv in BF16": alter(to(torch.bfloat16), *KV)},
        },
    ),
    *fault(
        "tensor that stays in fewer bits",
        bad={
            "vl-modelopt": {
                "tower in F8": alter(to(torch.float8_e4m3fn), f"{TOWER}attn.proj.weight"),
                "embeddings in F8": alter(to(torch.float8_e4m3fn), "model.embed_tokens.weight"),
                "lm_head in F8": alter(to(torch.float8_e4m3fn), "lm_head.weight"),
                "norm in I8": alter(to(torch.int8), "model.norm.weight"),
                "bias in F8": alter(to(torch.float8_e4m3fn), f"{Q}.bias"),
            }
        },
        near={
            "vl-modelopt": {
                "tower in F32": alter(to(torch.float32), "visual.*"),
                "lm_head in F32": alter(to(torch.float32), "lm_head.weight"),
            }
        },
    ),
    *fault(
        "activations in another type",
        bad={"vl-modelopt vl-ct-dynamic": {"float16": config(typed("float16"))}},
        near={
            "vl-modelopt": {
                "the key's old name": config(lambda c: c.update(torch_dtype=c.pop("dtype"))),
                "float32, which the server narrows": config(typed("float32")),
            }
        },
    ),
)

MUTANTS = (*SHAPES, *TYPES)
