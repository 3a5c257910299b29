"""`quant_method: quark`, AMD Quark's words: FP8 weights per tensor, channel or block.

Read in vLLM 0.32.0 model_executor/layers/quantization/quark/{quark,quark_moe,utils}.py and schemes/quark_w8a8_fp8.py.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from ckptq.errors import SourceError, UnsupportedError
from ckptq.scopes import Scope
from ckptq.validators import Code, Finding, error, expressions, has_errors, warning
from ckptq.validators.formats import BLOCK, SCALAR, Format, Granularity, fp8
from ckptq.validators.methods import Matcher, Settings, Treatment, as_json, exclude_list, is_names, spelled
from ckptq.validators.servers import Server
from ckptq.validators.vllm_rules import ServerLinear, packed_modules, server_name

_SOURCE = "vLLM 0.32.0 model_executor/layers/quantization/quark/quark.py QuarkConfig"
CODES = {
    "config.quark-section": Code("a part of Quark's section is absent or of another type than the server reads", _SOURCE),
    "config.quark-scheme": Code("a layer's settings for which the server has no scheme", _SOURCE + "._get_scheme_cls_from_config"),
    "config.quark-kv": Code("KV settings at which the server stops", _SOURCE + ".from_config"),
}
_GRANULARITIES: Mapping[Any, Granularity] = {"per_tensor": "tensor", "per_channel": "channel", "per_block": "block"}
_SHAPES: Mapping[Granularity, tuple[str, ...]] = {"tensor": SCALAR, "channel": ("n",), "block": ("nb kb",)}
# models/qwen2_5_vl.py packed_modules_mapping has this name as a shard of itself: _find_matched_config then passes layers' own
# settings over.
_SELF_PACKED = "qkv"
_MOST_MATCHES = 1_000_000
Config = Mapping[str, Any]


def check(section: Mapping[str, Any], file: str, server: Server) -> Iterator[Finding]:
    """Findings on the section."""
    parts = {"export": "with kv_cache_group", "global_quant_config": "with weight and input_tensors", "layer_type_quant_config": ""}
    if not server.quark_blocks or section.get("layer_quant_config") is not None:
        parts["layer_quant_config"] = "of names and settings"
    bad = [(key, what) for key, what in parts.items() if not isinstance(section.get(key), Mapping)]
    for key, what in bad:
        yield error(
            "config.quark-section", f"{file}.{key}", f"an object {what}".strip(), spelled(section, key), "vLLM raises",
            "write it as Quark does; layer_type_quant_config may be {}",
        )  # fmt: skip
    entries = section.get("exclude")
    if not is_names(entries):
        yield error(
            "config.quark-section", f"{file}.exclude", "a list of names", spelled(section, "exclude"),
            "vLLM raises, or searches the letters of a text", "write the names as a JSON list; [] where nothing is excluded",
        )  # fmt: skip
    if bad:
        return
    yield from expressions.check(exclude_list(section, "exclude"), f"{file}.exclude")
    yield from _kv_findings(section, file)
    if is_names(section["export"].get("kv_cache_group")):
        yield from _scheme_findings(section, file, server)


def _scheme_findings(section: Mapping[str, Any], file: str, server: Server) -> Iterator[Finding]:
    """On settings without a scheme. Those of some layers need not be any linear's; `matcher` refuses those that are."""
    normalized = _normalized(section)
    if (wanted := _wanted(normalized["global_quant_config"], server)) is not None:
        yield error(
            "config.quark-scheme", f"{file}.global_quant_config", wanted, as_json(normalized["global_quant_config"]),
            "vLLM finds no scheme and raises", "write the settings that the tensors are stored for",
        )  # fmt: skip
    for name, config in (normalized.get("layer_quant_config") or {}).items():
        if (wanted := _wanted(config, server)) is not None:
            yield warning(
                "config.quark-scheme", f"{file}.layer_quant_config.{name}", wanted, as_json(config),
                "vLLM raises where a linear has them", "write the settings that the tensors are stored for",
            )  # fmt: skip


def _kv_findings(section: Mapping[str, Any], file: str) -> Iterator[Finding]:
    """from_config: the settings under the names of kv_cache_group say how the cache is quantized, all alike."""
    group = section["export"].get("kv_cache_group")
    if not is_names(group):
        yield error(
            "config.quark-kv", f"{file}.export.kv_cache_group", "a list of names, [] without KV scales", as_json(group),
            "vLLM raises", "write the list",
        )  # fmt: skip
        return
    outputs = [config.get("output_tensors") for config in _kv_configs(section)]
    if group and (not outputs or any(output != outputs[0] for output in outputs) or not _kv_output(outputs[0])):
        yield error(
            "config.quark-kv", f"{file}.layer_quant_config",
            "for every name in kv_cache_group the same output_tensors: dtype fp8_e4m3, qscheme per_tensor",
            as_json(outputs), "vLLM raises", "write them, or empty kv_cache_group where no KV scale is stored",
        )  # fmt: skip


def _kv_output(output: Any) -> bool:
    return isinstance(output, Mapping) and (output.get("dtype"), output.get("qscheme")) == ("fp8_e4m3", "per_tensor")


def _kv_configs(section: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The layers' settings that kv_cache_group speaks of."""
    group, layers = section["export"]["kv_cache_group"], section.get("layer_quant_config") or {}
    if len(group) * len(layers) > _MOST_MATCHES:
        raise SourceError(f"kv_cache_group: {len(group)} names against {len(layers)} of layer_quant_config: too many to match")
    return [c for name, c in layers.items() if isinstance(c, Mapping) and any(fnmatchcase(name, g) for g in group)]  # type: ignore[misc]


def _normalized(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """The section after from_config: what it took for the KV cache is no setting of the linear any more."""
    found: dict[str, Any] = copy.deepcopy(dict(section))
    if not found["export"]["kv_cache_group"]:
        return found
    layers = found.get("layer_quant_config") or {}
    for config in (*_kv_configs(found), layers.get("*q_proj")):
        if isinstance(config, dict):
            config["output_tensors"] = None
    return found


def _wanted(config: Any, server: Server) -> str | None:
    """What is expected where vLLM finds no scheme for FP8; None where it does, and for formats that ckptq does not know."""
    if not isinstance(config, Mapping):
        return "an object with weight and input_tensors"
    if config.get("output_tensors") or config.get("bias"):
        return "output_tensors and bias null"
    weight, inputs = _tensors(config, server)
    if weight is not None and _other_format(weight):
        return None
    if not isinstance(weight, Mapping) or not isinstance(inputs, Mapping) or inputs.get("dtype") != "fp8_e4m3":
        return "weight and input_tensors of dtype fp8_e4m3"
    if weight.get("is_dynamic"):
        return "weights with is_dynamic false"
    if weight["qscheme"] == "per_block":
        wanted = {"is_dynamic": True, "qscheme": "per_group", "group_size": 128, "symmetric": True}
        known = weight.get("block_size") == list(BLOCK) and weight.get("symmetric") is True and server.quark_blocks
        dynamic = {**inputs, "is_dynamic": bool(inputs.get("is_dynamic"))}
        if not known or any(dynamic.get(key) != value for key, value in wanted.items()):
            return f"block_size [128, 128], symmetric true, and input_tensors {as_json(wanted)}"
    elif not inputs.get("is_dynamic") and inputs.get("qscheme") != "per_tensor":
        return "input_tensors that are dynamic, or have qscheme per_tensor"
    return None


def _tensors(config: Config, server: Server) -> tuple[Any, Any]:
    """(weight, input_tensors); a list of one counts as the one."""

    def one(value: Any) -> Any:
        return value[0] if isinstance(value, list) and len(value) == 1 and server.quark_blocks else value

    return one(config.get("weight")), one(config.get("input_tensors"))


def _other_format(weight: Any) -> bool:
    """Whether the weights are none of those that ckptq knows, which vLLM may serve all the same."""
    if not isinstance(weight, Mapping) or weight.get("dtype") != "fp8_e4m3" or weight.get("qscheme") not in (*_GRANULARITIES,):
        return True
    block = weight["qscheme"] == "per_block" and weight.get("block_size")
    return bool(block) and (block != list(BLOCK) or weight.get("scale_type") == "float8_e8m0fnu")


def read(section: Mapping[str, Any], file: str, server: Server) -> Settings | None:
    """The settings. Nothing in the section asks for an FP8 KV cache: only the server's --kv-cache-dtype does.

    Raises UnsupportedError where settings are not FP8 for weights and activations.
    """
    if has_errors(check(section, file, server)):
        return None
    _refuse_other_format(section["global_quant_config"], f"{file}.global_quant_config", server)
    scheme = _tensors(section["global_quant_config"], server)[0]["qscheme"]
    return Settings(file, "quark", scheme, exclude_list(section, "exclude"), "exclude", False, "", section, server)


def _refuse_other_format(config: Config, where: str, server: Server) -> None:
    """Raises UnsupportedError for weights that are not FP8 as ckptq knows it."""
    weight, _ = _tensors(config, server)
    if _other_format(weight):
        said = [weight.get(key) for key in ("dtype", "qscheme", "scale_type")] if isinstance(weight, Mapping) else weight
        raise UnsupportedError(
            f"{where}: weights {said!r:.80} can't be checked yet; what can: fp8_e4m3 per_tensor, per_channel, per_block",
            hint="`--load` asks the real vLLM, which loads faulty checkpoints, too",
        )


def matcher(settings: Settings, scope: Scope) -> Matcher:
    """Which linears are built quantized: all but lm_head and what the list holds, by whole name or expression.

    Settings of layer_type_quant_config never count: the server looks them up by a class, and JSON has texts alone. Raises
    UnsupportedError, then or when it is asked, where the weights of a linear are not FP8 as ckptq knows it.
    """
    packed, server, matches = packed_modules(scope), settings.server, expressions.matcher()
    exclude = [server_name(entry, scope) for entry in settings.exclude]
    configs = _finder(settings, scope, packed)

    def excluded(prefix: str, part: str) -> bool | None:
        inside = (e == prefix or e.startswith(f"{prefix}.") for e in exclude if not e.startswith("re:"))
        if part == "experts" and server.quark_expert_parts and any(inside):
            return True
        return expressions.ignored(prefix, exclude, matches, packed, server, fused=False)

    @functools.cache
    def of_prefix(prefix: str, part: str) -> Treatment:
        kept = excluded(prefix, part)
        config = None if kept is None else configs(prefix)
        if kept or config is None:
            return "kept" if kept else "refused"
        if _wanted(config, server) is not None:
            return "refused"
        _refuse_other_format(config, f"{settings.file}: the settings of {prefix}", server)
        return "refused" if part == "experts" and not _fits_experts(config, server) else _format(config, server)

    def treat(linear: ServerLinear) -> Treatment:
        return "kept" if linear.part == "head" else of_prefix(linear.prefix, linear.part)

    return treat


def _finder(settings: Settings, scope: Scope, packed: Mapping[str, tuple[str, ...]]) -> Callable[[str], Config | None]:
    """_find_matched_config: server's name -> settings; None where shards of one linear have different ones."""
    section = _normalized(settings.section)
    layers = {server_name(name, scope): c for name, c in (section.get("layer_quant_config") or {}).items()}
    otherwise: Config = section["global_quant_config"]

    def of_name(name: str) -> Config:
        # Without a star the pattern has to contain the name, not the name the pattern.
        return next((c for p, c in layers.items() if (fnmatchcase(name, p) if "*" in p else name in p)), otherwise)

    def find(prefix: str) -> Config | None:
        last = prefix.rpartition(".")[2]
        if last == _SELF_PACKED:
            return otherwise
        found = [of_name(prefix.replace(last, shard)) for shard in packed.get(last, (last,))]
        return found[0] if all(config == found[0] for config in found) else None

    return find


def _fits_experts(config: Config, server: Server) -> bool:
    """quark_moe.py QuarkW8A8Fp8MoEMethod: weights and activations of one granularity."""
    weight, inputs = _tensors(config, server)
    dynamic = bool(inputs.get("is_dynamic"))
    said = inputs.get("qscheme")
    of_inputs = said if (said == "per_channel" and dynamic) or not server.quark_blocks else "per_tensor"
    return bool(weight["qscheme"] == "per_block" or weight["qscheme"] == of_inputs)


def _format(config: Config, server: Server) -> Format:
    """schemes/quark_w8a8_fp8.py create_weights. A channel's scale is [n] here, not [n, 1]."""
    weight, inputs = _tensors(config, server)
    static, granularity = not inputs.get("is_dynamic"), _GRANULARITIES[weight["qscheme"]]
    name = f"Quark FP8, weight {granularity}, {'static' if static else 'dynamic'} activations"
    return fp8(name, granularity, _SHAPES[granularity], static=static, block=BLOCK if granularity == "block" else None)
