"""FP8 as a storage format: which weights, what they become, that no library takes them for weights, and what loads them."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import parts
from safetensors.torch import load_file, save_file

from ckptq import quantized
from ckptq.checkpoint import Component, Inventory, Reader, read_inventory
from ckptq.classes import kinds
from ckptq.errors import DataError, RecipeError, SourceError, UnsupportedError
from ckptq.loading import load_component
from ckptq.pipeline import write_shards
from ckptq.plan import Copy, Plan
from ckptq.storage import STORAGES, plan_storage
from ckptq.tensors import TORCH_DTYPES, raw

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::FutureWarning:diffusers")
ACTIONS = tuple(STORAGES)
Tensors = dict[str, torch.Tensor]


def clip() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 16}
    return parts.filled(CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=64, bos_token_id=1, eos_token_id=2, **sizes)))


def t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    return parts.filled(T5EncoderModel(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)))


MODELS: dict[str, Callable[[], Any]] = {
    "qwen_vae": parts.qwen_vae,
    "kl_vae": parts.kl_vae,
    "qwen3": parts.qwen3,
    "t5": t5,
    "clip": clip,
}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """made(name) -> a saved component in BF16. Read only."""
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("component") / name
            MODELS[name]().save_pretrained(folders[name])
        return folders[name]

    return make


def store(source: Inventory, output: Path, action: str, shard_size: int = 10**9) -> Plan:
    """Writes the first component's weights and config as the plan says."""
    component = source.main
    plan = plan_storage(component, action, shard_size)
    output.mkdir()
    with Reader(source.root, component) as reader:
        write_shards(output, plan, plan.shards, component, reader, {}, lambda shard, digests: None, lambda count: None)
    for name, text in plan.files.items():
        (output / name).write_text(text)
    return plan


def read(folder: Path) -> Tensors:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def seen(inventory: Inventory) -> Tensors:
    """All tensors as a reader gives them."""
    found = {}
    with Reader(inventory.root, inventory.main) as reader:
        for name, tensor in inventory.main.tensors.items():
            found[name] = torch.empty(tensor.spec.shape, dtype=TORCH_DTYPES[tensor.spec.dtype])
            if tensor.spec.numel:
                reader.read_into(tensor, 0, raw(found[name]))
    return found


# Which weights


def test_linears_and_convolutions_are_stored_and_nothing_else(made: Callable[[str], Path]) -> None:
    from torch import nn

    for name, make in MODELS.items():
        component = read_inventory(made(name)).main
        plan = plan_storage(component, "fp8-storage", 10**9)
        model = make()
        wanted = {
            f"{module}.weight"
            for module, what in model.named_modules()
            if isinstance(what, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        } & set(component.tensors)  # an output head that is the embedding is not stored
        assert {f"{d.module}.weight" for d in plan.decisions if d.action == "fp8-storage"} == wanted, name
        copied = {op.source for op in plan.ops if isinstance(op, Copy)}
        assert copied == set(component.tensors) - wanted
    actions = {d.module: d.reason for d in plan_storage(read_inventory(made("t5")).main, "fp8-storage", 10**9).decisions}
    assert actions["encoder.block.0.layer.0.SelfAttention.relative_attention_bias"] == "Embedding"


def test_a_head_that_is_the_embedding_stays_under_either_name(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(made("qwen3"), tmp_path / "tied")
    tensors = read(folder)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors")
    decisions = {d.module: d for d in plan_storage(read_inventory(folder).main, "fp8-storage", 10**9).decisions}
    assert (decisions["lm_head"].action, decisions["lm_head"].reason) == ("keep", "Embedding")


def test_names_of_an_older_library_are_found(made: Callable[[str], Path], tmp_path: Path) -> None:
    parts.qwen2_5_vl().save_pretrained(tmp_path / "new")
    folder = tmp_path / "new"
    old = {n.replace("model.language_model.", "model.").replace("model.visual.", "visual."): t for n, t in read(folder).items()}
    new = plan_storage(read_inventory(folder).main, "fp8-storage", 10**9)
    save_file(old, folder / "model.safetensors")
    plan = plan_storage(read_inventory(folder).main, "fp8-storage", 10**9)
    assert [d.action for d in plan.decisions].count("fp8-storage") == [d.action for d in new.decisions].count("fp8-storage") > 20
    assert not plan.carried


def component(folder: Path, config: dict[str, Any], tensors: Tensors) -> Component:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return read_inventory(folder).main


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"_class_name": "MyOwnVAE"}, "MyOwnVAE is no model of diffusers 0"),
        ({"_class_name": "DDIMScheduler"}, "DDIMScheduler is no model of diffusers"),
        ({"architectures": ["Newest"], "auto_map": {"AutoModel": "code.Newest"}}, "Newest is no model of transformers"),
        ({"architectures": ["a", "b"]}, "names no class"),
        ({}, "names no class"),
        ({"_class_name": "AutoencoderKL", "down_block_types": ["NoSuchBlock"]}, "AutoencoderKL can't be built: NoSuchBlock"),
        ({"architectures": ["T5EncoderModel"], "num_layers": 10**7}, "num_layers is above 4096"),
    ],
)  # fmt: skip
def test_what_no_library_knows_is_refused(config: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=told):
        plan_storage(component(tmp_path / "one", config, {"a.weight": torch.ones(4, 4)}), "fp8-storage", 10**9)


def test_a_weight_of_another_shape_is_refused(made: Callable[[str], Path], tmp_path: Path) -> None:
    tensors = read(made("clip"))
    tensors["text_projection.weight"] = tensors["text_projection.weight"][:8].contiguous()
    config = json.loads((made("clip") / "config.json").read_text())
    with pytest.raises(SourceError, match=r"text_projection.weight: shape \[8, 32\], config.json calls for \[16, 32\]"):
        plan_storage(component(tmp_path / "one", config, tensors), "fp8-storage", 10**9)


CHILD = """
import json, sys
from pathlib import Path
from ckptq.checkpoint import read_inventory
from ckptq.classes import kinds
from ckptq.errors import CkptqError
for folder in sys.argv[1:]:
    try:
        print(json.dumps(kinds(read_inventory(Path(folder)).main)))
    except CkptqError as error:
        print(json.dumps([type(error).__name__, str(error), error.hint]))
assert "torch" not in sys.modules
"""


def test_a_process_of_its_own_says_the_same(made: Callable[[str], Path], tmp_path: Path) -> None:
    """Where the libraries are not loaded yet; the conversion itself then takes no memory for them."""
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown/config.json").write_text('{"_class_name": "MyOwnVAE"}')
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "unknown/model.safetensors")
    folders = [made("t5"), tmp_path / "unknown"]
    done = subprocess.run([sys.executable, "-c", CHILD, *folders], capture_output=True, text=True, check=True)
    t5, unknown = map(json.loads, done.stdout.splitlines())
    assert t5 == kinds(read_inventory(folders[0]).main)
    with pytest.raises(UnsupportedError) as caught:
        kinds(read_inventory(folders[1]).main)
    assert unknown == ["UnsupportedError", str(caught.value), caught.value.hint]


# What they become


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("name", ["qwen_vae", "qwen3"])
def test_values_are_as_near_as_fp8_is(
    name: str, action: str, dtype: torch.dtype, made: Callable[[str], Path], tmp_path: Path
) -> None:
    """Against the definition in float64."""
    source = shutil.copytree(made(name), tmp_path / "source")
    file = next(source.glob("*.safetensors"))
    tensors = {n: t.to(dtype) for n, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    plan = store(read_inventory(source), tmp_path / "out", action, shard_size=100_000)
    assert len(plan.shards) > 1
    stored, dense = read(tmp_path / "out"), seen(quantized.dense(read_inventory(tmp_path / "out")))
    assert set(dense) == set(tensors)
    coded = {n for n, t in stored.items() if t.dtype == torch.float8_e4m3fn}
    assert len(coded) > 20
    for n, t in tensors.items():
        if n not in coded:
            assert torch.equal(stored[n], t)
            assert torch.equal(dense[n], t)
            continue
        exact = t.double()
        rows = exact.abs().flatten(1).amax(1).view(-1, *[1] * (t.dim() - 1)) if "channel" in action else exact.abs().amax()
        scale = stored[f"{n}_scale"]
        assert scale.shape == (rows.shape if "channel" in action else ())
        torch.testing.assert_close(scale.double(), rows / 448, rtol=1e-7, atol=0)
        codes = exact / scale.double()
        assert torch.equal(stored[n].float(), codes.float().to(torch.float8_e4m3fn).float())
        assert bool(((stored[n].double() - codes).abs() <= torch.maximum(codes.abs() / 16, torch.tensor(2.0**-10))).all())
        assert torch.equal(dense[n], (stored[n].float() * scale).bfloat16())


@pytest.mark.parametrize("action", ACTIONS)
def test_bf16_sources_survive_a_second_storing_byte_for_byte(action: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    store(read_inventory(made("qwen_vae")), tmp_path / "once", action)
    with pytest.raises(
        UnsupportedError, match=r"quantized already: config.json says 'fp8-storage.*, which is for storage; 55 FP8"
    ) as e:
        plan_storage(read_inventory(tmp_path / "once").main, action, 10**9)
    assert "--from-fp8" in str(e.value.hint)
    store(quantized.dense(read_inventory(tmp_path / "once")), tmp_path / "twice", action)
    for file in ("config.json", "model.safetensors", "diffusion_pytorch_model.safetensors"):
        first, second = tmp_path / "once" / file, tmp_path / "twice" / file
        assert first.exists() == second.exists()
        assert not first.exists() or first.read_bytes() == second.read_bytes()


EDGES = {
    "zero": lambda t: torch.zeros_like(t),
    "one value": lambda t: torch.zeros_like(t).index_fill_(1, torch.tensor([0]), 1.5),
    "least subnormal": lambda t: torch.full_like(t, 2.0**-133),
    "subnormals": lambda t: (t.float() * 2.0**-130).to(t.dtype),
    "near zero": lambda t: (t.float() * 1e-30).to(t.dtype),
    "huge": lambda t: t.sign() * torch.finfo(t.dtype).max,
    "a zero row": lambda t: t.index_fill(0, torch.tensor([1]), 0),
}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("edge", EDGES)
def test_odd_weights_behave(edge: str, action: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    source = shutil.copytree(made("clip"), tmp_path / "source")
    tensors = read(source)
    names = [n for n in tensors if n.endswith("q_proj.weight")]
    tensors |= {n: EDGES[edge](tensors[n]) for n in names}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    store(read_inventory(source), tmp_path / "out", action)
    stored, dense = read(tmp_path / "out"), seen(quantized.dense(read_inventory(tmp_path / "out")))
    for n in names:
        scale, value, exact = stored[f"{n}_scale"], dense[n].double(), tensors[n].double()
        assert bool((torch.isfinite(scale) & (scale > 0)).all())
        assert not bool(stored[n].float().isnan().any())
        amax = exact.abs().amax(1, keepdim=True) if "channel" in action else exact.abs().amax()
        least = 2.0**-126  # below it float32 has fewer bits for scales, and the codes are zeros in the end
        assert bool(((value - exact).abs() <= torch.maximum(exact.abs() / 15, amax * 2.0**-18 + least)).all())
        assert torch.equal(value == 0, exact == 0) or edge in ("least subnormal", "subnormals")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("action", ACTIONS)
def test_what_is_not_finite_is_named(action: str, value: float, made: Callable[[str], Path], tmp_path: Path) -> None:
    source = shutil.copytree(made("clip"), tmp_path / "source")
    tensors = read(source)
    tensors["text_projection.weight"][3, 5] = value
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(DataError, match=r"text_projection.weight: holds"):
        store(read_inventory(source), tmp_path / "out", action)


def test_integers_and_booleans_are_copied(made: Callable[[str], Path], tmp_path: Path) -> None:
    source = shutil.copytree(made("clip"), tmp_path / "source")
    more = {"text_model.embeddings.position_ids": torch.arange(77)[None], "mask": torch.tensor([True, False]),
            "counts": torch.tensor([1, -2], dtype=torch.int32), "empty": torch.empty(0)}  # fmt: skip
    save_file(read(source) | more, source / "model.safetensors")
    plan = store(read_inventory(source), tmp_path / "out", "fp8-storage")
    stored, dense = read(tmp_path / "out"), seen(quantized.dense(read_inventory(tmp_path / "out")))
    for name, tensor in more.items():
        assert torch.equal(stored[name], tensor)
        assert torch.equal(dense[name], tensor)
    assert {d.action for d in plan.decisions} == {"keep", "fp8-storage"}


@settings(max_examples=40, deadline=None)
@given(data=st.data(), shape=st.lists(st.integers(1, 7), min_size=2, max_size=5), action=st.sampled_from(ACTIONS))
def test_any_shape_and_any_piece_of_it(
    data: st.DataObject, shape: list[int], action: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A weight of any rank is read back in pieces of any size."""
    from ckptq.plan import Plan as Whole
    from ckptq.shards import fill_files
    from ckptq.storage import _stored, section

    folder = tmp_path_factory.mktemp("any")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    weight = torch.randn(shape, generator=generator).bfloat16()
    source = folder / "source"
    one = component(source, {}, {"a.weight": weight})
    ops = _stored(one.tensors["a.weight"], STORAGES[action].scheme)
    shards = tuple(fill_files([ops], 10**9))
    plan = Whole("", shards, (), (), {}, (), (), (), 0)
    out = folder / "out"
    out.mkdir()
    with Reader(source, one) as reader:
        write_shards(out, plan, plan.shards, one, reader, {}, lambda shard, digests: None, lambda count: None)
    (out / "config.json").write_text(json.dumps({"quantization_config": section(action)}))
    inventory = quantized.dense(read_inventory(out))
    whole = seen(inventory)["a.weight"]
    stored = read(out)
    assert torch.equal(whole, (stored["a.weight"].float() * stored["a.weight_scale"]).bfloat16())
    step = data.draw(st.integers(1, 2 * weight.numel()))
    with Reader(out, inventory.main) as reader:
        pieces = bytearray(weight.nbytes)
        for at in range(0, len(pieces), step):
            reader.read_into(inventory.main.tensors["a.weight"], at, memoryview(pieces)[at : at + step])
    assert bytes(pieces) == bytes(raw(whole))


# Who loads it


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("options", [{}, {"torch_dtype": torch.bfloat16}])
@pytest.mark.parametrize("name", ["kl_vae", "clip"])
def test_no_library_takes_the_codes_for_weights(
    name: str, options: dict[str, Any], action: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    """It does where the section is gone or has a quant_method that it does not know: that is why it has none."""
    import diffusers
    import transformers

    store(read_inventory(made(name)), tmp_path / "out", action)
    cls = diffusers.AutoencoderKL if name == "kl_vae" else transformers.CLIPTextModelWithProjection
    with pytest.raises(ValueError, match="quant_method"):
        cls.from_pretrained(tmp_path / "out", **options)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert cls.from_pretrained(tmp_path / "out", **options) is not None


def test_the_loaders_model_decodes_as_the_original_does(made: Callable[[str], Path], tmp_path: Path) -> None:
    from diffusers import AutoencoderKLQwenImage

    store(read_inventory(made("qwen_vae")), tmp_path / "out", "fp8-storage-channel")
    vae = load_component(tmp_path / "out")
    original = AutoencoderKLQwenImage.from_pretrained(made("qwen_vae"))
    assert type(vae) is AutoencoderKLQwenImage
    assert not vae.training
    latents = torch.randn(1, 16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = vae.decode(latents).sample, original.decode(latents).sample
    difference = float((ours - theirs).norm() / theirs.norm())
    assert 1e-3 < difference < 0.25  # some 2 % of each of twenty convolutions, whose weights are random here


def test_what_is_not_quantized_needs_no_loader(made: Callable[[str], Path]) -> None:
    with pytest.raises(RecipeError, match="not quantized"):
        load_component(made("clip"))


# What is somebody else's


def gguf(base: Path) -> None:
    (base / "qwen-image-Q4_K_M.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(64))


def test_a_component_of_gguf_files_is_refused_with_the_reason(tmp_path: Path) -> None:
    from pipelines import pipelines

    from ckptq.prepare import prepare
    from ckptq.recipe import parse_recipe

    pipelines()["qwen_image"].make(tmp_path / "source")
    next((tmp_path / "source/transformer").glob("*.safetensors")).unlink()
    gguf(tmp_path / "source/transformer")
    recipe = f"model: {tmp_path}/source\ncomponents: {{transformer: fp8-dynamic}}"
    with pytest.raises(UnsupportedError, match=r"qwen-image-Q4_K_M.gguf is GGUF, whose blocks of integers ckptq does not read"):
        prepare(parse_recipe(recipe, "r.yaml"))


@pytest.mark.parametrize("config", [False, True])
def test_a_model_of_gguf_files_is_refused_with_the_reason(config: bool, tmp_path: Path) -> None:
    gguf(tmp_path)
    if config:
        (tmp_path / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    with pytest.raises(UnsupportedError, match="is GGUF"):
        read_inventory(tmp_path)


def test_a_folder_of_msmodelslims_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"], "quantize": "w8a8"}')
    (tmp_path / "quant_model_description.json").write_text('{"model_quant_type": "W8A8", "a.weight": "W8A8"}')
    save_file({"a.weight": torch.ones(4, 4, dtype=torch.int8)}, tmp_path / "quant_model_weight_w8a8.safetensors")
    with pytest.raises(UnsupportedError, match=r"quant_model_description.json is msModelSlim's, which quantizes for Ascend NPUs"):
        read_inventory(tmp_path)


ROUNDED = {
    "a.qweight": torch.ones(4, 4, dtype=torch.int32),
    "a.qzeros": torch.ones(1, 1, dtype=torch.int32),
    "a.scales": torch.ones(1, 4),
}
NUNCHAKU = {"a.qweight": torch.ones(4, 2, dtype=torch.int8), "a.wscales": torch.ones(1, 4), "a.smooth_factor": torch.ones(4)}
BNB = {"a.weight": torch.ones(8, 1, dtype=torch.uint8), "a.weight.absmax": torch.ones(1), "a.weight.quant_map": torch.ones(16)}
SLIM = {"a.weight": torch.ones(4, 4, dtype=torch.int8), "a.weight_scale": torch.ones(4, 1), "a.weight_offset": torch.zeros(4, 1)}
FOREIGN: dict[str, tuple[dict[str, Any] | None, Tensors, str]] = {
    "AutoRound": ({"quant_method": "auto-round", "bits": 4, "group_size": 128}, ROUNDED, "'auto-round'; it is AutoRound's"),
    "AutoRound MXFP8": ({"quant_method": "auto-round", "data_type": "mx_fp"}, {"a.weight": torch.ones(4, 4)}, "AutoRound's"),
    "AutoRound, no section": (None, ROUNDED, r"a.qweight is stored; it is packed integers, as GPTQ, AWQ, AutoRound and SVDQuant"),
    "SVDQuant": ({"quant_method": "svdquant", "precision": "int4"}, NUNCHAKU, "'svdquant'; it is SVDQuant's: 4-bit codes beside"),
    "SVDQuant, no section": (None, {n: t for n, t in NUNCHAKU.items() if "qweight" not in n}, "it is SVDQuant's"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, BNB, "'bitsandbytes'; it is bitsandbytes'"),
    "bitsandbytes, no section": (None, BNB, r"a.weight.absmax is stored; it is bitsandbytes'"),
    "torchao": ({"quant_method": "torchao", "quant_type": {}}, {"a.weight": torch.ones(4, 4)}, "'torchao'; it is torchao's"),
    "msModelSlim": (None, SLIM, r"a.weight_offset is stored; it is msModelSlim's"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_what_others_have_quantized_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    section, tensors, told = FOREIGN[name]
    config = {"_class_name": "QwenImageTransformer2DModel", **({"quantization_config": section} if section else {})}
    one = component(tmp_path / "one", config, tensors)
    with pytest.raises(UnsupportedError, match=rf"the source is quantized already: .*{told}") as caught:
        quantized.refuse(one)
    assert caught.value.hint == "start from the BF16 checkpoint"
    with pytest.raises(UnsupportedError):
        quantized.dense(read_inventory(tmp_path / "one"))


def test_a_merged_output_of_msmodelslims_is_refused_with_the_reason(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(made("kl_vae"), tmp_path / "merged")
    (folder / "quant_model_description.json").write_text("{}")
    with pytest.raises(UnsupportedError, match=r"quantized already: quant_model_description.json is msModelSlim's"):
        plan_storage(read_inventory(folder).main, "fp8-storage", 10**9)


def test_a_linear_of_integers_is_refused(made: Callable[[str], Path], tmp_path: Path) -> None:
    tensors = read(made("clip"))
    tensors["text_projection.weight"] = tensors["text_projection.weight"].to(torch.int8)
    config = json.loads((made("clip") / "config.json").read_text())
    with pytest.raises(UnsupportedError, match=r"text_projection.weight is I8: the source is quantized already"):
        plan_storage(component(tmp_path / "one", config, tensors), "fp8-storage", 10**9)
