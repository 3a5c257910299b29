"""The recipe: one YAML file that holds a whole job. Strict, with every mistake reported at once.

Sizes are written 5GB, 512MiB or as bytes. Paths are relative to the folder ckptq is started in.
"""

from __future__ import annotations

import difflib
import importlib.resources
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ckptq.errors import RecipeError

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_size(value: object) -> int:
    """`"5GB"` -> 5000000000. Raises ValueError for anything that is no positive size."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
    unit = match and _UNITS.get(match[2].upper())
    if not match or not unit or isinstance(value, bool) or (size := int(float(match[1]) * unit)) <= 0:
        raise ValueError(f"expected a size such as 5GB or 512MiB, found {value!r}")
    return size


def size_option(option: str, value: str | None) -> int | None:
    """A size given on the command line, or None. Raises RecipeError naming the option."""
    try:
        return None if value is None else parse_size(value)
    except ValueError as error:
        raise RecipeError(f"{option}: {error}") from None


def _strings(value: object) -> object:
    return [value] if isinstance(value, str) else value


Size = Annotated[int, BeforeValidator(parse_size)]
Patterns = Annotated[list[str], BeforeValidator(_strings), Field(min_length=1)]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values are not coerced from other types, and nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Rule(Section):
    """Which modules get which scheme. The first rule that matches a module decides; `keep` comes before all rules."""

    modules: Patterns
    scheme: Literal["fp8"]


class _Calibration(Section):
    samples: Annotated[int, Field(ge=1)] = 128
    sequence_length: Annotated[int, Field(ge=8)] = 2048
    seed: int = 0
    save_every: Annotated[int, Field(ge=0, le=600)] = 60
    """Seconds between saves of the calibration's state; 0 saves after each layer. A kill costs no more than this."""


class CocoCalibration(_Calibration):
    """Images with their captions, joined by image_id. Captions come in COCO's `captions_*.json`."""

    source: Literal["coco"]
    images: str
    annotations: str
    prompt: str = "Describe the image."
    max_pixels: Annotated[int, Field(ge=784)] | None = None


class TextCalibration(_Calibration):
    """.txt, .jsonl, .parquet or COCO captions files, or one Hub dataset `org/name[@revision]`."""

    source: Literal["text"]
    files: Patterns
    field: str = "text"


class BuiltinCalibration(_Calibration):
    """The small English set that ships with ckptq."""

    source: Literal["builtin"]


Calibration = Annotated[CocoCalibration | TextCalibration | BuiltinCalibration, Field(discriminator="source")]


class Export(Section):
    """How the output is stored."""

    format: Literal["modelopt"] = "modelopt"
    shard_size: Size = 5 * 10**9


class Validation(Section):
    """What is checked on the finished output before it is published."""

    values: bool = True
    passthrough: bool = True


class Recipe(Section):
    """One job: source, output, what becomes what, calibration, export, validation."""

    description: str = ""
    model: str | None = None
    output: str | None = None
    quantize: Annotated[list[Rule], Field(min_length=1)]
    keep: Annotated[list[str], BeforeValidator(_strings)] = []
    kv_cache: Literal["fp8"] | None = None
    calibration: Calibration = BuiltinCalibration(source="builtin")
    export: Export = Export()
    validation: Validation = Validation()


def shipped() -> dict[str, str]:
    """{name without .yaml: text} of the recipes that come with ckptq."""
    folder = importlib.resources.files("ckptq") / "recipes"
    if not folder.is_dir():  # an editable install: the recipes lie beside the package
        folder = importlib.resources.files("ckptq") / ".." / "recipes"
    found = {p.name.removesuffix(".yaml"): p.read_text(encoding="utf-8") for p in folder.iterdir() if p.name.endswith(".yaml")}
    return dict(sorted(found.items()))


def load_recipe(name: str, overrides: Sequence[str] = (), **top: str | None) -> Recipe:
    """The recipe at path `name`, or the shipped one of that name, with `KEY=VALUE` overrides and top-level values applied.

    Raises RecipeError listing every mistake, each with its line and, for a typo, the close match.
    """
    path = Path(name)
    if path.is_file():
        text = path.read_text(encoding="utf-8")
    else:
        known = shipped()
        text = known.get(name.removesuffix(".yaml"), "")
        if not text:
            raise RecipeError(
                f"{name}: no such file, and no shipped recipe of that name{close(name.removesuffix('.yaml'), known)}",
                hint="`ckptq recipes` lists those shipped",
            )
    return parse_recipe(text, name, overrides, **top)


def parse_recipe(text: str, name: str, overrides: Sequence[str] = (), **top: str | None) -> Recipe:
    """As load_recipe, from the YAML itself; `name` is what errors call it."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        lines = _lines(root, name)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: not YAML: {error}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{name}: expected a mapping of settings, found {type(data).__name__}")
    for override in overrides:
        _apply(data, override)
    data.update({key: value for key, value in top.items() if value is not None})
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        problems = [_describe(e, lines) for e in error.errors()]
    count = "1 mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
    raise RecipeError(f"{name}: {count}\n" + "\n".join(f"  - {p}" for p in problems))


def _lines(node: yaml.Node | None, name: str, at: tuple[object, ...] = ()) -> dict[tuple[object, ...], int]:
    """{path of a key: its line}. Raises RecipeError for a key given twice, of which YAML would drop one silently."""
    found: dict[tuple[object, ...], int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = (*at, key.value)
            if path in found:
                raise RecipeError(f"{name}:{key.start_mark.line + 1}: {_dotted(path)} is given twice, first in line {found[path]}")
            found[path] = key.start_mark.line + 1
            found.update(_lines(value, name, path))
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            found[(*at, i)] = value.start_mark.line + 1
            found.update(_lines(value, name, (*at, i)))
    return found


def _apply(data: dict[str, Any], override: str) -> None:
    """Sets `a.b.c=VALUE` in nested mappings and lists; VALUE is read as YAML."""
    key, sign, value = override.partition("=")
    if not sign or not key:
        raise RecipeError(f"--set {override}: expected KEY=VALUE, for example --set calibration.samples=64")
    *parents, last = key.split(".")
    at: Any = data
    try:
        for part in parents:
            at = at[int(part)] if isinstance(at, list) else at.setdefault(part, {})
        at[int(last) if isinstance(at, list) else last] = yaml.safe_load(value)
    except (TypeError, ValueError, IndexError, AttributeError, yaml.YAMLError) as error:
        raise RecipeError(f"--set {override}: {key} can't be set: {error}") from error


def _describe(error: Mapping[str, Any], lines: Mapping[tuple[object, ...], int]) -> str:
    location = tuple(part for part in error["loc"] if part not in ("coco", "text", "builtin"))
    line = next((lines[location[:n]] for n in range(len(location), 0, -1) if location[:n] in lines), None)
    where = f"{_dotted(location)} (line {line})" if line else _dotted(location)
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key{close(str(location[-1]), _keys(error['loc'][:-1]))}"
    if error["type"] == "missing":
        return f"{where}: is required"
    message = str(error["msg"]).removeprefix("Value error, ")
    shown = "" if "found" in message else f", found {error['input']!r}"
    return f"{where}: {message[:1].lower()}{message[1:]}{shown}"


def _keys(location: tuple[object, ...]) -> set[str]:
    """The keys of the section at a pydantic error location, for close matches."""
    kind: Any = Recipe
    for part in location:
        if isinstance(part, str) and isinstance(kind, type) and issubclass(kind, BaseModel) and part in kind.model_fields:
            kind = kind.model_fields[part].annotation
        kind = _section(kind, part)
    return set(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else set()


def _section(kind: Any, part: object) -> Any:
    """The section class inside an annotation; of several, the one whose `source` is `part`."""
    if typing.get_origin(kind) in (typing.Annotated, list):
        return _section(typing.get_args(kind)[0], part)
    if isinstance(kind, types.UnionType):
        for choice in typing.get_args(kind):
            if part in typing.get_args(getattr(choice, "model_fields", {}).get("source", Field()).annotation):
                return choice
    return kind


def _dotted(path: Iterable[object]) -> str:
    return ".".join(str(part) for part in path)


def close(word: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` for a near miss, else the known words, else nothing."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; known: {', '.join(known[:12])}" if known else ""
