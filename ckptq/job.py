"""What makes two runs the same job: a resumed run must agree on all of it, and a finished output says it in its ckptq.json."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptq import __version__
from ckptq.calibration import Sample
from ckptq.calibration import digest as samples_digest
from ckptq.checkpoint import fingerprint, is_weight_copy

if TYPE_CHECKING:
    from ckptq.prepare import Prepared

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "pillow", "numpy")


def job_record(job: Prepared, samples: list[Sample], device: str) -> dict[str, Any]:
    """What makes two runs the same job. No time, path or host in it, so that equal runs write equal files."""
    import torch

    packages = PACKAGES if job.reads is None else (*PACKAGES, "diffusers")  # whose pipelines run
    versions = {"ckptq": __version__, **{name: _version(name) for name in packages}}
    measured = {} if job.reused is None else {"amax": job.reused.origin(job.parts)}
    components = job.inventory.components
    return {
        "plan": _joined([part.plan.digest for part in job.parts]),
        "recipe": _portable_recipe(job),
        "source": job.source.label or "local folder",
        "source_fingerprint": _joined([fingerprint(job.source.root, component) for component in components]),
        "source_files": _files_digest(job.source.root, _small_files(job)),
        "samples": samples_digest(samples) if samples else None,
        **measured,
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # who needs it says so
        return "absent"


def _joined(digests: Sequence[str]) -> str:
    """One digest of several; of one, itself."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _small_files(job: Prepared) -> list[str]:
    """All files of the source that travel along but weights, which fingerprints speak for."""
    if job.inventory.pipeline is None:
        return list(job.plan.sidecars)
    of_parts = [f"{part.folder}/{name}" for part in job.parts for name in part.plan.sidecars]
    return [*of_parts, *(name for name in job.kept if not is_weight_copy(name))]


def _files_digest(base: Path, names: Sequence[str]) -> str:
    """SHA-256 over the files that travel along: tokenizer, processor and chat template decide what calibration sees."""
    total = hashlib.sha256()
    for name in names:
        with (base / name).open("rb") as file:
            total.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def _portable_recipe(job: Prepared) -> dict[str, Any]:
    """The recipe as resolved, without the paths of this machine and what no byte of the output follows from.

    Samples and source are recorded by their content.
    """
    left_out = {"model", "output", "quality", *([] if job.recipe.components else ["components"])}
    body = job.recipe.model_dump(mode="json", exclude=left_out)
    if job.reused is not None:
        del body["calibration"]
        return body
    for key in ("images", "annotations", "files", "save_every"):
        body["calibration"].pop(key, None)
    return body
