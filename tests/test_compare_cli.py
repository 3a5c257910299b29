"""`ckptq compare` as a user meets it: what goes to which stream, both formats, limits and exit codes; a recipe's `quality`."""

import json
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator
from make_coded import make_coded
from PIL import Image
from safetensors.torch import load_file, save_file

from ckptq.cli import main
from ckptq.compare import Comparison, images
from ckptq.compare.behavior import Behavior, SampleGap
from ckptq.compare.policy import METRICS, Limit, broken, judge, parse_policy, refuse_unmeasured
from ckptq.compare.sampled import figures
from ckptq.compare.tally import Gap, LayerGap
from ckptq.errors import RecipeError
from ckptq.recipe import parse_recipe
from ckptq.reports.json import plain
from ckptq.writer import write_report

SCHEMA = json.loads((Path(__file__).parent.parent / "docs" / "compare.schema.json").read_text(encoding="utf-8"))
Run = Callable[..., "Result"]


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def compare(capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs `ckptq compare` in this process."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: str | Path) -> Result:
        with pytest.raises(SystemExit) as stop:
            main(["compare", *map(str, arguments)])
        out, err = capfd.readouterr()
        assert isinstance(stop.value.code, int)
        return Result(stop.value.code, out, err)

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def coded(example_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_coded(example_model, tmp_path_factory.mktemp("coded") / "fp8", "demo")


@pytest.fixture(scope="module")
def spoiled(coded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tensor that is gone, a scale that is NaN, and norms of zeros."""
    folder = shutil.copytree(coded, tmp_path_factory.mktemp("spoiled") / "fp8")
    stored = load_file(folder / "model.safetensors")
    del stored["model.layers.0.input_layernorm.weight"]
    stored["model.layers.1.mlp.up_proj.weight_scale"] = torch.tensor(math.nan)
    stored["model.norm.weight"].zero_()
    save_file(stored, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders with one image that is the same and one that is not, and a float array."""
    tmp = tmp_path_factory.mktemp("outputs")
    for name, value in (("a", 100), ("b", 110)):
        (tmp / name).mkdir()
        for number, pixels in enumerate((50, value)):
            Image.fromarray(np.full((4, 4, 3), pixels, np.uint8)).save(tmp / name / f"image_{number}.png")
    return tmp / "a", tmp / "b"


def conforms(text: str) -> dict[str, Any]:
    """The object on stdout, against the schema, in which every key must be described."""
    said: dict[str, Any] = json.loads(text)
    closed = json.loads(json.dumps(SCHEMA))

    def close(node: Any) -> None:
        if isinstance(node, dict):
            if "properties" in node:
                node.setdefault("additionalProperties", False)
            for value in node.values():
                close(value)

    close(closed)
    Draft202012Validator(closed).validate(said)
    return said


def test_the_schema_is_one_and_names_every_metric() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    named = SCHEMA["properties"]["figures"]["propertyNames"]["enum"]
    assert named == [metric for part in METRICS.values() for metric in part]


def test_weights(example_model: Path, coded: Path, compare: Run, tmp_path: Path) -> None:
    done = compare(example_model, coded, "--weights-only", "--report", f"json={tmp_path / 'r.json'}")
    assert done.code == 0
    assert "Worst tensors (10 of 42 that differ)" in done.out
    assert "behavior was not measured: left out by --weights-only" in done.out
    assert "weights: " in done.err
    said = conforms((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert (said["ok"], said["images"], said["behavior"], len(said["weights"])) == (True, None, None, 129)
    assert said["skipped"].keys() == {"images", "behavior"}
    worst = said["weights"][0]
    assert worst["relative_l2"] == said["figures"]["weight_relative_l2_max"]
    assert said["weights"][-1]["sqnr_db"] == "inf"
    as_json = compare(example_model, coded, "--weights-only", "--format", "json")
    assert json.loads(as_json.out) == said


def test_a_limit_is_broken(example_model: Path, coded: Path, compare: Run) -> None:
    arguments = (
        example_model,
        coded,
        "--weights-only",
        "--fail-on",
        "weight_cosine_min<0.9",
        "--fail-on",
        "weight_sqnr_db_min < 32",
    )
    done = compare(*arguments)
    assert done.code == 1
    assert "kept: weight_cosine_min is 0.99" in done.out
    (line,) = [line for line in done.out.splitlines() if line.startswith("BROKEN")]
    assert line.startswith("BROKEN: weight_sqnr_db_min is 31.")
    assert line.endswith(", beyond the limit weight_sqnr_db_min<32")
    said = conforms(compare(*arguments, "--format", "json").out)
    assert (said["exit_code"], said["ok"], [limit["broken"] for limit in said["limits"]]) == (1, False, [False, True])


def test_what_can_not_be_compared_breaks_every_limit(example_model: Path, spoiled: Path, compare: Run) -> None:
    done = compare(example_model, spoiled, "--weights-only", "--fail-on", "weight_cosine_min<0", "--fail-on", "weights_unmatched>0")
    assert done.code == 1
    assert done.out.count("BROKEN: ") == 2
    assert "can't be compared: model.layers.1.mlp.up_proj.weight: candidate: FP8 codes with scales that are not finite" in done.out
    assert "in the reference alone: model.layers.0.input_layernorm.weight" in done.out
    said = conforms(compare(example_model, spoiled, "--weights-only", "--format", "json").out)
    assert said["figures"]["weight_cosine_min"] == "nan"
    assert {"name": "model.layers.0.input_layernorm.weight", "found": "in the reference alone"} in said["unmatched"]


def test_a_model_that_gives_nan_fails_without_a_limit(example_model: Path, coded: Path, compare: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(coded, tmp_path / "fp8")
    stored = load_file(folder / "model.safetensors")
    stored["model.layers.2.input_layernorm.weight"][0] = math.nan
    save_file(stored, folder / "model.safetensors")
    few = ("--samples", "2", "--sequence-length", "16")
    done = compare(
        example_model, folder, *few, "--report", f"html={tmp_path / 'r.html'}", "--report", f"json={tmp_path / 'r.json'}"
    )
    assert done.code == 1
    told = f"the candidate, {folder}, gives NaN or infinities on these samples, from layer 2 on"
    assert f"{told}: `ckptq validate` and the weights above say why" in done.out
    assert done.out.rstrip().endswith(": FAILED: no figures of what it does")
    said = conforms((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert (said["ok"], said["exit_code"], said["figures"]["nll_candidate"]) == (False, 1, "nan")
    assert [layer["hidden"]["cosine"] for layer in said["behavior"]["layers"]][2:] == ["nan"] * 4
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Failed: the candidate, " in page
    assert "they differ" not in page
    assert "no verdict" not in page
    swapped = compare(folder, example_model, *few)
    assert (swapped.code, "the reference, " in swapped.out) == (1, True)


def test_what_is_likely_a_slip_is_told(example_model: Path, coded: Path, compare: Run) -> None:
    assert "is quantized, and " not in compare(example_model, coded, "--weights-only").err
    assert "the candidate, is not: are they swapped?" in compare(coded, example_model, "--weights-only").err
    assert "warning: reference and candidate are one folder" in compare(coded, coded, "--weights-only").err


def test_a_report_is_whole_or_not_there(example_model: Path, coded: Path, compare: Run, tmp_path: Path) -> None:
    """Where it can't be written the tables were printed all the same. /proc takes no files of anybody's."""
    done = compare(example_model, coded, "--weights-only", "--report", "json=/proc/r.json")
    assert done.code == 2
    assert "Worst tensors" in done.out
    assert "error: /proc/r.json: can't be written: " in done.err
    assert "  name a file that you may write to" in done.err
    full = compare(example_model, coded, "--weights-only", "--report", "json=/dev/full")
    assert (full.code, "error: /dev/full: can't be written: No space left on device" in full.err) == (2, True)
    (tmp_path / "old.json").write_text("old")
    (tmp_path / "link.json").symlink_to("old.json")
    with pytest.raises(UnicodeEncodeError):  # what breaks in the middle
        write_report(tmp_path / "link.json", "x" * 100_000 + "\ud800")
    assert {path.name for path in tmp_path.iterdir()} == {"old.json", "link.json"}
    assert (tmp_path / "old.json").read_text() == "old"
    write_report(tmp_path / "link.json", "new")
    assert ((tmp_path / "old.json").read_text(), (tmp_path / "link.json").is_symlink()) == ("new", True)


def test_samples(example_model: Path, coded: Path, compare: Run, tmp_path: Path) -> None:
    """A text of the user's; all figures of the policy's are measured."""
    (tmp_path / "a.txt").write_text("\n\n".join(f"The {n}th line of a text that has a few words." for n in range(5)))
    arguments = (example_model, coded, "--text", tmp_path / "a.txt", "--samples", "3", "--sequence-length", "16")
    done = compare(*arguments, "--fail-on", "kl_mean>1e-9", "--format", "json")
    said = conforms(done.out)
    assert done.code == 1
    assert said["figures"].keys() == METRICS["weights"].keys() | METRICS["behavior"].keys()
    assert said["figures"]["nll_difference_low"] <= said["figures"]["nll_difference"] <= said["figures"]["nll_difference_high"]
    assert len(said["behavior"]["samples"]) == said["settings"]["samples"] == 3
    assert (said["settings"]["source"], said["settings"]["sequence_length"]) == ("text", 16)
    assert str(tmp_path) not in json.dumps(said["settings"])


def behavior(*samples: tuple[list[float], list[float], list[float]]) -> Behavior:
    """Of samples' tokens: KL, NLL of the reference, NLL of the candidate."""
    gaps = tuple(SampleGap("", len(kl), sum(kl) / len(kl), 0, sum(a) / len(a), sum(b) / len(b), "") for kl, a, b in samples)
    kl, a, b = (tuple(value for sample in samples for value in sample[i]) for i in range(3))
    gap = Gap(0.25, 1, 12)
    return Behavior(gap, (LayerGap(0, gap, {}),), gaps, (), kl, a, b, tuple(value < 0.5 for value in kl))


def test_figures_by_hand() -> None:
    found = figures(behavior(([0.0, 1.0], [1.0, 3.0], [2.0, 2.0]), ([0.5], [2.0], [5.0])))
    assert found == pytest.approx(
        {
            "kl_mean": 0.5, "kl_mean_low": 0.5, "kl_mean_high": 0.5, "kl_p99": 0.99, "kl_max": 1,
            "top1_agreement": 1 / 3, "nll_reference": 2, "nll_candidate": 3,
            "perplexity_reference": math.exp(2), "perplexity_candidate": math.exp(3), "perplexity_ratio": math.e,
            "nll_difference": 1, "nll_difference_low": 0, "nll_difference_high": 3, "hidden_relative_l2_last": 0.25,
        }
    )  # fmt: skip
    one = figures(behavior(([0.0, 1.0], [1.0, 3.0], [2.0, 2.0])))
    assert not [name for name in one if name.endswith(("_low", "_high"))], "one sample has no interval"


def test_a_candidate_that_is_lost_has_figures_all_the_same() -> None:
    """exp of a mean loss above 709 is no float; NaN stays NaN."""
    found = figures(behavior(([9.0], [1.0], [800.0]), ([9.0], [2.0], [900.0])))
    assert (found["nll_candidate"], found["perplexity_candidate"], found["perplexity_ratio"]) == (850, math.inf, math.inf)
    assert found["perplexity_reference"] == pytest.approx(math.exp(1.5))
    nan = figures(behavior(([math.nan], [1.0], [math.nan]), ([9.0], [2.0], [3.0])))
    assert all(math.isnan(nan[name]) for name in ("kl_mean", "kl_max", "kl_mean_low", "perplexity_candidate", "perplexity_ratio"))


def test_an_interval_is_as_wide_as_theory_says() -> None:
    """Of 400 samples with a token each: the mean, and 1.96 standard errors to each side."""
    apart = np.random.default_rng(1).normal(0.1, 1, 400)
    found = figures(behavior(*(([0.0], [0.0], [float(value)]) for value in apart)))
    error = 1.96 * apart.std() / 20
    assert found["nll_difference_low"] == pytest.approx(apart.mean() - error, abs=0.1 * error)
    assert found["nll_difference_high"] == pytest.approx(apart.mean() + error, abs=0.1 * error)


def test_images(outputs: tuple[Path, Path], compare: Run) -> None:
    more = ("--reference-seconds", "2", "--candidate-seconds", "1", "--candidate-seconds", "2", "--fail-on", "psnr_db_min<30")
    done = compare(*outputs, *more)
    assert done.code == 1
    assert done.out.index("image_1.png") < done.out.index("image_0.png"), "worst first"
    assert "BROKEN: psnr_db_min is 28.1308, beyond the limit psnr_db_min<30" in done.out
    said = conforms(compare(*outputs, *more, "--format", "json").out)
    assert said["figures"]["avg_generation_time_ratio_candidate_over_reference"] == 0.75
    assert said["images"]["output_metrics"] == plain(images.compare_images(*outputs).output_metrics.data())
    assert said["images"]["outputs"][1]["output_metrics"]["all_frames_metrics"]["psnr_db"] == "inf"
    assert (said["weights"], said["sizes"]) == (None, {"reference": 2, "candidate": 2})


REFUSED = [
    (("--fail-on", "kl_men>1"), "expected a metric that is measured, found 'kl_men'; did you mean kl_mean"),
    (("--fail-on", "kl_mean=1"), "expected METRIC, one of > >= < <=, and a number, as in 'kl_mean>0.02', found 'kl_mean=1'"),
    (("--fail-on", "kl_mean>inf"), "found 'kl_mean>inf'"),
    (("--weights-only", "--fail-on", "kl_mean>1"), "kl_mean is not measured: left out by --weights-only"),
    (("--fail-on", "psnr_db<30"), "psnr_db is not measured: these are checkpoints"),
    (("--weights-only", "--text", "a.txt"), "--text is for samples, which --weights-only leaves out"),
    (("--text", "a.txt", "--coco", "images", "captions.json"), "--text and --coco: expected one source of samples"),
    (("--report", "pdf=x.pdf"), "expected FORMAT=FILE with html or json"),
    (("--report", "json=no/such/x.json"), "can't be written: there is no folder"),
    (("--recipe", "wan22-fp8-dynamic", "--text", "x"), "--text and --recipe: expected one source"),
    (("--reference-seconds", "1"), "seconds and peak memory are for folders of outputs"),
    (("--memory", "much"), "--memory: expected a size"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED, ids=[" ".join(options) for options, _ in REFUSED])
def test_refused(options: tuple[str, ...], said: str, example_model: Path, coded: Path, compare: Run) -> None:
    done = compare(example_model, coded, *options)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert "Traceback" not in done.err


def test_what_can_not_be_read(example_model: Path, outputs: tuple[Path, Path], compare: Run, tmp_path: Path) -> None:
    for pair, said in (
        ((example_model, tmp_path), "has no config.json"),
        ((example_model, tmp_path / "absent"), "no such folder"),
        ((outputs[0], example_model), "a: a folder of images, and "),
        ((example_model, outputs[0]), "compare two checkpoints, or two folders of images or frames"),
    ):
        done = compare(*pair)
        assert (done.code, done.out) == (2, "")
        assert said in done.err
    done = compare(*outputs, "--samples", "3")
    assert (done.code, "--samples is for checkpoints: these are folders of outputs" in done.err) == (2, True)
    done = compare(*outputs, "--fail-on", "weight_cosine_min<1")
    assert (done.code, "these are folders of outputs" in done.err) == (2, True)


def test_a_recipes_limits_count(example_model: Path, coded: Path, compare: Run, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("quantize: [{modules: '*', scheme: fp8}]\nquality: {fail_on: weight_relative_l2_max>0.001}\n")
    done = compare(example_model, coded, "--weights-only", "--recipe", recipe)
    assert (done.code, "BROKEN: weight_relative_l2_max" in done.out) == (1, True)


# --- policies ---


@pytest.mark.parametrize(
    ("text", "value", "is_broken"),
    [
        ("kl_mean>0.02", 0.02, False), ("kl_mean>=0.02", 0.02, True), ("top1_agreement<0.99", 0.99, False),
        (" top1_agreement <= 9.9e-1 ", 0.99, True), ("kl_max>1", math.inf, True), ("kl_max>1", math.nan, True),
        ("weight_sqnr_db_min<20", -math.inf, True), ("weight_sqnr_db_min<20", math.inf, False), ("nll_difference>-1", -2, False),
    ],
)  # fmt: skip
def test_limits(text: str, value: float, is_broken: bool) -> None:
    limit = parse_policy(text)
    said = broken([limit], {limit.metric: value})
    assert bool(said) == is_broken
    assert all(limit.metric in line and f"is {value:.6g}, beyond the limit {limit}" in line for line in said)
    assert Comparison("a", "b", limits=judge([limit], {limit.metric: value})).exit_code == is_broken


def test_what_was_not_measured_is_never_passed() -> None:
    with pytest.raises(RecipeError, match="kl_mean was not measured"):
        broken([Limit("kl_mean", ">", 0)], {"kl_max": 0.0})
    with pytest.raises(RecipeError, match="kl_mean is not measured: so"):
        refuse_unmeasured([parse_policy("kl_mean>0")], {"behavior": "so"})


GOOD = "quantize: [{modules: '*', scheme: fp8}]\n"


def test_quality_in_a_recipe() -> None:
    recipe = parse_recipe(f"{GOOD}quality: {{fail_on: [kl_mean>0.02], samples: {{source: text, files: a.txt, samples: 4}}}}", "r")
    assert recipe.quality is not None
    assert recipe.quality.samples is not None
    assert (recipe.quality.fail_on, recipe.quality.samples.source, recipe.quality.samples.samples) == (["kl_mean>0.02"], "text", 4)
    assert parse_recipe(GOOD, "r").quality is None


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("{fail_on: [kl_mean>1, kl_men>1]}", "quality.fail_on.1 (line 2): expected a metric that is measured, found 'kl_men';"),
        ("{fial_on: []}", "quality.fial_on (line 2): unknown key; did you mean fail_on?"),
        ("{samples: {source: txt}}", "quality.samples.source (line 2): expected coco, text, media, builtin or prompts"),
        ("{samples: {}}", "quality.samples.source (line 2): is required"),
        ("{samples: {source: builtin, fild: x}}", "quality.samples.fild (line 2): unknown key"),
        ("{samples: {source: builtin, annotations: x}}", "quality.samples.annotations (line 2): unknown key here; it belongs to"),
    ],
)  # fmt: skip
def test_mistakes_in_quality(section: str, said: str) -> None:
    with pytest.raises(RecipeError) as found:
        parse_recipe(f"{GOOD}quality: {section}", "r")
    assert said in str(found.value)


CHILD = """\
import sys
from ckptq.cli import main
try:
    main(["compare", "--help"])
except SystemExit:
    print({"torch", "numpy", "PIL", "transformers", "rich"} & {*sys.modules})
"""


def test_help_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_a_conversion_ends_with_the_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe's limits decide its exit code; the output is published in any case."""
    for name, limit, code in (("good", "weight_relative_l2_max>0.1", 0), ("bad", "top1_agreement<1", 1)):
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(
            "quantize: [{modules: model.layers, scheme: fp8-dynamic}]\nkeep: [model.visual, lm_head]\n"
            "export: {format: compressed-tensors}\n"
            f"quality: {{fail_on: ['{limit}'], samples: {{source: builtin, samples: 2, sequence_length: 64}}}}\n"
        )
        asked = [
            "convert",
            "--recipe",
            str(recipe),
            "--model",
            str(Path(__file__).parent.parent / "examples/tiny-qwen2.5-vl"),
            "--output",
            str(tmp_path / name),
        ]
        with pytest.raises(SystemExit) as ended:
            main([*asked, "--device", "cpu", "--format", "json"])
        told = json.loads(capsys.readouterr().out)
        assert ended.value.code == code
        assert [judged["broken"] for judged in told["quality"]["limits"]] == [bool(code)]
        assert (tmp_path / name / "config.json").is_file()
    asked[asked.index("--output") + 1] = str(tmp_path / "told")
    with pytest.raises(SystemExit):
        main([*asked, "--device", "cpu"])
    told = capsys.readouterr().out
    assert "BROKEN: top1_agreement is 0." in told
    assert "serve it" not in told
    asked[asked.index("--output") + 1] = str(tmp_path / "unmeasured")
    with pytest.raises(SystemExit) as ended:
        main([*asked, "--device", "cpu", "--memory", "20MB"])  # enough to convert without samples
    assert ended.value.code == 2
    assert f"{tmp_path / 'unmeasured'} is written, but can't be compared with its source: --memory" in capsys.readouterr().err
    assert (tmp_path / "unmeasured" / "config.json").is_file()
