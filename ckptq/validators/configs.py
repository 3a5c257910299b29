"""What the configuration files say, which of them the server believes, and files in the folder that lead it astray."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ckptq.checkpoint import INDEX, Component
from ckptq.scopes import Scope
from ckptq.validators import Code, Finding, Stored, error, warning

CODES = {
    "config.no-section": Code("neither file says that the checkpoint is quantized"),
    "config.quant-method": Code("quant_method is absent or not ModelOpt's"),
    "config.quant-algo": Code("quant_algo is absent or not FP8"),
    "config.exclude-list": Code("the exclude list is no list of names"),
    "config.kv-cache-scheme": Code("a KV scheme that the server does not take for FP8"),
    "config.section-missing": Code("config.json has no section: hf_quant_config.json alone counts"),
    "config.disagree": Code("the two files contradict each other"),
    "config.hf-quant-config": Code("hf_quant_config.json is absent"),
    "files.consolidated": Code("the server would load this file and nothing else"),
    "files.stray-safetensors": Code("the server would load this file too"),
    "files.weight-copy": Code("a further copy of the weights, never loaded"),
}

SECTION = "config.json: quantization_config"
OTHER = "hf_quant_config.json"
_NUMBERS = {"dynamic": False, "num_bits": 8, "type": "float"}


@dataclass(frozen=True, slots=True)
class Settings:
    """What the server reads from the file that counts. `kv_fp8`: the KV cache will be FP8 and wants scales."""

    file: str
    method: str
    algo: str
    exclude_modules: tuple[str, ...]
    kv_fp8: bool


def settings(stored: Stored, scope: Scope) -> Settings | None:
    """The settings in force, or None where nothing says that the checkpoint is quantized.

    config.json's own section wins, then hf_quant_config.json, then the section of the language model's config: vLLM 0.32.0
    transformers_utils/config.py get_config and model_arch_config_convertor.py get_quantization_config.
    """
    section = _mapping(stored.config.get("quantization_config"))
    if section is not None:
        return _read(section, SECTION)
    if stored.hf_quant_config is not None:
        return _read(stored.hf_quant_config, OTHER)
    inner = _mapping(scope.text(stored.config).get("quantization_config"))
    return _read(inner, f"config.json: {scope.text_config}.quantization_config") if inner is not None else None


def _read(section: Mapping[str, Any], file: str) -> Settings:
    body = _mapping(section.get("quantization"))
    flat = section if body is None else body
    method = str(section.get("quant_method") or "").lower()
    if not method and body is not None and (_mapping(section.get("producer")) or {}).get("name") == "modelopt":
        method = "modelopt"  # model_arch_config_convertor.py _normalize_quantization_config fills it in
    exclude = flat.get("ignore" if body is None else "exclude_modules", [])
    names = tuple(e for e in exclude if isinstance(e, str)) if isinstance(exclude, list) else ()
    return Settings(file, method, str(flat.get("quant_algo") or "").upper(), names, _kv_fp8(section, flat))


def _kv_fp8(section: Mapping[str, Any], flat: Mapping[str, Any]) -> bool:
    """utils/torch_utils.py get_kv_cache_quant_algo_string: the first that is not empty decides."""
    keys = ("kv_cache_scheme", "kv_cache_quant_algo")
    said = next((value for key in keys for value in (flat.get(key), section.get(key)) if value), None)
    if isinstance(said, Mapping):
        return said.get("dynamic") is False and said.get("num_bits") == 8 and said.get("type") == "float"
    return isinstance(said, str) and said.lower() == "fp8"


def _mapping(value: Any) -> Mapping[str, Any] | None:
    return value if isinstance(value, Mapping) else None


def check(stored: Stored, scope: Scope) -> Iterator[Finding]:
    """Findings on config.json and hf_quant_config.json."""
    found = settings(stored, scope)
    if found is None:
        yield error(
            "config.no-section", SECTION, "a section with quant_method and quant_algo", "neither it nor hf_quant_config.json",
            "the checkpoint is not quantized, or lost its section", "convert it, or put the section back",
        )  # fmt: skip
        return
    if found.method != "modelopt":
        yield error(
            "config.quant-method", f"{found.file}.quant_method", "'modelopt'", repr(found.method) if found.method else "absent",
            "vLLM would read the tensors by other rules, or as not quantized",
            "set quant_method to modelopt if ModelOpt's layout is what is stored; other layouts can't be checked yet",
        )  # fmt: skip
    if found.algo != "FP8":
        yield error(
            "config.quant-algo", f"{found.file}.quant_algo", "'FP8'", repr(found.algo) if found.algo else "absent",
            "vLLM would expect other tensors", "set it to FP8 if that is what is stored; other algorithms can't be checked yet",
        )  # fmt: skip
    if found.file != OTHER:
        yield from _section_findings(stored.config, found, scope)
    yield from _agreement(stored, found)


def checkable(found: Settings | None) -> bool:
    """Whether the settings are those that the layout rules know: ModelOpt's FP8, per tensor and static."""
    return found is not None and found.method == "modelopt" and found.algo == "FP8"


def _section_findings(config: Mapping[str, Any], found: Settings, scope: Scope) -> Iterator[Finding]:
    own = _mapping(config.get("quantization_config"))
    section = own if own is not None else scope.text(config)["quantization_config"]
    exclude = section.get("ignore", [])
    if not isinstance(exclude, list) or any(not isinstance(e, str) for e in exclude):
        yield error(
            "config.exclude-list",
            f"{found.file}.ignore",
            "a list of module names",
            repr(exclude),
            "vLLM raises, or reads no list",
            "write the names as a JSON list",
        )
    if "exclude_modules" in section and "ignore" not in section:
        yield error(
            "config.exclude-list", f"{found.file}.exclude_modules", "the key `ignore`", "the key `exclude_modules`",
            "inside config.json vLLM reads `ignore` alone; exclude_modules is hf_quant_config.json's word", "rename the key",
        )  # fmt: skip
    scheme = section.get("kv_cache_scheme")
    if scheme is not None and not found.kv_fp8:
        yield error(
            "config.kv-cache-scheme", f"{found.file}.kv_cache_scheme", repr(_NUMBERS), repr(scheme),
            "vLLM falls back to a cache in the model's dtype and leaves the scales unused", "write exactly these three keys",
        )  # fmt: skip


def _agreement(stored: Stored, found: Settings) -> Iterator[Finding]:
    if stored.hf_quant_config is None:
        yield warning(
            "config.hf-quant-config", OTHER, "the same settings in ModelOpt's own words", "absent",
            "vLLM 0.32 does without; older servers and TensorRT-LLM read it", "write it beside config.json",
        )  # fmt: skip
        return
    other = _read(stored.hf_quant_config, OTHER)
    if found.file == OTHER:
        yield warning(
            "config.section-missing", SECTION, "the section", f"absent; {OTHER} alone says that the checkpoint is quantized",
            "vLLM 0.32 reads that file then, other programs may not", "put the section into config.json",
        )  # fmt: skip
        return
    said = {
        "quant_algo": (found.algo, other.algo),
        "kv cache": ("FP8" if found.kv_fp8 else None, "FP8" if other.kv_fp8 else None),
        "exclude_modules": (sorted(set(found.exclude_modules)), sorted(set(other.exclude_modules))),
    }
    for key, (ours, theirs) in said.items():
        if ours != theirs:
            yield warning(
                "config.disagree", f"{OTHER}: {key}", f"{ours}, as in {found.file}", str(theirs),
                "vLLM 0.32 believes config.json, other programs the other file", "write the same in both",
        )  # fmt: skip


def check_files(folder: Path, component: Component) -> Iterator[Finding]:
    """Findings on files in the folder that hold, or name, other weights than the checkpoint's own.

    vLLM 0.32.0 model_executor/model_loader/default_loader.py _prepare_weights looks at the top level only: any
    `consolidated*.safetensors` there wins; without an index every *.safetensors is loaded, one over the other.
    """
    indexed = (folder / component.folder / INDEX).is_file()
    for name in component.left_out:
        top = "/" not in name
        if top and fnmatchcase(name, "consolidated*.safetensors"):
            yield error(
                "files.consolidated", name, "no consolidated*.safetensors in the folder", "there is one",
                "vLLM would load this file alone, as a Mistral checkpoint", "remove it",
            )  # fmt: skip
        elif top and name.endswith(".safetensors") and not indexed:
            yield error(
                "files.stray-safetensors", name, f"{component.weight_files[0]} alone, or an index", "a further safetensors file",
                "without an index vLLM loads every *.safetensors, and one tensor silently replaces another", "remove it",
            )  # fmt: skip
        else:
            yield warning(
                "files.weight-copy", name, "the weights once", "a further copy or index of weights",
                "vLLM does not load it, whoever fetches the folder pays for it", "remove it",
        )  # fmt: skip
