"""Each method's reading of its section and its list, against what the real vLLM builds: every linear, its parameters' shapes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peers.answers import ask

from ckptq.checkpoint import TensorSpec
from ckptq.errors import SourceError, UnsupportedError
from ckptq.scopes import Scope
from ckptq.scopes.qwen2_5_vl import SCOPE as VL
from ckptq.scopes.qwen3_moe import SCOPE as MOE
from ckptq.validators import Stored, configs, expressions, has_errors
from ckptq.validators.formats import SCALAR, Format, Scales
from ckptq.validators.methods import Method, Treatment, find_method, known
from ckptq.validators.parallel import split_of
from ckptq.validators.servers import DEFAULT, SERVERS, Server
from ckptq.validators.vllm_rules import ServerLinear, server_linears

METHODS = ("compressed-tensors", "fp8", "modelopt", "quark")
SCOPES: Mapping[str, Scope] = {"vl": VL, "moe": MOE}
CONFIGS: Mapping[str, dict[str, Any]] = {
    "vl": {"text_config": {"num_hidden_layers": 11}, "vision_config": {"depth": 2}},
    "moe": {"num_hidden_layers": 11, "num_experts": 2, "mlp_only_layers": [1]},
}
DTYPES = {"F32": "float32", "F8_E4M3": "float8_e4m3fn", "I8": "int8", "U8": "uint8"}
ROWS, COLUMNS = 128, 256  # of every shard in tests/server/answers.py
Section = dict[str, Any]


def chosen(family: str) -> tuple[ServerLinear, ...]:
    """Every kind of linear, in layers 0, 1 and 10, whose names contain one another; of experts one."""
    linears = server_linears(SCOPES[family], CONFIGS[family], ())
    skipped = tuple(f".layers.{n}." for n in range(2, 10))
    unique = {(linear.prefix, linear.part): linear for linear in reversed(linears)}
    return tuple(linear for linear in reversed(unique.values()) if not any(part in linear.prefix for part in skipped))


LINEARS = {family: chosen(family) for family in SCOPES}


def kind(linear: ServerLinear, scope: Scope) -> str:
    """The class that vLLM builds it of, in the words of tests/server/answers.py."""
    if linear.part in ("head", "experts"):
        return linear.part
    split = split_of(scope)(linear)
    rows = "gate_up" if len(linear.shards) > 1 else "rows"
    return {"heads": "qkv", "rows": rows, "columns": "columns", "none": "router"}[split]


def described(treatment: Treatment, linear: ServerLinear, scope: Scope) -> Any:
    """A treatment as tests/server/answers.py tells it."""
    if not isinstance(treatment, Format):
        return treatment
    if linear.part == "experts":
        otherwise = "none" if treatment.granularity == "group" else "dynamic"
        return [treatment.granularity, "static" if any(scales.of_input for scales in treatment.scales) else otherwise]
    shards = {"qkv": 3, "gate_up": 2}.get(kind(linear, scope), 1)
    rows, columns = treatment.block or (1, 1)
    sizes = {"n": shards * ROWS, "nb": shards * math.ceil(ROWS / rows), "kb": math.ceil(COLUMNS / columns), "1": 1}

    def shape(scales: Scales) -> list[int]:
        if scales.shapes == SCALAR:
            return [1 if scales.unset == "one" else shards]
        (words,) = scales.shapes
        return [sizes[word] for word in words.split()]

    codes = {treatment.weight: [DTYPES[treatment.codes], [shards * ROWS, COLUMNS // treatment.packed]]}
    dropped = {name: ["bfloat16", [shards]] for name in treatment.dropped}  # torch's default dtype there
    return codes | {scales.kind: [DTYPES[scales.dtype], shape(scales)] for scales in treatment.scales} | dropped


def ours(family: str, section: Section, server: Server = DEFAULT) -> list[Any] | str:
    """What ckptq says of each linear, or "refused" of the section."""
    found, findings = configs.read(Stored({"quantization_config": section}, None, {}), SCOPES[family], server)
    if found is None:
        assert has_errors(findings)
        return "refused"
    treat = find(found.method).matcher(found, SCOPES[family])
    return [described(treat(linear), linear, SCOPES[family]) for linear in LINEARS[family]]


def find(name: str) -> Method:
    method = find_method(name)
    assert method is not None
    return method


def theirs(family: str, section: Section) -> list[Any] | str:
    """What vLLM does: its own config, its own layers."""
    linears = [[linear.prefix, kind(linear, SCOPES[family])] for linear in LINEARS[family]]
    attention = f"{SCOPES[family].server_layers}.0.self_attn.attn"
    answer = ask({"family": family, "section": section, "linears": linears, "attention": attention})
    return "refused" if "refused" in answer else [_short(found) for found in answer["linears"]]


def _short(found: Any) -> Any:
    return "refused" if isinstance(found, str) and found.startswith("refused") else found


def compare(family: str, section: Section, server: Server = DEFAULT) -> tuple[set[str], str]:
    """(what was said of the linears, in what both differ or ""). Where ckptq refuses a section, vLLM may do so at a linear."""
    mine, real = ours(family, section, server), theirs(family, section)
    if mine == "refused" or real == "refused":
        same = mine == real or (mine == "refused" and "refused" in real)
        return {"refused"}, "" if same else f"{section}: ours {mine!s:.60}, vLLM's {real!s:.60}"
    pairs = {linear.prefix: pair for linear, pair in zip(LINEARS[family], zip(mine, real, strict=True), strict=True)}
    differ = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    said = {found if isinstance(found, str) else "built" for found in mine}
    return said, f"{section}: {len(differ)} of {len(pairs)}, {next(iter(differ.items()))}" if differ else ""


# --- sections ---

FLOAT8 = {"type": "float", "num_bits": 8}
TOKEN = {**FLOAT8, "strategy": "token", "dynamic": True}


def modelopt(*ignore: str, algo: str = "FP8", **more: Any) -> Section:
    return {"quant_method": "modelopt", "quant_algo": algo, "ignore": list(ignore), **more}


def fp8(*ignored: str, scheme: str = "dynamic", **more: Any) -> Section:
    return {"quant_method": "fp8", "activation_scheme": scheme, "ignored_layers": list(ignored), **more}


def group(strategy: str | None = "channel", inputs: Any = TOKEN, targets: Any = ("Linear",), **weights: Any) -> dict[str, Any]:
    said = {**FLOAT8, **({"strategy": strategy} if strategy else {}), **weights}
    return {"targets": list(targets), "weights": said, "input_activations": inputs}


def compressed(*ignore: str, groups: Any = None, **more: Any) -> Section:
    found = {f"group_{i}": g for i, g in enumerate(groups or [group()])}
    section = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": found, "ignore": list(ignore)}
    return {key: value for key, value in {**section, **more}.items() if value != "absent"}


def spec(qscheme: str = "per_tensor", dynamic: bool = False, **more: Any) -> dict[str, Any]:
    return {"dtype": "fp8_e4m3", "qscheme": qscheme, "is_dynamic": dynamic, "symmetric": True, **more}


def layer(weight: Any = None, inputs: Any = None, **more: Any) -> dict[str, Any]:
    found = {"weight": weight or spec(), "input_tensors": inputs or spec(), "output_tensors": None, "bias": None}
    return {**found, **more}


BLOCKS = layer(spec("per_block", block_size=[128, 128]), spec("per_group", True, group_size=128))
CHANNELS = layer(spec("per_channel", ch_axis=0), spec("per_channel", True))


def quark(*exclude: str, **more: Any) -> Section:
    section = {"quant_method": "quark", "exclude": list(exclude), "export": {"kv_cache_group": []}}
    section |= {"global_quant_config": layer(), "layer_quant_config": {}, "layer_type_quant_config": {}}
    return {key: value for key, value in {**section, **more}.items() if value != "absent"}


def with_kv(names: Any = ("*k_proj", "*v_proj"), output: Any = None, **layers: Any) -> Section:
    said = {name: layer(output_tensors=spec() if output is None else output) for name in ("*k_proj", "*v_proj")}
    return quark(export={"kv_cache_group": list(names)}, layer_quant_config={**said, **layers})


QKV = [f"model.layers.0.self_attn.{s}_proj" for s in "qkv"]
GATE_UP = ["visual.blocks.0.mlp.gate_proj", "visual.blocks.0.mlp.up_proj"]
NAMES: tuple[tuple[str, ...], ...] = (
    (), ("lm_head", "model.embed_tokens", "visual*"), ("lm_head", "model.visual*"), ("model.visual",), ("visual",), ("visual.",),
    ("model.visual.*",), ("*visual*",), ("vision*",), ("Visual*",), ("language_model*",), ("*",), ("",), (".*",), ("a*",),
    ("model.*",), ("lm_head.*",), ("lm_head*",), ("*lm_head",), ("model.layers.1",), ("model.layers.1.",), ("model.layers.1.*",),
    ("model.language_model.layers.1*",), ("*q_proj*",), ("*layers.0.self_attn.q_proj",), ("*.k_proj",), tuple(QKV),
    tuple(QKV[:2]), (QKV[0],), tuple(f"*layers.0.self_attn.{s}_proj" for s in "qkv"), ("model.layers.0.self_attn.qkv_proj",),
    ("model.layers.0.self_attn.qkv_proj", QKV[0]), ("language_model.model.layers.0.self_attn.qkv_proj",), ("[a-z]*",),
    (GATE_UP[0],), ("visual.blocks.?.attn*",), tuple(GATE_UP), ("visual.blocks.0.attn.qkv",), ("model.experts*",), ("experts",),
    ("*mlp.gate",), ("model.layers.0.mlp.experts",), ("model.layers.0.mlp.experts.1.up_proj",), ("model.layers.0.mlp.experts*",),
    ("model.layers.*.mlp.gate",), ("model.layers.0.mlp.experts.0.gate_proj",), ("model.layers.0.mlp",), ("vision_tower",),
    tuple(f"model.layers.0.mlp.experts.0.{p}_proj" for p in ("gate", "up", "down")), ("Linear",), ("RoutedExperts",),
)  # fmt: skip
EXPRESSIONS: tuple[tuple[str, ...], ...] = (
    ("re:visual.*",), ("re:.*visual.*",), ("re:.*lm_head",), ("re:.*[qkv]_proj",), ("re:.*q_proj",), ("re:.*qkv_proj",), ("re:",),
    ("re:model.layers.1",), ("re:.*layers.1\\..*",), ("re:.*mlp.gate$",), ("re:.*mlp.gate",), ("re:.*experts.*",), ("re:.*",),
    ("re:.*experts.0.*",), ("re:.*experts.1.*",), ("re:.*experts$",), ("re:Linear",), ("re:.*Parallel.*",), ("re:(",), ("re:*",),
    ("re:.*\\.gate_up_proj", QKV[0]), ("re:.*gate_proj", "re:.*up_proj"), ("re:(?i).*VISUAL.*",),
    ("re:.*embed_tokens", "re:.*q_proj"),
)  # fmt: skip


def modelopt_sections() -> Iterator[Section]:
    for names in (*NAMES, *EXPRESSIONS):
        yield modelopt(*names)
    for algo in ("FP8", "fp8", "FP8_PER_CHANNEL_PER_TOKEN", "fp8_pb_wo", "", "INT8", "FP16"):
        yield modelopt("visual*", algo=algo)
    nested = {"quant_algo": "FP8", "exclude_modules": ["lm_head", "visual*"], "kv_cache_quant_algo": "FP8"}
    yield {"quant_method": "modelopt", "quantization": nested}
    yield {"quant_method": "modelopt", "quantization": {**nested, "exclude_modules": "lm_head"}}
    yield {"quant_method": "modelopt", "quant_algo": "FP8"}
    yield modelopt(exclude_modules=["visual*"])
    yield {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["visual*"]}
    yield {**modelopt(), "ignore": None}
    yield {**modelopt(), "ignore": "visual*"}
    yield {**modelopt(), "ignore": ["visual*", 1]}
    yield from modelopt_numbers()
    yield from mixed_sections()


def modelopt_numbers() -> Iterator[Section]:
    """NVFP4 and MXFP8, in both files' forms."""
    kept = ("lm_head", "visual*", "model.layers.*.mlp.experts*")
    for name in (*configs.MODELOPT, "modelopt_other", "ModelOpt"):
        for algo in ("FP8", "NVFP4", "w4a16_nvfp4", "W4A16_NVFP4", "MXFP8", "FP8_PB_WO", "NVFP4_AWQ", "MIXED_PRECISION"):
            yield {**modelopt(*kept, algo=algo), "quant_method": name}
    one, other = {"weights": {}, "input_activations": {"num_bits": 4}}, {"weights": {}, "input_activations": None}
    for groups in ({"a": one}, {"a": other}, {"a": one, "b": other}, {"a": {}}, {}, [], None, {"a": None}):
        for algo in ("NVFP4", "MXFP8", "FP8"):
            yield modelopt(*kept, algo=algo, config_groups=groups)
        yield modelopt("lm_head", "*mlp.gate", algo="NVFP4", config_groups=groups)
    for names in NAMES:
        yield modelopt(*names, algo="W4A16_NVFP4")
    for size in (16, "16", None, "x", 16.0, [16]):  # others fit no kernel, which is asked later
        yield modelopt(*kept, algo="NVFP4", group_size=size)
        yield modelopt(*kept, algo="MXFP8", group_size=size)
        yield modelopt(*kept, algo="FP8", group_size=size)
    for algo in ("NVFP4", "W4A16_NVFP4", "MXFP8", "FP8", "MIXED_PRECISION", "FP8_PER_CHANNEL_PER_TOKEN"):
        nested: Section = {"quant_algo": algo, "group_size": 16, "kv_cache_quant_algo": None, "exclude_modules": list(kept)}
        yield {"producer": {"name": "modelopt"}, "quantization": nested}
        yield {"quantization": {**nested, "modelopt_quant_config": {}}}
        yield {"quant_method": "modelopt", "quantization": nested}
        for absent in ("group_size", "kv_cache_quant_algo", "exclude_modules"):
            yield {"producer": {"name": "modelopt"}, "quantization": {k: v for k, v in nested.items() if k != absent}}


def listed(*names: str, algo: Any = "NVFP4", **more: Any) -> dict[str, Any]:
    return {name: {"quant_algo": algo, **more} for name in names}


def mixed(layers: Any, *ignore: str, **more: Any) -> Section:
    return modelopt(*ignore, algo="MIXED_PRECISION", quantized_layers=layers, **more)


def mixed_sections() -> Iterator[Section]:
    down = "model.layers.0.mlp.down_proj"
    for names in NAMES:
        yield mixed(listed(*names, down))
        yield mixed(listed(*QKV, down, *GATE_UP, "visual.blocks.0.attn.qkv", "lm_head", algo="FP8"), *names)
    for algo in (
        "FP8",
        "fp8",
        "FP8_PER_CHANNEL_PER_TOKEN",
        "FP8_PB_WO",
        "NVFP4",
        "W4A16_NVFP4",
        "MXFP8",
        "NVFP4_AWQ",
        "",
        "MIXED_PRECISION",
    ):
        yield mixed(listed(*QKV, down, algo=algo))
        yield mixed({**listed(*QKV[:2]), **listed(QKV[2], algo=algo)})
    for size in (16, None, "16"):
        yield mixed(listed(*QKV, group_size=size))
        yield mixed(listed(*QKV, algo="FP8", group_size=size))
        yield mixed({**listed(down), **listed(*QKV, group_size=size)})
        yield mixed(listed(*QKV), group_size=size)
    for layers in (None, {}, [], "x", {down: None}, {down: {}}, {down: {"quant_algo": None}}, {down: "FP8"}):
        yield mixed(layers)
    yield {"quant_method": "modelopt", "quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": listed(*QKV)}}
    yield {"quant_method": "modelopt", "quantization": {"quant_algo": "MIXED_PRECISION"}}
    yield {**mixed(listed(*QKV)), "quant_method": "modelopt_mixed"}


def fp8_sections() -> Iterator[Section]:
    for names in (*NAMES, *EXPRESSIONS):
        yield fp8(*names)
    for scheme in ("static", "dynamic", "Static", "none"):
        yield fp8("lm_head", scheme=scheme)
    for block in ([128, 128], [64, 128], [128], [128, 128, 128], None, [0, 128], "128"):
        yield fp8(weight_block_size=block)
    yield fp8(scheme="static", weight_block_size=[128, 128])
    yield fp8(*QKV, modules_to_not_convert=["lm_head"])
    yield fp8(modules_to_not_convert=QKV)
    yield {"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": QKV}
    yield {"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": None}
    yield {"quant_method": "fp8"}


def compressed_sections() -> Iterator[Section]:
    for names in (*NAMES, *EXPRESSIONS):
        yield compressed(*names)
        yield compressed(groups=[group(targets=names)])
        yield compressed("re:.*embed_tokens", groups=[group("tensor", {**FLOAT8}, names), group()])
    static, tensor = {**FLOAT8}, {**FLOAT8, "strategy": "tensor", "dynamic": True}
    for strategy in ("tensor", "channel", "TENSOR", None, "token", "group", "attn_head", "x"):
        for inputs in (static, tensor, TOKEN, None, {**FLOAT8, "strategy": "token"}, {**static, "symmetric": False}):
            yield compressed(groups=[group(strategy, inputs)])
    yield compressed(groups=[group(None, group_size=-1)])
    yield compressed(groups=[group("channel", group_size=-1)])
    grouped = {**FLOAT8, "strategy": "group", "dynamic": True, "group_size": 128}
    for structure in ([128, 128], "128x128", [64, 64], [128], None, "x", [128, "128"]):
        yield compressed(groups=[group("block", grouped, block_structure=structure)])
    for inputs in (static, tensor, TOKEN, None):
        yield compressed(groups=[group("block", inputs, block_structure=[128, 128])])
    yield compressed(groups=[group("tensor", block_structure=[128, 128])])
    for more in (
        {"symmetric": False},
        {"dynamic": True},
        {"observer": "minmax"},
        {"actorder": None},
        {"shape": 1},
        {"type": "FLOAT"},
    ):
        yield compressed(groups=[group(**more)])
        yield compressed(groups=[group("tensor", static, **more)])
    yield compressed(groups=[group(inputs={**TOKEN, "shape": 1})])
    for format in ("absent", None, "pack-quantized", "naive-quantized", "int-quantized", "dense"):
        yield compressed(format=format)
        yield compressed(format=format, groups=[{**group(), "format": "float-quantized"}])
        yield compressed(groups=[{**group(), "format": format}])
        yield compressed(format=format, groups=[group(inputs=None)])
    yield compressed(groups=[group("tensor", static, ["Qwen2Attention"]), group()])
    yield compressed(groups=[group("tensor", static), group()])
    yield compressed(groups=[group("tensor", static, QKV), group("channel", targets=["Linear"])])
    yield compressed(groups=[group("tensor", static, QKV[:2]), group()])
    yield compressed(groups=[group("tensor", static, [QKV[0]]), group("channel", TOKEN, QKV[1:])])
    yield compressed(config_groups={"group_0": {"targets": ["Linear"]}})
    yield compressed(config_groups={"group_0": {**group(), "targets": None}})
    yield compressed(ignore="absent")
    yield compressed(ignore=None)
    yield from compressed_numbers()


def compressed_numbers() -> Iterator[Section]:
    """INT8, NVFP4, MXFP8 and MXFP4, and what is nearly so. Routed experts, of which ckptq knows FP8 and NVFP4 alone, are kept."""
    kept = ("lm_head", "re:.*experts.*")
    int8: Section = {"type": "int", "num_bits": 8}
    fp4: Section = {"type": "float", "num_bits": 4, "strategy": "tensor_group", "group_size": 16}
    mx4: Section = {**fp4, "strategy": "group", "group_size": 32}
    mx8: Section = {**FLOAT8, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    token: Section = {**int8, "strategy": "token", "dynamic": True}
    local: Section = {**fp4, "dynamic": "local"}
    every = (
        "float-quantized",
        "int-quantized",
        "nvfp4-pack-quantized",
        "mxfp8-quantized",
        "mxfp4-pack-quantized",
        "pack-quantized",
        None,
    )
    inputs = (
        None,
        {},
        int8,
        token,
        {**token, "symmetric": False},
        TOKEN,
        local,
        fp4,
        {**mx4, "dynamic": True},
        {**mx8, "dynamic": True},
    )
    weights = (
        {**int8, "strategy": "channel"}, {**int8, "strategy": "tensor"}, {**int8, "strategy": "group", "group_size": 32}, int8, fp4,
        {**fp4, "group_size": 32}, {**fp4, "symmetric": False}, mx4, {**mx4, "group_size": 16}, mx8, {**mx8, "scale_dtype": None},
        {**mx8, "scale_dtype": "uint8"}, {**mx8, "scale_dtype": "torch.float32"},
        {**int8, "strategy": "channel", "symmetric": False},
        {**mx8, "group_size": 64}, {**fp4, "dynamic": "local"}, {**mx8, "scale_dtype": "torch.nothing"}, {**int8, "num_bits": 4},
        {**mx8, "type": "fp8"},
    )  # fmt: skip
    for weight in weights:
        for activations in inputs:
            for form in every[:3] if activations is not None else every:
                one = {"targets": ["Linear"], "weights": weight, "input_activations": activations}
                yield compressed(*kept, format=form, groups=[one])
    for activations in (None, local, token, {**local, "group_size": 32}):
        for names in NAMES:
            one = {"targets": ["Linear"], "weights": fp4, "input_activations": activations}
            yield compressed(*names, format="nvfp4-pack-quantized", groups=[one])
    fp4s = {"targets": ["re:.*mlp.*"], "weights": fp4, "input_activations": local, "format": "nvfp4-pack-quantized"}
    fp8s = {**group("channel", targets=["re:.*self_attn.*"]), "format": "float-quantized"}
    int8s = {"targets": QKV, "weights": {**int8, "strategy": "channel"}, "input_activations": token, "format": "int-quantized"}
    yield compressed(*kept, format="mixed-precision", groups=[{**int8s, "targets": QKV[:2]}])
    for groups in ([fp4s, fp8s], [fp8s, int8s], [int8s, fp8s], [int8s, {**fp8s, "targets": ["Linear"]}]):
        yield compressed(*kept, format="mixed-precision", groups=groups)
        yield compressed(*kept, format="mixed-precision", groups=[{k: v for k, v in g.items() if k != "format"} for g in groups])


def quark_sections() -> Iterator[Section]:
    for names in (*NAMES, *EXPRESSIONS):
        yield quark(*names)
        yield quark(layer_quant_config=dict.fromkeys(names, CHANNELS))
    for absent in ("export", "exclude", "global_quant_config", "layer_quant_config", "layer_type_quant_config"):
        yield quark(**{absent: "absent"})
        yield quark(**{absent: None})
    yield quark(export={})
    static, token = spec(), spec("per_channel", True)
    inputs = (static, token, spec("per_tensor", True), spec("per_channel"), spec("per_group", True, group_size=128), [static], [])
    weights = (static, spec("per_channel"), BLOCKS["weight"], spec(dynamic=True), [static], spec("per_block"), [static, static])
    for weight in weights:
        for said in inputs:
            yield quark(global_quant_config={**layer(), "weight": weight, "input_tensors": said})
    for one, more in (("dtype", "int8"), ("dtype", None), ("qscheme", None), ("symmetric", False)):
        yield quark(global_quant_config=layer(weight={**static, one: more}))
        yield quark(global_quant_config=layer(inputs={**static, one: more}))
        yield quark(global_quant_config={**BLOCKS, "weight": {**BLOCKS["weight"], one: more}})
        yield quark(global_quant_config={**BLOCKS, "input_tensors": {**BLOCKS["input_tensors"], one: more}})
    for key, value in (("input_tensors", None), ("weight", None), ("output_tensors", static), ("bias", static)):
        yield quark(global_quant_config={**layer(), key: value})
    yield quark(global_quant_config=BLOCKS, layer_quant_config={"*down_proj": CHANNELS})
    yield quark(layer_quant_config={"*self_attn*": CHANNELS, "*k_proj": BLOCKS})
    yield quark(layer_quant_config={"*k_proj": CHANNELS})
    yield quark(layer_quant_config={"*k_proj": layer(output_tensors=spec())})
    yield quark(layer_type_quant_config={"RowParallelLinear": CHANNELS})
    yield with_kv()
    yield with_kv(**{"*q_proj": layer(output_tensors=spec())})
    yield with_kv(**{"*q_proj": CHANNELS})
    yield with_kv(names=["*k_proj"])
    yield with_kv(names=["*[kv]_proj"])
    yield with_kv(names=["*x_proj"])
    yield with_kv(output=spec("per_channel"))
    yield with_kv(output={**spec(), "dtype": "int8"})
    yield with_kv(output=[])
    yield quark(export={"kv_cache_group": ["*k_proj"]}, layer_quant_config={"*k_proj": {"output_tensors": spec()}})
    yield quark(export={"kv_cache_group": ["*k_proj"]})


SECTIONS: Mapping[str, Callable[[], Iterator[Section]]] = {
    "modelopt": modelopt_sections, "fp8": fp8_sections, "compressed-tensors": compressed_sections, "quark": quark_sections,
}  # fmt: skip


@pytest.mark.server
@pytest.mark.parametrize("family", SCOPES)
@pytest.mark.parametrize("name", METHODS)
def test_sections_are_read_as_the_real_vllm_reads_them(name: str, family: str) -> None:
    said: set[str] = set()
    wrong = []
    for section in SECTIONS[name]():
        with contextlib.suppress(UnsupportedError):
            found, difference = compare(family, section)
            said |= found
            wrong += [difference] if difference else []
    assert not wrong, f"{len(wrong)} differ:\n" + "\n".join(wrong[:20])
    assert said == {"built", "kept", "refused"}


# --- lists of entries, drawn ---


def entries(family: str) -> st.SearchStrategy[list[str]]:
    """Lists of real names, whole or cut at their dots, and bent in every way that the rules look at; now and then a fused group."""
    names = sorted({name for linear in LINEARS[family] for name in (linear.prefix, *linear.shards)})
    heads = st.sampled_from(["", "", "", "*", "model.", "model.language_model.", "language_model.", "re:", "re:.*", "."])
    tails = st.sampled_from(["", "", "", "*", ".*", ".", "?", "$", "*.weight", "[0-9]*"])
    cuts = st.integers(0, 9)
    bent = st.builds(bend, st.sampled_from(names), cuts, cuts, heads, tails)
    groups = st.builds(lambda linear, count: list(linear.shards[:count]), st.sampled_from(LINEARS[family]), st.integers(1, 3))
    return st.builds(lambda some, group: [*some, *group], st.lists(bent, max_size=4), st.one_of(st.just([]), groups))


def bend(name: str, first: int, last: int, head: str, tail: str) -> str:
    parts = name.split(".")
    first = first % len(parts) if first > 5 else 0
    return head + ".".join(parts[first : len(parts) - last % (len(parts) - first)]) + tail


LISTS: Mapping[str, Callable[[list[str]], Section]] = {
    "modelopt": lambda names: modelopt(*names),
    "modelopt layers": lambda names: mixed({**listed(*names, algo="FP8"), **listed(*QKV, GATE_UP[0])}, "lm_head"),
    "fp8": lambda names: fp8(*names),
    "compressed-tensors": lambda names: compressed(*names),
    "compressed-tensors targets": lambda names: compressed("lm_head", groups=[group("tensor", {**FLOAT8}, names), group()]),
    "quark": lambda names: quark(*names),
    "quark layers": lambda names: quark(layer_quant_config=dict.fromkeys(names, CHANNELS)),
}


@pytest.mark.server
@pytest.mark.parametrize("family", SCOPES)
@pytest.mark.parametrize("name", LISTS)
@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_list_is_read_as_the_real_vllm_reads_it(name: str, family: str, data: st.DataObject) -> None:
    section = LISTS[name](data.draw(entries(family)))
    with contextlib.suppress(UnsupportedError):
        _, difference = compare(family, section)
        assert not difference


@pytest.mark.server
def test_every_method_of_the_real_vllm_is_known_or_refused() -> None:
    assert set(ask({})["methods"]) <= {*configs.UNCHECKED, *configs.MODELOPT, *known()}


# --- without the real thing ---


@pytest.mark.parametrize(
    ("weights", "dtype", "code"),
    [
        ({"type": "int", "num_bits": 4}, "F8_E4M3", "config.groups"),
        ({"num_bits": 4}, "F8_E4M3", "config.groups"),
        ({"type": "int", "num_bits": 4}, "I32", "refused"),
        ({"num_bits": 4}, "BF16", "refused"),
    ],
)
def test_integers_in_the_section_and_fp8_in_the_file_contradict_each_other(weights: Section, dtype: str, code: str) -> None:
    def stored(section: Section) -> Stored:
        weight = TensorSpec("model.layers.0.mlp.up_proj.weight", dtype, (2, 2))  # type: ignore[arg-type]
        return Stored({"quantization_config": section}, None, {weight.name: weight})

    alone = stored(compressed(groups=[group(**weights)]))
    if code == "refused":
        with pytest.raises(UnsupportedError):
            configs.read(alone, VL, DEFAULT)
    else:
        settings, findings = configs.read(alone, VL, DEFAULT)
        assert settings is None
        assert [f.code for f in findings] == [code]
    with pytest.raises(UnsupportedError):  # the FP8 weights may be the other group's
        configs.read(stored(compressed(groups=[group(**weights), group()])), VL, DEFAULT)


def test_every_method_is_compared() -> None:
    assert sorted(METHODS) == sorted(known()) == sorted(SECTIONS)


@pytest.mark.parametrize("make", [compressed, quark])
def test_an_expression_that_runs_forever_is_refused(make: Callable[..., Section], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions, "SECONDS", 0.1)
    with pytest.raises(SourceError, match="takes too long"):
        ours("vl", make(r"re:(?:(\w|[a-z]|\.)\1?)*\d$"))
    assert "kept" in ours("vl", make(r"re:(?:(\w|[a-z]|\.)\1?)*$"))


def test_older_versions_try_no_expression_on_a_fused_name() -> None:
    at = [linear.prefix.endswith("layers.0.self_attn.qkv_proj") for linear in LINEARS["vl"]].index(True)
    for make, plain_counts in ((compressed, True), (quark, False)):
        for entry, found in (("re:.*qkv_proj", False), (f"{LINEARS['vl'][at].prefix}", plain_counts)):
            assert ours("vl", make(entry))[at] == "kept"
            assert (ours("vl", make(entry), SERVERS["0.26"])[at] == "kept") == found


@pytest.mark.parametrize(
    ("section", "subject"),
    [
        (modelopt(algo="INT8"), "quant_algo"),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["visual*"]}, "exclude_modules"),
        (modelopt(algo="NVFP4", group_size=32), "group_size"),
        (mixed(listed(*QKV, group_size=8)), "quantized_layers: group_size"),
        ({"quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": []}}, "kv_cache_quant_algo"),
        ({"quantization": {"quant_algo": "MXFP8", "kv_cache_quant_algo": None}}, "exclude_modules"),
        (mixed({}), "quantized_layers"),
        (mixed({QKV[0]: None}), f"quantized_layers.{QKV[0]}"),
        (mixed(listed(QKV[0], algo="NVFP4_AWQ")), f"quantized_layers.{QKV[0]}"),
        (fp8(scheme="none"), "activation_scheme"),
        (fp8(weight_block_size=[128]), "weight_block_size"),
        ({**fp8(), "ignored_layers": "visual"}, "ignored_layers"),
        (compressed(config_groups={}), "config_groups"),
        (compressed(groups=[group(shape=1)]), "weights.shape"),
        (compressed(format="absent"), "format"),
        (compressed("re:("), "re:("),
        (compressed(ignore="lm_head"), "ignore"),
        (quark(export="absent"), "export"),
        (quark(exclude="visual"), "exclude"),
        (quark("re:("), "re:("),
        (quark(layer_type_quant_config=None), "layer_type_quant_config"),
        (quark(global_quant_config=layer(spec(dynamic=True))), "global_quant_config"),
        (quark(layer_quant_config={"*k_proj": layer(output_tensors=spec())}), "layer_quant_config.*k_proj"),
        (quark(export={"kv_cache_group": ["*k_proj"]}), "layer_quant_config"),
        (quark(export={}), "kv_cache_group"),
    ],
)
def test_a_section_that_the_server_misreads_is_found_at_its_key(section: Section, subject: str) -> None:
    (finding,) = find(section.get("quant_method", "modelopt")).check(section, "config.json: quantization_config", DEFAULT)
    assert finding.subject.endswith(subject)
    # Settings of some layers may be no linear's, and an unknown algorithm is no fault where the linear is stored as it was.
    assert finding.severity == ("warning" if "layer_quant_config." in subject or "NVFP4_AWQ" in str(section) else "error")


def test_older_versions_build_a_mixed_checkpoint_from_fewer_algorithms_and_names() -> None:
    def built(version: str, layers: dict[str, Any], at: str) -> Any:
        where = [linear.prefix for linear in LINEARS["vl"]].index(f"language_model.model.layers.0.{at}")
        return ours("vl", mixed(layers), SERVERS[version])[where]

    assert "weight" in built("0.26", listed(*QKV, algo="MXFP8"), "self_attn.qkv_proj")
    assert built("0.20", listed(*QKV, algo="MXFP8"), "self_attn.qkv_proj") == "kept"
    assert built("0.26", listed(*QKV, algo="FP8_PB_WO"), "self_attn.qkv_proj") == "kept"
    assert "weight" in built("0.30", listed(*QKV, algo="FP8_PB_WO"), "self_attn.qkv_proj")
    head = [linear.part for linear in LINEARS["vl"]].index("head")
    answers = [ours("vl", mixed(listed("lm_head")), SERVERS[version])[head] for version in ("0.20", "0.26")]
    assert ["weight_scale_2" in answer for answer in answers] == [False, True]


def test_only_newer_versions_ask_the_groups_whether_nvfp4_quantizes_activations() -> None:
    section = modelopt(algo="NVFP4", config_groups={"group_0": {"weights": {}, "input_activations": None}})
    for version, scales in (
        ("0.26", ["input_scale", "weight_scale", "weight_scale_2"]),
        ("0.30", ["weight_scale", "weight_scale_2"]),
    ):
        found, _ = configs.read(Stored({"quantization_config": section}, None, {}), VL, SERVERS[version])
        assert found is not None
        form = find("modelopt").matcher(found, VL)(LINEARS["vl"][0])
        assert isinstance(form, Format)
        assert sorted(form.kinds) == scales


def test_routed_experts_in_new_numbers_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="routed experts in MXFP8 can't be checked yet; what can: FP8, NVFP4, W4A16_NVFP4"):
        ours("moe", modelopt(algo="MXFP8"))
    assert "weight" in ours("moe", modelopt("model.layers.*.mlp.experts*", algo="MXFP8"))[0]
    mxfp4 = {"targets": ["Linear"], "weights": {**FLOAT8, "num_bits": 4, "strategy": "group", "group_size": 32}}
    with pytest.raises(
        UnsupportedError, match="routed experts in compressed-tensors MXFP4 can't be checked yet; what can: FP8, NVFP4"
    ):
        ours("moe", compressed(groups=[mxfp4]))


def test_the_scales_of_nvfp4_experts_are_never_missed_by_the_server() -> None:
    """Of a linear the scales of groups are; of experts gate's scale of the whole tensor counts for up, too."""
    for section, unused in ((modelopt(algo="NVFP4"), ()), (modelopt(algo="W4A16_NVFP4"), ("input_scale",))):
        found, _ = configs.read(Stored({"quantization_config": section}, None, {}), MOE, DEFAULT)
        assert found is not None
        treat = find("modelopt").matcher(found, MOE)
        forms = {linear.part: treat(linear) for linear in LINEARS["moe"]}
        unset = {part: [s.unset for s in form.scales][:2] for part, form in forms.items() if isinstance(form, Format)}
        assert (unset["layers"], unset["experts"]) == (["noticed", "memory"], ["memory", "first"])
        assert isinstance(forms["experts"], Format)
        assert forms["experts"].dropped == unused
