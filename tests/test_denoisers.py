"""Denoisers' scopes and recipes against tiny pipelines of the real classes, and against what the real vLLM-Omni makes of them.

    python tests/test_denoisers.py

writes the golden files anew.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch, fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from folded import folded
from pipelines import pipelines
from safetensors.torch import load_file, save_file
from server import omni

from ckptq import __version__
from ckptq.checkpoint import Component, Inventory, read_inventory
from ckptq.console import Console
from ckptq.convert import convert
from ckptq.exporters import find_exporter
from ckptq.job import job_record
from ckptq.plan import Copy, module_of
from ckptq.plan_denoiser import build_denoiser_plan, written_component
from ckptq.prepare import Part, Prepared, prepare
from ckptq.recipe import Recipe, load_recipe, shipped
from ckptq.reuse import Reused
from ckptq.scopes import Fused
from ckptq.scopes.denoisers import Denoiser, all_denoisers, find_denoiser
from ckptq.sections import Treatment
from ckptq.validate import examine

PIPELINES = pipelines()


def pipeline_of(recipe: str) -> str | None:
    """The one that a recipe's name begins with: `qwen_image` of qwen-image-int8."""
    return max((name for name in PIPELINES if recipe.replace("-", "_").startswith(f"{name}_")), key=len, default=None)


EMBEDDINGS = ("prior_token_embedding", "time_text_embed.addition_t_embedding")
"""Matrices that no linear multiplies by."""
GOLDEN = Path(__file__).parent / "data/pipelines"
SIZES: Mapping[str, Mapping[str, int]] = {
    "qwen-image-fp8": {"layers": 60},
    "qwen-image-edit-fp8": {"layers": 60},
    "z-image-fp8": {"layers": 30},
    "wan22-mxfp4": {"layers": 6, "heads": 16, "ffn_dim": 512},
}
"""Layers of the published models, where a recipe keeps some of them by number, and what a format's blocks need."""
RECIPES = {name: pipeline_of(name) for name, text in shipped().items() if pipeline_of(name)}
OF_NPUS = "ModuleNotFoundError: No module named 'torch_npu'"
"""What becomes of MXFP8 after it is loaded needs their library."""
NOTHING_IGNORED = {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": []}

Made = Callable[..., Path]


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """source(pipeline) -> its folder, made once; source(pipeline, layers=..) -> one of other sizes."""
    root = tmp_path_factory.mktemp("pipelines")

    def made(name: str, **sizes: int) -> Path:
        folder = root / "-".join((name, *map(str, sizes.values())))
        if not folder.exists():
            PIPELINES[name].make(folder, **sizes)
        return folder

    return made


@dataclass(frozen=True, slots=True)
class Served:
    """What the server makes of folders, all of them loaded in one process.

    built  {pipeline: its own weights under a config that quantizes all that it can}
    jobs   {recipe: its plan, and its output}
    """

    built: Mapping[str, omni.Loaded]
    jobs: Mapping[str, tuple[Prepared, omni.Loaded]]


@pytest.fixture(scope="session")
def served(source: Made, tmp_path_factory: pytest.TempPathFactory) -> Served:
    root = tmp_path_factory.mktemp("served")
    for name, pipeline in PIPELINES.items():
        shutil.copytree(source(name), root / name)
        for folder in pipeline.denoisers:
            config = root / name / folder / "config.json"
            config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": NOTHING_IGNORED}))
    jobs = {name: converted(name, source(pipeline, **SIZES.get(name, {})), root / name) for name, pipeline in RECIPES.items()}
    loaded = omni.load([root / name for name in (*PIPELINES, *RECIPES)])
    return Served({name: loaded[root / name] for name in PIPELINES}, {name: (jobs[name], loaded[root / name]) for name in RECIPES})


def converted(recipe: str, folder: Path, output: Path) -> Prepared:
    """What samples would tell is 1 here, for every input."""
    job = prepare(load_recipe(recipe, [f"model={folder}", f"output={output}"]))
    amax = {part.folder: dict.fromkeys((o.name for o in part.plan.observers if o.kind != "weight"), 1.0) for part in job.parts}
    job = replace(job, reused=Reused(output, amax, job_record(job, [], "cpu")))
    convert(job, resume=False, device="cpu", memory=None, console=Console(quiet=True))
    return job


def found(folder: Path, component: str) -> tuple[Denoiser, Component, Inventory]:
    inventory = read_inventory(folder)
    of = next(c for c in inventory.components if c.folder == component)
    denoiser = find_denoiser(of.config, (inventory.pipeline or {}).get("_class_name"))
    assert denoiser is not None
    return denoiser, of, inventory


def linears(denoiser: Denoiser, config: Mapping[str, Any]) -> dict[str, set[str]]:
    """{what becomes of them: stored names of linears}, whether this checkpoint has them or not."""
    names: dict[str, set[str]] = {"linears": set(), "stays": set(), "kept": shards(denoiser.kept, "")}
    for stack in denoiser.stacks:
        experts = range(config[stack.experts]) if stack.experts else range(1)
        for i in range(stack.count(config)):
            at = f"{stack.prefix}.{i}."
            names["linears"] |= {name.replace("{e}", str(e)) for name in shards(stack.linears, at) for e in experts}
            names["stays"] |= {at + name for name in stack.stays}
            names["kept"] |= shards(stack.kept, at)
    return names


def shards(fused: tuple[Fused, ...], at: str) -> set[str]:
    return {at + shard for one in fused for shard in one.shards}


def runtime(denoiser: Denoiser, config: Mapping[str, Any]) -> set[str]:
    """All that the server builds with the quantization config, as its lists know them."""
    blocks = {
        f"{stack.called(i)}.{one.runtime}"
        for stack in denoiser.stacks
        for i in range(stack.count(config))
        for one in (*stack.linears, *stack.kept)
    }
    return blocks | {one.runtime for one in denoiser.kept}


def test_every_denoiser_has_a_pipeline() -> None:
    assert {d.name for d in all_denoisers()} <= PIPELINES.keys()


PARTS = [(name, folder) for name, pipeline in PIPELINES.items() for folder in pipeline.denoisers]


@pytest.mark.parametrize(("name", "folder"), PARTS)
def test_every_linear_has_one_place(name: str, folder: str, source: Made) -> None:
    denoiser, component, _ = found(source(name), folder)
    assert name.startswith(denoiser.name)
    named = linears(denoiser, component.config)
    assert not named["linears"] & named["stays"] | named["linears"] & named["kept"] | named["stays"] & named["kept"]
    stored = {module_of(n) for n, t in component.tensors.items() if n.endswith(".weight") and len(t.spec.shape) == 2}
    rest = stored - named["linears"] - named["stays"] - named["kept"] - {*EMBEDDINGS}
    assert [n for n in sorted(rest) if sum(fnmatchcase(n, pattern) for pattern in denoiser.stays) != 1] == []
    missing = {n for n in named["linears"] | named["stays"] | named["kept"] if n not in stored}
    optional = {f"{s.prefix}.{i}.{o}" for s in denoiser.stacks for i in range(s.count(component.config)) for o in s.optional}
    assert missing <= optional


@pytest.mark.parametrize(("name", "folder"), PARTS)
def test_blocks_are_counted_as_they_are_stored(name: str, folder: str, source: Made) -> None:
    denoiser, component, _ = found(source(name), folder)
    for stack in denoiser.stacks:
        numbers = {
            n.removeprefix(stack.prefix + ".").partition(".")[0] for n in component.tensors if n.startswith(stack.prefix + ".")
        }
        assert numbers == {str(i) for i in range(stack.count(component.config))}


@pytest.mark.server
@pytest.mark.parametrize(("name", "folder"), PARTS)
def test_the_server_builds_what_the_scope_says(name: str, folder: str, source: Made, served: Served) -> None:
    denoiser, component, _ = found(source(name), folder)
    loaded = served.built[name]
    assert loaded.error is None
    assert loaded.pipeline == PIPELINES[name].server
    theirs = loaded.components[folder]
    # BAGEL's twins are containers without a name of their own: they follow the linear that they are in.
    there = {linear.prefix: module for module, linear in theirs.quantized.items() if not module.endswith(".gen_exp")}
    optional = {f"{s.called(i)}.{o}" for s in denoiser.stacks for i in range(s.count(component.config)) for o in s.optional}
    assert there.keys() <= (said := runtime(denoiser, component.config))
    assert said - there.keys() <= optional
    modules = {f"{s.called(i)}.": f"{s.prefix}.{i}." for s in denoiser.stacks for i in range(s.count(component.config))}
    for prefix, module in there.items():
        start = next((start for start in modules if prefix.startswith(start)), "")
        end = next((end for end in denoiser.modules if prefix.endswith("." + end)), "")
        middle = prefix.removeprefix(start).removesuffix(end)
        assert module == modules.get(start, "") + middle + denoiser.modules.get(end, "")


@pytest.mark.server
@pytest.mark.parametrize("name", PIPELINES)
def test_the_server_builds_text_encoders_so_as_the_scope_says(name: str, source: Made, served: Served) -> None:
    denoiser, _, inventory = found(source(name), PIPELINES[name].denoisers[0])
    others = {f: c for f, c in served.built[name].components.items() if f not in PIPELINES[name].denoisers}
    there = {linear.prefix for component in others.values() for linear in component.quantized.values()}
    encoder = denoiser.encoder
    if encoder and (inventory.pipeline or {})["_class_name"] not in encoder.pipelines:
        encoder = None
    assert there == ({*encoder.names(config_of(source(name), encoder.folder))} if encoder else set())
    if encoder:
        assert all(any(fnmatchcase(linear, pattern) for pattern in encoder.patterns) for linear in there)


def config_of(folder: Path, component: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / component / "config.json").read_text())
    return found


@pytest.mark.parametrize(("name", "folder"), PARTS)
def test_an_entry_keeps_one_linear_alone(name: str, folder: str, source: Made) -> None:
    """ModelOpt's lists: an entry counts as it is, as a part of a name, and as a pattern. vLLM's modelopt.py is_layer_excluded."""
    denoiser, stored, inventory = found(source(name), folder)
    component, exporter = written_component(stored, denoiser, "modelopt"), find_exporter("modelopt")
    every = runtime(denoiser, component.config)
    kept = {e for e in every if reaches(denoiser.ignore, e)}
    joined = {parts: (whole,) for whole, parts in denoiser.joined.items()}
    blocks = [(s, i) for s in denoiser.stacks for i in range(s.count(component.config))]
    assert kept == {f"{s.called(i)}.{one.runtime}" for s, i in blocks for one in s.kept} | {one.runtime for one in denoiser.kept}
    for stack, one in dict.fromkeys((s, one.runtime) for s in denoiser.stacks for one in s.linears):
        linear = f"{stack.called(0)}.{one}"
        names = [joined.get(x.shards, x.shards) for x in stack.linears if x.runtime == one]
        keep = [f"{stack.prefix}.0.{shard}".replace("{e}", "*") for shards in names for shard in shards]
        if not any(fnmatchcase(module_of(n), keep[0]) for n in component.tensors):
            assert one in stack.optional
            continue
        rules = Treatment(scheme=denoiser.formats["modelopt"][-1], keep=keep)
        plan = build_denoiser_plan(Recipe(components={"": rules}), rules, inventory, component, denoiser, exporter)
        entries = json.loads(plan.files["config.json"])["quantization_config"]["ignore"]
        assert {e for e in every if reaches(entries, e)} - kept == {linear}


def reaches(entries: Iterable[str], name: str) -> bool:
    return any(entry in name or fnmatch(name, entry) for entry in entries)


@pytest.mark.server
@pytest.mark.parametrize("name", RECIPES)
def test_all_scales_arrive(name: str, served: Served) -> None:
    job, loaded = served.jobs[name]
    assert loaded.error is None
    assert loaded.missing == []
    for part in job.parts:
        theirs = loaded.components[part.folder]
        assert theirs.unwritten == ()
        assert theirs.dequantized == ()
        assert {linear.process for linear in theirs.quantized.values()} <= {None, OF_NPUS}
        there = {linear.prefix for module, linear in theirs.quantized.items() if not module.endswith(".gen_exp")}
        assert there == planned(part)
    others = [c for folder, c in loaded.components.items() if folder not in {part.folder for part in job.parts}]
    assert [linear.prefix for component in others for linear in component.quantized.values()] == []


@pytest.mark.server
def test_a_wrong_coarse_scale_is_found(served: Served, source: Made, tmp_path: Path) -> None:
    """MXFP4 under two scales: the source tells that one of the coarse ones is wrong."""
    job, _ = served.jobs["wan22-mxfp4"]
    assert job.recipe.output is not None
    folder = Path(shutil.copytree(job.recipe.output, tmp_path / "wrong"))
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["blocks.5.ffn.net.2.weight_dual_scale"] *= 2
    save_file(tensors, file)
    (folder / "ckptq.json").unlink()  # it has the file's digest
    findings = examine(folder, source=source("wan22", **SIZES["wan22-mxfp4"])).findings
    assert [(f.code, f.subject) for f in findings if f.severity == "error"] == [
        ("passthrough.weight-error", "transformer/blocks.5.ffn.net.2.weight")
    ]


def planned(part: Part) -> set[str]:
    """What the plan quantizes, as the server's lists know it."""
    assert isinstance(part.scope, Denoiser)
    converted = {decision.module for decision in part.plan.decisions if decision.action != "keep"}
    blocks = [(s, i) for s in part.scope.stacks for i in range(s.count(part.component.config))]
    joined = {parts[0]: whole for whole, parts in part.scope.joined.items()}
    names = {
        f"{stack.prefix}.{i}.{name}".replace("{e}", "0"): f"{stack.called(i)}.{one.runtime}"
        for stack, i in blocks
        for one in stack.linears
        for name in (one.shards[0], joined.get(one.shards[0], one.shards[0]))
    }
    return {names[module] for module in converted & names.keys()}


@pytest.mark.parametrize("name", RECIPES)
def test_golden_keys(name: str, source: Made) -> None:
    assert described(name, source(RECIPES[name], **SIZES.get(name, {}))) == (GOLDEN / f"{name}.txt").read_text()


def test_golden_files_are_those_of_the_recipes() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == RECIPES.keys()


def described(name: str, folder: Path) -> str:
    """Of each component that a recipe converts: what its files hold that the source's do not, how many tensors stay, the config."""
    lines = []
    for part in prepare(load_recipe(name, [f"model={folder}", "output=unused"])).parts:
        new = [f"{s.name} {s.dtype} {list(s.shape)}" for op in part.plan.ops if not isinstance(op, Copy) for s in op.outputs]
        stay = [op.output.name for op in part.plan.ops if isinstance(op, Copy)]
        section = json.loads(part.plan.files["config.json"])["quantization_config"]
        section = {key: folded(value) if isinstance(value, list) else value for key, value in section.items()}
        lines += [f"[{part.folder}]", *folded(new), f"and {len(stay)} that stay", json.dumps(section, indent=1), ""]
    return "\n".join(lines).replace(f"ckptq-{__version__}", "ckptq-VERSION")


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for old in GOLDEN.iterdir():
        old.unlink()
    for name, pipeline in RECIPES.items():
        with tempfile.TemporaryDirectory() as folder:
            PIPELINES[pipeline].make(Path(folder), **SIZES.get(name, {}))
            (GOLDEN / f"{name}.txt").write_text(described(name, Path(folder)))


if __name__ == "__main__":
    main()
