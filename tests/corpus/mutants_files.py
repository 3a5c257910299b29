"""The files themselves: cut, astray, doubled, in another's place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from corpus.edit import INDEX, Edit, both, edit_json, read, times, weight_files, write
from corpus.edit_files import beside, cut, index, move, remove, text
from corpus.mutants import fault
from corpus.places import K

SINGLE = "model.safetensors"
FIRST, SECOND, _ = SHARDS = tuple(f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))
FURTHER = "model-00004-of-00004.safetensors"
NORM = "model.norm.weight"


def same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def pickled(name: str) -> Edit:
    return lambda folder: torch.save({NORM: torch.zeros(256)}, folder / name)


def empty(name: str) -> Edit:
    return lambda folder: write(folder / name, {})


def listed(name: str) -> Edit:
    """The index lists this file for one tensor more."""
    return index(lambda data: data["weight_map"].update({"model.extra.weight": name}))


def named(**places: str) -> Edit:
    return index(lambda data: data["weight_map"].update(places))


def doubled(factor: float) -> Edit:
    """A tensor of one shard in another one, too, times `factor`."""

    def apply(folder: Path) -> None:
        stored = {file.name: read(file) for file in weight_files(folder)}
        home = next(file for file, tensors in stored.items() if NORM in tensors)
        away = next(file for file in sorted(stored, reverse=True) if file != home)
        write(folder / away, {**stored[away], NORM: times(factor)(stored[home][NORM])})

    return apply


def relabeled(change: Any) -> Edit:
    """The headers of the single file, changed in place: its data stays."""

    def apply(folder: Path) -> None:
        raw = (folder / SINGLE).read_bytes()
        size = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + size])
        change(header)
        head = json.dumps(header, separators=(",", ":")).encode()
        (folder / SINGLE).unlink()
        (folder / SINGLE).write_bytes(len(head).to_bytes(8, "little") + head + raw[8 + size :])

    return apply


def put_beside(name: str, key: str) -> Edit:
    """A file with one small tensor of this name."""
    return lambda folder: write(folder / name, {key: torch.ones(4, 4)})


def one_line(path: Path) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    path.write_text(json.dumps(data, separators=(",", ":")), encoding="utf-8")


LOADING = (
    *fault(
        "weight file cut off",
        bad={
            "vl-modelopt": {
                "at half": cut(SINGLE, 0.5),
                "in the header": cut(SINGLE, 0.001),
                "by a byte": cut(SINGLE, 0.9999995),
                "to nothing": cut(SINGLE, 0),
            },
            "vl-ours": {"a shard": cut(SECOND, 0.7)},
        },
        near={
            "vl-modelopt": {
                "the tokenizer's settings without a line": lambda folder: edit_json(
                    folder / "tokenizer_config.json", lambda data: data.update(note="x")
                )
            }
        },
    ),
    *fault(
        "header at odds with its data",
        bad={
            "vl-modelopt": {
                "wider dtype": relabeled(lambda h: h[NORM].update(dtype="F32")),
                "unknown dtype": relabeled(lambda h: h[NORM].update(dtype="F9")),
                "larger shape": relabeled(lambda h: h[NORM].update(shape=[257])),
                "beyond the end": relabeled(lambda h: h[NORM].update(data_offsets=[n + 10**7 for n in h[NORM]["data_offsets"]])),
            },
        },
        near={"vl-modelopt": {"metadata": relabeled(lambda h: h.update(__metadata__={"format": "pt", "note": "x"}))}},
    ),
    *fault(
        "weight file missing",
        bad={
            "vl-ours": {
                "a shard that is listed": remove(SECOND),
                "every shard": remove(*SHARDS),
            },
            "vl-modelopt": {"the only one": remove(SINGLE)},
            "vl-ct-dynamic": {"under a name that nobody looks for": move(SINGLE, "weights.bak")},
        },
        near={"vl-modelopt": {"under another name": move(SINGLE, "pytorch.safetensors")}},
    ),
    *fault(
        "index to a file that is not there",
        bad={"vl-ours": {"one entry": listed(FURTHER), "outside": listed("../model.safetensors")}},
        near={
            "vl-ours": {
                "a tensor that is not there": listed(FIRST),
                "a tensor's other file": named(**{NORM: FIRST}),
                "a tensor that it does not name": index(lambda data: data["weight_map"].pop(NORM)),
                "another size": index(lambda data: data["metadata"].update(total_size=1)),
            }
        },
    ),
    *fault(
        "index unreadable",
        bad={
            "vl-ours": {
                "no JSON": text(INDEX, "{"),
                "no map": index(lambda data: data.pop("weight_map")),
                "a list": text(INDEX, "[]"),
                "an empty map": index(lambda data: data.update(weight_map={})),
            }
        },
        near={"vl-ours": {"no metadata": index(lambda data: data.pop("metadata"))}},
    ),
    *fault(
        "index gone, shards left",
        bad={"vl-ours": {"and one shard": both(remove(INDEX), remove(SECOND))}},
        near={"vl-ours": {"all of them": remove(INDEX)}},
    ),
    *fault(
        "config.json unreadable",
        bad={
            "vl-modelopt": {
                "missing": remove("config.json"),
                "cut off": cut("config.json", 0.5),
                "a list": text("config.json", "[]"),
            },
            "moe-modelopt": {"missing": remove("config.json")},
        },
        near={"vl-modelopt": {"in one line": lambda folder: one_line(folder / "config.json")}},
    ),
    *fault(
        "hf_quant_config.json unreadable",
        bad={"vl-one-config": {"no JSON": text("hf_quant_config.json", "{"), "a list": text("hf_quant_config.json", "[]")}},
        near={"vl-modelopt": {"beside a config.json that says all": text("hf_quant_config.json", "{")}},
    ),
)

STRAYS = (
    *fault(
        "stray safetensors without an index",
        bad={
            "vl-modelopt": {
                "older weights, later in the order": beside("old.safetensors", times(0.5), NORM, f"{K}.bias"),
                "scales of another run": beside("zz.safetensors", times(2), "*.weight_scale"),
                "an adapter": put_beside("adapter_model.safetensors", "base_model.model.layers.0.self_attn.q_proj.lora_A.weight"),
                "of another model": put_beside("other.safetensors", "transformer.h.0.weight"),
            },
            "vl-pcpt": {"older weights, later in the order": beside("old.safetensors", times(0.5), NORM)},
        },
        near={
            "vl-modelopt": {
                "the same once more": beside("zz.safetensors", same, NORM),
                "older weights, earlier in the order": beside("a.safetensors", times(0.5), NORM),
                "under another ending": beside("old.safetensors.bak", times(0.5), NORM),
                "in a folder": both(lambda folder: (folder / "old").mkdir(), beside("old/model.safetensors", times(0.5), NORM)),
            },
            "vl-ours": {"which the index does not list": beside("old.safetensors", times(0.5), NORM)},
        },
    ),
    *fault(
        "consolidated safetensors",
        bad={
            "vl-modelopt": {
                "part of the weights": beside("consolidated.safetensors", same, NORM),
                "all of them, older": beside("consolidated.safetensors", times(0.5), "*"),
            },
            "vl-ours": {"a shard": beside("consolidated-00001-of-00002.safetensors", same, NORM)},
        },
        near={
            "vl-modelopt": {
                "a name like it": beside("my-consolidated.safetensors", same, NORM),
                "all of them, the same": beside("consolidated.safetensors", same, "*"),
            }
        },
    ),
    *fault(
        "tensor in two shards",
        bad={"vl-ours": {"of other values": doubled(0.5)}},
        near={"vl-ours": {"of the same values": doubled(1)}},
    ),
    *fault(
        "shard without tensors",
        bad={"vl-ours": {"of no bytes": both(text(FURTHER, ""), listed(FURTHER))}},
        near={
            "vl-ours": {
                "listed": both(empty(FURTHER), listed(FURTHER)),
                "not listed, of no bytes": text(FURTHER, ""),
            },
            "vl-modelopt": {"beside the only file": empty("zz.safetensors")},
        },
    ),
    *fault(
        "pickled weights",
        bad={"vl-modelopt": {"in their place": both(remove(SINGLE), pickled("pytorch_model.bin"))}},
        near={"vl-modelopt": {"beside them": pickled("pytorch_model.bin"), "an optimizer's": pickled("optimizer.pt")}},
    ),
    *fault(
        "adapter's settings",
        bad={
            "vl-modelopt": {
                "and its weights": both(
                    text("adapter_config.json", "{}"), put_beside("adapter_model.safetensors", "base_model.x.weight")
                )
            }
        },
        near={"vl-modelopt": {"alone": text("adapter_config.json", '{"peft_type": "LORA"}')}},
    ),
)

MUTANTS = (*LOADING, *STRAYS)
