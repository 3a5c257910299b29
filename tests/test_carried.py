"""Tensors that are no part of the model: MTP heads, layers after the last. They are carried over as they are, and said so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus.edit import drop, put, rename, tensors
from corpus.edit_files import config, ignoring
from families import families
from peers.answers import trace
from safetensors import safe_open
from unscoped import make, recipe

from ckptq.checkpoint import read_inventory
from ckptq.cli import main
from ckptq.console import Console
from ckptq.convert import Prepared, convert, prepare
from ckptq.errors import DataError, SourceError
from ckptq.proposals import as_yaml, propose
from ckptq.recipe import load_recipe
from ckptq.render import inspect_data
from ckptq.validate import examine, validate_plan
from ckptq.validators.vllm_load import served

Edit = Callable[[Path], None]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SmolLM3 of two layers. Read only."""
    return make("smollm3", tmp_path_factory.mktemp("plain") / "smollm3")


@pytest.fixture(scope="module")
def source(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a layer after the last, which config.json counts among those that predict further tokens. Read only."""
    folder = Path(shutil.copytree(plain, tmp_path_factory.mktemp("mtp") / "smollm3"))
    tensors(next_layer)(folder)
    config(lambda c: c.update(num_nextn_predict_layers=1))(folder)
    return folder


def next_layer(stored: dict[str, torch.Tensor]) -> None:
    last = {name: tensor for name, tensor in stored.items() if name.startswith("model.layers.1.")}
    stored |= {name.replace(".1.", ".2.", 1): tensor * 2 for name, tensor in last.items()}
    stored["model.layers.2.eh_proj.weight"] = torch.ones(128, 256, dtype=torch.bfloat16)
    stored["model.layers.2.enorm.weight"] = torch.ones(128, dtype=torch.bfloat16)


def job(source: Path, place: Path, scope: str | None = None, **settings: Any) -> Prepared:
    text = as_yaml(propose(source, read_inventory(source).main)) if scope is None else scope
    place.mkdir(exist_ok=True)
    return prepare(load_recipe(str(recipe(place / "recipe.yaml", source, place / "out", text, **settings))))


def run(prepared: Prepared) -> Path:
    return convert(prepared, resume=False, device="cpu", memory=None, console=Console(quiet=True)).output


@pytest.fixture(scope="module")
def output(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted by a recipe with the proposed scope. Read only."""
    return run(job(source, tmp_path_factory.mktemp("output") / "job"))


def stored(folder: Path) -> Mapping[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def test_the_proposal_names_what_it_carries_over(source: Path) -> None:
    found = propose(source, read_inventory(source).main)
    assert found.scope.skipped == ("model.layers.2.",)
    assert "carried over as they are" in found.uncertain["skipped"]


def test_what_nothing_calls_an_mtp_head_is_not_taken_for_one(source: Path, tmp_path: Path) -> None:
    """A layer too many, an unknown name: vLLM raises at them, so nothing says that it doesn't."""
    folder = Path(shutil.copytree(source, tmp_path / "copy"))
    config(lambda c: c.pop("num_nextn_predict_layers"))(folder)
    found = propose(folder, read_inventory(folder).main)
    assert found.scope.skipped == ()
    assert "nothing says that vLLM passes over model.layers.2." in found.uncertain["skipped"]
    with pytest.raises(SourceError, match=r"model\.layers\.2\..* num_hidden_layers 2") as refused:
        job(folder, tmp_path / "job", as_yaml(found))
    assert "`skipped`" in str(refused.value.hint)


def test_it_is_copied_bit_for_bit_and_said_so(source: Path, output: Path) -> None:
    before, after = stored(source), stored(output)
    carried = [name for name in before if name.startswith("model.layers.2.")]
    assert len(carried) == 11
    assert all(torch.equal(before[name].view(torch.int16), after[name].view(torch.int16)) for name in carried)
    assert not [name for name in after if name.startswith("model.layers.2.") and name not in before]
    record = json.loads((output / "ckptq.json").read_text())
    assert sorted(record["carried"]) == sorted(carried)
    reasons = {d["reason"] for d in record["decisions"] if d["module"].startswith("model.layers.2.")}
    assert reasons == {"carried over as it is"}


def test_the_plan_says_so(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    job(source, tmp_path / "job")
    with pytest.raises(SystemExit) as stop:
        main(["convert", "--recipe", str(tmp_path / "job/recipe.yaml"), "--dry-run"])
    assert stop.value.code == 0
    told = " ".join(capfd.readouterr().out.split())
    assert "11 tensors as they are, which the scope does not know or the server passes over: model.layers.2.* (11)" in told


def test_the_validator_finds_nothing_wrong_with_it(source: Path, output: Path) -> None:
    assert examine(output, source=source).findings == ()


@pytest.mark.server
def test_the_real_server_passes_it_over(output: Path) -> None:
    loaded = served(trace(output), output)
    assert loaded.findings == ()
    assert (loaded.version, loaded.quantization) == ("0.32.0", "modelopt")


@pytest.fixture(scope="module")
def mtp(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(an ERNIE 4.5 with the tensors of an MTP head, as published files call them; what it was converted to). Read only."""
    place = tmp_path_factory.mktemp("ernie")
    folder = make("ernie4_5_moe", place / "source")
    put(
        {
            "model.mtp_block.0.self_attn.q_proj.weight": torch.ones(128, 128, dtype=torch.bfloat16),
            "model.mtp_emb_norm.0.weight": torch.ones(128, dtype=torch.bfloat16),
            "model.mtp_linear_proj.0.weight": torch.ones(128, 256, dtype=torch.bfloat16),
        }
    )(folder)
    return folder, run(job(folder, place / "job"))


def test_an_mtp_head_is_known_by_transformers_own_list(mtp: tuple[Path, Path]) -> None:
    source, output = mtp
    record = json.loads((output / "ckptq.json").read_text())
    assert set(record["job"]["recipe"]["scope"]["skipped"]) == {"model.mtp_block.", "model.mtp_emb_norm.", "model.mtp_linear_proj."}
    assert len(record["carried"]) == 3
    assert examine(output, source=source).findings == ()
    kept = json.loads((output / "config.json").read_text())["quantization_config"]["ignore"]
    assert {"model.mtp_block*", "model.mtp_linear_proj*"} <= set(kept)


@pytest.mark.server
def test_the_real_server_passes_an_mtp_head_over(mtp: tuple[Path, Path]) -> None:
    assert served(trace(mtp[1]), mtp[1]).findings == ()


FORMATS = {
    "modelopt": ("fp8", "model.layers.2*"),
    "compressed-tensors": (None, r"re:.*\blayers\.2\..*"),
    "fp8": (None, "model.layers.2.self_attn.q_proj"),
}
"""{format: (KV cache, an entry of its list)}."""


@pytest.mark.parametrize("name", FORMATS)
def test_a_draft_model_builds_its_linears_as_they_are_stored(name: str, source: Path, tmp_path: Path) -> None:
    prepared = job(source, tmp_path / "job", export={"format": name}, kv_cache=FORMATS[name][0])
    assert [f.code for f in prepared.findings] == []
    section = json.loads(prepared.plan.files["config.json"])["quantization_config"]
    entries = section.get("ignore", section.get("modules_to_not_convert"))
    assert {FORMATS[name][1], "lm_head"} <= set(entries)
    folder = Path(shutil.copytree(source, tmp_path / "edited"))
    (folder / "config.json").write_text(prepared.plan.files["config.json"])
    kept = ignoring(lambda entries: [e for e in entries if "layers.2" not in e and r"layers\.2" not in e])
    kept(folder)
    changed = {**prepared.plan.files, "config.json": (folder / "config.json").read_text()}
    changed.pop("hf_quant_config.json", None)
    findings = [f for f in validate_plan(replace(prepared.plan, files=changed), prepared.scope) if not f.code.startswith("config.")]
    assert {(f.code, f.severity) for f in findings} == {("layout.draft-not-excluded", "warning")}
    assert sum(f.count for f in findings) == 8


def test_a_pattern_for_all_layers_leaves_it_alone(source: Path, tmp_path: Path) -> None:
    """`model.layers.*` names it, and is about the layers of the model."""
    plan = job(source, tmp_path / "job").plan
    assert {d.action for d in plan.decisions if d.module.startswith("model.layers.2.")} == {"keep"}
    assert not [o for o in plan.observers if ".2." in o.module]
    assert plan.layer_count == 2


def test_rotary_caches_of_old_files_are_carried_over(plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "copy"))
    put({f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(16) for i in range(2)})(folder)
    out = run(job(folder, tmp_path / "job"))
    assert json.loads((out / "ckptq.json").read_text())["carried"] == [
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2)
    ]
    assert examine(out, source=folder).findings == ()


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (rename("k_proj", "kk_proj", "model.layers.1.*k_proj.weight"), "model.layers.1.self_attn.k_proj.weight: missing"),
        (
            rename("input_layernorm", "inputnorm", "*.1.input_layernorm.*"),
            "layout.missing-tensor: model.layers.1.input_layernorm.weight",
        ),
        (put({"model.layers.1.extra.weight": torch.ones(4, 4)}), "layout.unknown-tensor: model.layers.1.extra.weight"),
        (put({"medusa.0.weight": torch.ones(4, 4)}), "layout.unknown-tensor: medusa.0.weight"),
    ],
    ids=["a linear misspelled", "a norm misspelled", "a linear more", "a head that nobody knows"],
)
def test_a_misspelled_name_is_still_an_error(edit: Edit, problem: str, source: Path, tmp_path: Path) -> None:
    scope = as_yaml(propose(source, read_inventory(source).main))
    folder = Path(shutil.copytree(source, tmp_path / "copy"))
    edit(folder)
    with pytest.raises((SourceError, DataError)) as refused:
        run(job(folder, tmp_path / "job", scope))
    assert problem in str(refused.value)
    assert not (tmp_path / "job/out").exists()


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3, which has a scope of ckptq's, with a head of a draft model and a layer after the last. Read only."""
    folder = tmp_path_factory.mktemp("shipped") / "qwen3"
    folder.mkdir()
    families()["qwen3"].make(folder)
    put({f"{at}input_layernorm.weight": torch.ones(64).bfloat16() for at in ("mtp.layers.0.", "model.layers.2.")})(folder)
    return folder


def test_a_family_that_is_shipped_is_refused_with_what_to_do(shipped: Path, tmp_path: Path) -> None:
    """vLLM's own classes raise at such names: tests/corpus/mutants_plain.py has both."""
    settings = [f"model={shipped}", f"output={tmp_path / 'out'}"]
    with pytest.raises(SourceError, match=r"2\.input_layernorm\.weight: stored, but config.json has num_hidden_layers 2") as layer:
        prepare(load_recipe("qwen3-fp8-dynamic", settings))
    assert "`ckptq inspect SRC` prints one" in str(layer.value.hint)
    heads = Path(shutil.copytree(shipped, tmp_path / "heads"))
    drop("model.layers.2.*")(heads)
    with pytest.raises(DataError, match=r"layout\.unknown-tensor: mtp\.layers\.0\.input_layernorm") as head:
        run(prepare(load_recipe("qwen3-fp8-dynamic", [f"model={heads}", *settings[1:]])))
    assert "under `skipped`: `ckptq inspect SRC` prints that scope" in str(head.value)


def test_the_scope_that_inspect_prints_for_it_carries_them_over(shipped: Path, tmp_path: Path) -> None:
    proposal = inspect_data(read_inventory(shipped), None)["proposal"]
    assert "skipped: [model.layers.2., mtp.]" in proposal
    out = run(job(shipped, tmp_path / "job", proposal))
    carried = ["model.layers.2.input_layernorm.weight", "mtp.layers.0.input_layernorm.weight"]
    assert json.loads((out / "ckptq.json").read_text())["carried"] == carried


def test_nothing_is_printed_for_a_family_that_has_no_such_tensors(example_model: Path) -> None:
    assert inspect_data(read_inventory(example_model), None)["proposal"] is None
