"""Scales of the KV cache: how they may be spelled, whether every attention has them, and whether the cache will be FP8 at all.

Names: vLLM 0.32.0 model_executor/layers/quantization/base_config.py get_cache_scale_mapper, fp8.py for its own.
What a missing one does: kv_cache.py BaseKVCacheMethod, compressed_tensors.py CompressedTensorsKVCacheMethod.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ckptq.checkpoint import TensorSpec
from ckptq.validators import Code, Finding, error, warning
from ckptq.validators.expected import Expected, absent_layers
from ckptq.validators.linears import scale_dtype, stray

_MAPPER = "vLLM 0.32.0 model_executor/layers/quantization/base_config.py get_cache_scale_mapper"
_METHOD = "vLLM 0.32.0 model_executor/layers/quantization/kv_cache.py process_weights_after_loading"
CODES = {
    "layout.kv-missing": Code("some attention layers have KV scales, this one lacks one", _METHOD),
    "layout.kv-absent": Code("an FP8 KV cache is declared, and no layer has a scale", _METHOD),
    "layout.kv-undeclared": Code("KV scales are stored, and no FP8 KV cache is declared", "vLLM 0.32.0 utils/torch_utils.py"),
    "layout.kv-misplaced": Code("a K scale beside v_proj, or a V scale beside k_proj", _MAPPER),
    "layout.kv-shared": Code("one kv_scale for keys and values, the deprecated form", _MAPPER),
    "layout.kv-twice": Code("two stored tensors fill one KV scale", _MAPPER),
    "layout.kv-shape": Code("a KV scale that is not one number", "vLLM 0.32.0 model_executor/layers/quantization/kv_cache.py"),
}
KV_KINDS = ("k_scale", "v_scale")
_NAMES = re.compile(
    r"(?:(?P<proj>[kv])_proj\.|attn\.|qkv_proj\.|)(?P<kind>[kv])_scale|(?P<cache>[kv])_cache\.scale|(?P<both>kv_scale)"
    r"|(?P<out>[kv])_proj\.output_scale"
)


@dataclass(frozen=True, slots=True)
class KVSlot:
    """Where a stored KV scale goes.

    misplaced  it lies beside the other one's projection, and the suffix decides
    shared     `kv_scale`: fills K, and is copied to V
    native     `output_scale`, which quant_methods fp8 and quark alone take
    """

    attention: str
    kind: Literal["k", "v"]
    misplaced: bool = False
    shared: bool = False
    native: bool = False


def kv_slot(name: str) -> KVSlot | None:
    """The slot of a KV scale in an attention module, or None for any other tensor.

    Beside ModelOpt's `k_proj.k_scale` these are accepted: `self_attn.k_scale`, `attn.k_scale`, `qkv_proj.k_scale`,
    `k_cache.scale`, the deprecated `kv_scale`, and from quant_methods fp8 and quark `k_proj.output_scale`.
    """
    attention, found, rest = name.rpartition(".self_attn.")
    match = _NAMES.fullmatch(rest) if found else None
    if match is None:
        return None
    kind: Literal["k", "v"] = "v" if "v" in (match["kind"], match["cache"], match["out"]) else "k"
    misplaced = match["proj"] not in (None, kind)
    return KVSlot(f"{attention}.self_attn", kind, misplaced, match["both"] is not None, match["out"] is not None)


def layer_slot(name: str, at: Expected) -> KVSlot | None:
    """The slot of a KV scale inside the decoder layers, where this server and method take the spelling."""
    if at.scope.layer_of(name) is None or (".self_attn.attn." in name and not at.settings.server.attn_kv_names):
        return None
    slot = kv_slot(name)
    return slot if slot is None or not slot.native or at.settings.method in ("fp8", "quark") else None


def check(at: Expected) -> Iterator[Finding]:
    """Findings on the KV scales of the decoder layers."""
    slots = {name: slot for name in at.tensors if (slot := layer_slot(name, at)) is not None}
    owners = {m: m.rpartition(".")[0] for m in at.linears if (layer := at.scope.layer_of(f"{m}.")) and layer[1][:-1] in at.scope.kv}
    attentions = frozenset(owners.values())
    filled: dict[tuple[str, str], str] = {}
    for name, slot in slots.items():
        yield from _shape(at.tensors[name], at)
        yield from scale_dtype(at.tensors[name], rounded=at.settings.method != "compressed-tensors")
        if slot.attention not in attentions:
            yield stray(name, "config.json has no such layer")
        yield from _spelling(name, slot)
        if not at.settings.kv_fp8:
            yield _undeclared(name, at)
        twin = filled.setdefault((slot.attention, slot.kind), name)
        if twin != name:
            yield error(
                "layout.kv-twice",
                name,
                f"one {slot.kind}_scale for an attention",
                f"{twin.removeprefix(slot.attention + '.')}, too",
                "vLLM takes the one that it reads last, silently",
                "keep one of them",
            )
    if at.settings.kv_fp8:
        absent = absent_layers(at)
        stored = {m: a for m, a in owners.items() if (layer := at.scope.layer_of(f"{m}.weight")) and layer[0] not in absent}
        yield from _missing(stored, slots, at)


def _shape(spec: TensorSpec, at: Expected) -> Iterator[Finding]:
    scheme = at.settings.section.get("kv_cache_scheme")
    by_head = isinstance(scheme, dict) and scheme.get("strategy") == "attn_head"
    if spec.numel != 1 and not by_head:
        yield error(
            "layout.kv-shape", spec.name, "one number, []", str(list(spec.shape)), "vLLM raises", "store one scale for the layer"
        )


def _spelling(name: str, slot: KVSlot) -> Iterator[Finding]:
    if slot.misplaced:
        yield error(
            "layout.kv-misplaced", name, f"{slot.kind}_scale beside {slot.kind}_proj", "beside the other projection",
            "vLLM goes by the last part of the name, so K and V would trade scales, silently", "export again",
        )  # fmt: skip
    if slot.shared:
        yield warning(
            "layout.kv-shared", name, "k_scale and v_scale", "kv_scale alone",
            "vLLM takes it for K and copies it to V; it will stop reading the form", "calibrate K and V by themselves",
        )  # fmt: skip


def _undeclared(name: str, at: Expected) -> Finding:
    if not at.settings.kv_key:
        return warning(
            "layout.kv-undeclared",
            name,
            f"none: quant_method {at.settings.method} can't declare an FP8 KV cache",
            "stored",
            "vLLM keeps the cache in the model's dtype and leaves the scales unused, unless started with --kv-cache-dtype fp8",
            "start the server so, or remove the scales",
        )
    return error(
        "layout.kv-undeclared", name, f"none: {at.settings.file} declares no FP8 KV cache", "stored",
        "vLLM would keep the cache in the model's dtype and drop the scales silently",
        f"declare it in {at.settings.kv_key}, or remove the scales",
    )  # fmt: skip


def _missing(owners: dict[str, str], slots: dict[str, KVSlot], at: Expected) -> Iterator[Finding]:
    have = {(slot.attention, slot.kind) for slot in slots.values()}
    have |= {(slot.attention, "v") for slot in slots.values() if slot.shared}
    if not have:
        yield warning(
            "layout.kv-absent", "k_scale and v_scale", "one of each in every layer: an FP8 KV cache is declared", "none",
            "vLLM quantizes the cache with scale 1.0: good enough where |K| and |V| stay below 448", "calibrate the KV cache",
        )  # fmt: skip
        return
    parts = dict(zip("kv", at.scope.kv, strict=True))  # one module where the file holds q, k and v as one
    for module, kind in ((m, kind) for m in owners for kind, part in parts.items() if at.scope.canonical(m).endswith(f".{part}")):
        attention = owners[module]
        if (attention, kind) not in have:
            other = (attention, "v" if kind == "k" else "k") in have
            if at.settings.method == "compressed-tensors" or not other:
                effect = "vLLM uses 1.0, silently"
            else:
                effect = "vLLM stops with a bare AssertionError" if kind == "k" else "vLLM uses the K scale for V, silently"
            yield error(
                "layout.kv-missing", f"{module}.{kind}_scale", "F32 []: the KV cache is FP8, other layers have it", "not stored",
                effect, "calibrate and export again",
            )  # fmt: skip
