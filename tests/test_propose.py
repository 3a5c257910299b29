"""Architectures without a scope file: what `inspect` proposes, a recipe that spells it out, what comes of it, and who refuses."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from corpus.edit import edit_json, rename
from corpus.edit_files import config
from families import ROOT, families
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peers.answers import trace
from unscoped import make, recipe

from ckptq.checkpoint import read_inventory
from ckptq.cli import main
from ckptq.console import Console
from ckptq.convert import convert, prepare
from ckptq.errors import CkptqError, RecipeError, UnsupportedError
from ckptq.proposals import Proposal, as_yaml, propose
from ckptq.recipe import load_recipe
from ckptq.scopes import Fused, Scope, all_scopes, find_scope
from ckptq.spelled import load_scope, parse_scope, scope_to_validate
from ckptq.validate import examine
from ckptq.validators.vllm_load import served

CONVERTED = ("granite", "olmo2", "starcoder2")
SERVED = ("granite", "starcoder2")
Made = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """As the resident model's process has: how a sum is split among threads is allowed to change its last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """source(name) -> its checkpoint. Read only."""
    place = tmp_path_factory.mktemp("sources")
    return lambda name: place / name if (place / name).exists() else make(name, place / name)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, source: Made) -> Made:
    """converted(name) -> the output of a recipe with the proposed scope, beside the recipe `name.yaml`. Read only."""
    place = tmp_path_factory.mktemp("outputs")

    def made(name: str) -> Path:
        if not (place / name).exists():
            path = recipe(place / f"{name}.yaml", source(name), place / name, as_yaml(proposal(source(name))))
            convert(prepare(load_recipe(str(path))), resume=False, device="cpu", memory=None, console=Console(quiet=True))
        return place / name

    return made


def proposal(folder: Path) -> Proposal:
    return propose(folder, read_inventory(folder).main)


def run(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    return stop.value.code, *capfd.readouterr()


# What is proposed


@pytest.mark.parametrize("name", [*CONVERTED, "smollm3"])
def test_a_proposal_is_a_recipes_scope(name: str, source: Made) -> None:
    found = proposal(source(name))
    text = as_yaml(found)
    assert parse_scope(yaml.safe_load(text)["scope"], name) == found.scope
    assert found.scope.name == name
    assert all(f"# uncertain: {why[:40]}" in text for why in found.uncertain.values())


def test_linears_are_fused_and_cut_as_the_server_would() -> None:
    found = {name: proposal_of(name) for name in ("olmo2", "starcoder2")}
    attention = (
        Fused("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "heads"),
        Fused("self_attn.o_proj", ("self_attn.o_proj",), "columns"),
    )
    gated = (
        Fused("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"), "rows"),
        Fused("mlp.down_proj", ("mlp.down_proj",), "columns"),
    )
    plain = (Fused("mlp.c_fc", ("mlp.c_fc",), "rows"), Fused("mlp.c_proj", ("mlp.c_proj",), "columns"))
    assert set(found["olmo2"].linears) == {*attention, *gated}
    assert set(found["starcoder2"].linears) == {*attention, *plain}
    assert found["starcoder2"].kv == ("self_attn.k_proj", "self_attn.v_proj")
    assert found["olmo2"].parameters["model.layers.{i}.self_attn.k_norm.weight"] == "64"
    assert found["starcoder2"].parameters["model.layers.{i}.mlp.c_fc.bias"] == "256"
    assert found["starcoder2"].parameters["lm_head.weight"] == "4096 128", "though it is tied, and not stored"


def proposal_of(name: str) -> Scope:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return proposal(make(name, Path(folder) / name)).scope


@pytest.mark.parametrize("name", families())
def test_of_an_architecture_that_has_a_scope_the_proposal_is_like_it(name: str, tmp_path: Path) -> None:
    """All that the conversion goes by; sizes stand there as numbers, and there is one spelling of names."""
    families()[name].make(tmp_path)
    component = read_inventory(tmp_path).main
    known = find_scope(component.config)
    if known.stage or (known.experts and known.experts.stored):  # several models in one; experts in one tensor
        with pytest.raises(UnsupportedError, match="no scope can be proposed"):
            propose(tmp_path, component)
        return
    ours = propose(tmp_path, component).scope
    everywhere = {fused for fused in known.linears if not known.experts or not fused.runtime.startswith(known.experts.dense)}
    assert everywhere <= set(ours.linears) <= set(known.linears)
    assert (ours.experts and ours.experts.groups) == (known.experts and known.experts.groups)
    assert (ours.kv, ours.auto_class, ours.text_config) == (known.kv, known.auto_class, known.text_config)
    assert ours.norm_offset == known.norm_offset
    assert {known.canonical(f"{kept}.") for kept in ours.kept} == {f"{kept}." for kept in known.kept}
    assert known.canonical(f"{ours.layers}.0.") == f"{known.layers}.0."
    assert {known.canonical(f"{tower.prefix}.") for tower in ours.towers} == {f"{tower.prefix}." for tower in known.towers}
    stored = {known.canonical(n) for n in component.tensors}
    assert {known.canonical(n) for n in ours.parameters if "{" not in n} - {"lm_head.weight"} <= stored


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (config(lambda c: c.pop("architectures")), "config.json names no architecture"),
        (config(lambda c: c.update(model_type="granit")), "can't build GraniteForCausalLM"),
        (config(lambda c: c.update(architectures=["GraniteForSequenceClassification"])), "builds GraniteForSequenceClassification"),
        (config(lambda c: c.update(num_hidden_layers=3)), "model.layers.2"),
        (config(lambda c: c.update(num_hidden_layers=10**8)), "config.json: num_hidden_layers is above 4096"),
        (rename("q_proj", "qq_proj", "model.layers.0.*q_proj*"), "model.layers.0 has no self_attn.q_proj"),
        (
            rename("input_layernorm", "inputlayernorm", "*.1.input_layernorm.*"),
            "model.layers.1.input_layernorm.weight is not stored",
        ),
    ],
    ids=["no name", "no such model", "no auto class", "too few layers", "endless layers", "linear misspelled", "norm misspelled"],
)
def test_what_no_scope_can_say_is_refused_with_the_reason(
    edit: Callable[[Path], None], reason: str, source: Made, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(source("granite"), tmp_path / "copy"))
    edit(folder)
    with pytest.raises(UnsupportedError, match="no scope can be proposed") as refused:
        proposal(folder)
    assert reason in str(refused.value)


def test_a_matrix_that_is_stored_transposed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"num_hidden_layers|transposed"):
        proposal(make("gpt2", tmp_path / "gpt2"))


# The command line


def test_inspect_prints_the_proposal(source: Made, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capfd, "inspect", source("olmo2"))
    assert code == 0
    assert "no scope: config.json: no scope for architectures ['Olmo2ForCausalLM']" in out
    assert parse_scope(yaml.safe_load(out[out.index("# Proposed by") :])["scope"], "inspect") == proposal(source("olmo2")).scope
    code, out, _ = run(capfd, "inspect", source("olmo2"), "--format", "json")
    assert json.loads(out)["proposal"] == as_yaml(proposal(source("olmo2")))


def test_inspect_shows_what_a_recipe_with_a_scope_would_touch(
    converted: Made, source: Made, capfd: pytest.CaptureFixture[str]
) -> None:
    path = converted("olmo2").with_suffix(".yaml")
    said = json.loads(run(capfd, "inspect", source("olmo2"), "--recipe", path, "--format", "json")[1])
    assert (said["scope"], said["proposal"], said["layers"]) == ("olmo2", None, 2)
    assert said["recipes"][str(path)]["rules"] == {"keep: lm_head": 1, "quantize: model.layers.*": 14}


def test_nothing_is_converted_by_a_guess(source: Made, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path / "no-scope.yaml", source("olmo2"), tmp_path / "out")
    code, _, err = run(capfd, "convert", "--recipe", path)
    assert code == 2
    assert "no scope for architectures ['Olmo2ForCausalLM']" in err
    assert "`ckptq inspect SRC` proposes a scope to be put into a recipe under `scope:`" in err
    assert not (tmp_path / "out").exists()


def test_a_plan_says_which_scope(converted: Made, capfd: pytest.CaptureFixture[str]) -> None:
    said = json.loads(
        run(capfd, "convert", "--recipe", converted("olmo2").with_suffix(".yaml"), "--dry-run", "--format", "json")[1]
    )
    assert (said["scope"], said["findings"], said["carried"]) == ("olmo2", [], [])


# A recipe's scope

ROUTED = {"runtime": "e", "groups": [["e.{e}.a"], ["e.{e}.b"]], "linears": [], "dense": "mlp.", "counts": ["n"]}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda s: s.update(kvs=[]), "scope.kvs (line 7): unknown key; did you mean kv?"),
        (lambda s: s["linears"][0].update(shard=["a"]), "unknown key; did you mean shards?"),
        (lambda s: s["linears"][0].update(split="row"), "expected 'heads', 'rows', 'columns' or 'none', found 'row'"),
        (
            lambda s: s.update(kv=["self_attn.key", "self_attn.v_proj"]),
            "expected kv to name shards of linears, found 'self_attn.key'",
        ),
        (lambda s: s.pop("parameters"), "scope.parameters (line 7): is required"),
        (lambda s: s.update(auto_class="pipeline"), "expected auto_class to be one of transformers' AutoModel classes"),
        (lambda s: s["parameters"].pop("model.layers.{i}.mlp.c_fc.weight"), "found none called 'model.layers.{i}.mlp.c_fc.weight'"),
        (lambda s: s["parameters"].update({"mtp.{i}.weight": "4"}), "found 'mtp.{i}.weight'"),
        (lambda s: s.update(linears=[]), "expected linears with shards, found none"),
        (lambda s: s.update(parameters={str(i): "1" for i in range(600)}), "expected at most 512 names in a list, found more"),
        (lambda s: s.update(kept=[]), "expected server_kept to have the server's names of modules among kept, found 'lm_head'"),
        (lambda s: s.update(aliases=[["x", "xx"]] * 30), "expected aliases to be as many whole parts of a name"),
        (lambda s: s.update(generations=[["a.", "b."]] * 40), "expected at most 32 rules in generations"),
        (lambda s: s.update(experts=ROUTED | {"stored": ["e.a"]}), "expected experts.stored to have a name for each of the groups"),
        (lambda s: s.update(experts=ROUTED | {"dense": "self_attn."}), "found 'self_attn.k_proj' among what they do without"),
        (lambda s: s.update(experts=ROUTED | {"groups": [["e.a"], ["e.b"]]}), "expected '{e}' in the linears of experts.groups"),
        (lambda s: s.update(experts=ROUTED | {"groups": [["e.{e}.a"]] * 2}), "expected each shard in one linear"),
        (
            lambda s: s["parameters"].update({f"e.{{e}}.{i}": "1" for i in range(20)}) or s.update(experts=ROUTED),
            "at most 16 names",
        ),
    ],
)
def test_a_mistake_in_a_scope_is_told_with_its_place(
    change: Callable[[dict[str, Any]], Any], problem: str, source: Made, tmp_path: Path
) -> None:
    body = yaml.safe_load(as_yaml(proposal(source("starcoder2"))))
    change(body["scope"])
    path = recipe(tmp_path / "recipe.yaml", source("starcoder2"), tmp_path / "out", f"scope: {json.dumps(body['scope'])}\n")
    with pytest.raises(RecipeError) as refused:
        load_recipe(str(path))
    assert problem in str(refused.value)
    assert len(str(refused.value)) < 1000, "a scope is not shown whole"


@pytest.mark.parametrize(
    "change", [{"auto_class": "AutoModelForCausalML"}, {"auto_class": "AutoModelForCTC"}, {"stage": "thinker"}]
)
def test_a_model_that_transformers_does_not_build_so_is_told(change: dict[str, Any], source: Made, tmp_path: Path) -> None:
    path = recipe(tmp_path / "recipe.yaml", source("granite"), tmp_path / "out", as_yaml(proposal(source("granite"))))
    job = prepare(load_recipe(str(path)))
    job = replace(job, parts=(replace(job.parts[0], scope=replace(job.scope, **change)),))
    with pytest.raises(UnsupportedError, match=r"the scope granite: .* builds no model of (GraniteConfig|thinker_config)"):
        convert(job, resume=False, device="cpu", memory=None, console=Console(quiet=True))


@pytest.mark.parametrize("scope", list(all_scopes()), ids=lambda scope: scope.name)
def test_every_scope_can_be_spelled_out(scope: Scope) -> None:
    assert parse_scope(yaml.safe_load(as_yaml(Proposal(scope, {})))["scope"], scope.name) == scope


TEXTS = ["", "{i}", "{e}", "model.", "model.layers", "² / 0", "a.b", "*"]
KEYS = ["", "model.layers.{i}.x", "runtime"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(TEXTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_scope_is_refused_or_judged_by(data: st.DataObject, converted: Made) -> None:
    """A ckptq.json is anybody's: whatever it says, there is a verdict or a refusal, and soon."""
    body = json.loads((converted("starcoder2") / "ckptq.json").read_text())["job"]["recipe"]["scope"]
    body["towers"] = [{"prefix": "model.tower", "depth": "a.b", "linears": [], "sizes": {"wide": "2 * hidden_size"}}]
    body["experts"] = data.draw(
        st.none() | st.just({"runtime": "e", "groups": [["e.{e}.a"]], "linears": [], "dense": "m.", "counts": ["n"]})
    )
    at = body
    while isinstance(at, (dict, list)) and at:
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not isinstance(at[key], (dict, list)) or data.draw(st.booleans()):
            at[key] = data.draw(JSON)
            break
        at = at[key]
    with contextlib.suppress(CkptqError):
        examine(converted("starcoder2"), values=False, scope=parse_scope(body, "a scope"))


def test_a_scope_of_another_model_is_refused(source: Made, tmp_path: Path) -> None:
    path = recipe(tmp_path / "recipe.yaml", source("granite"), tmp_path / "out", as_yaml(proposal(source("olmo2"))))
    with pytest.raises(RecipeError, match=r"scope.architectures: Olmo2ForCausalLM; config.json has .*Granite"):
        prepare(load_recipe(str(path)))


# What comes of it


@pytest.mark.parametrize("name", CONVERTED)
def test_an_output_is_sound_by_the_scope_in_its_record(name: str, converted: Made, source: Made) -> None:
    found = examine(converted(name), source=source(name))
    assert found.findings == ()
    assert found.scope == (name, "ckptq.json")
    assert found.built is not None
    assert found.built["linears"] == {"ModelOpt FP8": 14 if name != "starcoder2" else 12}
    assert found.built["kv_cache"] == "fp8"
    assert load_scope(converted(name) / "ckptq.json") == load_scope(converted(name).with_suffix(".yaml"))


MEASURE = """
import json, sys, torch, transformers
from pathlib import Path
from peers.modelopt_export import encoded_samples
from peers.resident import by_modelopt
for recipe, output in json.loads(sys.argv[1]):
    source, samples = encoded_samples(recipe, [])
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        Path(output).write_text(json.dumps(by_modelopt(model, samples, ("*lm_head*",))))
"""


@pytest.fixture(scope="module")
def modelopts(tmp_path_factory: pytest.TempPathFactory, converted: Made) -> Callable[[str], dict[str, float]]:
    """modelopts(name) -> amaxes of ModelOpt's resident flow on the samples of the recipe."""
    place = tmp_path_factory.mktemp("modelopt")
    jobs = [(str(converted(name).with_suffix(".yaml")), str(place / name)) for name in CONVERTED]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, json.dumps(jobs)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return lambda name: dict(json.loads((place / name).read_text()))


@pytest.mark.parametrize("name", CONVERTED)
def test_amaxes_equal_modelopts_bit_for_bit(name: str, converted: Made, modelopts: Callable[[str], dict[str, float]]) -> None:
    ours = json.loads((converted(name) / "ckptq.json").read_text())["amax"]
    theirs = modelopts(name)
    kinds = {"input": "input_quantizer", "k": "k_bmm_quantizer", "v": "v_bmm_quantizer"}
    compared = {}
    for observer, value in ours.items():
        module, _, kind = observer.removesuffix("_amax").rpartition(".")
        if kind != "weight":
            at = module if kind == "input" else module.rpartition(".")[0]
            compared[observer] = (value, theirs[f"{at}.{kinds[kind]}"])
    assert len(compared) == 2 * 6
    assert {observer: pair for observer, pair in compared.items() if pair[0] != pair[1]} == {}


@pytest.mark.server
@pytest.mark.parametrize("name", SERVED)
def test_the_real_server_loads_it_whole(name: str, converted: Made) -> None:
    """vLLM 0.32.0 has a model file for Granite, and builds the other by its transformers backend."""
    loaded = served(trace(converted(name)), converted(name))
    assert loaded.findings == ()
    assert (loaded.version, loaded.quantization, loaded.kv_cache_dtype) == ("0.32.0", "modelopt", "fp8_e4m3")
    assert loaded.kernels


# Validation


def test_a_scope_is_given_or_in_the_record_or_there_is_no_verdict(
    converted: Made, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(converted("granite"), tmp_path / "copy"))
    code, out, _ = run(capfd, "validate", folder)
    assert code == 0, out
    assert "granite, as ckptq.json spells it out" in out
    assert "vLLM 0.32 (not tried with this scope)" in out
    (folder / "ckptq.json").unlink()
    code, _, err = run(capfd, "validate", folder)
    assert code == 2
    assert "no scope for architectures ['GraniteForCausalLM']" in err
    assert "--scope FILE" in err
    code, out, _ = run(capfd, "validate", folder, "--scope", converted("granite").with_suffix(".yaml"), "--format", "json")
    assert (code, json.loads(out)["scope"]) == (0, {"name": "granite", "from": "--scope"})
    for file, problem in ((converted("granite") / "config.json", "has no scope"), (folder / "none", "no such file")):
        code, _, err = run(capfd, "validate", folder, "--scope", file)
        assert code == 2
        assert problem in err


def test_a_scope_in_the_record_is_anybodys(converted: Made, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(converted("granite"), tmp_path / "copy"))
    edit_json(folder / "ckptq.json", lambda body: body["job"]["recipe"]["scope"].update(linears=[{"runtime": "a", "shards": 3}]))
    with pytest.raises(RecipeError, match=r"ckptq.json: job.recipe.scope:\n  - scope.linears.0.shards: expected a list, found 3"):
        examine(folder, values=False)


def test_ckptqs_own_scope_comes_before_a_recorded_one(example_model: Path, tmp_path: Path) -> None:
    """Else a file in a checkpoint could say what counts as a fault in it."""
    component = read_inventory(example_model).main
    own = find_scope(component.config)
    lenient = replace(own, name="lenient", skipped=("model.", "visual.", "lm_head."))
    record = {"job": {"recipe": {"scope": {"name": "lenient"}}}}
    assert scope_to_validate(component.config, None, lambda: record) == (own, "ckptq")
    assert scope_to_validate(component.config, lenient, lambda: record) == (lenient, "--scope")
