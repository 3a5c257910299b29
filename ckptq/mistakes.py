"""What is wrong in a recipe, in its reader's words: key and line, expected, found, and the close match."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

KeyPath = tuple[object, ...]
"""A key's place in a recipe: ("quantize", 0, "scheme")."""

Sections = Mapping[tuple[str, ...], Collection[str]]
"""{place of a section: its keys}. Of a section in variants, each stands at its place and name: ("calibration", "coco")."""

_SOURCES: tuple[tuple[str, ...], ...] = (("calibration",), ("quality", "samples"))
"""The places of sections in variants, which their key `source` tells apart."""

_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "model_type": "a section with keys of its own",
        "model_attributes_type": "a section with keys of its own",
        "dataclass_type": "a section with keys of its own",
        "tuple_type": "a list",
        "mapping_type": "a mapping of names",
        "invalid_key": "a word for a key",
        "too_short": "at least {min_length} item",
        "greater_than_equal": "at least {ge}",
        "less_than_equal": "at most {le}",
    }
)
"""What is expected, by pydantic's type of error, where its own message says it less well."""


def describe(error: Mapping[str, Any], places: Mapping[KeyPath, str], sections: Sections) -> str:
    """One of pydantic's errors as one line. `places` says where a key stands: `line 3`, or the option that set it."""
    sources = [place[1] for place in sections if place[:1] == ("calibration",)]
    location: KeyPath = error["loc"]
    kind, found = error["type"], error["input"]
    for at in _SOURCES:
        if location[: len(at)] == at and len(location) > len(at):  # pydantic puts the source's name between section and key
            location = (*at, *location[len(at) + 1 :])
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        location, found = (*location, "source"), error.get("ctx", {}).get("tag")
    place = next((places[location[:n]] for n in range(len(location), 0, -1) if location[:n] in places), None)
    where = f"{dotted(location)} ({place})" if place else dotted(location)
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):  # of a model, of a dataclass
        section = tuple(part for part in error["loc"][:-1] if isinstance(part, str))
        if section[:1] == ("components",):  # after which comes the name of one
            section = ("components", *section[2:])
        return f"{where}: unknown key{_belongs(location, sections) or close(str(location[-1]), sections[section])}"
    if kind == "missing":
        return f"{where}: is required"
    if kind == "union_tag_not_found":
        return f"{where}: is required; expected {_either(sources)}"
    if kind == "union_tag_invalid":
        return f"{where}: expected {_either(sources)}, found {found!r}{close(str(found), sources, near_only=True)}"
    if kind in _WORDS:
        words = _WORDS[kind].format(**error.get("ctx", {}))
    else:
        words = re.sub(r"^(Value error, )?(Input should be |expected )", "", str(error["msg"]))
    return f"{where}: expected {words}" + ("" if ", found " in words else f", found {found!r}")


def _belongs(location: KeyPath, sections: Sections) -> str:
    """For a setting of one calibration source that stands under another: which one's it is."""
    if location[:-1] not in _SOURCES:
        return ""
    owners = [place[1] for place, keys in sections.items() if place[:1] == ("calibration",) and location[-1] in keys]
    return f" here; it belongs to source {_either(owners)}" if owners else ""


def _either(words: Sequence[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def dotted(path: Iterable[object]) -> str:
    """("quantize", 0, "scheme") -> `quantize.0.scheme`, which is also what --set takes."""
    return ".".join(str(part) for part in path)


def close(word: str, known: Iterable[str], *, near_only: bool = False) -> str:
    """`; did you mean ...?` for the beginning of a known word or a near miss, else the known words, else nothing."""
    known = sorted(known)
    begun = [name for name in known if word and name.startswith(word)]
    near = begun[:3] or difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; known: {', '.join(known[:12])}" if known and not near_only else ""
