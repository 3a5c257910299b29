"""`quant_method: modelopt`, NVIDIA ModelOpt's own words: FP8, NVFP4, MXFP8, and MIXED_PRECISION, which names each linear's own.

Read in vLLM 0.32.0 model_executor/layers/quantization/modelopt.py and utils/quant_utils.py; tests/test_methods.py compares
with the real functions.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from ckptq.errors import UnsupportedError
from ckptq.scopes import Scope
from ckptq.validators import Code, Finding, error, formats, mixed
from ckptq.validators.formats import NVFP4_GROUP, Format
from ckptq.validators.methods import MIXED, Matcher, Settings, Treatment, as_json, exclude_list, is_names, spelled
from ckptq.validators.servers import Server
from ckptq.validators.vllm_rules import ServerLinear, packed_modules, server_name

_SOURCE = "vLLM 0.32.0 model_executor/layers/quantization/modelopt.py ModelOptQuantConfigBase.from_config"
CODES = {
    "config.quant-algo": Code("quant_algo is absent, or none that the server knows", _SOURCE),
    "config.exclude-list": Code("the exclude list is no list of names, or has another method's key", _SOURCE),
    "config.required-key": Code(
        "a key is absent from the nested form that the server wants there",
        f"{_SOURCE}, ModelOptNvFp4Config and ModelOptMxFp8Config",
    ),
    "config.group-size": Code("a group_size that is not NVFP4's", _SOURCE + "; kernels/linear/nvfp4"),
    "config.kv-cache-scheme": Code(
        "a KV scheme that the server does not take for FP8", "vLLM 0.32.0 utils/torch_utils.py get_kv_cache_quant_algo_string"
    ),
}
FORMATS: Mapping[str, Format] = {
    "FP8": formats.MODELOPT_FP8,
    "FP8_PER_CHANNEL_PER_TOKEN": formats.MODELOPT_PER_CHANNEL,
    "FP8_PB_WO": formats.MODELOPT_BLOCK,
    "NVFP4": formats.MODELOPT_NVFP4,
    "W4A16_NVFP4": formats.MODELOPT_NVFP4_A16,
    "MXFP8": formats.MODELOPT_MXFP8,
}
_GROUPED = ("NVFP4", "W4A16_NVFP4")
_REQUIRED: Mapping[str, tuple[str, ...]] = {
    "NVFP4": ("group_size", "kv_cache_quant_algo", "exclude_modules"),
    "W4A16_NVFP4": ("group_size", "kv_cache_quant_algo", "exclude_modules"),
    "MXFP8": ("kv_cache_quant_algo", "exclude_modules"),
}
_SCHEME = {"dynamic": False, "num_bits": 8, "type": "float"}
# modelopt.py get_quant_method: kept whatever the list says, for exports of old ModelOpt versions.
_OLD_TOWERS = ("vision_tower", "vision_model", "vit_large_projector")


def check(section: Mapping[str, Any], file: str, server: Server) -> Iterator[Finding]:
    """Findings on the section: config.json's flat form, or the nested one of hf_quant_config.json."""
    body, flat = _body(section)
    algo = mixed.algo_of(body)
    if algo not in _known(section, server):
        yield error(
            "config.quant-algo", f"{file}.quant_algo", " or ".join(sorted(_known(section, server))), spelled(body, "quant_algo"),
            f"vLLM {server.version} raises", "name the algorithm that the tensors are stored for",
        )  # fmt: skip
    key = _exclude_key(section, server)
    entries = body.get(key, [])
    if not is_names(entries):
        yield error(
            "config.exclude-list", f"{file}.{key}", "a list of module names", spelled(body, key), "vLLM raises",
            "write the names as a JSON list",
        )  # fmt: skip
    if flat and "exclude_modules" in section and key == "ignore" not in section:
        yield error(
            "config.exclude-list", f"{file}.exclude_modules", "the key `ignore`", "the key `exclude_modules`",
            f"inside config.json vLLM {server.version} reads `ignore` alone; exclude_modules is hf_quant_config.json's word",
            "rename the key",
        )  # fmt: skip
    if not flat and (absent := [key for key in _REQUIRED.get(algo, ()) if key not in body]):
        yield error(
            "config.required-key", f"{file}.{absent[0]}", f"the keys {', '.join(_REQUIRED[algo])}", "absent", "vLLM raises",
            "write it: null for a cache in the model's dtype, [] where nothing is excluded",
        )  # fmt: skip
    yield from _group_size(body, algo, file)
    if algo == MIXED:
        yield from mixed.check(body, file, server)
    said = _kv_said(section)
    if said is not None and not _kv_fp8(said):
        where = "kv_cache_scheme" if isinstance(said, Mapping) else "kv_cache_quant_algo"
        yield error(
            "config.kv-cache-scheme", f"{file}.{where}", as_json(_SCHEME if where == "kv_cache_scheme" else "FP8"), as_json(said),
            "vLLM falls back to a cache in the model's dtype and leaves the scales unused",
            "write exactly these three keys" if where == "kv_cache_scheme" else "write FP8",
        )  # fmt: skip


def _group_size(body: Mapping[str, Any], algo: str, file: str) -> Iterator[Finding]:
    """from_config takes what int() takes. Of a mixed checkpoint without one the first NVFP4 linear's counts, as it is written."""
    said, where = body.get("group_size"), f"{file}.group_size"
    size, counts = _integer(said), algo in _GROUPED
    if algo == MIXED:
        first = next((layer for layer in mixed.layers(body).values() if mixed.algo_of(layer) in _GROUPED), None)
        counts = first is not None
        if said is None and first is not None:
            said, where = first.get("group_size"), f"{file}.quantized_layers: group_size"
            size = said if type(said) is int else None
    if said is None or size == NVFP4_GROUP or (size is not None and not counts):
        return
    yield error(
        "config.group-size", where, f"{NVFP4_GROUP}, as NVFP4 has it", as_json(said),
        "vLLM raises, or makes room for other scales than are stored", f"write {NVFP4_GROUP}, or remove the key",
    )  # fmt: skip


def _integer(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _known(section: Mapping[str, Any], server: Server) -> frozenset[str]:
    """The algorithms that count here: fewer where only the section's form says that it is ModelOpt's."""
    inner, producer = section.get("quantization"), section.get("producer")
    if not isinstance(inner, Mapping):
        return server.algos
    named = isinstance(producer, Mapping) and producer.get("name") == "modelopt"
    return server.algos_alone if named or "modelopt_quant_config" in inner else server.algos


def read(section: Mapping[str, Any], file: str, server: Server) -> Settings | None:
    """The settings; quant_algo in capitals. Raises UnsupportedError for codecs in quantized_layers that are no algorithm here."""
    body, flat = _body(section)
    algo, key = mixed.algo_of(body), _exclude_key(section, server)
    stops = any(f.code in _STOPS and f.severity == "error" for f in check(section, file, server))
    if stops or not is_names(body.get(key, [])):
        return None
    if algo == MIXED:
        mixed.refuse_codecs(body, file, tuple(FORMATS))
    if algo == "NVFP4" and server.groups_decide and _weights_alone(section):
        algo = "W4A16_NVFP4"
    kv_key = "kv_cache_scheme" if flat else "kv_cache_quant_algo"
    found = Settings(file, "modelopt", algo, exclude_list(body, key), key, _kv_fp8(_kv_said(section)), kv_key, section, server)
    # ModelOptMxFp8Config.get_supported_act_dtypes.
    return replace(found, dtypes=frozenset({"bfloat16"})) if algo == "MXFP8" else found


_STOPS = ("config.quant-algo", "config.required-key", "config.group-size", "config.quantized-layers")
"""Codes of what makes the server raise before it builds anything."""


def _weights_alone(section: Mapping[str, Any]) -> bool:
    """Whether there are config groups and none says how activations are quantized. Only then NVFP4 is not what it says."""
    groups = section.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        return False
    return all(isinstance(group, Mapping) and group.get("input_activations") is None for group in groups.values())


def matcher(settings: Settings, scope: Scope) -> Matcher:
    """Which linears are built quantized: all that the list does not reach, lm_head among them; of a mixed checkpoint those listed.

    Routed experts are built per tensor with static activations whatever FP8 algorithm is named: FusedMoEMethodCls is
    ModelOptFp8MoEMethod for all three. Those of NVFP4 are ModelOptNvFp4FusedMoE's, with activations or without. Raises
    UnsupportedError, when it is asked, for those of other algorithms.
    """
    patterns, packed, server = server_patterns(settings.exclude, scope), packed_modules(scope), settings.server
    listed = mixed.finder(_body(settings.section)[0], scope, packed, server) if settings.format == MIXED else None

    @functools.cache
    def of_prefix(prefix: str, part: str) -> Treatment:
        if kept := excluded(prefix, patterns, packed, server):
            return kept
        algo = listed(prefix) if listed else settings.format
        if algo in (None, MIXED):
            return "kept" if algo is None else "refused"
        return _of_experts(algo, settings) if part == "experts" else FORMATS[algo]

    def treat(linear: ServerLinear) -> Treatment:
        if linear.part == "head" and not server.head_quantized:
            return "kept"
        return of_prefix(linear.prefix, linear.part)

    return treat


def _of_experts(algo: str, settings: Settings) -> Format:
    if algo in _GROUPED:
        return formats.of_experts(FORMATS[algo])
    if not algo.startswith("FP8") or (settings.format == MIXED and algo != "FP8"):
        raise UnsupportedError(
            f"{settings.file}: routed experts in {algo} can't be checked yet; what can: FP8, NVFP4, W4A16_NVFP4",
            hint="`--load` asks the real vLLM, which loads faulty checkpoints, too",
        )
    return formats.MODELOPT_FP8


def _exclude_key(section: Mapping[str, Any], server: Server) -> str:
    """The key of the list: the first that is there of those the server looks for."""
    _, flat = _body(section)
    return next((k for k in server.exclude_keys if k in section), "ignore") if flat else "exclude_modules"


def _body(section: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """(the mapping with quant_algo, whether the section is config.json's flat one)."""
    inner = section.get("quantization")
    return (inner, False) if isinstance(inner, Mapping) else (section, True)


def _kv_said(section: Mapping[str, Any]) -> Any:
    """The first setting of the KV cache that is not empty: it decides."""
    body, _ = _body(section)
    keys = ("kv_cache_scheme", "kv_cache_quant_algo")
    return next((value for key in keys for value in (body.get(key), section.get(key)) if value), None)


def _kv_fp8(said: Any) -> bool:
    if isinstance(said, Mapping):
        return said.get("dynamic") is False and said.get("num_bits") == 8 and said.get("type") == "float"
    return isinstance(said, str) and said.lower() == "fp8"


def server_patterns(patterns: Sequence[str], scope: Scope) -> tuple[str, ...]:
    """The list as the server comes to hold it: `X*` becomes `X` and `X.*`, then each is mapped (apply_vllm_mapper)."""
    expanded: list[str] = []
    for pattern in patterns:
        tree = len(pattern) >= 2 and pattern[-1] == "*" and pattern[-2] != "."
        expanded += [pattern[:-1], pattern[:-1] + ".*"] if tree else [pattern]
    return tuple(server_name(p, scope) for p in expanded)


def excluded(prefix: str, patterns: Sequence[str], packed: Mapping[str, Sequence[str]], server: Server) -> Treatment | None:
    """kept or refused where the patterns (from `server_patterns`) reach the linear `prefix` (its own name), else None.

    is_layer_excluded, is_layer_skipped. In order: exact, where a fused linear wants its own name or all its shards' names;
    substring; wildcards, against the fused name alone.
    """
    exact = exactly_skipped(prefix, patterns, packed, server)
    if exact is None:
        return "refused"
    if (
        exact
        or any(p != prefix and p in prefix for p in patterns)
        or any(fnmatchcase(prefix, p) for p in patterns)
        or any(name in prefix for name in _OLD_TOWERS)
    ):
        return "kept"
    return None


def exactly_skipped(prefix: str, names: Sequence[str], packed: Mapping[str, Sequence[str]], server: Server) -> bool | None:
    """Whether the names hold this linear; None where they hold some shards of a fused one, at which vLLM raises.

    utils/quant_utils.py is_layer_skipped, mode "exact". Routed experts are one module: any name that contains theirs will do.
    """
    last = prefix.rpartition(".")[2]
    shards = packed.get(last)
    if shards is not None and not (prefix in names and server.fused_name_listed):
        listed = {prefix.replace(last, shard) in names for shard in shards}
        return None if len(listed) > 1 else True in listed
    if shards is None and "experts" in prefix:
        return any(prefix in name for name in names if "experts" in name)
    return prefix in names
