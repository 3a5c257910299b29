"""`quant_method: compressed-tensors`, llm-compressor's words: FP8, INT8, NVFP4, MXFP8 and MXFP4, in groups of linears.

Read in vLLM 0.32.0 model_executor/layers/quantization/compressed_tensors/{compressed_tensors,utils}.py and utils/config_utils.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptq.errors import UnsupportedError
from ckptq.scopes import Scope, Split
from ckptq.validators import Code, Finding, error, expressions, formats, groups, has_errors
from ckptq.validators.expressions import Matches
from ckptq.validators.formats import Format
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
_CLASSES = ("Linear", "RoutedExperts", "ParallelLMHead")


def check(section: Mapping[str, Any], file: str, server: Server) -> Iterator[Finding]:
    """Findings on the section."""
    parts = section.get("config_groups")
    if not isinstance(parts, Mapping) or not parts:
        yield error(
            "config.groups",
            f"{file}.config_groups",
            "at least one group with targets and weights",
            spelled(section, "config_groups"),
            "vLLM builds every linear unquantized, and stops at the first scale",
            "write the group: targets, weights, input_activations",
        )
        return
    for name, group in parts.items():
        yield from _group_findings(group, f"{file}.config_groups.{name}", section.get("format"), server)
    entries = section.get("ignore", [])
    if not is_names(entries):
        yield error(
            "config.ignore", f"{file}.ignore", "a list of names", spelled(section, "ignore"),
            "vLLM raises, or searches the letters of a text", "write the names as a JSON list",
        )  # fmt: skip
    yield from expressions.check([*exclude_list(section, "ignore"), *(t for g in parts.values() for t in _names(g))], file)
    yield from _kv_findings(section, file)


def _group_findings(group: Any, where: str, top_format: Any, server: Server) -> Iterator[Finding]:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping) or not is_names(group.get("targets")):
        yield error(
            "config.groups", where, "targets and weights", as_json(group), "vLLM raises", "say what the group quantizes, and how"
        )
        return
    for key in ("weights", "input_activations", "output_activations"):
        arguments = group.get(key)
        if not arguments or (key == "output_activations" and not isinstance(arguments, Mapping)):
            continue
        if not isinstance(arguments, Mapping):
            yield error(
                "config.groups", f"{where}.{key}", "an object, or null", as_json(arguments), "vLLM raises",
                "write what the scales are",
            )  # fmt: skip
            return
        if unknown := sorted(set(arguments) - groups.ARGUMENTS):
            yield error(
                "config.unknown-key", f"{where}.{key}.{unknown[0]}", "no such key", as_json(arguments[unknown[0]]),
                "vLLM raises at a key that it does not know", "remove the key",
            )  # fmt: skip
            return
        if wanted := groups.fault(arguments):
            yield error("config.groups", f"{where}.{key}", wanted, as_json(arguments), "vLLM raises", "write what the scales are")
            return
    found = None if _is_attention(group) else groups.scheme(group, top_format, server)
    if not isinstance(found, groups.Wanted):
        return
    if found.key == "format":
        said = group.get("format") or top_format
        yield error(
            "config.format", f"{where}.format", found.what, as_json(said) if said else "absent", "vLLM finds no scheme and raises",
            "set the format to what the tensors are",
        )  # fmt: skip
    else:
        yield error(
            "config.groups", f"{where}.{found.key}" if found.key else where, found.what,
            as_json(group.get(found.key) if found.key else group), "vLLM finds no scheme and raises",
            "name the strategies that the scales are stored for",
        )  # fmt: skip


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


def _names(group: Any) -> list[str]:
    targets = group.get("targets") if isinstance(group, Mapping) else None
    return [t for t in targets if isinstance(t, str)] if isinstance(targets, list) else []


def _is_attention(group: Mapping[str, Any]) -> bool:
    """from_config leaves such groups out: they speak of the KV cache."""
    targets = _names(group)
    return len(targets) == 1 and targets[0].endswith("Attention")


def denied(section: Mapping[str, Any], file: str, server: Server) -> Finding | None:
    """A finding where ckptq knows no group's numbers, though FP8 weights are stored; None where a group can't be read."""
    parts = section.get("config_groups")
    found = list(parts.values()) if isinstance(parts, Mapping) else []
    readable = [
        g for g in found if isinstance(g, Mapping) and isinstance(g.get("weights"), Mapping) and not groups.fault(g["weights"])
    ]
    unknown = all(isinstance(groups.scheme(g, section.get("format"), server), groups.Unknown) for g in readable)
    if not readable or len(readable) < len(found) or not unknown:
        return None
    types = dict.fromkeys(as_json({key: g["weights"].get(key) for key in ("type", "num_bits")}) for g in readable)
    return error(
        "config.groups", f"{file}.config_groups", "a group with weights of type float and num_bits 8: such weights are stored",
        ", ".join(types), "vLLM builds another format and takes the codes for its numbers, silently, or finds no scheme and raises",
        "set type to float and num_bits to 8, or store the weights that the groups speak of",
    )  # fmt: skip


def read(section: Mapping[str, Any], file: str, server: Server) -> Settings | None:
    """The settings. Raises UnsupportedError for transforms, and where a group's numbers or a class that it names are not known."""
    if has_errors(check(section, file, server)):
        return None
    if section.get("transform_config"):
        raise UnsupportedError(
            f"{file}.transform_config: transforms can't be checked yet",
            hint="`--load` asks the real vLLM, which loads faulty checkpoints, too",
        )
    words = []
    for name, group in section["config_groups"].items():
        if _is_attention(group):
            continue
        found = groups.scheme(group, section.get("format"), server)
        if not isinstance(found, Format):
            raise UnsupportedError(
                f"{file}.config_groups.{name}: {found.what} can't be checked yet; what can: FP8, INT8 with quantized activations, "
                "NVFP4, MXFP8, MXFP4",
                hint="`--load` asks the real vLLM, which loads faulty checkpoints, too",
            )
        if classes := [t for t in _names(group) if "." not in t and not t.startswith("re:") and t not in _CLASSES]:
            raise UnsupportedError(
                f"{file}.config_groups.{name}.targets: the class {classes[0]!r} can't be checked; what can: {', '.join(_CLASSES)}, "
                "module names and expressions",
                hint="`--load` asks the real vLLM, which loads faulty checkpoints, too",
            )
        words.append(found.name.removeprefix("compressed-tensors "))
    kv = section.get("kv_cache_scheme") is not None
    form = "; ".join(dict.fromkeys(words))
    return Settings(
        file, "compressed-tensors", form, exclude_list(section, "ignore"), "ignore", kv, "kv_cache_scheme", section, server
    )


def matcher(settings: Settings, scope: Scope) -> Matcher:
    """Which linears are built quantized: those that a group's targets reach by name or class, and the ignore list does not.

    Raises UnsupportedError, when it is asked, for routed experts that are neither FP8 nor NVFP4.
    """
    packed, split_for, matches = packed_modules(scope), split_of(scope), expressions.matcher()
    ignore = [_mapped(entry, scope) for entry in settings.exclude]
    found: dict[str, Treatment] = {}
    routed: dict[str, Treatment] = {}
    for group in settings.section["config_groups"].values():
        form = None if _is_attention(group) else groups.scheme(group, settings.section.get("format"), settings.server)
        if isinstance(form, Format):
            names = [_mapped(target, scope) for target in _names(group)]
            found |= dict.fromkeys(names, form)
            routed |= dict.fromkeys(names, "refused" if groups.is_fp8(form) and not _fits_experts(group) else form)
    of_linears, of_experts = _targets(found, matches), _targets(routed, matches)

    def of_name(name: str, kind: str) -> Treatment:
        ignored = expressions.ignored(name, ignore, matches, packed, settings.server, fused=True)
        if ignored is None:
            return "refused"
        targets = of_experts if kind == "RoutedExperts" else of_linears
        return "kept" if ignored else _target(name, kind, targets, packed, settings.server)

    @functools.cache
    def of_prefix(prefix: str, kind: str, experts: tuple[str, ...]) -> Treatment:
        found = {of_name(f"{prefix}.0.{e}", kind) for e in experts} if experts else {of_name(prefix, kind)}
        treatment = found.pop() if len(found) == 1 else "refused"
        if kind != "RoutedExperts" or not isinstance(treatment, Format) or groups.is_fp8(treatment):
            return treatment
        if treatment not in (formats.CT_NVFP4, formats.CT_NVFP4_A16):
            raise UnsupportedError(
                f"{settings.file}: routed experts in {treatment.name} can't be checked yet; what can: FP8, NVFP4",
                hint="`--load` asks the real vLLM, which loads faulty checkpoints, too",
            )
        return formats.of_experts(treatment)

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


@dataclass(frozen=True, slots=True)
class _Targets:
    """The groups' targets, in their order. There may be one for each linear, so names are looked up and not compared one by one.

    by_name  of the server's own name: the first target that is it, or whose expression matches it
    by_class of the class it is built of: a target may be a part of the class's name, whatever the case. "Linear" speaks of routed
             experts, too: _add_fused_moe_to_target_scheme_map
    """

    by_name: Callable[[str], Treatment | None]
    by_class: Callable[[str], Treatment | None]
    empty: bool


def _targets(treatments: Mapping[str, Treatment], matches: Matches) -> _Targets:
    order = {target: i for i, target in enumerate(treatments)}
    patterns = [target for target in treatments if target.startswith("re:")]
    classes = [target for target in treatments if "." not in target or target.startswith("re:")]

    def by_name(name: str) -> Treatment | None:
        pattern = next((p for p in patterns if matches(name, p)), None)
        first = min((target for target in (name, pattern) if target in order), key=lambda t: order[t], default=None)
        return None if first is None else treatments[first]

    def by_class(kind: str) -> Treatment | None:
        kinds = ("RoutedExperts", "Linear") if kind == "RoutedExperts" else (kind,)
        return next((treatments[t] for t in classes if (matches(kind, t) if t.startswith("re:") else _inside(t, kinds))), None)

    return _Targets(by_name, by_class, not treatments)


def _inside(target: str, kinds: Sequence[str]) -> bool:
    return any(target.lower() in kind.lower() for kind in kinds)


def _target(name: str, kind: str, targets: _Targets, packed: Mapping[str, Sequence[str]], server: Server) -> Treatment:
    """find_matched_target: the name, then all shards of a fused one, then the class; older versions ask for the class before."""
    found = targets.by_name(name), _by_shards(name, targets, packed), targets.by_class(kind)
    order = found if server.shards_before_class else (found[0], found[2], found[1])
    unreached: Treatment = "refused" if server.unreached_refused and not targets.empty and kind != "ParallelLMHead" else "kept"
    return next((treatment for treatment in order if treatment is not None), unreached)


def _by_shards(name: str, targets: _Targets, packed: Mapping[str, Sequence[str]]) -> Treatment | None:
    """The first shard's, where each of them is reached."""
    fused = next((key for key in packed if name.endswith(key)), None)
    found = [targets.by_name(name.replace(fused, shard)) for shard in packed[fused]] if fused is not None else [None]
    return found[0] if None not in found else None


def _fits_experts(group: Mapping[str, Any]) -> bool:
    """compressed_tensors_moe_w8a8_fp8.py CompressedTensorsW8A8Fp8MoEMethod: weights and activations of one granularity."""
    weights, inputs = group["weights"], group.get("input_activations")
    if not isinstance(inputs, Mapping) or not (inputs.get("dynamic") or inputs.get("symmetric", True)):
        return False
    pair = groups.strategy(weights), groups.strategy(inputs)
    return pair in (("tensor", "tensor"), ("channel", "token")) or pair[0] == "block"
