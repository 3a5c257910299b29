"""ckptq and ModelOpt's resident flow on the same samples: equal activation scales, and weights no worse once vLLM loads them."""

from __future__ import annotations

import pytest
import torch
from peers.pair import Pair
from peers.served import read, served

from ckptq.scopes.qwen2_5_vl import SCOPE

LAYERS = 6
ACTIVATIONS = (".input_scale", ".k_scale", ".v_scale")


@pytest.fixture(params=["image_pair", "text_pair"])
def pair(request: pytest.FixtureRequest) -> Pair:
    found: Pair = request.getfixturevalue(request.param)
    return found


def scale_bits(tensors: dict[str, torch.Tensor], suffixes: tuple[str, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...], int]]:
    """{name: (dtype, shape, the float32's bits)}"""
    chosen = {name: tensor for name, tensor in tensors.items() if name.endswith(suffixes)}
    return {name: (t.dtype, tuple(t.shape), int(t.view(torch.int32))) for name, t in chosen.items()}


@pytest.mark.parametrize(("suffix", "count"), [(".input_scale", 7 * LAYERS), (".k_scale", LAYERS), (".v_scale", LAYERS)])
def test_activation_scales_equal_modelopts_bit_for_bit(pair: Pair, suffix: str, count: int) -> None:
    ours, theirs = (scale_bits(read(folder), (suffix,)) for folder in (pair.ours, pair.modelopt))
    assert len(theirs) == count
    assert ours == theirs


def test_image_and_text_samples_give_different_scales(image_pair: Pair, text_pair: Pair) -> None:
    """Else parity on the one would say nothing about the other."""
    image, text = (scale_bits(read(pair.modelopt), ACTIVATIONS) for pair in (image_pair, text_pair))
    assert sum(image[name] != text[name] for name in text) > len(text) / 2


def test_weights_as_served_are_no_worse_than_modelopts(image_pair: Pair) -> None:
    source, ours, theirs = (read(folder) for folder in (image_pair.source, image_pair.ours, image_pair.modelopt))
    errors = {}
    for layer in range(LAYERS):
        for fused in SCOPE.linears:
            shards = [f"{SCOPE.layers}.{layer}.{shard}" for shard in fused.shards]
            (codes, scale), (peer_codes, peer_scale) = served(ours, shards), served(theirs, shards)
            for shard, mine, peer in zip(shards, codes, peer_codes, strict=True):
                weight = source[f"{shard}.weight"].double()
                sides = (mine.double() * scale.double(), peer.double() * peer_scale.double())
                errors[shard] = tuple(float((side - weight).square().sum()) for side in sides)
    assert len(errors) == 7 * LAYERS
    total, peer_total = (sum(side) for side in zip(*errors.values(), strict=True))
    print(f"\nsquared weight error as served, ckptq / ModelOpt: {total / peer_total:.4f}")
    assert {shard: error for shard, error in errors.items() if error[0] > error[1]} == {}


def test_outputs_hold_the_same_tensors(pair: Pair) -> None:
    """Names, dtypes and shapes; and the bytes of all that neither side quantizes."""
    ours, theirs = (read(folder) for folder in (pair.ours, pair.modelopt))
    assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {n: (t.dtype, t.shape) for n, t in theirs.items()}
    kept = [name for name, tensor in theirs.items() if tensor.dtype == torch.bfloat16]
    assert [n for n in kept if not torch.equal(ours[n].view(torch.int16), theirs[n].view(torch.int16))] == []
