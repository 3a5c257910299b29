"""The dtype in which the server will serve what is not quantized, against the dtype in which that is stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from ckptq.scopes import Scope
from ckptq.validators import Code, Finding, Stored, error, warning
from ckptq.validators.expected import Expected

CODES = {
    "config.dtype": Code(
        "config.json declares another dtype than the unquantized weights have",
        "vLLM 0.32.0 transformers_utils/model_arch_config_convertor.py get_torch_dtype; config/model.py _resolve_auto_dtype",
    ),
    "config.dtype-refused": Code(
        "config.json declares a dtype that the server does not run this method in",
        "vLLM 0.32.0 config/vllm.py VllmConfig._get_quantization_config",
    ),
}
_STORED = {"float16": "F16", "bfloat16": "BF16"}
_EFFECT = {
    "float16": "vLLM serves the model in float16: weights and activations beyond 65,504 become infinite",
    "bfloat16": "vLLM rounds them to bfloat16, to 8 bits from 11",
}


def check(at: Expected, stored: Stored) -> Iterator[Finding]:
    """A finding where most unquantized weights are BF16 and are served as F16, or the other way around. F32 is served as either."""
    declared = served_dtype(stored.config, at.scope)
    if declared in _STORED and declared not in at.settings.dtypes:
        yield error(
            "config.dtype-refused", "config.json: dtype", " or ".join(sorted(at.settings.dtypes)), declared,
            f"vLLM refuses to start: it runs {at.settings.format} in no other dtype",
            "declare bfloat16, which rounds what is not quantized, or quantize in another format",
        )  # fmt: skip
    own = _STORED.get(declared)
    kept = Counter(spec.dtype for name in at.parameters if (spec := at.tensors.get(name)) and spec.dtype in _STORED.values())
    if own and kept and (most := kept.most_common(1)[0][0]) != own:
        say = error if declared == "float16" else warning
        yield say(
            "config.dtype", "config.json: dtype", "bfloat16" if most == "BF16" else "float16", declared, _EFFECT[declared],
            "declare the dtype that the weights are stored in",
        )  # fmt: skip


def served_dtype(config: Mapping[str, Any], scope: Scope) -> str:
    """What config.json declares, "" for nothing. The first that says it: the whole, the language model, the vision tower."""
    for part in (config, scope.text(config), config.get("vision_config")):
        said = (part.get("dtype") or part.get("torch_dtype")) if isinstance(part, Mapping) else None
        if isinstance(said, str):
            return said.removeprefix("torch.")
    return ""
