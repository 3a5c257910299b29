"""The real vLLM-Omni on hand-made checkpoints: what reaches its linears, which the scopes and the validator have to know."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import make_fp8_pipeline as by_hand
import pytest
from make_fp8_pipeline import MODELOPT, quantize
from pipelines import pipelines
from server.omni import Loaded, load

pytestmark = pytest.mark.server

NATIVE: Mapping[str, Any] = {"quant_method": "fp8", "activation_scheme": "static"}
INT8: Mapping[str, Any] = {"quant_method": "int8", "is_checkpoint_int8_serialized": True}
BLOCKS = {
    "qwen_image": r"transformer_blocks\..*(attn|mlp).*",
    "qwen_image_edit": r"transformer_blocks\..*(attn|mlp).*",
    "z_image": r"(layers|noise_refiner|context_refiner)\..*(attention|feed_forward).*",
    "flux2": r"(single_)?transformer_blocks\..*",
    "omnigen2": r"(layers|.*_refiner)\..*(attn|feed_forward).*",
    "wan22": r"blocks\..*",
    "glm_image": r"transformer_blocks\..*(attn1|ff)\..*",
    "hunyuan_image3": r"model\.layers\..*(qkv_proj|o_proj|shared_mlp.*|experts.*)",
    "bagel": r"language_model\.model\.layers\..*_proj(_moe_gen)?",
}
"""The linears of each pipeline's blocks, by their names on disk."""
IGNORE = {
    "z_image": ["model.layers*", "lm_head"],
    "flux2": ["text_encoder*"],
    "glm_image": ["*.norm1*", "glyph_projector*", "prior_projector*"],
    "hunyuan_image3": ["*.mlp.gate"],
    "bagel": ["*connector*"],
}
"""What the server would quantize beside them, in patterns of ModelOpt's."""

Scheme = Callable[[str, Any], Any]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pipelines")
    for name, pipeline in pipelines().items():
        pipeline.make(folder / name)
    return {name: folder / name for name in pipelines()}


@pytest.fixture
def made(tiny: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a tiny pipeline with its denoisers quantized by hand."""

    def make(
        name: str, config: Mapping[str, Any], scheme: Scheme = by_hand.per_tensor, rename: Any = str, only: Any = None
    ) -> Path:
        folder = tmp_path / f"{name}-{len([*tmp_path.iterdir()])}"
        shutil.copytree(tiny[name], folder)
        for denoiser in pipelines()[name].denoisers:
            assert quantize(folder / denoiser, BLOCKS[name], config, scheme, rename)
        return folder

    return make


def modelopt(*ignore: str, algo: str = "FP8") -> dict[str, Any]:
    return {**MODELOPT, "quant_algo": algo, "ignore": list(ignore)}


def whole(loaded: Loaded) -> bool:
    return loaded.stage == "done" and not loaded.missing


def lost(loaded: Loaded, folder: str = "transformer") -> set[str]:
    """The last parts of the names of linears that lack a scale."""
    return {name.split(".", 2)[-1] for name, linear in loaded.components[folder].quantized.items() if linear.missing}


def test_the_tiny_pipelines_are_whole(tiny: dict[str, Path]) -> None:
    for folder, loaded in load(tiny.values()).items():
        name = folder.name
        assert loaded.error is None, name
        for denoiser in pipelines()[name].denoisers:
            component = loaded.components[denoiser]
            assert component.linears, name
            assert not component.quantized, name
            assert not component.unwritten, name
            assert not component.unread, name


def test_canonical_checkpoints_arrive(made: Callable[..., Path]) -> None:
    """ModelOpt's block under the names of the hub, but for OmniGen2 and Wan2.2, which are next."""
    names = [name for name in BLOCKS if name not in ("omnigen2", "wan22")]
    folders = {made(name, modelopt(*IGNORE.get(name, ()))): name for name in names}
    for folder, loaded in load(folders).items():
        assert whole(loaded), (folders[folder], loaded.error, loaded.missing[:4])
        denoiser = loaded.components[pipelines()[folders[folder]].denoisers[0]]
        assert denoiser.adapter == ("transformer" in loaded.components)
        assert not denoiser.unread
        assert all(linear.dtype == "float8_e4m3fn" and linear.process is None for linear in denoiser.quantized.values())
        assert max(linear.drift or 0.0 for linear in denoiser.quantized.values()) < 0.05, "fused shards under one scale"
        assert all(not component.quantized for component in loaded.components.values() if component is not denoiser)


def test_the_adapter_drops_feed_forward_scales(made: Callable[..., Path]) -> None:
    wan = {"ffn.net.0.proj": "ffn.net_0.proj", "ffn.net.2": "ffn.net_2"}

    def runtime(name: str) -> str:
        return name.replace("ffn.net.0", "ffn.net_0").replace("ffn.net.2", "ffn.net_2")

    omnigen = made("omnigen2", modelopt())
    loaded = load([omnigen])[omnigen]
    assert loaded.stage == "done", "silently"
    assert lost(loaded) == {"feed_forward.gate_up_proj", "feed_forward.down_proj"}
    assert all("feed_forward" in name for name in loaded.components["transformer"].unread)

    plain, renamed = made("wan22", modelopt()), made("wan22", modelopt(), rename=runtime)
    both = load([plain, renamed], quantization_config="fp8")
    assert lost(both[plain]) == {*wan.values()}
    assert not lost(both[plain], "transformer_2"), "no adapter there"
    assert whole(both[renamed])


def test_wan_wants_a_flag_for_modelopt(made: Callable[..., Path]) -> None:
    """Two experts: a block that was found in a config.json is read again for each, by the method's name alone."""
    folder = made("wan22", modelopt())
    (loaded,) = load([folder]).values()
    assert loaded.stage == "create"
    assert "Cannot instantiate ModelOptFp8Config" in (loaded.error or "")


def test_native_fp8_needs_no_adapter(made: Callable[..., Path]) -> None:
    """Under the names of the hub, all scales arrive; what is ignored is named in full, as the server calls it."""
    folders = [made(name, NATIVE) for name in ("omnigen2", "wan22", "qwen_image")]
    folders.append(made("flux2", {**NATIVE, "ignored_layers": ["text_encoder*"]}))
    *three, flux = load(folders).values()
    assert all(whole(loaded) for loaded in three)
    assert {name.split("/")[0] for name in flux.missing} == {"text_encoder"}, "no patterns there"


def test_one_block_for_all_reaches_the_text_encoder(made: Callable[..., Path]) -> None:
    z_image, flux = load([made("z_image", modelopt()), made("flux2", modelopt())]).values()
    for loaded in (z_image, flux):
        assert loaded.stage == "done", "silently"
        assert {name.split("/")[0] for name in loaded.missing} == {"text_encoder"}
    assert "lm_head" in z_image.components["text_encoder"].quantized


def test_per_channel_weights(made: Callable[..., Path]) -> None:
    config = modelopt(*IGNORE["z_image"], algo="FP8_PER_CHANNEL_PER_TOKEN")
    folders = [made("qwen_image", {**config, "ignore": []}, by_hand.per_channel), made("z_image", config, by_hand.per_channel)]
    for loaded in load(folders).values():
        assert whole(loaded)
        assert all(linear.drift == 0 for linear in loaded.components["transformer"].quantized.values())


def test_forms_of_the_config(made: Callable[..., Path]) -> None:
    nested = {"quantization": {"quant_algo": "FP8", "exclude_modules": ["*mlp*"]}, "producer": {"name": "modelopt"}}
    flat, inner, blocks, extra, shards = load(
        [
            made("qwen_image", {**MODELOPT, "exclude_modules": ["*img_mlp*"]}),
            made("qwen_image", nested),
            made("qwen_image", modelopt(algo="FP8_PB_WO")),
            made("qwen_image", {**NATIVE, "modules_to_not_convert": []}),
            made("qwen_image", modelopt("to_q", "add_q_proj")),
        ]
    ).values()
    assert "transformer_blocks.0.img_mlp.net.2" in flat.components["transformer"].quantized, "an unknown key is no error"
    assert not any("mlp" in name for name in inner.components["transformer"].quantized)
    assert (blocks.stage, extra.stage) == ("config", "config")
    attention = {name.split(".")[-1] for name in shards.components["transformer"].quantized if ".attn." in name}
    assert attention == {"add_kv_proj", "to_out", "to_add_out"}, "to_q is a part of the server's name, add_q_proj is none"


def test_what_the_server_keeps_is_dequantized_with_the_adapter_alone(
    made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BLOCKS, "qwen_image", r"transformer_blocks\..*")
    adapted, native = load([made("qwen_image", modelopt()), made("qwen_image", NATIVE)]).values()
    mod = "transformer_blocks.0.img_mod.1"
    for loaded in (adapted, native):
        assert whole(loaded)
        assert loaded.components["transformer"].linears[mod].dtype == "bfloat16"
    assert f"{mod}.weight" in adapted.components["transformer"].dequantized
    assert not native.components["transformer"].dequantized
    assert f"{mod}.weight_scale" in native.components["transformer"].unread, "its codes are values there"


def test_int8_on_gpus_takes_one_scale_for_a_shard(made: Callable[..., Path]) -> None:
    """A fused linear's post-processing takes the first rows' scales for the scales of its shards."""
    folders = made("qwen_image", INT8, by_hand.int8), made("qwen_image", INT8, by_hand.int8_of_one_scale)
    rows, group = (loaded.components["transformer"].quantized for loaded in load(folders).values())
    for linears in (rows, group):
        assert all(linear.dtype == "int8" and not linear.missing and linear.process is None for linear in linears.values())
    drifts = {name: linear.drift or 0.0 for name, linear in rows.items()}
    assert {name.split(".")[-1] for name, drift in drifts.items() if drift > 0.1} == {"to_qkv", "add_kv_proj"}
    assert {name.split(".")[-1] for name, drift in drifts.items() if drift < 1e-6} == {"to_out", "to_add_out", "proj", "2"}
    assert max(linear.drift or 0.0 for linear in group.values()) < 1e-6


def test_a_scale_that_is_not_there_is_missed(made: Callable[..., Path]) -> None:
    """One of many, and of one shard: the harness must see what the server only warns of."""
    from safetensors.torch import load_file, save_file

    folder = made("qwen_image", modelopt())
    path = folder / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["transformer_blocks.1.attn.to_k.weight_scale"], tensors["transformer_blocks.0.txt_mlp.net.2.input_scale"]
    save_file(tensors, path)
    (loaded,) = load([folder]).values()
    assert loaded.stage == "done"
    missing = {
        "transformer/transformer_blocks.1.attn.to_qkv.weight_scale",
        "transformer/transformer_blocks.0.txt_mlp.net.2.input_scale",
    }
    assert {*loaded.missing} == missing
