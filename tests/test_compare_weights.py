"""`ckptq compare`'s figures of weights: against NumPy in float64 for every format, and what a planted fault looks like."""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from make_coded import make_coded
from make_fp8 import copy_others
from safetensors.torch import load_file, save_file

from ckptq.checkpoint import Reader, read_inventory
from ckptq.compare import held, weights
from ckptq.compare.matched import Matched, Unmatched, match
from ckptq.compare.metrics import Sums, extreme, sums
from ckptq.compare.weights import WeightError, figures, weight_errors, worst_first
from ckptq.errors import SourceError
from ckptq.quantized import dense_if_fp8
from ckptq.tensors import TORCH_DTYPES, raw

Tensors = dict[str, torch.Tensor]
Array = np.ndarray[Any, Any]
LINEAR = "model.layers.0.self_attn.o_proj"
CONFIG: Mapping[str, Any] = {"architectures": ["NobodyKnowsThis"]}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


# --- codes and scales of any values, and what they stand for, by the definitions ---

Stored = tuple[Tensors, Array]
"""({leaf: tensor} of a linear, float64 [n, k])."""
Encode = Callable[[torch.Generator, int, int], Stored]


def e4m3(random: torch.Generator, *shape: int) -> torch.Tensor:
    codes = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
    return torch.where((codes & 0x7F) == 0x7F, torch.zeros_like(codes), codes).view(torch.float8_e4m3fn)


def positive(random: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=random) * 0.01 + 1e-4


def over(codes: Array, scale: Array, high: int, wide: int) -> Array:
    n, k = codes.shape
    return codes * np.repeat(np.repeat(scale, high, 0), wide, 1)[:n, :k]  # type: ignore[no-any-return]


def by_tensor(random: torch.Generator, n: int, k: int) -> Stored:
    codes, scale = e4m3(random, n, k), positive(random)
    return {"weight": codes, "weight_scale": scale}, codes.double().numpy() * float(scale)


def by_channel(random: torch.Generator, n: int, k: int) -> Stored:
    codes, scale = e4m3(random, n, k), positive(random, n, 1).bfloat16()
    return {"weight": codes, "weight_scale": scale}, over(codes.double().numpy(), scale.double().numpy(), 1, k)


def by_block(random: torch.Generator, n: int, k: int) -> Stored:
    codes, scale = e4m3(random, n, k), positive(random, -(-n // 128), -(-k // 128))
    return {"weight": codes, "weight_scale_inv": scale}, over(codes.double().numpy(), scale.double().numpy(), 128, 128)


def int8(random: torch.Generator, n: int, k: int) -> Stored:
    codes, scale = torch.randint(-128, 128, (n, k), generator=random, dtype=torch.int8), positive(random, n, 1)
    return {"weight": codes, "weight_scale": scale}, over(codes.double().numpy(), scale.double().numpy(), 1, k)


def mxfp8(random: torch.Generator, n: int, k: int) -> Stored:
    codes, scale = e4m3(random, n, k), torch.randint(100, 130, (n, k // 32), generator=random, dtype=torch.uint8)
    return {"weight": codes, "weight_scale": scale}, over(codes.double().numpy(), 2.0 ** (scale.double().numpy() - 127), 1, 32)


def packed(random: torch.Generator, n: int, k: int) -> tuple[torch.Tensor, Array]:
    codes = torch.randint(0, 256, (n, k // 2), generator=random, dtype=torch.uint8)
    return codes, E2M1[np.stack([codes.numpy() & 15, codes.numpy() >> 4], 2).reshape(n, k)]


def mxfp4(random: torch.Generator, n: int, k: int) -> Stored:
    codes, values = packed(random, n, k)
    scale = torch.randint(100, 130, (n, k // 32), generator=random, dtype=torch.uint8)
    return {"weight_packed": codes, "weight_scale": scale}, over(values, 2.0 ** (scale.double().numpy() - 127), 1, 32)


def nvfp4(random: torch.Generator, n: int, k: int) -> Stored:
    codes, values = packed(random, n, k)
    local, whole = e4m3(random, n, k // 16), positive(random)
    return {"weight": codes, "weight_scale": local, "weight_scale_2": whole}, over(
        values, local.double().numpy() * float(whole), 1, 16
    )


def nvfp4_divided(random: torch.Generator, n: int, k: int) -> Stored:
    codes, values = packed(random, n, k)
    local, divisor = e4m3(random, n, k // 16), 1 / positive(random, 1)
    stored = {"weight_packed": codes, "weight_scale": local, "weight_global_scale": divisor}
    return stored, over(values, local.double().numpy() / float(divisor), 1, 16)


def dual(random: torch.Generator, n: int, k: int) -> Stored:
    """vLLM-Omni's MXFP4 under two scales."""
    _, values = packed(random, n, k)
    fine, coarse = torch.randint(120, 128, (n, k // 32), generator=random, dtype=torch.uint8), positive(random, n, -(-k // 512), 1)
    stored = {"weight": torch.from_numpy(values).to(torch.float8_e4m3fn), "weight_scale": fine, "weight_dual_scale": coarse}
    return stored, over(over(values, 2.0 ** (fine.double().numpy() - 127), 1, 32), coarse.double().numpy()[..., 0], 1, 512)


def plain(dtype: torch.dtype) -> Encode:
    def stored(random: torch.Generator, n: int, k: int) -> Stored:
        values = torch.randn(n, k, generator=random).to(dtype)
        return {"weight": values}, values.double().numpy()

    return stored


WORDS = {
    by_tensor: "FP8 tensor", by_channel: "FP8 channel", by_block: "FP8 block", int8: "INT8 channel", mxfp8: "MXFP8", mxfp4: "MXFP4",
    nvfp4: "NVFP4", nvfp4_divided: "NVFP4", dual: "MXFP4 dual scale", plain(torch.bfloat16): "", plain(torch.float16): "",
    plain(torch.float32): "", plain(torch.float64): "",
}  # fmt: skip


def folder(path: Path, tensors: Tensors, config: Mapping[str, Any] = CONFIG, name: str = "model.safetensors") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
    save_file({name: t.clone().contiguous() for name, t in tensors.items()}, path / name)
    return path


def errors(reference: Path, candidate: Path) -> dict[str, WeightError]:
    """By name, worst first."""
    found = match(read_inventory(reference), read_inventory(candidate))
    told: list[int] = []
    result = {e.name: e for e in worst_first(weight_errors(found, told.append))}
    assert sum(told) == found.nbytes
    return result


FORMS = st.sampled_from(list(WORDS))


@settings(max_examples=50, deadline=None)
@example(one=by_block, two=by_channel, n=257, k=160, piece=4096, part=1 << 22, seed=0)
@example(one=nvfp4, two=by_block, n=130, k=544, piece=94, part=1, seed=0)
@given(
    one=FORMS,
    two=FORMS,
    n=st.sampled_from((1, 3, 130)),
    k=st.sampled_from((32, 160, 544)),
    piece=st.sampled_from((2, 94, 4096)),
    part=st.sampled_from((1, 5000, 1 << 22)),
    seed=st.integers(0, 1000),
)
def test_every_format_against_float64(
    tmp_path_factory: pytest.TempPathFactory, one: Encode, two: Encode, n: int, k: int, piece: int, part: int, seed: int
) -> None:
    """Any two formats beside one another, in pieces of any size."""
    random = torch.Generator().manual_seed(seed)
    (before, a), (after, b) = one(random, n, k), two(random, n, k)
    tmp = tmp_path_factory.mktemp("pair")
    for side, leaves in (("a", before), ("b", after)):
        folder(tmp / side, {f"{LINEAR}.{leaf}": t for leaf, t in leaves.items()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held, "PIECE", piece)
        patch.setattr(weights, "PART", part)
        (error,) = errors(tmp / "a", tmp / "b").values()
    shutil.rmtree(tmp)
    relative = np.linalg.norm(b - a) / np.linalg.norm(a)
    cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
    assert (error.name, error.shape, error.note) == (f"{LINEAR}.weight", (n, k), "")
    assert error.coding == WORDS[two] or (WORDS[two][-1:].islower() and min(n, k) <= 128)  # one scale is one of the tensor, too
    assert error.relative_l2 == pytest.approx(relative, rel=1e-6, abs=1e-9)
    assert error.cosine == pytest.approx(cosine, rel=1e-6, abs=1e-7)
    assert error.max_abs == pytest.approx(np.abs(b - a).max(), rel=1e-6)
    assert error.sqnr_db == pytest.approx(-20 * math.log10(relative), rel=1e-6, abs=1e-5)


# --- definitions at their edges ---


@pytest.mark.parametrize(
    ("a", "b", "cosine", "relative", "sqnr"),
    [
        ([0.0, 0.0], [0.0, 0.0], 1, 0, math.inf),
        ([0.0, 0.0], [0.0, 2.0], 0, math.inf, -math.inf),
        ([0.0, 2.0], [0.0, 0.0], 0, 1, 0),
        ([1.0, 2.0], [-1.0, -2.0], -1, 2, -20 * math.log10(2)),
        ([1.0, 2.0], [1.0, 2.0], 1, 0, math.inf),
        ([3.0, 4.0], [3.0, 9.0], (9 + 36) / 5 / math.sqrt(90), 1, 0),
        ([1.0, math.nan], [1.0, math.nan], math.nan, math.nan, math.nan),
        ([1.0, math.inf], [1.0, math.inf], math.nan, math.nan, math.nan),
        ([1.0, 1.0], [math.inf, 1.0], math.nan, math.inf, -math.inf),
        ([1e-200], [1e-200], 1, 0, math.inf),
    ],
)
def test_definitions(a: list[float], b: list[float], cosine: float, relative: float, sqnr: float) -> None:
    found = sums(np.array(a), np.array(b), np.empty(len(a)))
    assert (found.cosine, found.relative_l2, found.sqnr_db) == pytest.approx((cosine, relative, sqnr), nan_ok=True)
    assert Sums() + found == found or math.isnan(found.relative_l2)


def test_nothing_differs_in_nothing() -> None:
    assert (Sums().cosine, Sums().relative_l2, Sums().largest, Sums().mse) == (1, 0, 0, 0)
    assert math.isnan(extreme(min, [1.0, math.nan]))


def test_tensors_of_any_form(tmp_path: Path) -> None:
    """Empty ones, scalars, integers, and what can't be compared, which comes first and makes every figure NaN."""
    codes, scale = torch.ones(4, 4).to(torch.float8_e4m3fn), torch.tensor(0.5)
    before: Tensors = {
        "empty": torch.empty(0, 8), "one": torch.tensor(3.0), "ids": torch.arange(5), "flags": torch.tensor([True, False]),
        "a.weight": torch.ones(4, 4), "b.weight": torch.ones(4, 4), "c.weight": torch.ones(4, 6), "d.weight": torch.ones(4, 4),
        "same.weight": torch.full((2, 2), 0.5).bfloat16(), "gone.weight": torch.ones(2),
    }  # fmt: skip
    after = {
        **{name: t for name, t in before.items() if name != "gone.weight"}, "one": torch.tensor(3.5), "ids": torch.arange(5) + 1,
        "a.weight": codes, "b.weight": codes, "b.weight_scale": torch.tensor(math.nan), "c.weight": torch.ones(6, 4),
        "d.weight": codes, "d.weight_scale": scale, "d.input_scale": scale, "more.weight": torch.ones(2),
    }  # fmt: skip
    found = errors(folder(tmp_path / "a", before), folder(tmp_path / "b", after))
    assert list(found)[:3] == ["a.weight", "b.weight", "c.weight"]
    assert {n: e.note for n, e in found.items() if e.note} == {
        "a.weight": "candidate: F8_E4M3 codes without scales that fit them",
        "b.weight": "candidate: FP8 codes with scales that are not finite, or a global scale that is not above 0",
        "c.weight": "shape [4, 6], of the candidate [6, 4], which is transposed",
    }
    assert [found[n].relative_l2 for n in ("empty", "flags", "same.weight", "d.weight")] == [0, 0, 0, 0.5]
    assert found["one"].max_abs == 0.5
    assert found["ids"].relative_l2 == pytest.approx(math.sqrt(5 / 30))
    odd = match(read_inventory(tmp_path / "a"), read_inventory(tmp_path / "b")).unmatched
    assert odd == (Unmatched("gone.weight", "in the reference alone"), Unmatched("more.weight", "in the candidate alone"))
    told = figures(list(found.values()), len(odd))
    assert math.isnan(told["weight_cosine_min"])
    assert math.isnan(told["weight_relative_l2_max"])
    assert told["weights_unmatched"] == 2
    assert figures([], 0) == {}


def test_a_code_that_is_nan_is_one(tmp_path: Path) -> None:
    codes = torch.full((2, 2), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    before, after = folder(tmp_path / "a", {"x.weight": torch.ones(2, 2)}), {"x.weight": codes, "x.weight_scale": torch.tensor(1.0)}
    assert math.isnan(errors(before, folder(tmp_path / "b", after))["x.weight"].relative_l2)


# --- the example model: what is planted is what is worst ---


@pytest.fixture(scope="module")
def coded(example_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_coded(example_model, tmp_path_factory.mktemp("coded") / "fp8", "demo")


def test_a_sound_export(example_model: Path, coded: Path) -> None:
    found = errors(example_model, coded)
    assert {e.coding for e in found.values()} == {"", "FP8 tensor"}
    assert all(e.relative_l2 == 0 for e in found.values() if not e.coding)
    assert all(0.02 < e.relative_l2 < 0.03 and e.cosine > 0.999 for e in found.values() if e.coding)
    assert not match(read_inventory(example_model), read_inventory(coded)).unmatched


def transposed(tensors: Tensors, name: str) -> None:
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].view(torch.uint8).T.contiguous().view(torch.float8_e4m3fn)


def reciprocal(tensors: Tensors, name: str) -> None:
    tensors[f"{name}.weight_scale"] = 1 / tensors[f"{name}.weight_scale"]


def doubled(tensors: Tensors, name: str) -> None:
    for scale in (n for n in tensors if n.startswith(name.partition(".self_attn")[0] + ".") and n.endswith("weight_scale")):
        tensors[scale] = 2 * tensors[scale]


@pytest.mark.parametrize(
    ("spoil", "worst", "least"), [(transposed, 1, 1.2), (reciprocal, 1, 1e4), (doubled, 7, 0.99)], ids=lambda value: str(value)[:22]
)
def test_a_planted_fault_is_worst(
    spoil: Callable[[Tensors, str], None], worst: int, least: float, example_model: Path, coded: Path, tmp_path: Path
) -> None:
    name = "model.layers.3.self_attn.o_proj"
    bad = shutil.copytree(coded, tmp_path / "bad")
    stored = load_file(bad / "model.safetensors")
    spoil(stored, name)
    save_file(stored, bad / "model.safetensors")
    found = list(errors(example_model, bad).values())
    assert {e.name.partition(".self_attn")[0].partition(".mlp")[0] for e in found[:worst]} == {"model.layers.3"}
    assert all(e.relative_l2 > least for e in found[:worst])
    assert found[worst].relative_l2 < 0.03
    assert worst != 1 or found[0].name == f"{name}.weight"


def test_two_candidates_and_dequantized_ones(coded: Path, example_model: Path, tmp_path: Path) -> None:
    """Codes against the BF16 that they stand for: the rounding to BF16 is all that differs."""
    dense = {}
    inventory = dense_if_fp8(read_inventory(coded))
    with Reader(coded, inventory.main) as reader:
        for name, tensor in inventory.main.tensors.items():
            dense[name] = torch.empty(tensor.spec.shape, dtype=TORCH_DTYPES[tensor.spec.dtype])
            reader.read_into(tensor, 0, raw(dense[name]))
    other = tmp_path / "dense"
    other.mkdir()
    copy_others(example_model, other)
    save_file(dense, other / "model.safetensors")
    found = errors(coded, other)
    assert max(e.relative_l2 for e in found.values()) < 2**-8
    assert {e.relative_l2 for e in errors(coded, coded).values()} == {0.0}


# --- names ---


def test_names_of_another_generation(example_model: Path, coded: Path, tmp_path: Path) -> None:
    other = shutil.copytree(coded, tmp_path / "other")
    stored = load_file(other / "model.safetensors")
    renamed = {
        n.replace("model.layers", "model.language_model.layers").replace("visual.", "model.visual."): t for n, t in stored.items()
    }
    assert renamed.keys() != stored.keys()
    save_file(renamed, other / "model.safetensors")
    assert errors(example_model, other) == errors(example_model, coded)


QWEN3_VL_MOE = {
    "architectures": ["Qwen3VLMoeForConditionalGeneration"],
    "text_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_experts": 2, "moe_intermediate_size": 8},
}


def test_experts_that_are_stored_together(tmp_path: Path) -> None:
    """Transposed, as the hub has them; the candidate has each by itself, one of them spoiled."""
    at, random = "model.language_model.layers.0.mlp.experts", torch.Generator().manual_seed(0)
    joined, down = (torch.randn(*shape, generator=random).bfloat16() for shape in ((2, 32, 16), (2, 8, 32)))
    single = {}
    for e in range(2):
        gate, up = joined[e].T.chunk(2)
        single |= {f"{at}.{e}.gate_proj.weight": gate, f"{at}.{e}.up_proj.weight": up, f"{at}.{e}.down_proj.weight": down[e].T}
    single[f"{at}.1.up_proj.weight"] = -single[f"{at}.1.up_proj.weight"]
    before = folder(tmp_path / "a", {f"{at}.gate_up_proj": joined, f"{at}.down_proj": down}, QWEN3_VL_MOE)
    found = errors(before, folder(tmp_path / "b", single, QWEN3_VL_MOE))
    assert len(found) == 6
    assert {n: e.cosine for n, e in found.items() if e.relative_l2} == {f"{at}.1.up_proj.weight": -1.0}


def pipeline(root: Path, transformer: Tensors, record: Any = None, **more: Tensors) -> Path:
    index = {"_class_name": "OmniGen2Pipeline", **{name: ["diffusers", "X"] for name in ("transformer", *more)}}
    root.mkdir()
    (root / "model_index.json").write_text(json.dumps(index))
    config = {"_class_name": "OmniGen2Transformer2DModel"}
    folder(root / "transformer", transformer, config, "diffusion_pytorch_model.safetensors")
    for name, tensors in more.items():
        folder(root / name, tensors, {"_class_name": "X"}, "diffusion_pytorch_model.safetensors")
    if record is not None:
        (root / "ckptq.json").write_text(json.dumps(record))
    return root


def test_a_pipeline_by_its_components(tmp_path: Path) -> None:
    """Linears that the output calls as its server does, one of them two of the source's; and a name that ckptq.json tells."""
    parts = {f"layers.0.feed_forward.linear_{i}.weight": torch.randn(16, 16).bfloat16() for i in (1, 2, 3)}
    before = pipeline(tmp_path / "a", {**parts, "x.old.weight": torch.ones(2)}, vae={"w": torch.ones(3)}, gone={"w": torch.ones(1)})
    one, two, three = parts.values()
    at = "layers.0.feed_forward"
    after = {f"{at}.gate_up_proj.weight": torch.cat([one, three]), f"{at}.down_proj.weight": two * 2, "x.new.weight": torch.ones(2)}
    record = {"components": {"transformer": {"renamed": {"x.old.weight": "x.new.weight", "y": 3}}}}
    other = pipeline(tmp_path / "b", after, record, vae={"w": torch.zeros(3)})
    found = errors(before, other)
    assert {name: e.relative_l2 for name, e in found.items()} == {
        "transformer/layers.0.feed_forward.linear_2.weight": 1,
        "vae/w": 1,
        "transformer/layers.0.feed_forward.gate_up_proj.weight": 0,
        "transformer/x.old.weight": 0,
    }
    assert matched(before, other).unmatched == (Unmatched("gone", "a component of the reference alone"),)
    swapped = errors(other, before)
    assert {e.relative_l2 for n, e in swapped.items() if "down_proj" in n} == {0.5}


def matched(reference: Path, candidate: Path) -> Matched:
    return match(read_inventory(reference), read_inventory(candidate))


def test_what_is_no_pair_is_refused(tmp_path: Path) -> None:
    model, other = folder(tmp_path / "a", {"x": torch.ones(1)}), folder(tmp_path / "b", {"y": torch.ones(1)})
    with pytest.raises(SourceError, match="no tensor has the name of one in"):
        matched(model, other)
    with pytest.raises(SourceError, match="expected a plain model, as"):
        matched(model, pipeline(tmp_path / "c", {"x": torch.ones(1)}))
