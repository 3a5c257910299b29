"""Good checkpoints give no finding; each mutant of one gives the finding with its code."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ckptq.checkpoint import INDEX, STAGING, read_inventory
from ckptq.errors import SourceError, UnsupportedError
from ckptq.exporters import find_exporter
from ckptq.plan import Copy, Encode, Plan
from ckptq.planner import build_plan
from ckptq.recipe import load_recipe
from ckptq.scopes.qwen2_5_vl import SCOPE
from ckptq.validate import validate_folder, validate_plan
from ckptq.validators import Finding
from ckptq.validators.rounding import as_float32, decode
from ckptq.validators.servers import find_server

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "tiny-qwen2.5-vl"
L0 = "model.layers.0."
Q, K, V, OUT = (f"{L0}self_attn.{s}_proj" for s in "qkvo")
GATE, UP, DOWN = (f"{L0}mlp.{s}_proj" for s in ("gate", "up", "down"))
WEIGHTS = "model.safetensors"
Tensors = dict[str, torch.Tensor]


def plan_of(source: Path, *settings_: str) -> Plan:
    recipe = load_recipe("demo", settings_, model=str(source))
    return build_plan(recipe, read_inventory(source).main, SCOPE, find_exporter("modelopt"))


def make(source: Path, target: Path, *settings_: str) -> Path:
    """The plan's output as an independent few lines of torch: amax / 448, one weight scale a group, activations made up."""
    plan = plan_of(source, *settings_)
    weights: Tensors = {}
    for file in sorted(source.glob("*.safetensors")):
        weights |= load_file(file)
    target.mkdir()
    for shard in plan.shards:
        tensors: Tensors = {}
        for op in shard.ops:
            if isinstance(op, Copy):
                tensors[op.output.name] = weights[op.source].clone()
                continue
            observers = op.whole.amax if isinstance(op, Encode) and op.whole else op.amax
            amax = max(weights[f"{o.module}.weight"].abs().max().float() for o in observers)
            if isinstance(op, Encode):
                tensors[op.codes.name] = (weights[op.source].float() / (amax / 448)).to(torch.float8_e4m3fn)
            else:
                made_up = {"weight": amax, "input": torch.tensor(9.0), "k": torch.tensor(12.0), "v": torch.tensor(3.0)}
                tensors[op.output.name] = made_up[op.amax[0].kind] / 448
        save_file(tensors, target / shard.file, metadata={"format": "pt"})
    for name, text in plan.files.items():
        (target / name).write_text(text, encoding="utf-8")
    for name in plan.sidecars:
        shutil.copy(source / name, target / name)
    return target


ONE_FILE = "export.shard_size=5GB"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(EXAMPLE, tmp_path_factory.mktemp("good") / "out", ONE_FILE)


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "out"))


# --- good checkpoints ---


@pytest.fixture(scope="module", params=["as on the hub", "second generation", "tied"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example in both layouts of names, and with lm_head tied to the embeddings."""
    if request.param == "as on the hub":
        return EXAMPLE
    folder = tmp_path_factory.mktemp("source") / "model"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("*.safetensors", INDEX))
    weights: Tensors = {}
    for file in sorted(EXAMPLE.glob("*.safetensors")):
        weights |= load_file(file)
    if request.param == "tied":
        del weights["lm_head.weight"]
        edit_json(folder / "config.json", lambda config: config["text_config"].update(tie_word_embeddings=True))
    else:
        weights = {second_generation(name): tensor for name, tensor in weights.items()}
    save_file(weights, folder / WEIGHTS)
    return folder


def second_generation(name: str) -> str:
    if name.startswith("visual."):
        return f"model.{name}"
    return name if name.startswith("lm_head") else name.replace("model.", "model.language_model.", 1)


VARIANTS = {
    "sharded": (),
    "one file": (ONE_FILE,),
    "no kv cache": ("kv_cache=null",),
    "down kept": ('keep=["model.visual*","lm_head","*.mlp.down_proj"]',),
    "layer kept": ('keep=["model.visual*","lm_head","model.layers.1"]',),
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_good_checkpoints_and_their_plans_have_no_finding(source: Path, tmp_path: Path, variant: tuple[str, ...]) -> None:
    assert validate_plan(plan_of(source, *variant), SCOPE) == []
    out = make(source, tmp_path / "out", *variant)
    assert validate_folder(out, source=source) == []


def test_the_plan_is_checked_without_torch_or_numpy() -> None:
    import subprocess
    import sys

    script = """
import sys
from pathlib import Path
from ckptq.checkpoint import read_inventory
from ckptq.exporters import find_exporter
from ckptq.planner import build_plan
from ckptq.recipe import load_recipe
from ckptq.scopes import find_scope
from ckptq.validate import validate_plan
main = read_inventory(Path(sys.argv[1])).main
scope = find_scope(main.config)
assert validate_plan(build_plan(load_recipe("demo"), main, scope, find_exporter("modelopt")), scope) == []
print(sorted({"torch", "numpy", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script, EXAMPLE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- mutants ---


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", change)


def section(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return config(lambda data: change(data["quantization_config"]))


def other(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "hf_quant_config.json", lambda data: change(data["quantization"]))


def exclude(*patterns: str) -> Callable[[Path], None]:
    """The same list in both files."""

    def change(folder: Path) -> None:
        section(lambda s: s.update(ignore=list(patterns)))(folder)
        other(lambda s: s.update(exclude_modules=list(patterns)))(folder)

    return change


def tensors(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        stored = load_file(folder / WEIGHTS)
        change(stored)
        save_file({n: t.clone().contiguous() for n, t in stored.items()}, folder / WEIGHTS)

    return apply


def drop(*names: str) -> Callable[[Path], None]:
    return tensors(lambda t: [t.pop(name) for name in names])


def put(name: str, value: Callable[[Tensors], torch.Tensor]) -> Callable[[Path], None]:
    return tensors(lambda t: t.update({name: value(t)}))


def rename(old: str, new: str) -> Callable[[Path], None]:
    return tensors(lambda t: t.update({new: t.pop(old)}))


def everywhere(suffix: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    """Changes, or with None drops, all tensors whose names end so."""

    def apply(stored: Tensors) -> None:
        for name in [n for n in stored if n.endswith(suffix)]:
            new = change(stored.pop(name))
            if new is not None:
                stored[name] = new

    return tensors(apply)


def write(name: str, text: str = "x") -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")

    return apply


def source_weight(name: str) -> torch.Tensor:
    index = json.loads((EXAMPLE / INDEX).read_text(encoding="utf-8"))["weight_map"]
    return load_file(EXAMPLE / index[name])[name]


def f32(value: float) -> torch.Tensor:
    return torch.tensor(value)


def codes(t: torch.Tensor) -> torch.Tensor:
    return t.view(torch.uint8).clone()


def with_code(t: torch.Tensor, code: int, count: int = 1) -> torch.Tensor:
    changed = codes(t)
    changed.view(-1)[:count] = code
    return changed.view(torch.float8_e4m3fn)


def swap(stored: Tensors, a: str, b: str) -> None:
    stored[a], stored[b] = stored[b], stored[a]


def bf16_linear(module: str) -> Callable[[Path], None]:
    """The module as if it had never been quantized."""

    def apply(stored: Tensors) -> None:
        stored[f"{module}.weight"] = source_weight(f"{module}.weight")
        del stored[f"{module}.weight_scale"], stored[f"{module}.input_scale"]

    return tensors(apply)


def visual_in_fp8(stored: Tensors) -> None:
    stored["visual.blocks.0.attn.proj.weight"] = stored["visual.blocks.0.attn.proj.weight"].to(torch.float8_e4m3fn)


def kv_scales_on_the_tower(stored: Tensors) -> None:
    for i in range(4):
        stored[f"visual.blocks.{i}.attn.k_proj.k_scale"] = f32(0.1)
        stored[f"visual.blocks.{i}.attn.v_proj.v_scale"] = f32(0.1)


ALL_KV = [f"model.layers.{i}.self_attn.{s}_proj.{s}_scale" for i in range(6) for s in "kv"]
NUMBERS = {"dynamic": False, "num_bits": 8, "type": "float"}
EXCLUDED = ("lm_head", "model.embed_tokens")

Mutation = Callable[[Path], None]
# name: (mutation, code, severity). "silent" in a name: by vLLM 0.32.0's code it loads without an error; not each was tried.
MUTANTS: dict[str, tuple[Mutation, str, str]] = {
    # what is built quantized, and what is not
    "silent: visual not excluded": (exclude(*EXCLUDED), "layout.not-excluded", "error"),
    "silent: nothing excluded": (exclude(), "layout.not-excluded", "error"),
    "silent: model.visual matches nothing": (exclude(*EXCLUDED, "model.visual"), "layout.not-excluded", "error"),
    "silent: re: does nothing": (exclude(*EXCLUDED, "re:visual.*"), "layout.not-excluded", "error"),
    "silent: lm_head not excluded": (exclude("model.embed_tokens", "visual*"), "layout.not-excluded", "error"),
    "silent: bf16 in a linear that is not excluded": (bf16_linear(OUT), "layout.not-excluded", "error"),
    "silent: bf16 weight beside scales": (
        put(f"{OUT}.weight", lambda _: source_weight(f"{OUT}.weight")),
        "layout.weight-dtype",
        "error",
    ),
    "silent: glob on a shard of a fused linear": (
        lambda folder: (
            [bf16_linear(m)(folder) for m in (Q, K, V)] and exclude(*EXCLUDED, "visual*", "*layers.0.self_attn.?_proj")(folder)
        ),
        "layout.not-excluded",
        "error",
    ),
    "excluded though fp8": (exclude(*EXCLUDED, "visual*", OUT), "layout.excluded", "error"),
    "substring reaches further": (exclude(*EXCLUDED, "visual*", "layers.1"), "layout.excluded", "error"),
    "q_proj alone excluded": (exclude(*EXCLUDED, "visual*", Q), "layout.split-exclude", "error"),
    "visual stored in fp8": (tensors(visual_in_fp8), "layout.excluded", "error"),
    "embeddings in fp8": (
        put("model.embed_tokens.weight", lambda t: t["model.embed_tokens.weight"].to(torch.float8_e4m3fn)),
        "layout.weight-dtype",
        "error",
    ),
    # tensors and scales
    "silent: o_proj weight_scale missing": (drop(f"{OUT}.weight_scale"), "layout.missing-scale", "error"),
    "silent: o_proj input_scale missing": (drop(f"{OUT}.input_scale"), "layout.missing-scale", "error"),
    "silent: k weight_scale missing": (drop(f"{K}.weight_scale"), "layout.missing-scale", "error"),
    "silent: v weight_scale missing": (drop(f"{V}.weight_scale"), "layout.missing-scale", "error"),
    "silent: all qkv weight_scales missing": (drop(*(f"{m}.weight_scale" for m in (Q, K, V))), "layout.missing-scale", "error"),
    "silent: all qkv input_scales missing": (drop(*(f"{m}.input_scale" for m in (Q, K, V))), "layout.missing-scale", "error"),
    "silent: input_scale of one shard missing": (drop(f"{Q}.input_scale"), "layout.missing-scale", "warning"),
    "silent: every input_scale missing": (everywhere(".input_scale", lambda _: None), "layout.missing-scale", "error"),
    "silent: q bias missing": (drop(f"{Q}.bias"), "layout.missing-tensor", "error"),
    "silent: every v bias missing": (everywhere("v_proj.bias", lambda _: None), "layout.missing-tensor", "error"),
    "silent: lm_head missing": (drop("lm_head.weight"), "layout.missing-tensor", "error"),
    "silent: embeddings missing": (drop("model.embed_tokens.weight"), "layout.missing-tensor", "error"),
    "silent: norm missing": (drop(f"{L0}input_layernorm.weight"), "layout.missing-tensor", "error"),
    "silent: k_proj missing": (drop(f"{K}.weight"), "layout.missing-tensor", "error"),
    "silent: a block of the tower missing": (
        tensors(lambda t: [t.pop(n) for n in list(t) if n.startswith("visual.blocks.3.")]),
        "layout.missing-tensor",
        "error",
    ),
    "silent: a layer missing": (
        tensors(lambda t: [t.pop(n) for n in list(t) if n.startswith("model.layers.5.")]),
        "layout.missing-layer",
        "error",
    ),
    "a layer too many": (config(lambda c: c["text_config"].update(num_hidden_layers=5)), "layout.unknown-tensor", "error"),
    "weight_scale_inv": (rename(f"{OUT}.weight_scale", f"{OUT}.weight_scale_inv"), "layout.stray-scale", "error"),
    "activation_scale": (rename(f"{OUT}.input_scale", f"{OUT}.activation_scale"), "layout.missing-scale", "error"),
    "bmm quantizer's amax": (put(f"{L0}self_attn.k_bmm_quantizer._amax", lambda _: f32(1.0)), "layout.unknown-tensor", "error"),
    "silent: bias with no place": (put(f"{OUT}.bias", lambda _: torch.zeros(256).bfloat16()), "layout.unknown-tensor", "warning"),
    "scale under the excluded tower": (
        put("visual.blocks.0.attn.proj.weight_scale", lambda _: f32(0.1)),
        "layout.stray-scale",
        "error",
    ),
    "scale on a norm": (put("model.norm.weight_scale", lambda _: f32(0.1)), "layout.stray-scale", "error"),
    "k_scale beside q_proj": (put(f"{Q}.k_scale", lambda _: f32(0.1)), "layout.stray-scale", "error"),
    # dtypes and shapes
    "silent: codes as U8": (put(f"{OUT}.weight", lambda t: codes(t[f"{OUT}.weight"])), "layout.weight-dtype", "error"),
    "silent: codes as I8": (
        put(f"{OUT}.weight", lambda t: codes(t[f"{OUT}.weight"]).view(torch.int8)),
        "layout.weight-dtype",
        "error",
    ),
    "silent: e5m2": (
        put(f"{OUT}.weight", lambda t: t[f"{OUT}.weight"].float().to(torch.float8_e5m2)),
        "layout.weight-dtype",
        "error",
    ),
    "silent: bf16 scale": (
        put(f"{OUT}.weight_scale", lambda t: t[f"{OUT}.weight_scale"].bfloat16()),
        "layout.scale-dtype",
        "warning",
    ),
    "integer scale": (put(f"{OUT}.input_scale", lambda _: torch.tensor(1)), "layout.scale-dtype", "error"),
    "scale [1, 1]": (put(f"{OUT}.weight_scale", lambda t: t[f"{OUT}.weight_scale"].view(1, 1)), "layout.scale-shape", "error"),
    "scale per channel": (
        put(f"{OUT}.weight_scale", lambda t: t[f"{OUT}.weight_scale"].expand(256)),
        "layout.scale-shape",
        "error",
    ),
    "kv scale of two": (put(f"{K}.k_scale", lambda _: torch.ones(2)), "layout.kv-shape", "error"),
    "silent: q_proj with rows too many": (
        put(f"{Q}.weight", lambda t: torch.cat([codes(t[f"{Q}.weight"])] * 2).view(torch.float8_e4m3fn)),
        "layout.shape",
        "error",
    ),
    "k_proj with rows too few": (put(f"{K}.weight", lambda t: t[f"{K}.weight"][:64]), "layout.shape", "error"),
    "down_proj transposed": (
        put(f"{DOWN}.weight", lambda t: codes(t[f"{DOWN}.weight"]).t().contiguous().view(torch.float8_e4m3fn)),
        "layout.shape",
        "error",
    ),
    "lm_head with rows too few": (put("lm_head.weight", lambda t: t["lm_head.weight"][:4000]), "layout.shape", "error"),
    "shards of unlike width": (
        lambda folder: (
            config(lambda c: c["text_config"].pop("hidden_size"))(folder)
            or put(f"{UP}.weight", lambda t: t[f"{UP}.weight"][:, :128])(folder)
        ),
        "layout.shard-width",
        "error",
    ),
    # the KV cache
    "k_scale alone missing": (drop(f"{K}.k_scale"), "layout.kv-missing", "error"),
    "silent: v_scale missing": (drop(f"{V}.v_scale"), "layout.kv-missing", "error"),
    "silent: both missing in one layer": (drop(f"{K}.k_scale", f"{V}.v_scale"), "layout.kv-missing", "error"),
    "silent: all missing": (drop(*ALL_KV), "layout.kv-absent", "warning"),
    "silent: k and v trade names": (
        tensors(lambda t: t.update({f"{K}.v_scale": t.pop(f"{K}.k_scale"), f"{V}.k_scale": t.pop(f"{V}.v_scale")})),
        "layout.kv-misplaced",
        "error",
    ),
    "silent: no kv_cache_scheme": (section(lambda s: s.pop("kv_cache_scheme")), "layout.kv-undeclared", "error"),
    "silent: int8 kv scheme": (section(lambda s: s["kv_cache_scheme"].update(type="int")), "config.kv-cache-scheme", "error"),
    "silent: dynamic kv scheme": (section(lambda s: s["kv_cache_scheme"].pop("dynamic")), "config.kv-cache-scheme", "error"),
    "kv scales on the tower": (tensors(kv_scales_on_the_tower), "layout.kv-on-tower", "error"),
    # configs
    "no section anywhere": (
        lambda folder: config(lambda c: c.pop("quantization_config"))(folder) or (folder / "hf_quant_config.json").unlink(),
        "config.no-section",
        "error",
    ),
    "no section in config.json": (config(lambda c: c.pop("quantization_config")), "config.section-missing", "warning"),
    "no hf_quant_config.json": (lambda folder: (folder / "hf_quant_config.json").unlink(), "config.hf-quant-config", "warning"),
    "silent: the files disagree on the algorithm": (other(lambda s: s.update(quant_algo="NVFP4")), "config.disagree", "warning"),
    "silent: the files disagree on the list": (other(lambda s: s.update(exclude_modules=[])), "config.disagree", "warning"),
    "silent: the files disagree on the cache": (other(lambda s: s.update(kv_cache_quant_algo=None)), "config.disagree", "warning"),
    "no quant_method": (section(lambda s: s.pop("quant_method")), "config.quant-method", "error"),
    "silent: native fp8": (section(lambda s: s.update(quant_method="fp8")), "config.activation-scheme", "error"),
    "another algorithm": (section(lambda s: s.update(quant_algo="FP8_PER_CHANNEL_PER_TOKEN")), "layout.scale-shape", "error"),
    "exclude list is a string": (section(lambda s: s.update(ignore="visual*")), "config.exclude-list", "error"),
    "silent: exclude_modules in config.json": (
        section(lambda s: s.update(exclude_modules=s.pop("ignore"))),
        "config.exclude-list",
        "error",
    ),
    "tied, stored nowhere, not excluded": (
        lambda folder: (
            drop("lm_head.weight")(folder)
            or config(lambda c: c.update(tie_word_embeddings=True))(folder)
            or exclude("model.embed_tokens", "visual*")(folder)
        ),
        "layout.not-excluded",
        "error",
    ),
    # files
    "silent: consolidated": (write("consolidated.safetensors"), "files.consolidated", "error"),
    "silent: another safetensors and no index": (
        lambda folder: save_file({"x": f32(1.0)}, folder / "old.safetensors"),
        "layout.unknown-tensor",
        "error",
    ),
    "pytorch weights": (write("pytorch_model.bin"), "files.weight-copy", "warning"),
    "original folder": (write("original/consolidated.00.pth"), "files.weight-copy", "warning"),
    # values
    "weight_scale NaN": (put(f"{OUT}.weight_scale", lambda _: f32(math.nan)), "values.not-finite", "error"),
    "input_scale infinite": (put(f"{OUT}.input_scale", lambda _: f32(math.inf)), "values.not-finite", "error"),
    "weight_scale zero": (put(f"{OUT}.weight_scale", lambda _: f32(0.0)), "values.not-positive", "error"),
    "silent: negative kv scales": (everywhere(".k_scale", lambda t: -t), "values.not-positive", "error"),
    "silent: kv amax as scale": (everywhere(".k_scale", lambda t: t * 448), "values.scale-range", "warning"),
    "silent: weight_scale left at 1": (put(f"{OUT}.weight_scale", lambda _: f32(1.0)), "values.scale-range", "warning"),
    "NaN code": (put(f"{OUT}.weight", lambda t: with_code(t[f"{OUT}.weight"], 0x7F)), "values.not-finite", "error"),
    "negative NaN code": (put(f"{OUT}.weight", lambda t: with_code(t[f"{OUT}.weight"], 0xFF)), "values.not-finite", "error"),
    "codes all zero": (
        put(f"{OUT}.weight", lambda t: with_code(t[f"{OUT}.weight"], 0x80, 256 * 256)),
        "values.all-zero",
        "warning",
    ),
    "saturated": (put(f"{OUT}.weight", lambda t: with_code(t[f"{OUT}.weight"], 0xFE, 9000)), "values.saturated", "warning"),
    "shards with unlike weight scales": (
        put(f"{UP}.weight_scale", lambda t: t[f"{UP}.weight_scale"] * 1.1),
        "values.weight-scale-split",
        "warning",
    ),
    "shards with unlike input scales": (put(f"{K}.input_scale", lambda _: f32(0.5)), "values.input-scale-split", "warning"),
    "NaN in a norm": (put("model.norm.weight", lambda t: t["model.norm.weight"] * math.nan), "values.not-finite", "error"),
    "infinity in the tower": (
        put("visual.merger.mlp.0.bias", lambda t: t["visual.merger.mlp.0.bias"] + math.inf),
        "values.not-finite",
        "error",
    ),
    # against the source
    "silent: transposed square weight": (
        put(f"{OUT}.weight", lambda t: codes(t[f"{OUT}.weight"]).t().contiguous().view(torch.float8_e4m3fn)),
        "passthrough.weight-error",
        "error",
    ),
    "silent: weight amax as scale": (
        put(f"{OUT}.weight_scale", lambda t: t[f"{OUT}.weight_scale"] * 448),
        "passthrough.weight-error",
        "error",
    ),
    "silent: scale off by a little": (
        everywhere("o_proj.weight_scale", lambda t: t * 1.1),
        "passthrough.weight-error",
        "error",
    ),
    "silent: another layer's weight": (
        tensors(lambda t: swap(t, f"{OUT}.weight", "model.layers.1.self_attn.o_proj.weight")),
        "passthrough.weight-error",
        "error",
    ),
    "silent: one code two steps off": (
        put(f"{OUT}.weight", lambda t: with_code(t[f"{OUT}.weight"], int(codes(t[f"{OUT}.weight"]).view(-1)[0]) ^ 2)),
        "passthrough.weight-error",
        "error",
    ),
    "silent: one bit of the tower": (
        put("visual.merger.mlp.2.weight", lambda t: (t["visual.merger.mlp.2.weight"].view(torch.int16) ^ 1).view(torch.bfloat16)),
        "passthrough.bytes",
        "error",
    ),
    "silent: norms in another dtype": (everywhere("norm.weight", lambda t: t.float()), "passthrough.cast", "warning"),
    "source's tensor missing": (drop("visual.blocks.0.norm1.weight"), "passthrough.missing", "error"),
    "tensor of no source": (put(f"{L0}self_attn.rotary_emb.inv_freq", lambda _: f32(1.0)), "passthrough.extra", "warning"),
    "config key changed": (config(lambda c: c["text_config"].update(rms_norm_eps=1e-5)), "passthrough.config", "error"),
    "config key gone": (config(lambda c: c.pop("image_token_id")), "passthrough.config", "warning"),
    "config key added": (config(lambda c: c["text_config"].update(pad_token_id=7)), "passthrough.config", "warning"),
    "tokenizer missing": (lambda folder: (folder / "tokenizer.json").unlink(), "passthrough.sidecar-missing", "warning"),
    "tokenizer changed": (write("tokenizer.json", "{}"), "passthrough.sidecar", "warning"),
}


@pytest.mark.parametrize(("mutation", "code", "severity"), MUTANTS.values(), ids=MUTANTS)
def test_each_mutant_is_found(copy: Path, mutation: Mutation, code: str, severity: str) -> None:
    mutation(copy)
    findings = validate_folder(copy, source=EXAMPLE)
    assert (code, severity) in {(f.code, f.severity) for f in findings}, findings
    assert all(f.subject and f.expected and f.found and f.effect and f.mend for f in findings)
    if severity == "warning":  # no error beside it, unless the comparison with the source sees the mutation itself
        assert not [f for f in findings if f.severity == "error" and not f.code.startswith("passthrough.")]


def test_there_are_enough_mutants() -> None:
    assert len(MUTANTS) >= 90
    assert len({code for _, code, _ in MUTANTS.values()}) >= 36


NEAR_MISSES: dict[str, Mutation] = {
    "scales [1]": everywhere("_scale", lambda t: t.view(1)),
    "list in other words": exclude("lm_head", "model.visual.*", "model.embed_tokens"),
    "lowercase algorithm": lambda folder: section(lambda s: s.update(quant_algo="fp8"))(folder),
    "attn.k_scale": tensors(
        lambda t: [t.update({n.replace("k_proj.k_", "attn.k_"): t.pop(n)}) for n in list(t) if n.endswith("k_proj.k_scale")]
    ),
    "rotary frequencies": put(f"{L0}self_attn.rotary_emb.inv_freq", lambda _: torch.ones(32)),
    "a note beside": write("README.md"),
}


@pytest.mark.parametrize("mutation", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_harmless_changes_stay_clean(copy: Path, mutation: Mutation) -> None:
    mutation(copy)
    assert validate_folder(copy) == []


# --- versions of the server ---


@pytest.mark.parametrize(
    ("name", "dropped"), [("model.extra", True), (f"{L0}mlp.extra", True), (f"{Q}.extra", False), ("visual.extra", False)]
)
def test_an_old_server_drops_what_it_does_not_know(copy: Path, name: str, dropped: bool) -> None:
    put(name, lambda _: f32(1.0))(copy)
    assert [f.severity for f in validate_folder(copy)] == ["error"]
    assert [f.severity for f in validate_folder(copy, server=find_server("0.20"))] == ["warning" if dropped else "error"]


def test_an_old_server_passes_over_a_tied_head(copy: Path) -> None:
    config(lambda c: c.update(tie_word_embeddings=True))(copy)
    assert validate_folder(copy) == []
    assert [f.code for f in validate_folder(copy, server=find_server("0.26"))] == ["layout.tied-head"]


# --- what findings look like ---


def test_one_fault_in_all_layers_is_one_finding(copy: Path) -> None:
    everywhere(".input_scale", lambda _: None)(copy)
    (finding,) = validate_folder(copy)
    assert finding.count == 6 * 7
    assert finding.subject.startswith("model.layers.{0..5}.self_attn.q_proj.input_scale, ")
    assert finding.subject.endswith(" and 4 more")


def test_kv_scales_on_the_tower_are_explained(copy: Path) -> None:
    tensors(kv_scales_on_the_tower)(copy)
    assert "visual*" in json.loads((copy / "config.json").read_text(encoding="utf-8"))["quantization_config"]["ignore"]
    (finding,) = validate_folder(copy)
    assert finding.subject == "visual.blocks.{0..3}.attn.k_proj.k_scale, visual.blocks.{0..3}.attn.v_proj.v_scale"
    assert "KeyError: 'blocks.0.attn.k_proj.k_scale'" in finding.effect
    assert "`visual*`" in finding.effect
    assert finding.count == 8


def test_a_pattern_that_reaches_nothing_is_named(copy: Path) -> None:
    exclude("lm_head", "model.embed_tokens", "model.visual")(copy)
    (finding,) = validate_folder(copy)
    assert '"model.visual" reach no linear' in finding.found
    assert "ignore in config.json and exclude_modules in hf_quant_config.json" in finding.mend
    assert "images" in finding.effect
    assert finding.count == 4 * 5 + 2


@pytest.mark.parametrize("count", [7, 9])
def test_layers_too_many_in_the_config_are_one_finding(copy: Path, count: int) -> None:
    config(lambda c: c["text_config"].update(num_hidden_layers=count))(copy)
    (finding,) = validate_folder(copy)
    assert (finding.code, finding.count) == ("layout.missing-layer", count - 6)
    assert finding.subject == ("model.layers.6" if count == 7 else "model.layers.{6..8}")


def test_a_quantized_weight_is_not_taken_over_from_the_source(copy: Path) -> None:
    drop(f"{OUT}.weight")(copy)
    (finding,) = validate_folder(copy)
    assert finding.expected == "F8_E4M3 [256, 256]"
    assert "source" not in finding.mend
    drop("model.norm.weight")(copy)
    assert any(f.mend == "take the tensor over from the source" for f in validate_folder(copy))


@pytest.mark.parametrize(
    ("change", "effect"),
    [
        ("q_proj with rows too many", "silently"),
        ("k_proj with rows too few", "raises"),
        ("down_proj transposed", "raises"),
        ("lm_head with rows too few", "raises"),
    ],
)
def test_what_a_wrong_shape_does(copy: Path, change: str, effect: str) -> None:
    name = next(name for name in MUTANTS if name.endswith(change))
    MUTANTS[name][0](copy)
    (finding,) = (f for f in validate_folder(copy) if f.code == "layout.shape")
    assert effect in finding.effect
    assert name.startswith("silent") == (effect == "silently")


@pytest.mark.parametrize(
    ("other_file", "subject", "found"),
    [({"kv_cache_quant_algo": None}, "kv_cache_quant_algo", "null"), ({"exclude_modules": []}, "exclude_modules", "[]")],
)
def test_values_are_spelled_as_the_file_spells_them(copy: Path, other_file: dict[str, Any], subject: str, found: str) -> None:
    other(lambda s: s.update(other_file))(copy)
    (finding,) = validate_folder(copy)
    assert (finding.subject, finding.found) == (f"hf_quant_config.json: {subject}", found)
    assert finding.expected.startswith(('"FP8"', '["lm_head", '))


# --- refusals ---


def test_an_unfinished_conversion_is_refused(copy: Path) -> None:
    (copy / STAGING).mkdir()
    with pytest.raises(SourceError, match="unfinished conversion") as caught:
        validate_folder(copy)
    assert "--resume" in str(caught.value.hint)


def test_shards_without_a_config_are_refused(copy: Path) -> None:
    (copy / "config.json").unlink()
    with pytest.raises(SourceError, match=r"unfinished conversion: it has no config\.json"):
        validate_folder(copy)


def test_the_staging_folder_is_for_the_job_itself(copy: Path) -> None:
    staged = copy.rename(copy.with_name(STAGING))
    assert validate_folder(staged, staged=True) == []
    with pytest.raises(SourceError, match="what a job works in"):
        validate_folder(staged)


def test_an_unreadable_hf_quant_config_is_an_error_where_it_counts(copy: Path) -> None:
    (copy / "hf_quant_config.json").write_text("{", encoding="utf-8")
    assert [(f.code, f.severity) for f in validate_folder(copy)] == [("config.hf-quant-config", "warning")]
    config(lambda c: c.pop("quantization_config"))(copy)
    with pytest.raises(SourceError, match="hf_quant_config"):
        validate_folder(copy)


def test_an_unquantized_checkpoint_is_called_that() -> None:
    with pytest.raises(UnsupportedError, match="not a quantized checkpoint"):
        validate_folder(EXAMPLE)


@pytest.mark.parametrize(
    "tensor", [{"x.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}, {"x.qweight": torch.ones(2).int()}, {"x.k_scale": f32(1.0)}]
)
def test_a_lost_section_is_an_error(tmp_path: Path, tensor: Tensors) -> None:
    shutil.copytree(EXAMPLE, tmp_path / "out", ignore=shutil.ignore_patterns("*.safetensors", INDEX))
    save_file(tensor, tmp_path / "out" / WEIGHTS)
    assert [f.code for f in validate_folder(tmp_path / "out", values=False)] == ["config.no-section"]


# --- numbers ---


def test_codes_decode_as_torch_decodes_them() -> None:
    codes_ = torch.arange(256, dtype=torch.uint8)
    ours = np.empty(256, np.float32)
    decode(memoryview(codes_.numpy()), ours)
    theirs = codes_.view(torch.float8_e4m3fn).float().nan_to_num(nan=480.0).numpy()
    np.testing.assert_array_equal(np.abs(ours), np.abs(theirs))
    finite = (codes_ & 0x7F).numpy() != 0x7F
    np.testing.assert_array_equal(ours[finite], theirs[finite])


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32")])
def test_bytes_become_the_float32_that_torch_reads(dtype: torch.dtype, name: str) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours = np.empty(1000, np.float32)
    as_float32(memoryview(values.view(torch.uint8).numpy()), name, ours)
    np.testing.assert_array_equal(ours, values.float().numpy())


def one_weight(folder: Path, weight: torch.Tensor, divide: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> list[Finding]:
    """Findings on a pair of folders that hold `weight` and its codes as `divide` makes the quotient."""
    from ckptq.validators import passthrough

    scale = weight.float().abs().max() / 448
    for name, stored in (
        ("before", {"x.weight": weight}),
        ("after", {"x.weight": divide(weight, scale).to(torch.float8_e4m3fn), "x.weight_scale": scale}),
    ):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text("{}", encoding="utf-8")
        save_file(stored, folder / name / WEIGHTS)
    return list(passthrough.check(read_inventory(folder / "after"), read_inventory(folder / "before"), SCOPE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), spread=st.floats(0.1, 12.0))
def test_correct_rounding_is_always_within_the_bound(
    tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype, seed: int, spread: float
) -> None:
    """Values over many powers of two, so that normal and subnormal codes, ties and zeros all occur."""
    random = torch.Generator().manual_seed(seed)
    weight = (torch.randn(64, 64, generator=random) * 2.0 ** -(torch.rand(64, 64, generator=random) * spread)).to(dtype)
    folder = tmp_path_factory.mktemp("pair")
    assert one_weight(folder, weight, lambda w, s: w.float() / s) == []
    assert one_weight(folder, weight, lambda w, s: w / s) == []  # ModelOpt's own quotient, rounded to the weight's dtype


def test_codes_one_step_off_are_beyond_the_bound(tmp_path: Path) -> None:
    weight = torch.linspace(-1, 1, 64 * 64).view(64, 64).bfloat16()

    def one_step_up(w: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        stored = (w.float() / s).to(torch.float8_e4m3fn).view(torch.uint8)
        return torch.where(stored & 0x7F == 0x7E, stored, stored + 1).view(torch.float8_e4m3fn).float()

    (finding,) = one_weight(tmp_path, weight, one_step_up)
    assert finding.code == "passthrough.weight-error"
    assert int(finding.found.split()[0]) > 0.7 * 64 * 64


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_source_that_is_not_finite_is_beyond_the_bound(tmp_path: Path, value: float) -> None:
    weight = torch.ones(8, 8).bfloat16()
    assert one_weight(tmp_path, weight, lambda w, s: w.float() / s) == []
    weight[3, 5] = value
    save_file({"x.weight": weight}, tmp_path / "before" / WEIGHTS)
    from ckptq.validators import passthrough

    (finding,) = passthrough.check(read_inventory(tmp_path / "after"), read_inventory(tmp_path / "before"), SCOPE)
    assert finding.found.startswith("1 of 64 values are not, first [3, 5]")


def test_progress_counts_every_byte(good: Path) -> None:
    from ckptq.validators import passthrough, values

    inventory = read_inventory(good)
    for run in (
        lambda advance: list(values.check(good, inventory.main, SCOPE, advance)),
        lambda advance: list(passthrough.check(inventory, read_inventory(EXAMPLE), SCOPE, advance)),
    ):
        seen: list[int] = []
        assert run(seen.append) == []
        assert sum(seen) == inventory.main.nbytes
