"""Every architecture, on a tiny checkpoint of it (tests/families): the scope against what transformers stores, golden keys of the
shipped recipes, amaxes against the resident model's bit for bit, conversions that the validator passes and whose faults it finds.

    PYTHONPATH=tests python tests/test_families.py [NAME...]     # writes the golden keys again: read the difference first
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus.edit import alter, drop, edit_json, times
from corpus.edit_files import ignoring
from families import ROOT, Mutant, families
from folded import folded

from ckptq import __version__
from ckptq.checkpoint import Inventory, Reader, read_inventory
from ckptq.console import Console
from ckptq.convert import convert, prepare
from ckptq.exporters import find_exporter
from ckptq.plan import Copy, Observer, Plan
from ckptq.planner import build_plan
from ckptq.recipe import load_recipe, shipped
from ckptq.render import inspect_data
from ckptq.scopes import Scope, all_scopes, at_path, find_scope
from ckptq.streamed import StreamedModel
from ckptq.unstack import unstack
from ckptq.validate import examine
from ckptq.validators.vllm_rules import parameters

FAMILIES = families()
RECIPES = [(name, recipe) for name, family in FAMILIES.items() for recipe in family.recipes]
GOLDEN = Path(__file__).parent / "data" / "families"

Made = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """As the resident model's process has: how a sum is split among threads is allowed to change its last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def source(workplace: Path) -> Made:
    """source(family) -> its checkpoint, made at the first call."""

    def made(name: str) -> Path:
        folder = workplace / name / "source"
        if not folder.exists():
            folder.mkdir(parents=True)
            FAMILIES[name].make(folder)
        return folder

    return made


@pytest.fixture(scope="module")
def resident(request: pytest.FixtureRequest, workplace: Path, source: Made) -> Any:
    """resident(family) -> amaxes of its resident model. One process measures those of all chosen tests, while other tests run."""
    wanted = (i for i in request.session.items if i.path == request.path and "resident" in i.fixturenames)
    chosen = [item.callspec.params["name"] for item in wanted]
    jobs = []
    for name in dict.fromkeys(chosen):
        family, output = FAMILIES[name], workplace / name / "resident.json"
        settings = family.settings(family.recipes[0], source(name), output)
        jobs.append({"family": name, "source": str(source(name)), "settings": settings, "output": str(output)})
    (workplace / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "peers.resident", "--jobs", str(workplace / "jobs.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "tests")}
    with (workplace / "resident.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def measured(name: str) -> dict[str, float]:
        output = workplace / name / "resident.json"
        process.wait()
        assert output.exists(), (workplace / "resident.log").read_text()[-4000:]
        found: dict[str, float] = json.loads(output.read_text())
        return found

    yield measured
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def converted(workplace: Path, source: Made) -> Callable[[str, str], Path]:
    """converted(family, recipe) -> the output."""

    def made(name: str, recipe: str) -> Path:
        output = workplace / name / recipe
        if not output.exists():
            job = load_recipe(recipe, FAMILIES[name].settings(recipe, source(name), output))
            convert(prepare(job), resume=False, device="cpu", memory=None, console=Console(quiet=True))
        return output

    return made


def read(folder: Path) -> tuple[Inventory, Scope]:
    inventory = read_inventory(folder)
    scope = find_scope(inventory.main.config)
    return unstack(inventory, scope), scope


def test_every_scope_has_a_family_and_its_recipes() -> None:
    scopes = {scope.name for scope in all_scopes()}
    assert scopes == FAMILIES.keys()
    assert {recipe for _, recipe in RECIPES} <= shipped().keys()
    assert sorted(path.stem for path in GOLDEN.iterdir()) == sorted(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_scope_names_what_is_stored_and_nothing_else(name: str, source: Made, resident: object) -> None:
    """Every tensor, with its shape. What the server can do without, a tied lm_head, may be absent."""
    inventory, scope = read(source(name))
    assert scope.name == name
    others = FAMILIES[name].others
    stored = {n: t.spec.shape for n, t in inventory.main.tensors.items() if not any(fnmatchcase(n, other) for other in others)}
    known = {p.name: p for p in parameters(scope, inventory.main.config, inventory.main.tensors)}
    assert {p.name for p in known.values() if p.required} <= stored.keys() <= known.keys()
    assert stored == {n: known[n].shape for n in stored}


@pytest.mark.parametrize("name", FAMILIES)
def test_inspect_suggests_the_familys_recipes_first(name: str, source: Made) -> None:
    data = inspect_data(read_inventory(source(name)), None)
    assert {*FAMILIES[name].recipes} <= {*data["suggested"]}
    others = {recipe for other, recipe in RECIPES if other != name and recipe not in FAMILIES[name].recipes}
    assert not others & {*data["suggested"]}


@pytest.mark.parametrize(("name", "recipe"), RECIPES)
def test_golden_keys(name: str, recipe: str, source: Made) -> None:
    assert described(name, recipe, source(name)) == json.loads((GOLDEN / f"{name}.json").read_text())[recipe]


def described(name: str, recipe: str, source: Path) -> dict[str, Any]:
    """What golden files have of a plan: the tensors that it adds or changes, how many stay, and the configuration."""
    made = plan(name, recipe, source)
    new = folded(
        f"{spec.name} {spec.dtype} {list(spec.shape)}" for op in made.ops if not isinstance(op, Copy) for spec in op.outputs
    )
    section = json.loads(made.files["config.json"])["quantization_config"]
    kept = sum(isinstance(op, Copy) for op in made.ops)
    text = json.dumps({"tensors": new, "kept": kept, "quantization_config": short(section)})
    return dict(json.loads(text.replace(f"ckptq-{__version__}", "ckptq-VERSION")))


def short(value: Any) -> Any:
    """The same with folded names, in lists and, where they have one value, as keys."""
    if isinstance(value, list):
        return folded(value) if all(isinstance(inner, str) for inner in value) else [short(inner) for inner in value]
    if isinstance(value, dict):
        alike: dict[str, list[str]] = {}
        for key, inner in value.items():
            alike.setdefault(json.dumps(short(inner)), []).append(key)
        return {key: json.loads(inner) for inner, keys in alike.items() for key in folded(keys)}
    return value


def plan(name: str, recipe: str, source: Path) -> Plan:
    job = load_recipe(recipe, FAMILIES[name].settings(recipe, source, source))
    inventory, scope = read(source)
    return build_plan(job, inventory.main, scope, find_exporter(job.export.format))


@pytest.mark.parametrize(("name", "recipe"), RECIPES)
def test_a_conversion_passes_the_validator(name: str, recipe: str, source: Made, converted: Callable[[str, str], Path]) -> None:
    found = examine(converted(name, recipe), source=source(name))
    assert found.findings == ()
    assert not found.skipped.keys() & {"layout", "kv", "values", "record", "passthrough"}
    assert found.built is not None
    assert found.built["linears"]
    assert found.built["kv_cache"] == (load_recipe(recipe).kv_cache or "auto")


@pytest.mark.parametrize(("name", "form"), [("mixtral", "compressed-tensors"), ("qwen3_vl_moe", "modelopt")])
def test_routed_experts_in_nvfp4_pass_the_validator(name: str, form: str, source: Made, tmp_path: Path) -> None:
    """Of families that no recipe shows in NVFP4."""
    family, out = FAMILIES[name], tmp_path / "out"
    rules = [{"modules": rule.modules, "scheme": "nvfp4"} for rule in load_recipe(family.recipes[0]).quantize]
    settings = [*family.settings(family.recipes[0], source(name), out), f"quantize={json.dumps(rules)}", f"export.format={form}"]
    job = load_recipe(family.recipes[0], settings)
    convert(prepare(job), resume=False, device="cpu", memory=None, console=Console(quiet=True))
    found = examine(out, source=source(name))
    assert found.findings == ()
    assert found.built is not None
    assert sum(found.built["linears"].values()) > 70
    assert all("NVFP4" in form for form in found.built["linears"])
    drop("*.0.*experts.10.*.input_*scale")(out)
    assert ("layout.missing-scale", "error") in {(f.code, f.severity) for f in examine(out, values=False).findings}


@pytest.mark.parametrize("name", FAMILIES)
def test_amaxes_equal_the_resident_models_bit_for_bit(
    name: str, source: Made, converted: Callable[[str, str], Path], resident: Callable[[str], dict[str, float]]
) -> None:
    recipe = FAMILIES[name].recipes[0]
    ours: dict[str, float] = json.loads((converted(name, recipe) / "ckptq.json").read_text())["amax"]
    observers = [o for o in plan(name, recipe, source(name)).observers if o.kind != "weight"]
    inventory, scope = read(source(name))
    with Reader(inventory.root, inventory.main) as reader:
        streamed = StreamedModel(inventory.root, inventory.main, scope, reader, torch.device("cpu"))
    modules = {module: called for called, module in streamed.model.named_modules()}
    theirs = resident(name)
    assert {o.kind for o in observers} == {"input", "k", "v"}
    assert {o.name: ours[o.name] for o in observers} == {o.name: theirs[quantizer(o, streamed, modules)] for o in observers}


def quantizer(observer: Observer, streamed: StreamedModel, modules: Mapping[torch.nn.Module, str]) -> str:
    """ModelOpt's name for the place that is observed; it has one input quantizer for all experts of a layer."""
    if observer.kind != "input":
        return f"{modules[streamed.around(observer.module)]}.{observer.kind}_bmm_quantizer"
    parameter = streamed.parameter(observer.module)
    return f"{modules[streamed.module(observer.module)]}.{'' if parameter == 'weight' else parameter + '_'}input_quantizer"


def mutants(name: str) -> tuple[Mutant, ...]:
    """Those that suit all, of the first recipe's output, and the family's own."""
    family = FAMILIES[name]
    common = (
        Mutant("no scale of a weight", drop("*.1.self_attn.o_proj.weight_scale"), "layout.missing-scale"),
        Mutant("no scale of an input", drop("*.0.self_attn.o_proj.input_scale"), "layout.missing-scale"),
        Mutant("no scale of V", drop("*.1.self_attn.*v_scale"), "layout.kv-missing"),
        Mutant("no norm", drop("*.1.input_layernorm.weight"), "layout.missing-tensor"),
        Mutant("an amax for a scale", alter(times(448), "*.0.self_attn.q*_proj.input_scale"), "values.scale-outlier"),
        Mutant("nothing excluded", ignoring(lambda _: ()), "layout.not-excluded"),
    )
    return (*(mutant for mutant in common if mutant.what not in family.harmless), *family.mutants)


@pytest.mark.parametrize(("name", "what"), [(name, mutant.what) for name in FAMILIES for mutant in mutants(name)])
def test_a_mutant_is_found(name: str, what: str, converted: Callable[[str, str], Path], tmp_path: Path) -> None:
    mutant = next(m for m in mutants(name) if m.what == what)
    folder = Path(shutil.copytree(converted(name, FAMILIES[name].recipes[0]), tmp_path / "mutant"))
    mutant.edit(folder)
    assert mutant.code in {f.code for f in examine(folder, values=mutant.code.startswith("values.")).findings}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_that_leaves_defaults_out_is_understood(name: str, converted: Callable[[str, str], Path], tmp_path: Path) -> None:
    """Many published files do; transformers and the server fill the keys in."""
    folder = Path(shutil.copytree(converted(name, FAMILIES[name].recipes[0]), tmp_path / "short"))
    _, scope = read(folder)

    def shorten(config: dict[str, Any]) -> None:
        text = at_path(config, scope.text_config) if scope.text_config else config
        for key in [key for key, value in scope.assumed.items() if text.get(key) == value]:
            del text[key]

    edit_json(folder / "config.json", shorten)
    (folder / "ckptq.json").unlink()  # it says that config.json is not as it was written
    assert examine(folder, values=False).findings == ()


def main() -> None:
    import tempfile

    for name in sys.argv[1:] or FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            FAMILIES[name].make(Path(folder))
            found = {recipe: described(name, recipe, Path(folder)) for recipe in FAMILIES[name].recipes}
        GOLDEN.mkdir(exist_ok=True)
        (GOLDEN / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
