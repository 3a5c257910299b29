"""What only the source can tell: other values, in every granularity, and what they are instead."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ckptq.checkpoint import read_inventory
from ckptq.scopes import find_scope
from ckptq.validators import Finding, passthrough

WEIGHTS = "model.safetensors"
L0, L1 = "model.layers.0.", "model.layers.1."
OUT, OTHER = f"{L0}self_attn.o_proj", f"{L1}self_attn.o_proj"
TEXT = {"num_hidden_layers": 2, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 256, "vocab_size": 16}
CONFIG = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "text_config": TEXT, "vision_config": {"depth": 1}}
Tensors = dict[str, torch.Tensor]
Encoder = Callable[[torch.Tensor], tuple[str, torch.Tensor, torch.Tensor]]


def weight(seed: int, rows: int = 256, columns: int = 256) -> torch.Tensor:
    """Rows of unlike size, so that granularities differ."""
    random = torch.Generator().manual_seed(seed)
    sizes = 2.0 ** -torch.rand(rows, 1, generator=random).mul(6)
    return (torch.randn(rows, columns, generator=random) * sizes * 0.05).bfloat16()


def by_tensor(w: torch.Tensor) -> tuple[str, torch.Tensor, torch.Tensor]:
    scale = w.float().abs().amax() / 448
    return "weight_scale", scale, w.float() / scale


def by_channel(w: torch.Tensor) -> tuple[str, torch.Tensor, torch.Tensor]:
    scale = w.float().abs().amax(1, keepdim=True) / 448
    return "weight_scale", scale, w.float() / scale


def by_row_1d(w: torch.Tensor) -> tuple[str, torch.Tensor, torch.Tensor]:
    """FP8_PER_CHANNEL_PER_TOKEN as ModelOpt writes it: [n]."""
    name, scale, quotient = by_channel(w)
    return name, scale[:, 0], quotient


def by_block(w: torch.Tensor) -> tuple[str, torch.Tensor, torch.Tensor]:
    """weight_scale_inv, [ceil(n / 128), ceil(k / 128)]."""
    n, k = w.shape
    padded = torch.zeros(-(-n // 128) * 128, -(-k // 128) * 128)
    padded[:n, :k] = w.float().abs()
    scale = padded.unfold(0, 128, 128).unfold(1, 128, 128).amax((2, 3)) / 448
    return "weight_scale_inv", scale, w.float() / scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:n, :k]


def by_pb_wo(w: torch.Tensor) -> tuple[str, torch.Tensor, torch.Tensor]:
    """FP8_PB_WO as ModelOpt writes it: [nb, 1, kb, 1]."""
    _, scale, quotient = by_block(w)
    return "weight_scale", scale[:, None, :, None], quotient


def by_group(w: torch.Tensor) -> tuple[str, torch.Tensor, torch.Tensor]:
    """One scale for 96 values of a row, [n, ceil(k / 96)]."""
    n, k = w.shape
    padded = torch.zeros(n, -(-k // 96) * 96)
    padded[:, :k] = w.float().abs()
    scale = padded.unfold(1, 96, 96).amax(2) / 448
    return "weight_scale_inv", scale, w.float() / scale.repeat_interleave(96, 1)[:, :k]


def by_tensor_in_bf16(w: torch.Tensor) -> tuple[str, torch.Tensor, torch.Tensor]:
    """As llm-compressor does it: the scale is BF16, and so is the quotient."""
    scale = (w.float().abs().amax() / 448).bfloat16()
    return "weight_scale", scale.view(1), (w / scale).float()


ENCODERS = (by_tensor, by_channel, by_row_1d, by_block, by_pb_wo, by_tensor_in_bf16)


def encoded(tensors: Tensors, encoder: Encoder) -> Tensors:
    """Every projection in codes and scales, the rest as it is."""
    made: Tensors = {}
    for name, t in tensors.items():
        if "_proj.weight" not in name:
            made[name] = t.clone()
            continue
        kind, scale, quotient = encoder(t)
        made[name] = quotient.clamp(-448, 448).to(torch.float8_e4m3fn)
        made[f"{name.removesuffix('weight')}{kind}"] = scale
    return made


def source() -> Tensors:
    linears = {f"{at}{name}.weight": weight(i) for i, (at, name) in enumerate((a, n) for a in (L0, L1) for n in NAMES)}
    return linears | {"model.norm.weight": torch.linspace(1, 2, 256).bfloat16(), "model.embed_tokens.weight": weight(99, 16)}


NAMES = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")


def folder(path: Path, tensors: Tensors, config: dict[str, Any] = CONFIG) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({name: t.clone().contiguous() for name, t in tensors.items()}, path / WEIGHTS)
    return path


def check(tmp: Path, after: Tensors, before: Tensors | None = None, config: dict[str, Any] = CONFIG) -> list[Finding]:
    output = read_inventory(folder(tmp / "after", after, config))
    original = read_inventory(folder(tmp / "before", source() if before is None else before, config))
    return list(passthrough.check(output, original, find_scope(config)))


# --- right ones ---


@pytest.mark.parametrize("encoder", ENCODERS)
def test_what_was_rounded_once_is_right(tmp_path: Path, encoder: Encoder) -> None:
    assert check(tmp_path, encoded(source(), encoder)) == []


@pytest.mark.parametrize("encoder", ENCODERS)
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 400),
    columns=st.integers(1, 400),
    dtype=st.sampled_from(["bfloat16", "float32"]),
)
def test_any_shape_is_right_and_one_code_two_steps_off_is_found(
    tmp_path_factory: pytest.TempPathFactory, encoder: Encoder, seed: int, rows: int, columns: int, dtype: str
) -> None:
    tmp = tmp_path_factory.mktemp("pair")
    before = {f"{OUT}.weight": weight(seed, rows, columns).to(getattr(torch, dtype))}
    after = encoded(before, encoder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passthrough, "PART", 1 << 12)
        assert check(tmp, after, before) == []
        at = seed % (rows * columns)
        codes = after[f"{OUT}.weight"].view(torch.uint8).view(-1)
        codes[at] ^= 2 if int(codes[at]) & 0x7F != 0x7D else 6
        (finding,) = check(tmp, after, before)
    assert finding.code == "passthrough.weight-error"
    assert finding.found.startswith(f"1 of {rows * columns} values are not, first [{at // columns}, {at % columns}]")


@pytest.mark.parametrize("rows", [1, 7])
def test_blocks_of_one_row(tmp_path: Path, rows: int) -> None:
    before = {f"{OUT}.weight": weight(3, rows, 70_001)}
    after = encoded(before, by_group)
    config = {**CONFIG, "quantization_config": {"weight_block_size": [1, 96]}}
    assert check(tmp_path, after, before, config) == []
    after[f"{OUT}.weight_scale_inv"][-1, -1] *= 1.5
    assert [f.code for f in check(tmp_path, after, before, config)] == ["passthrough.weight-error"]


@given(st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_dtypes_of_copies(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    """Rounded once to another dtype: a warning. The value beside it: an error."""
    tmp = tmp_path_factory.mktemp("cast")
    for wide, narrow in ((torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.bfloat16, torch.float32)):
        before = {"model.norm.weight": torch.randn(300, generator=torch.Generator().manual_seed(seed)).to(wide)}
        after = {"model.norm.weight": before["model.norm.weight"].to(narrow)}
        assert [(f.code, f.severity) for f in check(tmp, after, before)] == [("passthrough.cast", "warning")]
        after["model.norm.weight"][seed % 300] *= 1.02
        assert [f.code for f in check(tmp, after, before)] == ["passthrough.cast", "passthrough.bytes"]


# --- wrong ones, and what they are ---


def found(findings: list[Finding], code: str = "passthrough.weight-error") -> str:
    assert {f.code for f in findings} == {code}, findings
    assert all(f.severity == "error" for f in findings)
    return findings[0].found


@pytest.mark.parametrize("encoder", ENCODERS)
def test_transposed(tmp_path: Path, encoder: Encoder) -> None:
    after = encoded(source(), encoder)
    after[f"{OUT}.weight"] = after[f"{OUT}.weight"].view(torch.uint8).t().contiguous().view(torch.float8_e4m3fn)
    findings = check(tmp_path, after)
    assert found(findings).endswith("; it is the source's, transposed")
    assert [f.subject for f in findings] == [f"{OUT}.weight"]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_transposed_before_it_was_encoded(tmp_path: Path, encoder: Encoder) -> None:
    turned = source()
    turned[f"{OUT}.weight"] = turned[f"{OUT}.weight"].t()
    assert found(check(tmp_path, encoded(turned, encoder))).endswith("; it is the source's, transposed")


def test_transposed_copies(tmp_path: Path) -> None:
    before = {"visual.merger.mlp.0.weight": weight(5)}
    after = {name: t.t() for name, t in before.items()}
    assert found(check(tmp_path, after, before), "passthrough.bytes").endswith("; it is the source's, transposed")


def test_a_symmetric_weight_is_not_called_transposed(tmp_path: Path) -> None:
    before = {f"{OUT}.weight": weight(5) + weight(5).t()}
    after = encoded(before, by_tensor)
    after[f"{OUT}.weight"].view(torch.uint8)[200, 100] ^= 0x80
    assert "; " not in found(check(tmp_path, after, before))


def test_another_shape(tmp_path: Path) -> None:
    before = {f"{OUT}.weight": weight(5, 256, 128)}
    after = encoded({f"{OUT}.weight": weight(5, 256, 128).t().contiguous()}, by_tensor)
    assert found(check(tmp_path, after, before), "passthrough.form") == "F8_E4M3 [128, 256], which is transposed"
    assert found(check(tmp_path, encoded({f"{OUT}.weight": weight(5, 255, 128)}, by_tensor), before), "passthrough.form") == (
        "F8_E4M3 [255, 128]"
    )


@pytest.mark.parametrize("encoder", ENCODERS)
def test_swapped_with_their_scales(tmp_path: Path, encoder: Encoder) -> None:
    swapped = source()
    swapped[f"{OUT}.weight"], swapped[f"{OTHER}.weight"] = swapped[f"{OTHER}.weight"], swapped[f"{OUT}.weight"]
    findings = check(tmp_path, encoded(swapped, encoder))
    assert [f.found.partition("; ")[2] for f in findings] == [
        f"it is {OTHER}.weight of the source",
        f"it is {OUT}.weight of the source",
    ]


def test_swapped_without_their_scales(tmp_path: Path) -> None:
    after = encoded(source(), by_tensor)
    after[f"{OUT}.weight"], after[f"{OTHER}.weight"] = after[f"{OTHER}.weight"], after[f"{OUT}.weight"]
    assert f"; it is {OTHER}.weight of the source under a scale " in found(check(tmp_path, after))


def test_swapped_copies(tmp_path: Path) -> None:
    before = {f"{at}input_layernorm.weight": torch.rand(64).bfloat16() for at in (L0, L1)}
    after = dict(zip(before, reversed(before.values()), strict=True))
    findings = check(tmp_path, after, before)
    assert found(findings, "passthrough.bytes").endswith(f"; it is {L1}input_layernorm.weight of the source")
    assert len(findings) == 2


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("factor", [448.0, 1 / 448, 1.1, 0.9])
def test_another_scale(tmp_path: Path, encoder: Encoder, factor: float) -> None:
    after = encoded(source(), encoder)
    scale = next(name for name in after if name.startswith(f"{OUT}.weight_scale"))
    after[scale] = after[scale] * factor
    text = found(check(tmp_path, after))
    assert float(text.partition("; its scale is ")[2].partition(" times what its codes need")[0]) == pytest.approx(factor, rel=0.01)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: t[f"{OUT}.weight"].view(torch.uint8)[:100].zero_(),
        lambda t: t[f"{OUT}.weight"].view(torch.uint8)[-1:, -1:].fill_(0x7E),
        lambda t: t.update({f"{OUT}.weight": t[f"{OUT}.weight"].view(torch.uint8).roll(1).view(torch.float8_e4m3fn)}),
    ],
)
def test_parts_of_a_weight(tmp_path: Path, spoil: Callable[[Tensors], object]) -> None:
    after = encoded(source(), by_channel)
    spoil(after)
    assert "; " not in found(check(tmp_path, after))


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize(("factor", "least"), [(2.0, "warning"), (1.3, "error")])
def test_rounded_twice(tmp_path: Path, encoder: Encoder, factor: float, least: str) -> None:
    """Under twice the scale only the smallest codes are rounded again; under another one, most of them."""
    after = encoded(source(), encoder)
    scale = next(name for name in after if name.startswith(f"{OUT}.weight_scale"))
    after[f"{OUT}.weight"] = (after[f"{OUT}.weight"].float() / factor).to(torch.float8_e4m3fn)
    after[scale] = after[scale] * factor
    findings = check(tmp_path, after)
    assert {(f.code, f.severity) for f in findings} <= {("passthrough.weight-error", least)}
    assert findings or least == "warning"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_source_that_is_not_finite(tmp_path: Path, value: float) -> None:
    before, after = source(), encoded(source(), by_block)
    before[f"{OUT}.weight"][3, 5] = value
    assert found(check(tmp_path, after, before)).startswith("1 of 65536 values are not, first [3, 5]")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda scale: scale[3:5].copy_(scale[3:5].flip(0)),
        lambda scale: scale[7].zero_(),
        lambda scale: scale[7].neg_(),
        lambda scale: scale.copy_(scale.roll(1, 0)),
    ],
)
def test_scales_of_other_rows(tmp_path: Path, spoil: Callable[[torch.Tensor], object]) -> None:
    after = encoded(source(), by_channel)
    spoil(after[f"{OUT}.weight_scale"])
    assert "; its codes fit, its scales do not" in found(check(tmp_path, after))


# --- names ---


def test_names_of_another_generation(tmp_path: Path) -> None:
    after = {name.replace("model.", "model.language_model.", 1): t for name, t in encoded(source(), by_tensor).items()}
    assert check(tmp_path, after) == []
    after["model.language_model.norm.weight"] += 1
    assert found(check(tmp_path, after), "passthrough.bytes")


@pytest.mark.parametrize(
    ("name", "severity"),
    [("model.norm.weight", "error"), (f"{L0}self_attn.o_proj.weight", "error"), (f"{L0}self_attn.rotary_emb.inv_freq", "warning")],
)
def test_missing_and_extra(tmp_path: Path, name: str, severity: str) -> None:
    whole = source() | {name: source().get(name, torch.ones(4))}
    less = {n: t for n, t in whole.items() if n != name}
    assert [(f.code, f.severity, f.subject) for f in check(tmp_path, less, whole)] == [("passthrough.missing", severity, name)]
    assert [(f.code, f.severity, f.subject) for f in check(tmp_path, whole, less)] == [("passthrough.extra", severity, name)]


def test_a_tied_head(tmp_path: Path) -> None:
    """Stored on one side alone, it must be the embeddings."""
    tied = {**CONFIG, "tie_word_embeddings": True}
    plain, head = source(), source() | {"lm_head.weight": source()["model.embed_tokens.weight"]}
    other = source() | {"lm_head.weight": source()["model.embed_tokens.weight"] + 1}
    for after, before in ((plain, head), (head, plain)):
        assert check(tmp_path, after, before, tied) == []
        assert len(check(tmp_path, after, before)) == 1
    assert [f.code for f in check(tmp_path, plain, other, tied)] == ["passthrough.missing"]
    assert [f.code for f in check(tmp_path, other, plain, tied)] == ["passthrough.extra"]


# --- files beside the weights ---

FILES = {
    "tokenizer.json": '{"a": 1}',
    "vocab.json": "{}",
    "preprocessor_config.json": "{}",
    "chat_template.json": "{}",
    "README.md": "x",
}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda at: None, []),
        (lambda at: (at / "tokenizer.json").write_text('{ "a" :1}'), []),
        (lambda at: (at / "tokenizer.json").write_text('{"a": 2}'), [("passthrough.sidecar", "warning")]),
        (lambda at: (at / "README.md").unlink(), []),
        (lambda at: (at / "vocab.json").unlink(), []),
        (lambda at: (at / "tokenizer.json").unlink(), [("passthrough.sidecar-missing", "warning")]),
        (
            lambda at: [(at / name).unlink() for name in ("tokenizer.json", "vocab.json")],
            [("passthrough.sidecar-missing", "error")] * 2,
        ),
        (lambda at: (at / "preprocessor_config.json").unlink(), [("passthrough.sidecar-missing", "error")]),
        (lambda at: (at / "preprocessor_config.json").rename(at / "processor_config.json"), []),
        (lambda at: (at / "chat_template.json").unlink(), [("passthrough.sidecar-missing", "warning")]),
        (lambda at: (at / "generation_config.json").write_text("{}"), []),
    ],
)
def test_files(tmp_path: Path, change: Callable[[Path], object], expected: list[tuple[str, str]]) -> None:
    for at in (tmp_path / "after", tmp_path / "before"):
        at.mkdir()
        for name, text in FILES.items():
            (at / name).write_text(text, encoding="utf-8")
    change(tmp_path / "after")
    assert [(f.code, f.severity) for f in check(tmp_path, source(), source())] == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rms_norm_eps": 1e-5}, [("passthrough.config", "error")]),
        ({"dtype": "float16"}, [("passthrough.config", "warning")]),
        ({"new": 5}, [("passthrough.config", "warning")]),
        ({"new": False, "dtype": None}, []),
        ({"new": None, "transformers_version": "6", "use_cache": True, "num_local_experts": 4}, []),
    ],
)
def test_config(tmp_path: Path, change: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    before = {**CONFIG, "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16", "num_experts": 4, "use_cache": False}
    after = {**before, **change}
    for dropped, kept in (("torch_dtype", "dtype"), ("num_experts", "num_local_experts")):
        if kept in change:
            del after[dropped]
    folder(tmp_path / "after", source(), after)
    folder(tmp_path / "before", source(), before)
    output, original = (read_inventory(tmp_path / name) for name in ("after", "before"))
    assert [(f.code, f.severity) for f in passthrough.check(output, original, find_scope(CONFIG))] == expected


def test_another_model_is_one_finding(tmp_path: Path) -> None:
    """Whatever else differs then is no news."""
    for name, changed in (
        ("hidden", {"text_config": {**TEXT, "hidden_size": 512}}),
        ("kind", {"architectures": ["Qwen3MoeForCausalLM"]}),
    ):
        at = tmp_path / name
        at.mkdir()
        folder(at / "before", {"model.norm.weight": torch.ones(512)}, {**CONFIG, **changed, "rms_norm_eps": 1})
        output, original = read_inventory(folder(at / "after", source())), read_inventory(at / "before")
        (finding,) = passthrough.check(output, original, find_scope(CONFIG))
        assert (finding.code, finding.severity) == ("passthrough.source", "error")
        assert (
            finding.found
            == {
                "hidden": "hidden_size 256, there 512",
                "kind": 'architectures ["Qwen2_5_VLForConditionalGeneration"], there ["Qwen3MoeForCausalLM"]',
            }[name]
        )


def test_values_of_config_json_are_shown_as_they_stand_there(tmp_path: Path) -> None:
    before, after = {**CONFIG, "act": "silu", "long": "x" * 100}, {**CONFIG, "act": True, "long": [None] * 100}
    folder(tmp_path / "before", source(), before)
    output = read_inventory(folder(tmp_path / "after", source(), after))
    found = {f.subject: f.found for f in passthrough.check(output, read_inventory(tmp_path / "before"), find_scope(CONFIG))}
    assert found["config.json: act"] == 'true, there "silu"'
    assert found["config.json: long"].startswith("[null, null")
    assert found["config.json: long"].endswith("xxx...")
