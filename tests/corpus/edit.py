"""Small edits of a checkpoint folder, each a function of the folder: what mutants are put together from. Here those of tensors.

Tensors are picked by `fnmatch` patterns of their names; a pattern that picks none is a mistake in the mutant, and raises.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

Edit = Callable[[Path], None]
Change = Callable[[torch.Tensor], torch.Tensor | None]
Tensors = dict[str, torch.Tensor]
INDEX = "model.safetensors.index.json"
EXTRA = "model-extra.safetensors"
STAY = (".bias", ".k_scale", ".v_scale")
"""Tensors of a linear that no format of its weight has to do with."""


def both(*edits: Edit) -> Edit:
    """One after the other."""

    def apply(folder: Path) -> None:
        for edit in edits:
            edit(folder)

    return apply


# --- tensors ---


def tensors(change: Callable[[Tensors], object]) -> Edit:
    """Edits {name: tensor} of all files. What changed is written; new names go into the last file, and an index is kept right."""

    def apply(folder: Path) -> None:
        files = weight_files(folder)
        before = {file.name: read(file) for file in files}
        home = {name: file for file, stored in before.items() for name in stored}
        every = {name: tensor for stored in before.values() for name, tensor in stored.items()}
        change(every)
        after: dict[str, Tensors] = {file: {} for file in before}
        for name, tensor in every.items():
            after[home.get(name, files[-1].name)][name] = tensor
        for file, stored in after.items():
            if stored.keys() != before[file].keys() or any(stored[n] is not before[file][n] for n in stored):
                write(folder / file, stored)
        reindex(folder)

    return apply


def weight_files(folder: Path) -> list[Path]:
    """The files that the index lists, or all of them where there is none."""
    if (folder / INDEX).exists():
        listed = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(listed))]
    return sorted(folder.glob("*.safetensors"))


def read(file: Path) -> Tensors:
    with safe_open(file, framework="pt") as stored:
        return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a mapping


def write(file: Path, stored: Mapping[str, torch.Tensor]) -> None:
    """A new file in the place of `file`. Tensors that share memory are stored each by itself."""
    file.unlink(missing_ok=True)
    save_file({name: tensor.clone().contiguous() for name, tensor in stored.items()}, file, metadata={"format": "pt"})


def reindex(folder: Path) -> None:
    """Makes the index, if there is one, say what the files that it lists hold."""
    if not (folder / INDEX).exists():
        return
    found = {name: file.name for file in weight_files(folder) for name in read(file)}
    edit_json(folder / INDEX, lambda index: index.update(weight_map=dict(sorted(found.items()))))


def matching(names: Iterable[str], *patterns: str) -> list[str]:
    """The names that match any pattern, in their order. Raises LookupError for a pattern that matches none."""
    every = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in every):
            raise LookupError(f"{pattern}: no tensor of that name")
    return [name for name in every if any(fnmatchcase(name, pattern) for pattern in patterns)]


def alter(change: Change, *patterns: str) -> Edit:
    """Each tensor of these names becomes what `change` makes of it; None drops it."""

    def apply(stored: Tensors) -> None:
        for name in matching(stored, *patterns):
            new = change(stored[name])
            if new is None:
                del stored[name]
            else:
                stored[name] = new

    return tensors(apply)


def drop(*patterns: str) -> Edit:
    return alter(lambda _: None, *patterns)


def put(values: Mapping[str, torch.Tensor]) -> Edit:
    """New tensors, or others of the same names."""
    return tensors(lambda stored: stored.update(values))


def rename(old: str, new: str, *patterns: str) -> Edit:
    """`old` becomes `new` in the names that hold it, of those that match."""

    def apply(stored: Tensors) -> None:
        for name in matching([name for name in stored if old in name], *(patterns or ("*",))):
            stored[name.replace(old, new)] = stored.pop(name)

    return tensors(apply)


def copy(name: str, *names: str) -> Edit:
    """The tensor `name` under further names."""
    return tensors(lambda stored: stored.update({new: stored[name].clone() for new in names}))


def swap(a: str, b: str, *patterns: str) -> Edit:
    """Exchanges, for each name that matches and holds `a`, its tensor with the one named with `b` instead."""

    def apply(stored: Tensors) -> None:
        for name in matching(stored, *patterns):
            other = name.replace(a, b)
            assert other != name, f"{name}: does not hold {a}"
            stored[name], stored[other] = stored[other], stored[name]

    return tensors(apply)


def scalar(value: float, dtype: torch.dtype = torch.float32) -> Change:
    """A tensor of the same shape full of `value`."""
    return lambda tensor: torch.full(tuple(tensor.shape), value, dtype=dtype)


def times(factor: float) -> Change:
    return lambda tensor: (tensor.float() * factor).to(tensor.dtype)


def to(dtype: torch.dtype) -> Change:
    return lambda tensor: tensor.to(dtype)


def shape(*sizes: int) -> Change:
    """Reshaped where the count fits, else repeated: a scalar becomes one value a row."""
    return lambda t: t.reshape(sizes) if t.numel() == torch.Size(sizes).numel() else t.flatten()[0].expand(sizes)


def rows(count: int) -> Change:
    """`count` rows more, before the others: copies of the first ones."""
    return lambda t: torch.cat([t[:count].view(torch.uint8), t.view(torch.uint8)]).view(t.dtype)


def code(value: int, count: int = 1) -> Change:
    """The first `count` FP8 codes become `value`; all of them with 0."""

    def apply(tensor: torch.Tensor) -> torch.Tensor:
        codes = tensor.view(torch.uint8).clone()
        codes.view(-1)[: count or codes.numel()] = value
        return codes.view(tensor.dtype)

    return apply


def flipped(bits: int) -> Change:
    """The first value with these bits turned."""

    def apply(tensor: torch.Tensor) -> torch.Tensor:
        raw = tensor.clone()
        raw.view(torch.uint8).view(-1)[0] ^= bits
        return raw

    return apply


def requantized(factor: float, *modules: str) -> Edit:
    """The weights of these modules encoded again under a scale of `factor` times theirs, as far as codes reach."""

    def apply(stored: Tensors) -> None:
        for name in matching(stored, *(f"{module}.weight" for module in modules)):
            stored[f"{name}_scale"] = (stored[f"{name}_scale"].float() * factor).to(stored[f"{name}_scale"].dtype)
            stored[name] = (stored[name].float() / factor).clamp(-448, 448).to(stored[name].dtype)

    return tensors(apply)


def dequantized(*patterns: str) -> Edit:
    """The FP8 weights of these names in BF16, times their scales, which stay where they are."""

    def apply(stored: Tensors) -> None:
        for name in matching(stored, *patterns):
            scale = next(stored[s] for s in (f"{name}_scale", f"{name}_scale_inv") if s in stored)
            stored[name] = (stored[name].float() * expand(scale.float(), stored[name])).bfloat16()

    return tensors(apply)


def restored(source: Callable[[], Path], *modules: str) -> Edit:
    """The modules of these names as the source has them, without scales of weights and activations."""

    def apply(stored: Tensors) -> None:
        original = {name: tensor for file in weight_files(source()) for name, tensor in read(file).items()}
        for name in matching(original, *(f"{module}.weight" for module in modules)):
            module = name.removesuffix(".weight")
            for scale in [key for key in stored if key.rpartition(".")[0] == module and not key.endswith(STAY)]:
                del stored[scale]
            stored[name] = original[name]

    return tensors(apply)


def expand(scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A scale of one tensor, one row each, or one block of 128 x 128 each, in a shape that multiplies with `weight`."""
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.numel() == weight.shape[0]:
        return scale.reshape(-1, 1)
    blocks = scale.reshape([size for size in scale.shape if size > 1] if scale.ndim == 4 else scale.shape)
    blocks = blocks.reshape(-(-weight.shape[0] // 128), -(-weight.shape[1] // 128))
    return blocks.repeat_interleave(128, 0)[: weight.shape[0]].repeat_interleave(128, 1)[:, : weight.shape[1]]


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.unlink()
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
