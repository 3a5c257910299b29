"""A resident transformers model that computes as a server does with FP8, static or dynamic, or with ModelOpt's NVFP4.

ckptq's streaming, decoding and hooks take no part. Weights are decoded into an ordinary BF16 folder, which transformers loads by
itself; inputs are cast by plain hooks, found by the weights' values; K and V are cast as they go into the cache.
"""

from __future__ import annotations

import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peers.served import E4M3_MAX, read, served
from safetensors.torch import save_file
from transformers import DynamicCache

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
Tensors = Mapping[str, torch.Tensor]
Cast = Callable[[torch.Tensor], torch.Tensor]
FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up", "w1": "w13", "w3": "w13"}


def decoded(stored: Tensors) -> dict[str, torch.Tensor]:
    """Codes times scales, in BF16, and all else but scales as it is."""
    found = {}
    for name, tensor in stored.items():
        if tensor.dtype == torch.float8_e4m3fn and name.endswith(".weight") and stored[f"{name}_scale"].numel() == 1:
            codes, scale = served(stored, shards := fused_with(stored, name.removesuffix(".weight")))
            found[name] = (codes[shards.index(name.removesuffix(".weight"))].float() * scale).bfloat16()
        elif tensor.dtype == torch.float8_e4m3fn and name.endswith(".weight"):
            found[name] = (tensor.float() * stored[f"{name}_scale"].float().reshape(-1, 1)).bfloat16()
        elif tensor.dtype == torch.uint8:
            values = torch.stack([tensor & 15, tensor >> 4], -1).flatten(1).int()
            values = torch.where(values < 8, 1, -1) * E2M1[values % 8]
            scale = stored[f"{name}_scale"].float() * stored[f"{name}_scale_2"]
            found[name] = (values * scale.repeat_interleave(16, 1)).bfloat16()
        elif not name.endswith(("_scale", "_scale_2")):
            found[name] = tensor
    return found


def fused_with(stored: Tensors, module: str) -> list[str]:
    """The modules that a server fuses with this one."""
    parent, _, leaf = module.rpartition(".")
    return [m for other in FUSED if FUSED[other] == FUSED.get(leaf) and f"{(m := f'{parent}.{other}')}.weight" in stored] or [
        module
    ]


def is_coded(name: str, tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.float8_e4m3fn, torch.uint8) and name.endswith(".weight")


def dense_folder(source: Path, stored: Tensors, folder: Path) -> Path:
    """The source with the decoded weights: what transformers loads."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(together(decoded(stored), read(source)), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def together(plain: dict[str, torch.Tensor], source: Tensors) -> dict[str, torch.Tensor]:
    """With routed experts as one transposed tensor where the source has them so: Qwen3-VL-MoE."""
    for name in [name for name in source if name.endswith(".experts.gate_up_proj")]:
        at = name.removesuffix(".gate_up_proj")
        gate, up, down = (
            [plain.pop(f"{at}.{e}.{p}_proj.weight") for e in range(len(source[name]))] for p in ("gate", "up", "down")
        )
        plain[name] = torch.stack([torch.cat(pair).t() for pair in zip(gate, up, strict=True)]).contiguous()
        plain[f"{at}.down_proj"] = torch.stack([weight.t() for weight in down]).contiguous()
    return plain


def cast(scale: float | None, values: torch.Tensor) -> torch.Tensor:
    """To E4M3 and back; without a scale by the largest magnitude of each token."""
    wide = values.float()
    step = wide.abs().amax(-1, keepdim=True) / E4M3_MAX if scale is None else torch.tensor(scale)
    codes = (wide / step).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return (codes.float() * step).to(values.dtype)


def cast_nvfp4(scale: float, values: torch.Tensor) -> torch.Tensor:
    """Groups of 16 to E2M1 under the nearest E4M3 to amax / 6, in units of the scale, and back. Halves go to the even code.

    Many a group lies just between two numbers of E4M3, as the scale is made of another one's amax: how to divide is not free.
    """
    groups = values.float().unflatten(-1, (-1, 16))
    step = (groups.abs().amax(-1, keepdim=True) / (6 * scale)).to(torch.float8_e4m3fn).float() * scale
    size = groups.abs() / step
    above = (size > 0.25, size >= 0.75, size > 1.25, size >= 1.75, size > 2.5, size >= 3.5, size > 5)
    return (groups.sign() * E2M1[sum(where.int() for where in above)] * step).flatten(-2).to(values.dtype)


def fingerprint(weight: torch.Tensor) -> bytes:
    """Of a weight [n, k] its first row: no two are alike."""
    return weight[0].detach().bfloat16().view(torch.int16).numpy().tobytes()


def input_casts(stored: Tensors) -> dict[bytes, Cast]:
    """{fingerprint of a quantized weight: what becomes of its inputs, by the largest scale of what a server fuses}."""
    plain, scales, groups = decoded(stored), defaultdict[Any, list[float]](list), {}
    for name in (name for name, tensor in stored.items() if is_coded(name, tensor)):
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        groups[name] = re.sub(r"experts\.\d+", "experts", parent), FUSED.get(leaf, leaf)
        if (scale := stored.get(f"{parent}.{leaf}.input_scale")) is not None:
            scales[groups[name]].append(float(scale))
    found = {}
    for name, group in groups.items():
        form = cast_nvfp4 if stored[name].dtype == torch.uint8 else cast
        found[fingerprint(plain[name])] = partial(form, max(scales[group], default=None))
    return found


def serve(model: Any, stored: Tensors) -> int:
    """Casts the inputs of quantized linears from now on, and says how many modules that are."""
    casts, count = input_casts(stored), 0
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and (key := fingerprint(module.weight)) in casts:
            module.register_forward_pre_hook(lambda _, args, form=casts[key]: (form(args[0]), *args[1:]))
            count += 1
        elif hasattr(module, "down_proj") and isinstance(module.down_proj, torch.nn.Parameter):
            first, second = (casts[fingerprint(parameter[0])] for parameter in (module.gate_up_proj, module.down_proj))
            module.forward = partial(experts, module, first, second)
            count += 1
    return count


def experts(
    module: Any, first: Cast, second: Cast, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Routed experts, one after another: hidden [T, H], index and weights [T, top k]."""
    found = torch.zeros_like(hidden)
    for expert in index.unique().tolist():
        rows, slots = (index == expert).nonzero(as_tuple=True)
        gate, up = (first(hidden[rows]) @ module.gate_up_proj[expert].t()).chunk(2, -1)
        out = second(module.act_fn(gate) * up) @ module.down_proj[expert].t()
        found.index_add_(0, rows, (out * weights[rows, slots, None]).to(found.dtype))
    return found


class Cache(DynamicCache):
    """Holds K and V in FP8 by the stored scales, in the layers that have some."""

    def __init__(self, stored: Tensors) -> None:
        super().__init__()
        self.scales: dict[tuple[int, str], float] = {}
        for name, tensor in stored.items():
            if match := re.fullmatch(r".*layers\.(\d+)\..*\b([kv])_scale", name):
                self.scales[int(match[1]), match[2]] = float(tensor)

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        if (layer, "k") in self.scales:
            keys, values = cast(self.scales[layer, "k"], keys), cast(self.scales[layer, "v"], values)
        return super().update(keys, values, layer, *args, **kwargs)
