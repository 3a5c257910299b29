"""ModelOpt's MIXED_PRECISION: `quantized_layers` names each quantized linear and its algorithm; what is not named stays as it is.

Read in vLLM 0.32.0 model_executor/layers/quantization/modelopt.py ModelOptMixedPrecisionConfig.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ckptq.errors import UnsupportedError
from ckptq.scopes import Scope
from ckptq.validators import Code, Finding, error, warning
from ckptq.validators.methods import MIXED, as_json, spelled
from ckptq.validators.servers import Server
from ckptq.validators.vllm_rules import server_name

CODES = {
    "config.quantized-layers": Code(
        "MIXED_PRECISION that names no linears, or one without an algorithm that the server has for it",
        "vLLM 0.32.0 model_executor/layers/quantization/modelopt.py ModelOptMixedPrecisionConfig",
    ),
}
# utils/b12x.py B12X_BLOCK_CODECS: other codecs that quantized_layers may name.
_CODECS = ("IQ2_XS", "IQ2_XXS", "Q8_0")
# _quantized_layer_prefix_candidates.
_ALIASES = ("language_model.model.", "model.language_model.")


def check(body: Mapping[str, Any], file: str, server: Server) -> Iterator[Finding]:
    """Findings on quantized_layers."""
    said, where = body.get("quantized_layers"), f"{file}.quantized_layers"
    if not isinstance(said, Mapping) or not said:
        yield error(
            "config.quantized-layers", where, "an object: each quantized linear with its quant_algo",
            spelled(body, "quantized_layers"), "vLLM raises", "write it",
        )  # fmt: skip
        return
    for name, layer in said.items():
        if not isinstance(layer, Mapping) or not isinstance(layer.get("quant_algo"), str):
            yield error(
                "config.quantized-layers", f"{where}.{name}", "an object with quant_algo", as_json(layer), "vLLM raises",
                "name the algorithm that the linear is stored for",
            )  # fmt: skip
        elif (algo := algo_of(layer)) not in server.algos_mixed and algo not in _CODECS:
            yield warning(
                "config.quantized-layers", f"{where}.{name}", " or ".join(sorted(server.algos_mixed)), as_json(layer["quant_algo"]),
                f"vLLM {server.version} builds the linear unquantized, silently", "name the algorithm that it is stored for",
            )  # fmt: skip


def layers(body: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """quantized_layers, without entries that are no objects."""
    said = body.get("quantized_layers")
    return {name: layer for name, layer in said.items() if isinstance(layer, Mapping)} if isinstance(said, Mapping) else {}


def algo_of(body: Mapping[str, Any]) -> str:
    """quant_algo in capitals, as the server compares it."""
    return str(body.get("quant_algo") or "").upper()


def refuse_codecs(body: Mapping[str, Any], file: str, known: Sequence[str]) -> None:
    """Raises UnsupportedError for codecs that vLLM serves and ckptq does not know."""
    if others := sorted({algo_of(layer) for layer in layers(body).values()} & {*_CODECS}):
        raise UnsupportedError(
            f"{file}.quantized_layers: quant_algo {others[0]} can't be checked yet; what can: {', '.join(known)}",
            hint="`--load` asks the real vLLM, which loads faulty checkpoints, too",
        )


def finder(
    body: Mapping[str, Any], scope: Scope, packed: Mapping[str, Sequence[str]], server: Server
) -> Callable[[str], str | None]:
    """Server's name -> its algorithm, None for a linear that is built as it is, MIXED for shards that disagree: vLLM raises.

    _resolve_quant_algo: the name itself; its shards, of which those that are not listed don't count; what is inside it; and for
    routed experts what is beside them.
    """
    said = {server_name(name, scope): algo_of(layer) for name, layer in layers(body).items()}
    listed = {name: "" if algo == MIXED else algo for name, algo in said.items()}
    inside: dict[str, str] = {}
    for name, algo in listed.items():
        parts = name.split(".")
        for depth in range(1, len(parts)):
            inside.setdefault(".".join(parts[:depth]), algo)

    def spellings(name: str) -> Iterator[str]:
        yield name
        if server.mixed_aliases:
            yield from (("lm_head",) if name.endswith(".lm_head") else ())
            for one, other in (_ALIASES, _ALIASES[::-1]):
                yield from ((other + name.removeprefix(one),) if name.startswith(one) else ())

    def candidates(prefix: str) -> Iterator[str]:
        base, _, last = prefix.rpartition(".")
        yield from (listed[name] for name in spellings(prefix) if name in listed)
        shards = {listed[name] for b in spellings(base) for shard in packed.get(last, ()) if (name := f"{b}.{shard}") in listed}
        yield from shards if len(shards) < 2 else (MIXED,)
        yield from (inside[name] for name in spellings(prefix) if name in inside)
        if last == "experts" and server.mixed_aliases and base in inside:
            yield inside[base]

    def find(prefix: str) -> str | None:
        algo = next(candidates(prefix), None)
        return algo if algo in server.algos_mixed or algo == MIXED else None

    return find
