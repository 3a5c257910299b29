"""Every scheme against a slow reference: scale rules written out in numpy, codes looked up among all numbers, in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptq.numerics import Desk, e2m1, find_numerics, fp8, mx
from ckptq.schemes import SCHEMES, Scheme
from ckptq.tensors import TORCH_DTYPES

BF16 = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
FINITE = BF16[torch.isfinite(BF16)]
FLOATS = [torch.bfloat16, torch.float16, torch.float32]
E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E4M3 = np.array([c / 8 * 2.0**-6 if c < 8 else (1 + c % 8 / 8) * 2.0 ** (c // 8 - 7) for c in range(0x7F)])
INT8 = np.arange(128.0)
ONE_SCALE = [name for name in SCHEMES if name != "mxfp4-dualscale"]
"""Those with one scale beside the codes; the other one is in test_omni_exporters.py."""
SIZES = {"fp8": E4M3, "int8": INT8, "nvfp4": E2M1, "mxfp8": E4M3, "mxfp4": E2M1}

Encoded = tuple[torch.Tensor, torch.Tensor | None]


def encode(scheme: Scheme, values: torch.Tensor, whole: float | None, desk: Desk | None = None) -> Encoded:
    """Codes and local scales from ckptq, in buffers full of rubbish."""
    shape = (values.shape[0], values.shape[1])
    spec = scheme.codes_spec("", shape)
    codes = torch.full(spec.shape, 0x55, dtype=torch.uint8).view(TORCH_DTYPES[spec.dtype])
    scales = torch.full(scheme.scale_shape(shape), 99.0).to(TORCH_DTYPES[scheme.scale]) if scheme.scale else None
    find_numerics(scheme).encode(values, scheme, whole, codes, scales, desk or Desk())
    return codes, scales


def decode(scheme: Scheme, encoded: Encoded, whole: float | None) -> np.ndarray:
    return find_numerics(scheme).decode(encoded[0], scheme, whole, encoded[1]).double().numpy()


def whole_of(scheme: Scheme, values: torch.Tensor) -> float | None:
    return fp8.scale(float(values.float().abs().max()), scheme.limit) if scheme.limit else None


def nearest(sizes: np.ndarray, quotients: np.ndarray) -> np.ndarray:
    """The index of the value nearest to each |quotient|, of two at one distance the even one."""
    size = np.minimum(np.abs(quotients), sizes[-1])
    above = np.clip(np.searchsorted(sizes, size), 1, len(sizes) - 1)
    low, high = size - sizes[above - 1], sizes[above] - size
    return np.where((low < high) | ((low == high) & (above % 2 == 1)), above - 1, above)


def reference(scheme: Scheme, values: torch.Tensor, whole: float | None) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """(signed numbers before scaling, local scales, multipliers), float64 [r, k], [..] as stored, [r, k]."""
    source = values.float().numpy()
    r, k = source.shape
    rows, columns = scheme.rows or r, scheme.columns or k
    if scheme.scale is None:
        assert whole is not None
        scales, wide = None, np.full((r, k), np.float32(whole))
    else:
        down, across = scheme.scale_shape((r, k))
        tops = np.array(
            [
                [np.abs(source[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]).max() for j in range(across)]
                for i in range(down)
            ]
        )
        scales, multipliers = local(scheme, source, tops.astype(np.float32), whole)
        wide = np.repeat(np.repeat(multipliers, rows, 0)[:r], columns, 1)[:, :k]
    # NVFP4's smallest scales of a tensor of subnormals are 0 together: so are the codes.
    quotients = np.divide(source, wide, out=np.zeros_like(source), where=wide > 0).astype(np.float64)
    if scheme.numerics == "int8":
        return np.clip(np.rint(quotients), -128, 127), scales, wide.astype(np.float64)
    sizes = SIZES[scheme.numerics]
    numbers = np.copysign(sizes[nearest(sizes, quotients)], source)
    return numbers, scales, wide.astype(np.float64)


def local(scheme: Scheme, source: np.ndarray, tops: np.ndarray, whole: float | None) -> tuple[np.ndarray, np.ndarray]:
    """(local scales, as stored or as what the stored stands for; what they multiply with), float32."""
    if scheme.scale == "F32":
        found = tops / np.float32({"fp8": 448, "int8": 127.5}[scheme.numerics])
        found[found == 0] = 1
        return found, found
    if scheme.numerics == "nvfp4":
        assert whole is not None
        exact = np.clip(tops / np.float32(6 * whole), np.float32(2.0**-9), np.float32(448))
        first = nearest(E4M3, exact.astype(np.float64))
        second = np.clip(np.where(E4M3[first] <= exact, first + 1, first - 1), 7, 0x7E)
        worse = nvfp4_errors(source, second, whole) < nvfp4_errors(source, first, whole)
        scales = E4M3[np.where(worse, second, first)].astype(np.float32)
        return scales, scales * np.float32(whole)
    largest, limit = {"mxfp8": (2.0**8, 464.0), "mxfp4": (2.0**2, 7.0)}[scheme.numerics]
    exponents = np.full(tops.shape, -126)
    for exponent in range(-126, 128):  # the least under which the group's largest is not above the limit
        exponents[tops.astype(np.float64) / 2.0**exponent > limit] = min(exponent + 1, 127)
    assert limit / largest < 2
    return (exponents + 127).astype(np.float32), np.exp2(exponents.astype(np.float32))


def nvfp4_errors(source: np.ndarray, chosen: np.ndarray, whole: float) -> np.ndarray:
    """Squared errors under E4M3 scales, in 1 / 32 of the quotients."""
    scales = E4M3[chosen].astype(np.float32)
    divisors = (scales * np.float32(whole) * np.float32(1 / 32))[:, :, None]
    groups = np.abs(source).reshape(*chosen.shape, 16)
    # Bytes: what is 8 or more, which happens only under the least scale of all, counts too little and leaves it in place.
    fixed = np.rint(np.divide(groups, divisors, out=np.zeros_like(groups), where=divisors > 0)) % 256
    distances = np.abs(fixed[..., None] - 32 * np.append(E2M1, 8.0)).min(-1)
    return (distances**2).sum(-1).astype(np.float32) * scales * scales


def unpacked(codes: torch.Tensor, scheme: Scheme) -> np.ndarray:
    """The numbers of stored codes, by table."""
    if scheme.codes == "I8":
        return codes.double().numpy()
    stored = codes.view(torch.uint8).numpy()
    if scheme.packed == 2:
        stored = np.stack([stored & 15, stored >> 4], -1).reshape(len(stored), -1)
        return np.where(stored & 8, -1.0, 1.0) * E2M1[stored & 7]
    return np.where(stored & 128, -1.0, 1.0) * E4M3[stored & 127]


def check(scheme: Scheme, values: torch.Tensor) -> None:
    """Codes and scales are the reference's, signs of zeros too, and decode gives number * scale."""
    whole = whole_of(scheme, values)
    codes, scales = encode(scheme, values, whole)
    numbers, expected, wide = reference(scheme, values, whole)
    if scales is not None:
        np.testing.assert_array_equal(scales.float().numpy(), expected)
    found = unpacked(codes, scheme)
    np.testing.assert_array_equal(found, numbers)
    if scheme.codes != "I8":
        np.testing.assert_array_equal(np.signbit(found), np.signbit(numbers))
    np.testing.assert_array_equal(decode(scheme, (codes, scales), whole), (numbers * wide).astype(np.float32))


@st.composite
def weights(draw: st.DrawFn, scheme: Scheme) -> torch.Tensor:
    """[r, k] of any float type: octaves from the smallest to the largest in one tensor, zeros, whole groups of zeros."""
    unit = {"nvfp4": 16, "mxfp8": 32, "mxfp4": 32}.get(scheme.numerics, 1)
    r, k = draw(st.integers(1, 300 if scheme.rows == 128 else 5)), draw(st.integers(1, 300 // unit)) * unit
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from([0.0, 3.0, 30.0]))
    center = draw(st.sampled_from([0.0, -120.0, -140.0, 10.0, 100.0]))
    values = torch.randn(r, k, generator=generator, dtype=torch.float64)
    values *= torch.exp2(center + spread * torch.randn(r, k, generator=generator, dtype=torch.float64))
    values[:, draw(st.integers(0, k)) :][: draw(st.integers(0, r))] = 0
    dtype = draw(st.sampled_from(FLOATS))
    top = torch.finfo(dtype).max / 2  # -128 * (amax / 127.5) is more than the amax
    return values.clamp(-top, top).to(dtype)


@pytest.mark.parametrize("name", ONE_SCALE)
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_codes_and_scales_are_the_references(name: str, data: st.DataObject) -> None:
    check(SCHEMES[name], data.draw(weights(SCHEMES[name])))


@pytest.mark.parametrize("name", ONE_SCALE)
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_bands_give_what_the_whole_gives(name: str, data: st.DataObject) -> None:
    """Any bands of whole rows of scales, one after another over the same scratch, in any order."""
    scheme = SCHEMES[name]
    values = data.draw(weights(scheme))
    whole = whole_of(scheme, values)
    codes, scales = encode(scheme, values, whole)
    step = scheme.rows or 1
    cuts = sorted({0, len(values), *(c * step for c in data.draw(st.lists(st.integers(1, 4))) if c * step < len(values))})
    desk = Desk()
    for top, bottom in data.draw(st.permutations(list(itertools.pairwise(cuts)))):
        part, local_part = encode(scheme, values[top:bottom], whole, desk)
        assert torch.equal(part.view(torch.uint8), codes[top:bottom].view(torch.uint8))
        if scales is not None and local_part is not None:
            here = scales[top // step : -(-bottom // step)]
            assert torch.equal(local_part.view(torch.uint8), here.view(torch.uint8))


@pytest.mark.parametrize("significand", [1.0, 1.3125, 1.5, 1.7421875, 1.75, 1.7578125, 1.8125, 1.8203125, 1.9921875])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp8", "mxfp4", "fp8-dynamic", "int8"])
def test_every_bf16_pattern_in_every_place(name: str, significand: float) -> None:
    """All patterns up to an amax, in groups that it leads: exact for the float32 quotient."""
    scheme = SCHEMES[name]
    columns = scheme.columns or 32
    fits = FINITE[(FINITE.abs() <= significand) & (FINITE.abs() > 2.0**-12)]
    inner = torch.nn.functional.pad(fits, (0, -len(fits) % (columns - 1))).view(-1, columns - 1)
    check(scheme, torch.cat([torch.full((len(inner), 1), significand, dtype=torch.bfloat16), inner], 1))


@pytest.mark.parametrize("name", ONE_SCALE)
def test_wide_rows_come_in_pieces(name: str) -> None:
    """A row of blocks wider than the scratch, a last block that is no whole one, in both directions."""
    generator = torch.Generator().manual_seed(3)
    wide = torch.randn(2, 9 * 1024, generator=generator).bfloat16()
    check(SCHEMES[name], wide)
    if name == "fp8-block":
        check(SCHEMES[name], torch.randn(130, 8 * 1024 + 130, generator=generator).bfloat16())


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
def test_no_other_exponent_is_better_where_peers_choose_another(name: str) -> None:
    """Every amax of two octaves: the error is at most that of the ceiling (ModelOpt) and of 1.75 (compressed-tensors)."""
    scheme = SCHEMES[name]
    emax, sizes = {"mxfp4": (2, E2M1), "mxfp8": (8, E4M3)}[name]
    leads = FINITE[(FINITE >= 1) & (FINITE < 4)].double()
    # Down to what is subnormal under the larger scale of two.
    below = torch.exp2(-18 * torch.rand(len(leads), 31, generator=torch.Generator().manual_seed(4), dtype=torch.float64))
    values = torch.cat([leads[:, None], leads[:, None] * below], 1).bfloat16()
    ours = decode(scheme, encode(scheme, values, None), None)
    source = values.double().numpy()
    tops = source[:, 0]
    ceiling = np.ceil(np.log2(tops / sizes[-1]))
    rounded = np.floor(np.log2(tops)) + (tops / np.exp2(np.floor(np.log2(tops))) >= 1.75) - emax
    errors = ((ours - source) ** 2).sum(1)
    for exponents in (ceiling, rounded):
        wide = np.exp2(exponents)[:, None]
        theirs = np.copysign(sizes[nearest(sizes, source / wide)], source) * wide
        assert np.all(errors <= ((theirs - source) ** 2).sum(1))
        assert np.any(ours != theirs)


def test_nvfp4_takes_the_better_scale_of_two() -> None:
    """The squared error is an eighth smaller than with the nearest, and no scale is further off than the other neighbor."""
    scheme = SCHEMES["nvfp4"]
    values = torch.randn(64, 1024, generator=torch.Generator().manual_seed(5)).bfloat16()
    whole = whole_of(scheme, values)
    assert whole is not None
    encoded = encode(scheme, values, whole)
    source = values.double().numpy()
    exact = np.abs(source).reshape(64, -1, 16).max(-1) / (6 * whole)
    first = nearest(E4M3, exact)
    wide = np.repeat(E4M3[first] * whole, 16, 1)
    simple = np.copysign(E2M1[nearest(E2M1, source / wide)], source) * wide
    assert ((decode(scheme, encoded, whole) - source) ** 2).sum() < 0.88 * ((simple - source) ** 2).sum()
    assert encoded[1] is not None
    steps = encoded[1].view(torch.uint8).numpy().astype(int) - first
    assert set(np.unique(steps)) == {-1, 0, 1}
    assert np.all(np.where(steps > 0, E4M3[first] <= exact, True) & np.where(steps < 0, E4M3[first] >= exact, True))


def test_int8_reaches_the_last_codes_and_no_further() -> None:
    values = torch.tensor([[1.0, -1.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0], [-3.0, 2.9921875, 0.0078125, -0.0]]).bfloat16()
    codes, scales = encode(SCHEMES["int8"], values, None)
    assert codes.tolist() == [[127, -127, 64, 0], [0, 0, 0, 0], [-128, 127, 0, 0]]
    assert scales is not None
    assert scales[:, 0].tolist() == [float(np.float32(1) / np.float32(127.5)), 1.0, float(np.float32(3) / np.float32(127.5))]


def test_nvfp4_groups_too_small_for_a_scale() -> None:
    """A group of a ten-millionth of the amax keeps the least scale and zeros for codes; NaN and infinity come from nothing."""
    values = torch.zeros(1, 48)
    values[0, 0], values[0, 16:32] = 1.0, torch.linspace(-1e-7, 1e-7, 16)
    whole = whole_of(SCHEMES["nvfp4"], values)
    codes, scales = encode(SCHEMES["nvfp4"], values, whole)
    assert scales is not None
    assert scales.view(torch.uint8).tolist() == [[0x7E, 0x01, 0x01]]
    assert set(codes[0, 8:].tolist()) == {0x00, 0x88}
    assert np.isfinite(decode(SCHEMES["nvfp4"], (codes, scales), whole)).all()


def test_the_first_code_is_in_the_low_nibble() -> None:
    values = torch.zeros(1, 32)
    values[0, :4] = torch.tensor([6.0, -0.5, 1.5, 3.0])
    codes, scales = encode(SCHEMES["mxfp4"], values, None)
    assert codes[0, :3].tolist() == [0x97, 0x53, 0x00]
    assert scales is not None
    assert scales.tolist() == [[127]]


def test_every_code_is_read_as_its_number() -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    numbers = fp8.numbers(codes.view(torch.float8_e4m3fn))
    np.testing.assert_array_equal(numbers.numpy(), codes.view(torch.float8_e4m3fn).float().numpy())
    assert numbers.isnan().nonzero().flatten().tolist() == [0x7F, 0xFF]
    pairs = e2m1.unpack(codes[None])[0].view(-1, 2)
    signed = np.concatenate([E2M1, -E2M1])
    np.testing.assert_array_equal(pairs[:, 0].numpy(), np.tile(signed, 16))
    np.testing.assert_array_equal(pairs[:, 1].numpy(), np.repeat(signed, 16))
    assert mx.powers(codes).double().tolist() == [2.0 ** (byte - 127) for byte in range(255)] + [float("inf")]
