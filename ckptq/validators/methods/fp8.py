"""`quant_method: fp8`, vLLM's own: per tensor with static or dynamic activations, or in blocks (weight_scale_inv).

Read in vLLM 0.32.0 model_executor/layers/quantization/fp8.py Fp8Config and utils/quant_utils.py is_layer_skipped.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from ckptq.scopes import Scope
from ckptq.validators import Code, Finding, error, has_errors, warning
from ckptq.validators.formats import NATIVE_DYNAMIC, NATIVE_STATIC, Format, native_block
from ckptq.validators.methods import Matcher, Settings, Treatment, as_json, exclude_list, is_names, spelled
from ckptq.validators.methods.modelopt import exactly_skipped
from ckptq.validators.servers import Server
from ckptq.validators.vllm_rules import ServerLinear, packed_modules, server_name

_SOURCE = "vLLM 0.32.0 model_executor/layers/quantization/fp8.py Fp8Config"
CODES = {
    "config.activation-scheme": Code("activation_scheme is absent, or none that the server knows", _SOURCE),
    "config.block-size": Code("weight_block_size is no pair of sizes, or comes with static activations", _SOURCE),
    "config.ignored-layers": Code("the list is no list of names, or is not the one that counts", _SOURCE),
}


def check(section: Mapping[str, Any], file: str, server: Server) -> Iterator[Finding]:
    """Findings on the section."""
    scheme, block = section.get("activation_scheme"), section.get("weight_block_size")
    if scheme not in ("static", "dynamic"):
        yield error(
            "config.activation-scheme", f"{file}.activation_scheme", '"static" or "dynamic"', spelled(section, "activation_scheme"),
            "vLLM raises", "say whether the checkpoint holds an input_scale for each linear (static) or none (dynamic)",
        )  # fmt: skip
    if block is not None and not _is_pair(block):
        yield error(
            "config.block-size", f"{file}.weight_block_size", "two positive integers, [rows, columns]", as_json(block),
            "vLLM raises", "write [128, 128], or remove the key where the scales are per tensor",
        )  # fmt: skip
    elif block is not None and scheme == "static":
        yield error(
            "config.block-size", f"{file}.weight_block_size", "activation_scheme dynamic beside it", "static",
            "vLLM raises: it has no kernel for blocks with static activations", "set activation_scheme to dynamic",
        )  # fmt: skip
    for key in ("ignored_layers", "modules_to_not_convert"):
        entries = section.get(key) or []
        if not is_names(entries):
            yield error(
                "config.ignored-layers", f"{file}.{key}", "a list of module names", spelled(section, key),
                "vLLM raises, or searches the letters of a text", "write the names as a JSON list",
            )  # fmt: skip
    if section.get("ignored_layers") and section.get("modules_to_not_convert"):
        yield warning(
            "config.ignored-layers", f"{file}.modules_to_not_convert", "one of the two lists", "ignored_layers, too",
            "vLLM reads ignored_layers alone; transformers reads modules_to_not_convert", "write the same names in both",
        )  # fmt: skip


def _is_pair(block: Any) -> bool:
    return isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)


def read(section: Mapping[str, Any], file: str, server: Server) -> Settings | None:
    """The settings. Nothing in the section can ask for an FP8 KV cache: only the server's --kv-cache-dtype does."""
    if has_errors(check(section, file, server)):
        return None
    key = "ignored_layers" if section.get("ignored_layers") else "modules_to_not_convert"
    form = "block" if section.get("weight_block_size") else str(section.get("activation_scheme"))
    return Settings(file, "fp8", form, exclude_list(section, key), key, False, "", section, server)


def matcher(settings: Settings, scope: Scope) -> Matcher:
    """Every linear but lm_head is quantized, unless the list holds its exact name: no glob, no substring, no parent."""
    names = tuple(server_name(name, scope) for name in settings.exclude)
    packed, form = packed_modules(scope), _format(settings)

    @functools.cache
    def of_prefix(prefix: str) -> Treatment:
        skipped = exactly_skipped(prefix, names, packed, settings.server)
        return "refused" if skipped is None else "kept" if skipped else form

    def treat(linear: ServerLinear) -> Treatment:
        return "kept" if linear.part == "head" else of_prefix(linear.prefix)

    return treat


def _format(settings: Settings) -> Format:
    if settings.format == "block":
        rows, columns = settings.section["weight_block_size"]
        return native_block((rows, columns))
    return NATIVE_STATIC if settings.format == "static" else NATIVE_DYNAMIC
