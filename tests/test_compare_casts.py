"""What flows, in FP8 and back; sums over it; and the room for it: ckptq/compare/{casts,tally,room}.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make_checkpoint import make_checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ckptq import cost
from ckptq.compare import casts
from ckptq.compare.again import round_again
from ckptq.compare.attended import Attention, attended, replaced
from ckptq.compare.casts import through_fp8
from ckptq.compare.room import waiting_room
from ckptq.compare.sides import open_side
from ckptq.compare.tally import Tally, gap, squares
from ckptq.errors import RecipeError
from ckptq.numerics import Desk, find_numerics
from ckptq.schemes import SCHEMES
from ckptq.tensors import TORCH_DTYPES

EVERY = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
FINITE = EVERY[torch.isfinite(EVERY)]


def in_codes(values: torch.Tensor, scale: float | None) -> torch.Tensor:
    """The same by way of codes, as ckptq/numerics makes and reads them."""
    scheme = SCHEMES["fp8-dynamic" if scale is None else "fp8"]
    rows = values if scale is None else values.float().clamp(-448 * scale, 448 * scale)
    codes = torch.empty(rows.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(scheme.scale_shape(rows.shape), dtype=TORCH_DTYPES[scheme.scale]) if scheme.scale else None
    numerics = find_numerics(scheme)
    numerics.encode(rows, scheme, scale, codes, scales, Desk())
    return numerics.decode(codes, scheme, scale, scales).to(values.dtype)


@settings(max_examples=30, deadline=None)
@given(st.floats(2.0**-40, 2.0**20, width=32))
def test_under_one_scale_each_bf16_number_is_what_its_code_says(scale: float) -> None:
    assert torch.equal(through_fp8(FINITE[None], scale), in_codes(FINITE[None], scale))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from((torch.bfloat16, torch.float16, torch.float32)), st.floats(-8, 8))
def test_under_a_scale_a_row_too(seed: int, dtype: torch.dtype, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(7, 130, generator=generator) * torch.exp2(torch.randn(7, 130, generator=generator) * spread)
    values[2] = 0
    values = values.clamp(-6e4, 6e4).to(dtype)
    assert torch.equal(through_fp8(values, None), in_codes(values, None))


def test_pieces_and_shapes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(2, 3, 50, 64).bfloat16().transpose(1, 2)
    whole = [through_fp8(values, scale) for scale in (None, 0.01)]
    monkeypatch.setattr(casts, "PIECE", 200)
    assert all(torch.equal(through_fp8(values, scale), found) for scale, found in zip((None, 0.01), whole, strict=True))
    assert whole[0].shape == values.shape
    odd = torch.tensor([[float("nan"), 1.0, float("inf")]])
    assert through_fp8(odd, 1.0).nan_to_num(nan=-1).tolist() == [[-1, 1, 448]]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(1e-4, 1))
def test_sums_are_those_of_float64(seed: int, noise: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    one = torch.randn(3, 1, 700, generator=generator)
    two = (one + noise * torch.randn(3, 1, 700, generator=generator)).bfloat16()
    one = one.bfloat16()
    r, c = one.double().flatten(), two.double().flatten()
    wanted = torch.stack([((c - r) ** 2).sum(), (r**2).sum(), (c**2).sum(), (r * c).sum()])
    assert torch.allclose(squares(one, two), wanted, rtol=1e-5)
    tally = Tally()
    for part, other in zip(one, two, strict=True):
        tally.add(0, "", part, other)
        tally.enter(part, other)
    assert tally.layers()[0].hidden.relative_l2 == pytest.approx(gap(*wanted.tolist()).relative_l2, rel=1e-5)
    assert tally.entering() == tally.layers()[0].hidden


def test_stand_ins_for_attention_lie_in_one_another() -> None:
    """What was there before comes back, after an error, too, and the library's own in the end."""
    plain, calls = ALL_ATTENTION_FUNCTIONS["sdpa"], list[str]()

    def named(name: str) -> Callable[[Attention], Attention]:
        return lambda function: lambda *args: function(*args, calls.append(name))

    with replaced(["sdpa"], named("first")):
        first = ALL_ATTENTION_FUNCTIONS["sdpa"]
        with pytest.raises(TypeError), attended(), replaced(["sdpa"], named("last")):
            ALL_ATTENTION_FUNCTIONS["sdpa"](None, *torch.zeros(3), *range(9))  # more than it takes
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is first
    assert calls == ["last", "first"]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is plain


def test_a_limit_leaves_room_for_samples_or_says_what_it_takes(tmp_path: Path) -> None:
    cpu, sizes = torch.device("cpu"), {"hidden": 1024, "intermediate": 4096, "heads": 8, "kv_heads": 2, "vocab": 4096}
    vision = {"vision_depth": 1, "vision_hidden": 64, "vision_heads": 1, "vision_intermediate": 64}
    model = make_checkpoint(tmp_path / "model", layers=2, **sizes, **vision, sparse=True)
    with open_side(model, cpu) as one, open_side(model, cpu) as other:
        sides = one, other
        waiting_room(sides, 4, 512, None, cpu)
        assert one.model.ahead == other.model.ahead == 1
        with pytest.raises(RecipeError, match="--memory 1 MB: too little") as error:
            waiting_room(sides, 4, 512, 10**6, cpu)
        assert error.value.hint is not None
        least = int(error.value.hint.split("MB")[0].split()[-1]) * 10**6
        room = waiting_room(sides, 4, 512, least, cpu)
        assert one.model.ahead == other.model.ahead == 0
        more = waiting_room(sides, 4, 512, least + 10**9, cpu)
        assert one.model.ahead == 1
        sample, _ = cost.flowing(one.component, one.scope, 512)
        assert 2 * sample <= room < 2 * sample + 10**6
        assert room + 10**9 - more == one.model.layer_bytes + other.model.layer_bytes


def test_a_shard_under_a_scale_of_zero_is_zero() -> None:
    """vLLM 0.32.0 quantization/utils/w8a8_utils.py requantize_with_max_scale multiplies by it, and never divides."""
    assert torch.equal(round_again(torch.zeros(4), (0.0, 0.5)), torch.zeros(4))


def test_of_nan_no_angle_is_known() -> None:
    assert math.isnan(gap(math.nan, 1.0, math.nan, math.nan).cosine)
    assert (gap(0.0, 1.0, 1.0, 1.0 + 1e-12).cosine, gap(4.0, 1.0, 1.0, -1.0 - 1e-12).cosine) == (1.0, -1.0)
