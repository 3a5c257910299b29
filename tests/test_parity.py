"""ckptq against ModelOpt's resident flow on the same samples: equal activation scales, and weights no worse once vLLM has loaded them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peers.pair import IMAGES, TEXT, Pair, make_pair
from safetensors import safe_open

from ckptq.scopes.qwen2_5_vl import SCOPE

E4M3_MAX = 448.0
LAYERS = 6


@pytest.fixture(scope="session")
def image_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(IMAGES, tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="session")
def text_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(TEXT, tmp_path_factory.mktemp("text"))


@pytest.fixture(params=["image_pair", "text_pair"])
def pair(request: pytest.FixtureRequest) -> Pair:
    found: Pair = request.getfixturevalue(request.param)
    return found


@dataclass(frozen=True, slots=True)
class Loaded:
    """The tensors of a checkpoint folder by name."""

    tensors: dict[str, torch.Tensor]

    @classmethod
    def read(cls, folder: Path) -> Loaded:
        tensors = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as stored:
                tensors.update({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118 - not a mapping
        return cls(tensors)

    def scales(self, *suffixes: str) -> dict[str, torch.Tensor]:
        return {name: value for name, value in self.tensors.items() if name.endswith(suffixes)}

    def served(self, modules: list[str]) -> list[torch.Tensor]:
        """Each shard's weight as the server computes with it, float64 [out, in]: one scale for the whole fused linear.

        vLLM 0.32.0 model_executor/layers/quantization/modelopt.py: where the shards' scales differ, each is dequantized in
        float16 and quantized again under the largest (utils/w8a8_utils.py requantize_with_max_scale).
        """
        codes = [self.tensors[f"{module}.weight"] for module in modules]
        scales = [self.tensors[f"{module}.weight_scale"] for module in modules]
        largest = torch.stack(scales).max()
        if not all(torch.equal(scale, largest) for scale in scales):
            halves = [code.to(torch.float16) * scale for code, scale in zip(codes, scales, strict=True)]
            codes = [
                (half.float() * (1.0 / largest)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn) for half in halves
            ]
        return [code.double() * largest.double() for code in codes]


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...], int]]:
    return {name: (t.dtype, tuple(t.shape), int(t.view(torch.int32))) for name, t in tensors.items()}


@pytest.mark.parametrize("suffix", [".input_scale", ".k_scale", ".v_scale"])
def test_activation_scales_equal_modelopts_bit_for_bit(pair: Pair, suffix: str) -> None:
    ours, theirs = (bits(Loaded.read(folder).scales(suffix)) for folder in (pair.ours, pair.modelopt))
    assert len(theirs) == LAYERS * (7 if suffix == ".input_scale" else 1)
    assert ours == theirs


def test_image_and_text_samples_give_different_scales(image_pair: Pair, text_pair: Pair) -> None:
    """Else the parity of one would say nothing about the other."""
    image, text = (bits(Loaded.read(p.modelopt).scales(".input_scale", ".k_scale", ".v_scale")) for p in (image_pair, text_pair))
    assert sum(image[name] != text[name] for name in text) > len(text) / 2


def test_weights_as_served_are_no_worse_than_modelopts(image_pair: Pair) -> None:
    source, ours, theirs = (Loaded.read(folder) for folder in (image_pair.source, image_pair.ours, image_pair.modelopt))
    total = {"ours": 0.0, "ModelOpt": 0.0}
    worse = []
    for layer in range(LAYERS):
        for fused in SCOPE.linears:
            modules = [f"{SCOPE.layers}.{layer}.{shard}" for shard in fused.shards]
            exact = [source.tensors[f"{module}.weight"].double() for module in modules]
            for module, weight, mine, peer in zip(modules, exact, ours.served(modules), theirs.served(modules), strict=True):
                error, peer_error = (float((side - weight).square().sum()) for side in (mine, peer))
                total["ours"] += error
                total["ModelOpt"] += peer_error
                if error > peer_error:
                    worse.append((module, error / peer_error))
    print(f"\nsquared weight error as served: ours / ModelOpt = {total['ours'] / total['ModelOpt']:.4f}")
    assert not worse


def test_outputs_hold_the_same_tensors(pair: Pair) -> None:
    """Names, dtypes and shapes; and the bytes of all that neither side quantizes."""
    ours, theirs = (Loaded.read(folder).tensors for folder in (pair.ours, pair.modelopt))
    assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {n: (t.dtype, t.shape) for n, t in theirs.items()}
    differing = [n for n, t in theirs.items() if t.dtype == torch.bfloat16 and not torch.equal(t.view(torch.int16), ours[n].view(torch.int16))]
    assert differing == []
