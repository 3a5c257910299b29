"""The good exports that the corpus's faulty checkpoints are made from, by ckptq and by the exporters people use.

    python tests/corpus/bases.py        # builds all of them, prints their folders

A base is named family-method-format-origin. `folder(name)` builds it where this machine has none yet, with all others of its
origin, for importing an exporter takes longer than running it. Nothing random is left open: equal code and versions write equal files.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent

Family = Literal["vl", "moe"]
Method = Literal["modelopt", "compressed-tensors", "fp8"]
Origin = Literal["source", "ckptq", "modelopt", "llm-compressor", "relabeled"]
StandIn = Literal["requantize", "block", "moe"]


@dataclass(frozen=True, slots=True)
class Base:
    """One good export.

    `method` is config.json's quant_method, `format` the exporter's own word, `source_name` the key of the unquantized
    checkpoint it is made from, `settings` what the maker of its origin takes, `stand_ins` what vLLM's CPU build lacks to load
    it (tests/server/standins.py).
    """

    name: str
    family: Family
    method: Method
    format: str
    origin: Origin
    source_name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    kv: Literal["scales", "declared", "none"] = "none"
    stand_ins: frozenset[StandIn] = frozenset()

    @property
    def source(self) -> Path:
        """The folder of the unquantized checkpoint."""
        return _built("source", self.source_name)


def _ckptq(variant: str, source: str, *settings: str) -> Base:
    name = "-".join(filter(None, ("vl-modelopt-fp8kv-ckptq", variant)))
    return Base(name, "vl", "modelopt", "fp8", "ckptq", source, {"settings": settings}, "scales")


def _modelopt(name: str, family: Family, format: str, kv: str | None, *stand_ins: StandIn) -> Base:
    stored: Mapping[str | None, Literal["scales", "declared", "none"]] = {"fp8": "scales", "fp8_cast": "declared", None: "none"}
    settings = {"format": format, "kv": kv}
    return Base(name, family, "modelopt", format, "modelopt", family, settings, stored[kv], frozenset(stand_ins))


def _llm_compressor(name: str, format: str, *stand_ins: StandIn, kv: bool = False, files: bool = False) -> Base:
    family: Family = "moe" if name.startswith("moe") else "vl"
    kept = ["re:.*mlp.gate$"] if family == "moe" else ["re:.*visual.*"]
    ignore = ["lm_head", *kept, *(["model.embed_tokens"] if files else [])]
    settings = {"format": format, "kv": kv, "ignore": ignore, "weights_only": files}
    stored: Literal["scales", "none"] = "scales" if kv else "none"
    return Base(name, family, "compressed-tensors", format, "llm-compressor", family, settings, stored, frozenset(stand_ins))


def _relabeled(name: str, format: str, *stand_ins: StandIn, **settings: Any) -> Base:
    family: Family = "moe" if name.startswith("moe") else "vl"
    defaults = {"format": format, "ignored": "ignored_layers", "scales": None, "scale_dtype": "float32", "shards": 1}
    return Base(name, family, "fp8", format, "relabeled", family, {**defaults, **settings}, "none", frozenset(stand_ins))


_ALL = (
    _ckptq("", "vl", "export.shard_size=1MB"),
    _ckptq("onefile", "vl"),
    _ckptq("nested", "vl-nested", "export.shard_size=1MB"),
    _ckptq("deep", "vl-deep"),
    _ckptq("tied", "vl-tied"),
    _modelopt("vl-modelopt-fp8kv-peer", "vl", "fp8", "fp8", "requantize"),
    _modelopt("vl-modelopt-fp8cast-peer", "vl", "fp8", "fp8_cast", "requantize"),
    _modelopt("vl-modelopt-pcpt-peer", "vl", "fp8_per_channel_per_token", None),
    _modelopt("vl-modelopt-pbwo-peer", "vl", "fp8_pb_wo", None, "block"),
    _modelopt("moe-modelopt-fp8kv-peer", "moe", "fp8", "fp8", "requantize", "moe"),
    _llm_compressor("vl-ct-fp8-peer", "FP8", "requantize"),
    _llm_compressor("vl-ct-fp8kv-peer", "FP8", "requantize", kv=True),
    _llm_compressor("vl-ct-dynamic-peer", "FP8_DYNAMIC"),
    _llm_compressor("vl-ct-dynamic-peer-files", "FP8_DYNAMIC", files=True),
    _llm_compressor("vl-ct-block-peer", "FP8_BLOCK", "block"),
    _llm_compressor("moe-ct-dynamic-peer", "FP8_DYNAMIC", "moe", files=True),
    _relabeled("vl-fp8-static-relabeled", "static", "requantize", scales="vl-modelopt-fp8kv-peer"),
    _relabeled("vl-fp8-dynamic-relabeled", "dynamic", "requantize", shards=2),
    _relabeled("vl-fp8-block-relabeled", "block", "block"),
    _relabeled("moe-fp8-block-relabeled", "block", "block", "moe", ignored="modules_to_not_convert", scale_dtype="bfloat16"),
)
BASES: Mapping[str, Base] = {base.name: base for base in _ALL}


def folder(name: str) -> Path:
    """The folder of BASES[name], built where it is not there yet. Read only: copy it to change it."""
    return _built(BASES[name].origin, name)


# --- building ---

# What each origin's names and values follow from: code of the repository, and packages.
_MAKERS: Mapping[Origin, tuple[str, ...]] = {
    "source": ("-m", "corpus.sources"),
    "ckptq": ("-m", "corpus.convert"),
    "modelopt": ("peers/modelopt_export.py",),
    "llm-compressor": ("peers/llmcompressor_export.py",),
    "relabeled": ("-m", "corpus.relabeled"),
}
_CODE: Mapping[Origin, tuple[str, ...]] = {
    "source": ("tests/corpus/sources.py", "tests/make_checkpoint.py"),
    "ckptq": (
        "tests/corpus/convert.py",
        *(f"ckptq/{name}.py" for name in ("plan", "planner", "encode", "tensors", "calibrate", "observe", "streamed")),
        "ckptq/exporters/modelopt.py",
        "ckptq/numerics/*.py",
        "recipes/qwen25vl-lm-fp8-text.yaml",
    ),
    "modelopt": ("tests/peers/modelopt_export.py",),
    "llm-compressor": ("tests/peers/llmcompressor_export.py",),
    "relabeled": ("tests/corpus/relabeled.py", "tests/corpus/sources.py"),
}
_PACKAGES: Mapping[Origin, tuple[str, ...]] = {
    "source": ("torch", "safetensors"),
    "ckptq": ("torch", "transformers"),
    "modelopt": ("torch", "transformers", "nvidia-modelopt"),
    "llm-compressor": ("torch", "transformers", "llmcompressor", "compressed-tensors"),
    "relabeled": ("torch", "safetensors"),
}


def _built(origin: Origin, name: str) -> Path:
    """Builds every checkpoint of `origin` in one process, into a folder of its own that appears whole or not at all."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ckptq-tests" / "corpus"
    jobs = list(_jobs(origin))
    target = cache / f"{origin}-{_digest(origin, jobs)}"
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{origin}.lock"):
            if not target.is_dir():
                _build(origin, jobs, target)
    return target / name


def _jobs(origin: Origin) -> Iterator[dict[str, Any]]:
    if origin == "source":
        for name in sorted({base.source_name for base in _ALL}):
            yield {"name": name}
        return
    for base in _ALL:
        if base.origin == origin:
            other = base.settings.get("scales")
            settings = {**base.settings, **({"scales": str(folder(other))} if other else {})}
            yield {"name": base.name, "source": str(base.source), **settings}


def _build(origin: Origin, jobs: list[dict[str, Any]], target: Path) -> None:
    work = target.with_name(f"{target.name}.{os.getpid()}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    jobs = [{**job, "output": str(work / job["name"])} for job in jobs]
    (work / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    # One thread: how a sum is split among threads is allowed to change its last bit.
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(TESTS)}
    command = [sys.executable, *_MAKERS[origin], "--jobs", str(work / "jobs.json")]
    done = subprocess.run(command, cwd=TESTS, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        shutil.rmtree(work)
        raise RuntimeError(f"{' '.join(_MAKERS[origin])} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    (work / "jobs.json").unlink()
    work.rename(target)


def _digest(origin: Origin, jobs: list[dict[str, Any]]) -> str:
    """Of the jobs, whose sources are named by a digest of their own, and of what they run."""
    total = hashlib.sha256(json.dumps(jobs).encode())
    for pattern in _CODE[origin]:
        for file in sorted(ROOT.glob(pattern)):
            total.update(file.read_bytes())
    for package in _PACKAGES[origin]:
        total.update(f"{package} {importlib.metadata.version(package)}\n".encode())
    return total.hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    for base in _ALL:
        print(folder(base.name))
