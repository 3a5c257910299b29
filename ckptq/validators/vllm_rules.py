"""What vLLM 0.32.0 will build from a ModelOpt FP8 checkpoint: which linears, quantized or not, from which tensors.

A simulation: pure, no torch, no vLLM. It is compared with the real functions by tests/test_vllm_rules.py. Paths below are relative
to vllm/model_executor of that version.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from ckptq.scopes import Scope

Treatment = Literal["quantized", "kept", "refused"]
"""quantized: built with FP8 weights and scales. kept: as in the source. refused: vLLM raises, as the list splits a fused linear."""


@dataclass(frozen=True, slots=True)
class ServerLinear:
    """One linear as the server builds it: its name there, and the modules of the checkpoint, as spelled there, that it stacks."""

    prefix: str
    shards: tuple[str, ...]
    part: Literal["layers", "tower", "head"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A tensor that the server reads, as this checkpoint spells it. A dimension that config.json does not tell is None."""

    name: str
    shape: tuple[int | None, ...]
    required: bool = True


def parameters(scope: Scope, config: Mapping[str, Any], stored: Iterable[str]) -> tuple[Parameter, ...]:
    """Every tensor but scales that the server reads for this config.json, in the spelling that `stored` uses.

    Raises SourceError for a config without its layer count.
    """
    names = list(stored)
    spell = speller(scope, names)
    sizes = _sizes(scope, config)
    tied = is_tied(scope, config)
    found = []
    for name, dims in scope.parameters.items():
        shape = tuple(sizes.get(d) for d in dims.split())
        required = not (tied and name == "lm_head.weight")
        found += [Parameter(spell(name.replace("{i}", str(i))), shape, required) for i in _numbers(name, scope, config, names)]
    return tuple(found)


def speller(scope: Scope, stored: Iterable[str]) -> Callable[[str], str]:
    """Turns a canonical name into the checkpoint's: the stored name where there is one, else the generation its neighbors use."""
    known = {scope.canonical(name): name for name in stored}
    used = [(long, short) for long, short in scope.generations if any(n.startswith(long) for n in known.values())]

    def spell(canonical: str) -> str:
        if canonical in known:
            return known[canonical]
        return next((long + canonical[len(short) :] for long, short in used if canonical.startswith(short)), canonical)

    return spell


def _module(canonical: str, spell: Callable[[str], str]) -> str:
    """A module as the checkpoint spells it, by the name of its weight."""
    return spell(f"{canonical}.weight").removesuffix(".weight")


def _numbers(name: str, scope: Scope, config: Mapping[str, Any], stored: Iterable[str]) -> range:
    """The values of `{i}` in a canonical name; one run where it has none."""
    if "{i}" not in name:
        return range(1)
    if name.startswith(scope.layers + "."):
        return range(scope.layer_count(config))
    tower = next(t for t in scope.towers if name.startswith(t.prefix + "."))
    section, _, key = tower.depth.partition(".")
    found = config.get(section)
    depth = found.get(key) if isinstance(found, Mapping) else None
    if isinstance(depth, int):
        return range(depth)
    blocks = re.compile(re.escape(name[: name.index("{i}")]) + r"(\d+)\.")
    return range(max((int(m[1]) + 1 for n in stored if (m := blocks.match(scope.canonical(n)))), default=0))


def _vision(config: Mapping[str, Any]) -> Mapping[str, Any]:
    section = config.get("vision_config")
    return section if isinstance(section, Mapping) else {}


def _sizes(scope: Scope, config: Mapping[str, Any]) -> dict[str, int]:
    """The dimensions that config.json tells. head_dim is hidden_size / num_attention_heads: models/qwen2.py Qwen2Attention."""
    text, vision = scope.text(config), _vision(config)
    sizes = {
        "vocab": text.get("vocab_size"),
        "hidden": text.get("hidden_size"),
        "intermediate": text.get("intermediate_size"),
        "vision": vision.get("hidden_size"),
        "vision_mlp": vision.get("intermediate_size"),
        "vision_out": vision.get("out_hidden_size"),
        "patch": vision.get("patch_size"),
        "frames": vision.get("temporal_patch_size"),
        "channels": vision.get("in_channels", 3),
    }
    known = {name: size for name, size in sizes.items() if isinstance(size, int)}
    heads, kv_heads = text.get("num_attention_heads"), text.get("num_key_value_heads")
    if isinstance(heads, int) and heads > 0 and "hidden" in known:
        known["q"] = known["hidden"] // heads * heads
        if isinstance(kv_heads, int):
            known["kv"] = known["hidden"] // heads * kv_heads
    if "vision" in known:
        known["vision_qkv"] = 3 * known["vision"]
        merge = vision.get("spatial_merge_size")
        if isinstance(merge, int):
            known["merged"] = known["vision"] * merge**2
    return known


def is_tied(scope: Scope, config: Mapping[str, Any]) -> bool:
    """Whether lm_head may lean on the embeddings. Either flag counts: vLLM 0.32.0 config/model.py maybe_untie_word_embeddings."""
    return bool(config.get("tie_word_embeddings") or scope.text(config).get("tie_word_embeddings"))


def server_linears(scope: Scope, config: Mapping[str, Any], stored: Iterable[str]) -> tuple[ServerLinear, ...]:
    """Every linear that the server builds with the quantization config: the layers', the towers' and the heads."""
    names = list(stored)
    spell = speller(scope, names)
    found: list[ServerLinear] = []
    for layer in range(scope.layer_count(config)):
        for fused in scope.linears:
            shards = tuple(_module(f"{scope.layers}.{layer}.{s}", spell) for s in fused.shards)
            found.append(ServerLinear(f"{scope.server_layers}.{layer}.{fused.runtime}", shards, "layers"))
    for tower in scope.towers:
        for fused in tower.linears:
            for i in _numbers(f"{tower.prefix}.{fused.runtime}", scope, config, names):
                shards = tuple(_module(f"{tower.prefix}.{s.replace('{i}', str(i))}", spell) for s in fused.shards)
                prefix = server_name(f"{tower.prefix}.{fused.runtime.replace('{i}', str(i))}", scope)
                found.append(ServerLinear(prefix, shards, "tower"))
    heads = {server_name(f"{kept}.", scope).removesuffix("."): kept for kept in scope.kept}
    return (*found, *(ServerLinear(prefix, (_module(heads[prefix], spell),), "head") for prefix in scope.server_kept))


def packed_modules(scope: Scope) -> dict[str, tuple[str, ...]]:
    """{last part of a fused linear's name: last parts of its shards}: the model's packed_modules_mapping."""
    linears = (*scope.linears, *(fused for tower in scope.towers for fused in tower.linears))
    return {_last(f.runtime): tuple(map(_last, f.shards)) for f in linears if len(f.shards) > 1}


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def server_name(name: str, scope: Scope) -> str:
    """A checkpoint's name or pattern under the server's prefix rules.

    Every rule is tried in its order on what the ones before left (models/utils.py WeightsMapper). A rule ends in a dot, so the
    bare `lm_head` or `model.visual` is not what it seems.
    """
    for old, new in scope.server_prefix:
        if name.startswith(old):
            name = new + name[len(old) :]
    return name


def server_patterns(patterns: Sequence[str], scope: Scope) -> tuple[str, ...]:
    """exclude_modules as the server comes to hold it: `X*` becomes `X` and `X.*`, then each is mapped.

    layers/quantization/modelopt.py ModelOptQuantConfigBase.apply_vllm_mapper.
    """
    expanded: list[str] = []
    for pattern in patterns:
        tree = len(pattern) >= 2 and pattern[-1] == "*" and pattern[-2] != "."
        expanded += [pattern[:-1], pattern[:-1] + ".*"] if tree else [pattern]
    return tuple(server_name(p, scope) for p in expanded)


def treatment(prefix: str, patterns: Sequence[str], packed: Mapping[str, Sequence[str]]) -> Treatment:
    """How the server builds the linear `prefix` (its own name) under `patterns` (from `server_patterns`).

    layers/quantization/modelopt.py is_layer_excluded and get_quant_method, utils/quant_utils.py is_layer_skipped. In order:
    exact, where a fused linear wants its own name or all its shards' names; substring; wildcards, against the fused name alone.
    """
    shards = packed.get(_last(prefix))
    if shards is not None and prefix not in patterns:
        listed = {prefix.replace(_last(prefix), shard) in patterns for shard in shards}
        if len(listed) > 1:
            return "refused"
        exact = True in listed
    elif shards is None and "experts" in prefix:
        exact = any(prefix in p for p in patterns if "experts" in p)
    else:
        exact = prefix in patterns
    inside = prefix.removeprefix("language_model.")
    if (
        exact
        or any(p != prefix and (p in prefix or p in inside) for p in patterns)
        or any(fnmatchcase(prefix, p) for p in patterns)
    ):
        return "kept"
    old_towers = ("vision_tower", "vision_model", "vit_large_projector")
    return "kept" if any(name in prefix for name in old_towers) else "quantized"


def idle_patterns(patterns: Sequence[str], linears: Iterable[ServerLinear], scope: Scope) -> tuple[str, ...]:
    """The patterns that, taken alone, keep no linear. Those naming embeddings are idle too, and harmless."""
    packed, prefixes = packed_modules(scope), [linear.prefix for linear in linears]
    alone = {p: server_patterns([p], scope) for p in patterns}
    return tuple(p for p, mapped in alone.items() if all(treatment(prefix, mapped, packed) == "quantized" for prefix in prefixes))


_KV_NAMES = re.compile(
    r"(?:(?P<proj>[kv])_proj\.|attn\.|qkv_proj\.|)(?P<kind>[kv])_scale|(?P<cache>[kv])_cache\.scale|(?P<both>kv_scale)"
)


@dataclass(frozen=True, slots=True)
class KVSlot:
    """Where a stored KV scale goes. `misplaced`: it lies beside the other one's projection, and the suffix decides."""

    attention: str
    kind: Literal["k", "v"]
    misplaced: bool


def kv_slot(name: str) -> KVSlot | None:
    """The slot of a KV scale in an attention module, or None for any other tensor.

    layers/quantization/base_config.py get_cache_scale_mapper accepts beside ModelOpt's `k_proj.k_scale`: `self_attn.k_scale`,
    `attn.k_scale`, `qkv_proj.k_scale`, `k_cache.scale`, and the deprecated `kv_scale`, which fills K and is copied to V.
    """
    attention, found, rest = name.rpartition(".self_attn.")
    match = _KV_NAMES.fullmatch(rest) if found else None
    if match is None:
        return None
    kind: Literal["k", "v"] = "v" if "v" in (match["kind"], match["cache"]) else "k"
    return KVSlot(f"{attention}.self_attn", kind, match["proj"] not in (None, kind))
