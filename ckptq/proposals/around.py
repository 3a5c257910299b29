"""What a proposal says beside the decoder layers: towers, what stays, the server's names, parameters, what the server skips."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ckptq.errors import UnsupportedError
from ckptq.proposals.layers import fused
from ckptq.proposals.reading import Found, leaf
from ckptq.scopes import Tower

_DEPTHS = ("depth", "num_hidden_layers", "encoder_layers", "num_layers", "n_layers")
_HEADS = ("num_heads", "num_attention_heads", "encoder_attention_heads")
_NEXT = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "n_predict")
"""vLLM 0.32.0 models/transformers/base.py recursive_replace; models/utils.py get_spec_layer_idx_from_weight_name has the first."""
_DROPPED = ("rotary_emb.inv_freq",)


def head(found: Found) -> str:
    """The output head as the files call it; "" where there is none."""
    module = found.model.get_output_embeddings()
    return "" if module is None else found.name_of(_path(found, module))


def _path(found: Found, module: Any) -> str:
    return str(next(name for name, other in found.model.named_modules() if other is module))


def towers(found: Found) -> Iterator[Tower]:
    """The parts beside the language model, inside what holds both."""
    from torch import nn

    around, _, decoder = _path(found, found.model.get_decoder()).rpartition(".")
    if not around and not decoder:
        return
    beside = found.model.get_submodule(around) if around else found.model
    out = found.model.get_output_embeddings()
    for name, part in beside.named_children():
        if name == decoder or part is out or not any(True for _ in part.parameters()) or part in _holders(found):
            continue
        path = f"{around}.{name}" if around else name
        prefix = _prefix(found, path)
        lists = {n: m for n, m in part.named_modules() if isinstance(m, nn.ModuleList) and len({type(b) for b in m}) == 1}
        blocks = max(lists, key=lambda n: len(lists[n]), default="")
        at = found.name_of(f"{path}.{blocks}.0").removeprefix(f"{prefix}.").removesuffix(".0") if blocks else ""
        modules = (n for n, m in part.named_modules() if isinstance(m, nn.Linear) and n)
        named = dict.fromkeys(_numbered(found.name_of(f"{path}.{n}").removeprefix(f"{prefix}."), at) for n in modules)
        depth, heads = _config_of(found, len(lists[blocks]) if blocks else 0)
        found.uncertain["towers"] = "vLLM may fuse and name their linears in other ways; all of them stay"
        yield Tower(prefix, depth, tuple(fused(found, named)), heads=heads)


def _prefix(found: Found, path: str) -> str:
    """The shortest beginning of the names of a part's tensors that no other tensor has."""
    inside = [name for memory, name in found.stored.items() if memory.startswith(f"{path}.")]
    others = [name for memory, name in found.stored.items() if not memory.startswith(f"{path}.")]
    own = (b for b in _beginnings(f"{found.name_of(path)}.x") if not any(name.startswith(b) for name in others))
    return next((b for b in own if all(name.startswith(b) for name in inside)), f"{path}.").removesuffix(".")


def _holders(found: Found) -> list[Any]:
    """The input embeddings, which some models have beside the decoder."""
    return [found.model.get_input_embeddings()]


def _numbered(name: str, blocks: str) -> str:
    return re.sub(rf"^{re.escape(blocks)}\.\d+\.", f"{blocks}.{{i}}.", name) if blocks else name


def _config_of(found: Found, count: int) -> tuple[str, str]:
    """(where config.json has the number of a tower's blocks, key of its heads), by the section that has that number."""
    sections = {k: v for k, v in found.component.config.items() if isinstance(v, Mapping) and not k.startswith("text")}
    for section, body in sections.items():
        for key in _DEPTHS if count else ():
            if body.get(key) == count:
                return f"{section}.{key}", next((k for k in _HEADS if k in body), "")
    return "", ""


def kept(found: Found, layers: str, towers: Sequence[Tower], head: str) -> tuple[str, ...]:
    """Linears and embeddings outside layers and towers, the head first."""
    from torch import nn

    inside = (layers + ".", *(tower.prefix + "." for tower in towers))
    modules = [n for n, m in found.model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))]
    names = dict.fromkeys(name for n in modules if not (name := found.name_of(n)).startswith(inside))
    rest = [name for name in names if name != head]
    if other := [n for n in rest if not isinstance(_module(found, n), nn.Embedding)]:
        found.note("kept", f"{', '.join(other)}: stays, and must be excluded where vLLM builds a linear of it")
    return ((head,) if head else ()) + tuple(rest)


def _module(found: Found, name: str) -> Any:
    memory = next((m for m, stored in found.stored.items() if stored == f"{name}.weight"), "")
    return found.model.get_submodule(memory.rpartition(".")[0]) if memory else None


def server(
    found: Found, layers: str, towers: Sequence[Tower], kept: Sequence[str], head: str
) -> tuple[tuple[tuple[str, str], ...], str, tuple[str, ...]]:
    """(server_prefix, server_layers, server_kept): a language model alone is called there as here, one among others is inside."""
    from torch import nn

    base = layers.rpartition(".")[0]
    rules: list[tuple[str, str]] = []
    if towers:
        rules = [(f"{t.prefix}.", f"{leaf(t.prefix)}.") for t in towers if "." in t.prefix]
        rules += [(f"{head}.", "language_model.lm_head.")] if head else []
        rules += [(f"{base}.", "language_model.model.")]
        found.note("server_prefix", "read hf_to_vllm_mapper of vLLM's model file; it must hold for every linear")
    elif not layers.startswith("model."):
        found.note("server_layers", "vLLM may call the layers otherwise: exclude lists and scales go by its names")
    linears = [n for n in kept if n == head or isinstance(_module(found, n), nn.Linear)]

    def named(name: str) -> str:
        return next((new + name[len(old) :] for old, new in rules if name.startswith(old)), name)

    return tuple(rules), named(f"{layers}.").removesuffix("."), tuple(named(f"{n}.").removesuffix(".") for n in linears)


def parameters(found: Found, layers: str, count: int, towers: Sequence[Tower], head: str) -> dict[str, str]:
    """{name: dimensions, in numbers} of all that the class knows, `?` where layers differ. They are this checkpoint's."""
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for memory, name in found.stored.items():
        shapes.setdefault(_place(name, layers, towers), []).append(found.spec(memory).shape)
    for names in found.experts.values():
        for name in names:
            first = found.component.tensors.get(name.replace("{e}", "0"))
            shapes.setdefault(_place(name, layers, towers), []).append(first.spec.shape if first else ())
    if head and f"{head}.weight" not in shapes:
        shapes[f"{head}.weight"] = [tuple(found.model.get_input_embeddings().weight.shape)]
    filled = {*found.stored, *found.experts}
    empty = (n for n in found.model.state_dict() if n not in filled and not _is_head(found, n))
    if lacking := sorted({_place(n, layers, towers) for n in empty}):
        found.note("parameters", f"no tensor of the checkpoint fills {', '.join(lacking[:3])}: {len(lacking)} such names")
    return {name: _dims(found_shapes, name) for name, found_shapes in shapes.items()}


def _is_head(found: Found, memory: str) -> bool:
    module = found.model.get_output_embeddings()
    return module is not None and memory.startswith(_path(found, module) + ".")


def _place(name: str, layers: str, towers: Sequence[Tower]) -> str:
    """The name with `{i}` for the number of its layer or block."""
    if name.startswith(f"{layers}."):
        return _numbered(name, layers)
    for tower in towers:
        lists = {s.partition(".{i}.")[0] for fused in tower.linears for s in fused.shards if ".{i}." in s}
        for at in lists:
            if name.startswith(f"{tower.prefix}.{at}."):
                return _numbered(name, f"{tower.prefix}.{at}")
    return name


def _dims(shapes: Sequence[tuple[int, ...]], name: str) -> str:
    if len({len(shape) for shape in shapes}) > 1:
        raise UnsupportedError(f"no scope can be proposed: {name} has {', '.join(str(list(s)) for s in dict.fromkeys(shapes))}")
    return " ".join(str(sizes[0]) if len(set(sizes)) == 1 else "?" for sizes in zip(*shapes, strict=True))


def skipped(found: Found, layers: str, count: int, text: Mapping[str, Any]) -> tuple[str, ...]:
    """Beginnings of the names that the class does not know, where transformers or config.json calls them no part of the model.

    vLLM 0.32.0 models/transformers/base.py passes the same over: what `_keys_to_ignore_on_load_unexpected` matches, and the
    layers after the last that config.json counts as those which predict further tokens.
    """
    bodies = (found.model, found.model.base_model)
    ignored = [p for body in bodies for p in getattr(body, "_keys_to_ignore_on_load_unexpected", None) or ()]
    after = next((text[key] for key in _NEXT if type(text.get(key)) is int), 0)
    names = (*found.stored.values(), *(name for group in found.experts.values() for name in group))
    known = {beginning for name in names for beginning in _beginnings(name)}
    passed: dict[str, None] = {}
    strange: list[str] = []
    for name in found.unknown:
        root = next((b for b in _beginnings(name) if b not in known), name)  # the shortest that is no beginning of a known name
        number = re.fullmatch(re.escape(layers) + r"\.(\d+)\.", root)
        if any(re.search(p, name) for p in ignored) or (number and count <= int(number[1]) < count + after):
            passed[root] = None
        elif not name.endswith(_DROPPED):
            strange.append(name)
    if passed:
        found.note("skipped", "not known to transformers' class, carried over as they are; vLLM's loader must pass them over, too")
    if strange:
        told = f"{', '.join(strange[:3])}{f' and {len(strange) - 3} more' if len(strange) > 3 else ''}"
        found.note("skipped", f"nothing says that vLLM passes over {told}, which the class does not know; it raises at such names")
    return tuple(passed)


def _beginnings(name: str) -> list[str]:
    """`a.b.weight` -> [`a.`, `a.b.`]."""
    parts = name.split(".")
    return [".".join(parts[:n]) + "." for n in range(1, len(parts))]
