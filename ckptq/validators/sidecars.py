"""The files beside the weights, against the source's: config.json key by key, JSON by what it says, the rest by bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ckptq import digest
from ckptq.checkpoint import Inventory
from ckptq.scopes import Scope
from ckptq.validators import Code, Finding, error, warning

CODES = {
    "passthrough.source": Code("what --source names is another model"),
    "passthrough.config": Code("config.json differs in more than quantization_config"),
    "passthrough.sidecar-missing": Code("a file of the source did not come along"),
    "passthrough.sidecar": Code("a file that came along, changed"),
}
GENERATED = ("hf_quant_config.json", "ckptq.json", "generation_config.json")
# Files that stand for one another, and those that are of no use beside one of them. What a folder lacks, transformers takes from
# another of its kind, and writes some anew under another name when it saves.
KINDS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("tokenizer.json", "tokenizer.model", "tekken.json"),
        ("vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    ),
    (("preprocessor_config.json", "processor_config.json"), ("video_preprocessor_config.json",)),
    (("chat_template.jinja", "chat_template.json"), ()),
)
NEEDED = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "preprocessor_config.json", "processor_config.json")
"""Without these, or another of their kind, a server does not start."""
NOTES = re.compile(
    r"transformers_version|_name_or_path|use_cache|initializer_range|.*_dropout|output_.*|.*_loss_coef|_attn_implementation.*"
)
"""Keys of config.json that change no answer of a server: they are about training, or about who saved the file."""
ALIASES = {"torch_dtype": "dtype", "num_local_experts": "num_experts"}
"""Keys that transformers 5 writes under another name than 4: configuration_utils.py attribute_map."""
_LONGEST = 80


def check(output: Inventory, source: Inventory) -> Iterator[Finding]:
    """Findings on config.json and on the files that travel along. Raises OSError for one that can't be read."""
    yield from check_config(output.main.config, source.main.config)
    there = {*output.main.sidecars}
    for name in source.main.sidecars:
        if name in GENERATED or digest.is_document(name):
            continue
        if name not in there:
            whole, parts = next((kind for kind in KINDS if name in (*kind[0], *kind[1])), ((), ()))
            if not there & {*whole}:
                yield _missing(name, replaced=bool(there & {*parts}))
        elif digest.of_files(output.root, [name]) != digest.of_files(source.root, [name]):
            yield warning(
                "passthrough.sidecar", name, "the source's file", "another content",
                "whoever serves it tokenizes, or prepares images, otherwise than the source does, if the difference matters",
                "copy the file from the source again",
            )  # fmt: skip


def other_model(ours: Mapping[str, Any], theirs: Mapping[str, Any], scope: Scope) -> Finding | None:
    """The one thing to say where the two configs are of two models: everything differs then."""
    keys = {"architectures": (ours, theirs), "hidden_size": (scope.text(ours), scope.text(theirs))}
    differ = [key for key, (a, b) in keys.items() if None not in (a.get(key), b.get(key)) and a[key] != b[key]]
    if not differ:
        return None
    shown = (f"{key} {_json(keys[key][0][key])}, there {_json(keys[key][1][key])}" for key in differ)
    return error(
        "passthrough.source", "config.json", "the model that --source names", ", ".join(shown),
        "either config.json was changed, or this is not its source: nothing further was compared",
        "name the checkpoint that it was made from",
    )  # fmt: skip


def _missing(name: str, *, replaced: bool) -> Finding:
    needed = name in NEEDED and not replaced
    return (error if needed else warning)(
        "passthrough.sidecar-missing", name, "the source's file", "absent",
        "vLLM does not start without one" if needed else "vLLM starts, and does without what it says", "copy it from the source",
    )  # fmt: skip


def check_config(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[Finding]:
    """A value that changed is an error, another dtype to serve in a warning, and so is a key that came or went.

    transformers adds defaults when it saves: a key that came with null, false or 0 says nothing new, and a dtype may be left out.
    """
    after, before = (_leaves({k: v for k, v in c.items() if k != "quantization_config"}) for c in (ours, theirs))
    for key in sorted(after.keys() | before.keys()):
        leaf, new, old = key.rpartition(".")[2], after.get(key), before.get(key)
        if NOTES.fullmatch(leaf) or new == old or (leaf == "dtype" and None in (new, old)) or (key not in before and not new):
            continue
        changed = (None not in (new, old) and leaf != "dtype") or _window_gone(key, old, before, after)
        yield (error if changed else warning)(
            "passthrough.config", f"config.json: {key}", "the source's value", f"{_shown(after, key)}, there {_shown(before, key)}",
            "vLLM builds the model from it: only quantization_config may be added", "take the rest of config.json over",
        )  # fmt: skip


def _window_gone(key: str, old: Any, before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether layers that had a window see all now, or one of the length that the family's class takes by itself.

    Qwen's files have a length beside `use_sliding_window: false`, which transformers saves as null.
    """
    at, found, leaf = key.rpartition("sliding_window")
    used = before.get(f"{at}use_sliding_window", True) is not False
    return (found, leaf) == ("sliding_window", "") and type(old) is int and used and after.get(key) is None


def _shown(leaves: Mapping[str, Any], key: str) -> str:
    return _json(leaves[key]) if key in leaves else "absent"


def _json(value: Any) -> str:
    """A value as it stands in the file, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _leaves(config: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """{dotted key: value} of everything in nested objects that is no object itself; an empty one counts as a value."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        place = f"{at}{ALIASES.get(key, key)}"
        found |= _leaves(value, f"{place}.") if isinstance(value, Mapping) and value else {place: value}
    return found
