"""JSON that somebody else wrote, read in bounded memory and without Python's leniency.

Python's json keeps the last of two equal keys and takes NaN and Infinity; serde_json (safetensors) and other readers do
neither, so that two programs would see two files.
"""

from __future__ import annotations

import json
import math
import reprlib
from pathlib import Path
from typing import Any

from ckptq.errors import SourceError
from ckptq.folder import printable, read_bounded

LIMIT = 16_000_000
"""Bytes of a configuration file. The longest that are published hold some 100 kB."""
_VALUES = 2_000_000
"""A bare `{}` takes 64 bytes of memory for three of text: what bounds memory is how many values there are."""
_DEPTH = 100
_WIDE = 16_000_000
"""Bytes of text that is not ASCII: Python may take four bytes for each of its characters."""
_DIGITS = 40

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 100


def read_json(path: Path, limit: int = LIMIT) -> Any:
    """The content of a JSON file of at most `limit` bytes.

    Raises SourceError for what `parse` refuses, a longer file, a link out of the file's folder, a pipe or device;
    FileNotFoundError where there is none.
    """
    return read_text_and_json(path, limit)[1]


def read_text_and_json(path: Path, limit: int = LIMIT) -> tuple[str, Any]:
    """The same, with the text as it stands in the file."""
    try:
        raw = read_bounded(path, limit)
        return raw.decode(), parse(raw)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise SourceError(f"{path}: can't be read: {error.strerror}") from error
    except ValueError as error:
        raise SourceError(f"{path}: can't be read as JSON: {error}") from error


def parse(raw: bytes) -> Any:
    """The value that `raw`, UTF-8, stands for.

    Raises ValueError for anything but JSON by RFC 8259, for two equal keys in one object, a half of a surrogate pair, a number
    beyond F64's range or of more than 40 digits, values nested deeper than 100 and more than 2,000,000 of them.
    """
    values = raw.count(b",") + raw.count(b"[") + raw.count(b"{")
    if values > _VALUES:
        raise ValueError(f"expected at most {_VALUES} values, found about {values}")
    if len(raw) > _WIDE and not raw.isascii():
        raise ValueError(f"expected at most {_WIDE} bytes of text that is not ASCII, found {len(raw)}")
    try:
        value = _DECODER.decode(raw.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise ValueError(f"nested deeper than {_DEPTH}") from None
    _refuse_deep(value, halves=b"\\ud" in raw.lower())
    return value


def short(value: object) -> str:
    """A value for a message: its repr, abridged and printable."""
    return printable(_short.repr(value))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {printable(twice)} stands twice in one object")
    return made


def _int(text: str) -> int | float:
    if len(text) > _DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text) if text != "-0" else -0.0  # as serde_json, for which it is no size


def _float(text: str) -> float:
    value = float(text) if len(text) <= 1000 else math.inf
    if math.isinf(value):
        raise ValueError(f"the number {printable(text)} is out of range")
    return value


def _constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_int, parse_float=_float, parse_constant=_constant)


def _refuse_deep(value: Any, *, halves: bool) -> None:
    level: list[Any] = [[value]]
    for _ in range(_DEPTH + 1):
        inside = [inner for outer in level for inner in _inside(outer)]
        if halves:
            _refuse_halves(inside)
        level = [inner for inner in inside if isinstance(inner, (dict, list))]
        if not level:
            return
    raise ValueError(f"nested deeper than {_DEPTH}")


def _inside(outer: dict[str, Any] | list[Any]) -> list[Any]:
    return list(outer.values()) if isinstance(outer, dict) else outer


def _refuse_halves(level: list[Any]) -> None:
    for value in level:
        for text in value if isinstance(value, dict) else (value,):
            if isinstance(text, str) and any("\ud800" <= c <= "\udfff" for c in text):
                raise ValueError(f"{printable(text)} holds half of a surrogate pair, which no UTF-8 can say")
