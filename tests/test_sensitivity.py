"""`ckptq sensitivity` on the example model: rankings against the exhaustive one, and what printed recipes are worth, converted."""

from __future__ import annotations

import itertools
import json
import random
import re
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from corpus.edit import Tensors, edit_json, tensors
from jsonschema import Draft202012Validator

from ckptq.calibration import load_samples
from ckptq.cli import main
from ckptq.console import Console
from ckptq.convert import convert
from ckptq.prepare import prepare
from ckptq.recipe import load_recipe, parse_recipe
from ckptq.sections import TextCalibration
from ckptq.sensitivity import Asked, count
from ckptq.sensitivity.branches import Branch, Runner, running
from ckptq.sensitivity.choose import Kl, rank, worst_first
from ckptq.sensitivity.cost import Clock
from ckptq.sensitivity.measure import measure
from ckptq.sensitivity.recipe import command, find_base, keeping

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "examples" / "tiny-qwen2.5-vl"
SCHEMA = json.loads((ROOT / "docs" / "sensitivity.schema.json").read_text(encoding="utf-8"))
TEXT = ROOT / "tests" / "data" / "heldout.txt"
SETTINGS = TextCalibration(source="text", files=[str(TEXT)], samples=6, sequence_length=96)
ON = ("--text", TEXT, "--samples", "6", "--sequence-length", "96", "--device", "cpu")
FEW = ("--text", TEXT, "--samples", "2", "--sequence-length", "16", "--exact", "0", "--device", "cpu")


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """The object on stdout, against the schema, in which every key must be described."""
        closed = json.loads(json.dumps(SCHEMA))

        def close(node: Any) -> None:
            for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
                close(value)
            if isinstance(node, dict) and isinstance(node.get("properties"), dict):
                node.setdefault("additionalProperties", False)

        close(closed)
        said = json.loads(self.out)
        Draft202012Validator(closed).validate(said)
        return said


Run = Callable[..., Result]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs a command of ckptq's in this process."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    def run(*arguments: object) -> Result:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert isinstance(stop.value.code, int)
        return Result(stop.value.code, out, err)

    yield run
    for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Static FP8 with an FP8 KV cache, calibrated on images."""
    out = tmp_path_factory.mktemp("sensitivity") / "fp8"
    scenes = ROOT / "examples/scenes"
    settings = [
        "calibration.samples=8",
        f"calibration.images={scenes}/calib",
        f"calibration.annotations={scenes}/annotations/captions_calib.json",
    ]
    recipe = load_recipe("demo", settings, model=str(SOURCE), output=str(out))
    convert(prepare(recipe), resume=False, device="cpu", memory=None, console=Console(quiet=True))
    return out


@pytest.fixture(scope="module")
def runner(fp8: Path) -> Iterator[Runner]:
    with running(
        SOURCE,
        fp8,
        load_samples(SETTINGS),
        sequence_length=96,
        max_pixels=None,
        device=torch.device("cpu"),
        memory=10**9,
        console=Console(quiet=True),
    ) as found:
        yield found


@pytest.fixture(scope="module")
def local(runner: Runner) -> dict[str, float]:
    return runner.local_errors()


@pytest.fixture(scope="module")
def exact(runner: Runner) -> dict[str, Kl]:
    """The exhaustive ranking: every unit's KL, measured."""
    names = [unit.name for unit in runner.units]
    return dict(zip(names, runner.exact([Branch(frozenset({name})) for name in names]), strict=True))


def correlation(one: Sequence[str], other: Sequence[str]) -> float:
    """Spearman's, of two orders of the same names."""
    n = len(one)
    return 1 - 6 * sum((place - other.index(name)) ** 2 for place, name in enumerate(one)) / (n * (n * n - 1))


def test_rankings_are_near_the_exhaustive_one(
    local: dict[str, float], exact: dict[str, Kl], record_property: Callable[[str, object], None]
) -> None:
    """Spearman's correlation with the exact KL of all 24 units: of the local errors 0.92, of the final ranking, K = 16, 0.96."""
    wanted = [unit.name for unit in rank(local, exact, 0.0)]
    by_error = worst_first(local)
    final = [unit.name for unit in rank(local, {name: exact[name] for name in by_error[:16]}, 0.0)]
    found = correlation(by_error, wanted), correlation(final, wanted)
    record_property("table", f"rank correlation with the exhaustive ranking: local errors {found[0]:.3f}, final {found[1]:.3f}")
    assert found[0] > 0.8
    assert found[1] > 0.9
    assert final[:4] == wanted[:4]


def test_the_recipe_is_worth_what_it_says(
    fp8: Path, runner: Runner, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Converted as the last line says: the KL and the size that were predicted; a lower KL than any random set of that size."""
    monkeypatch.chdir(tmp_path)
    told = run("sensitivity", SOURCE, fp8, *ON, "--keep", "3", "--output", "keep3.yaml", "--format", "json")
    said = told.data
    assert (told.code, said["ok"], len(said["chosen"]["kept"])) == (0, True, 3)
    assert said["chosen"]["kept"] == [unit["name"] for unit in said["units"][:3]]
    assert [unit["exact"] for unit in said["units"]] == [True] * 16 + [False] * 8
    assert Path("keep3.yaml").read_text(encoding="utf-8") == said["recipe"]
    recipe = yaml.safe_load(said["recipe"])
    assert (recipe["model"], recipe["output"]) == (str(SOURCE), f"{fp8}-keep3")
    words = shlex.split(said["command"])
    assert words == ["ckptq", "convert", "--recipe", "keep3.yaml", "--amax", str(fp8)], "amaxes are the candidate's: no samples"
    assert run(*words[1:], "--output", tmp_path / "kept").code == 0
    figures = json.loads(run("compare", SOURCE, tmp_path / "kept", *ON, "--format", "json").out)
    assert figures["figures"]["kl_mean"] == pytest.approx(said["chosen"]["kl"]["mean"], rel=1e-6)
    assert figures["figures"]["kl_mean_low"] == pytest.approx(said["chosen"]["kl"]["low"], rel=1e-6)
    assert figures["sizes"]["candidate"] == said["chosen"]["bytes"]
    draws = list(itertools.islice(random_sets(runner, said["chosen"]["kept"]), 6))
    everything = frozenset(unit.name for unit in runner.units)
    for kl in runner.exact([Branch(everything - draw, kv=True) for draw in draws]):
        assert kl.mean > figures["figures"]["kl_mean"]


def random_sets(runner: Runner, kept: Sequence[str]) -> Iterator[frozenset[str]]:
    """As many units of the same sizes, drawn at random, and others."""
    chance, saved = random.Random(0), {unit.name: unit.saved for unit in runner.units}
    while True:
        drawn = [chance.choice([name for name in saved if saved[name] == saved[one]]) for one in kept]
        if len({*drawn}) == len(kept) and {*drawn} != {*kept}:
            yield frozenset(drawn)


def test_a_limit_is_met_and_one_unit_less_would_not_do(
    fp8: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    limit = 0.025
    told = run("sensitivity", SOURCE, fp8, *ON, "--kl", limit, "--exact", "8", "--format", "json")
    said, chosen = told.data, told.data["chosen"]
    assert (told.code, said["ok"]) == (0, True)
    assert chosen["bytes"] == min(point["bytes"] for point in said["curve"] if point["kl"]["mean"] <= limit)
    by_cost = sorted(said["units"], key=lambda unit: -unit["kl"] / unit["saved_bytes"])
    order = [unit["name"] for unit in by_cost]
    first = {len(p["kept"]): p["kl"]["mean"] for p in said["curve"] if p["kept"] == order[: len(p["kept"])]}
    fewest = min(kept for kept, kl in first.items() if kl <= limit)
    assert first[fewest - 1] > limit, "one unit less was measured, too"
    Path("r.yaml").write_text(said["recipe"], encoding="utf-8")
    assert run("convert", "--recipe", "r.yaml", "--amax", fp8, "--output", "kept").code == 0
    judged = run("compare", SOURCE, "kept", *ON, "--format", "json", "--fail-on", f"kl_mean>{limit}")
    figures = json.loads(judged.out)
    assert judged.code == 0
    assert figures["figures"]["kl_mean"] == pytest.approx(chosen["kl"]["mean"], rel=1e-6)
    assert figures["sizes"]["candidate"] == chosen["bytes"]


def test_a_limit_that_can_not_be_met(fp8: Path, run: Run) -> None:
    told = run("sensitivity", SOURCE, fp8, *FEW, "--kl", "1e-6")
    assert told.code == 1
    assert "FAILED: a KL of 1e-06 can't be met; the least that was found is " in told.out
    assert "the FP8 KV cache alone costs more: `kv_cache: null` in the recipe does without" in told.out
    assert "convert by it" not in told.out


def test_a_limit_that_is_met_already(fp8: Path, run: Run) -> None:
    told = run("sensitivity", SOURCE, fp8, *FEW, "--kl", "10", "--format", "json")
    assert (told.code, told.data["chosen"]["kept"], told.data["recipe"]) == (0, [], None)


def test_a_dry_run_counts_and_computes_nothing(fp8: Path, run: Run, tmp_path: Path) -> None:
    asked = ("sensitivity", SOURCE, fp8, *ON, "--dry-run", "--keep", "2", "--output", tmp_path / "r.yaml")
    told = run(*asked)
    assert told.code == 0
    assert "24 units in 6 layers, 6 samples of " in told.out
    assert re.search(r"local errors +5\.0 +1 +33\.7 MB", told.out)
    assert not (tmp_path / "r.yaml").exists()
    assert "enter:" not in told.err
    said = run(*asked, "--format", "json").data
    assert (said["dry_run"], said["units"], said["work"]["units"], said["work"]["layers"]) == (True, None, 24, 6)
    parts = {part["name"]: part["forwards"] for part in said["work"]["planned"]}
    assert parts["local errors"] == 1 + 24 / 6


# --- budgets ---


@pytest.fixture
def ticks() -> Iterator[list[int]]:
    """[layers that a sample has passed], counted as it goes: a clock that does not depend on the machine."""
    passed = [0]

    def tick(module: torch.nn.Module, args: object) -> None:
        passed[0] += type(module).__name__.endswith("VLAttention")

    hook = torch.nn.modules.module.register_module_forward_pre_hook(tick)
    yield passed
    hook.remove()


@pytest.mark.parametrize(
    ("asked", "forwards", "some", "note"),
    [
        ({"keep": 2}, 24, range(1, 16), "the budget is enough for the exact KL of "),
        ({"limit": 0.025}, 16, [0], "the budget ended the search: fewer units may be enough"),
    ],
    ids=["keep", "kl"],
)
def test_a_budget_is_kept_by_measuring_less(
    asked: dict[str, Any], forwards: int, some: Sequence[int], note: str, fp8: Path, runner: Runner, ticks: list[int]
) -> None:
    budget = forwards * 6 * 6  # layers and samples
    job = Asked(str(SOURCE), str(fp8), SETTINGS, budget=budget, **asked)
    base = find_base(str(SOURCE), str(fp8), fp8, None, needed=True)
    counted = count.count(job, runner, base)
    found = measure(job, counted, runner, Clock(budget, now=lambda: ticks[0]), Console(quiet=True))
    assert sum(part.forwards for part in counted.parts) > forwards
    assert 0.5 * budget < ticks[0] < 1.05 * budget
    assert sum(unit.exact is not None for unit in found.ranking) in some
    assert any(told.startswith(note) for told in found.notes)
    assert len(found.ranking) == 24
    assert all(unit.kl > 0 for unit in found.ranking), "those that were not measured are estimated"
    assert found.chosen is not None
    assert len(found.chosen.kept) == 2 if job.keep else found.chosen.kl.mean <= 0.025


def test_a_budget_that_is_too_small_is_told_at_once(fp8: Path, run: Run, tmp_path: Path) -> None:
    told = run("sensitivity", SOURCE, fp8, *ON, "--budget", "0.001s", "--keep", "2", "--output", tmp_path / "r.yaml")
    assert told.code == 2
    assert "--budget 0.0 s: too little: local errors and the KL that can't be done without take about " in told.err
    assert "s or more, or fewer --samples" in told.err
    assert not (tmp_path / "r.yaml").exists()


# --- recipes ---


def test_a_recipe_without_static_scales_needs_no_amax(tmp_path: Path) -> None:
    recipe = load_recipe("qwen25vl-lm-fp8-dynamic-modelopt", model=str(SOURCE), output=str(tmp_path / "dynamic"))
    convert(prepare(recipe), resume=False, device="cpu", memory=None, console=Console(quiet=True))
    base = find_base(str(SOURCE), str(tmp_path / "dynamic"), tmp_path / "dynamic", None, needed=True)
    assert base is not None
    text = keeping(base, ["model.layers.1.mlp.down_proj", "model.layers.0.self_attn.o_proj"], "OUT", "Two lines\nof comment.")
    assert text.startswith("# Two lines\n# of comment.\n")
    assert parse_recipe(text, "r").keep == [
        "model.visual*",
        "lm_head",
        "model.layers.1.mlp.down_proj",
        "model.layers.0.self_attn.o_proj",
    ]
    assert command(base, "a file.yaml") == "ckptq convert --recipe 'a file.yaml'"


def test_another_tools_export_needs_a_recipe_for_a_recipe(fp8: Path, run: Run, tmp_path: Path) -> None:
    """Without one its units are ranked all the same. The named one has samples of its own, which the printed one keeps."""
    shutil.copytree(fp8, other := tmp_path / "other")
    (other / "ckptq.json").unlink()
    told = run("sensitivity", SOURCE, other, *FEW, "--keep", "2")
    assert (told.code, "no ckptq.json with a recipe" in told.err) == (2, True)
    assert run("sensitivity", SOURCE, other, *FEW, "--dry-run").code == 0
    base = find_base(str(SOURCE), str(other), other, "demo", needed=True)
    assert base is not None
    recipe = parse_recipe(keeping(base, ["model.layers.1.mlp.down_proj"], "OUT", "x"), "r")
    assert (recipe.calibration, recipe.kv_cache) == (load_recipe("demo").calibration, "fp8")
    assert command(base, "r.yaml") == "ckptq convert --recipe r.yaml"


def test_what_is_quantized_outside_of_layers_is_told(fp8: Path, run: Run, tmp_path: Path) -> None:
    """A tower by mistake: its error is in none of the figures."""
    shutil.copytree(fp8, other := tmp_path / "other")

    def coded(stored: Tensors) -> None:
        for name in [name for name, tensor in stored.items() if name.startswith("visual.") and tensor.dim() == 2]:
            stored[name] = stored[name].to(torch.float8_e4m3fn)
            for scale in ("weight_scale", "input_scale"):
                stored[f"{name.removesuffix('weight')}{scale}"] = torch.tensor(1.0)

    tensors(coded)(other)
    edit_json(other / "config.json", lambda data: data["quantization_config"]["ignore"].remove("visual*"))
    edit_json(other / "hf_quant_config.json", lambda data: data["quantization"]["exclude_modules"].remove("visual*"))
    said = run("sensitivity", SOURCE, other, *FEW, "--format", "json").data
    assert len(said["units"]) == 24
    assert said["notes"][0].startswith("visual.blocks.0.")
    assert said["notes"][0].endswith("outside of the decoder layers, 22 linears, is not measured")


BAD = [
    (("--recipe", "dmo"), "dmo: no such file, and no shipped recipe of that name; did you mean demo?"),
    (("--recipe", "qwen-image-fp8"), "components: "),
    (("--budget", "-5m"), "--budget: expected a time such as 90s, 10m or 1.5h, found '-5m'"),
    (("--keep", "24"), "--keep 24: the candidate quantizes 24 units, and one of them must stay so"),
    (("--keep", "0"), "greater than or equal to 1"),
    (("--kl", "-1"), "--kl: expected a number from 0 on, found -1.0"),
    (("--kl", "nan"), "--kl: expected a number from 0 on, found nan"),
    (("--keep", "2", "--kl", "0.1"), "--keep and --kl: expected one of them"),
    (("--exact", "some"), "--exact: expected a number or all, found 'some'"),
    (("--output", "r.yaml"), "--output r.yaml: there is no recipe without --keep or --kl"),
    (("--keep", "2", "--output", "pyproject.toml"), "--output pyproject.toml: exists already"),
    (("--keep", "2", "--output", "no/such/r.yaml"), "there is no folder no/such"),
    (("--coco", "images", "captions.json"), "--text and --coco: expected one source of samples"),
    (("--memory", "much"), "--memory: expected a size"),
    (("--memory", "1MB"), "--memory 1 MB: too little: embeddings, a decoder layer and one sample take "),
]


@pytest.mark.parametrize(("options", "said"), BAD, ids=[" ".join(options) for options, _ in BAD])
def test_refused(options: tuple[str, ...], said: str, fp8: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    told = run("sensitivity", SOURCE, fp8, *FEW, *options)
    assert (told.code, told.out) == (2, "")
    assert said in told.err
    assert "Traceback" not in told.err


def test_what_can_not_be_ranked(fp8: Path, run: Run, tmp_path: Path) -> None:
    shutil.copytree(SOURCE, short := tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] -= 1
    config["text_config"]["layer_types"].pop()
    (short / "config.json").write_text(json.dumps(config))
    shutil.copytree(fp8, smoothed := tmp_path / "smoothed")
    tensors(lambda stored: stored.update({_FIRST: stored[_FIRST] * 2}))(smoothed)
    shutil.copytree(fp8, last := tmp_path / "last")
    tensors(lambda stored: stored.update({"model.norm.weight": stored["model.norm.weight"] * 2}))(last)
    (tmp_path / "narrow.yaml").write_text("quantize: [{modules: model.layers.1, scheme: fp8}]\nkeep: [model.visual, lm_head]\n")
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text('{"_class_name": "QwenImagePipeline"}')
    for pair, options, said in (
        ((SOURCE, SOURCE), (), "the candidate quantizes no linear of a decoder layer: there is nothing to rank"),
        ((short, fp8), (), "reference and candidate differ in their number of layers: 5 and 6"),
        ((SOURCE, fp8), ("--recipe", tmp_path / "narrow.yaml"), "the recipe keeps model.layers.0.self_attn.qkv_proj, which "),
        ((SOURCE, tmp_path / "pipeline"), (), "a pipeline: what is ranked here are the layers of language models"),
        ((SOURCE, tmp_path / "absent"), (), "no such folder"),
        ((SOURCE, smoothed), (), f"{_FIRST}: the candidate's is another: what it quantizes was changed with it"),
        ((SOURCE, last), (), "model.norm.weight: the candidate's is another"),
        ((SOURCE, tmp_path), (), "has no config.json"),
    ):
        told = run("sensitivity", *pair, *FEW, *options)
        assert (told.code, told.out) == (2, ""), told.out
        assert said in told.err


def test_a_recipe_that_can_not_be_written_is_printed(fp8: Path, run: Run) -> None:
    """Rather than lost with all that was measured. /proc takes no files of anybody's."""
    told = run("sensitivity", SOURCE, fp8, *FEW, "--keep", "1", "--output", "/proc/kept.yaml")
    assert told.code == 2
    assert "error: /proc/kept.yaml: can't be written: " in told.err
    assert "keeping 1 unit that costs the most: " in told.out
    assert "\noutput: " in told.out
    assert "save it as fp8-keep1.yaml (--output does), then: ckptq convert --recipe fp8-keep1.yaml --amax " in told.out


_FIRST = "model.layers.0.input_layernorm.weight"


def test_nan_ranks_nothing(fp8: Path, run: Run, tmp_path: Path) -> None:
    for name, folder in (("source", SOURCE), ("nan", fp8)):
        shutil.copytree(folder, tmp_path / name)
        tensors(lambda stored: stored.update({_FIRST: stored[_FIRST] * torch.nan}))(tmp_path / name)
    told = run("sensitivity", tmp_path / "source", tmp_path / "nan", *FEW, "--keep", "1", "--output", tmp_path / "r.yaml")
    assert told.code == 1
    assert "a KL of nan to " in told.err
    assert "so there is nothing to rank" in told.err
    assert not (tmp_path / "r.yaml").exists()
