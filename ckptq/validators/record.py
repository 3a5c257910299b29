"""The folder against ckptq.json, which says what the conversion wrote: tensors and files by digest, and what was calibrated.

ckptq.json is an input like any other: what is odd in it becomes a finding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptq import digest
from ckptq.checkpoint import Component
from ckptq.errors import SourceError
from ckptq.folder import printable
from ckptq.index import INDEX_LIMIT
from ckptq.json_file import read_json, short
from ckptq.validators import Code, Finding, error, warning
from ckptq.validators.kv import kv_slot

CODES = {
    "record.unreadable": Code("ckptq.json is not what ckptq writes"),
    "record.tensor-changed": Code("a tensor with another dtype or other bytes than the conversion wrote"),
    "record.tensor-missing": Code("a tensor that the conversion wrote is gone"),
    "record.tensor-added": Code("a tensor that the conversion did not write"),
    "record.file-changed": Code("a file that says something else than it did after the conversion"),
    "record.file-missing": Code("a file that the conversion wrote is gone"),
    "record.file-added": Code("a file that servers read and the conversion did not write"),
    "record.kv-absent": Code(
        "K and V were calibrated, and no scale of them is stored",
        "vLLM 0.32.0 model_executor/layers/quantization/kv_cache.py process_weights_after_loading",
    ),
}
RECORD = "ckptq.json"
SERVED = ("generation_config.json", "hf_quant_config.json", "chat_template.json", "chat_template.jinja")
"""Files that need not be there, and that a server reads where they are."""
_WEIGHTS = (".safetensors", ".bin")
"""Files of a pipeline's components that no tensor of is recorded."""
_DIGEST = re.compile(r"[0-9a-f]{32}")
_MEND = "convert again, or take it from a copy that you trust"


@dataclass(frozen=True, slots=True)
class Record:
    """What ckptq.json says. `tensors` and `files` are None where it has no digests, as an older ckptq writes it."""

    tensors: Mapping[str, str] | None = None
    files: Mapping[str, str] | None = None
    kv_calibrated: bool = False


def body(folder: Path) -> Any:
    """What ckptq.json holds; None where it is absent or no JSON, which `read` makes a finding of."""
    try:
        return read_json(folder / RECORD, INDEX_LIMIT)
    except (FileNotFoundError, SourceError, OSError):
        return None


def read(folder: Path) -> tuple[Record | None, list[Finding]]:
    """(the record, or None where there is none or it makes no sense; findings on itself)."""
    data, findings = _read(folder)
    return (None, findings) if data is None else _record(data)


def read_pipeline(folder: Path) -> tuple[dict[str, Record], list[Finding]]:
    """({component: its record}, "" standing for what stays of the pipeline; findings on the record itself)."""
    data, findings = _read(folder)
    if data is None:
        return {}, findings
    found: dict[str, Record] = {}
    components = data.get("components", {})
    if not isinstance(components, dict):
        findings.append(_unreadable(f"{RECORD}: components", "{component: its record}", short(components)))
        components = {}
    for name, body in [("", data), *components.items()]:
        if isinstance(body, dict):
            found[name], odd = _record(body)
            findings += odd
        else:
            findings.append(_unreadable(f"{RECORD}: components.{name}", "an object", short(body)))
    return found, findings


def _read(folder: Path) -> tuple[dict[str, Any] | None, list[Finding]]:
    """(what ckptq.json holds, or None where there is none or it is no object; findings)."""
    try:
        data = read_json(folder / RECORD, INDEX_LIMIT)
    except FileNotFoundError:
        return None, []
    except (SourceError, OSError) as problem:
        return None, [_unreadable(RECORD, "JSON", printable(str(problem)))]
    if not isinstance(data, dict):
        return None, [_unreadable(RECORD, "an object", short(data))]
    return data, []


def _record(data: Mapping[str, Any]) -> tuple[Record, list[Finding]]:
    findings: list[Finding] = []
    amax = data.get("amax", {})
    if not isinstance(amax, dict):
        findings.append(_unreadable(f"{RECORD}: amax", "{place: largest magnitude}", short(amax)))
        amax = {}
    digests = data.get("digests")
    if digests is not None and not isinstance(digests, dict):
        findings.append(_unreadable(f"{RECORD}: digests", "{tensors, files}", short(digests)))
    tensors, files = (_table(digests, key, findings) for key in ("tensors", "files"))
    return Record(tensors, files, any(name.endswith((".k_amax", ".v_amax")) for name in amax)), findings


def _table(digests: Any, key: str, findings: list[Finding]) -> Mapping[str, str] | None:
    if not isinstance(digests, dict):
        return None
    table = digests.get(key)
    odd: Any = table
    if isinstance(table, dict):
        odd = next((v for v in table.values() if not (isinstance(v, str) and _DIGEST.fullmatch(v))), None)
        if odd is None:
            return table
    findings.append(_unreadable(f"{RECORD}: digests.{key}", "{name: 32 hexadecimal digits}", short(odd)))
    return None


def _unreadable(subject: str, expected: str, found: str) -> Finding:
    return warning(
        "record.unreadable", subject, expected, found, "nothing in vLLM, which does not read it; what changed can't be told",
        "restore it, or remove it",
    )  # fmt: skip


def check(record: Record, folder: Path, component: Component, digests: Mapping[str, str] | None) -> Iterator[Finding]:
    """What changed since the conversion. `digests`: of the stored tensors, as the pass over the values found them, or None where
    there was no pass; then names alone are compared. Raises OSError for a file that can't be read.
    """
    lost = record.kv_calibrated and not any(map(kv_slot, component.tensors))
    if lost:
        yield error(
            "record.kv-absent", "k_scale and v_scale", "those that calibration found: ckptq.json has their amaxes", "none",
            "vLLM quantizes the cache with scale 1.0, silently, instead of the calibrated ones", _MEND,
        )  # fmt: skip
    if record.tensors is not None:
        yield from _tensor_findings(record.tensors, component, digests, lost)
    if record.files is not None:
        yield from check_files(record.files, folder, {"config.json", *component.sidecars})


def _tensor_findings(
    written: Mapping[str, str], component: Component, digests: Mapping[str, str] | None, kv_lost: bool
) -> Iterator[Finding]:
    for name, before in written.items():
        if name not in component.tensors:
            if not (kv_lost and kv_slot(name)):
                yield error(
                    "record.tensor-missing", printable(name), "the tensor that the conversion wrote", "not stored",
                    "vLLM leaves that memory as it finds it, or raises", _MEND,
                )  # fmt: skip
        elif digests is not None and digests[name] != before:
            yield error(
                "record.tensor-changed", name, "the dtype and bytes that the conversion wrote", "others",
                "vLLM computes with something else than was converted and checked", _MEND,
            )  # fmt: skip
    for name in component.tensors:
        if name not in written:
            yield warning(
                "record.tensor-added", name, "the tensors that the conversion wrote", "a further one",
                "vLLM drops it, raises or computes with it, as its name says", "remove it",
            )  # fmt: skip


def check_files(written: Mapping[str, str], folder: Path, there: Set[str]) -> Iterator[Finding]:
    """Files by name. `there`: those that are in the folder. Raises OSError for one that can't be read."""
    now = digest.of_files(folder, there & written.keys())
    for name, before in written.items():
        if name not in there:
            yield (error if name.endswith(_WEIGHTS) else warning)(
                "record.file-missing", printable(name), "the file that the conversion wrote", "absent",
                "vLLM starts without what it says, or does not start", _MEND,
            )  # fmt: skip
        elif now[name] != before:
            yield (error if name.endswith(_WEIGHTS) else warning)(
                "record.file-changed", name, "what it said after the conversion", "something else",
                "vLLM goes by the new content", f"{_MEND}; or leave it, if the change was meant",
            )  # fmt: skip
    for name in sorted(there - written.keys()):
        if name in SERVED:
            yield warning(
                "record.file-added", name, "the files that the conversion wrote", "a further one", "vLLM goes by it, too",
                "remove it; or leave it, if it was meant",
            )  # fmt: skip
