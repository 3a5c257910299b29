"""The model as vLLM 0.32.0 builds it: its linears, fused as it fuses them, its parameters, and its names for both.

A simulation: pure, no torch, no vLLM. It is compared with the real functions by tests/test_vllm_rules.py. Paths below are relative
to vllm/model_executor of that version. Which linears are built quantized is for methods/ to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ckptq.scopes import Fused, Scope
from ckptq.validators import towers


@dataclass(frozen=True, slots=True)
class ServerLinear:
    """One linear as the server builds it: its name there, and the modules of the checkpoint, as spelled there, that it stacks.

    All routed experts of a layer are one module there and share its prefix; each (gate, up) and each (down,) is a value here.
    """

    prefix: str
    shards: tuple[str, ...]
    part: Literal["layers", "experts", "tower", "head"]


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
    text, sizes = scope.text(config), _sizes(scope, config)
    tied = is_tied(scope, config)
    found = []
    for name, said in scope.parameters.items():
        dims, _, flags = said.partition(" if ")
        if flags and not any((config if flag in config else text).get(flag) for flag in flags.split(" or ")):
            continue
        tower = towers.tower_of(name, scope)
        words = sizes | towers.sizes(tower, config) if tower else sizes
        shape = tuple(int(d) if d.isdecimal() else words.get(d) for d in dims.split())
        required = not (tied and name == f"{scope.head}.weight")
        read = towers.reads(name, scope, config, names)
        found += [Parameter(spell(place), shape, required and read(place)) for place in _places(name, scope, config, names)]
    return tuple(found)


def passed_over(scope: Scope, config: Mapping[str, Any], stored: Iterable[str]) -> frozenset[str]:
    """Names of tensors that any checkpoint of the family holds and the server never reads. Raises SourceError as `parameters`."""
    names = list(stored)
    spell = speller(scope, names)
    return frozenset(
        spell(place)
        for name in scope.parameters
        for place in _places(name, scope, config, names)
        if not towers.reads(name, scope, config, names)(place)
    ) | {name for name in names if scope.skips(name)}


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


def _places(name: str, scope: Scope, config: Mapping[str, Any], stored: Iterable[str]) -> Iterator[str]:
    """The canonical names that a name with `{i}`, and in layers `{e}`, stands for."""
    if "{i}" not in name:
        yield name
    elif tower := towers.tower_of(name, scope):
        yield from (name.replace("{i}", str(i)) for i in towers.blocks(name, tower, scope, config, stored))
    else:
        sparse, dense = _only_in(name.removeprefix(f"{scope.layers}.{{i}}."), scope)
        for layer in range(scope.layer_count(config)):
            experts = scope.expert_count(config, layer)
            if (experts and dense) or (sparse and not experts):
                continue
            at = name.replace("{i}", str(layer))
            yield from (at.replace("{e}", str(e)) for e in range(experts)) if "{e}" in name else (at,)


def _only_in(relative: str, scope: Scope) -> tuple[bool, bool]:
    """(in layers with experts alone, in layers without alone) for a name inside a layer."""
    experts = scope.experts
    if experts is None:
        return False, False
    if not relative.startswith((experts.dense, experts.runtime + ".", *(f"{fused.runtime}." for fused in experts.linears))):
        return False, False
    routed = {shard for fused in experts.linears for shard in fused.shards}
    dense = {shard for fused in scope.linears if fused.runtime.startswith(experts.dense) for shard in fused.shards} - routed
    in_dense = relative.startswith(tuple(f"{shard}." for shard in dense))
    return not in_dense, in_dense


def _sizes(scope: Scope, config: Mapping[str, Any]) -> dict[str, int]:
    """The dimensions of the language model that config.json tells; a tower's are in its scope.

    head_dim is hidden_size / num_attention_heads in models/qwen2.py Qwen2Attention; models/qwen3_moe.py Qwen3MoeAttention takes
    the config's own where it has one.
    """
    text = scope.text(config)
    sizes = {
        "vocab": text.get("vocab_size"),
        "hidden": text.get("hidden_size"),
        "intermediate": text.get("intermediate_size"),
        "moe": text.get("moe_intermediate_size"),
        "experts": text.get(scope.experts_key(config)),
    }
    known = {name: size for name, size in sizes.items() if isinstance(size, int)}
    heads, kv_heads = text.get("num_attention_heads"), text.get("num_key_value_heads")
    kv_heads = heads if kv_heads is None else kv_heads  # transformers 5.19.0 models/llama/configuration_llama.py
    if isinstance(heads, int) and heads > 0 and "hidden" in known:
        head = text.get("head_dim")
        known["head"] = head if isinstance(head, int) and scope.explicit_head_dim else known["hidden"] // heads
        known["q"] = known["head"] * heads
        if isinstance(kv_heads, int):
            known["kv"] = known["head"] * kv_heads
            known["qkv"] = known["q"] + 2 * known["kv"]
    if "intermediate" in known:
        known["gate_up"] = 2 * known["intermediate"]
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
        at, server_at = f"{scope.layers}.{layer}", f"{scope.server_layers}.{layer}"
        for fused in _layer_linears(scope, config, layer):
            shards = tuple(_module(f"{at}.{s}", spell) for s in fused.shards)
            found.append(ServerLinear(f"{server_at}.{fused.runtime}", shards, "layers"))
        for expert in range(scope.expert_count(config, layer)):
            for group in scope.experts.groups if scope.experts else ():
                shards = tuple(_module(f"{at}.{s.replace('{e}', str(expert))}", spell) for s in group)
                found.append(ServerLinear(f"{server_at}.{scope.experts.runtime}" if scope.experts else "", shards, "experts"))
    for tower in scope.towers:
        for fused in tower.linears:
            for i in towers.numbers(fused, tower, scope, config, names):
                shards = tuple(_module(f"{tower.prefix}.{s.replace('{i}', str(i))}", spell) for s in fused.shards)
                prefix = server_name(f"{tower.prefix}.{fused.runtime.replace('{i}', str(i))}", scope)
                found.append(ServerLinear(prefix, shards, "tower"))
    # models/qwen3_vl.py builds its head under the checkpoint's own name, and maps the name all the same.
    heads = {kept: kept for kept in scope.kept} | {server_name(f"{kept}.", scope).removesuffix("."): kept for kept in scope.kept}
    heads[""] = scope.head
    return (*found, *(ServerLinear(prefix, (_module(heads[prefix], spell),), "head") for prefix in scope.server_kept))


def _layer_linears(scope: Scope, config: Mapping[str, Any], layer: int) -> tuple[Fused, ...]:
    """The linears of a layer, without routed experts."""
    if scope.experts is None or not scope.expert_count(config, layer):
        return scope.linears
    dense = scope.experts.dense
    return (*(fused for fused in scope.linears if not fused.runtime.startswith(dense)), *scope.experts.linears)


def expert_names(scope: Scope) -> tuple[str, ...]:
    """The last parts of an expert's linears: gate_proj, up_proj, down_proj."""
    return tuple(_last(shard) for group in (scope.experts.groups if scope.experts else ()) for shard in group)


def packed_modules(scope: Scope) -> dict[str, tuple[str, ...]]:
    """{last part of a fused linear's name: last parts of its shards}: the model's packed_modules_mapping."""
    more = scope.experts.linears if scope.experts else ()
    linears = (*scope.linears, *more, *(fused for tower in scope.towers for fused in tower.linears))
    return {_last(f.runtime): tuple(map(_last, f.shards)) for f in linears if len(f.shards) > 1 and f.packed}


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
