"""What the configuration files say of quantization, and which of them the server believes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckptq.checkpoint import FLOATS
from ckptq.errors import SourceError, UnsupportedError
from ckptq.scopes import Scope
from ckptq.validators import Code, Finding, Stored, error, mixed, warning
from ckptq.validators.formats import SCALE_KINDS
from ckptq.validators.kv import KV_KINDS
from ckptq.validators.methods import MIXED, Method, Settings, as_json, compressed_tensors, find_method, known
from ckptq.validators.servers import Server

_NORMALIZE = "vLLM 0.32.0 transformers_utils/model_arch_config_convertor.py _normalize_quantization_config"
_GET = "vLLM 0.32.0 transformers_utils/config.py get_config"
CODES = {
    "config.no-section": Code("neither file says that the checkpoint is quantized", _GET),
    "config.quant-method": Code("quant_method is absent, or none that the server knows", _NORMALIZE),
    "config.section-missing": Code("config.json has no section: hf_quant_config.json alone counts", _GET),
    "config.disagree": Code("the two files contradict each other", _GET),
    "config.hf-quant-config": Code("hf_quant_config.json is absent or unreadable"),
}

SECTION = "config.json: quantization_config"
OTHER = "hf_quant_config.json"
_MOST, _LONGEST = 200_000, 4096
"""Values in a section, and characters of each."""
# What methods/ lacks of QuantizationMethods in vLLM 0.20 to 0.33 model_executor/layers/quantization/__init__.py, and what
# inc.py INCConfig.override_quantization_method takes for its own.
UNCHECKED = frozenset(
    (
        "auto-round", "auto_awq", "auto_gptq", "awq", "awq_marlin", "bitsandbytes", "cpu_awq", "deepseek_v4_fp8", "experts_int8",
        "fbgemm_fp8", "fp8_per_block", "fp8_per_channel", "fp8_per_tensor", "fp_quant", "gguf", "gpt_oss_mxfp4", "gptq",
        "gptq_marlin", "humming", "inc", "int8_per_channel_weight_only", "moe_wna16", "mxfp4", "mxfp8", "nvfp4_per_token",
        "online", "torchao",
    )
)  # fmt: skip
"""Values of quant_method that vLLM knows and ckptq does not."""
MODELOPT = ("modelopt", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed")
"""Values of quant_method of which ModelOpt's quant_algo chooses one, whichever is written."""


def read(stored: Stored, scope: Scope, server: Server) -> tuple[Settings | None, list[Finding]]:
    """(the settings in force or None where none can be read, findings on config.json and hf_quant_config.json).

    Raises UnsupportedError where nothing is quantized, and for a method or number format that vLLM serves and ckptq does not know.
    """
    found = _section(stored, scope)
    if found is None:
        _refuse_unquantized(stored)
        return None, [
            error(
                "config.no-section",
                SECTION,
                "a section with quant_method: tensors are stored quantized",
                "neither it nor hf_quant_config.json",
                "vLLM takes the checkpoint for unquantized, and stops at the first scale",
                "convert it, or put the section back that it lost",
            )
        ]
    section, file = found
    _refuse_large(section, file)
    name, method = _method(section, file)
    apart = _layers_apart(section, file, name, stored, server)
    if apart is not None:
        section, file = apart, OTHER
        _refuse_large(section, file)
    if method is None:
        return None, [
            error(
                "config.quant-method",
                f"{file}.quant_method",
                " or ".join(known()),
                as_json(name) if name else "absent",
                "vLLM raises at a name it does not know; without one it takes the checkpoint for unquantized",
                "set it to the method whose tensors are stored",
            )
        ]
    findings = list(method.check(section, file, server))
    if (denied := _denied(section, file, name, stored, server)) is not None:
        return None, [*findings, denied]
    settings = method.read(section, file, server)
    if name == "modelopt" and settings is not None and apart is None:
        findings += _agreement(stored, settings)
    return settings, findings


def _layers_apart(section: Mapping[str, Any], file: str, name: str, stored: Stored, server: Server) -> Mapping[str, Any] | None:
    """hf_quant_config.json in place of a section of MIXED_PRECISION without quantized_layers; None where the section counts.

    vLLM 0.32.0 model_executor/model_loader/weight_utils.py get_quant_config. The section has chosen the method by then, whatever
    algorithm the file names, and the cache's dtype goes by the section all the same.
    """
    other, body = stored.hf_quant_config, _mapping(section.get("quantization")) or section
    if name != "modelopt" or file == OTHER or other is None or "quantized_layers" in section or mixed.algo_of(body) != MIXED:
        return None
    inner = _mapping(other.get("quantization"))
    found = dict(other if inner is None else inner)
    found |= {key: section.get(key) for key in ("kv_cache_scheme", "kv_cache_quant_algo")}
    if mixed.algo_of(found) in server.algos:
        found["quant_algo"] = MIXED
    return found if inner is None else {"quantization": found}


def _refuse_unquantized(stored: Stored) -> None:
    """Raises UnsupportedError for a checkpoint that neither says nor shows that it is quantized."""
    scales = (*SCALE_KINDS, *KV_KINDS)
    if not any(n.endswith(scales) or (n.endswith("weight") and s.dtype not in FLOATS) for n, s in stored.tensors.items()):
        raise UnsupportedError(
            "not a quantized checkpoint: no quantization_config, no quantized weight, no scale; vLLM serves it as it is",
            hint="`ckptq convert` quantizes it",
        )


def _denied(section: Mapping[str, Any], file: str, name: str, stored: Stored, server: Server) -> Finding | None:
    """The finding for stored FP8 weights where the section speaks of none."""
    fp8 = any(spec.dtype == "F8_E4M3" for tensor, spec in stored.tensors.items() if tensor.endswith(".weight"))
    return compressed_tensors.denied(section, file, server) if fp8 and name == "compressed-tensors" else None


def _refuse_large(section: Mapping[str, Any], file: str) -> None:
    """Raises SourceError where matching the section's names would take hours. Real ones have some thousands, one for a module."""
    inside: list[Any] = [section]
    count = 0
    while inside:
        level = [v for outer in inside for v in (outer.values() if isinstance(outer, Mapping) else outer)]
        keys = [key for outer in inside if isinstance(outer, Mapping) for key in outer]
        if any(isinstance(v, str) and len(v) > _LONGEST for v in (*keys, *level)):
            raise SourceError(f"{file}: expected texts of at most {_LONGEST} characters, found a longer one")
        count += len(level)
        inside = [v for v in level if isinstance(v, (Mapping, list))]
        if count > _MOST:
            raise SourceError(f"{file}: expected at most {_MOST} values, found more")


def _method(section: Mapping[str, Any], file: str) -> tuple[str, Method | None]:
    """(quant_method, its module). Raises UnsupportedError for one that vLLM serves and ckptq does not know."""
    name = _method_name(section)
    if name in UNCHECKED:
        raise UnsupportedError(
            f"{file}: quant_method {name} can't be checked yet; what can: {', '.join(known())}",
            hint="`--load` asks the real vLLM, which loads faulty checkpoints, too",
        )
    return name, find_method(name)


def _section(stored: Stored, scope: Scope) -> tuple[Mapping[str, Any], str] | None:
    """(section, where it lies): config.json's own, then hf_quant_config.json, then the language model's own config.

    vLLM 0.32.0 transformers_utils/config.py get_config and model_arch_config_convertor.py get_quantization_config.
    """
    own = _mapping(stored.config.get("quantization_config"))
    if own is not None:
        return _with_layers(own, stored.hf_quant_config), SECTION
    if stored.hf_quant_config is not None:
        return stored.hf_quant_config, OTHER
    old = _mapping(stored.config.get("compression_config"))
    if old is not None:
        return old, "config.json: compression_config"
    inner = _mapping(scope.text(stored.config).get("quantization_config"))
    return (inner, f"config.json: {scope.text_config}.quantization_config") if inner is not None else None


def _with_layers(own: Mapping[str, Any], other: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Of a mixed checkpoint whose section has no quantized_layers: the lists of hf_quant_config.json, where that has it.

    vLLM 0.32.0 model_executor/model_loader/weight_utils.py get_quant_config. Its algorithm and its KV cache stay the section's.
    """
    body = _mapping((other or {}).get("quantization"))
    if mixed.algo_of(own) != MIXED or "quantized_layers" in own or body is None or "quantized_layers" not in body:
        return own
    size = {"group_size": body["group_size"]} if "group_size" in body else {}
    return {**own, "quantized_layers": body["quantized_layers"], "ignore": body.get("exclude_modules", []), **size}


def _method_name(section: Mapping[str, Any]) -> str:
    """quant_method as the server normalizes it: in small letters, and filled in for ModelOpt's nested form."""
    inner = _mapping(section.get("quantization"))
    producer = (_mapping(section.get("producer")) or {}).get("name")
    algo = str((section if inner is None else inner).get("quant_algo") or "").upper()
    if inner is not None and algo and (producer == "modelopt" or "modelopt_quant_config" in inner):
        return "modelopt"
    name = str(section.get("quant_method") or "").lower().replace("compressed_tensors", "compressed-tensors")
    if name == "modelopt_mxfp8" and inner is None and not algo:
        return "mxfp8"
    # modelopt.py override_quantization_method: of ModelOpt's methods these algorithms choose one, whatever its name says.
    chooses = algo in ("FP8", MIXED) or "FP4" in algo or "MXFP8" in algo
    return "modelopt" if name.startswith("modelopt") and chooses else name


def _mapping(value: Any) -> Mapping[str, Any] | None:
    return value if isinstance(value, Mapping) else None


def _agreement(stored: Stored, found: Settings) -> Iterator[Finding]:
    """ModelOpt's two files against each other."""
    if stored.hf_quant_config is None:
        yield warning(
            "config.hf-quant-config", OTHER, "the same settings in ModelOpt's own words", stored.unreadable or "absent",
            "vLLM 0.32 does without; older servers and TensorRT-LLM read it", "write it beside config.json",
        )  # fmt: skip
        return
    if found.file == OTHER:
        yield warning(
            "config.section-missing", SECTION, "the section", f"absent; {OTHER} alone says that the checkpoint is quantized",
            "vLLM 0.32 reads that file then, other programs may not", "put the section into config.json",
        )  # fmt: skip
        return
    said, own = _words(stored.hf_quant_config), _mapping(found.section.get("quantization")) or found.section
    ours = {
        "quant_algo": mixed.algo_of(own),
        "kv_cache_quant_algo": "FP8" if found.kv_fp8 else None,
        "exclude_modules": sorted(set(found.exclude)),
        "quantized_layers": _each(own),
    }
    for key, value in ours.items():
        if value != said[key]:
            yield warning(
                "config.disagree", f"{OTHER}: {key}", f"{as_json(value)}, as in {found.file}", as_json(said[key]),
                "vLLM 0.32 believes config.json, other programs the other file", "write the same in both",
            )  # fmt: skip


def _words(other: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that hf_quant_config.json names, whatever their types."""
    body = _mapping(other.get("quantization")) or other
    kv = body.get("kv_cache_quant_algo")
    exclude = body.get("exclude_modules", [])
    return {
        "quant_algo": mixed.algo_of(body),
        "kv_cache_quant_algo": kv.upper() if isinstance(kv, str) else None,
        "exclude_modules": sorted({str(e) for e in exclude}) if isinstance(exclude, list) else exclude,
        "quantized_layers": _each(body),
    }


def _each(body: Mapping[str, Any]) -> dict[str, str]:
    """Each linear's algorithm in a mixed checkpoint."""
    return {name: mixed.algo_of(layer) for name, layer in mixed.layers(body).items()} if mixed.algo_of(body) == MIXED else {}
