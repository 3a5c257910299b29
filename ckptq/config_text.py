"""config.json as text: sections come and go, and every other byte stays. Numbers keep the form they were written in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from json.decoder import JSONDecoder
from typing import Any

_SPACE = re.compile(r"[ \t\r\n]*")


def insert_section(text: str, key: str, section: Mapping[str, Any]) -> str:
    """`text`, a JSON object, with one more key at its end."""
    end = len(text.rstrip()[:-1].rstrip())  # behind the last value, or behind the opening brace
    indent = next((line[: -len(line.lstrip())] for line in text.splitlines()[1:] if line.strip() not in ("", "}")), "  ")
    comma = "" if text[:end].endswith("{") else ","
    if "\n" in text.strip():
        value = json.dumps(section, indent=indent or 2).replace("\n", "\n" + indent)
        added = f'{comma}\n{indent}"{key}": {value}'
    else:
        added = f'{comma}{" " if comma else ""}"{key}": {json.dumps(section)}'
    result = text[:end] + added + text[end:]
    if json.loads(result) != {**json.loads(text), key: section}:
        raise AssertionError("config.json was not extended as intended")
    return result


def remove_section(text: str, path: Sequence[str]) -> str:
    """`text`, a JSON object, without the key at `path`: ["text_config", "quantization_config"] is inside another object.

    No object in it has equal keys (json_file.parse has seen to that). Raises KeyError where there is no such key.
    """
    *outer, key = path
    at, inner = _skip(text, 0), json.loads(text)
    expected = inner
    for name in outer:
        at = next(value for found, _, value, _ in _members(text, at) if found == name)
        inner = inner[name]
    del inner[key]
    members = list(_members(text, at))
    i = next(i for i, member in enumerate(members) if member[0] == key)
    _, begin, _, end = members[i]
    if i:
        begin = members[i - 1][3]  # with the comma before it
    elif len(members) > 1:
        end = members[1][1]
    else:
        begin = at + 1
    result = text[:begin] + text[end:]
    if json.loads(result) != expected:
        raise AssertionError("config.json was not shortened as intended")
    return result


def _members(text: str, at: int) -> Iterator[tuple[str, int, int, int]]:
    """(key, where it begins, where its value begins, where that ends) of each member of the object that begins at `at`."""
    decode = JSONDecoder().raw_decode
    at = _skip(text, at + 1)
    while text[at] != "}":
        key, colon = decode(text, at)
        value = _skip(text, _skip(text, colon) + 1)
        _, end = decode(text, value)
        yield key, at, value, end
        at = _skip(text, end)
        if text[at] == ",":
            at = _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]
