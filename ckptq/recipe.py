"""The recipe: one YAML file that holds a whole job. Strict, with every mistake reported at once.

Sizes are written 5GB, 512MiB or as bytes. Paths are relative to the folder ckptq is started in.
"""

from __future__ import annotations

import difflib
import importlib.resources
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, WrapValidator

from ckptq.errors import RecipeError
from ckptq.mistakes import KeyPath, Sections, close, describe, dotted
from ckptq.scopes import Experts, Fused, Scope, Tower
from ckptq.sections import (
    SOURCES,
    BuiltinCalibration,
    Calibration,
    Components,
    Export,
    Quality,
    Rule,
    Section,
    Treatment,
    Validation,
    rules_or_components,
    strings,
)
from ckptq.spelled import consistent


class Recipe(Section):
    """One job: source, output, what becomes what, calibration, export, validation, comparison."""

    description: str = ""
    model: str | None = None
    output: str | None = None
    from_fp8: bool = False
    components: Components = Field(default_factory=dict)
    """Of a pipeline: what becomes of each. Those that are not named stay."""
    quantize: Annotated[list[Rule], WrapValidator(rules_or_components)] = Field(default=None, validate_default=True)
    keep: Annotated[list[str], BeforeValidator(strings)] = Field(default_factory=list)
    kv_cache: Literal["fp8"] | None = None
    calibration: Calibration = BuiltinCalibration(source="builtin")
    export: Export = Export()
    validation: Validation = Validation()
    quality: Quality | None = None
    scope: Annotated[Scope | None, AfterValidator(consistent)] = None
    """Of an architecture that has no file in ckptq/scopes, or in place of that file."""


def _keys(section: type[Any]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(section))


SECTIONS: Sections = {
    (): tuple(Recipe.model_fields),
    ("quantize",): tuple(Rule.model_fields),
    ("components",): tuple(Treatment.model_fields),
    ("components", "quantize"): tuple(Rule.model_fields),
    **{("calibration", name): tuple(section.model_fields) for name, section in SOURCES.items()},
    ("export",): tuple(Export.model_fields),
    ("validation",): tuple(Validation.model_fields),
    ("quality",): tuple(Quality.model_fields),
    **{("quality", "samples", name): tuple(section.model_fields) for name, section in SOURCES.items()},
    ("scope",): _keys(Scope),
    ("scope", "linears"): _keys(Fused),
    ("scope", "towers"): _keys(Tower),
    ("scope", "towers", "linears"): _keys(Fused),
    ("scope", "experts"): _keys(Experts),
    ("scope", "experts", "linears"): _keys(Fused),
}
"""The keys of each section, by its place."""


def shipped() -> dict[str, str]:
    """{name without .yaml: text} of the recipes that come with ckptq."""
    folder = importlib.resources.files("ckptq") / "recipes"
    if not folder.is_dir():  # an editable install: the recipes lie beside the package
        folder = importlib.resources.files("ckptq") / ".." / "recipes"
    found = {p.name.removesuffix(".yaml"): p.read_text(encoding="utf-8") for p in folder.iterdir() if p.name.endswith(".yaml")}
    return dict(sorted(found.items()))


def load_recipe(name: str, overrides: Sequence[str] = (), **top: str | bool | None) -> Recipe:
    """The recipe at path `name`, or the shipped one of that name, with `KEY=VALUE` overrides and top-level values applied.

    Raises RecipeError listing every mistake, each with its line and, for a typo, the close match.
    """
    path = Path(name)
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RecipeError(f"{name}: expected a YAML file in UTF-8, found byte {error.object[error.start]:#x}") from None
    else:
        known = shipped()
        text = known.get(name.removesuffix(".yaml"), "")
        if not text:
            raise RecipeError(
                f"{name}: no such file, and no shipped recipe of that name"
                f"{close(name.removesuffix('.yaml'), known, near_only=True)}",
                hint="`ckptq recipes` lists those shipped",
            )
    return parse_recipe(text, name, overrides, **top)


def parse_recipe(text: str, name: str, overrides: Sequence[str] = (), **top: str | bool | None) -> Recipe:
    """As load_recipe, from the YAML itself; `name` is what errors call it."""
    problems: list[str] = []
    places: dict[KeyPath, str] = {}
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _locate(root, (), places, problems)
        data = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise RecipeError(f"{name}: not YAML{line}: {error.problem}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # forbidden characters, an alias of itself, the 31st of June
        raise RecipeError(f"{name}: not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(data, dict):
        found = "an empty file" if data is None else type(data).__name__
        raise RecipeError(f"{name}: expected a mapping of settings, found {found}", hint="`ckptq recipes demo` prints an example")
    for override in overrides:
        try:
            _apply(data, override, places)
        except ValueError as error:
            problems.append(f"--set {override}: {error}")
    for key, value in top.items():
        if value is not None:
            data[key] = value
            places[key,] = f"--{key.replace('_', '-')}"
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        problems += _describe_all(error, data, places)
    if not problems:
        return recipe
    count = "1 mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
    raise RecipeError(f"{name}: {count}\n" + "\n".join(f"  - {p}" for p in problems))


def _locate(node: yaml.Node | None, at: KeyPath, places: dict[KeyPath, str], problems: list[str]) -> None:
    """Notes where each key stands, and each key given twice, of which YAML would drop the first silently."""
    items: Iterable[tuple[object, yaml.Node, yaml.Node]] = ()
    if isinstance(node, yaml.MappingNode):
        items = ((key.value, key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode))
    elif isinstance(node, yaml.SequenceNode):
        items = ((i, value, value) for i, value in enumerate(node.value))
    for part, key, value in items:
        path, place = (*at, part), f"line {key.start_mark.line + 1}"
        if path in places:
            problems.append(f"{dotted(path)} ({place}): is given twice, first in {places[path]}")
        places[path] = place
        _locate(value, path, places, problems)


def _apply(data: dict[str, Any], override: str, places: dict[KeyPath, str]) -> None:
    """Sets `a.b.c=VALUE` in nested mappings and lists; VALUE is read as YAML. Raises ValueError where that can't be done."""
    key, sign, value = override.partition("=")
    if not sign or not key:
        raise ValueError("expected KEY=VALUE, for example --set calibration.samples=64")
    try:
        parsed = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{value!r} is not YAML; quote it") from error
    at: Any = data
    path: KeyPath = ()
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if isinstance(at, list):
            if not part.isdecimal() or int(part) >= len(at):
                raise ValueError(f"{dotted(path)} has {len(at)} items: expected a number below that, found {part!r}")
        elif not isinstance(at, dict):
            raise ValueError(f"{dotted(path)} is {at!r}, which has no keys")
        step: Any = int(part) if isinstance(at, list) else part
        path = (*path, step)
        if depth == len(parts) - 1:
            at[step] = parsed
        elif isinstance(at, dict) and at.get(step) is None:
            at[step] = {}
            places[path] = f"--set {override}"
        at = at[step]
    for old in [p for p in places if p[: len(path)] == path]:
        del places[old]
    places[path] = f"--set {override}"


def _describe_all(error: ValidationError, data: dict[str, Any], places: Mapping[KeyPath, str]) -> list[str]:
    """One line for each mistake. A wrong calibration.source hides those beside it: they are those of the nearest source."""
    problems = []
    for e in error.errors():
        problems.append(describe(e, places, SECTIONS))
        wrong_source = e["type"] == "union_tag_invalid" and e["loc"] == ("calibration",)
        if wrong_source and (near := difflib.get_close_matches(e["ctx"]["tag"], SOURCES, n=1)):
            section = {**data["calibration"], "source": near[0]}
            try:
                Recipe.model_validate({"quantize": [{"modules": "*", "scheme": "fp8"}], "calibration": section})
            except ValidationError as inner:
                problems += [describe(i, places, SECTIONS) for i in inner.errors()]
    return problems
