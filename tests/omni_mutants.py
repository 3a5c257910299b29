"""Good exports of tiny pipelines, each broken in one way: the table. What the real vLLM-Omni makes of each mutant is recorded.

A fault's name is its class. Near misses look like it and are served. tests/server/record_omni_behavior.py records, and
tests/test_omni_agreement.py holds the validator to what was recorded.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from corpus import edit, edit_files
from corpus.edit import Edit, edit_json

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class Base:
    """A good export: the tiny pipeline, the recipe, and what the server has to be told (OmniDiffusionConfig's settings)."""

    pipeline: str
    recipe: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Mutant:
    """One edit of a base. `name`: base/fault/what exactly; of a near miss `near` stands before the last part.

    source  only beside the pipeline that it was made from can it be seen
    """

    name: str
    fault: str
    base: str
    edit: Edit
    near_miss: bool = False
    source: bool = False


def _pipeline(pipeline: str, form: str, scheme: str, *folders: str, **settings: Any) -> Base:
    recipe: dict[str, Any] = {"components": dict.fromkeys(folders or ("transformer",), scheme), "export": {"format": form}}
    if scheme == "fp8":
        recipe["calibration"] = {"source": "prompts", "samples": 1, "steps": 1, "height": 64, "width": 64}
    return Base(pipeline, recipe, settings)


BASES: Mapping[str, Base] = {
    "qwen": _pipeline("qwen_image", "modelopt", "fp8"),
    "qwen-channel": _pipeline("qwen_image", "modelopt", "fp8-dynamic"),
    "qwen-native": _pipeline("qwen_image", "fp8", "fp8-tensor"),
    "qwen-int8": _pipeline("qwen_image", "int8", "int8"),
    "z": _pipeline("z_image", "modelopt", "fp8-dynamic"),
    "z-native": _pipeline("z_image", "fp8", "fp8-tensor"),
    "flux": _pipeline("flux2", "modelopt", "fp8-dynamic"),
    "flux-native": _pipeline("flux2", "fp8", "fp8-tensor"),
    "omnigen": _pipeline("omnigen2", "modelopt", "fp8-dynamic"),
    "omnigen-native": _pipeline("omnigen2", "fp8", "fp8-tensor"),
    "wan": _pipeline("wan22", "modelopt", "fp8-dynamic", "transformer", "transformer_2", quantization_config="fp8"),
    "wan-native": _pipeline("wan22", "fp8", "fp8-tensor", "transformer", "transformer_2"),
    "wan-mxfp8": _pipeline("wan22", "mxfp8", "mxfp8", "transformer", "transformer_2"),
    "glm": _pipeline("glm_image", "modelopt", "fp8-dynamic"),
    "glm-native": _pipeline("glm_image", "fp8", "fp8-tensor"),
    "hunyuan": Base(
        "hunyuan_image3", {"quantize": [{"modules": "model.layers.*", "scheme": "fp8-tensor"}], "export": {"format": "fp8"}}
    ),
    "bagel": Base(
        "bagel",
        {"quantize": [{"modules": "language_model.model.layers.*", "scheme": "fp8-tensor"}], "export": {"format": "fp8"}},
    ),
}
STACK = {"z": "layers", "omnigen": "layers", "wan": "blocks"}
"""Where a base's blocks lie, which are `transformer_blocks` otherwise."""


def make_base(name: str, sources: Path, output: Path) -> Path:
    """Converts the base's pipeline, which is made in `sources` if it is not there, into the folder `output`."""
    from pipelines import pipelines

    from ckptq.console import Console
    from ckptq.convert import convert
    from ckptq.prepare import prepare
    from ckptq.recipe import parse_recipe

    base = BASES[name]
    source = sources / base.pipeline
    if not source.exists():
        pipelines()[base.pipeline].make(source)
    recipe = parse_recipe(json.dumps(base.recipe), name, model=str(source), output=str(output))
    convert(prepare(recipe), resume=False, device="cpu", memory=None, console=Console(quiet=True))
    return output


# --- edits ---


def within(*edits: Edit, folder: str = "transformer") -> Edit:
    """In a component."""

    def apply(root: Path) -> None:
        for one in edits:
            one(root / folder)

    return apply


def setting(**values: Any) -> Edit:
    """Of quantization_config in the folder's config.json; None removes a key."""

    def change(config: dict[str, Any]) -> None:
        section = {**config["quantization_config"], **values}
        config["quantization_config"] = {key: value for key, value in section.items() if value is not None}

    return lambda folder: edit_json(folder / "config.json", change)


def config(change: Callable[[dict[str, Any]], object]) -> Edit:
    return lambda folder: edit_json(folder / "config.json", change)


def listed(key: str, change: Callable[[list[str]], list[str]]) -> Edit:
    """Changes the list of what stays."""
    return config(lambda c: c["quantization_config"].update({key: change(c["quantization_config"][key])}))


def without(*entries: str) -> Callable[[list[str]], list[str]]:
    """The list without those that hold one of these texts."""
    return lambda names: [name for name in names if not any(entry in name for entry in entries)]


def plus(*entries: str) -> Callable[[list[str]], list[str]]:
    return lambda names: [*names, *entries]


def kept(*modules: str) -> Edit:
    """These linears as BF16 weights without scales, made of the codes."""

    def apply(stored: dict[str, torch.Tensor]) -> None:
        names = edit.matching(stored, *(f"{module}.weight" for module in modules))
        for name in (n for n in names if f"{n}_scale" in stored):
            scale = stored.pop(f"{name}_scale").float()
            stored.pop(f"{name.removesuffix('weight')}input_scale", None)
            scale = scale[:, None] if scale.dim() == 1 else scale
            stored[name] = (stored[name].float() * scale).to(torch.bfloat16)

    return edit.tensors(apply)


def codes(*modules: str, dtype: torch.dtype = FP8, scale: bool = True) -> Edit:
    """These unquantized weights as codes of one scale."""

    def apply(stored: dict[str, torch.Tensor]) -> None:
        for name in edit.matching(stored, *(f"{module}.weight" for module in modules)):
            top = stored[name].float().abs().max() / (448 if dtype == FP8 else 127)
            stored[name] = (stored[name].float() / top).to(dtype)
            stored |= {f"{name}_scale": top} if scale else {}

    return edit.tensors(apply)


def gone(*names: str) -> Edit:
    """Files or folders."""

    def apply(folder: Path) -> None:
        for name in names:
            shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()

    return apply


# --- the table ---

Faults = Mapping[str, Mapping[str, Mapping[str, Edit]]]
MODELOPT = {"qwen": "transformer_blocks.0.attn.to_q", "z": "layers.0.attention.to_q", "flux": "transformer_blocks.0.attn.to_q",
            "omnigen": "layers.0.attn.to_q", "wan": "blocks.0.attn1.to_q", "glm": "transformer_blocks.0.attn1.to_q"}  # fmt: skip
NATIVE = {f"{name}-native": module for name, module in MODELOPT.items()}
OUT = {name: module.replace("to_q", "to_out.0") for name, module in (MODELOPT | NATIVE).items()}


ROOTS = {"hunyuan": "model.layers.0.self_attn.o_proj", "bagel": "language_model.model.layers.0.self_attn.o_proj_moe_gen"}
MORE = {"hunyuan": "model.layers.1.mlp.experts.1.down_proj", "bagel": "language_model.model.layers.1.mlp_moe_gen.up_proj"}


def _of_roots(edit_of: Callable[[str], Edit]) -> dict[str, dict[str, Edit]]:
    """Of two linears of each root checkpoint, routed experts and twins among them."""
    return {base: {"of attention": edit_of(module), "of a part of it": edit_of(MORE[base])} for base, module in ROOTS.items()}


def _per_base(modules: Mapping[str, str], what: str, edit_of: Callable[[str], Edit]) -> dict[str, dict[str, Edit]]:
    return {base: {what: within(edit_of(module))} for base, module in modules.items()}


FOREIGN = edit.put({"foreign.weight": torch.zeros(4, 4, dtype=torch.bfloat16)})


def _unjoined(stored: dict[str, torch.Tensor]) -> None:
    """OmniGen2's gate_up_proj as the source's two linears."""
    for name in [n for n in stored if ".gate_up_proj." in n]:
        value = stored.pop(name)
        halves = value.chunk(2) if value.dim() else (value, value.clone())
        for part, half in zip(("linear_1", "linear_3"), halves, strict=True):
            stored[name.replace("gate_up_proj", part)] = half.clone()


FAULTS: Faults = {
    "weight_scale missing": _per_base(MODELOPT | NATIVE, "a shard's", lambda m: edit.drop(f"{m}.weight_scale"))
    | {"qwen-int8": {"of one linear": within(edit.drop(f"{OUT['qwen']}.weight_scale"))}}
    | {"wan-mxfp8": {"of one linear": within(edit.drop("blocks.0.ffn.net.2.weight_scale"), folder="transformer_2")}}
    | _of_roots(lambda m: edit.drop(f"{m}.weight_scale")),
    "input_scale missing": {"qwen": {"of one linear": within(edit.drop(f"{OUT['qwen']}.input_scale"))}},
    "weight missing": _per_base(MODELOPT | NATIVE, "a shard's", lambda m: edit.drop(f"{m}.weight"))
    | _of_roots(lambda m: edit.drop(f"{m}.weight")),
    "weight stored unquantized": _per_base(MODELOPT | NATIVE, "a shard's", kept)
    | {"qwen-channel": {"a whole block's": within(kept("transformer_blocks.1.*"))}}
    | _of_roots(kept),
    "scale under another name": _per_base(
        OUT, "weight_scale_inv", lambda m: edit.rename(".weight_scale", ".weight_scale_inv", f"{m}.weight_scale")
    ),
    "tensor under a name of nothing": _per_base(
        OUT, "a linear's weight", lambda m: edit.rename(".weight", ".weights", f"{m}.weight")
    ),
    "scales under names that the adapter drops": {
        "wan": {
            "Wan's feed-forward": within(edit.rename(".ffn.net_0.", ".ffn.net.0."), edit.rename(".ffn.net_2.", ".ffn.net.2.")),
            "its scales alone": within(edit.rename(".ffn.net_2.weight_scale", ".ffn.net.2.weight_scale")),
        },
        "omnigen": {
            "OmniGen2's second linear": within(edit.rename(".feed_forward.down_proj.", ".feed_forward.linear_2.")),
            "OmniGen2's first linears": within(edit.tensors(_unjoined)),
        },
    },
    "list reaches what is stored as codes": {
        "qwen": {"a pattern": within(listed("ignore", plus("*txt_mlp*")))},
        "z": {"a part of a name": within(listed("ignore", plus("w13")))},
        "flux": {"single blocks": within(listed("ignore", plus("single_transformer_blocks*")))},
        "omnigen": {"feed-forward, as the source calls it": within(listed("ignore", plus("feed_forward")))},
        "wan": {"the second expert": within(listed("ignore", plus("attn2.to_out")))},
        "wan-native": {
            "exact names": within(listed("ignored_layers", plus("blocks.0.attn1.to_qkv"))),
            "in transformer_2": within(listed("ignored_layers", plus("blocks.0.attn2.to_q")), folder="transformer_2"),
        },
        "z-native": {"exact names": within(listed("ignored_layers", plus("layers.0.attention.to_qkv")))},
        "qwen-int8": {"exact names": within(listed("ignored_layers", plus("transformer_blocks.0.attn.to_qkv")))},
    },
    "list of another kind of name": {
        "qwen-channel": {
            "shards, exactly": within(kept("transformer_blocks.0.attn.add_[qkv]_proj"),
                                      listed("ignore", plus(*(f"transformer_blocks.0.attn.add_{n}_proj" for n in "qkv")))),
        },
        "qwen-native": {
            "part of a name": within(kept("*.txt_mlp.net.2"), listed("ignored_layers", plus("txt_mlp.net.2"))),
            "pattern": within(kept("*.txt_mlp.net.2"), listed("ignored_layers", plus("*.txt_mlp.net.2"))),
            "shards": within(kept("transformer_blocks.0.attn.to_[qkv]"),
                             listed("ignored_layers", plus(*(f"transformer_blocks.0.attn.to_{n}" for n in "qkv")))),
        },
    },
    "needed entry absent": {
        "glm": {name: within(listed("ignore", without(name))) for name in ("norm1", "glyph_projector", "prior_projector")},
        "glm-native": {name: within(listed("ignored_layers", without(name))) for name in ("norm1", "glyph_projector")},
        "hunyuan": {"the router": listed("ignored_layers", without(".mlp.gate"))},
        "bagel": {"the connector": listed("ignored_layers", without("connector"))},
    },
    "text encoder not on the list": {
        "flux": {"none of it": within(listed("ignore", without("text_encoder")))},
        "flux-native": {"one linear": within(listed("ignored_layers", without("layers.3.mlp.down_proj")))},
        "z": {"none of it": within(listed("ignore", without("model.layers", "lm_head")))},
        "z-native": {"a layer": within(listed("ignored_layers", without("model.layers.1")))},
    },
    "list under another key": {
        "glm": {"exclude_modules": within(config(lambda c: c["quantization_config"].update(
            exclude_modules=c["quantization_config"].pop("ignore"))))},
        "z-native": {"modules_to_not_convert": within(config(lambda c: c["quantization_config"].update(
            modules_to_not_convert=c["quantization_config"].pop("ignored_layers"))))},
    },
    "list that is none": {
        "qwen": {"a text": within(setting(ignore="img_in"))}, "qwen-int8": {"a number": within(setting(ignored_layers=5))},
    },
    "quant_algo of another format": {
        "qwen-channel": {"FP8_PB_WO": within(setting(quant_algo="FP8_PB_WO")), "FP8": within(setting(quant_algo="FP8")),
                         "absent": within(setting(quant_algo=None))},
        "qwen": {"FP8_PER_CHANNEL_PER_TOKEN": within(setting(quant_algo="FP8_PER_CHANNEL_PER_TOKEN"))},
    },
    "method of another name": {
        "qwen": {"compressed-tensors": within(setting(quant_method="compressed-tensors", producer=None)),
                 "absent": within(setting(quant_method=None, producer=None))},
        "qwen-native": {"modelopt": within(setting(quant_method="modelopt")), "fp9": within(setting(quant_method="fp9"))},
    },
    "key that the class has not": {
        "qwen-native": {"fmt": within(setting(fmt="e4m3"))}, "qwen-int8": {"bits": within(setting(bits=8))},
    },
    "value that the class refuses": {
        "qwen-native": {"activation_scheme": within(setting(activation_scheme="token")),
                        "blocks": within(setting(activation_scheme="static", weight_block_size=[128, 128]))},
        "qwen-int8": {"activation_scheme": within(setting(activation_scheme="static"))},
    },
    "activations of another scheme": {
        "qwen-native": {"static without scales": within(setting(activation_scheme="static"))},
    },
    "not called serialized": {
        "qwen-int8": {"flag absent": within(setting(is_checkpoint_int8_serialized=None))},
        "wan-mxfp8": {"flag false": within(setting(is_checkpoint_mxfp8_serialized=False))},
    },
    "no section": {
        name: {"removed": within(config(lambda c: c.pop("quantization_config")))} for name in ("qwen", "z", "flux-native", "glm")
    },
    "codes in a layer that is never quantized": {
        "qwen-native": {"img_in": within(codes("img_in"))},
        "z-native": {"modulation": within(codes("layers.0.adaLN_modulation.0"))},
        "qwen": {"with its scale": within(codes("img_in")), "without scale": within(codes("img_in", scale=False)),
                 "INT8": within(codes("img_in", dtype=torch.int8))},
        "bagel": {"the head": codes("language_model.lm_head")},
        "hunyuan": {"the head": codes("lm_head")},
        "wan-native": {"text embedder": within(codes("condition_embedder.text_embedder.linear_1"), folder="transformer_2")},
    },
    "tensor that is no part of the model": {
        name: {"a weight": within(FOREIGN)} for name in ("z", "omnigen")
    },
    "block missing": {
        "qwen": {"the last": within(edit.drop("transformer_blocks.1.*"))},
        "z": {"a refiner's": within(edit.drop("noise_refiner.0.*"))},
    },
    "more blocks than config.json has": {
        "z": {"config": within(config(lambda c: c.update(n_layers=1)))},
        "omnigen": {"config": within(config(lambda c: c.update(num_layers=1)))},
        "qwen": {"which it drops": within(config(lambda c: c.update(num_layers=1)))},
    },
    "bias missing": {
        "qwen": {"of a linear": within(edit.drop(f"{OUT['qwen']}.bias"))},
        "glm": {"of a shard": within(edit.drop("transformer_blocks.0.attn1.to_k.bias"))},
    },
    "norm missing": {
        "qwen": {"norm_q": within(edit.drop("transformer_blocks.0.attn.norm_q.weight"))},
        "flux": {"norm_k": within(edit.drop("single_transformer_blocks.1.attn.norm_k.weight"))},
    },
    "shards of different scales": {
        "qwen-native": {"q and k": within(edit.requantized(1.5, "transformer_blocks.0.attn.to_q"))},
        "z-native": {"w1 and w3": within(edit.requantized(2.0, "layers.0.feed_forward.w1"))},
    },
    "weight_scale of another size": {
        "qwen-native": {what: within(edit.alter(change, f"{OUT['qwen']}.weight_scale")) for what, change in (
            ("zero", edit.times(0)), ("negative", edit.times(-1)), ("NaN", edit.times(float("nan"))), ("an amax", edit.times(1e4)),
        )},
    },
    "weight_scale three times as large": {
        "qwen-native": {"of one linear": within(edit.alter(edit.times(3), f"{OUT['qwen']}.weight_scale"))},
    },
    "shape": {
        "qwen": {"fewer rows": within(edit.alter(lambda t: t[:-16].clone(), f"{OUT['qwen']}.weight")),
                 "transposed": within(edit.alter(lambda t: t.t().contiguous(), "transformer_blocks.0.img_mlp.net.2.weight"))},
        "z": {"fewer columns": within(edit.alter(lambda t: t[:, :-16].clone(), "layers.0.feed_forward.w1.weight"))},
    },
    "scale in another shape": {
        "qwen-channel": {"a column": within(edit.alter(lambda t: t[:, None], f"{OUT['qwen']}.weight_scale")),
                         "a scalar": within(edit.alter(lambda t: t.max(), f"{OUT['qwen']}.weight_scale"))},
        "qwen": {"a row each": within(edit.alter(lambda t: t.repeat(64), f"{OUT['qwen']}.weight_scale"))},
        "qwen-int8": {"flat": within(edit.alter(lambda t: t.flatten(), f"{OUT['qwen']}.weight_scale"))},
    },
    "second transformer of another kind": {
        "wan": {"unquantized": within(kept("blocks.*"), config(lambda c: c.pop("quantization_config")), folder="transformer_2"),
                "no section": within(config(lambda c: c.pop("quantization_config")), folder="transformer")},
        "wan-native": {"no section": within(config(lambda c: c.pop("quantization_config")), folder="transformer_2")},
    },
    "component gone": {"z": {"text_encoder": gone("text_encoder")}, "qwen": {"transformer": gone("transformer")}},
}  # fmt: skip

NEAR: Faults = {
    "weight_scale missing": {"qwen": {"in a list": within(edit.alter(lambda t: t.reshape(1), f"{OUT['qwen']}.weight_scale"))}},
    "scales under names that the adapter drops": {
        "wan": {"in transformer_2, the server's names": within(edit.rename(".ffn.net.0.", ".ffn.net_0."), folder="transformer_2")},
        "wan-native": {"under the server's names": within(edit.rename(".ffn.net.0.", ".ffn.net_0."))},
    },
    "list reaches what is stored as codes": {
        "z": {"without codes": within(kept("layers.0.*"), listed("ignore", plus("layers.0.*")))},
    },
    "list of another kind of name": {
        "qwen-channel": {"the server's name": within(kept("transformer_blocks.0.attn.add_[qkv]_proj"),
                                                     listed("ignore", plus("transformer_blocks.0.attn.add_kv_proj"))),
                         "shards as parts of to_qkv": within(kept("*.attn.to_[qkv]"), listed("ignore", plus("to_q")))},
        "qwen-native": {"whole": within(kept("transformer_blocks.0.txt_mlp.net.2"),
                                        listed("ignored_layers", plus("transformer_blocks.0.txt_mlp.net.2")))},
    },
    "needed entry absent": {"qwen": {"one that is not needed": within(setting(ignore=[]))}},
    "quant_algo of another format": {"qwen": {"small letters": within(setting(quant_algo="fp8"))}},
    "method of another name": {"qwen": {"by its producer": within(setting(quant_method=None))},
                               "qwen-native": {"in capitals": within(setting(quant_method="FP8"))}},
    "list under another key": {"qwen": {"nested": within(config(lambda c: c.update(quantization_config={
        "producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["img_in"]}})))}},

    "tensor that is no part of the model": {
        name: {"which drops it": within(FOREIGN)} for name in ("qwen", "flux", "wan", "glm")
    },
    "scale under another name": {
        "qwen": {"a further one": within(edit.copy(f"{OUT['qwen']}.weight_scale", f"{OUT['qwen']}.weight_scale_2"))},
    },
    "no section": {"qwen": {"hf_quant_config.json beside it": edit_files.text("hf_quant_config.json", "{}")}},
    "weight_scale three times as large": {"qwen-native": {"and codes as small": within(edit.requantized(2.0, OUT["qwen"]))}},
}  # fmt: skip


def mutants() -> Iterator[Mutant]:
    """All of them."""
    for near, table in ((False, FAULTS), (True, NEAR)):
        for fault, bases in table.items():
            for base, edits in bases.items():
                for what, one in edits.items():
                    name = f"{base}/{fault}/{'near/' if near else ''}{what}"
                    yield Mutant(name, fault, base, one, near, source=fault == "weight_scale three times as large")
