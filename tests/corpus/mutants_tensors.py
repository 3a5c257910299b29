"""Tensors that are missing, or under other names."""

from __future__ import annotations

import torch

from corpus.edit import both, copy, drop, put, rename, swap
from corpus.edit_files import elsewhere
from corpus.mutants import fault
from corpus.places import DOWN, GATE, KV, L0, L1, OUT, TOWER, UP, K, Q, V

MISSING = (
    *fault(
        "weight missing",
        bad={
            "vl-modelopt": {
                "o": drop(f"{OUT}.weight"),
                "q": drop(f"{Q}.weight"),
                "up": drop(f"{UP}.weight"),
                "layer": drop(f"{L1}*"),
                "norm": drop("model.norm.weight"),
                "embeddings": drop("model.embed_tokens.weight"),
                "tower": drop(f"{TOWER}attn.qkv.weight"),
                "tower gate": drop(f"{TOWER}mlp.gate_proj.weight"),
            },
            "vl-pcpt vl-ct-dynamic vl-fp8-block": {"v": drop(f"{V}.weight")},
        },
        near={"vl-modelopt": {"in a file of its own": elsewhere(f"{OUT}.weight")}},
    ),
    *fault(
        "lm_head missing",
        bad={"vl-modelopt moe-modelopt": {"untied": drop("lm_head.weight")}},
        near={"vl-tied": {"stored though tied": copy("model.embed_tokens.weight", "lm_head.weight")}},
    ),
    *fault(
        "bias missing",
        bad={
            "vl-modelopt": {
                "q": drop(f"{Q}.bias"),
                "all": drop("model.layers.*.bias"),
                "tower": drop(f"{TOWER}attn.proj.bias"),
            }
        },
        near={"vl-modelopt": {"one that o has not": put({f"{OUT}.bias": torch.zeros(256, dtype=torch.bfloat16)})}},
    ),
    *fault(
        "weight_scale missing",
        bad={
            "vl-modelopt": {
                "o": drop(f"{OUT}.weight_scale"),
                "q": drop(f"{Q}.weight_scale"),
                "v, the last shard": drop(f"{V}.weight_scale"),
                "q, k and v": drop(f"{L0}self_attn.[qkv]_proj.weight_scale"),
                "gate": drop(f"{GATE}.weight_scale"),
                "all": drop("*.weight_scale"),
            },
            "vl-ours": {"q, whose scale k has too": drop(f"{Q}.weight_scale")},
            "vl-pcpt vl-pb-wo vl-ct-static vl-ct-dynamic vl-ct-block vl-fp8-static vl-fp8-dynamic": {
                "down": drop(f"{DOWN}.weight_scale"),
                "k": drop(f"{K}.weight_scale"),
            },
            "vl-fp8-block": {"down": drop(f"{DOWN}.weight_scale_inv"), "k": drop(f"{K}.weight_scale_inv")},
        },
        near={"vl-modelopt vl-ct-static vl-pcpt": {"in a file of its own": elsewhere("*.weight_scale")}},
    ),
    *fault(
        "input_scale missing",
        bad={
            "vl-modelopt": {
                "down": drop(f"{DOWN}.input_scale"),
                "q, k and v": drop(f"{L0}self_attn.[qkv]_proj.input_scale"),
                "all": drop("*.input_scale"),
            },
            "vl-ct-static vl-fp8-static": {"o": drop(f"{OUT}.input_scale"), "all": drop("*.input_scale")},
        },
        near={"vl-modelopt": {"of one shard": drop(f"{Q}.input_scale"), "in a file of its own": elsewhere("*.input_scale")}},
    ),
    *fault(
        "some kv scales missing",
        bad={
            "vl-modelopt vl-ours": {
                "v of a layer": drop(f"{V}.v_scale"),
                "k of a layer": drop(f"{K}.k_scale"),
                "every v": drop("*.v_scale"),
                "a layer's": drop(f"{K}.k_scale", f"{V}.v_scale"),
            },
            "moe-modelopt": {"a layer's": drop(f"{K}.k_scale", f"{V}.v_scale")},
        },
        near={"vl-modelopt": {"in a file of its own": elsewhere(*KV)}},
    ),
    *fault(
        "every kv scale missing",
        bad={"vl-modelopt moe-modelopt": {"declared": drop(*KV)}},
        near={"vl-modelopt": {"in a file of its own": elsewhere("*.k_scale")}},
    ),
    *fault("every kv scale missing", bad={"vl-ours": {"though calibrated": drop(*KV)}}, near={}, needs="record"),
)

NAMES = (
    *fault(
        "kv scale under a name that nobody reads",
        bad={
            "vl-modelopt": {
                "output_scale": both(
                    rename("k_proj.k_scale", "k_proj.output_scale"), rename("v_proj.v_scale", "v_proj.output_scale")
                ),
                "amax of a quantizer": both(
                    rename("k_proj.k_scale", "k_bmm_quantizer._amax"), rename("v_proj.v_scale", "v_bmm_quantizer._amax")
                ),
                "kv_cache_scale": rename("k_proj.k_scale", "k_cache_scale"),
                "key_scale": both(rename("k_proj.k_scale", "key_scale"), rename("v_proj.v_scale", "value_scale")),
                "of the layer": both(rename("self_attn.k_proj.k_scale", "k_scale"), rename("self_attn.v_proj.v_scale", "v_scale")),
                "prob_scale": rename("k_proj.k_scale", "prob_scale"),
            }
        },
        near={
            "vl-modelopt moe-modelopt": {
                "self_attn": both(rename("k_proj.k_scale", "k_scale"), rename("v_proj.v_scale", "v_scale")),
                "self_attn.attn": both(rename("k_proj.k_scale", "attn.k_scale"), rename("v_proj.v_scale", "attn.v_scale")),
                "qkv_proj": both(rename("k_proj.k_scale", "qkv_proj.k_scale"), rename("v_proj.v_scale", "qkv_proj.v_scale")),
                "k_cache": both(rename("k_proj.k_scale", "k_cache.scale"), rename("v_proj.v_scale", "v_cache.scale")),
            },
        },
    ),
    *fault(
        "kv scales under each other's name",
        bad={"vl-ours": {"all": swap("k_proj.k_scale", "v_proj.v_scale", "*.k_proj.k_scale")}},
        near={"vl-modelopt": {"twice": both(*[swap("k_proj.k_scale", "v_proj.v_scale", "*.k_proj.k_scale")] * 2)}},
        needs="record",
    ),
    *fault(
        "kv scales of the other kind",
        bad={
            "vl-modelopt": {
                "beside their projection": both(
                    rename("k_proj.k_scale", "k_proj.v_scale"), rename("v_proj.v_scale", "v_proj.k_scale")
                ),
            },
        },
        near={"vl-modelopt": {"of the queries": put({f"{L0}self_attn.q_scale": torch.tensor(1.0)})}},
    ),
    *fault(
        "deprecated kv_scale",
        bad={"vl-ours": {"in place of both": both(rename("k_proj.k_scale", "kv_scale"), drop("*.v_scale"))}},
        near={"vl-modelopt": {"beside v's own": rename("k_proj.k_scale", "kv_scale")}},
        needs="record",
    ),
    *fault(
        "kv scales on the vision tower",
        bad={
            "vl-modelopt vl-ours": {
                "ModelOpt's trap": put(
                    {f"{TOWER}attn.k_proj.k_scale": torch.tensor(0.03), f"{TOWER}attn.v_proj.v_scale": torch.tensor(0.01)}
                ),
                "second names": put({f"model.{TOWER}attn.k_proj.k_scale": torch.tensor(0.03)}),
                "of the fused linear": put({f"{TOWER}attn.k_scale": torch.tensor(0.03)}),
            }
        },
        near={"vl-modelopt": {"queries' in the language model": put({f"{L0}self_attn.q_scale": torch.tensor(1.0)})}},
    ),
    *fault(
        "scale under another name",
        bad={
            "vl-modelopt": {
                "weight_scale_inv": rename("weight_scale", "weight_scale_inv"),
                "scale": rename("weight_scale", "scale"),
                "scale_weight": rename("weight_scale", "scale_weight", f"{OUT}.*"),
                "activation_scale": rename("input_scale", "activation_scale"),
                "act_scale": rename("input_scale", "act_scale", f"{DOWN}.*"),
                "input_quantizer": rename("input_scale", "input_quantizer._amax"),
                "fused": rename("q_proj.weight_scale", "qkv_proj.weight_scale"),
            },
            "vl-fp8-static vl-ct-dynamic vl-pcpt": {"weight_scale_inv": rename("weight_scale", "weight_scale_inv")},
            "vl-fp8-block": {"weight_scale": rename("weight_scale_inv", "weight_scale")},
            "vl-ct-block": {"weight_scale_inv": rename("weight_scale", "weight_scale_inv")},
        },
        near={"vl-modelopt": {"a zero point that is skipped": put({f"{L0}self_attn.k_zero_point": torch.tensor(0.0)})}},
    ),
    *fault(
        "tensor that no module has",
        bad={
            "vl-modelopt": {
                "module": put({f"{L0}adapter.weight": torch.ones(4, 4)}),
                "parameter": put({f"{OUT}.zero_point": torch.tensor(0.0)}),
                "layer beyond the last": put({"model.layers.7.input_layernorm.weight": torch.ones(256, dtype=torch.bfloat16)}),
                "other prefix": rename("model.norm", "transformer.norm"),
                "blocks": rename("model.layers.1.", "model.blocks.1."),
            },
            "vl-ct-static": {"weight_zero_point": put({f"{OUT}.weight_zero_point": torch.zeros(1)})},
        },
        near={
            "vl-modelopt": {
                "rotary buffers": put({f"{L0}self_attn.rotary_emb.inv_freq": torch.ones(32)}),
                "order of columns": put({f"{OUT}.g_idx": torch.zeros(256, dtype=torch.int32)}),
            },
            "vl-modelopt vl-pcpt": {
                "second generation of names": both(
                    rename("model.", "model.language_model.", "model.*"), rename("visual.", "model.visual.", "visual.*")
                )
            },
        },
    ),
)

MUTANTS = (*MISSING, *NAMES)
