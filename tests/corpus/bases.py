"""The good exports that the corpus's faulty checkpoints are made from, by ckptq and by the exporters people use.

    python tests/corpus/bases.py        # builds all of them, prints their folders

A base is named family-method-format-origin. `folder(name)` builds it where this machine has none yet, with all others of its
origin, for importing an exporter takes longer than running it. Nothing random is left open: equal code and versions write
equal files.
"""

from __future__ import annotations

import fcntl
import functools
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
KEPT = 6
"""How many states of an origin stay on this machine, the ones used last."""

Family = Literal[
    "vl", "moe", "qwen3vl", "phi3", "omni", "mixtral", "omni-moe", "llama", "mistral", "qwen2", "qwen3", "gemma3text",
    "qwen2vl", "gemma3", "llava", "qwen3vl-moe",
]  # fmt: skip
Method = Literal["modelopt", "compressed-tensors", "fp8", "quark"]
Origin = Literal["source", "tiny", "ckptq", "modelopt", "llm-compressor", "relabeled"]
Cache = Literal["scales", "declared", "none"]


@dataclass(frozen=True, slots=True)
class Base:
    """One good export.

    `method` is config.json's quant_method, `format` the exporter's own word, `source_name` the key of the unquantized
    checkpoint it is made from, `settings` what the maker of its origin takes, `kv` what it says of an FP8 KV cache.
    """

    name: str
    family: Family
    method: Method
    format: str
    origin: Origin
    source_name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    kv: Cache = "none"

    @property
    def source(self) -> Path:
        """The folder of the unquantized checkpoint."""
        return _built("tiny" if self.tiny else "source", self.source_name)

    @property
    def tiny(self) -> bool:
        """Whether that is a checkpoint of tests/families."""
        return self.family not in ("vl", "moe")

    @property
    def experts(self) -> bool:
        return self.family in ("moe", "mixtral", "omni-moe", "qwen3vl-moe")


def _ckptq(name: str, source: str, *settings: str) -> Base:
    return Base(name, "vl", "modelopt", "fp8", "ckptq", source, {"settings": settings}, "scales")


def _scheme(name: str, method: Method, scheme: str, *, kv: bool = False) -> Base:
    """By ckptq, in a scheme of ckptq/schemes.py; `mixed` has FP8 attention and an NVFP4 MLP."""
    parts = {".self_attn.*": "fp8" if method == "modelopt" else "fp8-dynamic", ".mlp.*": "nvfp4"}
    rules = parts if scheme == "mixed" else {"": scheme}
    quantize = [{"modules": f"model.layers.*{where}", "scheme": one} for where, one in rules.items()]
    settings = (f"quantize={json.dumps(quantize)}", f"export.format={method}", f"kv_cache={'fp8' if kv else 'null'}")
    return Base(name, "vl", method, scheme, "ckptq", "vl", {"settings": settings}, "scales" if kv else "none")


def _experts(name: str, method: Method, scheme: str, *, kv: bool = False) -> Base:
    """The same of the model with routed experts."""
    base = _scheme(name, method, scheme, kv=kv)
    settings = (*base.settings["settings"], 'keep=["*.mlp.gate", "lm_head"]')
    return Base(name, "moe", method, scheme, "ckptq", "moe", {"settings": settings}, base.kv)


def _tiny(family: Family, source: str) -> Base:
    """By ckptq, of a checkpoint of tests/families, in FP8 with an FP8 KV cache by the family's recipe."""
    return Base(f"{family}-modelopt-fp8kv-ckptq", family, "modelopt", "fp8", "ckptq", source, {"family": source}, "scales")


def _tiny_nvfp4(family: Family, source: str, recipe: str) -> Base:
    """The same in NVFP4."""
    settings = {"family": source, "recipe": recipe}
    return Base(f"{family}-modelopt-nvfp4kv-ckptq", family, "modelopt", "nvfp4", "ckptq", source, settings, "scales")


def _modelopt(name: str, source: str, format: str, kv: str | None) -> Base:
    stored: Mapping[str | None, Cache] = {"fp8": "scales", "fp8_cast": "declared", None: "none"}
    return Base(name, _family(source), "modelopt", format, "modelopt", source, {"format": format, "kv": kv}, stored[kv])


def _llm_compressor(name: str, source: str, format: str, *, kv: bool = False, files: bool = False) -> Base:
    family = _family(source)
    kept = ["re:.*mlp.gate$"] if family == "moe" else ["re:.*visual.*"]
    ignore = ["lm_head", *kept, *(["re:.*embed_tokens$"] if files else [])]
    settings = {"format": format, "kv": kv, "ignore": ignore, "weights_only": files}
    return Base(name, family, "compressed-tensors", format, "llm-compressor", source, settings, "scales" if kv else "none")


def _relabeled(name: str, source: str, format: str, method: Method = "fp8", **settings: Any) -> Base:
    defaults = {"format": format, "ignored": "ignored_layers", "scales": None, "scale_dtype": "float32", "shards": 1}
    return Base(name, _family(source), method, format, "relabeled", source, {"method": method, **defaults, **settings})


def _quark(name: str, format: str, scales: str) -> Base:
    return _relabeled(name, "vl", format, "quark", ignored="exclude", scales=scales)


def _family(source: str) -> Family:
    return "moe" if source.startswith("moe") else "vl"


_ALL = (
    _ckptq("vl-modelopt-fp8kv-ckptq", "vl", "export.shard_size=1MB"),
    _ckptq("vl-modelopt-fp8kv-ckptq-onefile", "vl"),
    _ckptq("vl-modelopt-fp8kv-ckptq-nested", "vl-nested", "export.shard_size=1MB"),
    _ckptq("vl-modelopt-fp8kv-ckptq-deep", "vl-deep"),
    _ckptq("vl-modelopt-fp8kv-ckptq-tied", "vl-tied"),
    _scheme("vl-modelopt-pcpt-ckptq", "modelopt", "fp8-dynamic"),
    _scheme("vl-modelopt-pbwo-ckptq", "modelopt", "fp8-block"),
    _scheme("vl-modelopt-nvfp4kv-ckptq", "modelopt", "nvfp4", kv=True),
    _scheme("vl-modelopt-w4a16-ckptq", "modelopt", "nvfp4a16"),
    _scheme("vl-modelopt-mxfp8-ckptq", "modelopt", "mxfp8"),
    _scheme("vl-modelopt-mixedkv-ckptq", "modelopt", "mixed", kv=True),
    _scheme("vl-ct-fp8kv-ckptq", "compressed-tensors", "fp8", kv=True),
    _scheme("vl-ct-dynamic-ckptq", "compressed-tensors", "fp8-dynamic"),
    _scheme("vl-ct-block-ckptq", "compressed-tensors", "fp8-block"),
    _scheme("vl-ct-int8-ckptq", "compressed-tensors", "int8"),
    _scheme("vl-ct-nvfp4kv-ckptq", "compressed-tensors", "nvfp4", kv=True),
    _scheme("vl-ct-nvfp4a16-ckptq", "compressed-tensors", "nvfp4a16"),
    _scheme("vl-ct-mxfp8-ckptq", "compressed-tensors", "mxfp8"),
    _scheme("vl-ct-mxfp4-ckptq", "compressed-tensors", "mxfp4"),
    _scheme("vl-ct-mixedkv-ckptq", "compressed-tensors", "mixed", kv=True),
    _scheme("vl-fp8-static-ckptq", "fp8", "fp8"),
    _scheme("vl-fp8-dynamic-ckptq", "fp8", "fp8-tensor"),
    _scheme("vl-fp8-block-ckptq", "fp8", "fp8-block"),
    _experts("moe-modelopt-nvfp4kv-ckptq", "modelopt", "nvfp4", kv=True),
    _experts("moe-modelopt-w4a16-ckptq", "modelopt", "nvfp4a16"),
    _experts("moe-ct-nvfp4kv-ckptq", "compressed-tensors", "nvfp4", kv=True),
    _experts("moe-ct-nvfp4a16-ckptq", "compressed-tensors", "nvfp4a16"),
    _tiny("phi3", "phi3"),
    _tiny("qwen3vl", "qwen3_vl"),
    _tiny("mixtral", "mixtral"),
    _tiny("omni", "qwen2_5_omni"),
    _tiny("omni-moe", "qwen3_omni_moe"),
    _tiny_nvfp4("omni-moe", "qwen3_omni_moe", "qwen3omni-nvfp4"),
    _tiny("llama", "llama"),
    _tiny("mistral", "mistral"),
    _tiny("qwen2", "qwen2"),
    _tiny("qwen3", "qwen3"),
    _tiny("gemma3text", "gemma3_text"),
    _tiny("qwen2vl", "qwen2_vl"),
    _tiny("gemma3", "gemma3"),
    _tiny("llava", "llava"),
    _tiny("qwen3vl-moe", "qwen3_vl_moe"),
    _modelopt("vl-modelopt-fp8kv-peer", "vl", "fp8", "fp8"),
    _modelopt("vl-modelopt-fp8cast-peer", "vl", "fp8", "fp8_cast"),
    _modelopt("vl-modelopt-fp8-peer-tied", "vl-tied", "fp8", None),
    _modelopt("vl-modelopt-pcpt-peer", "vl", "fp8_per_channel_per_token", None),
    _modelopt("vl-modelopt-pbwo-peer", "vl", "fp8_pb_wo", None),
    _modelopt("vl-modelopt-nvfp4kv-peer", "vl", "nvfp4", "fp8"),
    _modelopt("vl-modelopt-w4a16-peer", "vl", "w4a16_nvfp4", None),
    _modelopt("vl-modelopt-mxfp8-peer", "vl", "mxfp8", None),
    _modelopt("vl-modelopt-mixedkv-peer", "vl", "mixed", "fp8"),
    _modelopt("moe-modelopt-fp8kv-peer", "moe", "fp8", "fp8"),
    _modelopt("moe-modelopt-fp8-peer-mixed", "moe-mixed", "fp8", None),
    _modelopt("moe-modelopt-nvfp4kv-peer", "moe", "nvfp4", "fp8"),
    _llm_compressor("vl-ct-fp8-peer", "vl", "FP8"),
    _llm_compressor("vl-ct-fp8kv-peer", "vl", "FP8", kv=True),
    _llm_compressor("vl-ct-dynamic-peer", "vl", "FP8_DYNAMIC"),
    _llm_compressor("vl-ct-dynamic-peer-tied", "vl-tied", "FP8_DYNAMIC"),
    _llm_compressor("vl-ct-dynamic-peer-files", "vl", "FP8_DYNAMIC", files=True),
    _llm_compressor("vl-ct-dynamic-peer-nested", "vl-nested", "FP8_DYNAMIC", files=True),
    _llm_compressor("vl-ct-block-peer", "vl", "FP8_BLOCK"),
    _llm_compressor("vl-ct-int8-peer", "vl", "INT8"),
    _llm_compressor("vl-ct-nvfp4kv-peer", "vl", "NVFP4", kv=True),
    _llm_compressor("vl-ct-nvfp4a16-peer-files", "vl", "NVFP4A16", files=True),
    _llm_compressor("vl-ct-mxfp8-peer-files", "vl", "MXFP8", files=True),
    _llm_compressor("vl-ct-mxfp4-peer-files", "vl", "MXFP4", files=True),
    _llm_compressor("vl-ct-mixed-peer", "vl", "mixed"),
    _llm_compressor("moe-ct-dynamic-peer", "moe", "FP8_DYNAMIC", files=True),
    _llm_compressor("moe-ct-block-peer", "moe", "FP8_BLOCK", files=True),
    _relabeled("vl-fp8-static-relabeled", "vl", "static", scales="vl-modelopt-fp8kv-peer"),
    _relabeled("vl-fp8-dynamic-relabeled", "vl", "dynamic", shards=2),
    _relabeled("vl-fp8-block-relabeled", "vl", "block"),
    _relabeled("moe-fp8-dynamic-relabeled", "moe-mixed", "dynamic", shards=2),
    _relabeled("moe-fp8-block-relabeled", "moe", "block", ignored="modules_to_not_convert", scale_dtype="bfloat16"),
    _quark("vl-quark-fp8-relabeled", "static", "vl-modelopt-fp8kv-peer"),
    _quark("vl-quark-channel-relabeled", "channel", "vl-modelopt-pcpt-peer"),
)
_TINY = sorted({base.source_name for base in _ALL if base.tiny})
BASES: Mapping[str, Base] = {base.name: base for base in _ALL}


def folder(name: str) -> Path:
    """The folder of BASES[name], built where it is not there yet. Read only: copy it to change it."""
    return _built(BASES[name].origin, name)


# --- building ---

# What each origin's names and values follow from: code of the repository, and packages.
_MAKERS: Mapping[Origin, tuple[str, ...]] = {
    "source": ("-m", "corpus.sources"),
    "tiny": ("-m", "corpus.tiny"),
    "ckptq": ("-m", "corpus.convert"),
    "modelopt": ("peers/modelopt_export.py",),
    "llm-compressor": ("peers/llmcompressor_export.py",),
    "relabeled": ("-m", "corpus.relabeled"),
}
_CODE: Mapping[Origin, tuple[str, ...]] = {
    "source": ("tests/corpus/sources.py", "tests/make_checkpoint.py"),
    "tiny": ("tests/corpus/tiny.py", "tests/corpus/sources.py", *(f"tests/families/{name}.py" for name in ("__init__", *_TINY))),
    "ckptq": ("tests/corpus/convert.py", "tests/data/heldout.txt", "recipes/*.yaml", "ckptq/**/*.py"),
    "modelopt": ("tests/peers/modelopt_export.py", "tests/data/heldout.txt"),
    "llm-compressor": ("tests/peers/llmcompressor_export.py", "tests/data/heldout.txt"),
    "relabeled": ("tests/corpus/relabeled.py", "tests/corpus/sources.py"),
}
# Parts of ckptq that no byte of an output follows from.
_SPECTATORS = (
    "validators/",
    "reports/",
    "compare/",
    "validate.py",
    "cli.py",
    "render.py",
    "console.py",
    "mistakes.py",
    "errors.py",
)
_PACKAGES: Mapping[Origin, tuple[str, ...]] = {
    "source": ("torch", "safetensors"),
    "tiny": ("torch", "safetensors", "transformers"),
    "ckptq": ("torch", "transformers"),
    "modelopt": ("torch", "transformers", "nvidia-modelopt"),
    "llm-compressor": ("torch", "transformers", "llmcompressor", "compressed-tensors"),
    "relabeled": ("torch", "safetensors"),
}


def _built(origin: Origin, name: str) -> Path:
    return _every(origin) / name


@functools.cache  # telling what a folder would be called takes as long as validating what is in it
def _every(origin: Origin) -> Path:
    """Builds every checkpoint of `origin` in one process, into a folder of its own that appears whole or not at all."""
    cache = _cache()
    jobs = list(_jobs(origin))
    target = cache / f"{origin}-{_digest(origin, jobs)}"
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{origin}.lock"):
            if not target.is_dir():
                _build(origin, jobs, target)
                for old in sorted(cache.glob(f"{origin}-*"), key=lambda path: path.stat().st_mtime)[:-KEPT]:
                    shutil.rmtree(old)
    os.utime(target)
    return target


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ckptq-tests" / "corpus"


def _jobs(origin: Origin) -> Iterator[dict[str, Any]]:
    if origin in ("source", "tiny"):
        for name in _TINY if origin == "tiny" else sorted({base.source_name for base in _ALL if not base.tiny}):
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
    total = hashlib.sha256(json.dumps(jobs).replace(str(_cache()), "").encode())
    for pattern in _CODE[origin]:
        for file in sorted(ROOT.glob(pattern)):
            if not file.relative_to(ROOT).as_posix().removeprefix("ckptq/").startswith(_SPECTATORS):
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
