"""What only the source can tell of INT8, NVFP4, MXFP8 and MXFP4: encoders of the test's own, and what each fault is called."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ckptq.checkpoint import read_inventory
from ckptq.quantized import dense
from ckptq.scopes import find_scope
from ckptq.validators import Finding, passthrough, rounding

WEIGHTS = "model.safetensors"
OUT, OTHER, GATE = "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj", "model.layers.0.mlp.gate_proj"
TEXT = {"num_hidden_layers": 2, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 256, "vocab_size": 16}
CONFIG = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "text_config": TEXT, "vision_config": {"depth": 1}}
Tensors = dict[str, torch.Tensor]
Encoder = Callable[[torch.Tensor], Tensors]
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def weight(seed: int, rows: int = 256, columns: int = 256) -> torch.Tensor:
    """Rows and columns of unlike size, so that no group is like another."""
    random = torch.Generator().manual_seed(seed)
    sizes = 2.0 ** -torch.rand(rows, 1, generator=random).mul(6) * 2.0 ** -torch.rand(1, columns, generator=random).mul(3)
    return (torch.randn(rows, columns, generator=random) * sizes * 0.05).bfloat16()


# --- encoders, from the formats' definitions ---


def groups(w: torch.Tensor, wide: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights [n, k / wide, wide], the amax of each)."""
    parts = w.float().view(len(w), -1, wide)
    return parts, parts.abs().amax(2)


def fp4(x: torch.Tensor) -> torch.Tensor:
    """Packed codes [n, k / 2] of quotients [n, groups, wide]."""
    nearest = (x.abs()[..., None] - FP4).abs().argmin(-1).to(torch.uint8)
    codes = (nearest | torch.signbit(x).to(torch.uint8) << 3).view(len(x), -1)
    return codes[:, ::2] | codes[:, 1::2] << 4


def nvfp4(w: torch.Tensor) -> Tensors:
    parts, amax = groups(w, 16)
    whole = amax.max() / 2688
    local = (amax / 6 / whole).clamp(2**-9, 448).to(torch.float8_e4m3fn)
    return {"weight": fp4(parts / (local.float() * whole)[..., None]), "weight_scale": local, "weight_scale_2": whole}


def nvfp4_divided(w: torch.Tensor) -> Tensors:
    """As compressed-tensors spells it, with the quotients in BF16."""
    parts, amax = groups(w, 16)
    divisor = 2688 / amax.max()
    local = (amax.bfloat16() / 6 * divisor).clamp(2**-9, 448).to(torch.float8_e4m3fn)
    codes = fp4((parts.bfloat16() / (local.float() / divisor).bfloat16()[..., None]).float())
    return {"weight_packed": codes, "weight_scale": local, "weight_global_scale": divisor.view(1)}


def exponents(amax: torch.Tensor, divisor: float, way: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return (way(torch.log2(amax / divisor)).clamp(-127, 127).nan_to_num(-127) + 127).to(torch.uint8)


def mxfp8(w: torch.Tensor, divisor: float, way: Callable[[torch.Tensor], torch.Tensor]) -> Tensors:
    parts, amax = groups(w, 32)
    stored = exponents(amax, divisor, way)
    codes = (parts / 2.0 ** (stored.float() - 127)[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": codes.view(w.shape), "weight_scale": stored}


def mxfp8_up(w: torch.Tensor) -> Tensors:
    """As ModelOpt does it: nothing is cut off."""
    return mxfp8(w, 448, torch.ceil)


def mxfp8_down(w: torch.Tensor) -> Tensors:
    """As the OCP's specification does it: up to 512 falls to 448."""
    return mxfp8(w, 256, torch.floor)


def mxfp4(w: torch.Tensor) -> Tensors:
    """The same: up to 8 falls to 6."""
    parts, amax = groups(w, 32)
    stored = exponents(amax, 4, torch.floor)
    return {"weight_packed": fp4(parts / 2.0 ** (stored.float() - 127)[..., None]), "weight_scale": stored}


def int8(w: torch.Tensor) -> Tensors:
    scale = w.float().abs().amax(1, keepdim=True) / 127
    return {"weight": (w.float() / scale).round().to(torch.int8), "weight_scale": scale}


def int8_in_bf16(w: torch.Tensor) -> Tensors:
    """As llm-compressor does it: 127.5 steps to a side, and -128 is a code."""
    scale = (w.abs().amax(1, keepdim=True).float() / 127.5).bfloat16()
    return {"weight": (w.bfloat16() / scale).round().clamp(-128, 127).to(torch.int8), "weight_scale": scale}


ENCODERS = (nvfp4, nvfp4_divided, mxfp8_up, mxfp8_down, mxfp4, int8, int8_in_bf16)
PACKED = (nvfp4, nvfp4_divided, mxfp4)
GROUPED = (nvfp4, nvfp4_divided, mxfp8_up, mxfp4)


def encoded(tensors: Tensors, encoder: Encoder) -> Tensors:
    """Every projection in codes and scales, the rest as it is."""
    made: Tensors = {}
    for name, t in tensors.items():
        if name.endswith("_proj.weight"):
            made |= {f"{name.removesuffix('weight')}{leaf}": value for leaf, value in encoder(t).items()}
        else:
            made[name] = t.clone()
    return made


def source() -> Tensors:
    return {f"{m}.weight": weight(i) for i, m in enumerate((OUT, OTHER, GATE))} | {"model.norm.weight": torch.ones(256).bfloat16()}


def folder(path: Path, tensors: Tensors, config: dict[str, Any] = CONFIG) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({name: t.clone().contiguous() for name, t in tensors.items()}, path / WEIGHTS)
    return path


def check(tmp: Path, after: Tensors, before: Tensors | None = None, **options: Any) -> list[Finding]:
    output = read_inventory(folder(tmp / "after", after))
    original = read_inventory(folder(tmp / "before", source() if before is None else before))
    return list(passthrough.check(output, original, find_scope(CONFIG), **options))


def found(findings: list[Finding]) -> str:
    assert {(f.code, f.severity) for f in findings} == {("passthrough.weight-error", "error")}, findings
    return findings[0].found


def codes_of(tensors: Tensors) -> torch.Tensor:
    """o_proj's codes, as bytes."""
    return tensors.get(f"{OUT}.weight_packed", tensors.get(f"{OUT}.weight", torch.empty(0))).view(torch.uint8)


# --- right ones ---


@pytest.mark.parametrize("encoder", ENCODERS)
def test_what_was_rounded_once_is_right(tmp_path: Path, encoder: Encoder) -> None:
    after = encoded(source(), encoder)
    assert check(tmp_path, after) == []
    assert check(tmp_path, after, sample=True) == []


@pytest.mark.parametrize("encoder", ENCODERS)
def test_weights_of_every_size_are_right(tmp_path: Path, encoder: Encoder) -> None:
    """Outliers push whole groups to the smallest scales there are, and below."""
    w = torch.randn(64, 512, generator=torch.Generator().manual_seed(5)) * 10.0 ** torch.linspace(-9, 2, 512)
    w = w.bfloat16()
    w[3], w[:, 64:96] = 0, 0
    assert check(tmp_path, encoded({f"{OUT}.weight": w}, encoder), {f"{OUT}.weight": w}) == []


@pytest.mark.parametrize("encoder", ENCODERS)
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 300),
    wide=st.integers(1, 12),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    piece=st.sampled_from([64, 1 << 12, 1 << 16]),
)
def test_any_shape_is_right_and_one_code_two_steps_off_is_found(
    tmp_path_factory: pytest.TempPathFactory, encoder: Encoder, seed: int, rows: int, wide: int, dtype: str, piece: int
) -> None:
    tmp, columns = tmp_path_factory.mktemp("pair"), 32 * wide
    before = {f"{OUT}.weight": weight(seed, rows, columns).to(getattr(torch, dtype))}
    after = encoded(before, encoder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passthrough, "PART", 1 << 12)
        patch.setattr(rounding, "PIECE", piece)
        assert check(tmp, after, before) == []
        at = seed % (rows * columns)
        codes = codes_of(after).view(-1)
        if encoder in PACKED:
            shift = 4 * (at % 2)
            code = int(codes[at // 2]) >> shift & 7
            codes[at // 2] ^= (code ^ (code - 2 if code > 1 else code + 2)) << shift
        elif encoder in (int8, int8_in_bf16):
            signed = codes.view(torch.int8)
            signed[at] += -2 if int(signed[at]) > 0 else 2
        else:
            codes[at] ^= 2 if int(codes[at]) & 0x7F != 0x7D else 6
        (finding,) = check(tmp, after, before)
    assert finding.code == "passthrough.weight-error"
    assert finding.found.startswith(f"1 of {rows * columns} values are not, first [{at // columns}, {at % columns}]")


def test_a_source_in_fp8_counts_as_what_it_stands_for(tmp_path: Path) -> None:
    """Output of --from-fp8: its codes are compared with code * scale, rounded to BF16."""
    w, scale = weight(1), torch.tensor(0.25 / 448)
    stored = (w.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    section = {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}
    fp8 = folder(tmp_path / "fp8", {f"{OUT}.weight": stored, f"{OUT}.weight_scale": scale}, {**CONFIG, **section})
    original = dense(read_inventory(fp8))
    meant = (stored.float() * scale).bfloat16()
    for values, expected in ((meant, []), (meant * 1.1, ["passthrough.weight-error"])):
        output = read_inventory(folder(tmp_path / "after", encoded({f"{OUT}.weight": values}, nvfp4)))
        assert [f.code for f in passthrough.check(output, original, find_scope(CONFIG))] == expected


# --- wrong ones, and what they are ---

SCALES_DO_NOT_FIT = "; its codes fit, its scales do not"


@pytest.mark.parametrize("encoder", PACKED)
def test_the_wrong_way_round_in_a_byte(tmp_path: Path, encoder: Encoder) -> None:
    after = encoded(source(), encoder)
    codes = codes_of(after)
    codes.copy_(codes >> 4 | codes << 4)
    assert "; its codes lie the wrong way round in their bytes" in found(check(tmp_path, after))


@pytest.mark.parametrize("encoder", GROUPED)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda scale: scale.copy_(scale.roll(1, 0)),
        lambda scale: scale.copy_(scale.roll(1, 1)),
        lambda scale: scale.copy_(scale.t().contiguous().view(scale.shape)),
        lambda scale: scale.copy_(scale.view(2, 4, 32, -1).transpose(1, 2).reshape(scale.shape)),
    ],
    ids=["rows shifted", "columns shifted", "transposed", "in a kernel's order"],
)
def test_scales_of_other_groups(tmp_path: Path, encoder: Encoder, spoil: Callable[[torch.Tensor], object]) -> None:
    after = encoded(source(), encoder)
    spoil(after[f"{OUT}.weight_scale"].view(torch.uint8))
    assert SCALES_DO_NOT_FIT in found(check(tmp_path, after))


@pytest.mark.parametrize(
    ("encoder", "spoil", "expected"),
    [
        (mxfp8_up, lambda t: t["weight_scale"][7, 1:2].add_(1), "32 of 65536"),
        (mxfp4, lambda t: t["weight_scale"][7, 1:2].sub_(1), "of 65536"),
        (nvfp4, lambda t: t["weight_scale"].view(torch.uint8)[7, 1:2].fill_(0), "of 65536"),
        (nvfp4, lambda t: t["weight_scale"].view(torch.uint8)[7, 1:2].bitwise_or_(0x80), "of 65536"),
        (int8, lambda t: t["weight_scale"][7].mul_(1.05), "of 65536"),
    ],
)
def test_one_scale(tmp_path: Path, encoder: Encoder, spoil: Callable[[Tensors], object], expected: str) -> None:
    after = encoded(source(), encoder)
    spoil({name.rpartition(".")[2]: t for name, t in after.items() if name.startswith(OUT)})
    text = found(check(tmp_path, after))
    assert expected in text
    assert SCALES_DO_NOT_FIT in text


@pytest.mark.parametrize(
    ("encoder", "leaf"), [(nvfp4, "weight_scale_2"), (nvfp4_divided, "weight_global_scale"), (int8, "weight_scale")]
)
@pytest.mark.parametrize("factor", [448.0, 1 / 6, 1.5])
def test_another_scale(tmp_path: Path, encoder: Encoder, leaf: str, factor: float) -> None:
    after = encoded(source(), encoder)
    after[f"{OUT}.{leaf}"] = after[f"{OUT}.{leaf}"] * factor
    text = found(check(tmp_path, after))
    times = float(text.partition("; its scale is ")[2].partition(" times what its codes need")[0])
    assert times == pytest.approx(1 / factor if encoder is nvfp4_divided else factor, rel=0.02)


@pytest.mark.parametrize(("encoder", "leaf"), [(nvfp4, "weight_scale_2"), (nvfp4_divided, "weight_global_scale")])
def test_the_other_spelling(tmp_path: Path, encoder: Encoder, leaf: str) -> None:
    after = encoded(source(), encoder)
    after[f"{OUT}.{leaf}"] = 1 / after[f"{OUT}.{leaf}"]
    assert "; its scale is " in found(check(tmp_path, after))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_another_weight(tmp_path: Path, encoder: Encoder) -> None:
    swapped = source()
    swapped[f"{OUT}.weight"], swapped[f"{OTHER}.weight"] = swapped[f"{OTHER}.weight"], swapped[f"{OUT}.weight"]
    findings = check(tmp_path, encoded(swapped, encoder))
    assert [f.found.partition("; ")[2] for f in findings] == [f"it is {m}.weight of the source" for m in (OTHER, OUT)]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_transposed(tmp_path: Path, encoder: Encoder) -> None:
    turned = source()
    turned[f"{OUT}.weight"] = turned[f"{OUT}.weight"].t().contiguous()
    assert found(check(tmp_path, encoded(turned, encoder))).endswith("; it is the source's, transposed")


@pytest.mark.parametrize("encoder", PACKED)
@pytest.mark.parametrize("mask", [0x88, 0x11], ids=["signs", "last bits"])
def test_bits_of_codes(tmp_path: Path, encoder: Encoder, mask: int) -> None:
    after = encoded(source(), encoder)
    codes_of(after)[100:].bitwise_xor_(mask)
    assert "of 65536 values are not, first [100, " in found(check(tmp_path, after))


# --- names and forms ---


@pytest.mark.parametrize("encoder", ENCODERS)
def test_what_is_missing_is_named_as_in_the_source(tmp_path: Path, encoder: Encoder) -> None:
    after = {name: t for name, t in encoded(source(), encoder).items() if not name.startswith(OUT)}
    assert [(f.code, f.subject) for f in check(tmp_path, after)] == [("passthrough.missing", f"{OUT}.weight")]


def test_four_bits_that_take_a_byte_each(tmp_path: Path) -> None:
    after = encoded(source(), nvfp4)
    codes = codes_of(after)
    after[f"{OUT}.weight"] = torch.stack([codes & 15, codes >> 4], 2).view(256, 256)
    (finding,) = check(tmp_path, after)
    assert (finding.code, finding.found) == ("passthrough.form", "U8 [256, 256]")


# --- samples ---


@pytest.mark.parametrize(("row", "seen"), [(0, True), (255, True), (33 * 4, False), (16 * 4, True)])
def test_a_sample_has_the_ends_and_some_parts_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: int, seen: bool
) -> None:
    monkeypatch.setattr(passthrough, "SAMPLE", 4 * 256)
    monkeypatch.setattr(passthrough, "EVERY", 16)
    after = encoded(source(), nvfp4)
    codes_of(after)[row].bitwise_xor_(0x77)
    assert len(check(tmp_path, after)) == 1
    assert len(check(tmp_path, after, sample=True)) == int(seen)


def test_copies_that_a_digest_has_proved_are_not_read(tmp_path: Path) -> None:
    after = encoded(source(), mxfp4)
    after["model.norm.weight"] += 1
    codes_of(after)[0].bitwise_xor_(0x77)
    assert {f.subject for f in check(tmp_path, after)} == {f"{OUT}.weight_packed", "model.norm.weight"}
    proved = {"model.norm.weight", f"{OUT}.weight_packed"}
    assert [f.subject for f in check(tmp_path, after, proved=proved)] == [f"{OUT}.weight_packed"]


# --- what nobody would write ---


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-45, 3e38, float("inf"), float("nan")])
@pytest.mark.parametrize(("encoder", "leaf"), [(nvfp4, "weight_scale_2"), (nvfp4_divided, "weight_global_scale")])
def test_any_scale_of_scales_is_looked_at(tmp_path: Path, encoder: Encoder, leaf: str, value: float) -> None:
    """One that is no factor is told of by the values; here nothing is compared with it."""
    after = encoded(source(), encoder)
    after[f"{OUT}.{leaf}"] = torch.tensor(value)
    assert {f.code for f in check(tmp_path, after)} <= {"passthrough.weight-error"}


@pytest.mark.parametrize("encoder", ENCODERS)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_any_bytes_are_looked_at(tmp_path_factory: pytest.TempPathFactory, encoder: Encoder, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    after = encoded(source(), encoder)
    for name in [name for name in after if name.startswith(OUT) and after[name].numel() > 1]:
        raw = after[name].view(torch.uint8)
        after[name] = torch.randint(0, 256, raw.shape, dtype=torch.uint8, generator=random).view(after[name].dtype)
    assert {f.code for f in check(tmp_path_factory.mktemp("any"), after)} <= {"passthrough.weight-error"}
