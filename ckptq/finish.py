"""What is written beside the weights: configs, sidecars, what stays of a pipeline, and ckptq.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ckptq import digest, routing
from ckptq.console import Console
from ckptq.journal import RECORD, Journal
from ckptq.prepare import Part, Prepared
from ckptq.writer import copy_file, sync_folder, write_text, writing


def in_folder(folder: str, name: str) -> str:
    """A component's file or tensor as a name of the whole pipeline: `transformer/config.json`."""
    return f"{folder}/{name}" if folder else name


def part_folder(part: Part, journal: Journal) -> Path:
    """Where a part's files are written."""
    folder = journal.model / part.folder
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_files(
    job: Prepared,
    journal: Journal,
    record: dict[str, Any],
    tables: Mapping[str, Mapping[str, float]],
    digests: Mapping[str, dict[str, str]],
    console: Console,
) -> None:
    """Sidecars, the generated configs and index, what stays of a pipeline, and ckptq.json."""
    for part in job.parts:
        folder, base = part_folder(part, journal), job.source.root / part.folder
        for name in part.plan.sidecars:
            copy_file(base / name, folder / name)
        for name, text in part.plan.files.items():
            write_text(folder / name, text)
        sync_folder(folder)
    _copy_kept(job, journal, console)
    tokens = journal.load("experts")
    bodies = {
        part.folder: {
            "amax": {o.name: tables[part.folder][o.name] for o in part.plan.observers},
            **({"experts": routing.recorded(tokens)} if tokens else {}),
            "decisions": [asdict(d) for d in part.plan.decisions],
            "carried": list(part.plan.carried),
            **({"renamed": found} if (found := part.plan.renamed) else {}),
            "dequantized": list(part.component.dequantized),
            "config_changes": list(part.plan.config_changes),
            "digests": {
                "tensors": dict(sorted(digests[part.folder].items())),
                "files": digest.of_files(journal.model / part.folder, digest.recorded([*part.plan.sidecars, *part.plan.files])),
            },
        }
        for part in job.parts
    }
    if job.inventory.pipeline is None:
        (body,) = bodies.values()
    else:
        copies = {in_folder(c.folder, name) for c in job.inventory.components for name in c.left_out}  # which no check looks at
        kept = digest.recorded(name for name in job.kept if name not in copies)
        files = digest.of_files(job.source.root, kept)  # the check of the record proves the copies by them
        body = {"components": bodies, "digests": {"tensors": {}, "files": files}}
    write_text(journal.model / RECORD, json.dumps({"job": record, **body}, indent=1) + "\n")
    sync_folder(journal.model)


def _copy_kept(job: Prepared, journal: Journal, console: Console) -> None:
    """What stays of a pipeline, byte for byte."""
    left = [name for name in job.kept if not (journal.model / name).is_file()]
    if not left:
        return
    sizes = {name: (job.source.root / name).stat().st_size for name in left}
    with console.stage("copy", sum(sizes.values()), "bytes") as advance:
        for name, nbytes in sizes.items():
            copy_file(job.source.root / name, journal.model / name)
            advance(nbytes)
