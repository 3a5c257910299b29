"""Writes what `ckptq convert` would of a small checkpoint, in any recipe: its plan, carried out with whole tensors.

Scales of activations and of the KV cache are made up: right for looking at the values of weights.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ckptq.checkpoint import read_inventory
from ckptq.exporters import find_exporter
from ckptq.numerics import Desk, find_numerics
from ckptq.plan import Copy, Encode, Observer, Scale
from ckptq.planner import build_plan
from ckptq.recipe import load_recipe
from ckptq.scopes import find_scope
from ckptq.tensors import TORCH_DTYPES

MADE_UP = 4.0
"""The amax of every input, K and V."""
WEIGHTS = "model.safetensors"


def make_coded(source: Path, folder: Path, recipe_name: str, *settings: str) -> Path:
    """The output of a recipe for the checkpoint in `source`, in one file. Returns `folder`."""
    main = read_inventory(source).main
    recipe = load_recipe(recipe_name, [*settings, "export.shard_size=5GB"], model=str(source))
    plan = build_plan(recipe, main, find_scope(main.config), find_exporter(recipe.export.format))
    folder.mkdir(parents=True)
    for name in plan.sidecars:
        shutil.copyfile(source / name, folder / name)
    for name, text in plan.files.items():
        (folder / name).write_text(text, encoding="utf-8")
    before = {name: t for path in sorted(source.glob("*.safetensors")) for name, t in load_file(path).items()}
    after: dict[str, torch.Tensor] = {}
    for op in plan.ops:
        if isinstance(op, Copy):
            after[op.output.name] = before[op.source]
        elif isinstance(op, Scale):
            after[op.output.name] = torch.tensor(_stored(op, before)).reshape(op.output.shape)
        else:
            _encode(op, before, after)
    save_file({name: t.contiguous() for name, t in after.items()}, folder / WEIGHTS)
    return folder


def _stored(op: Scale, before: dict[str, torch.Tensor]) -> float:
    amax = torch.tensor(max(_amax(o, before) for o in op.amax))
    return float(op.limit / amax if op.inverse else amax / op.limit)


def _amax(observer: Observer, before: dict[str, torch.Tensor]) -> float:
    return float(before[f"{observer.module}.weight"].float().abs().max()) if observer.kind == "weight" else MADE_UP


def _encode(op: Encode, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    weight = before[op.source]
    stored = _stored(op.whole, before) if op.whole else None
    whole = 1 / stored if op.whole and stored and op.whole.inverse else stored
    codes = torch.empty(op.codes.shape, dtype=TORCH_DTYPES[op.codes.dtype])
    shape = op.scheme.scale_shape((weight.shape[0], weight.shape[1]))
    scales = torch.empty(shape, dtype=TORCH_DTYPES[op.local.dtype]) if op.local else None
    find_numerics(op.scheme).encode(weight, op.scheme, whole, codes, scales, Desk())
    after[op.codes.name] = codes
    if op.local is not None and scales is not None:
        after[op.local.name] = scales.reshape(op.local.shape)
