"""FP8 E4M3 under one scale a tensor, against a table of its values that is built here from the format's definition."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptq.numerics import Desk, fp8
from ckptq.schemes import SCHEMES


def value_of(code: int) -> float:
    """The value of an E4M3 code: sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinity, 0x7f is NaN."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = code >> 3 & 0xF, code & 7
    if exponent == 0xF and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


CODES = np.arange(0x7F)
VALUES = np.array([value_of(c) for c in CODES])
BF16 = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
SCALES = [1.0, 2.0**-126, 3e-39, 0.007, 1 / 3, fp8.scale(3.0), fp8.scale(0.0123), fp8.scale(7.0), fp8.scale(448.0), 2.0**100]


def nearest_code(quotients: np.ndarray) -> np.ndarray:
    """The code nearest to each float64 quotient, the even one of two at the same distance."""
    magnitude = np.minimum(np.abs(quotients), 448.0)
    above = np.clip(np.searchsorted(VALUES, magnitude), 1, 0x7E)
    low, high = magnitude - VALUES[above - 1], VALUES[above] - magnitude
    code = np.where((low < high) | ((low == high) & (CODES[above - 1] % 2 == 0)), above - 1, above)
    return np.where(np.signbit(quotients), code | 0x80, code).astype(np.uint8)


def encode(values: torch.Tensor, scale: float) -> np.ndarray:
    out = torch.empty((1, len(values)), dtype=torch.float8_e4m3fn)
    fp8.encode(values[None], SCHEMES["fp8"], scale, out, None, Desk())
    return out[0].view(torch.uint8).numpy()


def test_the_table_is_that_of_the_format() -> None:
    assert (VALUES[0], VALUES[1], VALUES[8], VALUES[0x38], VALUES[0x7E]) == (0.0, 2.0**-9, 2.0**-6, 1.0, 448.0)
    assert np.all(np.diff(VALUES) > 0)


@pytest.mark.parametrize("scale", SCALES)
def test_every_bf16_pattern_gets_the_nearest_code(scale: float) -> None:
    """All 65,536 patterns that fit the scale: exact for the float32 quotient, and within its rounding of the true one."""
    scale = float(np.float32(scale))
    exact = BF16.double().numpy()
    fits = np.isfinite(exact) & (np.abs(exact) <= 448 * scale)
    assert fits.sum() > 2
    codes = encode(BF16[torch.from_numpy(fits)], scale)
    quotients = (exact[fits].astype(np.float32) / np.float32(scale)).astype(np.float64)
    np.testing.assert_array_equal(codes, nearest_code(quotients))
    true = exact[fits] / scale
    nearest = np.array([value_of(c) for c in range(256)])[nearest_code(true)]
    chosen = np.array([value_of(c) for c in range(256)])[codes]
    assert np.all(np.abs(chosen - true) <= np.abs(nearest - true) + np.abs(true) * 2.0**-23)


def test_division_is_float32s_own() -> None:
    """For every mantissa of an amax, all values of the 8 octaves below: a multiplication by 1 / scale would miss ties."""
    values = BF16[(BF16 >= 2.0**-8) & (BF16 <= 2.0)]
    for amax in (1 + np.arange(128) / 128).tolist():
        scale = fp8.scale(amax)
        below = values[values <= amax]
        quotients = below.float().numpy() / np.float32(scale)
        np.testing.assert_array_equal(encode(below, scale), nearest_code(quotients.astype(np.float64)))


def test_every_bf16_amax_becomes_the_largest_code() -> None:
    """Whatever the rounding of amax / 448, the amax itself is 448: never NaN, never 416."""
    values = BF16[torch.isfinite(BF16) & (BF16 > 0)].float().numpy()
    scales = np.array([fp8.scale(float(value)) for value in values], dtype=np.float32)
    assert np.all(scales > 0)
    quotients = (values / scales).astype(np.float64)
    assert np.all(nearest_code(quotients) == 0x7E)
    assert np.all(quotients < 464), "would round to NaN"


@pytest.mark.parametrize("value", [3.0, 0.0123, 448.0, 1e-30, 65504.0])
def test_the_amax_and_its_negative_saturate_exactly(value: float) -> None:
    values = torch.tensor([value, -value, value / 2, 0.0, -0.0], dtype=torch.float32)
    codes = encode(values, fp8.scale(float(values[0])))
    assert codes.tolist()[:2] == [0x7E, 0xFE]
    assert codes.tolist()[3:] == [0x00, 0x80]


def test_zeros() -> None:
    assert fp8.scale(0.0) == 1.0
    assert fp8.amax(torch.zeros(7, dtype=torch.bfloat16)) == 0.0
    assert encode(torch.zeros(7, dtype=torch.bfloat16), fp8.scale(0.0)).tolist() == [0] * 7


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, -1e-45])
def test_no_scale_for_what_is_no_amax(value: float) -> None:
    with pytest.raises(ValueError, match="finite and not negative"):
        fp8.scale(value)


@given(st.floats(2.0**-110, 2.0**127, width=32))
def test_a_scale_is_the_float32_quotient(value: float) -> None:
    assert fp8.scale(value) == float(np.float32(value) / np.float32(448))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 500, 999])
def test_amax_tells_of_nan_and_infinity(dtype: torch.dtype, bad: float, at: int) -> None:
    values = torch.linspace(-1, 2, 1000).to(dtype)
    assert fp8.amax(values) == 2.0
    values[at] = bad
    found = fp8.amax(values)
    assert math.isnan(found) if math.isnan(bad) else found == math.inf


def test_amax_of_negatives() -> None:
    assert fp8.amax(torch.tensor([[-3.0, 2.0], [1.0, -0.5]])) == 3.0


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(-100, 100, width=16), min_size=1, max_size=50),
    cuts=st.lists(st.integers(0, 50), max_size=4),
    scale=st.floats(0.25, 8.0, width=32),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_pieces_give_what_the_whole_gives(values: list[float], cuts: list[int], scale: float, dtype: torch.dtype) -> None:
    whole = torch.tensor(values, dtype=dtype)
    bounds = sorted({0, len(values), *(c for c in cuts if c < len(values))})
    pieces = [whole[a:b] for a, b in itertools.pairwise(bounds)]
    assert np.concatenate([encode(piece, scale) for piece in pieces]).tolist() == encode(whole, scale).tolist()
    assert max(fp8.amax(piece) for piece in pieces) == fp8.amax(whole)
