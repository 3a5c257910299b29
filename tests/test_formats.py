"""Every format that ckptq writes: a good plan has no finding, each change of a quantized linear's tensors has one at its place."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ckptq.checkpoint import FLOATS, TensorSpec, read_inventory
from ckptq.errors import UnsupportedError
from ckptq.exporters import find_exporter
from ckptq.planner import build_plan
from ckptq.recipe import load_recipe
from ckptq.scopes.qwen2_5_vl import SCOPE
from ckptq.validators import Finding, Stored, configs, dtypes, kv, layout, strays
from ckptq.validators.expected import expect
from ckptq.validators.formats import SCALE_KINDS, WEIGHT_KINDS, Format
from ckptq.validators.servers import DEFAULT, SERVERS, Server

SOURCE = read_inventory(Path(__file__).parent.parent / "examples" / "tiny-qwen2.5-vl").main
EXPORTS = [
    *((form, scheme) for form in ("modelopt", "compressed-tensors", "fp8") for scheme in find_exporter(form).SCHEMES),
    ("modelopt", "mixed"),
    ("compressed-tensors", "mixed"),
]
L0 = "model.layers.0"
Q, K, V, UP, DOWN = (f"{L0}.{s}_proj" for s in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.up", "mlp.down"))
DTYPES = ("F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2", "U8", "I8", "I32")
Edit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Export:
    """The configs and tensors of a plan."""

    section: dict[str, Any]
    tensors: dict[str, TensorSpec]
    other: dict[str, Any] | None = None

    def stored(self, changes: Iterable[TensorSpec] = (), without: Iterable[str] = (), edit: Edit | None = None) -> Stored:
        section = json.loads(json.dumps(self.section))
        if edit is not None:
            edit(section)
        tensors = {name: spec for name, spec in self.tensors.items() if name not in {*without}}
        tensors |= {spec.name: spec for spec in changes}
        return Stored({**SOURCE.config, "quantization_config": section}, self.other, tensors)

    def found(self, *changes: TensorSpec, without: Iterable[str] = (), edit: Edit | None = None) -> list[Finding]:
        return found(self.stored(changes, without, edit))


def found(stored: Stored, server: Server = DEFAULT) -> list[Finding]:
    settings, findings = configs.read(stored, SCOPE, server)
    if settings is None:
        return findings
    at = expect(stored, SCOPE, settings)
    return findings + [finding for validator in (layout, strays, kv) for finding in validator.check(at)]


@functools.cache
def export(form: str, scheme: str) -> Export:
    """With FP8 attention and NVFP4 MLPs for "mixed"; with KV scales where a recipe has them and the format has words for them."""
    if scheme == "mixed":
        recipe = load_recipe(f"qwen25vl-lm-mixed-{form}", model="x")
    else:
        cache = "fp8" if form != "fp8" and scheme in ("fp8", "nvfp4") else "null"
        recipe = load_recipe("demo", (f"quantize.0.scheme={scheme}", f"export.format={form}", f"kv_cache={cache}"), model="x")
    plan = build_plan(recipe, SOURCE, SCOPE, find_exporter(form))
    other = plan.files.get(configs.OTHER)
    section = json.loads(plan.files["config.json"])["quantization_config"]
    return Export(section, dict(plan.tensors), json.loads(other) if other else None)


def format_of(good: Export, module: str) -> Format:
    stored = good.stored()
    settings, _ = configs.read(stored, SCOPE, DEFAULT)
    assert settings is not None
    form = expect(stored, SCOPE, settings).format_of(module)
    assert form is not None
    return form


def parts(good: Export, module: str) -> list[TensorSpec]:
    """The codes and scales of a linear."""
    return [spec for kind in (*WEIGHT_KINDS, *SCALE_KINDS) if (spec := good.tensors.get(f"{module}.{kind}"))]


def at(findings: Iterable[Finding], name: str) -> list[tuple[str, str]]:
    return sorted((f.severity, f.code) for f in findings if f.subject == name)


@pytest.fixture(params=EXPORTS, ids=[f"{form} {scheme}" for form, scheme in EXPORTS])
def good(request: pytest.FixtureRequest) -> Export:
    return export(*request.param)


@pytest.mark.parametrize("server", SERVERS.values(), ids=list(SERVERS))
def test_a_good_export_has_no_finding(good: Export, server: Server) -> None:
    codes = {f.code for f in found(good.stored(), server)}
    too_new = good.section.get("quant_algo") == "W4A16_NVFP4" and server.version == "0.20"
    assert codes == ({"config.quant-algo"} if too_new else set())


@pytest.mark.parametrize("module", [V, UP, DOWN])
def test_a_tensor_that_is_missing_is_found(good: Export, module: str) -> None:
    for spec in parts(good, module):
        (said,) = [f for f in good.found(without=[spec.name]) if f.severity == "error" or f.subject == spec.name]
        assert said.subject == spec.name
        kind = spec.name.rpartition(".")[2]
        assert said.code == ("layout.missing-tensor" if kind in WEIGHT_KINDS else "layout.missing-scale")
        # Only static FP8 activations have a placeholder that another shard's scale outbids.
        outbid = kind == "input_scale" and module != DOWN and "FP8" in format_of(good, module).name.upper()
        assert said.severity == ("warning" if outbid else "error")


@pytest.mark.parametrize("module", [K, DOWN])
def test_a_tensor_in_another_dtype_is_found(good: Export, module: str) -> None:
    for spec in parts(good, module):
        scale = spec.name.rpartition(".")[2] in SCALE_KINDS
        for dtype in DTYPES:
            findings = at(good.found(TensorSpec(spec.name, dtype, spec.shape)), spec.name)  # type: ignore[arg-type]
            same_bits = {dtype, spec.dtype} == {"I8", "U8"}
            rounded = scale and spec.dtype != "U8" and dtype in FLOATS
            bf16 = (
                scale and spec.dtype == "F32" and dtype in ("BF16", "F16") and good.section["quant_method"] == "compressed-tensors"
            )
            code = "layout.scale-dtype" if scale else "layout.weight-dtype"
            nothing = dtype == spec.dtype or bf16
            assert findings == ([] if nothing else [("warning" if same_bits or rounded else "error", code)]), (spec, dtype)


@pytest.mark.parametrize("module", [Q, DOWN])
def test_a_tensor_in_another_shape_is_found(good: Export, module: str) -> None:
    for spec in parts(good, module):
        longer = (*spec.shape[:-1], spec.shape[-1] * 2) if spec.shape else (2,)
        fewer = ((spec.shape[0] - 1) // 2 + 1 if spec.shape[0] > 1 else 3, *spec.shape[1:]) if spec.shape else (1, 1)
        for shape in (longer, fewer, (*spec.shape, 1, 1)):
            codes = {code for severity, code in at(good.found(TensorSpec(spec.name, spec.dtype, shape)), spec.name)}
            assert codes & {"layout.shape", "layout.scale-shape"}, (spec, shape)


def test_scales_that_the_format_has_not_are_found(good: Export) -> None:
    form = format_of(good, DOWN)
    for kind in SCALE_KINDS:
        name = f"{DOWN}.{kind}"
        if kind not in form.kinds:
            dropped = form.name == "ModelOpt W4A16_NVFP4" and kind == "input_scale"
            severity = "warning" if dropped else "error"
            assert at(good.found(TensorSpec(name, "F32", ())), name) == [(severity, "layout.stray-scale")]


def test_codes_under_the_other_name_are_found(good: Export) -> None:
    (codes,) = [spec for spec in parts(good, DOWN) if spec.name.rpartition(".")[2] in WEIGHT_KINDS]
    other = f"{DOWN}.{'weight' if codes.name.endswith('weight_packed') else 'weight_packed'}"
    said = good.found(TensorSpec(other, codes.dtype, codes.shape), without=[codes.name])
    assert [(f.code, f.subject) for f in said] == [("layout.missing-tensor", codes.name), ("layout.unknown-tensor", other)]


def test_a_linear_that_was_not_converted_is_found(good: Export) -> None:
    shards = (Q, K, V)
    for gone in (parts, lambda good, module: parts(good, module)[:1]):
        without = [spec.name for module in shards for spec in gone(good, module)]
        plain = [TensorSpec(f"{m}.weight", "BF16", SOURCE.tensors[f"{m}.weight"].spec.shape) for m in shards]
        said = good.found(*plain, without=without)
        if gone is parts:
            assert [(f.code, f.subject) for f in said] == [("layout.not-excluded", spec.name) for spec in plain]
            silent = format_of(good, Q).weight == "weight" and format_of(good, Q).packed == 1
            assert all(("silently" in f.effect) == silent for f in said)
        else:
            assert {f.subject for f in said} >= {spec.name for spec in plain}, "its scales are still there"


def excluded(section: dict[str, Any]) -> None:
    """Keeps q, k and v of layer 0 out, in the section's own words."""
    key = next(key for key in ("ignore", "modules_to_not_convert") if key in section)
    section[key] = [*section[key], Q, K, V]


def unlisted(section: dict[str, Any]) -> None:
    """Takes q, k and v of layer 0 off the modules that are to be quantized."""
    for module in (Q, K, V):
        section.get("quantized_layers", {}).pop(module, None)
    for group in section.get("config_groups", {}).values():
        group["targets"] = [target for target in group["targets"] if target not in (Q, K, V)]


def test_codes_of_an_excluded_linear_are_found(good: Export) -> None:
    edits: Iterator[Edit] = iter((excluded, unlisted) if "quantized_layers" in good.section or mixed_groups(good) else (excluded,))
    for edit in edits:
        said = [f for f in good.found(edit=edit) if f.code != "config.disagree"]
        codes = [spec.name for m in (Q, K, V) for spec in parts(good, m)[:1]]
        assert [(f.code, f.subject) for f in said] == [("layout.excluded", name) for name in codes]
        assert ("quantized_layers" in said[0].mend) == ("quantized_layers" in good.section)


def mixed_groups(good: Export) -> bool:
    return len(good.section.get("config_groups", {})) > 1


def test_a_linear_that_a_mixed_checkpoint_lists_by_mistake_is_found() -> None:
    good = export("modelopt", "mixed")
    kept = "visual.blocks.0.mlp.gate_proj"

    def listed(section: dict[str, Any]) -> None:
        section["quantized_layers"][kept] = {"quant_algo": "NVFP4", "group_size": 16}

    def reached(section: dict[str, Any]) -> None:
        listed(section)
        section["ignore"].remove("visual*")

    assert {f.code for f in good.found(edit=listed)} == {"config.disagree"}, "the list of what is kept goes first"
    said = good.found(edit=reached)
    assert [(f.code, f.subject) for f in said if f.code != "config.disagree"] == [
        ("layout.not-excluded", f"{kept}.weight"),
        ("layout.not-excluded", f"{kept.replace('gate', 'up')}.weight"),  # the server asks for one shard and quantizes both
    ]
    assert all("quantized_layers" in f.mend for f in said if f.code == "layout.not-excluded")


@pytest.mark.parametrize(("scheme", "refused"), [("mxfp8", True), ("nvfp4", False), ("fp8", False)])
def test_a_dtype_that_the_server_refuses_is_found(scheme: str, refused: bool) -> None:
    good = export("modelopt", scheme)
    stored = Stored({**SOURCE.config, "dtype": "float16", "quantization_config": good.section}, good.other, good.tensors)
    settings, _ = configs.read(stored, SCOPE, DEFAULT)
    assert settings is not None
    assert ("config.dtype-refused" in {f.code for f in dtypes.check(expect(stored, SCOPE, settings), stored)}) == refused


@pytest.mark.parametrize(("columns", "expected"), [(96, []), (104, ["nvfp4", "mxfp8", "mxfp4"]), (112, ["mxfp8", "mxfp4"])])
def test_columns_that_are_no_whole_groups_are_found(columns: int, expected: list[str]) -> None:
    bad = []
    for scheme in ("int8", "nvfp4", "mxfp8", "mxfp4"):
        good = export("compressed-tensors", scheme)
        form = format_of(good, DOWN)
        codes = TensorSpec(f"{DOWN}.{form.weight}", form.codes, (128, columns // form.packed))
        bad += [scheme for f in good.found(codes) if f.code == "layout.columns"]
    assert bad == expected


def test_transforms_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="transform_config"):
        export("compressed-tensors", "int8").found(
            edit=lambda section: section.update(transform_config={"config_groups": {"u": {}}})
        )


def test_the_other_file_counts_where_it_alone_lists_the_linears() -> None:
    good = export("modelopt", "mixed")
    assert good.found(edit=lambda section: section.pop("quantized_layers")) == []
    alone = Export({k: v for k, v in good.section.items() if k != "quantized_layers"}, good.tensors)
    assert [f.code for f in alone.found()] == ["config.quantized-layers"]


def test_input_scales_that_the_config_groups_make_idle_are_found() -> None:
    def weights_alone(section: dict[str, Any]) -> None:
        for group in section["config_groups"].values():
            group["input_activations"] = None

    said = export("modelopt", "nvfp4").found(edit=weights_alone)
    assert {(f.severity, f.code) for f in said} == {("warning", "layout.stray-scale")}
    assert {f.subject.rpartition(".")[2] for f in said} == {"input_scale"}
