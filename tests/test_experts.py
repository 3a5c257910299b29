"""Routed experts: found and fused as the server does it, calibrated together, counted, read where files hold them together."""

import dataclasses
import json
import random
import re
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from corpus.edit_files import config
from families import families
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ckptq.calibrate import calibrate
from ckptq.calibration import load_samples
from ckptq.calibration.encode import Encoder
from ckptq.checkpoint import Component, Inventory, Reader, SourceTensor, TensorSpec, read_inventory
from ckptq.console import Console
from ckptq.convert import Prepared, convert, prepare
from ckptq.cost import IMPORTS, TURNED, TURNING, fitting, waiting_budget
from ckptq.errors import CkptqError, RecipeError, SourceError, UnsupportedError
from ckptq.exporters import find_exporter
from ckptq.journal import ProgressFile
from ckptq.plan import Encode, Plan, Scale
from ckptq.planner import build_plan
from ckptq.quantized import dense
from ckptq.recipe import Recipe, load_recipe
from ckptq.routing import idle, unreached, warning
from ckptq.scopes import find_scope
from ckptq.scopes.qwen3_vl_moe import SCOPE as TOGETHER
from ckptq.streamed import StreamedModel
from ckptq.tensors import raw
from ckptq.threads import threads
from ckptq.transpose import BLOCK, CHUNK
from ckptq.unstack import unstack
from ckptq.validate import examine, validate_plan
from ckptq.validators.vllm_rules import parameters

EXPERTS, LAYERS = 4, 3
CONFIG: Mapping[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": LAYERS, "hidden_size": 64, "intermediate_size": 160,
    "moe_intermediate_size": 48, "num_experts": EXPERTS, "num_experts_per_tok": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512, "mlp_only_layers": [1], "decoder_sparse_step": 1,
}  # fmt: skip
AT = "model.layers.0.mlp.experts"


# What is planned


@cache
def headers() -> Component:
    """A Qwen3-MoE by its headers, the layer in the middle dense."""
    scope = find_scope(CONFIG)
    specs = [TensorSpec(p.name, "BF16", tuple(n or 1 for n in p.shape)) for p in parameters(scope, CONFIG, ())]
    tensors = {spec.name: SourceTensor(spec, "model.safetensors", i << 20) for i, spec in enumerate(specs)}
    text = json.dumps(dict(CONFIG), indent=2)
    return Component("", text, MappingProxyType(CONFIG), MappingProxyType(tensors), ("model.safetensors",), (), ())


def planned(component: Component | None = None, scheme: str = "fp8", format: str = "modelopt", **changes: Any) -> Plan:
    asked = {"quantize": [{"modules": "model.layers.*", "scheme": scheme}], "keep": ["lm_head"], "export": {"format": format}}
    recipe = Recipe.model_validate({**asked, **changes})
    component = component or headers()
    return build_plan(recipe, component, find_scope(component.config), find_exporter(format))


def excluded(plan: Plan) -> list[str]:
    section = json.loads(plan.files["config.json"])["quantization_config"]
    return list(section.get("ignore", section.get("modules_to_not_convert")))


def test_an_expert_is_quantized_like_any_linear_but_for_the_scale_of_its_input() -> None:
    plan = planned(kv_cache="fp8")
    scales = {op.output.name: [o.name for o in op.amax] for op in plan.ops if isinstance(op, Scale)}
    for expert in map(str, range(EXPERTS)):
        gate, up, down = (f"{AT}.{expert}.{part}_proj" for part in ("gate", "up", "down"))
        assert scales[f"{gate}.weight_scale"] == scales[f"{up}.weight_scale"] == [f"{gate}.weight_amax", f"{up}.weight_amax"]
        assert scales[f"{down}.weight_scale"] == [f"{down}.weight_amax"]
        assert scales[f"{gate}.input_scale"] == scales[f"{up}.input_scale"] == [f"{AT}.0.gate_proj.input_amax"]
        assert scales[f"{down}.input_scale"] == [f"{AT}.0.down_proj.input_amax"]
    inputs = {o.module for o in plan.observers if o.kind == "input"}
    assert len(inputs) == LAYERS * 4, "of every layer q, o, and two of the MLP, with experts or without"
    coded = {op.source for op in plan.ops if isinstance(op, Encode)}
    assert len(coded) == LAYERS * 4 + 2 * 3 * EXPERTS + 3
    assert not any("mlp.gate." in name for name in coded)
    assert validate_plan(plan, find_scope(CONFIG)) == []


@pytest.mark.parametrize(
    ("format", "scheme"),
    [("modelopt", "fp8"), ("compressed-tensors", "fp8-dynamic"), ("compressed-tensors", "fp8"), ("fp8", "fp8-tensor")],
)
def test_routers_are_excluded_and_experts_are_not(format: str, scheme: str) -> None:
    """Any entry with "experts" in it would leave those of a layer unquantized, in vLLM's eyes."""
    plan = planned(scheme=scheme, format=format)
    assert {"model.layers.0.mlp.gate", "model.layers.2.mlp.gate", "lm_head"} <= {*excluded(plan)}
    assert not any("expert" in entry for entry in excluded(plan))
    assert validate_plan(plan, find_scope(CONFIG)) == []


@pytest.mark.parametrize(("format", "scheme"), [("modelopt", "fp8"), ("compressed-tensors", "fp8-dynamic"), ("fp8", "fp8")])
def test_experts_that_stay(format: str, scheme: str) -> None:
    """All of a layer's or all of all; each entry names a layer, not every expert in it."""
    for keep, layers in (("*.mlp.experts.*", [0, 2]), ("model.layers.2.*", [2])):
        plan = planned(scheme=scheme, format=format, keep=["lm_head", keep])
        named = [entry for entry in excluded(plan) if "experts" in entry]
        assert [int(n) for entry in named for n in re.findall(r"layers\\?\.(\d+)", entry)] == layers
        assert not any(
            ".experts." in op.source for op in plan.ops if isinstance(op, Encode) and f"layers.{layers[-1]}." in op.source
        )
        assert validate_plan(plan, find_scope(CONFIG)) == []


def refused(kind: type[CkptqError], message: str, plan: Callable[[], object]) -> None:
    with pytest.raises(CkptqError, match=message) as caught:
        plan()
    assert type(caught.value) is kind


def test_what_the_server_can_not_build_is_refused() -> None:
    refused(RecipeError, "fuses all routed experts of a layer into mlp.experts", lambda: planned(keep=["lm_head", f"{AT}.3.*"]))
    refused(
        RecipeError,
        r"fuses .*2.gate_proj, .*2.up_proj into mlp.experts|fuses all",
        lambda: planned(keep=["lm_head", f"{AT}.2.up_proj"]),
    )
    for scheme in ("fp8-dynamic", "fp8-block"):
        kept = ["lm_head", "*.self_attn.*"]
        refused(RecipeError, f"scheme {scheme} for routed experts", lambda: planned(scheme=scheme, keep=kept))  # noqa: B023


def test_experts_and_config_must_agree() -> None:
    full = headers()

    def without(part: str) -> Component:
        return dataclasses.replace(full, tensors={n: t for n, t in full.tensors.items() if part not in n})

    refused(
        SourceError, "experts.3.up_proj.weight: missing; .* with 4 experts", lambda: planned(without("0.mlp.experts.3.up_proj"))
    )
    fewer = dataclasses.replace(full, config={**CONFIG, "num_experts": 3})
    refused(SourceError, r"experts.3.gate_proj.weight: stored, but config.json has num_experts 3", lambda: planned(fewer))
    dense = dataclasses.replace(without("layers.2.mlp.gate."), config={**CONFIG, "mlp_only_layers": [1, 2]})
    refused(SourceError, r"layers.2.mlp.gate_proj.weight: missing", lambda: planned(dense))


# What reaches them


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family's tiny Qwen3-MoE, one expert a token: eight tokens leave some of twelve experts without."""
    folder = tmp_path_factory.mktemp("experts") / "source"
    folder.mkdir()
    families()["qwen3_moe"].make(folder)
    config(lambda c: c.update(num_experts_per_tok=1))(folder)
    return folder


def job(source: Path, output: Path, *more: str) -> Prepared:
    short = ("calibration.samples=3", "calibration.sequence_length=8", f"model={source}", f"output={output}")
    text = f"calibration.files={Path(__file__).parent}/data/heldout.txt"
    return prepare(load_recipe("qwen3-moe-fp8", [text, *short, *more]))


def run(
    job: Prepared, state: Path, watch: Callable[[], None] = lambda: None, memory: int = 1 << 40, ahead: int = 1
) -> tuple[Any, Any]:
    """(amaxes of activations, tokens)."""
    recipe = job.recipe.calibration
    samples = load_samples(recipe)
    observers = [o for o in job.plan.observers if o.kind != "weight"]
    encoder = Encoder(job.source.root, None, recipe.sequence_length)
    tokens: dict[str, list[int]] = {}
    with Reader(job.source.root, job.inventory.main) as reader:
        streamed = StreamedModel(job.source.root, job.inventory.main, job.scope, reader, torch.device("cpu"), ahead=ahead)
        found = calibrate(
            streamed, observers, [s.name for s in samples], lambda n: encoder.encode(samples[n]), memory, ProgressFile(state, 0),
            Console(quiet=True), watch, all_experts=recipe.all_experts, tokens=tokens,
        )  # fmt: skip
    return {o.name: value for o, value in found.items()}, tokens


def seen(source: Path, job: Prepared) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """{module of the resident model: (what came in, experts chosen) of each sample}, by hooks of its own."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, experts_implementation="eager").eval()
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(lambda _, args, name=name: found.setdefault(name, []).append((args[0], args[1])))
    samples = load_samples(job.recipe.calibration)
    encoder = Encoder(source, None, job.recipe.calibration.sequence_length)
    with torch.inference_mode():
        for sample in samples:
            model(**encoder.encode(sample), use_cache=False)
    return found


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_tokens_are_counted_whatever_happens_meanwhile(source: Path, tmp_path: Path) -> None:
    """In one go, in waves of one sample, and taken up after each layer."""
    prepared = job(source, tmp_path / "out")
    found, tokens = run(prepared, tmp_path / "whole")
    chosen = {name: [index for _, index in calls] for name, calls in seen(source, prepared).items()}
    assert tokens == {n: torch.cat(found).flatten().bincount(minlength=12).tolist() for n, found in chosen.items()}
    assert set(tokens) == {"model.layers.0.mlp.experts", "model.layers.2.mlp.experts"}
    assert run(prepared, tmp_path / "waves", memory=1) == (found, tokens)
    steps = 0

    def stop() -> None:
        nonlocal steps
        steps += 1
        if steps % 4 == 0:
            raise InterruptedError

    for _ in range(40):
        try:
            assert run(prepared, tmp_path / "killed", stop, memory=1) == (found, tokens)
            break
        except InterruptedError:
            continue
    else:
        pytest.fail("it never came to an end")
    assert steps > 12


def test_one_layer_at_a_time_where_memory_is_short(source: Path, tmp_path: Path) -> None:
    prepared = job(source, tmp_path / "out")
    assert run(prepared, tmp_path / "one", ahead=0) == run(prepared, tmp_path / "two")
    two = dataclasses.replace(prepared.cost, layer=10**9)
    one = dataclasses.replace(two, ahead=0)
    assert two.fixed - one.fixed == 10**9
    assert two.least == one.fixed + two.sample
    for limit, chosen in ((two.fixed + two.sample, two), (two.fixed + two.sample - 1, one), (two.least, one), (two.least - 1, one)):
        assert fitting(two, limit, 0) == fitting(two, None, (limit - IMPORTS) * 5 // 4 + 1) == chosen
    assert waiting_budget(one, two.least, 0) == two.sample
    with pytest.raises(RecipeError, match="too little: embeddings, a decoder layer and one sample take"):
        waiting_budget(one, two.least - 1, 0)


def test_turning_experts_counts_a_thread(tmp_path: Path) -> None:
    """Where files hold them transposed, as Qwen3-VL-MoE's do, each thread has one matrix at a time, at most BLOCK of it."""
    (tmp_path / "model").mkdir()
    families()["qwen3_vl_moe"].make(tmp_path / "model")
    dynamic = prepare(load_recipe("qwen3vl-moe-fp8-dynamic", [f"model={tmp_path / 'model'}", f"output={tmp_path / 'out'}"])).cost
    assert dynamic.turned == 48 * 128 * 2 + CHUNK
    straight = dataclasses.replace(dynamic, turned=0)
    assert dynamic.peak - straight.peak == threads() * dynamic.turned
    assert (TURNED, TURNING) == (BLOCK, CHUNK)
    layer = dataclasses.replace(straight, samples=1, layer=10**9)
    assert dataclasses.replace(layer, turned=10**6).peak - layer.peak == 10**6
    assert dataclasses.replace(layer, turned=10**10).fixed - IMPORTS > threads() * 10**10


def test_experts_without_a_token_are_told(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    convert(job(source, output, "calibration.samples=1"), resume=False, device="cpu", memory=None, console=Console())
    told = json.loads((output / "ckptq.json").read_text())["experts"]
    missed = {name: [e for e, count in enumerate(counts) if not count] for name, counts in told["tokens"].items()}
    assert all(4 <= len(experts) < 12 for experts in missed.values())
    assert told["unreached"] == missed
    warned = next(line for line in capsys.readouterr().err.splitlines() if "routed experts" in line)
    assert f"no calibration token reached {sum(map(len, missed.values()))} of 24 routed experts" in warned
    assert "set calibration.all_experts: true" in warned
    stored = load_file(output / "model.safetensors")
    for name in missed:
        for part in ("gate", "up", "down"):
            values = {float(stored[f"{name}.{e}.{part}_proj.input_scale"]) for e in range(12)}
            assert len(values) == 1
            assert values != {1.0}


def test_words_on_experts_without_a_token() -> None:
    assert warning({"a.experts": [3, 1]}, all_experts=False) == ""
    few = {"a.experts": [0] * 10 + [5], "b.experts": [1, 0], "c.experts": [2, 2]}
    assert unreached(few) == {"a.experts": list(range(10)), "b.experts": [1]}
    told = warning(few, all_experts=False)
    assert (
        "no calibration token reached 11 of 15 routed experts (a.experts: 0, 1, 2, 3, 4, 5, 6, 7 and 2 more; and in 1 more layer)"
        in told
    )
    assert warning(few, all_experts=True) == ""
    assert idle([TOGETHER]) == ""
    assert "does nothing" in idle([dataclasses.replace(TOGETHER, experts=None)])


def test_every_expert_can_see_every_token(source: Path, tmp_path: Path) -> None:
    """The amaxes of all inputs of all experts, computed one by one; what flows on stays as it is."""
    chosen, tokens = run(job(source, tmp_path / "out"), tmp_path / "chosen")
    every, counted = run(job(source, tmp_path / "out", "calibration.all_experts=true"), tmp_path / "all")
    assert counted == tokens, "what the router chose"
    stored = load_file(source / "model.safetensors")
    for name, calls in seen(source, job(source, tmp_path / "out")).items():
        largest = 0.0
        for hidden, _ in calls:
            for e in range(12):
                gate, up = (torch.nn.functional.linear(hidden, stored[f"{name}.{e}.{part}_proj.weight"]) for part in ("gate", "up"))
                largest = max(largest, float((torch.nn.functional.silu(gate) * up).abs().max()))
        assert every[f"{name}.0.down_proj.input_amax"] == pytest.approx(largest, rel=2**-7)
        assert every[f"{name}.0.down_proj.input_amax"] >= chosen[f"{name}.0.down_proj.input_amax"]
    assert any(every[n] > chosen[n] for n in every)
    assert {n for n in every if every[n] != chosen[n]} <= {n for n in every if ".experts.0.down_proj." in n}


def test_experts_that_can_not_be_observed_are_no_silent_one(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = StreamedModel.__init__

    def grouped(self: StreamedModel, *args: Any, **options: Any) -> None:
        built(self, *args, **options)
        self.model.set_experts_implementation("grouped_mm")

    monkeypatch.setattr(StreamedModel, "__init__", grouped)
    with pytest.raises(UnsupportedError, match="Qwen3MoeExperts of transformers multiplies in a way"):
        run(job(source, tmp_path / "out"), tmp_path / "state")


# Those that lie together

E, HIDDEN = 3, 8


def together(folder: Path, moe: int, *, transposed: bool, dtype: torch.dtype = torch.bfloat16) -> tuple[Inventory, dict[str, Any]]:
    """(the checkpoint seen one by one, what its matrices should be)."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(moe)
    gate_up = torch.randn(E, 2 * moe, HIDDEN, generator=generator).to(dtype)
    down = torch.randn(E, HIDDEN, moe, generator=generator).to(dtype)
    at = "model.language_model.layers.0.mlp.experts"
    wanted = {}
    for e in range(E):
        wanted |= {f"{at}.{e}.gate_proj.weight": gate_up[e, :moe], f"{at}.{e}.up_proj.weight": gate_up[e, moe:]}
        wanted[f"{at}.{e}.down_proj.weight"] = down[e]
    stored = {f"{at}.gate_up_proj": gate_up, f"{at}.down_proj": down}
    if transposed:
        stored = {name: tensor.transpose(1, 2).contiguous() for name, tensor in stored.items()}
    save_file({**stored, "lm_head.weight": torch.randn(5, HIDDEN)}, folder / "model.safetensors")
    text = {"num_hidden_layers": 1, "hidden_size": HIDDEN, "moe_intermediate_size": moe, "num_experts": E}
    (folder / "config.json").write_text(json.dumps({"architectures": list(TOGETHER.architectures), "text_config": text}))
    return unstack(read_inventory(folder), TOGETHER), wanted


@pytest.mark.parametrize("transposed", [True, False], ids=["as on the hub", "as transformers saves it"])
@pytest.mark.parametrize(
    ("moe", "dtype"), [(5, torch.bfloat16), (4, torch.float16), (8, torch.float32)], ids=["odd", "square up", "square down"]
)
def test_experts_of_one_tensor_are_read_one_by_one(tmp_path: Path, moe: int, dtype: torch.dtype, transposed: bool) -> None:
    inventory, wanted = together(tmp_path / "source", moe, transposed=transposed, dtype=dtype)
    assert set(inventory.main.tensors) == {*wanted, "lm_head.weight"}
    rng = random.Random(moe)
    with Reader(inventory.root, inventory.main) as reader:
        for name, matrix in wanted.items():
            tensor, whole = inventory.main.tensors[name], raw(matrix.contiguous())
            assert tensor.spec.shape == tuple(matrix.shape)
            assert tensor.as_stored == (not transposed)
            for start, stop in ((0, len(whole)), *(sorted(rng.sample(range(len(whole) + 1), 2)) for _ in range(8))):
                buffer = bytearray(stop - start)
                reader.read_into(tensor, start, memoryview(buffer))
                assert buffer == whole[start:stop], (name, start, stop)


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 700), st.integers(1, 700), st.integers(0, 300), st.integers(0, 2**32))
def test_a_transposed_matrix_larger_than_the_buffers(
    tmp_path_factory: pytest.TempPathFactory, n: int, k: int, more: int, at: int
) -> None:
    """A matrix cut out of a wider one, read through buffers made smaller, at any place."""
    folder = tmp_path_factory.mktemp("wide")
    stored = torch.randint(-(2**15), 2**15, (k, n + more), dtype=torch.int16).view(torch.bfloat16)
    save_file({"a": stored}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    component = read_inventory(folder).main
    spec = TensorSpec("b", "BF16", (n, k))
    left = at % (more + 1)
    turned = SourceTensor(spec, "model.safetensors", component.tensors["a"].offset + 2 * left, None, n + more)
    wanted = raw(torch.empty(n, k, dtype=stored.dtype).copy_(stored[:, left : left + n].T))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ckptq.transpose.BLOCK", 1 << 14)
        patch.setattr("ckptq.transpose.CHUNK", 1 << 12)
        with Reader(folder, dataclasses.replace(component, tensors=MappingProxyType({"b": turned}))) as reader:
            start = at % len(wanted)
            buffer = bytearray(min(at % 100_000 + 1, len(wanted) - start))
            reader.read_into(turned, start, memoryview(buffer))
    assert buffer == wanted[start : start + len(buffer)]
    assert CHUNK < BLOCK


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Inventory:
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors")
    return unstack(read_inventory(folder), TOGETHER)


def test_what_holds_no_experts_is_refused(tmp_path: Path) -> None:
    at = "model.language_model.layers.0.mlp.experts"
    faults: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
        "flat": (lambda s: s.update({f"{at}.down_proj": s[f"{at}.down_proj"][0]}), r"expected experts in \[E, n, k\], 8 wide"),
        "of another width": (lambda s: s.update({f"{at}.down_proj": torch.zeros(3, 5, 9)}), "8 wide, found"),
        "one way and the other": (
            lambda s: s.update({f"{at}.down_proj": s[f"{at}.down_proj"].transpose(1, 2).contiguous()}), "neither all",
        ),
        "odd rows": (lambda s: s.update({f"{at}.gate_up_proj": torch.zeros(3, 8, 11)}), "expected rows for 2 linears, found 11"),
        "twice": (lambda s: s.update({f"{at}.0.down_proj.weight": torch.zeros(8, 5)}), "both together and one by one"),
        "FP8": (lambda s: s.update({f"{at}.down_proj": s[f"{at}.down_proj"].to(torch.float8_e4m3fn)}), "must be BF16, F16 or F32"),
    }  # fmt: skip
    together(tmp_path / "good", 5, transposed=True)
    for i, (change, message) in enumerate(faults.values()):
        folder = Path(shutil.copytree(tmp_path / "good", tmp_path / f"bad{i}"))
        with pytest.raises(CkptqError, match=message):
            changed(folder, change)


def test_codes_of_experts_that_lie_together_are_not_taken_for_their_values(tmp_path: Path) -> None:
    """--from-fp8 sees a tensor called *.weight in BF16, whose bytes are no such."""
    experts = TOGETHER.experts
    assert experts is not None
    scope = dataclasses.replace(
        TOGETHER, experts=dataclasses.replace(experts, stored=tuple(f"{name}.weight" for name in experts.stored))
    )
    at = "model.language_model.layers.0.mlp.experts"
    tensors = {f"{at}.gate_up_proj.weight": torch.zeros(E, HIDDEN, 10), f"{at}.down_proj.weight": torch.zeros(E, 5, HIDDEN)}
    scales = {f"{name}_scale": torch.ones(1) for name in tensors}
    together(tmp_path / "model", 5, transposed=True)
    save_file({n: t.to(torch.float8_e4m3fn) for n, t in tensors.items()} | scales, tmp_path / "model" / "model.safetensors")
    config(lambda c: c.update(quantization_config={"quant_method": "modelopt", "quant_algo": "FP8"}))(tmp_path / "model")
    with pytest.raises(UnsupportedError, match="F8_E4M3: experts that are stored together must be"):
        unstack(dense(read_inventory(tmp_path / "model")), scope)


def test_a_quantized_checkpoint_with_experts_together_is_not_judged(tmp_path: Path) -> None:
    together(tmp_path / "model", 5, transposed=True)
    config(lambda c: c.update(quantization_config={"quant_method": "modelopt", "quant_algo": "FP8"}))(tmp_path / "model")
    with pytest.raises(
        UnsupportedError, match=r"experts.(gate_up|down)_proj: routed experts that are stored together can't be checked"
    ):
        examine(tmp_path / "model")


def test_more_experts_than_anybody_has(tmp_path: Path) -> None:
    inventory = read_inventory(together(tmp_path / "model", 5, transposed=True)[0].root)
    at = "model.language_model.layers.{}.mlp.experts.{}"
    shapes = {"gate_up_proj": (4096, 8, 10), "down_proj": (4096, 5, 8)}
    specs = [TensorSpec(at.format(i, part), "BF16", shape) for i in range(40) for part, shape in shapes.items()]
    many = {spec.name: SourceTensor(spec, "model.safetensors", 0) for spec in specs}
    hostile = dataclasses.replace(inventory, components=(dataclasses.replace(inventory.main, tensors=many),))
    with pytest.raises(SourceError, match="expected the linears of 65536 experts at most, found 491520 in 80 tensors"):
        unstack(hostile, TOGETHER)


def test_experts_that_stay_are_written_one_by_one(tmp_path: Path) -> None:
    """Of a source that holds them together: copied through the view, and equal to it for the validator."""
    folder = tmp_path / "source"
    folder.mkdir()
    families()["qwen3_vl_moe"].make(folder)
    keep = 'keep=["model.visual*","lm_head","*.mlp.gate","model.language_model.layers.1.mlp.experts"]'
    recipe = load_recipe("qwen3vl-moe-fp8-dynamic", [keep, f"model={folder}", f"output={tmp_path / 'out'}"])
    report = convert(prepare(recipe), resume=False, device="cpu", memory=None, console=Console(quiet=True))
    assert report.findings == ()
    stored, written = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    at = "model.language_model.layers.1.mlp.experts"
    for e in range(12):
        gate, up = stored[f"{at}.gate_up_proj"][e].T.chunk(2)
        for part, wanted in (("gate", gate), ("up", up), ("down", stored[f"{at}.down_proj"][e].T)):
            assert torch.equal(written[f"{at}.{e}.{part}_proj.weight"], wanted)
