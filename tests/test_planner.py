"""The plan: what becomes of every tensor, in which file, and every recipe or source that can't be planned."""

import dataclasses
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_checkpoint import PRESETS, make_checkpoint

from ckptq.checkpoint import DTYPE_BYTES, INDEX, Component, SourceTensor, TensorSpec, read_inventory
from ckptq.config_text import insert_section
from ckptq.errors import CkptqError, RecipeError, SourceError, UnsupportedError
from ckptq.exporters import all_formats, find_exporter
from ckptq.json_file import parse
from ckptq.plan import Copy, Encode, Plan, Scale, module_of
from ckptq.planner import build_plan
from ckptq.recipe import Recipe
from ckptq.schemes import SCHEMES
from ckptq.scopes import find_scope
from ckptq.validate import validate_plan

EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny-qwen2.5-vl"
GOLDEN = Path(__file__).parent / "data" / "golden_modelopt_fp8.json"
SCALES = (".weight_scale", ".input_scale", ".k_scale", ".v_scale")
LINEARS = tuple(
    f"{part}_proj" for part in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
)
FUSED = (LINEARS[:3], LINEARS[3:4], LINEARS[4:6], LINEARS[6:])


def newer(name: str) -> str:
    """A hub name as files written since transformers 4.52 have it."""
    if name.startswith("visual."):
        return "model." + name
    return "model.language_model." + name.removeprefix("model.") if name.startswith("model.") else name


def rename_tensors(folder: Path, rename: Callable[[str], str]) -> None:
    """Gives the tensors of a checkpoint other names, in the headers and in the index; the data stays."""
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = {name if name == "__metadata__" else rename(name): entry for name, entry in json.loads(data[8:start]).items()}
        raw = json.dumps(header).encode()
        path.write_bytes(len(raw).to_bytes(8, "little") + raw + data[start:])
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {rename(name): file for name, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))


@cache
def example() -> Component:
    return read_inventory(EXAMPLE).main


@pytest.fixture(scope="module", params=["hub names", "newer names"])
def component(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, copy_model: Any) -> Component:
    """The example under both generations of names."""
    if request.param == "hub names":
        return example()
    folder = copy_model(tmp_path_factory.mktemp("newer"))
    rename_tensors(folder, newer)
    return read_inventory(folder).main


def recipe(**changes: Any) -> Recipe:
    base = {"quantize": [{"modules": "model.layers.*", "scheme": "fp8"}], "keep": ["visual*", "lm_head"], "kv_cache": "fp8"}
    return Recipe.model_validate({**base, **changes})


def plan(component: Component, **changes: Any) -> Plan:
    asked = recipe(**changes)
    return build_plan(asked, component, find_scope(component.config), find_exporter(asked.export.format))


def with_tensors(component: Component, *specs: TensorSpec, without: str = "\0") -> Component:
    """The component with more tensors, and less those whose name contains `without`."""
    kept = {name: tensor for name, tensor in component.tensors.items() if without not in name}
    more = {spec.name: SourceTensor(spec, component.weight_files[0], 10**9 + i) for i, spec in enumerate(specs)}
    return dataclasses.replace(component, tensors=MappingProxyType(kept | more))


def with_config(component: Component, **keys: Any) -> Component:
    config = {**component.config, **keys}
    return dataclasses.replace(component, config=MappingProxyType(config), config_text=json.dumps(config, indent=2))


def refused(kind: type[CkptqError], component: Component, *parts: str, hint: str = "", **changes: Any) -> None:
    """Planning raises just this error, in a message that has all of `parts`."""
    with pytest.raises(CkptqError) as caught:
        plan(component, **changes)
    assert type(caught.value) is kind
    for part in parts:
        assert part in str(caught.value)
    assert hint in str(caught.value.hint)


# What is written


def test_the_golden_keys() -> None:
    """Names, dtypes and shapes for the example, as ModelOpt 0.47.0 exports it."""
    found = {name: [spec.dtype, list(spec.shape)] for name, spec in plan(example()).tensors.items()}
    assert found == json.loads(GOLDEN.read_text())


def test_conservation(component: Component) -> None:
    """Every source tensor is copied or encoded, once; what is new is scales alone."""
    made = plan(component)
    used = [op.source for op in made.ops if not isinstance(op, Scale)]
    assert sorted(used) == sorted(component.tensors)
    written = [spec.name for op in made.ops for spec in op.outputs]
    assert len(written) == len(set(written))
    assert {name for name in written if not name.endswith(SCALES)} == set(component.tensors)
    for op in made.ops:
        if isinstance(op, Copy):
            assert op.output == component.tensors[op.source].spec
        elif isinstance(op, Encode):
            assert op.codes == TensorSpec(op.source, "F8_E4M3", component.tensors[op.source].spec.shape)
        else:
            assert (op.output.dtype, op.output.shape) == ("F32", ())
    encoded = {op.source for op in made.ops if isinstance(op, Encode)}
    at = "model.layers" if "model.norm.weight" in component.tensors else "model.language_model.layers"
    assert encoded == {f"{at}.{i}.{linear}.weight" for i in range(6) for linear in LINEARS}


DENOISERS = ("int8", "mxfp8", "mxfp4-dualscale")
"""Formats of denoisers alone: test_omni_exporters.py."""
COMBINATIONS = [(scheme, form) for form in all_formats() if form not in DENOISERS for scheme in find_exporter(form).SCHEMES]


@pytest.mark.parametrize(("scheme", "form"), COMBINATIONS)
def test_conservation_in_every_format(component: Component, scheme: str, form: str) -> None:
    """As above, and the bytes of codes and local scales follow from the scheme alone."""
    rules = [{"modules": "model.layers.*", "scheme": scheme}]
    made = plan(component, quantize=rules, export={"format": form}, kv_cache=None if form == "fp8" else "fp8")
    assert sorted(op.source for op in made.ops if not isinstance(op, Scale)) == sorted(component.tensors)
    written = [spec.name for op in made.ops for spec in op.outputs]
    assert len(written) == len(set(written))
    for op in made.ops:
        if isinstance(op, Encode):
            n, k = component.tensors[op.source].spec.shape
            assert op.codes.nbytes == n * k // op.scheme.packed
            assert (op.whole is None) == (op.scheme.limit is None)
            assert (op.local is None) == (op.scheme.scale is None)
            groups = -(-n // (op.scheme.rows or n)) * -(-k // (op.scheme.columns or k))
            assert op.local is None or op.local.numel == groups
    kinds = {o.kind for o in made.observers}
    assert ("input" in kinds) == (SCHEMES[scheme].activation == "static")
    assert ("weight" in kinds) == (SCHEMES[scheme].limit is not None)
    assert ({"k", "v"} <= kinds) == (form != "fp8")


def test_a_weight_that_a_scheme_does_not_fit() -> None:
    narrow = dataclasses.replace(example().tensors["model.layers.0.mlp.down_proj.weight"], spec=TensorSpec("x", "BF16", (256, 776)))
    odd = dataclasses.replace(
        example(), tensors=MappingProxyType({**example().tensors, "model.layers.0.mlp.down_proj.weight": narrow})
    )
    for scheme, columns in (("nvfp4a16", 16), ("mxfp8", 32), ("fp8-block", 128)):
        rules = [{"modules": "model.layers.*", "scheme": scheme}]
        parts = ("model.layers.0.mlp.down_proj", f"columns in multiples of {columns}", "[256, 776]")
        refused(RecipeError, odd, *parts, hint="keep the module", quantize=rules, kv_cache=None)


def test_both_generations_plan_alike(component: Component) -> None:
    made, hub = plan(component), plan(example())
    same = newer if "model.norm.weight" not in component.tensors else str
    assert {same(name): (spec.dtype, spec.shape) for name, spec in hub.tensors.items()} == {
        name: (spec.dtype, spec.shape) for name, spec in made.tensors.items()
    }
    assert made.nbytes == hub.nbytes
    assert len(made.observers) == len(hub.observers)
    assert validate_plan(made, find_scope(component.config)) == []
    ignored = json.loads(made.files["config.json"])["quantization_config"]["ignore"]
    assert sorted(ignored) == sorted(["lm_head", same("model.embed_tokens"), same("visual.").removesuffix(".") + "*"])


@pytest.mark.parametrize("tower", ["visual*", "model.visual*", "visual", "model.visual", "visual.*", "model.visual.*", "*visual.*"])
@pytest.mark.parametrize("layers", ["model.layers.*", "model.language_model.layers.*", "model.layers", "*.layers.*"])
def test_patterns_in_either_generation(tower: str, layers: str, component: Component) -> None:
    asked = {"keep": [tower, "lm_head"], "quantize": [{"modules": layers, "scheme": "fp8"}]}
    assert [d.action for d in plan(component, **asked).decisions] == [d.action for d in plan(component).decisions]


def test_decisions(component: Component) -> None:
    made = plan(component)
    by_module = {d.module: d for d in made.decisions}
    assert set(by_module) == {module_of(name) for name in component.tensors if name.endswith(".weight")}
    for decision in by_module.values():
        assert decision.reason
        if decision.action == "fp8":
            assert decision.rule == "quantize: model.layers.*"
    assert by_module["lm_head"].rule == "keep: lm_head"


def test_the_first_rule_decides_and_keep_comes_before_all() -> None:
    rules = [{"modules": ["model.layers.0.*", "model.layers.1.*"], "scheme": "fp8"}, {"modules": "model.layers.*", "scheme": "fp8"}]
    made = plan(example(), quantize=rules, keep=["visual*", "lm_head", "model.layers.0"])
    rule_of = {d.module: d.rule for d in made.decisions}
    assert rule_of["model.layers.0.mlp.up_proj"] == "keep: model.layers.0"
    assert rule_of["model.layers.1.mlp.up_proj"] == "quantize: model.layers.1.*"
    assert rule_of["model.layers.2.mlp.up_proj"] == "quantize: model.layers.*"


def test_observers(component: Component) -> None:
    """One amax a weight, one for the input of each fused group, K and V of each layer."""
    found: dict[str, int] = {}
    for observer in plan(component).observers:
        found[observer.kind] = found.get(observer.kind, 0) + 1
    assert found == {"weight": 6 * 7, "input": 6 * 4, "k": 6, "v": 6}


def test_one_weight_scale_and_one_input_scale_in_a_fused_group() -> None:
    amax_of = {op.output.name: op.amax for op in plan(example()).ops if isinstance(op, Scale)}
    for group in FUSED:
        (shared,) = {amax_of[f"model.layers.3.{shard}.weight_scale"] for shard in group}
        assert [o.module for o in shared] == [f"model.layers.3.{shard}" for shard in group]
        (observers,) = {amax_of[f"model.layers.3.{shard}.input_scale"] for shard in group}
        assert [o.kind for o in observers] == ["input"]


def test_without_a_kv_cache_there_are_no_kv_scales() -> None:
    made = plan(example(), kv_cache=None)
    assert not [name for name in made.tensors if name.endswith((".k_scale", ".v_scale"))]
    assert "kv_cache_scheme" not in json.loads(made.files["config.json"])["quantization_config"]
    assert json.loads(made.files["hf_quant_config.json"])["quantization"]["kv_cache_quant_algo"] is None
    assert {o.kind for o in made.observers} == {"weight", "input"}


def test_a_whole_layer_may_stay(component: Component) -> None:
    """vLLM skips a fused linear only where each shard is listed by its exact name; the KV scales stay, of all layers or none."""
    made = plan(component, keep=["visual*", "lm_head", "model.layers.3.*"])
    at = "model.layers.3." if "model.norm.weight" in component.tensors else "model.language_model.layers.3."
    for shard in LINEARS:
        assert made.tensors[f"{at}{shard}.weight"].dtype == "BF16"
        assert f"{at}{shard}.weight_scale" not in made.tensors
    assert f"{at}self_attn.k_proj.k_scale" in made.tensors
    section = json.loads(made.files["config.json"])["quantization_config"]
    assert {name for name in section["ignore"] if ".layers." in name} == {at + shard for shard in LINEARS}
    other = json.loads(made.files["hf_quant_config.json"])["quantization"]
    assert other["exclude_modules"] == section["ignore"]
    assert validate_plan(made, find_scope(component.config)) == []


def test_files_and_index(component: Component) -> None:
    made = plan(component, export={"shard_size": "4MB"})
    weight_map = json.loads(made.files[INDEX])["weight_map"]
    assert weight_map == {spec.name: shard.file for shard in made.shards for op in shard.ops for spec in op.outputs}
    assert json.loads(made.files[INDEX])["metadata"]["total_size"] == made.nbytes
    assert [s.file for s in made.shards] == [
        f"model-{i:05}-of-{len(made.shards):05}.safetensors" for i in range(1, len(made.shards) + 1)
    ]
    assert not set(made.files) & set(made.sidecars)
    assert made.config_changes == ("quantization_config: added",)
    single = plan(component, export={"shard_size": "1GB"})
    assert [s.file for s in single.shards] == ["model.safetensors"]
    assert INDEX not in single.files


@settings(max_examples=40, deadline=None)
@given(limit=st.integers(1, 30 * 10**6), newer_names=st.booleans())
def test_any_shard_size_holds_the_same_tensors(limit: int, newer_names: bool) -> None:
    component = example()
    if newer_names:
        renamed = {
            newer(n): dataclasses.replace(t, spec=dataclasses.replace(t.spec, name=newer(n))) for n, t in component.tensors.items()
        }
        component = dataclasses.replace(component, tensors=MappingProxyType(renamed))
    made = plan(component, export={"shard_size": limit})
    assert made.tensors == plan(component).tensors
    file_of: dict[str, str] = {}
    for shard in made.shards:
        specs = {spec.name: spec for op in shard.ops for spec in op.outputs}
        assert set(specs) == set(shard.offsets)
        at = 0
        for name, offset in sorted(shard.offsets.items(), key=lambda item: (item[1], specs[item[0]].nbytes)):
            assert offset == at, f"a gap or an overlap before {name}"
            assert offset % DTYPE_BYTES[specs[name].dtype] == 0
            at += specs[name].nbytes
            file_of[name] = shard.file
        assert shard.data_bytes == at
        groups = {op.whole.amax for op in shard.ops if isinstance(op, Encode) and op.whole}
        copies = [op for op in shard.ops if isinstance(op, Copy)]
        assert at <= limit or len(groups) + len(copies) == 1, "above the limit, and could be split"
    layers = "model.language_model.layers" if newer_names else "model.layers"
    for layer in range(6):
        for group in FUSED:
            ends = ("weight", "weight_scale", "input_scale")
            assert len({file_of[f"{layers}.{layer}.{shard}.{end}"] for shard in group for end in ends}) == 1


def test_tensors_of_odd_sizes_are_aligned_too() -> None:
    odd = {
        n: dataclasses.replace(t, spec=TensorSpec(n, t.spec.dtype, tuple(7 for _ in t.spec.shape)))
        for n, t in example().tensors.items()
    }
    for shard in plan(dataclasses.replace(example(), tensors=MappingProxyType(odd)), export={"shard_size": 1000}).shards:
        dtypes = {spec.name: spec.dtype for op in shard.ops for spec in op.outputs}
        assert [name for name, offset in shard.offsets.items() if offset % DTYPE_BYTES[dtypes[name]]] == []


def test_the_digest_follows_the_plan() -> None:
    one = plan(example())
    assert one.digest == plan(example()).digest
    others = [plan(example(), kv_cache=None), plan(example(), export={"shard_size": 10**6}), plan(with_config(example(), x=1))]
    assert len({one.digest, *(o.digest for o in others)}) == 4


def test_tied_embeddings(tmp_path: Path) -> None:
    """No lm_head is stored, and yet the server must be told to leave it: vLLM 0.32.0 would make it FP8 without a scale."""
    component = read_inventory(make_checkpoint(tmp_path / "tied", **{**PRESETS["tiny"], "sparse": True, "tied": True})).main
    assert "lm_head.weight" not in component.tensors
    made = plan(component)
    assert "lm_head" in json.loads(made.files["config.json"])["quantization_config"]["ignore"]
    assert {d.module: d.rule for d in made.decisions}["lm_head"] == "keep: lm_head"
    assert set(component.tensors) == {name for name in made.tensors if not name.endswith(SCALES)}
    assert validate_plan(made, find_scope(component.config)) == []


# What is refused


def test_patterns_that_match_nothing(component: Component) -> None:
    asked = {"keep": ["model.vsual*", "lm_haed"], "quantize": [{"modules": ["model.layers.*", "model.layer.*"], "scheme": "fp8"}]}
    refused(
        RecipeError,
        component,
        "keep pattern 'model.vsual*' matches no module; did you mean model.visual",
        hint="ckptq inspect",
        **asked,
    )
    refused(RecipeError, component, "keep pattern 'lm_haed' matches no module; did you mean lm_head?", **asked)
    refused(RecipeError, component, "quantize pattern 'model.layer.*' matches no module; did you mean model.layers or", **asked)


@pytest.mark.parametrize("pattern", ["", "model.layers.6.*", "q_proj", "re:visual.*", "VISUAL*"])
def test_more_patterns_that_match_nothing(pattern: str) -> None:
    refused(RecipeError, example(), f"keep pattern {pattern!r} matches no module", keep=["visual*", "lm_head", pattern])


def test_a_rule_that_reaches_no_linear() -> None:
    rules = [{"modules": ["model.layers.*", "*layernorm"], "scheme": "fp8"}]
    refused(RecipeError, example(), "quantize pattern '*layernorm' matches no linear of the language model", quantize=rules)


@pytest.mark.parametrize("shard", [*LINEARS[:3], *LINEARS[4:6]])
def test_a_pattern_that_splits_a_fused_group(shard: str, component: Component) -> None:
    keep = ["visual*", "lm_head", f"model.layers.2.{shard}"]
    refused(RecipeError, component, "the server fuses", f"{shard}: keep (keep: model.layers.2.{shard})", hint="one rule", keep=keep)


@pytest.mark.parametrize("shard", [LINEARS[3], LINEARS[6]])
def test_a_linear_of_its_own_may_stay(shard: str) -> None:
    made = plan(example(), keep=["visual*", "lm_head", f"model.layers.2.{shard}"])
    assert made.tensors[f"model.layers.2.{shard}.weight"].dtype == "BF16"


def test_a_rule_that_reaches_the_tower_or_the_head(component: Component) -> None:
    rules = [{"modules": "*", "scheme": "fp8"}]
    refused(
        RecipeError,
        component,
        "'*' matches",
        "outside the language model's layers",
        hint="add 'visual' to keep",
        keep="lm_head",
        quantize=rules,
    )
    refused(RecipeError, component, "'*' matches lm_head", hint="add 'lm_head' to keep", keep="visual*", quantize=rules)
    assert plan(component, quantize=rules).tensors == plan(component).tensors


def test_nothing_to_quantize() -> None:
    refused(RecipeError, example(), "the recipe quantizes nothing", keep=["visual*", "lm_head", "model.layers"])


def test_a_layer_without_one_of_its_tensors(component: Component) -> None:
    broken = with_tensors(component, without="layers.4.mlp.up_proj.weight")
    refused(SourceError, broken, "model.layers.4.mlp.up_proj.weight: missing", "6 layers", hint="fetch")


def test_a_layer_too_many(component: Component) -> None:
    config = {"text_config": {**component.config["text_config"], "num_hidden_layers": 5}}
    refused(SourceError, with_config(component, **config), "layers.5.", "config.json has num_hidden_layers 5")


@pytest.mark.parametrize("count", [0, -1, "6", None, 6.0])
def test_num_hidden_layers(count: object) -> None:
    config = {"text_config": {**example().config["text_config"], "num_hidden_layers": count}}
    refused(SourceError, with_config(example(), **config), f"should be an integer from 1 to 4096, found {count!r}")


@pytest.mark.parametrize(
    ("dtype", "shape"), [("I8", (256, 768)), ("F64", (256, 768)), ("BF16", (196608,)), ("BF16", (1, 256, 768)), ("BF16", (256, 0))]
)
def test_a_weight_that_is_no_float_matrix(dtype: str, shape: tuple[int, ...]) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    broken = with_tensors(example(), TensorSpec(name, dtype, shape), without=name)
    refused(SourceError, broken, f"{name}: expected a matrix in BF16, F16 or F32, found {dtype} {list(shape)}")


def test_a_quantized_source() -> None:
    hint = "start from the BF16 checkpoint"
    by_config = with_config(example(), quantization_config={"quant_method": "fp8"})
    refused(UnsupportedError, by_config, "quantized already: config.json says quant_method 'fp8'", hint=hint)
    by_file = dataclasses.replace(example(), sidecars=("hf_quant_config.json",))
    refused(UnsupportedError, by_file, "quantized already: there is a hf_quant_config.json", hint=hint)
    name = "model.layers.0.mlp.up_proj.weight"
    by_dtype = with_tensors(example(), TensorSpec(name, "F8_E4M3", (768, 256)), without=name)
    refused(UnsupportedError, by_dtype, f"quantized already: {name} is F8_E4M3", hint=hint)


def test_a_section_that_says_nothing_makes_room() -> None:
    """Two equal keys would be two configs to different readers."""
    made = plan(with_config(example(), quantization_config=None)).files["config.json"]
    assert parse(made.encode())["quantization_config"]["quant_method"] == "modelopt"


def test_our_own_output_is_refused_as_quantized() -> None:
    made = plan(example())
    tensors = {name: SourceTensor(spec, "model.safetensors", i) for i, (name, spec) in enumerate(made.tensors.items())}
    config = made.files["config.json"]
    output = dataclasses.replace(example(), tensors=MappingProxyType(tensors), config_text=config, config=json.loads(config))
    refused(UnsupportedError, output, "quantized already: config.json says quant_method 'modelopt'")


@pytest.mark.parametrize(
    ("architectures", "near"),
    [
        (["OlmoForCausalLM"], ""),
        ([], ""),
        (None, ""),
        ([7, "x" * 10**5], ""),
        (["Gemma2ForCausalLM"], "; nearest in name: Gemma3ForCausalLM, Gemma3ForConditionalGeneration"),
        (["MistralForCausalLm"], "; nearest in name: MistralForCausalLM, MixtralForCausalLM"),
    ],
)
def test_an_architecture_without_a_scope(architectures: list[Any] | None, near: str) -> None:
    with pytest.raises(UnsupportedError, match="no scope for architectures ") as caught:
        find_scope({"architectures": architectures})
    assert str(caught.value).endswith(f"]{near}") or (not near and len(str(caught.value)) < 300)
    assert "`ckptq inspect SRC` proposes a scope" in str(caught.value.hint)


# config.json's text

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=5).filter(lambda key: key != "added"), VALUES, max_size=4)


@given(
    data=OBJECTS,
    section=st.dictionaries(st.text(max_size=4), VALUES, max_size=2),
    indent=st.sampled_from([None, 0, 1, 2, 4, "\t"]),
    ends=st.tuples(*[st.text(" \n\t", max_size=2)] * 3),
    ascii_only=st.booleans(),
)
def test_a_section_is_inserted_and_every_byte_stays(
    data: dict[str, Any], section: dict[str, Any], indent: int | str | None, ends: tuple[str, ...], ascii_only: bool
) -> None:
    text = json.dumps(data, indent=indent, ensure_ascii=ascii_only)
    text = ends[0] + text[:-1] + ends[1] + "}" + ends[2]
    result = insert_section(text, "added", section)
    added = len(result) - len(text)
    assert any(result[:i] + result[i + added :] == text for i in range(len(text) + 1))
    assert json.loads(result) == {**data, "added": section}
    assert list(json.loads(result)) == [*data, "added"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", '{"q": {"a": [1]}}'),
        ('{"b": 1.0e-6}', '{"b": 1.0e-6, "q": {"a": [1]}}'),
        ("{\n}\n", '{\n  "q": {\n    "a": [\n      1\n    ]\n  }\n}\n'),
        ('{\n    "b": "\\u00e9"\n}', '{\n    "b": "\\u00e9",\n    "q": {\n        "a": [\n            1\n        ]\n    }\n}'),
        ('{\n\t"b": "é"\n}\n', '{\n\t"b": "é",\n\t"q": {\n\t\t"a": [\n\t\t\t1\n\t\t]\n\t}\n}\n'),
    ],
)
def test_a_section_looks_like_the_rest(text: str, expected: str) -> None:
    assert insert_section(text, "q", {"a": [1]}) == expected


def test_config_json_of_the_example() -> None:
    made = plan(example()).files["config.json"]
    text = (EXAMPLE / "config.json").read_text()
    at = made.index(',\n  "quantization_config"')
    assert text.startswith(made[:at])
    assert made.endswith(text[at:])
