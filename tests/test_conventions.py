"""What holds for every file of a kind, found by its being there: scopes, exporters, recipes, modules."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import get_args

import pytest

import ckptq.exporters
import ckptq.scopes
from ckptq.numerics import Numerics, find_numerics
from ckptq.plan import Exporter
from ckptq.recipe import load_recipe, shipped
from ckptq.schemes import SCHEMES, Scheme
from ckptq.scopes import Scope, all_scopes
from ckptq.sections import Export, Rule

PACKAGE = Path(__file__).parent.parent / "ckptq"
SCOPES = sorted(p.stem for p in (PACKAGE / "scopes").glob("[!_]*.py"))
EXPORTERS = sorted(m.name for m in pkgutil.iter_modules(ckptq.exporters.__path__))
PINNED = re.compile(r"https://github\.com/[\w.-]+/[\w.-]+/blob/(v\d+\.\d+\.\d+|[0-9a-f]{40})/\S+\.py")


@pytest.mark.parametrize("name", SCOPES)
def test_a_scope(name: str) -> None:
    scope = importlib.import_module(f"ckptq.scopes.{name}").SCOPE
    assert isinstance(scope, Scope)
    assert scope.name == name
    assert PINNED.fullmatch(scope.source), "the source must be pinned to a tag or a commit"
    assert scope.architectures
    shards = [shard for fused in scope.linears for shard in fused.shards]
    assert len(shards) == len(set(shards))
    assert set(scope.kv) <= set(shards)
    assert list(scope.generations) == sorted(scope.generations, key=lambda pair: -len(pair[0]))
    for long, short in scope.generations:
        assert scope.canonical(long + "x") == short + "x"
        assert scope.canonical(short + "x") == short + "x", "canonical names stay as they are"
    assert scope.layer_of(f"{scope.layers}.12.{shards[0]}") == (12, shards[0])


def test_an_architecture_has_one_scope() -> None:
    assert [scope.name for scope in all_scopes()] == SCOPES
    architectures = [name for scope in all_scopes() for name in scope.architectures]
    assert len(architectures) == len(set(architectures))


@pytest.mark.parametrize("name", EXPORTERS)
def test_an_exporter_has_the_functions_of_the_protocol(name: str) -> None:
    module = importlib.import_module(f"ckptq.exporters.{name}")
    assert_functions(module, Exporter)
    assert set(module.SCHEMES) <= set(SCHEMES)
    assert module.READERS


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=list(SCHEMES))
def test_the_numerics_of_a_scheme_have_the_functions_of_the_protocol(scheme: Scheme) -> None:
    assert_functions(find_numerics(scheme), Numerics)


def assert_functions(module: object, protocol: type) -> None:
    for wanted in (member for key, member in vars(protocol).items() if inspect.isfunction(member) and not key.startswith("_")):
        signature = inspect.signature(wanted)
        expected = signature.replace(parameters=list(signature.parameters.values())[1:])
        assert inspect.signature(getattr(module, wanted.__name__)) == expected


def test_every_exporter_can_be_asked_for_and_the_other_way_round() -> None:
    assert sorted(get_args(Export.model_fields["format"].annotation)) == [name.replace("_", "-") for name in EXPORTERS]


def test_every_scheme_can_be_asked_for_and_the_other_way_round() -> None:
    assert sorted(get_args(Rule.model_fields["scheme"].annotation)) == sorted(SCHEMES)


def test_every_recipe_file_is_shipped_and_sound() -> None:
    files = sorted(p.name for p in (PACKAGE.parent / "recipes").iterdir() if p.name != "__pycache__")
    assert files == sorted(f"{name}.yaml" for name in shipped())
    for name in shipped():
        recipe = load_recipe(name)
        assert recipe.export.format.replace("-", "_") in EXPORTERS
        assert {rule.scheme for rule in recipe.quantize} <= set(SCHEMES)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_module_is_short_and_says_what_it_is_for(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 330
    assert not text or text.startswith('"""')


@pytest.mark.parametrize("path", sorted((PACKAGE.parent / "tests/data").glob("*.json")), ids=lambda path: path.name)
def test_what_a_server_said_names_no_place_of_a_machine(path: Path) -> None:
    """Recorded behavior is the same wherever it is recorded."""
    found = re.findall(r"/[^\s\"']*?/(?:site-packages|\.venv[^/]*|tmp)/[^\s\"']*|/tmp/[^\s\"']+", path.read_text())
    assert found[:3] == []
