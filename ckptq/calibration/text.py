"""Text: .txt, .jsonl, .parquet or COCO captions files, or a dataset on the Hub.

.txt            one document; a long one is cut into pieces of about `sequence_length` tokens, at blank lines where it has some,
                else at line ends, else at spaces. Long samples are better than many short ones: what a token does depends on
                the context before it.
.jsonl          one sample a line: the text under `field`, or a conversation, [{role, content}], there or under `messages`
.parquet        one sample a row, columns as the keys of .jsonl
.json           COCO captions, one sample each
org/name[@rev]  a dataset's .parquet, else .jsonl, else .txt files, those of the train split where names tell it: sorted by
                name, and as many as it takes to have enough samples

Of a conversation the first question and its answer are taken. Blank texts are left out.
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import heapq
import itertools
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ckptq.calibration import Sample
from ckptq.calibration.coco import read_captions
from ckptq.errors import CalibrationError
from ckptq.mistakes import close
from ckptq.sections import TextCalibration

CHARS_PER_TOKEN = 4
"""Of English in today's vocabularies. It sets where .txt files are cut, no more: the encoder cuts at the exact length."""
_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\S+))?")


def load(settings: TextCalibration) -> list[Sample]:
    """At most `settings.samples` of all that the files hold, in one pass, holding no more than the chosen ones.

    Raises CalibrationError for a file that can't be read, has no usable text or lacks the field.
    """
    found = (sample for entry in settings.files for sample in _entry(entry, settings))
    return choose(found, settings.samples, settings.seed)


def choose(found: Iterable[Sample], count: int, seed: int) -> list[Sample]:
    """`count` of the samples, or all where there are fewer, in the seed's order. A smaller count gives the first of a larger."""
    draw = random.Random(seed)  # noqa: S311, a seeded choice is the point
    return [sample for _, _, sample in heapq.nsmallest(count, ((draw.random(), i, sample) for i, sample in enumerate(found)))]


def _entry(entry: str, settings: TextCalibration) -> Iterator[Sample]:
    path = Path(entry).expanduser()
    if path.is_file():
        yield from _file(path, settings)
    elif path.is_dir():
        raise CalibrationError(f"{entry}: a folder, expected a file", hint="name its files")
    elif path.suffix.lower() in _READERS or not (match := _HUB_ID.fullmatch(entry)):
        raise CalibrationError(f"{entry}: no such file", hint="give a file, or a Hub dataset as org/name[@revision]")
    else:
        yield from _dataset(entry, match["repo"], match["revision"], settings)


def _file(path: Path, settings: TextCalibration) -> Iterator[Sample]:
    reader = _READERS.get(path.suffix.lower())
    if not reader:
        raise CalibrationError(f"{path}: unknown kind of file {path.suffix!r}; expected {', '.join(_READERS)}")
    empty = True
    try:
        for sample in reader(path, settings):
            if sample.text.strip():
                empty = False
                yield sample
    except (OSError, ValueError, NotImplementedError) as error:  # UnicodeDecodeError and pyarrow's among them
        raise CalibrationError(f"{path}: can't be read: {error}", hint="give texts in UTF-8, or leave it out") from error
    if empty:
        raise CalibrationError(f"{path}: holds no text", hint="leave it out")


def _txt(path: Path, settings: TextCalibration) -> Iterator[Sample]:
    limit = CHARS_PER_TOKEN * settings.sequence_length
    with path.open(encoding="utf-8-sig") as file:
        for number, piece in enumerate(pieces(iter(lambda: file.read(limit), ""), limit), 1):
            yield Sample(f"{path.name} piece {number}", piece)


def pieces(chunks: Iterable[str], limit: int) -> Iterator[str]:
    """The text that `chunks` make up, in pieces of at most `limit` characters, stripped.

    Each ends at the last blank line in its second half, else at the last line end there, else at the last space, else at `limit`.
    """
    rest = ""
    for chunk in chunks:
        rest += chunk
        while len(rest) > limit:
            ends = (rest.rfind(separator, limit // 2, limit) for separator in ("\n\n", "\n", " "))
            end = next((e for e in ends if e > 0), limit)
            yield rest[:end].strip()
            rest = rest[end:]
    yield rest.strip()


def _jsonl(path: Path, settings: TextCalibration) -> Iterator[Sample]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise CalibrationError(f"{path}:{number}: not JSON: {error}") from error
                if not isinstance(row, dict):
                    raise CalibrationError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
                yield _sample(f"{path.name}:{number}", row, settings.field)


def _parquet(path: Path, settings: TextCalibration) -> Iterator[Sample]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        column = _key(str(path), file.schema_arrow.names, settings.field)
        row = 0
        for batch in file.iter_batches(batch_size=1024, columns=[column]):
            for value in batch.column(0).to_pylist():
                row += 1
                yield _sample(f"{path.name} row {row}", {column: value}, settings.field)


def _captions(path: Path, settings: TextCalibration) -> Iterator[Sample]:
    for image_id, _, captions in read_captions(path):
        for number, caption in enumerate(captions, 1):
            yield Sample(f"{path.name} image_id {image_id} caption {number}", caption)


_READERS: Mapping[str, Callable[[Path, TextCalibration], Iterator[Sample]]] = {
    ".txt": _txt,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
    ".json": _captions,
}


def _key(name: str, keys: Iterable[str], field: str) -> str:
    """`field`, or `messages` where there is no `field`."""
    keys = list(keys)
    for key in (field, "messages"):
        if key in keys:
            return key
    raise CalibrationError(
        f"{name}: has no {field!r}{close(field, keys)}", hint="set calibration.field to the one that holds the text"
    )


def _sample(name: str, row: Mapping[str, Any], field: str) -> Sample:
    """A row's sample; its text is empty where the row's is."""
    key = _key(name, row, field)
    match row[key]:
        case None:
            return Sample(name, "")
        case str(text):
            return Sample(name, text)
        case list(messages):
            turns = [(m.get("role"), _content(name, m.get("content"))) for m in messages if isinstance(m, dict)]
            for (asking, prompt), (answering, text) in itertools.pairwise(turns):
                if (asking, answering) == ("user", "assistant"):
                    return Sample(name, text, prompt)
            raise CalibrationError(f"{name}: {key!r} holds no user's message with an assistant's after it")
        case value:
            raise CalibrationError(f"{name}: {key!r} should be a text or a list of messages, found {type(value).__name__}")


def _content(name: str, content: Any) -> str:
    if isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise CalibrationError(f"{name}: a message's content should be text", hint="images are calibrated with source: coco")
    return content


def _dataset(entry: str, repo: str, revision: str | None, settings: TextCalibration) -> Iterator[Sample]:
    """Samples of a Hub dataset, from as few of its files as hold `settings.samples`.

    Without a network the cache is enough, if it has the files that the same settings took before.
    """
    with _hub_errors(entry):
        names, offline = _file_names(repo, revision)
    patterns = [f"{split}*{suffix}" for suffix in (".parquet", ".jsonl", ".txt") for split in ("*train", "")]
    pattern = next((p for p in patterns if fnmatch.filter(names, p)), None)
    if not pattern:
        raise CalibrationError(
            f"{entry}: the dataset has no .parquet, .jsonl or .txt file; its files: {', '.join(sorted(names)[:8]) or 'none'}",
            hint="convert it to one of these, and name the file",
        )
    count = 0
    for name in sorted(fnmatch.filter(names, pattern)):
        with _hub_errors(entry):
            folder = _snapshot(repo, revision, [glob.escape(name)], offline=offline)
        for sample in _file(folder / name, settings):
            count += 1
            yield sample
        if count >= settings.samples:
            return
    if offline:  # raises where the dataset has more such files than the cache
        with _hub_errors(entry):
            _snapshot(repo, revision, [pattern], offline=True)


def _file_names(repo: str, revision: str | None) -> tuple[list[str], bool]:
    """The dataset's file names, and whether they are only those in the cache, because the Hub can't be reached."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        return HfApi().list_repo_files(repo, repo_type="dataset", revision=revision), False
    except (httpx.ConnectError, httpx.TimeoutException, OfflineModeIsEnabled):
        folder = _snapshot(repo, revision, [], offline=True)
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()], True


def _snapshot(repo: str, revision: str | None, patterns: list[str], *, offline: bool) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=patterns, local_files_only=offline))


@contextlib.contextmanager
def _hub_errors(entry: str) -> Iterator[None]:
    """Turns what huggingface_hub raises into CalibrationError."""
    import httpx
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except (OSError, HFValidationError, httpx.HTTPError) as error:  # most of huggingface_hub's errors are OSErrors
        raise CalibrationError(
            f"{entry}: no such file, and the Hub's dataset of that name can't be had: {str(error).strip().splitlines()[0]}",
            hint="check the spelling, the network and, for a private dataset, `hf auth login`; or name a local file, "
            "or calibrate with source: builtin",
        ) from error
