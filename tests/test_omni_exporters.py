"""vLLM-Omni's INT8, MXFP8 and MXFP4 under two scales: their numbers, their files, and what the real classes load of them."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import parts, pipelines
from safetensors.torch import load_file
from server import omni
from test_numerics_formats import E2M1, weights

from ckptq.checkpoint import Component, Inventory, Reader, read_inventory
from ckptq.errors import RecipeError
from ckptq.exporters import find_exporter
from ckptq.numerics import Desk, find_numerics, mx, mxfp4_dualscale
from ckptq.pipeline import write_shards
from ckptq.plan import Encode, Layout, Plan, QuantizedGroup
from ckptq.plan_denoiser import build_denoiser_plan, written_component
from ckptq.recipe import Recipe, parse_recipe
from ckptq.schemes import SCHEMES
from ckptq.scopes.denoisers import find_denoiser

DUAL = SCHEMES["mxfp4-dualscale"]
FORMATS = {"int8": "int8", "mxfp8": "mxfp8", "mxfp4-dualscale": "mxfp4-dualscale"}

Encoded = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Codes F8_E4M3 [n, k], fine scales U8 [n, k / 32], coarse ones F32 [n, ceil(k / 512)]."""


def encode(values: torch.Tensor) -> Encoded:
    """By both operations of the exporter."""
    desk, (n, k) = Desk(), values.shape
    codes = torch.full((n, k), 0x55, dtype=torch.uint8).view(torch.float8_e4m3fn)
    coarse, fine = torch.full((n, -(-k // 512)), 9.0), torch.full((n, k // 32), 9, dtype=torch.uint8)
    mxfp4_dualscale.encode(values, DUAL, None, codes, coarse, desk)
    mxfp4_dualscale.encode(values, DUAL, None, fine, None, desk)
    return codes, fine, coarse


def decode(encoded: Encoded) -> np.ndarray:
    codes, fine, coarse = encoded
    return mxfp4_dualscale.decode(codes, DUAL, None, mxfp4_dualscale.multipliers(fine, coarse)).double().numpy()


# MXFP4 under two scales


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_codes_and_scales_are_the_definitions(data: st.DataObject) -> None:
    """aclnnDynamicDualLevelMxQuant written out, but for the fine exponent: the least under which no more than 6 is lost."""
    values = data.draw(weights(SCHEMES["mxfp4"]))
    codes, fine, coarse = encode(values)
    source = values.float().numpy()
    n, k = source.shape
    for row in range(n):
        for at in range(0, k, 512):
            top = np.float32(np.abs(source[row, at : at + 512]).max()) / np.float32(6)
            assert coarse[row, at // 512] == (top or 1)
        for at in range(0, k, 32):
            wide = coarse[row, at // 512].numpy()
            quotients = np.abs(source[row, at : at + 32]) / wide
            exponent = max(int(fine[row, at // 32]) - 127, -126)
            assert quotients.max() / 2.0**exponent <= 7
            assert exponent == -126 or quotients.max() / 2.0 ** (exponent - 1) > 7
            scale = max(np.float32(wide) * np.float32(2.0**exponent), np.float32(2.0**-126))
            exact = np.minimum((np.abs(source[row, at : at + 32]) / scale).astype(np.float64), 6)
            numbers = codes[row, at : at + 32].double().numpy()
            assert set(np.abs(numbers)) <= set(E2M1)
            errors = np.abs(np.abs(numbers) - exact)
            assert np.all(errors <= np.abs(exact[:, None] - E2M1).min(1) + 1e-12)
            assert np.all((np.sign(numbers) == np.sign(source[row, at : at + 32])) | (numbers == 0))


def test_two_scales_are_nearer_than_one_where_groups_differ() -> None:
    """The amax has a code of its own, so that the error is smaller than that of MXFP4, whose largest is a power of two."""
    values = torch.randn(64, 2048, generator=torch.Generator().manual_seed(0)).bfloat16()
    scheme = SCHEMES["mxfp4"]
    codes, scales = torch.empty(64, 1024, dtype=torch.uint8), torch.empty(64, 64, dtype=torch.uint8)
    find_numerics(scheme).encode(values, scheme, None, codes, scales, Desk())
    single = find_numerics(scheme).decode(codes, scheme, None, scales).double()
    source = values.double()
    errors = [float(((found - source) ** 2).sum()) for found in (torch.from_numpy(decode(encode(values))), single)]
    assert errors[0] < errors[1]
    assert errors[0] / float((source**2).sum()) < 0.02


def test_zeros_and_the_largest() -> None:
    values = torch.zeros(3, 1024)
    values[1, 512:] = torch.tensor([6.0, -3.0, 0.25, -0.0]).repeat(128)
    values[2, :32] = 1e-30
    codes, fine, coarse = encode(values)
    assert coarse.tolist() == [[1, 1], [1, 1], [float(np.float32(1e-30) / np.float32(6)), 1]]
    assert codes[1, 512:516].tolist() == [6, -3, 0, 0]
    assert torch.signbit(codes[1, 515].float())
    assert fine[1, 16] == 127
    assert not decode((codes, fine, coarse))[0].any()
    np.testing.assert_allclose(decode((codes, fine, coarse))[2, :32], 1e-30, rtol=1e-6)


def test_any_bands_of_rows_give_the_same() -> None:
    values = torch.randn(7, 544, generator=torch.Generator().manual_seed(1)).half()
    whole = encode(values)
    for row in range(7):
        for one, all_ in zip(encode(values[row : row + 1]), whole, strict=True):
            assert torch.equal(one.view(torch.uint8), all_[row : row + 1].view(torch.uint8))


# INT8 under one scale


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_int8_under_one_scale_is_the_same_arithmetic(data: st.DataObject) -> None:
    values = data.draw(weights(SCHEMES["int8"]))
    scheme, whole = SCHEMES["int8"], float(values.float().abs().max() / 127.5) or 1.0
    codes = torch.empty(values.shape, dtype=torch.int8)
    find_numerics(scheme).encode(values, scheme, whole, codes, None, Desk())
    exact = values.double().numpy() / np.float32(whole).astype(np.float64)
    assert np.all(np.abs(codes.double().numpy() - np.clip(exact, -128, 127)) <= 0.5 + 2e-5)
    found = find_numerics(scheme).decode(codes, scheme, whole, None)
    assert torch.equal(found, codes.float() * torch.tensor(whole))


# Files


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Pipelines; Wan's transformers have 512 columns in every linear."""
    from diffusers import WanTransformer3DModel

    root, made = tmp_path_factory.mktemp("sources"), pipelines()
    for name in ("qwen_image", "z_image", "wan22"):
        made[name].make(root / name)
    sizes = {"num_attention_heads": 16, "attention_head_dim": 32, "text_dim": 64, "freq_dim": 32, "ffn_dim": 1024, "num_layers": 1}
    for seed, folder in enumerate(("transformer", "transformer_2")):
        shutil.rmtree(root / "wan22" / folder)
        parts.filled(WanTransformer3DModel(**sizes, rope_max_seq_len=64), seed).save_pretrained(root / "wan22" / folder)
    return {path.name: path for path in root.iterdir()}


def recipe(form: str, keep: str, folders: list[str]) -> Recipe:
    text = ", ".join(f"{f}: {{scheme: {FORMATS[form]}, keep: {keep}}}" for f in folders)
    return parse_recipe(f"components: {{{text}}}\nexport: {{format: {form}}}", "r.yaml")


def planned(source: Path, form: str, folder: str, keep: str = "[]") -> tuple[Plan, Component, Inventory]:
    inventory = read_inventory(source)
    assert inventory.pipeline is not None
    component = next(c for c in inventory.components if c.folder == folder)
    denoiser = find_denoiser(component.config, inventory.pipeline["_class_name"])
    assert denoiser is not None
    asked = recipe(form, keep, [folder])
    seen = written_component(component, denoiser, form)
    return build_denoiser_plan(asked, asked.components[folder], inventory, seen, denoiser, find_exporter(form)), seen, inventory


def written(source: Path, output: Path, form: str, folders: tuple[str, ...], keep: str = "[]") -> Path:
    """The pipeline with these components converted."""
    shutil.copytree(source, output)
    for folder in folders:
        plan, component, inventory = planned(source, form, folder, keep)
        for old in (output / folder).glob("*.safetensors*"):
            old.unlink()
        with Reader(inventory.root, component) as reader:
            write_shards(output / folder, plan, plan.shards, component, reader, {}, lambda shard, digests: None, lambda count: None)
        for name, text in plan.files.items():
            (output / folder / name).write_text(text)
    return output


CASES = {
    "qwen_image int8": ("qwen_image", "int8", ("transformer",), "[transformer_blocks.0.attn.to_out.0]"),
    "z_image int8": ("z_image", "int8", ("transformer",), "[layers.1.feed_forward]"),
    "wan22 mxfp8": ("wan22", "mxfp8", ("transformer", "transformer_2"), "[blocks.0.attn2.to_k]"),
    "wan22 mxfp4-dualscale": ("wan22", "mxfp4-dualscale", ("transformer", "transformer_2"), "[blocks.0.ffn.net.2]"),
}


@pytest.fixture(scope="session")
def outputs(sources: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("outputs")
    return {
        case: written(sources[name], root / case.replace(" ", "-"), form, folders, keep)
        for case, (name, form, folders, keep) in CASES.items()
    }


@pytest.fixture(scope="session")
def loaded(outputs: dict[str, Path]) -> dict[str, omni.Loaded]:
    found = omni.load([*outputs.values()])
    return {case: found[folder] for case, folder in outputs.items()}


@pytest.mark.server
@pytest.mark.parametrize("case", CASES)
def test_the_real_classes_load_every_weight_and_scale(case: str, outputs: dict[str, Path], loaded: dict[str, omni.Loaded]) -> None:
    _, form, folders, _ = CASES[case]
    result = loaded[case]
    assert (result.stage, result.error) == ("done", None)
    section = json.loads((outputs[case] / "transformer/config.json").read_text())["quantization_config"]
    assert result.quantization == section["quant_method"]
    assert result.missing == []
    for folder in folders:
        component = result.components[folder]
        stored = load_file(next((outputs[case] / folder).glob("*.safetensors")))
        coded = {n.removesuffix(".weight") for n, t in stored.items() if t.dtype in (torch.int8, torch.float8_e4m3fn)}
        assert component.quantized
        assert component.unread == ()
        assert not component.unwritten
        for module in coded:
            assert any(f"{folder}/{module}.weight" in sources for sources in component.parameters.values())
        for name, linear in component.quantized.items():
            more = {"weight_dual_scale", "mul_scale"} if form == "mxfp4-dualscale" else set()
            assert {*linear.scales} == {"weight_scale", *more}, name
            assert linear.process is None or "torch_npu" in linear.process, name
        kept = [name for name, linear in component.linears.items() if linear.method == "UnquantizedLinearMethod"]
        assert kept, "the recipe keeps one"


@pytest.mark.parametrize("case", CASES)
def test_every_weight_is_near_what_it_was(case: str, outputs: dict[str, Path], sources: Mapping[str, Path]) -> None:
    name, form, folders, keep = CASES[case]
    for folder in folders:
        plan = planned(sources[name], form, folder, keep)[0]
        source = load_file(next((sources[name] / folder).glob("*.safetensors")))
        stored = load_file(next((outputs[case] / folder).glob("*.safetensors")))
        encoded = {op.codes.name: op for op in plan.ops if isinstance(op, Encode) and op.codes.name.endswith(".weight")}
        assert len(encoded) > 5
        assert {n for n, t in stored.items() if n not in encoded and n in source and not torch.equal(t, source[n])} == set()
        for weight in encoded:
            codes, scale = stored[weight].float(), stored[f"{weight}_scale"]
            if form == "int8":
                assert (scale.shape, scale.dtype) == ((len(codes), 1), torch.float32)
                values, limit = codes * scale, 0.02
            elif form == "mxfp8":
                assert scale.shape == (len(codes), codes.shape[1] // 32)
                values, limit = codes * mx.powers(scale).repeat_interleave(32, 1), 0.05
            else:
                coarse = stored[weight.replace("weight", "weight_dual_scale")]
                assert coarse.shape == (len(codes), codes.shape[1] // 512, 1)
                values = codes * mxfp4_dualscale.multipliers(scale, coarse[..., 0]).repeat_interleave(32, 1)
                limit = 0.15
                smooth = stored[weight.replace("weight", "mul_scale")]
                assert torch.equal(smooth, torch.ones(codes.shape[1]))
            exact = source[weight].float()
            assert float((values - exact).norm() / exact.norm()) < limit, weight


def test_int8_of_fused_linears_has_one_scale_and_of_others_one_a_row(outputs: dict[str, Path]) -> None:
    """vLLM's convert_to_channelwise, which its CUDA kernels put the scales of fused linears through: row i's is shard i's."""
    stored = load_file(next((outputs["qwen_image int8"] / "transformer").glob("*.safetensors")))
    at = "transformer_blocks.1"
    alone = stored[f"{at}.img_mlp.net.0.proj.weight_scale"]
    assert len(alone.unique()) > 50
    shards = [stored[f"{at}.attn.{name}.weight_scale"] for name in ("to_q", "to_k", "to_v")]
    fused = torch.cat(shards)
    taken = torch.cat([fused[i].expand(len(shard), 1) for i, shard in enumerate(shards)])
    assert torch.equal(taken, fused)
    assert len(fused.unique()) == 1


def test_configs(outputs: dict[str, Path]) -> None:
    sections = {
        case: json.loads((outputs[case] / folders[-1] / "config.json").read_text())["quantization_config"]
        for case, (_, _, folders, _) in CASES.items()
    }
    assert sections["qwen_image int8"] == {
        "quant_method": "int8", "is_checkpoint_int8_serialized": True, "activation_scheme": "dynamic",
        "ignored_layers": ["transformer_blocks.0.attn.to_out.0"],
    }  # fmt: skip
    names = sections["z_image int8"]["ignored_layers"]
    assert {"layers.1.feed_forward.w13", "layers.1.feed_forward.w2", "lm_head", "model.layers.0.self_attn.q_proj"} <= {*names}
    assert sections["wan22 mxfp8"] == {
        "quant_method": "mxfp8", "is_checkpoint_mxfp8_serialized": True, "ignored_layers": ["blocks.0.attn2.to_k"],
    }  # fmt: skip
    assert sections["wan22 mxfp4-dualscale"] == {
        "quant_method": "mxfp4_dualscale", "is_checkpoint_serialized": True, "ignored_layers": ["blocks.0.ffn.net_2"],
    }  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
def test_a_language_model_is_refused(form: str) -> None:
    layout = Layout((QuantizedGroup(0, ("a",), SCHEMES[FORMATS[form]]),), (), (), (), None)
    with pytest.raises(RecipeError, match=f"export.format {form} is vLLM-Omni's, for denoisers"):
        find_exporter(form).check(layout)


def test_columns_that_are_no_multiple_of_512_are_refused(sources: Mapping[str, Path], tmp_path: Path) -> None:
    pipelines()["wan22"].make(tmp_path / "narrow")
    with pytest.raises(RecipeError, match=r"mxfp4-dualscale needs columns in multiples of 512, the weight is \[64, 64\]"):
        planned(tmp_path / "narrow", "mxfp4-dualscale", "transformer")
