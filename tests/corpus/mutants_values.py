"""Tensors of the right name, shape and type that hold other numbers."""

from __future__ import annotations

import math

import torch

from corpus.edit import alter, both, code, copy, flipped, put, requantized, scalar, swap, times, to
from corpus.edit_files import elsewhere
from corpus.mutants import fault
from corpus.places import DOWN, GATE, KV, L0, L1, OUT, TOWER, UP, K, Q, V

Q_SCALE, OUT_SCALE, DOWN_SCALE = (f"{module}.weight_scale" for module in (Q, OUT, DOWN))


def reciprocal(t: torch.Tensor) -> torch.Tensor:
    return (1 / t.float()).to(t.dtype)


def signed_zeros(codes: torch.Tensor) -> torch.Tensor:
    values = codes.float()
    return torch.where(values == 0, -0.0, values).to(codes.dtype)


SCALES = (
    *fault(
        "reciprocal of a scale",
        bad={
            "vl-modelopt": {"o": alter(reciprocal, OUT_SCALE), "all": alter(reciprocal, "*.weight_scale")},
            "vl-pcpt vl-ct-dynamic": {"o": alter(reciprocal, OUT_SCALE)},
            "vl-fp8-block": {"all": alter(reciprocal, "*.weight_scale_inv")},
        },
        near={"vl-modelopt": {"of the reciprocal": alter(lambda t: reciprocal(reciprocal(t)), "*.weight_scale", "*.input_scale")}},
    ),
    *fault(
        "reciprocal of an activation's scale",
        bad={"vl-ours": {"input": alter(reciprocal, "*.input_scale"), "kv": alter(reciprocal, *KV)}},
        near={"vl-modelopt": {"of the reciprocal": alter(lambda t: reciprocal(reciprocal(t)), *KV)}},
        needs="record",
    ),
    *fault(
        "amax in place of a weight's scale",
        bad={
            "vl-modelopt": {"o": alter(times(448), OUT_SCALE), "all": alter(times(448), "*.weight_scale")},
            "vl-pcpt vl-ct-static vl-fp8-static vl-pb-wo": {"down": alter(times(448), DOWN_SCALE)},
        },
        near={"vl-modelopt": {"the same, in F64": alter(to(torch.float64), OUT_SCALE)}},
        needs="source",
    ),
    *fault(
        "amax in place of an activation's scale",
        bad={"vl-ours": {"input": alter(times(448), "*.input_scale"), "kv": alter(times(448), *KV)}},
        near={"vl-modelopt": {"kv in F64": alter(to(torch.float64), *KV)}},
        needs="record",
    ),
    *fault(
        "weight's scale of another size",
        bad={
            "vl-modelopt": {"doubled": alter(times(2), OUT_SCALE), "a shard's, halved": alter(times(0.5), Q_SCALE)},
            "vl-ours": {"all, a tenth more": alter(times(1.1), "*.weight_scale")},
            "vl-pcpt": {"a row's, doubled": alter(lambda t: torch.cat([t[:1] * 2, t[1:]]), OUT_SCALE)},
            "vl-ct-block": {"a block's, halved": alter(lambda t: torch.cat([t[:1] * 0.5, t[1:]]), OUT_SCALE)},
            "vl-fp8-block": {"doubled": alter(times(2), f"{K}.weight_scale_inv")},
        },
        near={
            "vl-modelopt": {"doubled, over codes of half the size": requantized(2, OUT)},
            "vl-pcpt": {"a hundredth of a percent more": alter(times(1.0001), OUT_SCALE)},
        },
        needs="source",
    ),
    *fault(
        "activation's scale of another size",
        bad={
            "vl-ours": {
                "input of o, doubled": alter(times(2), f"{OUT}.input_scale"),
                "input of down, halved": alter(times(0.5), f"{DOWN}.input_scale"),
                "input of a shard, tenfold": alter(times(10), f"{Q}.input_scale"),
                "keys, doubled": alter(times(2), "*.k_scale"),
                "values of a layer, halved": alter(times(0.5), f"{V}.v_scale"),
            }
        },
        near={"vl-modelopt": {"input of one shard, smaller than the others'": alter(times(0.5), f"{Q}.input_scale")}},
        needs="record",
    ),
    *fault(
        "scale zero",
        bad={
            "vl-modelopt": {
                "weight": alter(scalar(0), OUT_SCALE),
                "a shard's weight": alter(scalar(0), Q_SCALE),
                "input": alter(scalar(0), f"{DOWN}.input_scale"),
                "keys": alter(scalar(0), f"{K}.k_scale"),
                "keys and values": alter(scalar(0), *KV),
            },
            "vl-pcpt": {"a row": alter(lambda t: torch.cat([t[:1] * 0, t[1:]]), DOWN_SCALE)},
            "vl-ct-block": {"a block": alter(lambda t: torch.cat([t[:1] * 0, t[1:]]), OUT_SCALE)},
            "vl-fp8-static": {"input": alter(scalar(0), f"{OUT}.input_scale")},
        },
        near={"vl-modelopt": {"a bias of zeros where there is none": put({f"{DOWN}.bias": torch.zeros(256).bfloat16()})}},
    ),
    *fault(
        "scale not finite",
        bad={
            "vl-modelopt": {
                "weight NaN": alter(scalar(math.nan), OUT_SCALE),
                "weight infinite": alter(scalar(math.inf), OUT_SCALE),
                "input NaN": alter(scalar(math.nan), f"{DOWN}.input_scale"),
                "keys NaN": alter(scalar(math.nan), f"{K}.k_scale"),
                "values infinite": alter(scalar(math.inf), f"{V}.v_scale"),
            },
            "vl-pcpt vl-ct-dynamic": {"a row": alter(lambda t: torch.cat([t[:1] * math.nan, t[1:]]), OUT_SCALE)},
            "vl-pb-wo vl-ct-block": {"a block": alter(lambda t: torch.cat([t[:1] * math.nan, t[1:]]), OUT_SCALE)},
            "vl-fp8-block": {"all": alter(times(math.nan), f"{UP}.weight_scale_inv")},
        },
        near={"vl-modelopt": {"a scale in a file of its own": elsewhere(OUT_SCALE)}},
    ),
    *fault(
        "scale negative",
        bad={
            "vl-modelopt": {
                "weight": alter(times(-1), OUT_SCALE),
                "input": alter(times(-1), f"{DOWN}.input_scale"),
                "keys and values": alter(times(-1), *KV),
                "a layer's keys and values": alter(times(-1), f"{K}.k_scale", f"{V}.v_scale"),
                "values": alter(times(-1), f"{V}.v_scale"),
            },
            "vl-pcpt": {"all rows": alter(times(-1), DOWN_SCALE)},
        },
        near={
            "vl-modelopt": {"codes of zero that are": alter(signed_zeros, f"{DOWN}.weight")},
        },
    ),
    *fault(
        "scales of two modules traded",
        bad={
            "vl-modelopt": {
                "two layers' weights": swap("layers.0", "layers.1", OUT_SCALE),
                "gate's and up's": swap("gate", "up", f"{GATE}.weight_scale"),
                "o's weight and input": swap("weight_scale", "input_scale", OUT_SCALE),
            },
            "vl-pcpt": {"two layers'": swap("layers.0", "layers.1", DOWN_SCALE)},
            "vl-ct-block": {"two layers'": swap("layers.0", "layers.1", DOWN_SCALE)},
        },
        near={"vl-modelopt": {"forth and back": both(*[swap("layers.0", "layers.1", OUT_SCALE)] * 2)}},
        needs="source",
    ),
    *fault(
        "scales of activations traded",
        bad={
            "vl-ours": {
                "two layers' keys": swap("layers.0", "layers.1", f"{K}.k_scale"),
                "two layers' inputs": swap("layers.0", "layers.1", f"{DOWN}.input_scale"),
            }
        },
        near={"vl-modelopt": {"forth and back": both(*[swap("layers.0", "layers.1", f"{K}.k_scale")] * 2)}},
        needs="record",
    ),
    *fault(
        "rows of scales in another order",
        bad={
            "vl-pcpt vl-ct-dynamic": {"reversed": alter(lambda t: t.flip(0), OUT_SCALE)},
            "vl-pb-wo": {"transposed": alter(lambda t: t.transpose(0, 2), OUT_SCALE)},
            "vl-ct-block": {"transposed": alter(lambda t: t.t(), OUT_SCALE)},
            "vl-fp8-block": {"transposed": alter(lambda t: t.t(), f"{OUT}.weight_scale_inv")},
        },
        near={"vl-pcpt vl-ct-dynamic": {"reversed twice": alter(lambda t: t.flip(0).flip(0), OUT_SCALE)}},
        needs="source",
    ),
)

CODES = (
    *fault(
        "NaN among codes",
        bad={
            "vl-modelopt": {"one": alter(code(0x7F), f"{OUT}.weight"), "negative": alter(code(0xFF), f"{UP}.weight")},
            "vl-pcpt vl-fp8-block vl-ct-static": {"one": alter(code(0x7F), f"{K}.weight")},
        },
        near={"vl-modelopt": {"the largest code stays": alter(lambda t: t.float().to(t.dtype), f"{OUT}.weight")}},
    ),
    *fault(
        "codes all zero",
        bad={
            "vl-modelopt": {"o": alter(code(0, 0), f"{OUT}.weight"), "a shard": alter(code(0, 0), f"{V}.weight")},
            "vl-pb-wo": {"down": alter(code(0, 0), f"{DOWN}.weight")},
        },
        near={"vl-modelopt": {"zeros with a sign": alter(signed_zeros, f"{OUT}.weight")}},
        needs="source",
    ),
    *fault(
        "codes cut off",
        bad={
            "vl-modelopt": {"at a half": requantized(0.5, OUT), "at a quarter": requantized(0.25, DOWN)},
            "vl-pcpt": {"at a half": requantized(0.5, OUT)},
        },
        near={"vl-modelopt": {"at the largest": requantized(1, OUT)}},
        needs="source",
    ),
    *fault(
        "codes of few bits",
        bad={
            "vl-modelopt": {"1/4096": requantized(4096, DOWN), "1/8192": requantized(8192, OUT)},
            "vl-ct-dynamic": {"1/8192": requantized(8192, OUT)},
        },
        near={"vl-modelopt": {"half": requantized(2, OUT)}},
    ),
    *fault(
        "codes and values changed",
        bad={
            "vl-modelopt": {
                "a code": alter(code(0x50), f"{OUT}.weight"),
                "norm": alter(times(1.5), "model.norm.weight"),
                "bias zeroed": alter(scalar(0, torch.bfloat16), f"{Q}.bias"),
                "a row of embeddings": alter(lambda t: torch.cat([t[:1] * 2, t[1:]]), "model.embed_tokens.weight"),
                "tower": alter(times(1.1), f"{TOWER}attn.qkv.weight"),
                "tower, one bit": alter(flipped(0x40), "visual.merger.mlp.0.weight"),
            },
            "vl-ct-kept": {"kept weight": alter(times(0.5), f"{Q}.weight")},
        },
        near={"vl-modelopt": {"rewritten": alter(lambda t: t.clone(), "*")}},
        needs="source",
    ),
    *fault(
        "values not finite",
        bad={
            "vl-modelopt": {
                "norm": alter(times(math.nan), "model.norm.weight"),
                "tower": alter(times(math.inf), f"{TOWER}mlp.down_proj.bias"),
                "lm_head": alter(lambda t: torch.cat([t[:1] * math.nan, t[1:]]), "lm_head.weight"),
            }
        },
        near={"vl-modelopt": {"in F32": alter(to(torch.float32), "model.norm.weight", f"{TOWER}mlp.down_proj.bias")}},
    ),
)

TRADED = (
    *fault(
        "weights of two layers traded",
        bad={
            "vl-modelopt": {
                "o, with scales": swap("layers.0", "layers.1", f"{OUT}.*"),
                "norms": swap("layers.0", "layers.1", f"{L0}input_layernorm.weight"),
                "whole layers": swap("layers.0", "layers.1", f"{L0}*"),
                "blocks of the tower": swap("blocks.0", "blocks.1", f"{TOWER}mlp.*"),
            },
            "vl-fp8-block": {"o, codes alone": swap("layers.0", "layers.1", f"{OUT}.weight")},
        },
        near={"vl-modelopt": {"one in the other's file": elsewhere(f"{L1}*")}},
        needs="source",
    ),
    *fault(
        "gate and up traded",
        bad={
            "vl-modelopt vl-ct-dynamic": {"with scales": swap("gate", "up", f"{GATE}.*")},
            "vl-fp8-static": {"codes alone": swap("gate", "up", f"{GATE}.weight")},
        },
        near={"vl-modelopt": {"their input scales, which are equal": swap("gate", "up", f"{GATE}.input_scale")}},
        needs="source",
    ),
    *fault(
        "keys' and values' weights traded",
        bad={
            "vl-modelopt": {"with scales and bias": swap("k_proj", "v_proj", f"{K}.weight*", f"{K}.bias")},
            "vl-pcpt": {"with scales": swap("k_proj", "v_proj", f"{K}.weight*")},
        },
        near={"vl-modelopt": {"their input scales, which are equal": swap("k_proj", "v_proj", f"{K}.input_scale")}},
        needs="source",
    ),
    *fault(
        "embeddings and lm_head traded",
        bad={"vl-modelopt moe-modelopt": {"both": swap("model.embed_tokens", "lm_head", "model.embed_tokens.weight")}},
        near={"vl-tied": {"both, where they are one": copy("model.embed_tokens.weight", "lm_head.weight")}},
        needs="source",
    ),
    *fault(
        "rows in another order",
        bad={
            "vl-modelopt": {
                "heads of q": alter(lambda t: t.view(torch.uint8).roll(64, 0).view(t.dtype), f"{Q}.weight"),
                "embeddings": alter(lambda t: t.roll(1, 0), "model.embed_tokens.weight"),
            }
        },
        near={
            "vl-modelopt": {"rolled by all rows": alter(lambda t: t.view(torch.uint8).roll(256, 0).view(t.dtype), f"{Q}.weight")}
        },
        needs="source",
    ),
)

MUTANTS = (*SCALES, *CODES, *TRADED)
