"""Stored tensors that the server has no place for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from ckptq.checkpoint import FLOATS
from ckptq.scopes import Scope
from ckptq.validators import Code, Finding, error, warning
from ckptq.validators.expected import MOST_MATCHES, Expected
from ckptq.validators.formats import SCALE_KINDS, WEIGHT_KINDS, Format
from ckptq.validators.kv import KV_KINDS, layer_slot
from ckptq.validators.layout import otherwise_stored
from ckptq.validators.linears import stray
from ckptq.validators.methods import load_method
from ckptq.validators.vllm_rules import ServerLinear, server_name

_LOADER = "vLLM 0.32.0 model_executor/models/utils.py AutoWeightsLoader._load_module"
CODES = {
    "layout.unknown-tensor": Code("a stored tensor that the server has no place for", _LOADER),
    "layout.draft-not-excluded": Code(
        "a linear of a draft model or another stage that would be built quantized, stored in the source's dtype",
        "vLLM 0.32.0 model_executor/models/qwen3_next_mtp.py, deepseek_mtp.py: the same quantization config builds them",
    ),
    "layout.kv-on-tower": Code("KV scales outside the language model", _LOADER),
    "layout.tied-head": Code("an lm_head beside a flag that ties it to the embeddings", "vLLM 0.26 models/qwen2.py load_weights"),
}
# Dropped without harm: AutoWeightsLoader skips rotary caches, QuantizationConfig what attention quantization leaves behind.
_DROPPED = ("rotary_emb.inv_freq", ".g_idx", ".q_scale", ".q_zero_point", ".k_zero_point", ".v_zero_point")
# Scales of queries and probabilities, which an FP8 cache alone would use: fp8.py and quark/quark.py get_cache_scale_mapper.
_TAKES_OUTPUTS = ("fp8", "quark")
_BLOCK = re.compile(r".*?\.\d+\.")
_OUTPUTS = (".self_attn.q_proj.output_scale", ".self_attn.prob_output_scale")

_INSIDE = (
    "rename it (scales are weight_scale, input_scale, k_scale, v_scale; weight_scale_inv in blocks of method fp8), remove it, or "
    "mend config.json"
)
_BEYOND = (
    "leave it out: no draft model's heads (mtp) and no layers after the last are passed over here; or mend num_hidden_layers, "
    "where it is a layer. For a server that does pass it over, spell the scope out with its name under `skipped`: "
    "`ckptq inspect SRC` prints that scope, a recipe takes it under `scope:`"
)


def beyond(scope: Scope, read: Iterable[str]) -> Callable[[str], str]:
    """How names begin that lie outside what the server reads: `mtp.`, `model.layers.61.` after the last layer; "" for others."""
    inside = [(scope.layer_of(name), scope.canonical(name)) for name in read]
    layers = {layer[0] for layer, _ in inside if layer is not None}
    parts = {name.partition(".")[0] for _, name in inside}

    def beginning(name: str) -> str:
        layer, canonical = scope.layer_of(name), scope.canonical(name)
        if layer is not None:
            return "" if layer[0] in layers else f"{scope.layers}.{layer[0]}."
        first, dot, _ = canonical.partition(".")
        return f"{first}." if dot and first not in parts else ""

    return beginning


def check(at: Expected) -> Iterator[Finding]:
    """Findings on tensors that are no parameter and no scale of a quantized linear or of the KV cache."""
    on_towers = [name for name in at.tensors if name.endswith(KV_KINDS) and _tower(name, at.scope) is not None]
    yield from _kv_on_tower([name for name in on_towers if not _in_unread_block(name, at)], at.scope)
    yield from _drafts(at)
    known = {*at.parameters, *on_towers}
    beginning = beyond(at.scope, at.parameters)
    for name in at.tensors:
        module, _, kind = name.rpartition(".")
        if name in known or at.scope.skips(name) or (kind in SCALE_KINDS and module in at.linears) or layer_slot(name, at):
            continue
        if kind in WEIGHT_KINDS and otherwise_stored(module, at):
            continue
        if kind in SCALE_KINDS or name.endswith(KV_KINDS):
            yield stray(name, "no quantized linear or attention of the server has this name")
        elif kind == "bias":
            yield warning(
                "layout.unknown-tensor", name, "no such tensor", "stored",
                "vLLM has no place for this bias and drops it silently: no harm if it is all zeros", "check config.json",
            )  # fmt: skip
        elif not name.endswith(_DROPPED) and not (at.settings.method in _TAKES_OUTPUTS and name.endswith(_OUTPUTS)):
            refused = at.settings.server.unknown_refused or not _dropped_when_unknown(name, at.scope)
            yield (error if refused else warning)(
                "layout.unknown-tensor", name, "no such tensor, by config.json and the server's names", "stored",
                "vLLM raises: it has no parameter of that name" if refused else "this version of vLLM drops it silently",
                _BEYOND if beginning(name) else _INSIDE,
            )  # fmt: skip
    if at.tied and not at.settings.server.stored_head_counts and (head := at.tensors.get(f"{at.scope.head}.weight")):
        yield warning(
            "layout.tied-head", head.name, "none: tie_word_embeddings is set", "stored",
            "this version of vLLM passes it over and takes the embeddings, which is wrong where they differ",
            "untie the model in config.json, or remove the tensor",
        )  # fmt: skip


def _drafts(at: Expected) -> Iterator[Finding]:
    """Linears among what the server passes over that a draft model, built by the same settings, would take for quantized.

    Of a list and tensors that would take long to match nothing is said.
    """
    skipped = [spec for name, spec in at.tensors.items() if name.endswith(".weight") and at.scope.skips(name)]
    linears = [spec.name.removesuffix(".weight") for spec in skipped if len(spec.shape) == 2 and spec.dtype in FLOATS]
    linears = [module for module in linears if "embed" not in module.rpartition(".")[2]]
    if not linears or len(linears) * len(at.settings.exclude) > MOST_MATCHES:
        return
    treat = load_method(at.settings.method).matcher(at.settings, at.scope)
    for module in linears:
        if isinstance(treat(ServerLinear(server_name(module, at.scope), (module,), "layers")), Format):
            yield warning(
                "layout.draft-not-excluded", f"{module}.weight", f"listed in {at.settings.key}, as it is stored unquantized",
                "not listed", "the model itself passes it over; a draft model or another stage would cast it to codes, silently",
                f"add it to {at.settings.key}",
            )  # fmt: skip


def _dropped_when_unknown(name: str, scope: Scope) -> bool:
    """Of servers that drop what they don't know: what is in no tower, and no shard of a fused linear, which they look up."""
    shards = {f".{shard.rpartition('.')[2]}." for fused in scope.linears for shard in fused.shards if len(fused.shards) > 1}
    return _tower(name, scope) is None and not any(shard in f".{name}." for shard in shards)


def _tower(name: str, scope: Scope) -> str | None:
    return next((t.prefix for t in scope.towers if scope.canonical(name).startswith(f"{t.prefix}.")), None)


def _in_unread_block(name: str, at: Expected) -> bool:
    """Whether a tower's block is stored, and not built: no tensor of it is read, whatever its name."""
    match = _BLOCK.match(name)
    inside = [p.required for p in at.parameters.values() if match and p.name.startswith(match[0])]
    return bool(inside) and not any(inside)


def _kv_on_tower(names: Sequence[str], scope: Scope) -> Iterator[Finding]:
    for name in names:
        tower = _tower(name, scope)
        first = scope.canonical(names[0]).removeprefix(f"{tower}.")
        yield error(
            "layout.kv-on-tower", name, f"no KV scale in {tower}: only the language model has a KV cache", "stored",
            f"vLLM raises at such a key; older ones say no more than `KeyError: '{first}'`. `{tower}*` on the exclude list is no "
            "help: it speaks of weights",
            "drop the tensors. ModelOpt writes them where its KV settings come after the line that disables the tower: "
            "disable the tower last and export again",
        )  # fmt: skip
