"""Files in a folder that somebody else made: links, pipes, odd names. Nothing here trusts a name or a size."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ckptq.errors import SourceError

FILE_LIMIT = 200_000
DEPTH_LIMIT = 32
_SHOWN = 200
_KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket"}


def printable(text: str) -> str:
    """`text` for one line of a terminal or a log: control and format characters escaped, the middle of a long one cut out."""
    if not text:
        return "''"
    if len(text) > _SHOWN:
        text = f"{text[: _SHOWN - 50]}...{text[-40:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def open_regular(path: Path, root: Path | None = None) -> int:
    """A descriptor of a regular file that `root` holds, by default the file's own folder. The caller closes it.

    Opening a named pipe would wait for a writer, and opening a device can do anything: neither is opened.
    Raises SourceError for a link out of `root` and for what is no regular file, OSError as `os.open` does.
    """
    refuse_outside(path, path.parent if root is None else root)
    _refuse_odd(path, path.stat().st_mode)
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _refuse_odd(path, os.fstat(fd).st_mode)
    except SourceError:
        os.close(fd)
        raise
    return fd


def read_bounded(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises as `open_regular`, and SourceError for a longer one."""
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(limit + 1) if size <= limit else b""
    if max(size, len(data)) > limit:
        raise SourceError(f"{printable(path.name)}: expected at most {limit} bytes, found {max(size, len(data))}")
    return data


def refuse_outside(path: Path, root: Path) -> None:
    """Raises SourceError where `path` is a link to nothing, or to something outside of `root`.

    One target outside is right: the Hub's cache keeps each file in `blobs/`, and links `snapshots/REVISION/name` to it.
    """
    if not path.is_symlink():
        return
    name = printable(path.relative_to(root).as_posix())
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a circle of links, before Python 3.13
        raise SourceError(f"{name}: not a readable file (a dangling link?)", hint="fetch the checkpoint again") from error
    home = root.resolve()
    if not target.is_relative_to(home) and target.parent != _blobs(home):
        raise SourceError(
            f"{name}: a link out of the folder: expected a file in it, found a link to {printable(str(target))}",
            hint="if you trust it, put the file itself there: `cp -rL FOLDER COPY` copies a folder with what its links lead to",
        )


def _blobs(home: Path) -> Path | None:
    snapshot = next((folder for folder in (home, *home.parents) if folder.parent.name == "snapshots"), None)
    return snapshot.parent.parent / "blobs" if snapshot else None


def _refuse_odd(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "device")
        raise SourceError(f"{printable(path.name)}: expected a regular file, found a {kind}", hint="remove it, or fetch it again")


def walk(root: Path) -> Iterator[tuple[str, bool]]:
    """(name relative to `root`, whether it is hidden) of every file, in the order of the names.

    Hidden is what lies in a folder whose name begins with a dot, or in `__pycache__`: it is no part of a checkpoint, and
    nothing is checked there. Folders behind links are not entered.
    Raises SourceError for more than FILE_LIMIT files, folders nested deeper than DEPTH_LIMIT, a link that leads out and what is
    neither file nor folder, OSError for a folder that can't be listed.
    """
    count = 0
    todo = [("", 0, False)]
    while todo:
        folder, depth, hidden = todo.pop()
        if depth > DEPTH_LIMIT:
            raise SourceError(f"{printable(folder)}: expected folders at most {DEPTH_LIMIT} deep")
        inner = []
        for entry in _entries(root / folder, hidden):
            name = f"{folder}{entry.name}"
            count += 1
            if count > FILE_LIMIT:
                raise SourceError(f"{root}: expected a checkpoint, found a folder with more than {FILE_LIMIT} files in it")
            if entry.is_dir(follow_symlinks=False):
                inner.append((f"{name}/", depth + 1, hidden or entry.name.startswith(".") or entry.name == "__pycache__"))
                continue
            if hidden or _is_file(root / name, root):
                yield name, hidden
        todo += reversed(inner)


def _is_file(path: Path, root: Path) -> bool:
    """False for a link to a folder of `root`. Raises SourceError for what is not in `root`, or neither file nor folder."""
    refuse_outside(path, root)
    mode = path.stat().st_mode
    if path.is_symlink() and stat.S_ISDIR(mode):
        return False
    _refuse_odd(path, mode)
    return True


def _entries(folder: Path, hidden: bool) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:
        if hidden:
            return []
        raise
