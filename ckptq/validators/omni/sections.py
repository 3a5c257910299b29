"""`quantization_config` in a denoiser's config.json, as vLLM-Omni's factory reads it.

Its rules are not vLLM's: a method that is none of ModelOpt's is built from the section's keys as they stand, and ModelOpt's are
chosen by quant_algo. hf_quant_config.json is never read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ckptq.errors import UnsupportedError
from ckptq.validators import Code, Finding, error, formats, warning
from ckptq.validators.configs import UNCHECKED
from ckptq.validators.formats import Format
from ckptq.validators.methods import as_json, is_names, spelled
from ckptq.validators.omni.server import OMNI

_FACTORY = f"{OMNI} quantization/factory.py"
CODES = {
    "config.omni-method": Code(
        "quant_method is absent, or none that vLLM-Omni builds for a denoiser",
        f"{_FACTORY} build_quant_config, _build_single",
    ),
    "config.omni-algo": Code(
        "ModelOpt's quant_algo is absent, or none that vLLM-Omni takes for a denoiser", f"{_FACTORY} _detect_modelopt_method"
    ),
    "config.omni-key": Code(
        "a key that the method's class in vLLM-Omni does not have", f"{_FACTORY} _build_single, quantization/int8_config.py"
    ),
    "config.omni-value": Code(
        "a value that the method's class in vLLM-Omni refuses",
        "vLLM 0.32.0 model_executor/layers/quantization/fp8.py Fp8Config, modelopt.py ModelOptQuantConfigBase.from_config",
    ),
    "config.omni-list": Code(
        "the list of what stays has a key that is not read, or is no list of names",
        "vLLM 0.32.0 model_executor/layers/quantization/modelopt.py ModelOptQuantConfigBase.from_config",
    ),
    "config.omni-online": Code(
        "codes are stored, and the section asks to quantize while loading",
        f"{OMNI} quantization/int8_config.py DiffusionInt8Config",
    ),
    "config.omni-option": Code("what the server has to be started with", f"{_FACTORY} resolve_quant_config_from_disk"),
    "config.omni-no-section": Code(
        "codes are stored, and config.json does not say so", f"{OMNI} diffusion/data.py TransformerConfig.from_dict"
    ),
}
_UNCHECKED = frozenset((*UNCHECKED, "mxfp4", "svdquant", "auto_round", "torchao_float8_weight_only"))
"""Methods that vLLM-Omni builds and ckptq does not know."""
_INT8 = Format("Int8", "channel", (formats.Scales("weight_scale", ("n 1",)),), codes="I8")
_MXFP8 = Format(
    "MXFP8", "group", (formats.Scales("weight_scale", ("n kb",), "U8"),), block=(1, formats.MX_GROUP), whole_columns=True
)  # fmt: skip
_DUALSCALE = dataclasses.replace(_MXFP8, name="MXFP4 under two scales")
_ALGOS: Mapping[str, Format] = {"FP8": formats.MODELOPT_FP8, "FP8_PER_CHANNEL_PER_TOKEN": formats.MODELOPT_PER_CHANNEL}


@dataclass(frozen=True, slots=True)
class Also:
    """A scale that no `Format` has. The server raises where it is not stored."""

    kind: str
    shape: Callable[[int, int], tuple[int, ...]]
    """Of a weight [n, k]."""


_ALSO: Mapping[str, tuple[Also, ...]] = {
    "mxfp4_dualscale": (Also("weight_dual_scale", lambda n, k: (n, -(-k // 512), 1)), Also("mul_scale", lambda n, k: (k,)))
}


@dataclass(frozen=True, slots=True)
class Section:
    """What vLLM-Omni reads from the section.

    file     where it lies, for messages
    method   modelopt, fp8, int8, mxfp8 or mxfp4_dualscale
    form     how every linear is stored that the list doesn't keep
    key      the name of the list
    entries  what is on it
    """

    file: str
    method: str
    form: Format
    key: str
    entries: tuple[str, ...]

    @property
    def also(self) -> tuple[Also, ...]:
        """Scales beside the format's own."""
        return _ALSO.get(self.method, ())


def section_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The section that counts; None where vLLM-Omni sees none."""
    found = config.get("quantization_config")
    return found if isinstance(found, Mapping) else None


def no_section(file: str) -> Finding:
    """For codes without a section."""
    return error(
        "config.omni-no-section", file, "a section with quant_method: codes or scales are stored", "absent",
        "vLLM-Omni takes the codes for values, silently, or raises at the first scale; it reads no hf_quant_config.json",
        "convert it, or put the section back that it lost",
    )  # fmt: skip


def read(section: Mapping[str, Any], file: str) -> tuple[Section | None, list[Finding]]:
    """(the section as read, or None where the server stops at it; findings).

    Raises UnsupportedError for a method that vLLM-Omni serves and ckptq does not know.
    """
    said = section.get("method", section.get("quant_method"))
    method = "" if said is None else str(said).lower().replace("-", "_")
    producer = section.get("producer")
    named = isinstance(producer, Mapping) and str(producer.get("name", "")).lower() == "modelopt"
    if named or method in ("modelopt", "modelopt_fp4", "modelopt_mixed"):
        return _modelopt(section, file)
    if method in {name.replace("-", "_") for name in _UNCHECKED} and method not in _READ:
        raise UnsupportedError(
            f"{file}.quant_method {method}: not checked by ckptq; what can be: modelopt, {', '.join(_READ)}",
            hint="vLLM-Omni loads faulty checkpoints without a word: compare its images with the unquantized pipeline's",
        )
    if method not in _READ:
        return None, [
            error(
                "config.omni-method", f"{file}.quant_method", f"modelopt or {' or '.join(_READ)}", spelled(section, "quant_method"),
                f"{OMNI} raises: it builds no such method for a denoiser, whatever vLLM does with it in language models",
                "write the method whose tensors are stored; compressed-tensors and blocks of ModelOpt have to be converted again",
            )
        ]  # fmt: skip
    return _READ[method](section, file)


def _modelopt(section: Mapping[str, Any], file: str) -> tuple[Section | None, list[Finding]]:
    """from_config of vLLM's own class reads it, once the factory has let it pass."""
    inner = section.get("quantization")
    nested = "quantization" in section
    body: Mapping[str, Any] = inner if isinstance(inner, Mapping) else {} if nested else section
    algo = str(body.get("quant_algo") or "").upper()
    if algo in ("NVFP4", "MIXED_PRECISION"):
        raise UnsupportedError(
            f"{file}.quant_algo {algo}: not checked by ckptq in a pipeline; what can be: {', '.join(_ALGOS)}",
            hint="compare the server's images with the unquantized pipeline's",
        )
    if algo not in _ALGOS:
        return None, [
            error(
                "config.omni-algo", f"{file}.quant_algo", " or ".join(_ALGOS), spelled(body, "quant_algo"),
                f"{OMNI} raises: it takes fewer algorithms than vLLM does for language models",
                "quantize it in one of these",
            )
        ]  # fmt: skip
    key = "exclude_modules" if nested else "ignore"
    entries = body.get(key, [])
    findings = list(_list(entries, f"{file}.{key}"))
    if not nested and "exclude_modules" in section:
        found = error if "ignore" not in section else warning
        findings.append(
            found(
                "config.omni-list", f"{file}.exclude_modules", "the key `ignore`", "the key `exclude_modules`",
                "vLLM-Omni passes it over: beside quant_algo it reads `ignore` alone", "rename the key",
            )
        )  # fmt: skip
    if nested and not isinstance(body.get("kv_cache_quant_algo", None), str | None):
        findings.append(_value(f"{file}.kv_cache_quant_algo", "null: a denoiser has no KV cache", body["kv_cache_quant_algo"]))
    stops = any(f.severity == "error" and (f.code != "config.omni-list" or f.found.startswith("not")) for f in findings)
    if stops or not is_names(entries):
        return None, findings
    return Section(file, "modelopt", _ALGOS[algo], key, tuple(entries)), findings


def _fp8(section: Mapping[str, Any], file: str) -> tuple[Section | None, list[Finding]]:
    keys = ("is_checkpoint_fp8_serialized", "activation_scheme", "ignored_layers", "weight_block_size", "store_dtype")
    findings = list(_keys(section, file, keys))
    scheme, block = section.get("activation_scheme", "dynamic"), section.get("weight_block_size")
    if scheme not in ("static", "dynamic"):
        findings.append(_value(f"{file}.activation_scheme", '"static" or "dynamic"', scheme))
    if not section.get("is_checkpoint_fp8_serialized", True):
        findings.append(_value(f"{file}.is_checkpoint_fp8_serialized", "true, or no such key", False))
    pair = isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
    if block is not None and (not pair or scheme == "static"):
        findings.append(_value(f"{file}.weight_block_size", "[rows, columns], with dynamic activations", block))
    form = formats.NATIVE_STATIC if scheme == "static" else formats.NATIVE_DYNAMIC
    if pair:
        form = formats.native_block((block[0], block[1]))  # type: ignore[index]
    return _listed(section, file, "fp8", form, findings)


def _int8(section: Mapping[str, Any], file: str) -> tuple[Section | None, list[Finding]]:
    findings = list(_keys(section, file, ("is_checkpoint_int8_serialized", "activation_scheme", "ignored_layers")))
    if section.get("activation_scheme", "dynamic") != "dynamic":
        findings.append(_value(f"{file}.activation_scheme", '"dynamic"', section["activation_scheme"]))
    findings += _serialized(section, file, "is_checkpoint_int8_serialized")
    return _listed(section, file, "int8", _INT8, findings)


def _mxfp8(section: Mapping[str, Any], file: str) -> tuple[Section | None, list[Finding]]:
    findings = list(_keys(section, file, ("is_checkpoint_mxfp8_serialized", "ignored_layers")))
    findings += _serialized(section, file, "is_checkpoint_mxfp8_serialized")
    return _listed(section, file, "mxfp8", _MXFP8, findings)


def _dualscale(section: Mapping[str, Any], file: str) -> tuple[Section | None, list[Finding]]:
    keys = ("is_checkpoint_serialized", "ignored_layers", "num_bf16_fallback_layers", "w4a8_fallback_steps", "w4a8_fallback_layers")
    findings = [*_keys(section, file, keys), *_serialized(section, file, keys[0])]
    for key in keys[3:]:
        if section.get(key):
            findings.append(_value(f"{file}.{key}", "no such key: there is no such fallback under two scales", section[key]))
    return _listed(section, file, "mxfp4_dualscale", _DUALSCALE, findings)


_READ: Mapping[str, Callable[[Mapping[str, Any], str], tuple[Section | None, list[Finding]]]] = {
    "fp8": _fp8, "int8": _int8, "mxfp8": _mxfp8, "mxfp4_dualscale": _dualscale,
}  # fmt: skip


def _listed(
    section: Mapping[str, Any], file: str, method: str, form: Format, findings: list[Finding]
) -> tuple[Section | None, list[Finding]]:
    """A method that is built from the keys as they stand: any fault among them makes it raise."""
    entries = section.get("ignored_layers") or []
    if isinstance(entries, str):
        findings = [*findings, _text(entries, f"{file}.ignored_layers")]
        entries = []
    findings = [*findings, *_list(entries, f"{file}.ignored_layers")]
    if any(f.severity == "error" for f in findings):
        return None, findings
    return Section(file, method, form, "ignored_layers", tuple(entries)), findings


def _keys(section: Mapping[str, Any], file: str, known: tuple[str, ...]) -> Iterator[Finding]:
    for key in section:
        if key not in (*known, "quant_method", "method"):
            yield error(
                "config.omni-key", f"{file}.{key}", "the keys " + ", ".join(known), f"the key {key}",
                f"{OMNI} raises: it hands every key to the method's class, which has none of that name",
                "name what stays in ignored_layers" if key == "modules_to_not_convert" else "remove the key",
            )  # fmt: skip


def _value(subject: str, expected: str, found: Any) -> Finding:
    return error("config.omni-value", subject, expected, as_json(found), f"{OMNI} raises", "write it so")


def _serialized(section: Mapping[str, Any], file: str, key: str) -> Iterator[Finding]:
    if section.get(key) is not True:
        yield error(
            "config.omni-online", f"{file}.{key}", "true: codes are stored", spelled(section, key),
            "vLLM-Omni takes the codes for unquantized weights and quantizes them once more while it loads, silently",
            "write true",
        )  # fmt: skip


def _text(entries: str, subject: str) -> Finding:
    return warning(
        "config.omni-list", subject, "a list of names", as_json(entries), "vLLM-Omni looks for each whole name inside this text",
        "write the names as a JSON list",
    )  # fmt: skip


def _list(entries: Any, subject: str) -> Iterator[Finding]:
    if not is_names(entries):
        yield error(
            "config.omni-list", subject, "a list of names", f"not one: {as_json(entries)}", f"{OMNI} raises, or matches letters",
            "write the names as a JSON list",
        )  # fmt: skip
