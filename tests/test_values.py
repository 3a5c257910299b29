"""What a pass over the values sees, and which of it is a fault: against numpy's plain answers, in every granularity."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make_checkpoint import PRESETS, make_checkpoint
from make_quantized import make_quantized
from safetensors.torch import load_file, save_file

from ckptq import digest
from ckptq.checkpoint import Component, SourceTensor, TensorSpec, read_inventory
from ckptq.scopes import find_scope
from ckptq.validators import Finding, scan, values
from ckptq.validators.scales import find_grid, scale_kind

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "tiny-qwen2.5-vl"
WEIGHTS = "model.safetensors"
OUT = "model.layers.0.self_attn.o_proj"
GATE, UP = (f"model.layers.0.mlp.{s}_proj" for s in ("gate", "up"))
Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], object]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_quantized(EXAMPLE, tmp_path_factory.mktemp("values") / "good", "export.shard_size=5GB")


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


# --- the pass ---

BITS = {"F64": 64, "F32": 32, "BF16": 16, "F16": 16, "F8_E4M3": 8, "F8_E5M2": 8}


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(sorted(BITS)),
    numel=st.integers(0, 700),
    least=st.integers(0, 1),
    gap=st.integers(0, 3),
    seed=st.integers(0, 2**32 - 1),
    sizes=st.sampled_from([(64, 128), (64, 1 << 20), (1 << 20, 1 << 26)]),
)
def test_a_pass_sees_what_numpy_sees(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, numel: int, least: int, gap: int, seed: int, sizes: tuple[int, int]
) -> None:
    """Neighbors in the file, pieces and parts of any size: none of them may show."""
    folder = tmp_path_factory.mktemp("scan")
    random = np.random.default_rng(seed)
    width = BITS[dtype] // 8
    names = ["a_scale", "b", "x.weight_scale"]
    data = {name: random.integers(0, 256, numel * width + least * at * width, np.uint8) for at, name in enumerate(names)}
    tensors, offset = {}, 3
    for name, raw in data.items():
        tensors[name] = SourceTensor(TensorSpec(name, dtype, (len(raw) // width,)), "f", offset)
        offset += len(raw) + gap
    (folder / "f").write_bytes(b"abc" + bytes(gap).join(raw.tobytes() for raw in data.values()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "CHUNK", sizes[0])
        patch.setattr(scan, "COUNTED", 1 << 20)
        patch.setattr(digest, "PART", sizes[1])
        found = {t.spec.name: s for t, s in scan.scan(folder, Component("", "", {}, tensors, ("f",), (), ()), digests=True)}
        for name, raw in data.items():
            total = digest.Running(dtype)
            total.update(memoryview(raw))
            assert found[name].digest == total.hexdigest()
    for name, raw in data.items():
        seen, bits = found[name], raw.view(f"<u{width}")
        magnitudes = bits & np.array((1 << (BITS[dtype] - 1)) - 1, bits.dtype)
        assert seen.top == max(magnitudes.tolist(), default=0)
        assert seen.signed == bool((bits != magnitudes).any())
        if scale_kind(name) and len(bits):
            assert seen.low == bits.min()
        if dtype == "F8_E4M3":
            counts = [int((magnitudes == code).sum()) for code in (0x7F, 0x7E, 0x7D)]
            assert [seen.nan, seen.largest, seen.next] == counts


def test_many_chunks_at_the_largest_value_are_counted_about_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = np.random.default_rng(0).integers(0, 0x7F, 1 << 16, np.uint8)
    (tmp_path / "f").write_bytes(codes.tobytes())
    tensor = SourceTensor(TensorSpec("x.weight", "F8_E4M3", (1 << 16,)), "f", 0)
    monkeypatch.setattr(scan, "CHUNK", 1 << 10)
    ((_, seen),) = scan.scan(tmp_path, Component("", "", {}, {"x.weight": tensor}, ("f",), (), ()))
    assert seen.largest == pytest.approx(int((codes == 0x7E).sum()), rel=0.2)


@given(
    n=st.integers(1, 600), k=st.integers(1, 600), block=st.tuples(st.integers(1, 200), st.integers(1, 200)), form=st.integers(0, 4)
)
def test_a_grid_covers_the_weight(n: int, k: int, block: tuple[int, int], form: int) -> None:
    nb, kb = -(-n // block[0]), -(-k // block[1])
    shape = ((), (1,), (n, 1), (nb, kb), (nb, 1, kb, 1))[form]
    grid = find_grid((n, k), shape, block)
    assert grid is not None
    assert math.prod(grid.shape) == math.prod(shape)
    assert (grid.shape[0] - 1) * grid.high < n <= grid.shape[0] * grid.high
    assert (grid.shape[1] - 1) * grid.wide < k <= grid.shape[1] * grid.wide


# --- faults ---


def code(t: torch.Tensor, value: int, count: int = 1) -> torch.Tensor:
    """A copy with the first `count` codes replaced."""
    raw = t.view(torch.uint8).clone()
    raw.view(-1)[:count] = value
    return raw.view(torch.float8_e4m3fn)


def by_channel(t: Tensors, module: str = OUT) -> torch.Tensor:
    """Turns the weight's scale into one a row, [n, 1], and returns it."""
    t[f"{module}.weight_scale"] = t[f"{module}.weight_scale"].expand(t[f"{module}.weight"].shape[0]).reshape(-1, 1).clone()
    return t[f"{module}.weight_scale"]


def by_block(t: Tensors, module: str = OUT) -> torch.Tensor:
    """The same, one for each 128 by 128, under the native name."""
    n, k = t[f"{module}.weight"].shape
    scale = t.pop(f"{module}.weight_scale").expand(-(-n // 128), -(-k // 128)).clone()
    return t.setdefault(f"{module}.weight_scale_inv", scale)


def by_pb_wo(t: Tensors, module: str = OUT) -> torch.Tensor:
    """The same as ModelOpt writes it, [nb, 1, kb, 1]."""
    scale = by_block(t, module)
    del t[f"{module}.weight_scale_inv"]
    return t.setdefault(f"{module}.weight_scale", scale[:, None, :, None].clone())


def by_tensor(t: Tensors, module: str = OUT) -> torch.Tensor:
    return t[f"{module}.weight_scale"]


GRANULARITIES = (by_tensor, by_channel, by_block, by_pb_wo)


def test_good_values_have_no_finding(good: Path) -> None:
    assert check(good) == []


@pytest.mark.parametrize("form", GRANULARITIES)
def test_good_values_of_every_granularity(good: Path, tmp_path: Path, form: Callable[[Tensors], torch.Tensor]) -> None:
    assert changed(good, tmp_path, form) == []


@pytest.mark.parametrize("form", GRANULARITIES)
@pytest.mark.parametrize(
    ("value", "expected", "severity"),
    [
        (0.0, "values.not-positive", "error"),
        (-1e-4, "values.not-positive", "error"),
        (math.nan, "values.not-finite", "error"),
        (math.inf, "values.not-finite", "error"),
        (1e-12, "values.scale-range", "warning"),
        (0.5, "values.scale-range", "warning"),
        (3.5, "values.scale-range", "error"),
    ],
)
def test_one_bad_scale(
    good: Path, tmp_path: Path, form: Callable[[Tensors], torch.Tensor], value: float, expected: str, severity: str
) -> None:
    found = changed(good, tmp_path, lambda t: form(t).view(-1)[-1:].fill_(value))
    assert [(f.code, f.severity, f.subject.partition("_scale")[0]) for f in found] == [(expected, severity, f"{OUT}.weight")]


@pytest.mark.parametrize("form", [by_channel, by_block, by_pb_wo])
def test_a_zero_scale_over_zeros_is_no_error(good: Path, tmp_path: Path, form: Callable[[Tensors], torch.Tensor]) -> None:
    """Rows that are all zero have an amax of zero, and some exporters write that."""

    def change(t: Tensors) -> None:
        form(t).view(-1)[-1] = 0.0
        t[f"{OUT}.weight"].view(torch.uint8)[-128:, -256:] = 0x80

    assert [(f.code, f.severity) for f in changed(good, tmp_path, change)] == [("values.not-positive", "warning")]


CODES: dict[str, tuple[Change, str]] = {
    "NaN": (lambda t: t.update({f"{OUT}.weight": code(t[f"{OUT}.weight"], 0x7F)}), "values.not-finite"),
    "negative NaN": (lambda t: t.update({f"{OUT}.weight": code(t[f"{OUT}.weight"], 0xFF)}), "values.not-finite"),
    "zeros of both signs": (lambda t: t[f"{OUT}.weight"].view(torch.uint8).bitwise_and_(0x80), "values.all-zero"),
    "saturated": (lambda t: t.update({f"{OUT}.weight": code(t[f"{OUT}.weight"], 0xFE, 9000)}), "values.saturated"),
    "saturated a little": (lambda t: t.update({f"{OUT}.weight": code(t[f"{OUT}.weight"], 0x7E, 2000)}), "values.saturated"),
    "far below 448": (
        lambda t: t.update(
            {
                f"{OUT}.weight": (t[f"{OUT}.weight"].float() / 64).to(torch.float8_e4m3fn),
                f"{OUT}.weight_scale": t[f"{OUT}.weight_scale"] * 64,
            }
        ),
        "values.small-codes",
    ),
    "norm NaN": (lambda t: t["model.norm.weight"][3:4].fill_(math.nan), "values.not-finite"),
    "tower infinite": (lambda t: t["visual.merger.mlp.0.bias"][:1].fill_(-math.inf), "values.not-finite"),
    "split weight scale": (lambda t: t[f"{UP}.weight_scale"].mul_(1.5), "values.weight-scale-split"),
    "split input scale": (lambda t: t[f"{UP}.input_scale"].mul_(1.5), "values.input-scale-split"),
    "k zero": (lambda t: t["model.layers.0.self_attn.k_proj.k_scale"].zero_(), "values.not-positive"),
    "v negative": (lambda t: t["model.layers.0.self_attn.v_proj.v_scale"].neg_(), "values.not-positive"),
    "v infinite": (lambda t: t["model.layers.0.self_attn.v_proj.v_scale"].fill_(math.inf), "values.not-finite"),
    "k huge": (lambda t: t["model.layers.0.self_attn.k_proj.k_scale"].fill_(300.0), "values.scale-range"),
    "input tiny": (lambda t: t[f"{OUT}.input_scale"].fill_(1e-9), "values.scale-range"),
}


@pytest.mark.parametrize(("change", "expected"), CODES.values(), ids=CODES)
def test_each_fault_is_found_alone(good: Path, tmp_path: Path, change: Change, expected: str) -> None:
    assert [f.code for f in changed(good, tmp_path, change)] == [expected]


NEAR: dict[str, Change] = {
    "one code at 448, as amax / 448 leaves it": lambda t: t.update({f"{OUT}.weight": code(t[f"{OUT}.weight"], 0xFE)}),
    "a power of two above amax / 448": lambda t: t.update(
        {f"{OUT}.weight": (t[f"{OUT}.weight"].float() / 2).to(torch.float8_e4m3fn)}
    ),
    "ties at 448": lambda t: t.update({f"{OUT}.weight": code(t[f"{OUT}.weight"], 0x7E, 40)}),
    "scales [1]": lambda t: t.update({n: v.view(1) for n, v in t.items() if v.ndim == 0}),
    "spread evenly": lambda t: t.update({f"{OUT}.weight": torch.linspace(-448, 448, 65536).view(256, 256).to(torch.float8_e4m3fn)}),
    "an empty tensor": lambda t: t.update({"model.empty": torch.empty(0, 3)}),
    "one shard far below the other, under one scale": lambda t: t.update(
        {f"{UP}.weight": (t[f"{UP}.weight"].float() / 64).to(torch.float8_e4m3fn)}
    ),
}


@pytest.mark.parametrize("change", NEAR.values(), ids=NEAR)
def test_near_misses_stay_clean(good: Path, tmp_path: Path, change: Change) -> None:
    assert changed(good, tmp_path, change) == []


# --- scales beside one another ---


def scaled(ending: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Changes every tensor whose name ends so."""
    return lambda t: t.update({name: change(v).clone() for name, v in t.items() if name.endswith(ending)})


OUTLIERS: dict[str, tuple[Change, set[str]]] = {
    "every weight scale times 100": (scaled(".weight_scale", lambda v: v * 100), {"all weight scales"}),
    "every weight scale over 1000": (scaled(".weight_scale", lambda v: v / 1000), {"all weight scales"}),
    "one shard an amax": (
        scaled(".3.self_attn.k_proj.weight_scale", lambda v: v * 448),
        {"model.layers.3.self_attn.k_proj.weight_scale"},
    ),
    "one layer an amax": (
        scaled(".2.mlp.down_proj.weight_scale", lambda v: v * 448),
        {"model.layers.2.mlp.down_proj.weight_scale"},
    ),
    "inputs inverted": (
        scaled(".0.mlp.gate_proj.input_scale", lambda v: 1 / v),
        {"model.layers.0.mlp.gate_proj.input_scale"},
    ),
    "inputs of q an amax": (
        scaled(".1.self_attn.q_proj.input_scale", lambda v: v * 448),
        {"model.layers.1.self_attn.q_proj.input_scale"},
    ),
    "k an amax": (scaled(".1.self_attn.k_proj.k_scale", lambda v: v * 448), {"model.layers.1.self_attn.k_proj.k_scale"}),
    "v an amax": (scaled(".1.self_attn.v_proj.v_scale", lambda v: v * 448), {"model.layers.1.self_attn.v_proj.v_scale"}),
    "v an amax, of a norm that lets all through": (
        lambda t: (
            scaled(".1.input_layernorm.weight", lambda v: v * 1000)(t),
            scaled(".1.self_attn.v_proj.v_scale", lambda v: v * 448)(t),
        ),
        {"model.layers.1.self_attn.v_proj.v_scale"},
    ),
}


@pytest.mark.parametrize(("change", "expected"), OUTLIERS.values(), ids=OUTLIERS)
def test_scales_that_the_rest_of_the_model_contradicts(good: Path, tmp_path: Path, change: Change, expected: set[str]) -> None:
    found = changed(good, tmp_path, change)
    assert {f.subject for f in found if f.code == "values.scale-outlier"} == expected
    assert {f.severity for f in found} == {"warning"}
    assert {f.code for f in found} <= {"values.scale-outlier", "values.input-scale-split"}


LARGE_AND_RIGHT: dict[str, Change] = {
    "a massive activation": scaled(".1.mlp.down_proj.input_scale", lambda v: v * 3000),
    "inputs of a norm with large weights": lambda t: (
        scaled(".input_layernorm.weight", lambda v: v * 500)(t),
        scaled(".self_attn.q_proj.input_scale", lambda v: v * 448)(t),
        scaled(".self_attn.k_proj.input_scale", lambda v: v * 448)(t),
        scaled(".self_attn.v_proj.input_scale", lambda v: v * 448)(t),
    ),
    "inputs of which one value is all there is": lambda t: [
        t[f"model.layers.1.self_attn.{s}_proj.input_scale"].copy_(
            t["model.layers.1.input_layernorm.weight"].float().abs().max()
            * math.sqrt(len(t["model.layers.1.input_layernorm.weight"]))
            / 448
        )
        for s in "qkv"
    ],
    "a cache that was not calibrated": scaled(".v_scale", torch.ones_like),
    "k with large biases": lambda t: (
        scaled(".1.self_attn.k_proj.bias", lambda v: v * 0 + 300)(t),
        scaled(".1.self_attn.k_proj.k_scale", lambda v: v * 0 + 0.7)(t),
    ),
    "a layer that learned little": scaled(".2.mlp.down_proj.weight_scale", lambda v: v / 448),
    "weights ten times as large": scaled(".weight_scale", lambda v: v * 10),
}


@pytest.mark.parametrize("change", LARGE_AND_RIGHT.values(), ids=LARGE_AND_RIGHT)
def test_scales_that_are_large_and_right(good: Path, tmp_path: Path, change: Change) -> None:
    assert changed(good, tmp_path, change) == []


def test_shards_with_scales_of_their_own_are_mended_where_that_can_be_done(good: Path, tmp_path: Path) -> None:
    (finding,) = changed(good, tmp_path, scaled(".1.mlp.up_proj.weight_scale", lambda v: v * 1.5))
    assert finding.mend.startswith("harmless but lossy")
    assert finding.mend.endswith("as `ckptq convert` does")


# --- experts ---


def experts(folder: Path, inputs: dict[str, float], name_of_all: str = "", divide: bool = False) -> list[Finding]:
    """Findings on one layer of four experts, input scales 0.01 but for those given as `expert.linear`.

    `name_of_all`: of the scale of the whole tensor that NVFP4 has. `divide`: the reciprocals are stored, under another name.
    """
    config = {"architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 1, "num_experts": 4, "quantization_config": {}}
    tensors: Tensors = {}
    for expert in range(4):
        for name in ("gate_proj", "up_proj", "down_proj"):
            at = f"model.layers.0.mlp.experts.{expert}.{name}"
            value = torch.tensor(inputs.get(f"{expert}.{name}", 0.01))
            tensors[f"{at}.input_{'global_' if divide else ''}scale"] = 1 / value if divide else value
            tensors |= {f"{at}.{name_of_all}": torch.tensor(1e4 if divide else 1e-4)} if name_of_all else {}
    save_file(tensors, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return check(folder)


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({}, []),
        ({"1.gate_proj": 0.05, "1.up_proj": 0.05}, []),
        ({"1.gate_proj": 0.05}, [("values.input-scale-split", "error")]),
        ({"1.up_proj": 0.05}, [("values.input-scale-split", "warning")]),
        ({"1.gate_proj": 0.02, "2.gate_proj": 0.05, "2.up_proj": 0.05}, [("values.input-scale-split", "warning")]),
        ({"1.down_proj": 5.0}, [("values.input-scale-spread", "warning")]),
    ],
)
def test_input_scales_of_experts(tmp_path: Path, inputs: dict[str, float], expected: list[tuple[str, str]]) -> None:
    """vLLM keeps the one of gate and up that it loads last, then the largest of all experts."""
    assert [(f.code, f.severity) for f in experts(tmp_path, inputs)] == expected


SPLIT, SPREAD = [("values.input-scale-split", "warning")], [("values.input-scale-spread", "warning")]


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({}, []),
        ({"1.gate_proj": 0.05}, SPLIT),
        ({"1.up_proj": 0.002}, SPLIT),
        ({"1.down_proj": 0.0001, "2.down_proj": 0.05}, []),
        ({"1.gate_proj": 5.0, "1.up_proj": 5.0}, SPREAD),
        ({"1.gate_proj": 5.0}, [*SPLIT, *SPREAD]),
    ],
)
def test_input_scales_of_experts_in_nvfp4(tmp_path: Path, inputs: dict[str, float], expected: list[tuple[str, str]]) -> None:
    """vLLM keeps those of gate and up both, and takes the largest of all experts, of divisors the smallest."""
    for name_of_all, divide in (("weight_scale_2", False), ("weight_global_scale", True)):
        assert [(f.code, f.severity) for f in experts(tmp_path, inputs, name_of_all, divide)] == expected


# --- memory ---

RUN = """
import resource, sys
from ckptq.cli import main
sys.argv = ["ckptq", "validate", *sys.argv[1:]]
try:
    code = main()
except SystemExit as ended:
    code = ended.code
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print("\\nresult", code, peak, *sorted({"torch", "numpy", "transformers", "modelopt"} & set(sys.modules)))
"""


def run(*arguments: str) -> list[str]:
    """[exit code, peak RSS in bytes, heavy modules that were imported ...] of `ckptq validate` in a process of its own.

    The process is started by a small one: a child counts as large as what it was forked from.
    """
    shell = ["/bin/sh", "-c", '"$@"; true', "sh", sys.executable, "-c", RUN, *arguments]
    done = subprocess.run(shell, capture_output=True, text=True, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    lines = [line for line in done.stdout.splitlines() if line.startswith("result ")]
    assert lines, done.stdout + done.stderr
    return lines[-1].split()[1:]


@pytest.mark.parametrize("shard_size", ["5GB", "300GB"])
def test_the_layout_of_a_72b_takes_neither_torch_nor_memory(tmp_path: Path, shard_size: str) -> None:
    source = make_checkpoint(tmp_path / "source", **PRESETS["72b"])
    folder = make_quantized(source, tmp_path / "out", f"export.shard_size={shard_size}", sparse=True)
    assert (folder / "model.safetensors.index.json").exists() == (shard_size == "5GB")
    code_, peak, *modules = run(str(folder), "--no-values")
    assert code_ == "0"
    assert modules == []
    assert int(peak) < 100e6


def test_a_pass_over_large_files_takes_little_memory(tmp_path: Path) -> None:
    """Ten times what it may take, in holes, which read as zeros; it finds them, and looks at the weights under zero scales."""
    shape = {"hidden": 4096, "intermediate": 14336, "heads": 32, "kv_heads": 8, "vocab": 65536, "vision_depth": 2}
    source = make_checkpoint(tmp_path / "source", layers=6, **shape, sparse=True)
    folder = make_quantized(source, tmp_path / "out", "export.shard_size=2GB", sparse=True)
    assert sum(p.stat().st_size for p in folder.glob("*.safetensors")) > 2e9
    code_, peak, *modules = run(str(folder))
    assert code_ == "1"
    assert modules == ["numpy"]
    assert int(peak) < 400e6
