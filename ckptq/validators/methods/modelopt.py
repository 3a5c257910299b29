"""`quant_method: modelopt`, NVIDIA ModelOpt's own words: FP8, FP8_PER_CHANNEL_PER_TOKEN and FP8_PB_WO.

Read in vLLM 0.32.0 model_executor/layers/quantization/modelopt.py and utils/quant_utils.py; tests/test_vllm_rules.py compares
with the real functions.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from ckptq.errors import UnsupportedError
from ckptq.scopes import Scope
from ckptq.validators import Code, Finding, error
from ckptq.validators.formats import MODELOPT_BLOCK, MODELOPT_FP8, MODELOPT_PER_CHANNEL, Format
from ckptq.validators.methods import Matcher, Settings, Treatment, as_json, exclude_list, is_names, spelled
from ckptq.validators.servers import Server
from ckptq.validators.vllm_rules import ServerLinear, packed_modules, server_name

_SOURCE = "vLLM 0.32.0 model_executor/layers/quantization/modelopt.py ModelOptQuantConfigBase.from_config"
CODES = {
    "config.quant-algo": Code("quant_algo is absent, or none that the server knows", _SOURCE),
    "config.exclude-list": Code("the exclude list is no list of names, or has another method's key", _SOURCE),
    "config.kv-cache-scheme": Code(
        "a KV scheme that the server does not take for FP8", "vLLM 0.32.0 utils/torch_utils.py get_kv_cache_quant_algo_string"
    ),
}
FORMATS: Mapping[str, Format] = {
    "FP8": MODELOPT_FP8,
    "FP8_PER_CHANNEL_PER_TOKEN": MODELOPT_PER_CHANNEL,
    "FP8_PB_WO": MODELOPT_BLOCK,
}
_SCHEME = {"dynamic": False, "num_bits": 8, "type": "float"}
# modelopt.py get_quant_method: kept whatever the list says, for exports of old ModelOpt versions.
_OLD_TOWERS = ("vision_tower", "vision_model", "vit_large_projector")


def check(section: Mapping[str, Any], file: str, server: Server) -> Iterator[Finding]:
    """Findings on the section: config.json's flat form, or the nested one of hf_quant_config.json."""
    body, flat = _body(section)
    algo = str(body.get("quant_algo") or "").upper()
    if algo not in (server.algos if flat else server.algos_alone):
        yield error(
            "config.quant-algo", f"{file}.quant_algo", " or ".join(FORMATS), spelled(body, "quant_algo"),
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
    said = _kv_said(section)
    if said is not None and not _kv_fp8(said):
        where = "kv_cache_scheme" if isinstance(said, Mapping) else "kv_cache_quant_algo"
        yield error(
            "config.kv-cache-scheme", f"{file}.{where}", as_json(_SCHEME if where == "kv_cache_scheme" else "FP8"), as_json(said),
            "vLLM falls back to a cache in the model's dtype and leaves the scales unused",
            "write exactly these three keys" if where == "kv_cache_scheme" else "write FP8",
        )  # fmt: skip


def read(section: Mapping[str, Any], file: str, server: Server) -> Settings | None:
    """The settings; quant_algo in capitals, as the server compares it. Raises UnsupportedError for one that is not FP8."""
    body, flat = _body(section)
    algo, key = str(body.get("quant_algo") or "").upper(), _exclude_key(section, server)
    if algo not in (server.algos if flat else server.algos_alone) or not is_names(body.get(key, [])):
        return None
    if algo not in FORMATS:
        raise UnsupportedError(
            f"{file}: quant_algo {algo} can't be checked yet; what can: {', '.join(FORMATS)}",
            hint="`--load` asks the real vLLM, which loads faulty checkpoints, too",
        )
    kv_key = "kv_cache_scheme" if flat else "kv_cache_quant_algo"
    return Settings(file, "modelopt", algo, exclude_list(body, key), key, _kv_fp8(_kv_said(section)), kv_key, section, server)


def matcher(settings: Settings, scope: Scope) -> Matcher:
    """Which linears are built quantized: all that the list does not reach, lm_head among them.

    Routed experts are built per tensor with static activations whatever quant_algo says: FusedMoEMethodCls is
    ModelOptFp8MoEMethod for all three.
    """
    patterns, packed = server_patterns(settings.exclude, scope), packed_modules(scope)
    form, server = FORMATS[settings.format], settings.server

    @functools.cache
    def of_prefix(prefix: str) -> Treatment:
        return excluded(prefix, patterns, packed, server) or form

    def treat(linear: ServerLinear) -> Treatment:
        if linear.part == "head" and not server.head_quantized:
            return "kept"
        found = of_prefix(linear.prefix)
        return MODELOPT_FP8 if linear.part == "experts" and isinstance(found, Format) else found

    return treat


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
