"""compare on a tiny checkpoint of every architecture, against resident models that share no code with it: transformers' own, one
that computes as a server does by plain hooks, and ModelOpt's fake-quantized one.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import unscoped
from corpus.edit import Edit, Tensors, alter, both, drop, edit_json, rename, tensors, times
from corpus.edit_files import config
from families import ROOT, families
from peers.resident import load
from peers.resident_served import Cache, dense_folder, read, serve
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ckptq.calibration import Sample, load_samples
from ckptq.calibration.encode import Encoder
from ckptq.checkpoint import read_inventory
from ckptq.compare.behavior import Behavior, measure_behavior
from ckptq.compare.spans import judged
from ckptq.console import Console
from ckptq.convert import convert, prepare
from ckptq.errors import CalibrationError, CkptqError, UnsupportedError
from ckptq.proposals import as_yaml, propose
from ckptq.recipe import load_recipe
from ckptq.scopes import Scope

FAMILIES = families()
PEERS = ("llama", "qwen3_moe", "qwen2_5_vl")
"""Of a plain model, of routed experts, of images."""
CHAT = Sample("chat", "The cat sat on the mat.", "What did the cat do?")
Made = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def source(place: Path) -> Made:
    """source(family) -> its checkpoint."""

    @functools.cache
    def made(name: str) -> Path:
        folder = place / name / "source"
        folder.mkdir(parents=True)
        FAMILIES[name].make(folder)
        return folder

    return made


@pytest.fixture(scope="module")
def converted(place: Path, source: Made) -> Callable[[str, str], Path]:
    """converted(family, recipe) -> the output."""

    @functools.cache
    def made(name: str, recipe: str) -> Path:
        job = load_recipe(recipe, FAMILIES[name].settings(recipe, source(name), place / name / recipe))
        convert(prepare(job), resume=False, device="cpu", memory=None, console=Console(quiet=True))
        return place / name / recipe

    return made


@pytest.fixture(scope="module")
def fake_quantized(place: Path, source: Made, request: pytest.FixtureRequest) -> Iterator[Made]:
    """fake_quantized(family) -> the file of ModelOpt's log probabilities. They are computed while other tests run."""
    place = place / "modelopt"
    place.mkdir()
    chosen = [
        i.callspec.params["name"] for i in request.session.items if i.path == request.path and "fake_quantized" in i.fixturenames
    ]
    jobs = [
        {
            "family": name,
            "source": str(source(name)),
            "settings": FAMILIES[name].settings(FAMILIES[name].recipes[0], source(name), place / name),
            "output": str(place / f"{name}.safetensors"),
        }
        for name in chosen
    ]
    (place / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "peers.fake_quantized", "--jobs", str(place / "jobs.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "tests")}
    with (place / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def made(name: str) -> Path:
        process.wait()
        assert (place / f"{name}.safetensors").exists(), (place / "log").read_text()[-4000:]
        return place / f"{name}.safetensors"

    yield made
    process.kill()
    process.wait()


def samples_of(name: str) -> list[Sample]:
    """Those that the family is calibrated on: text, images, audio."""
    recipe = FAMILIES[name].recipes[0]
    return load_samples(load_recipe(recipe, FAMILIES[name].settings(recipe, ROOT, ROOT)).calibration)


def length(name: str) -> int:
    """Tokens of a sample, at most."""
    return int(FAMILIES[name].calibration["sequence_length"])


def measure(name: str, reference: Path, candidate: Path, samples: Sequence[Sample], scope: Scope | None = None) -> Behavior:
    return measure_behavior(
        reference,
        candidate,
        samples,
        sequence_length=length(name),
        max_pixels=None,
        device=torch.device("cpu"),
        memory=10**9,
        console=Console(quiet=True),
        scope=scope,
    )


class Resident:
    """The log probabilities of a whole model in memory, at the judged tokens of samples."""

    def __init__(self, model: Any, encoder: Encoder, samples: Sequence[Sample], stored: Any = None) -> None:
        model.set_experts_implementation("eager")
        self.casts = serve(model, stored) if stored else 0
        self.scored: list[torch.Tensor] = []
        self.came: list[torch.Tensor] = []
        with torch.inference_mode():
            for sample in samples:
                inputs = encoder.encode(sample)
                span = judged(sample, inputs, encoder)
                cache = {"past_key_values": Cache(stored), "use_cache": True} if stored else {"use_cache": False}
                logits = model(**inputs, **cache).logits[0, span.start - 1 : span.stop - 1]
                self.scored.append(torch.log_softmax(logits.float(), -1))
                self.came.append(inputs["input_ids"][0, span.start : span.stop])

    def nll(self) -> torch.Tensor:
        return torch.cat([-s.gather(1, ids[:, None])[:, 0] for s, ids in zip(self.scored, self.came, strict=True)])

    def kl_to(self, other: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(self.scored, other, strict=True)])


def resident(name: str, folder: Path, samples: Sequence[Sample], stored: Any = None) -> Resident:
    model = (FAMILIES[name].resident or load)(folder)
    return Resident(model, Encoder(folder, None, length(name)), samples, stored)


def apart(ours: Sequence[float] | torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative L2."""
    return float((torch.as_tensor(ours).double() - theirs.double()).norm() / theirs.double().norm())


@pytest.mark.parametrize("name", FAMILIES)
def test_losses_are_those_of_resident_models(
    name: str, source: Made, converted: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """Of the reference as transformers runs it, of candidates as a server does; token by token, where the model has been moved."""
    at = source(name)
    samples = [*samples_of(name)[: 4 if "omni" in name else 2], CHAT]
    plain = resident(name, at, samples)
    same = measure(name, at, at, samples)
    assert max(same.kl) == 0
    assert same.entering.relative_l2 == max(layer.hidden.relative_l2 for layer in same.layers) == 0
    assert all(error == 0 for layer in same.layers for error in layer.modules.values())
    for recipe in FAMILIES[name].recipes:
        folder = converted(name, recipe)
        found = measure(name, at, folder, samples)
        assert found.nll_reference == pytest.approx(plain.nll().tolist(), abs=2e-3)
        stored = read(folder)
        served = resident(name, dense_folder(at, stored, tmp_path / recipe), samples, stored)
        assert served.casts
        moved = torch.tensor(found.nll_candidate) - torch.tensor(found.nll_reference)
        assert apart(moved, served.nll() - plain.nll()) < 1e-3
        assert apart(found.kl, plain.kl_to(served.scored)) < 1e-3


@pytest.mark.parametrize("name", PEERS)
def test_candidates_are_modelopts_fake_quantized_models(
    name: str, source: Made, converted: Callable[[str, str], Path], fake_quantized: Made
) -> None:
    """Which has the same amaxes, and rounds to codes in another way than servers do: by a product with the scale's reciprocal."""
    at, recipe = source(name), FAMILIES[name].recipes[0]
    samples = samples_of(name)
    found = measure(name, at, converted(name, recipe), samples)
    encoder, theirs = Encoder(at, None, length(name)), load_file(fake_quantized(name))
    plain = resident(name, at, samples)
    spans = [judged(sample, encoder.encode(sample), encoder) for sample in samples]
    scored = [theirs[str(number)][span.start - 1 : span.stop - 1] for number, span in enumerate(spans)]
    theirs_kl = plain.kl_to(scored)
    assert sum(found.kl) == pytest.approx(float(theirs_kl.sum()), rel=0.05)
    assert apart(found.kl, theirs_kl) < (0.3 if "moe" in name else 0.03)  # experts that are chosen by a hair


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("llama", "*.k_proj.input_scale"),
        ("mixtral", "*.experts.3.w?.input_scale"),
        ("llama", "*.k_proj.weight_scale"),
        ("qwen3_moe", "*.experts.?.up_proj.weight_scale"),
    ],
)
def test_the_largest_scale_counts(
    name: str, scale: str, source: Made, converted: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """Of the shards that a server fuses, and of inputs of all experts of a layer, whichever it stands beside."""
    folder = Path(shutil.copytree(converted(name, FAMILIES[name].recipes[0]), tmp_path / "other"))
    alter(times(5), scale)(folder)
    found = measure(name, source(name), folder, [CHAT])
    stored = read(folder)
    served = resident(name, dense_folder(source(name), stored, tmp_path / "dense"), [CHAT], stored)
    assert apart(found.nll_candidate, served.nll()) < 1e-5
    before = measure(name, source(name), converted(name, FAMILIES[name].recipes[0]), [CHAT])
    assert apart(before.nll_candidate, served.nll()) > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("text", "prompt"),
    [(CHAT.text, CHAT.prompt), ("end", "end"), (" A man rides a wave.\n", "Describe the image."), ("Yes", "Yes or no? Yes")],
)
def test_an_answer_is_judged_in_every_familys_template(name: str, text: str, prompt: str, source: Made) -> None:
    """With what ends it, and nothing of the prompt, though it says the same and the template trims what it gets."""
    encoder, sample = Encoder(source(name), None, 512), Sample("s", text, prompt)
    inputs = encoder.encode(sample)
    ids, span = inputs["input_ids"][0].tolist(), judged(sample, inputs, encoder)
    said, end = encoder.text(ids[span.start : span.stop - 1]), encoder.text(ids[span.stop - 1 : span.stop])
    assert said.strip() == text.strip()
    assert end.strip() in ("<|im_end|>", "")
    assert encoder.text(ids[: span.start]).rstrip(" ").endswith(("assistant\n", "model\n", "ASSISTANT:"))
    for cut in range(span.start + 1, len(ids)):  # as sequence_length would
        kept = {key: tensor[:, :cut] for key, tensor in inputs.items()}
        assert judged(sample, kept, encoder) == range(span.start, min(span.stop, cut))
    with pytest.raises(CalibrationError, match="its answer begins after the"):
        judged(sample, {"input_ids": inputs["input_ids"][:, : span.start]}, encoder)


AFTER = {"gemma3_text": {"final_logit_softcapping": 3.0}, "granite": {"logits_scaling": 4.0}, "starcoder2": {}, "olmo2": {}}
"""What is done to logits, by architecture. But for the first they have no scope of ckptq's: a recipe spells one out."""


@pytest.mark.parametrize("name", AFTER)
def test_scopes_that_recipes_spell_out_and_what_is_done_to_logits(name: str, tmp_path: Path) -> None:
    """The source has no ckptq.json, and is read with the scope that its candidate's has."""
    folder, out = tmp_path / name, tmp_path / "out"
    if name in FAMILIES:
        folder.mkdir()
        FAMILIES[name].make(folder)
        job = load_recipe(FAMILIES[name].recipes[0], FAMILIES[name].settings(FAMILIES[name].recipes[0], folder, out))
    else:
        scope = as_yaml(propose(unscoped.make(name, folder), read_inventory(folder).main))
        job = load_recipe(str(unscoped.recipe(tmp_path / "recipe.yaml", folder, out, scope)))
    edit_json(folder / "config.json", lambda config: config.update(AFTER[name]))
    convert(prepare(job), resume=False, device="cpu", memory=None, console=Console(quiet=True))
    samples = load_samples(job.calibration)[:2]
    found = measure("gemma3_text", folder, out, samples)
    stored, model = read(out), AutoModelForCausalLM.from_pretrained
    encoder = Encoder(folder, None, 64)
    plain = Resident(model(folder, dtype=torch.bfloat16), encoder, samples)
    dense = dense_folder(folder, stored, tmp_path / "dense")
    served = Resident(model(dense, dtype=torch.bfloat16), encoder, samples, stored)
    assert found.nll_reference == pytest.approx(plain.nll().tolist(), abs=0.02)
    assert found.nll_candidate == pytest.approx(served.nll().tolist(), abs=0.02)
    if name not in FAMILIES:
        with pytest.raises(UnsupportedError, match="no scope for architectures") as unknown:
            measure("gemma3_text", folder, folder, samples)
        assert "give --recipe FILE with a `scope:`" in str(unknown.value.hint)
        assert max(measure("gemma3_text", folder, folder, samples[:1], job.scope).kl) == 0


def resized(stored: Tensors) -> None:
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        stored[name] = stored[name][:4000].contiguous()


def narrowed(stored: Tensors) -> None:
    for name in [name for name in stored if ".mlp." in name]:
        stored[name] = stored[name][..., :144] if "down_proj.w" in name else stored[name] if "down" in name else stored[name][:144]


UNLIKE: dict[str, tuple[Edit, str]] = {
    "vocabulary": (
        both(tensors(resized), config(lambda c: c.update(vocab_size=4000))),
        "differ in their vocabulary: 4096 and 4000",
    ),
    "widths": (
        both(tensors(narrowed), config(lambda c: c.update(intermediate_size=144))),
        r"differ in the shape of model.layers.0.mlp.gate_proj.weight: \[160, 128\] and \[144, 128\]",
    ),
    "no layer": (drop("*.layers.1.*"), "there: model.layers.1.input_layernorm.weight: no tensor of the checkpoint fills it"),
    "no head": (drop("lm_head.weight"), "there: lm_head.weight is not stored, so there are no logits"),
    "GPTQ": (
        config(lambda c: c.update(quantization_config={"quant_method": "gptq", "bits": 4})),
        "there: config.json says quant_method 'gptq'; it is GPTQ's: .*: ckptq does not decode that",
    ),
    "codes without scales": (
        both(tensors(lambda t: t.update({n: v.to(torch.float8_e4m3fn) for n, v in t.items() if "o_proj.weight" in n}))),
        "there: config.json: quantization_config: expected a section with quant_method",
    ),
}


@pytest.mark.parametrize("what", UNLIKE)
def test_what_cannot_be_compared_is_told(what: str, source: Made, tmp_path: Path) -> None:
    edit, said = UNLIKE[what]
    edit(folder := Path(shutil.copytree(source("llama"), tmp_path / "there")))
    with pytest.raises(CkptqError, match=said):
        measure("llama", source("llama"), folder, [CHAT])


def test_other_models_and_missing_tokenizers_are_told(source: Made, tmp_path: Path) -> None:
    with pytest.raises(CkptqError, match="differ in their architecture: llama and mistral"):
        measure("llama", source("llama"), source("mistral"), [CHAT])
    bare = Path(shutil.copytree(source("llama"), tmp_path / "bare", ignore=shutil.ignore_patterns("*token*", "vocab*", "merges*")))
    with pytest.raises(CkptqError, match=r"the tokenizer of .*bare can't be loaded"):
        measure("llama", bare, source("llama"), [CHAT])
    assert max(measure("llama", source("llama"), bare, [CHAT]).kl) == 0


def test_tied_and_stored_heads_are_one_model(source: Made, tmp_path: Path) -> None:
    """A server takes a head that is stored, tied or not."""
    folder = Path(shutil.copytree(source("qwen2"), tmp_path / "untied"))
    tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))(folder)
    assert max(measure("qwen2", source("qwen2"), folder, [CHAT]).kl) == 0
    config(lambda c: c.update(tie_word_embeddings=False))(folder)
    assert max(measure("qwen2", source("qwen2"), folder, [CHAT]).kl) == 0
    alter(times(2), "lm_head.weight")(folder)
    assert min(measure("qwen2", source("qwen2"), folder, [CHAT]).kl) > 0


@pytest.mark.parametrize("name", PEERS)
def test_two_candidates_are_each_what_they_are_beside_the_source(
    name: str, source: Made, converted: Callable[[str, str], Path]
) -> None:
    """Both with their own casts, K and V among them."""
    static, dynamic = (converted(name, recipe) for recipe in FAMILIES[name].recipes[:2])
    samples = samples_of(name)[:1]
    first, second = (measure(name, source(name), folder, samples) for folder in (static, dynamic))
    both = measure(name, static, dynamic, samples)
    assert (both.nll_reference, both.nll_candidate) == (first.nll_candidate, second.nll_candidate)
    assert max(measure(name, static, static, samples).kl) == 0


def test_names_of_another_generation_are_the_same_model(source: Made, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source("gemma3"), tmp_path / "newer"))
    rename("language_model.model.", "model.language_model.", "language_model.model.*")(folder)
    rename("vision_tower.", "model.vision_tower.", "vision_tower.*")(folder)
    found = measure("gemma3", source("gemma3"), folder, samples_of("gemma3")[:1])
    assert max(found.kl) == found.entering.relative_l2 == 0


def test_templates_without_the_answer_and_none_are_told(source: Made, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source("llama"), tmp_path / "odd"))
    edit_json(folder / "tokenizer_config.json", lambda c: c.update(chat_template="{{ messages[0]['content'] }}"))
    with pytest.raises(CalibrationError, match="chat: the checkpoint's chat template leaves the answer out"):
        measure("llama", folder, source("llama"), [CHAT])
    edit_json(folder / "tokenizer_config.json", lambda c: c.pop("chat_template"))
    with pytest.raises(CalibrationError, match="has no chat template, and samples with a prompt or an image need one"):
        measure("llama", folder, source("llama"), [CHAT])
    assert (
        len(measure("llama", folder, source("llama"), [Sample("plain", CHAT.text)]).kl)
        == len(Encoder(folder, None, 64).tokens(CHAT.text)) - 1
    )


def test_a_tokenizer_that_tells_no_places(source: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those without Rust are: the answer's own ids are looked for."""
    encoder = Encoder(source("llama"), None, 64)
    inputs = encoder.encode(CHAT)
    wanted = judged(CHAT, inputs, encoder)
    monkeypatch.setattr(encoder, "places", lambda text: None)
    assert judged(CHAT, inputs, encoder) == wanted
