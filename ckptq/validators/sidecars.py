"""The files beside the weights, against the source's: config.json key by key, JSON by what it says, the rest by bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckptq import digest
from ckptq.checkpoint import Inventory
from ckptq.validators import Code, Finding, error, warning

CODES = {
    "passthrough.config": Code("config.json differs in more than quantization_config"),
    "passthrough.sidecar-missing": Code("a file of the source did not come along"),
    "passthrough.sidecar": Code("a file that came along, changed"),
}
GENERATED = ("hf_quant_config.json", "ckptq.json", "generation_config.json")
# Files that stand for one another: with one of a kind there, a server starts.
KINDS = (
    (
        "tokenizer.json",
        "tokenizer.model",
        "vocab.json",
        "merges.txt",
        "special_tokens_map.json",
        "added_tokens.json",
        "tekken.json",
    ),
    ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    ("chat_template.json", "chat_template.jinja"),
)
NEEDED = ("tokenizer.json", "tokenizer.model", "vocab.json", "preprocessor_config.json", "processor_config.json", "tekken.json")
"""Without these, or another of their kind, a server does not start."""
NOTES = ("transformers_version", "_name_or_path", "use_cache", "_attn_implementation_autoset")
"""Keys of config.json that change no answer: transformers writes them anew when it saves."""
DTYPES = ("torch_dtype", "dtype")
"""Two names of one key, which may be left out: vLLM then serves in the dtype of the weights."""


def check(output: Inventory, source: Inventory) -> Iterator[Finding]:
    """Findings on config.json and on the files that travel along. Raises OSError for one that can't be read."""
    yield from _config_findings(output.main.config, source.main.config)
    there = {*output.main.sidecars}
    for name in source.main.sidecars:
        if name in GENERATED or digest.is_document(name):
            continue
        if name not in there:
            kind = next((k for k in KINDS if name in k), ())
            if not there & set(kind):
                yield _missing(name)
        elif digest.of_files(output.root, [name]) != digest.of_files(source.root, [name]):
            yield warning(
                "passthrough.sidecar", name, "the source's file", "another content",
                "whoever serves it tokenizes, or prepares images, otherwise than the source does, if the difference matters",
                "copy the file from the source again",
            )  # fmt: skip


def _missing(name: str) -> Finding:
    needed = name in NEEDED
    return (error if needed else warning)(
        "passthrough.sidecar-missing", name, "the source's file", "absent",
        "vLLM does not start without one" if needed else "vLLM starts, and does without what it says", "copy it from the source",
    )  # fmt: skip


def _config_findings(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[Finding]:
    """A value that changed is an error. A key that came or went is a warning: transformers adds and drops defaults."""
    after, before = (_leaves({k: v for k, v in c.items() if k != "quantization_config"}) for c in (ours, theirs))
    for key in sorted(after.keys() | before.keys()):
        if key in after and key in before and after[key] == before[key]:
            continue
        leaf, both = key.rpartition(".")[2], key in after and key in before
        if leaf in NOTES or (leaf in DTYPES and not both):
            continue
        yield (error if both and leaf not in DTYPES else warning)(
            "passthrough.config", f"config.json: {key}", _shown(before, key), _shown(after, key),
            "vLLM builds the model from it: only quantization_config may be added", "take the rest of config.json over",
        )  # fmt: skip


def _shown(leaves: Mapping[str, Any], key: str) -> str:
    return f"{leaves[key]!r:.80}" if key in leaves else "absent"


def _leaves(config: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """{dotted key: value} of everything in nested objects that is no object itself; an empty one counts as a value."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= _leaves(value, f"{at}{key}.") if isinstance(value, Mapping) and value else {f"{at}{key}": value}
    return found
