"""The decoder layers of a proposal: where they are, their linears as vLLM would fuse them, routed experts, keys and values."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ckptq.errors import UnsupportedError
from ckptq.proposals.reading import Found, is_matrix, leaf, parent
from ckptq.scopes import Experts, Fused, Split

# vLLM 0.32.0 models/llama.py, internlm2.py, bert.py, transformers/fusers/qkv.py and glu.py: the whole, last parts of its shards.
_FUSED: tuple[tuple[str, tuple[str, ...], Split], ...] = (
    ("qkv_proj", ("q_proj", "k_proj", "v_proj"), "heads"),
    ("qkv_proj", ("wq", "wk", "wv"), "heads"),
    ("qkv_proj", ("query", "key", "value"), "heads"),
    ("gate_up_proj", ("gate_proj", "up_proj"), "rows"),
    ("gate_up_proj", ("w1", "w3"), "rows"),
)
_KV = (("k_proj", "v_proj"), ("wk", "wv"), ("key", "value"))
_PACKED = ("qkv_proj", "query_key_value", "wqkv", "Wqkv", "qkv")
_ROWWISE = ("o_proj", "out_proj", "down_proj", "c_proj", "dense", "fc2", "wo", "w2", "dense_4h_to_h", "proj")


def text_config(found: Found) -> tuple[str, Mapping[str, Any]]:
    """(key of the language model's config, that section of config.json)."""
    config = found.config.get_text_config()
    keys = [key for key, value in vars(found.config).items() if value is config]
    key = "" if config is found.config or not keys else keys[0]
    whole = found.component.config
    for text in (whole.get(key) if key else whole, whole):  # old files have all keys at the top level
        if isinstance(text, Mapping) and type(text.get("num_hidden_layers")) is int:
            return key, text
    raise UnsupportedError(f"no scope can be proposed: config.json has no {key + '.' if key else ''}num_hidden_layers")


def decoder_layers(found: Found, text: Mapping[str, Any]) -> tuple[str, int]:
    """(the decoder layers as the files call them, how many): the longest list of like blocks in the language model."""
    from torch import nn

    inside = set(map(id, found.model.get_decoder().modules()))
    lists = {n: m for n, m in found.model.named_modules() if isinstance(m, nn.ModuleList) and id(m) in inside}
    alike = {name: len(blocks) for name, blocks in lists.items() if len({type(block) for block in blocks}) == 1}
    if not alike:
        raise UnsupportedError("no scope can be proposed: the model has no list of like blocks that could be its decoder layers")
    name = max(alike, key=lambda name: alike[name])
    if alike[name] != text["num_hidden_layers"]:
        told = f"{name} has {alike[name]} blocks, num_hidden_layers is {text['num_hidden_layers']}"
        raise UnsupportedError(f"no scope can be proposed: {told}")
    return found.name_of(f"{name}.0").removesuffix(".0"), alike[name]


def in_layer(found: Found, layers: str, number: int) -> dict[str, str]:
    """{name relative to the layer: name in memory} of what is stored of a layer, each by itself."""
    at = f"{layers}.{number}."
    return {name[len(at) :]: memory for memory, name in found.stored.items() if name.startswith(at)}


def _matrices(found: Found, layers: str, number: int) -> dict[str, str]:
    """{module relative to the layer: its module in memory} of all that has a matrix for a weight."""
    names = in_layer(found, layers, number)
    return {parent(name): parent(memory) for name, memory in names.items() if is_matrix(found, memory)}


def experts(found: Found, layers: str, count: int, text: Mapping[str, Any]) -> Experts | None:
    """The routed experts, where files hold them one by one."""
    at = re.compile(re.escape(layers) + r"\.(\d+)\.(.+)\.weight")
    places = [[at.fullmatch(name) for name in names] for names in found.experts.values()]
    if not places:
        return None
    if not all(all(group) for group in places):
        raise UnsupportedError("no scope can be proposed: transformers merges tensors outside the decoder layers")
    named = dict.fromkeys(tuple(place[2] for place in group if place) for group in places)
    groups = sorted(named, key=len, reverse=True)  # what is fused comes first
    sparse = {int(place[1]) for group in places for place in group if place}
    runtime = groups[0][0].partition(".{e}")[0]
    block = f"{parent(runtime)}."
    other = [name for name in _matrices(found, layers, min(sparse)) if name.startswith(block)]
    total = found.model.state_dict()[next(iter(found.experts))].shape[0]
    keys = (key for key, value in text.items() if type(value) is int and value == total)
    counts = tuple(key for key in keys if "expert" in key and "per_" not in key)
    if not counts:
        raise UnsupportedError(f"no scope can be proposed: config.json does not say that there are {total} experts")
    step, dense = _layers_with(sparse, count, text)
    if len(sparse) < count and not step and not dense:
        none = ", ".join(str(i) for i in range(count) if i not in sparse)
        raise UnsupportedError(f"no scope can be proposed: neither list nor step of config.json says why {none:.80} lack experts")
    found.note("experts", "vLLM builds all experts of a layer as one module, by a name of its own, and the linears here stay")
    return Experts(runtime, tuple(groups), tuple(fused(found, other)), block, counts, step, dense)


def _layers_with(sparse: set[int], count: int, text: Mapping[str, Any]) -> tuple[str, str]:
    """The keys that say which layers have experts: every nth, all but those listed; "" where none says so, or all have."""
    dense = sorted(set(range(count)) - sparse)
    lists = [key for key, value in text.items() if dense and value == dense]
    steps = [k for k, n in text.items() if "step" in k and type(n) is int and n > 1 and sparse == set(range(n - 1, count, n))]
    return (steps[0] if steps and not lists else ""), (lists[0] if lists else "")


def linears(found: Found, layers: str, count: int, experts: Experts | None) -> tuple[Fused, ...]:
    """The linears that every layer has, or every layer without experts. Raises UnsupportedError where layers differ otherwise."""
    from torch import nn

    routers = {shard for fused in (experts.linears if experts else ()) for shard in fused.shards}
    by_layer = [{n: m for n, m in _matrices(found, layers, i).items() if n not in routers} for i in range(count)]
    all_of = {name: memory for matrices in by_layer for name, memory in matrices.items()}
    for number, own in enumerate(by_layer):
        lost = [name for name in all_of if name not in own and not (experts and name.startswith(experts.dense))]
        if lost:
            raise UnsupportedError(f"no scope can be proposed: {layers}.{number} has no {lost[0]}, which other layers have")
    kinds = {name: type(found.model.get_submodule(memory)) for name, memory in all_of.items()}
    if transposed := next((name for name, kind in kinds.items() if kind.__name__ == "Conv1D"), None):
        raise UnsupportedError(f"no scope can be proposed: {layers}.N.{transposed} is stored transposed (Conv1D)")
    if odd := [f"{name} is a {kind.__name__}" for name, kind in kinds.items() if kind is not nn.Linear]:
        found.note("linears", f"{', '.join(odd)}: take it out where vLLM builds no linear of it")
    found.note("linears", "vLLM may fuse other modules than those with these usual names")
    return tuple(fused(found, all_of))


def fused(found: Found, modules: Iterable[str]) -> Iterator[Fused]:
    """Modules fused as vLLM fuses such names, each at the place of its first shard."""
    left = dict.fromkeys(modules)
    plan = getattr(found.config.get_text_config(), "base_model_tp_plan", None) or {}
    for module in tuple(left):
        if module not in left:
            continue
        at = f"{parent(module)}." if "." in module else ""
        whole = next((f for f in _FUSED if leaf(module) in f[1] and all(f"{at}{s}" in left for s in f[1])), None)
        shards = tuple(f"{at}{s}" for s in whole[1]) if whole else (module,)
        for shard in shards:
            del left[shard]
        yield Fused(f"{at}{whole[0]}", shards, whole[2]) if whole else Fused(module, shards, _split(module, plan))


def _split(module: str, plan: Mapping[str, str]) -> Split:
    """By transformers' plan for tensor parallelism, else by the name."""
    if leaf(module) in _PACKED:
        return "heads"
    said = next((how for name, how in plan.items() if name.endswith(f".{module}")), "")
    if said.startswith(("colwise", "rowwise")):
        return "rows" if said.startswith("colwise") else "columns"
    return "columns" if leaf(module) in _ROWWISE else "rows"


def norm_offset(found: Found) -> float:
    """1.0 where a norm adds that to its weights before it multiplies by them, as Gemma's do. By the source of its class."""
    norms = {type(module) for module in found.model.get_decoder().modules() if type(module).__name__.endswith("RMSNorm")}
    return float(any(re.search(r"\b1(\.0)?\s*\+\s*self\.weight", inspect.getsource(norm)) for norm in norms))


def kv(found: Found, linears: Sequence[Fused]) -> tuple[str, str]:
    """The modules whose outputs become K and V, or the one that makes both; ("", "") where none is known."""
    shards = [shard for fused in linears for shard in fused.shards]
    pairs = [(k, f"{parent(k)}.{last_v}") for last_k, last_v in _KV for k in shards if leaf(k) == last_k]
    packed = [(shard, shard) for shard in shards if leaf(shard) in _PACKED]
    pair = next(((k, v) for k, v in [*pairs, *packed] if v in shards), ("", ""))
    if not pair[0]:
        found.note("kv", "no module is called as those that make K and V usually are; without them there is no kv_cache")
    elif not pair[0].startswith("self_attn."):
        found.note("kv", "vLLM 0.32 knows the scales of K and V by `.self_attn.` in their names")
    return pair
