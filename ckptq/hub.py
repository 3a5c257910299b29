"""Where a checkpoint comes from: a local folder, or a model on the Hugging Face Hub, fetched into the Hub's own cache.

Only what a conversion reads is fetched: first everything but weights, then exactly the files that the index names. Without
`weights` not even those, but their headers, by range requests. huggingface_hub is imported for Hub ids alone (0.3 s).
"""

from __future__ import annotations

import errno
import glob
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ckptq.checkpoint import (
    INDEX,
    PIPELINE,
    SINGLE,
    SPEAKERS,
    STEMS,
    WEIGHT_COPIES,
    Header,
    component_names,
    read_header,
    read_index,
)
from ckptq.errors import CkptqError, OutputError, SourceError
from ckptq.json_file import read_json
from ckptq.safetensors_header import header_length, parse_header

_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\S+))?")
# An index must come along, and nothing in a pattern says where it lies; other indexes are small.
_NOT_AT_FIRST = [p for pattern in WEIGHT_COPIES if pattern != "*.safetensors.index.json" for p in (pattern, f"*/{pattern}")]
_PICKLED = ("diffusion_pytorch_model", "pytorch_model")
_FIRST_BYTES = 1 << 17
"""Of a weight file, asked for at once: most headers are shorter."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint that can be read now.

    root    the local folder
    label   `org/name@commit`, with all 40 digits of the commit; None for a local folder, whose path is nobody's business
    header  reads the header of a weight file under `root`, for `checkpoint.read_inventory`
    """

    root: Path
    label: str | None
    header: Callable[[Path], Header]


def fetch(src: str, *, weights: bool = True) -> Source:
    """The checkpoint `src`: a folder, or a Hub id `org/name[@revision]`. A folder of that name comes first.
    A name inside a folder that there is, without a revision, is taken for a mistyped folder, and the Hub is not asked.

    Without `weights` no weight file is fetched: `Source.header` then knows the headers of those that `root` lacks. With
    HF_HUB_OFFLINE=1, or no network, the cache is enough if it has all that is needed.

    Raises SourceError where there is no such checkpoint, no access or no network, OutputError where the cache can't be
    written.
    """
    folder = Path(src).expanduser() if src.startswith("~/") else Path(src)
    if src and folder.is_dir():
        return Source(folder, None, read_header)
    hint = "give a folder, or a Hub id as org/name[@revision]"
    if src and folder.exists():
        raise SourceError(f"{src}: expected a folder, found a file", hint=hint)
    match = _HUB_ID.fullmatch(src)
    if not match:
        raise SourceError(f"{src or 'the model'}: no such folder, and not the form of a Hub id", hint=hint)
    if not match["revision"] and folder.parent.is_dir():
        hint = f"give a folder, or {src}@main for the model of that name on the Hub"
        raise SourceError(f"{src}: no such folder in {folder.parent}", hint=hint)
    with _explained(src, match["repo"]):
        return _fetch(match["repo"], match["revision"], weights)


def _fetch(repo: str, revision: str | None, weights: bool) -> Source:
    root = _snapshot(repo, revision, ignore=_NOT_AT_FIRST)
    label = f"{repo}@{root.name}"
    files = _weight_files(root, repo)
    absent = [file for file in files if not (root / file).is_file()]
    if not weights:
        return Source(root, label, _header_reader(root, _remote_headers(repo, root.name, absent)))
    if absent:
        _snapshot(repo, root.name, allow=[*(glob.escape(file) for file in absent), SPEAKERS])
    for file in absent:
        if not (root / file).is_file():
            raise _no_weights(label, file)
    return Source(root, label, read_header)


def _weight_files(root: Path, repo: str) -> list[str]:
    """The files that hold the model, or of a pipeline its components, relative to `root`."""
    if not (root / PIPELINE).is_file():
        weight_map = read_index(root)
        return sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]
    index = read_json(root / PIPELINE)
    found = []
    for name in component_names(index if isinstance(index, dict) else {}):
        indexed = next((m for stem in STEMS if (m := read_index(root / name, stem)) is not None), None)
        if indexed is not None:
            found += [f"{name}/{file}" for file in sorted(set(indexed.values()))]
        else:
            single = [file for stem in STEMS if _is_there(repo, root, file := f"{name}/{stem}.safetensors")][:1]
            if not single and (root / name / "config.json").is_file():
                _refuse_pickled(repo, root, name)
            found += single
    return found


def _refuse_pickled(repo: str, root: Path, name: str) -> None:
    """Raises SourceError for a component with weights that are no safetensors: they belong in the output, and are not fetched."""
    for file in (f"{name}/{stem}.bin{index}" for stem in _PICKLED for index in ("", ".index.json")):
        if _is_there(repo, root, file):
            raise SourceError(
                f"{repo}@{root.name}: {file}: of the Hub's weights ckptq fetches safetensors only",
                hint=f"fetch all of it with `hf download {repo} --local-dir FOLDER`, and give the folder",
            )


def _is_there(repo: str, root: Path, file: str) -> bool:
    """Whether a repository has the file, at the commit that `root` is called after. Without a network: whether the cache has it."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    if (root / file).is_file():
        return True
    try:
        return HfApi().file_exists(repo, file, revision=root.name)
    except (httpx.ConnectError, httpx.TimeoutException, OfflineModeIsEnabled):
        return False


def _snapshot(repo: str, revision: str | None, allow: list[str] | None = None, ignore: list[str] | None = None) -> Path:
    """The folder of that revision in the Hub's cache, named after the commit, with the files that the patterns choose."""
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=allow, ignore_patterns=ignore))
    except (httpx.ConnectError, httpx.TimeoutException, OfflineModeIsEnabled):
        # A pinned commit, no network, and a cache without the list of its files, which older huggingface_hub did not keep.
        return Path(snapshot_download(repo, revision=revision, allow_patterns=allow, ignore_patterns=ignore, local_files_only=True))


def _header_reader(root: Path, remote: Mapping[str, Header]) -> Callable[[Path], Header]:
    def header(path: Path) -> Header:
        known = remote.get(path.relative_to(root).as_posix())
        if known is None and not path.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return read_header(path) if known is None else known

    return header


def _remote_headers(repo: str, commit: str, files: Sequence[str]) -> dict[str, Header]:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(max_workers=8) as pool:
        return dict(zip(files, pool.map(lambda file: _remote_header(repo, commit, file), files), strict=True))


def _remote_header(repo: str, commit: str, file: str) -> Header:
    """As checkpoint.read_header, of a file on the Hub."""
    data, size = _read_start(repo, commit, file, _FIRST_BYTES)
    try:
        length = header_length(file, data, size)
        if length > len(data) - 8:
            data, size = _read_start(repo, commit, file, 8 + length)
        return parse_header(file, data[8 : 8 + length], length=length, size=size)
    except SourceError as error:
        hint = "the Hub's file itself is broken: ask its owner, or name another revision"
        raise SourceError(f"{repo}@{commit}: {error}", hint=hint) from error


def _read_start(repo: str, commit: str, file: str, count: int) -> tuple[bytes, int]:
    """The first `count` bytes of a file on the Hub (all, where it is shorter), and the whole file's size."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff  # type: ignore[attr-defined]

    url = hf_hub_url(repo, file, revision=commit)
    headers = {**build_hf_headers(), "Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"}
    data = bytearray()
    with http_stream_backoff("GET", url, max_retries=2, headers=headers, timeout=30.0) as response:
        if response.is_error:
            response.read()
            try:
                hf_raise_for_status(response)
            except EntryNotFoundError:
                raise _no_weights(f"{repo}@{commit}", file) from None
        for chunk in response.iter_bytes(1 << 16):
            data += chunk
            if len(data) >= count:  # a server that knows no ranges would go on to the file's end
                break
        # "bytes 0-99/12345" with a range, the plain length without
        total = response.headers.get("Content-Range", "").rpartition("/")[2] or response.headers["Content-Length"]
    return bytes(data[:count]), int(total)


def _no_weights(label: str, file: str) -> SourceError:
    if file == SINGLE:
        return SourceError(f"{label}: has neither {INDEX} nor {SINGLE}", hint="ckptq reads safetensors checkpoints only")
    return SourceError(f"{label}: has no {file}, which its {INDEX} names", hint="ask its owner, or name another revision")


@contextmanager
def _explained(src: str, repo: str) -> Iterator[None]:
    """Turns what huggingface_hub raises into ckptq's errors; what is none of its errors goes through."""
    try:
        yield
    except CkptqError:
        raise
    except Exception as error:
        explained = _explain(error, src, repo)
        if explained is None:
            raise
        raise explained from error


def _explain(error: BaseException, src: str, repo: str) -> CkptqError | None:
    import httpx
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    page = f"{constants.ENDPOINT}/{repo}"
    unreachable = SourceError(
        f"{src}: the Hub can't be reached, and the cache in {constants.HF_HUB_CACHE} does not have all of it",
        hint="run it once with a network and without HF_HUB_OFFLINE (what was fetched is kept), or give a local folder",
    )
    match error:
        case hub.GatedRepoError():
            return SourceError(f"{src}: gated: its owner grants access", hint=f"ask for it on {page}, then `hf auth login`")
        case hub.RepositoryNotFoundError():
            return SourceError(
                f"{src}: no folder of that name, and no such model on the Hub, or a private one",
                hint="check the spelling; for a private model `hf auth login`",
            )
        case hub.RevisionNotFoundError():
            return SourceError(
                f"{src}: the model has no such revision", hint=f"see {page}/tree/main for its branches, tags, commits"
            )
        case hub.LocalEntryNotFoundError():
            return _explain(error.__cause__, src, repo) or unreachable if error.__cause__ else unreachable
        case hub.HfHubHTTPError() if error.response.status_code in (401, 403):
            return SourceError(
                f"{src}: the Hub refuses access ({error.response.status_code})", hint="`hf auth login`, or check HF_TOKEN"
            )
        case hub.HfHubHTTPError():
            return SourceError(
                f"{src}: the Hub answered {error.response.status_code} {error.response.reason_phrase}",
                hint="run it again later; files that were fetched whole are kept",
            )
        case hub.HFValidationError():
            return SourceError(f"{src}: not a valid Hub id", hint="give a folder, or a Hub id as org/name[@revision]")
        case httpx.HTTPError() | hub.OfflineModeIsEnabled():
            return unreachable
        case OSError(errno=number) if number in _FULL:
            return _cache_error(src, "is full, or takes no file of that size", constants.HF_HUB_CACHE)
        case OSError(errno=number, strerror=reason) if number is not None:
            return _cache_error(src, f"can't be written: {reason}", constants.HF_HUB_CACHE)
        case OSError() | RuntimeError() if "(os error 28)" in str(error):  # ENOSPC, as the Xet transfer's Rust code words it
            return _cache_error(src, "is full", constants.HF_HUB_CACHE)
        case OSError() | RuntimeError():
            return SourceError(f"{src}: the transfer failed: {error}", hint="run it again; HF_HUB_DISABLE_XET=1 uses plain HTTP")
    return None


def _cache_error(src: str, what: str, cache: str) -> OutputError:
    return OutputError(
        f"{src}: the Hub's cache in {cache} {what}",
        hint="make room (`hf cache` helps), or set HF_HOME to a folder on another disk",
    )
