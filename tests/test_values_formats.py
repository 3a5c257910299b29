"""Faults in the values of INT8, NVFP4, MXFP8 and MXFP4 that no source is needed for, each found alone, and what is no fault."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make_coded import WEIGHTS, make_coded
from safetensors.torch import load_file, save_file

from ckptq import digest
from ckptq.checkpoint import Component, SourceTensor, TensorSpec, read_inventory
from ckptq.recipe import shipped
from ckptq.scopes import find_scope
from ckptq.validators import Finding, passthrough, scan, values

EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny-qwen2.5-vl"
OUT, DOWN = "model.layers.0.self_attn.o_proj", "model.layers.2.mlp.down_proj"
KEY, UP = "model.layers.1.self_attn.k_proj", "model.layers.1.mlp.up_proj"
Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], object]
RECIPES = [name for name in shipped() if name.startswith("qwen25vl")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The output of a shipped recipe for the example."""
    root = tmp_path_factory.mktemp("made")

    def make(recipe: str) -> Path:
        folder = root / recipe
        return folder if folder.exists() else make_coded(EXAMPLE, folder, recipe)

    return make


def check(folder: Path) -> list[Finding]:
    main = read_inventory(folder).main
    return list(values.check(folder, main, find_scope(main.config)))


def changed(good: Path, folder: Path, change: Change) -> list[Finding]:
    """Findings on the good folder with other tensors."""
    tensors = load_file(good / WEIGHTS)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / WEIGHTS)
    (folder / "config.json").write_bytes((good / "config.json").read_bytes())
    return check(folder)


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_a_recipe_makes_has_no_finding(made: Callable[[str], Path], recipe: str) -> None:
    folder = made(recipe)
    assert check(folder) == []
    output = read_inventory(folder)
    assert list(passthrough.check(output, read_inventory(EXAMPLE), find_scope(output.main.config))) == []


# --- the pass ---


@settings(max_examples=30, deadline=None)
@given(numel=st.integers(1, 700), zeros=st.booleans(), seed=st.integers(0, 2**32 - 1), chunk=st.sampled_from([64, 1 << 20]))
def test_a_pass_sees_what_numpy_sees(
    tmp_path_factory: pytest.TempPathFactory, numel: int, zeros: bool, seed: int, chunk: int
) -> None:
    folder, random = tmp_path_factory.mktemp("scan"), np.random.default_rng(seed)
    names = {"a.weight": "I8", "b.weight_packed": "U8", "c.weight_scale": "U8"}
    data = {name: random.choice([0, 8, 0x80, 0x88], numel).astype(np.uint8) if zeros else random.integers(0, 256, numel, np.uint8)
            for name in names}  # fmt: skip
    (folder / "f").write_bytes(b"".join(raw.tobytes() for raw in data.values()))
    tensors = {n: SourceTensor(TensorSpec(n, dtype, (numel,)), "f", i * numel) for i, (n, dtype) in enumerate(names.items())}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "CHUNK", chunk)
        patch.setattr(scan, "COUNTED", 1 << 20)
        patch.setattr(digest, "PART", 1 << 8)
        found = {t.spec.name: s for t, s in scan.scan(folder, Component("", "", {}, tensors, ("f",), (), ()))}
    whole = data["a.weight"].view(np.int8).astype(int)
    seen = found["a.weight"]
    assert seen.top == abs(whole).max()
    if seen.top >= 126:
        assert (seen.largest, seen.next) == ((abs(whole) >= 127).sum(), (abs(whole) == 126).sum())
    packed = data["b.weight_packed"]
    sizes = np.concatenate([packed & 7, packed >> 4 & 7])
    seen = found["b.weight_packed"]
    assert (seen.top, seen.largest, seen.next) == (sizes.max(), (sizes == 7).sum(), (sizes == 6).sum())
    assert seen.filled == (sizes > 0).sum()
    assert (found["c.weight_scale"].top, found["c.weight_scale"].low) == (
        data["c.weight_scale"].max(),
        data["c.weight_scale"].min(),
    )


def test_zeros_are_told_from_codes_that_were_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "PACKED_COUNTED", 16)
    for last, top in ((0x88, 0), (0x83, 1)):
        (tmp_path / "f").write_bytes(bytes(99) + bytes([last]))
        tensor = SourceTensor(TensorSpec("x.weight", "U8", (100,)), "f", 0)
        ((_, seen),) = scan.scan(tmp_path, Component("", "", {}, {"x.weight": tensor}, ("f",), (), ()))
        assert seen.top == top


# --- faults ---


def change(name: str, how: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Changes one tensor, or every one whose name ends so."""

    def apply(tensors: Tensors) -> None:
        names = [n for n in tensors if n.endswith(name)]
        assert names
        tensors.update({n: how(tensors[n]).clone() for n in names})

    return apply


def put(name: str, value: int) -> Change:
    """Sets the first byte."""

    def how(t: torch.Tensor) -> torch.Tensor:
        raw = t.clone().view(torch.uint8)
        raw.view(-1)[:1] = value
        return raw.view(t.dtype)

    return change(name, how)


def both(*changes: Change) -> Change:
    return lambda tensors: [apply(tensors) for apply in changes]


def nibbles(how: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Applies `how` to the magnitudes, 0 to 7, of packed codes."""
    return lambda t: (t & 0x88) | how(t & 7) | how(t >> 4 & 7) << 4


def some_cut(sizes: torch.Tensor) -> torch.Tensor:
    """Half of them at the largest."""
    at = torch.arange(sizes.numel()).view(sizes.shape) % 2 == 0
    return torch.where(at, 7, sizes).to(torch.uint8)


def spread_evenly(sizes: torch.Tensor) -> torch.Tensor:
    """From zero to the amax: each code as often as it is wide, which is twelve quarters of 6 in all."""
    widths = torch.tensor([1, 2, 2, 2, 3, 4, 6, 4])
    codes = torch.arange(8).repeat_interleave(widths)
    return codes.repeat(sizes.numel() // len(codes) + 1)[: sizes.numel()].view(sizes.shape).to(torch.uint8)


def one_of_eight(sizes: torch.Tensor) -> torch.Tensor:
    """Of the bytes of a group one holds its amax, the others the smallest code there is."""
    return torch.where(torch.arange(sizes.shape[1]) % 8 == 3, sizes.clamp(min=6), 1).to(torch.uint8)


def powers(by: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Exponents larger by so many, with a byte's overflow."""
    return lambda t: (t.int() + by).to(torch.uint8)


def scaled(by: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda t: (t.float() * by).to(t.dtype)


CT, MO = "compressed-tensors", "modelopt"
FAULTS: dict[str, tuple[str, Change, list[tuple[str, str]]]] = {
    "group scale NaN": (f"nvfp4-{MO}", put(f"{OUT}.weight_scale", 0x7F), [("values.not-finite", "error")]),
    "group scale negative NaN": (f"nvfp4-{CT}", put(f"{OUT}.weight_scale", 0xFF), [("values.not-finite", "error")]),
    "exponent NaN": (f"mxfp8-{MO}", put(f"{OUT}.weight_scale", 255), [("values.not-finite", "error")]),
    "exponent NaN, FP4": (f"mxfp4-{CT}", put(f"{OUT}.weight_scale", 255), [("values.not-finite", "error")]),
    "scale of scales NaN": (
        f"nvfp4-{MO}", change(f"{OUT}.weight_scale_2", lambda t: t * math.nan), [("values.not-finite", "error")]
    ),
    "divisor infinite": (f"nvfp4-{CT}", change(f"{OUT}.input_global_scale", lambda t: t / 0), [("values.not-finite", "error")]),
    "channel NaN": (f"int8-{CT}", change(f"{OUT}.weight_scale", lambda t: t * math.nan), [("values.not-finite", "error")]),
    "code NaN": (f"mxfp8-{CT}", put(f"{OUT}.weight", 0x7F), [("values.not-finite", "error")]),
    "group scale zero": (f"nvfp4-{MO}", put(f"{OUT}.weight_scale", 0), [("values.not-positive", "error")]),
    "group scale negative": (f"nvfp4-{MO}", put(f"{OUT}.weight_scale", 0xB8), [("values.not-positive", "error")]),
    "scale of scales zero": (f"nvfp4-{MO}", change(f"{OUT}.weight_scale_2", torch.zeros_like), [("values.not-positive", "error")]),
    "divisor negative": (f"nvfp4-{CT}", change(f"{OUT}.weight_global_scale", torch.neg), [("values.not-positive", "error")]),
    "group scale zero over zeros": (
        f"nvfp4-{MO}",
        both(put(f"{OUT}.weight_scale", 0), change(f"{OUT}.weight", lambda t: t.index_fill(0, torch.tensor([0]), 0x80))),
        [("values.not-positive", "warning")],
    ),
    "ModelOpt's spelling, divided": (
        f"nvfp4-{MO}", change(f"{OUT}.weight_scale_2", lambda t: 1 / t), [("values.scale-range", "error")]
    ),
    "compressed-tensors' spelling, multiplied": (
        f"nvfp4-{CT}", change(f"{OUT}.weight_global_scale", lambda t: 1 / t), [("values.scale-range", "error")]
    ),
    "inputs in the other spelling": (
        f"nvfp4-{CT}", change(f"{OUT}.input_global_scale", lambda t: 1 / t / 2688), [("values.scale-range", "warning")]
    ),
    "amax in place of weight_scale_2": (
        f"nvfp4-{MO}", change(f"{OUT}.weight_scale_2", lambda t: t * 2688), [("values.scale-range", "warning")]
    ),
    "amax in place of weight_global_scale": (
        f"nvfp4-{CT}", change(f"{OUT}.weight_global_scale", lambda t: 2688 / t), [("values.scale-range", "error")]
    ),
    "amax in place of a channel's scale": (
        f"int8-{CT}", change(f"{DOWN}.weight_scale", lambda t: t * 127.5), [("values.scale-outlier", "warning")]
    ),
    "exponents without their bias": (f"mxfp8-{MO}", change(f"{OUT}.weight_scale", powers(-127)), [("values.scale-range", "error")]),
    "exponents with twice the bias": (f"mxfp4-{CT}", change(f"{OUT}.weight_scale", powers(127)), [("values.scale-range", "error")]),
    "all zero": (f"nvfp4-{CT}", change(f"{OUT}.weight_packed", lambda t: t & 0x88), [("values.all-zero", "warning")]),
    "all zero, under a divisor of 1": (
        f"nvfp4-{CT}",
        both(change(f"{OUT}.weight_packed", lambda t: t & 0x88), change(f"{OUT}.weight_global_scale", torch.ones_like)),
        [("values.all-zero", "warning")],
    ),
    "all zero but for one, under a scale of 1": (
        f"nvfp4-{MO}",
        both(
            change(f"{OUT}.weight", lambda t: t & 0x88), put(f"{OUT}.weight", 1),
            change(f"{OUT}.weight_scale_2", torch.ones_like),
        ),
        [("values.small-codes", "warning"), ("values.scale-range", "error")],
    ),
    "all zero, INT8": (f"int8-{CT}", change(f"{OUT}.weight", torch.zeros_like), [("values.all-zero", "warning")]),
    "cut off": (f"nvfp4-{MO}", change(f"{OUT}.weight", nibbles(some_cut)), [("values.saturated", "warning")]),
    "cut off, MXFP4": (f"mxfp4-{CT}", change(f"{OUT}.weight_packed", nibbles(some_cut)), [("values.saturated", "warning")]),
    "cut off, INT8": (
        f"int8-{CT}", change(f"{OUT}.weight", lambda t: (t.int() * 3).clamp(-127, 127).to(torch.int8)),
        [("values.saturated", "warning")],
    ),
    "scales twice as large as the weights need": (
        f"nvfp4-{MO}", change(f"{OUT}.weight", nibbles(lambda t: t.clamp(max=5))), [("values.small-codes", "warning")]
    ),
    "exponents two too large": (
        f"mxfp8-{MO}", change(f"{OUT}.weight", lambda t: (t.float() / 4).to(t.dtype)), [("values.small-codes", "warning")]
    ),
    "seven bits of eight": (f"int8-{CT}", change(f"{OUT}.weight", lambda t: t // 3), [("values.small-codes", "warning")]),
    "a scale of scales for larger weights": (
        f"nvfp4-{MO}", change(f"{OUT}.weight_scale", scaled(1 / 8)), [("values.group-scales", "warning")]
    ),
    "a scale of scales for smaller weights": (
        f"nvfp4-{CT}", change(f"{DOWN}.weight_scale", lambda t: (t.float() * 8).clamp(max=448).to(t.dtype)),
        [("values.group-scales", "warning")],
    ),
    "a shard's scale of scales": (
        f"nvfp4-{MO}", change(f"{KEY}.weight_scale_2", lambda t: t * 1.5), [("values.weight-scale-split", "error")]
    ),
    "a shard's divisor": (
        f"nvfp4-{CT}", change(f"{UP}.weight_global_scale", lambda t: t * 1.5), [("values.weight-scale-split", "error")]
    ),
    "a shard's scale of scales, nearly the same": (
        f"nvfp4-{MO}", change(f"{KEY}.weight_scale_2", lambda t: t * 1.002), [("values.weight-scale-split", "warning")]
    ),
    "a shard's input": (f"nvfp4-{MO}", change(f"{KEY}.input_scale", lambda t: t * 1.5), [("values.input-scale-split", "warning")]),
    "a shard's input, divided": (
        f"nvfp4-{CT}", change(f"{KEY}.input_global_scale", lambda t: t * 1.5), [("values.input-scale-split", "warning")]
    ),
    "an input that no norm lets through": (
        f"nvfp4-{CT}",
        both(*(change(f"layers.1.mlp.{m}_proj.input_global_scale", lambda t: t / 100) for m in ("gate", "up"))),
        [("values.scale-outlier", "warning")] * 2,
    ),
    "one layer far above the others": (
        f"nvfp4a16-{MO}", change(f"{DOWN}.weight_scale_2", lambda t: t * 200), [("values.scale-outlier", "warning")]
    ),
    "one layer far above the others, INT8": (
        f"int8-{CT}", change(f"{DOWN}.weight_scale", lambda t: t * 200), [("values.scale-outlier", "warning")]
    ),
    "all far too large": (
        f"nvfp4a16-{CT}", change("weight_global_scale", lambda t: t / 100), [("values.scale-outlier", "warning")]
    ),
    "all exponents far too small": (f"mxfp4-{CT}", change(".weight_scale", powers(-12)), [("values.scale-outlier", "warning")]),
}  # fmt: skip


@pytest.mark.parametrize(("recipe", "spoil", "expected"), FAULTS.values(), ids=FAULTS)
def test_each_fault_is_found_alone(
    made: Callable[[str], Path], tmp_path: Path, recipe: str, spoil: Change, expected: list[tuple[str, str]]
) -> None:
    found = changed(made(f"qwen25vl-lm-{recipe}"), tmp_path, spoil)
    assert [(f.code, f.severity) for f in found] == expected, found


def test_what_a_split_scale_does_is_measured(made: Callable[[str], Path], tmp_path: Path) -> None:
    (finding,) = changed(made(f"qwen25vl-lm-nvfp4-{MO}"), tmp_path, change(f"{KEY}.weight_scale_2", lambda t: t * 1.25))
    assert finding.subject == "model.layers.1.self_attn.{q_proj,k_proj,v_proj}.weight_scale_2"
    assert finding.found.endswith(", 1.25 times as large")


RIGHT: dict[str, tuple[str, Change]] = {
    "scales of scales in another shape": (f"nvfp4-{MO}", change("weight_scale_2", lambda t: t.view(1))),
    "groups of which the largest is 4, where that is nearer": (
        f"nvfp4-{MO}", change(f"{OUT}.weight", nibbles(lambda t: t.clamp(max=6)))
    ),
    "-128, as llm-compressor has it": (f"int8-{CT}", put(f"{OUT}.weight", 0x80)),
    "codes up to a power of two below 127": (f"int8-{CT}", change(f"{OUT}.weight", lambda t: (t.int() * 65 // 127).to(torch.int8))),
    "one shard far below the others, under one scale": (f"nvfp4-{MO}", change(f"{KEY}.weight_scale", scaled(1 / 8))),
    "exponents as low as there are, over zeros": (
        f"mxfp8-{CT}",
        both(
            change(f"{OUT}.weight", lambda t: t.view(torch.uint8).index_fill(0, torch.tensor([0]), 0x80).view(t.dtype)),
            change(f"{OUT}.weight_scale", lambda t: t.index_fill(0, torch.tensor([0]), 0)),
        ),
    ),
    "exponents as they come, over zeros": (
        f"mxfp8-{MO}",
        both(
            change(f"{OUT}.weight", lambda t: t.view(torch.uint8).index_fill(0, torch.tensor([0]), 0).view(t.dtype)),
            change(f"{OUT}.weight_scale", lambda t: t.index_fill(0, torch.tensor([0]), 200)),
        ),
    ),
    "one weight far above the others in each group": (
        f"nvfp4a16-{MO}", change(f"{OUT}.weight", nibbles(one_of_eight))
    ),
    "weights spread evenly": (
        f"nvfp4a16-{MO}",
        change(f"{OUT}.weight", nibbles(spread_evenly)),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("recipe", "spoil"), RIGHT.values(), ids=RIGHT)
def test_near_misses_stay_clean(made: Callable[[str], Path], tmp_path: Path, recipe: str, spoil: Change) -> None:
    assert changed(made(f"qwen25vl-lm-{recipe}"), tmp_path, spoil) == []


def test_codes_without_scales_are_not_judged(made: Callable[[str], Path], tmp_path: Path) -> None:
    """The layout tells of them; there is nothing to say of the codes themselves."""
    assert changed(made(f"qwen25vl-lm-nvfp4-{MO}"), tmp_path, lambda t: t.pop(f"{OUT}.weight_scale")) == []
    section = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert section["quant_algo"] == "NVFP4"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", [f"nvfp4-{MO}", f"nvfp4-{CT}"])
def test_scales_of_groups_in_another_dtype_mean_the_same(
    made: Callable[[str], Path], tmp_path: Path, recipe: str, dtype: torch.dtype
) -> None:
    assert changed(made(f"qwen25vl-lm-{recipe}"), tmp_path, change(".weight_scale", lambda t: t.to(dtype))) == []
    output = read_inventory(tmp_path)
    found = passthrough.check(output, read_inventory(EXAMPLE), find_scope(output.main.config))
    assert {f.code for f in found} <= {"passthrough.sidecar-missing"}
