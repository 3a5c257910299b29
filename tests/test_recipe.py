"""Recipes: what is accepted, and that every mistake is told at once with its place and the way out."""

import itertools
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptq.errors import RecipeError
from ckptq.recipe import SECTIONS, Recipe, load_recipe, parse_recipe, shipped
from ckptq.schemes import SCHEMES
from ckptq.scopes import Experts, Fused, Scope, Tower
from ckptq.sections import CocoCalibration, Section, TextCalibration, parse_size

FORMATS_LISTED = "'modelopt', 'compressed-tensors', 'fp8', 'int8', 'mxfp8' or 'mxfp4-dualscale'"
SCHEMES_LISTED = (
    "'fp8', 'fp8-tensor', 'fp8-dynamic', 'fp8-block', 'int8', 'nvfp4', 'nvfp4a16', 'mxfp8', 'mxfp4' or 'mxfp4-dualscale'"
)
GOOD = """\
model: some/where
quantize:
  - modules: "model.layers.*"
    scheme: fp8
keep: ["visual*", "lm_head"]
calibration:
  source: text
  files: [a.txt, b.txt]
  samples: 3
export:
  shard_size: 1MB
"""


def mistakes(text: str, *overrides: str, **top: str) -> list[str]:
    """The lines of the error that the recipe is refused with."""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml", overrides, **top)
    first, *rest = str(caught.value).splitlines()
    assert first.startswith("r.yaml: ")
    if not rest:
        return [first.removeprefix("r.yaml: ")]
    assert first == f"r.yaml: {len(rest)} mistake{'s' * (len(rest) > 1)}"
    return [line.removeprefix("  - ") for line in rest]


def test_a_good_one() -> None:
    recipe = parse_recipe(GOOD, "r.yaml")
    assert recipe.quantize[0].modules == ["model.layers.*"]
    assert isinstance(recipe.calibration, TextCalibration)
    assert recipe.calibration.files == ["a.txt", "b.txt"]
    assert (recipe.calibration.samples, recipe.calibration.seed) == (3, 0)
    assert recipe.export.shard_size == 10**6
    assert recipe.kv_cache is None


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_shipped_one_parses(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe == load_recipe(f"{name}.yaml")
    assert recipe.description
    assert recipe.model
    assert recipe.output
    static = any(SCHEMES[rule.scheme].activation == "static" for rule in recipe.quantize)
    assert recipe.kv_cache == ("fp8" if static and recipe.export.format != "fp8" else None), "what is calibrated anyway has it"
    assert recipe.model_fields_set >= ({"calibration"} if static else set())


def test_the_shipped_ones_by_name() -> None:
    assert {"demo", "qwen25vl-lm-fp8", "qwen25vl-lm-fp8-text"} <= set(shipped())


def test_a_path_wins_over_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe("demo").model == "examples/tiny-qwen2.5-vl"
    Path("demo").write_text(GOOD)
    assert load_recipe("demo").model == "some/where"
    assert load_recipe("demo.yaml").model == "examples/tiny-qwen2.5-vl"
    Path("demo.yaml").write_text(GOOD.replace("some/where", "else/where"))
    assert load_recipe("demo.yaml").model == "else/where"


def test_no_such_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"fp9: no such file, and no shipped .* did you mean qwen25vl-lm-fp8") as caught:
        load_recipe("qwen25vl-lm-fp9")
    assert "ckptq recipes" in str(caught.value.hint)
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe(str(tmp_path))


def test_all_mistakes_at_once() -> None:
    text = """\
descripton: typo of a key
quantize:
  - modules: "model.layers.*"
    scheme: fp9
    bits: 8
keep: 3
calibration:
  source: coc
  images: somewhere
  sampels: 3
  seed: 1.5
export:
  format: model-opt
  shard_size: 5XB
"""
    assert mistakes(text) == [
        f"quantize.0.scheme (line 4): expected {SCHEMES_LISTED}, found 'fp9'",
        "quantize.0.bits (line 5): unknown key; known: modules, scheme",
        "keep (line 6): expected a valid list, found 3",
        "calibration.source (line 8): expected coco, text, media, builtin or prompts, found 'coc'; did you mean coco?",
        "calibration.seed (line 11): expected a valid integer, found 1.5",
        "calibration.annotations (line 7): is required",
        "calibration.sampels (line 10): unknown key; did you mean samples?",
        f"export.format (line 13): expected {FORMATS_LISTED}, found 'model-opt'",
        "export.shard_size (line 14): expected a size such as 5GB or 512MiB, found '5XB'",
        "descripton (line 1): unknown key; did you mean description?",
    ]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            "{source: nothing-such}",
            "calibration.source (line 6): expected coco, text, media, builtin or prompts, found 'nothing-such'",
        ),
        ("{samples: 3}", "calibration.source (line 6): is required; expected coco, text, media, builtin or prompts"),
        ("{source: 3}", "calibration.source (line 6): expected coco, text, media, builtin or prompts, found '3'"),
        ("builtin", "calibration (line 6): expected a section with keys of its own, found 'builtin'"),
        (
            "{source: builtin, files: a}",
            "calibration.files (line 6): unknown key here; it belongs to source text, media or prompts",
        ),
        ("{source: text, files: []}", "calibration.files (line 6): expected at least 1 item, found []"),
        ("{source: builtin, samples: 0}", "calibration.samples (line 6): expected at least 1, found 0"),
        ("{source: builtin, save_every: 601}", "calibration.save_every (line 6): expected at most 600, found 601"),
        ("{source: builtin, samples: '3'}", "calibration.samples (line 6): expected a valid integer, found '3'"),
        ("{source: builtin, samples: true}", "calibration.samples (line 6): expected a valid integer, found True"),
    ],
)
def test_calibration(section: str, message: str) -> None:
    before, after = GOOD.index("calibration:"), GOOD.index("export:")
    assert mistakes(GOOD[:before] + f"calibration: {section}\n" + GOOD[after:]) == [message]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a mapping of settings, found an empty file"),
        ("# nothing\n", "expected a mapping of settings, found an empty file"),
        ("- a\n", "expected a mapping of settings, found list"),
        ("a: [\n", "not YAML (line 2): expected the node content, but found '<stream end>'"),
        ("a: b: c\n", "not YAML (line 1): mapping values are not allowed here"),
        ("quantize: !!python/name:os.system x\n", "not YAML (line 1): could not determine a constructor"),
        ("a: \x01\n", "not YAML: unacceptable character #x0001"),
        ("a: &a [*a]\n", "not YAML: "),
        ("day: 2024-13-45\n", "not YAML: month must be in 1..12"),
        ("? [a, b]\n: 3\n", "not YAML (line 1): found unhashable key"),
        ("quantize: {}\n", "quantize (line 1): expected a valid list, found {}"),
        ("quantize: []\n", "quantize (line 1): expected at least 1 item, found []"),
        ("text: 3\nquantize: [{modules: x, scheme: fp8}]\n", "text (line 1): unknown key; "),
        ("3: 3\nquantize: [{modules: x, scheme: fp8}]\n", "3: expected a word for a key, found 3"),
        ("kv_cache: fp8\n", "quantize: is required"),
    ],
)
def test_what_is_no_recipe(text: str, message: str) -> None:
    (found,) = mistakes(text)
    assert found.startswith(message)


def test_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"description: caf\xe9\n")
    with pytest.raises(RecipeError, match="expected a YAML file in UTF-8, found byte 0xe9"):
        load_recipe(str(tmp_path / "r.yaml"))


def test_keys_given_twice_are_told_with_the_rest() -> None:
    text = GOOD.replace("  samples: 3\n", "  samples: 3\n  samples: x\n")
    text = text.replace("    scheme: fp8\n", "    scheme: fp8\n    scheme: fp8\n")
    assert mistakes(text) == [
        "quantize.0.scheme (line 5): is given twice, first in line 4",
        "calibration.samples (line 11): is given twice, first in line 10",
        "calibration.samples (line 11): expected a valid integer, found 'x'",
    ]


@given(st.text(alphabet="ab:-[]{}&*!|>'\"#%@ \n\t019.", max_size=40))
def test_no_text_but_a_recipe_gets_through(text: str) -> None:
    with pytest.raises(RecipeError):
        parse_recipe(text, "r.yaml")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("abc{}", max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["source", "samples", "x"]), inner, max_size=2),
    max_leaves=4,
)


@given(st.sampled_from(sorted({".".join([*place[:1], key]) for place, keys in SECTIONS.items() for key in keys})), JSON)
def test_any_value_anywhere_is_taken_or_refused_in_words(key: str, value: Any) -> None:
    """No value ends in anything but a recipe or a RecipeError that names the key."""
    data: dict[str, Any] = {"quantize": [{"modules": ["x"], "scheme": "fp8"}], "calibration": {"source": "builtin"}, "export": {}}
    top, _, inner = key.partition(".")
    if top == "quantize" and inner:
        data["quantize"][0][inner] = value
    elif inner:
        data.setdefault(top, {})[inner] = value
    else:
        data[top] = value
    try:
        parse_recipe(json.dumps(data), "r.yaml")
    except RecipeError as error:
        told = str(error)
    else:
        told = top
    assert top in told


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("calibration.samples=64", "calibration.samples", 64),
        ("calibration={source: builtin, samples: 64}", "calibration.samples", 64),
        ("quantize.0.modules=[a, b]", "quantize.0.modules.1", "b"),
        ("quantize.0={modules: [a, c], scheme: fp8}", "quantize.0.modules.1", "c"),
        ("keep.1=head", "keep", ["visual*", "head"]),
        ("keep=[]", "keep", []),
        ("keep=visual*", "keep", ["visual*"]),
        ("export.shard_size=2GiB", "export.shard_size", 2**31),
        ("export.shard_size=512", "export.shard_size", 512),
        ("validation.values=false", "validation.values", False),
        ("kv_cache=fp8", "kv_cache", "fp8"),
        ("kv_cache=", "kv_cache", None),
        ("description=a=b", "description", "a=b"),
    ],
)
def test_overrides(override: str, key: str, value: object) -> None:
    found: Any = parse_recipe(GOOD, "r.yaml", [override])
    for part in key.split("."):
        found = found[int(part)] if part.isdecimal() else getattr(found, part)
    assert found == value


def test_top_level_values() -> None:
    recipe = parse_recipe(GOOD, "r.yaml", ["model=b"], model="a", output=None)
    assert (recipe.model, recipe.output) == ("a", None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("samples", "--set samples: expected KEY=VALUE, for example --set calibration.samples=64"),
        ("=3", "--set =3: expected KEY=VALUE, for example --set calibration.samples=64"),
        ("keep=[", "--set keep=[: '[' is not YAML; quote it"),
        ("calibration.sample=3", "calibration.sample (--set calibration.sample=3): unknown key; did you mean samples?"),
        ("calibration.samples=x", "calibration.samples (--set calibration.samples=x): expected a valid integer, found 'x'"),
        (
            "callibration.samples=3",
            "callibration (--set callibration.samples=3): unknown key; did you mean calibration or validation?",
        ),
        ("quantize.1.scheme=fp8", "--set quantize.1.scheme=fp8: quantize has 1 items: expected a number below that, found '1'"),
        ("quantize.-1.scheme=fp8", "--set quantize.-1.scheme=fp8: quantize has 1 items: expected a number below that, found '-1'"),
        ("model.x=3", "--set model.x=3: model is 'some/where', which has no keys"),
        ("calibration.source=builtin", "calibration.files (line 8): unknown key here; it belongs to source text, media or prompts"),
    ],
)
def test_overrides_gone_wrong(override: str, message: str) -> None:
    assert mistakes(GOOD, override) == [message]


def test_mistakes_of_overrides_and_file_together() -> None:
    assert mistakes(GOOD.replace("fp8", "fp9"), "export.format=x", "nonsense") == [
        "--set nonsense: expected KEY=VALUE, for example --set calibration.samples=64",
        f"quantize.0.scheme (line 4): expected {SCHEMES_LISTED}, found 'fp9'",
        f"export.format (--set export.format=x): expected {FORMATS_LISTED}, found 'x'",
    ]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("5 gb", 5 * 10**9),
        ("1.5KiB", 1536),
        ("7", 7),
        ("7B", 7),
        (7, 7),
        ("2TB", 2 * 10**12),
        ("512MiB", 2**29),
    ],
)
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5XB", "0", "0.1", True, None, "1e9", "5 GB GB", "inf", [], {"a": "{"}])
def test_bad_sizes(text: object) -> None:
    with pytest.raises(ValueError, match="expected a size such as 5GB or 512MiB, found"):
        parse_size(text)


def test_every_section_offers_close_matches() -> None:
    """SECTIONS names each section of the schema by its place, so that a typo in any of them is met with its keys."""
    assert SECTIONS[()] == tuple(Recipe.model_fields)
    sections = {tuple(kind.model_fields) for kind in Section.__subclasses__() if not kind.__name__.startswith("_")}
    bases = CocoCalibration.__mro__[1:3]  # of what runs language models, and of denoisers as well
    kinds = (kind for base in bases for kind in base.__subclasses__() if not kind.__name__.startswith("_"))
    sections |= {tuple(kind.model_fields) for kind in kinds}
    sections |= {tuple(field.name for field in fields(kind)) for kind in (Scope, Fused, Tower, Experts)}
    assert set(SECTIONS.values()) == sections


def test_a_recipe_is_frozen() -> None:
    recipe = parse_recipe(GOOD, "r.yaml")
    for section, key in itertools.product((recipe, recipe.export), ("model", "format")):
        with pytest.raises(ValueError):
            setattr(section, key, "x")
