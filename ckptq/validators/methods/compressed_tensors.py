"""`quant_method: compressed-tensors`, llm-compressor's words: FP8 weights per tensor, channel or block.

Read in vLLM 0.32.0 model_executor/layers/quantization/compressed_tensors/{compressed_tensors,utils}.py and utils/config_utils.py;
what a strategy means when it is left out, in compressed-tensors 0.17 quantization/quant_args.py QuantizationArgs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ckptq.errors import UnsupportedError
from ckptq.scopes import Scope, Split
from ckptq.validators import Code, Finding, error, expressions, has_errors
from ckptq.validators.expressions import Matches
from ckptq.validators.formats import Format, Granularity, compressed_tensors
from ckptq.validators.methods import Matcher, Settings, Treatment, as_json, exclude_list, is_names, spelled
from ckptq.validators.parallel import split_of
from ckptq.validators.servers import Server
from ckptq.validators.vllm_rules import ServerLinear, expert_names, packed_modules, server_name

_SOURCE = "vLLM 0.32.0 model_executor/layers/quantization/compressed_tensors/compressed_tensors.py"
CODES = {
    "config.groups": Code("no config group says what is quantized, or one says it in a way that the server can't read", _SOURCE),
    "config.unknown-key": Code(
        "a key of a config group that the server does not know, and stops at",
        "compressed-tensors 0.17 quantization/quant_args.py QuantizationArgs",
    ),
    "config.format": Code("the format is absent, or none in which the server quantizes activations", _SOURCE),
    "config.ignore": Code("the ignore list is no list of names", _SOURCE),
    "config.kv-scheme": Code("a KV scheme at which the server stops", _SOURCE + " CompressedTensorsKVCacheMethod"),
}
# utils.py is_activation_quantization_format. Only there does get_scheme look for FP8.
_FORMATS = ("float-quantized", "naive-quantized", "int-quantized", "nvfp4-pack-quantized")
_STRATEGIES = ("tensor", "channel", "block")
_STATIC = ("channel", "block", "attn_head")
_ALL_STRATEGIES = (*_STRATEGIES, "token", "group", "tensor_group", "attn_head")
# compressed-tensors 0.17 quantization/quant_args.py QuantizationArgs, which forbids others.
_ARGUMENTS = frozenset(
    ("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder", "scale_dtype", "zp_dtype",
     "observer", "observer_kwargs")
)  # fmt: skip
_CLASSES = ("Linear", "RoutedExperts", "ParallelLMHead")


def check(section: Mapping[str, Any], file: str, server: Server) -> Iterator[Finding]:
    """Findings on the section."""
    groups = section.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        yield error(
            "config.groups",
            f"{file}.config_groups",
            "at least one group with targets and weights",
            spelled(section, "config_groups"),
            "vLLM builds every linear unquantized, and stops at the first scale",
            "write the group: targets, weights, input_activations",
        )
        return
    for name, group in groups.items():
        yield from _group_findings(group, f"{file}.config_groups.{name}", section.get("format"))
    entries = section.get("ignore", [])
    if not is_names(entries):
        yield error(
            "config.ignore", f"{file}.ignore", "a list of names", spelled(section, "ignore"),
            "vLLM raises, or searches the letters of a text", "write the names as a JSON list",
        )  # fmt: skip
    yield from expressions.check([*exclude_list(section, "ignore"), *(t for g in groups.values() for t in _targets(g))], file)
    yield from _kv_findings(section, file)


def _group_findings(group: Any, where: str, top_format: Any) -> Iterator[Finding]:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping) or not is_names(group.get("targets")):
        yield error(
            "config.groups", where, "targets and weights", as_json(group), "vLLM raises", "say what the group quantizes, and how"
        )
        return
    for key in ("weights", "input_activations", "output_activations"):
        arguments = group.get(key)
        if not isinstance(arguments, Mapping):
            continue
        if unknown := sorted(set(arguments) - _ARGUMENTS):
            yield error(
                "config.unknown-key", f"{where}.{key}.{unknown[0]}", "no such key", as_json(arguments[unknown[0]]),
                "vLLM raises at a key that it does not know", "remove the key",
            )  # fmt: skip
            return
        if wanted := _wanted(arguments):
            yield error("config.groups", f"{where}.{key}", wanted, as_json(arguments), "vLLM raises", "write what the scales are")
            return
    if _is_attention(group) or not _is_fp8(weights):
        return
    said = group.get("format") or top_format
    if said not in _FORMATS:
        yield error(
            "config.format",
            f"{where}.format",
            '"float-quantized", here or for the whole section',
            as_json(said) if said else "absent",
            "vLLM finds no scheme and raises",
            "set format to float-quantized",
        )
    inputs = group.get("input_activations")
    static = isinstance(inputs, Mapping) and not inputs.get("dynamic", False)
    strategy = _strategy(weights)
    if strategy not in _STRATEGIES or not weights.get("symmetric", True) or weights.get("dynamic", False):
        yield error(
            "config.groups", f"{where}.weights", "static, symmetric, strategy tensor, channel or block", as_json(weights),
            "vLLM finds no scheme and raises", "name the strategy that the scales are stored for",
        )  # fmt: skip
    elif strategy == "block" and (static or _block(weights) is None):
        yield error(
            "config.groups", where, "block_structure [rows, columns], and dynamic input_activations", as_json(group),
            "vLLM raises", "write block_structure [128, 128], and dynamic true for input_activations",
        )  # fmt: skip


def _wanted(arguments: Mapping[str, Any]) -> str | None:
    """What QuantizationArgs would take instead; None where it takes them."""
    strategy, size = _strategy(arguments), arguments.get("group_size")
    if strategy not in _ALL_STRATEGIES or (size is not None and type(size) is not int):
        return "a strategy and a group_size that compressed-tensors knows"
    if (strategy == "token") > bool(arguments.get("dynamic")) or (strategy in _STATIC and arguments.get("dynamic")):
        return "dynamic true for strategy token, false for channel and block"
    if (strategy in ("group", "tensor_group")) != (size is not None and size > 0):
        return "a positive group_size for strategy group, and for no other"
    if (strategy == "block") != (arguments.get("block_structure") is not None) or (strategy == "block" and not _block(arguments)):
        return "block_structure [rows, columns] for strategy block, and for no other"
    return None


def _kv_findings(section: Mapping[str, Any], file: str) -> Iterator[Finding]:
    scheme = section.get("kv_cache_scheme")
    if scheme is None:
        return
    ok = isinstance(scheme, Mapping) and (scheme.get("type"), scheme.get("num_bits")) == ("float", 8) and scheme.get("symmetric")
    if not ok or scheme.get("strategy") not in ("tensor", "attn_head"):
        yield error(
            "config.kv-scheme", f"{file}.kv_cache_scheme", "type float, num_bits 8, symmetric true, strategy tensor or attn_head",
            as_json(scheme), "vLLM raises when it builds the first attention", "write these four keys, or null for a cache in BF16",
        )  # fmt: skip


def _targets(group: Any) -> list[str]:
    targets = group.get("targets") if isinstance(group, Mapping) else None
    return [t for t in targets if isinstance(t, str)] if isinstance(targets, list) else []


def _is_attention(group: Mapping[str, Any]) -> bool:
    """from_config leaves such groups out: they speak of the KV cache."""
    targets = _targets(group)
    return len(targets) == 1 and targets[0].endswith("Attention")


def _is_fp8(weights: Mapping[str, Any]) -> bool:
    return (weights.get("type", "int"), weights.get("num_bits", 8)) == ("float", 8)


def denied(section: Mapping[str, Any], file: str) -> Finding | None:
    """A finding where each group says that its weights are no FP8, though such weights are stored; None where one can't be read."""
    groups = section.get("config_groups")
    weights = [g.get("weights") for g in groups.values() if isinstance(g, Mapping)] if isinstance(groups, Mapping) else []
    said = [w for w in weights if isinstance(w, Mapping)]
    if not said or len(said) < len(weights) or any(map(_is_fp8, said)):
        return None
    types = dict.fromkeys(as_json({key: w.get(key) for key in ("type", "num_bits")}) for w in said)
    return error(
        "config.groups", f"{file}.config_groups", "a group with weights of type float and num_bits 8: such weights are stored",
        ", ".join(types), "vLLM builds another format and takes the codes for its numbers, silently, or finds no scheme and raises",
        "set type to float and num_bits to 8, or store the weights that the groups speak of",
    )  # fmt: skip


def _strategy(weights: Mapping[str, Any]) -> str:
    otherwise = {None: "tensor", -1: "channel"}
    said = weights.get("strategy") or otherwise.get(weights.get("group_size"), "group")
    return str(said).lower()


def _block(weights: Mapping[str, Any]) -> tuple[int, int] | None:
    """block_structure as [128, 128] or "128x128"."""
    said = weights.get("block_structure")
    if isinstance(said, str):
        said = [int(n) if n.isdecimal() else n for n in said.split("x")]
    if isinstance(said, list) and len(said) == 2 and all(type(n) is int and n > 0 for n in said):
        return said[0], said[1]
    return None


def read(section: Mapping[str, Any], file: str, server: Server) -> Settings | None:
    """The settings. Raises UnsupportedError where a group is not FP8."""
    if has_errors(check(section, file, server)):
        return None
    strategies = []
    for name, group in section["config_groups"].items():
        weights = group["weights"]
        if _is_attention(group):
            continue
        if not _is_fp8(weights) or _strategy(weights) == "group":
            raise UnsupportedError(
                f"{file}.config_groups.{name}: weights of {weights.get('num_bits')} bits, type {weights.get('type')}, strategy "
                f"{_strategy(weights)} can't be checked yet; what can: FP8 per tensor, channel or block",
                hint="`--load` asks the real vLLM, which loads faulty checkpoints, too",
            )
        if classes := [t for t in _targets(group) if "." not in t and not t.startswith("re:") and t not in _CLASSES]:
            raise UnsupportedError(
                f"{file}.config_groups.{name}.targets: the class {classes[0]!r} can't be checked; what can: {', '.join(_CLASSES)}, "
                "module names and expressions",
                hint="`--load` asks the real vLLM, which loads faulty checkpoints, too",
            )
        strategies.append(_strategy(weights))
    kv = section.get("kv_cache_scheme") is not None
    form = ", ".join(dict.fromkeys(strategies))
    return Settings(
        file, "compressed-tensors", form, exclude_list(section, "ignore"), "ignore", kv, "kv_cache_scheme", section, server
    )


def matcher(settings: Settings, scope: Scope) -> Matcher:
    """Which linears are built quantized: those that a group's targets reach by name or class, and the ignore list does not."""
    packed, split_for, matches = packed_modules(scope), split_of(scope), expressions.matcher()
    ignore = [_mapped(entry, scope) for entry in settings.exclude]
    linears: dict[str, Treatment] = {}
    routed: dict[str, Treatment] = {}
    for group in settings.section["config_groups"].values():
        if not _is_attention(group):
            targets = [_mapped(target, scope) for target in _targets(group)]
            linears |= dict.fromkeys(targets, _format(group))
            routed |= dict.fromkeys(targets, _format(group) if _fits_experts(group) else "refused")

    def of_name(name: str, kind: str) -> Treatment:
        ignored = expressions.ignored(name, ignore, matches, packed, settings.server, fused=True)
        if ignored is None:
            return "refused"
        groups = routed if kind == "RoutedExperts" else linears
        return "kept" if ignored else _target(name, kind, groups, matches, packed, settings.server)

    @functools.cache
    def of_prefix(prefix: str, kind: str, experts: tuple[str, ...]) -> Treatment:
        found = {of_name(f"{prefix}.0.{e}", kind) for e in experts} if experts else {of_name(prefix, kind)}
        return found.pop() if len(found) == 1 else "refused"

    def treat(linear: ServerLinear) -> Treatment:
        # compressed_tensors_moe.py get_moe_method: the projections of expert 0 are asked, and stand for all.
        experts = expert_names(scope) if linear.part == "experts" else ()
        return of_prefix(linear.prefix, _class(linear, split_for(linear)), experts)

    return treat


def _class(linear: ServerLinear, split: Split) -> str:
    """The class that the server builds it of, as the models' files have it."""
    if linear.part == "head":
        return "ParallelLMHead"
    if linear.part == "experts":
        return "RoutedExperts"
    rows = "MergedColumnParallelLinear" if len(linear.shards) > 1 else "ColumnParallelLinear"
    return {"heads": "QKVParallelLinear", "rows": rows, "columns": "RowParallelLinear", "none": "ReplicatedLinear"}[split]


def _mapped(entry: str, scope: Scope) -> str:
    """apply_vllm_mapper: names with a dot follow the model's prefix rules, expressions do not."""
    return server_name(entry, scope) if "." in entry and not entry.startswith("re:") else entry


def _target(
    name: str, kind: str, groups: Mapping[str, Treatment], matches: Matches, packed: Mapping[str, Sequence[str]], server: Server
) -> Treatment:
    """find_matched_target: the name, then all shards of a fused one, then the class; older versions ask for the class before."""
    by_name = _first(name, groups, matches)
    by_class = _by_class(kind, groups, matches)
    by_shards = _by_shards(name, groups, matches, packed)
    order = (by_name, by_shards, by_class) if server.shards_before_class else (by_name, by_class, by_shards)
    unreached: Treatment = "refused" if server.unreached_refused and groups and kind != "ParallelLMHead" else "kept"
    return next((found for found in order if found is not None), unreached)


def _first(name: str, groups: Mapping[str, Treatment], matches: Matches) -> Treatment | None:
    return next((treatment for target, treatment in groups.items() if matches(name, target)), None)


def _by_shards(
    name: str, groups: Mapping[str, Treatment], matches: Matches, packed: Mapping[str, Sequence[str]]
) -> Treatment | None:
    """The first shard's, where each of them is reached."""
    fused = next((key for key in packed if name.endswith(key)), None)
    found = [_first(name.replace(fused, shard), groups, matches) for shard in packed[fused]] if fused is not None else [None]
    return found[0] if None not in found else None


def _by_class(kind: str, groups: Mapping[str, Treatment], matches: Matches) -> Treatment | None:
    """A target may be a part of the class's name, whatever the case. "Linear" speaks of routed experts, too:
    _add_fused_moe_to_target_scheme_map.
    """
    kinds = ("RoutedExperts", "Linear") if kind == "RoutedExperts" else (kind,)
    for target, treatment in groups.items():
        if matches(kind, target) if target.startswith("re:") else any(target.lower() in k.lower() for k in kinds):
            return treatment
    return None


def _fits_experts(group: Mapping[str, Any]) -> bool:
    """compressed_tensors_moe_w8a8_fp8.py CompressedTensorsW8A8Fp8MoEMethod: weights and activations of one granularity."""
    weights, inputs = group["weights"], group.get("input_activations")
    if not isinstance(inputs, Mapping) or not (inputs.get("dynamic") or inputs.get("symmetric", True)):
        return False
    return (_strategy(weights), _strategy(inputs)) in (("tensor", "tensor"), ("channel", "token")) or _strategy(weights) == "block"


def _format(group: Mapping[str, Any]) -> Format:
    weights, inputs = group["weights"], group.get("input_activations")
    static = isinstance(inputs, Mapping) and not inputs.get("dynamic", False)
    granularity: Granularity = {"channel": "channel", "block": "block"}.get(_strategy(weights), "tensor")  # type: ignore[assignment]
    return compressed_tensors(granularity, static=static, block=_block(weights) if granularity == "block" else None)
