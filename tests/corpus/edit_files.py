"""Small edits of a checkpoint folder: those of its configuration files, and of files as such."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from corpus.edit import EXTRA, INDEX, Change, Edit, Tensors, edit_json, matching, read, weight_files, write

# --- configs ---


def config(change: Callable[[dict[str, Any]], object]) -> Edit:
    return lambda folder: edit_json(folder / "config.json", change)


def section(change: Callable[[dict[str, Any]], object]) -> Edit:
    """Edits config.json's quantization_config."""
    return config(lambda data: change(data["quantization_config"]))


def setting(**values: Any) -> Edit:
    """Settings of config.json's quantization_config; None takes a key away."""

    def apply(body: dict[str, Any]) -> None:
        for key, value in values.items():
            if value is None:
                body.pop(key)
            else:
                body[key] = value

    return section(apply)


def other(change: Callable[[dict[str, Any]], object]) -> Edit:
    """Edits hf_quant_config.json's quantization."""
    return lambda folder: edit_json(folder / "hf_quant_config.json", lambda data: change(data["quantization"]))


def ignoring(change: Callable[[list[str]], Iterable[str]]) -> Edit:
    """Edits the exclude list wherever the folder has one: both config files, whatever the method calls it."""

    def apply(folder: Path) -> None:
        def one(data: dict[str, Any]) -> None:
            for key in ("ignore", "ignored_layers", "modules_to_not_convert", "exclude_modules", "exclude"):
                if key in data:
                    data[key] = list(change(data[key]))

        section(one)(folder)
        if (folder / "hf_quant_config.json").exists():
            other(one)(folder)

    return apply


def groups(change: Callable[[dict[str, Any]], object]) -> Edit:
    """Edits each of compressed-tensors' config groups."""
    return section(lambda data: [change(group) for group in data["config_groups"].values()])


def index(change: Callable[[dict[str, Any]], object]) -> Edit:
    return lambda folder: edit_json(folder / INDEX, change)


# --- files ---


def remove(*names: str) -> Edit:
    def apply(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return apply


def text(name: str, content: str) -> Edit:
    def apply(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_text(content, encoding="utf-8")

    return apply


def cut(name: str, keep: float) -> Edit:
    """A file without its end: `keep` of it stays."""

    def apply(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).unlink()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return apply


def move(old: str, new: str) -> Edit:
    def apply(folder: Path) -> None:
        (folder / new).parent.mkdir(exist_ok=True)
        (folder / old).rename(folder / new)

    return apply


def beside(name: str, change: Change, *patterns: str) -> Edit:
    """A file `name` with copies of the tensors that match, each changed. An index is left as it was."""

    def apply(folder: Path) -> None:
        every = {key: tensor for file in weight_files(folder) for key, tensor in read(file).items()}
        changed = {key: change(every[key]) for key in matching(every, *patterns)}
        write(folder / name, {key: tensor for key, tensor in changed.items() if tensor is not None})

    return apply


def elsewhere(*patterns: str) -> Edit:
    """The tensors of these names in a further file, which the index lists where there is one."""

    def apply(folder: Path) -> None:
        moved: Tensors = {}
        for file in weight_files(folder):
            stored = read(file)
            found = {name for name in stored if any(fnmatchcase(name, pattern) for pattern in patterns)}
            if found:
                moved |= {name: stored.pop(name) for name in sorted(found)}
                write(file, stored)
        matching(moved, *patterns)
        write(folder / EXTRA, moved)
        if (folder / INDEX).exists():
            index(lambda data: data["weight_map"].update(dict.fromkeys(moved, EXTRA)))(folder)

    return apply
