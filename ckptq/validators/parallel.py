"""Tensor and expert parallelism: can every linear be shared out between N ranks, and do its scales go with it?

Pure arithmetic on the shapes of the unfused weights [n, k], n rows and k columns. Paths in `CODES` and below are relative to
vllm/model_executor of vLLM 0.32.0. Scales per tensor belong to every rank and scales per row go with their rows: only blocks can
be cut. A vocabulary that does not divide is padded to a multiple of 64 first, and KV heads fewer than ranks are repeated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

from ckptq.errors import UnsupportedError
from ckptq.scopes import Scope, Split
from ckptq.validators import Code, Finding, error, has_errors, warning
from ckptq.validators.formats import Format
from ckptq.validators.servers import DEFAULT, Server
from ckptq.validators.vllm_rules import ServerLinear, server_name

CODES = {
    "parallel.heads": Code("attention heads that --tp does not divide", "vLLM 0.32.0 config/model.py verify_with_parallel_config"),
    "parallel.kv-heads": Code(
        "KV heads that can neither be shared out nor repeated evenly", "vLLM 0.32.0 model_executor/models/qwen2.py Qwen2Attention"
    ),
    "parallel.tower-heads": Code(
        "heads of a tower that --tp does not divide",
        "vLLM 0.32.0 model_executor/models/qwen2_5_vl.py Qwen2_5_VisionAttention",
    ),
    "parallel.vocab": Code(
        "a padded vocabulary that --tp does not divide",
        "vLLM 0.32.0 model_executor/layers/vocab_parallel_embedding.py VocabParallelEmbedding",
    ),
    "parallel.size": Code(
        "rows or columns that --tp does not divide",
        "vLLM 0.32.0 model_executor/layers/linear.py ColumnParallelLinear, RowParallelLinear",
    ),
    "parallel.block-rows": Code(
        "a block of scales that would lie in two shards or on two ranks",
        "vLLM 0.32.0 model_executor/layers/quantization/utils/fp8_utils.py validate_fp8_block_shape; modelopt.py KFp8Block128",
    ),
    "parallel.block-columns": Code(
        "columns per rank that are no whole blocks",
        "vLLM 0.32.0 model_executor/layers/quantization/utils/fp8_utils.py validate_fp8_block_shape; modelopt.py KFp8Block128",
    ),
    "parallel.alignment": Code(
        "rows or columns per rank that are no multiple of 16",
        "vLLM 0.32.0 model_executor/kernels/linear/scaled_mm/cutlass.py and pytorch.py",
    ),
    "parallel.experts": Code("fewer experts than ranks", "vLLM 0.32.0 model_executor/models/qwen3_moe.py Qwen3MoeSparseMoeBlock"),
    "parallel.no-experts": Code(
        "--ep for a model without routed experts", "vLLM 0.32.0 config/model.py _verify_with_expert_parallelism"
    ),
    "parallel.expert-size": Code(
        "an expert's intermediate size that --tp does not divide",
        "vLLM 0.32.0 model_executor/layers/fused_moe/config.py FusedMoEConfig",
    ),
    "parallel.expert-block": Code(
        "an expert's intermediate size per rank that is no whole blocks",
        "vLLM 0.32.0 model_executor/layers/quantization/utils/fp8_utils.py validate_fp8_block_shape_moe; modelopt.py "
        "ModelOptNvFp4FusedMoE",
    ),
    "parallel.expert-refined": Code(
        "an expert's blocks that the server has to cut finer",
        "vLLM 0.32.0 model_executor/layers/fused_moe/oracle/fp8.py refine_fp8_moe_block_shape",
    ),
}

MOST_RANKS = 64
_VOCAB_PAD = 64
_FINEST_BLOCK = 32
_OTHER_TP = "serve with a --tensor-parallel-size that fits"
_OR_REPEATED = ", or with --mm-encoder-tp-mode data, which repeats the tower on each rank"
_OTHER_EP = f"{_OTHER_TP}, or with --enable-expert-parallel, which leaves experts whole"
_OTHER_FORMAT = "or quantize per tensor or per channel, which can be cut anywhere"
_RAISES = "vLLM refuses to start"
_OTHER_SCALES = "vLLM refuses to load it, or computes with other scales than were stored for these codes: wrong answers"


def check(
    scope: Scope,
    config: Mapping[str, Any],
    built: Iterable[tuple[ServerLinear, Format | None]],
    shapes: Mapping[str, tuple[int, ...]],
    tp: int,
    *,
    ep: bool = False,
    tower_data_parallel: bool = False,
    server: Server = DEFAULT,
) -> Iterator[Finding]:
    """What `tp` ranks would find wrong with the checkpoint.

    `built`: every linear with the format that it is built in, None where it stays as in the source.
    `shapes`: module as stored -> [n, k] of its weight; modules without one are passed over, layout.py reports them.
    `ep`: routed experts are shared out whole. `tower_data_parallel`: --mm-encoder-tp-mode data, which repeats the towers of
    some families; of others the server shares them out all the same.
    Raises UnsupportedError for a `tp` outside 1..64.
    """
    if not 1 <= tp <= MOST_RANKS:
        raise UnsupportedError(f"--tp {tp}: expected 1 to {MOST_RANKS} ranks", hint="give the number that the server runs with")
    linears, repeated = tuple(built), tower_data_parallel and scope.repeats_towers

    def findings(ranks: int) -> Iterator[Finding]:
        """Heads come first, so that most numbers of ranks end early."""
        text = scope.text(config)
        yield from _heads(text, ranks)
        yield from _vocabulary(text, ranks)
        yield from _experts(scope, text, ranks, ep)
        if not repeated:
            yield from _tower_heads(scope, config, ranks)
        split_for = split_of(scope)
        seen: set[tuple[str, int]] = set()
        for linear, form in linears:
            sizes = [shape for shard in linear.shards if (shape := _matrix(shapes.get(shard))) is not None]
            if len(sizes) != len(linear.shards):
                continue
            if linear.part == "experts":
                # All experts of a layer are one module: the first of them speaks for all.
                if form is not None and (linear.prefix, len(sizes)) not in seen:
                    seen.add((linear.prefix, len(sizes)))
                    yield from _expert_blocks(linear, form, sizes, 1 if ep else ranks, server)
                continue
            whole = linear.part == "tower" and repeated
            split = "none" if whole else split_for(linear)
            or_else = _OR_REPEATED if linear.part == "tower" and scope.repeats_towers else ""
            cut = _Cut(linear, form, split, 1 if split == "none" else ranks, server, or_else)
            yield from _linear(cut, sizes, _head_counts(scope, config, linear))

    found = tuple(findings(tp))
    if any(_OTHER_TP in f.mend for f in found):
        fits = ", ".join(str(n) for n in range(1, MOST_RANKS + 1) if not has_errors(findings(n))) or "none does"
        found = tuple(replace(f, mend=f.mend.replace(_OTHER_TP, f"{_OTHER_TP} ({fits})")) for f in found)
    yield from found


def _heads(text: Mapping[str, Any], tp: int) -> Iterator[Finding]:
    heads, kv = _count(text, "num_attention_heads"), _count(text, "num_key_value_heads")
    if heads is not None and heads % tp:
        yield error("parallel.heads", "config.json: num_attention_heads", f"a multiple of {tp}", f"{heads}", _RAISES, _OTHER_TP)
    if kv is not None and _kv_per_rank(kv, tp) is None:
        yield error(
            "parallel.kv-heads", "config.json: num_key_value_heads", f"a multiple or a divisor of {tp}", f"{kv}", _RAISES, _OTHER_TP
        )  # fmt: skip


def _kv_per_rank(kv: int, tp: int) -> int | None:
    """KV heads on each rank; fewer heads than ranks are repeated. None where neither comes out even. models/qwen2.py."""
    if kv >= tp:
        return None if kv % tp else kv // tp
    return None if tp % kv else 1


def _tower_heads(scope: Scope, config: Mapping[str, Any], tp: int) -> Iterator[Finding]:
    for tower in scope.towers:
        section = tower.depth.rpartition(".")[0]
        heads = _count(tower.config(config), tower.heads)
        if heads is not None and heads % tp:
            yield error(
                "parallel.tower-heads", f"config.json: {section}.{tower.heads}", f"a multiple of {tp}", f"{heads}", _RAISES,
                _OTHER_TP + (_OR_REPEATED if scope.repeats_towers else ""),
            )  # fmt: skip


def _vocabulary(text: Mapping[str, Any], tp: int) -> Iterator[Finding]:
    vocab = _count(text, "vocab_size")
    if vocab is not None and _up(vocab, _VOCAB_PAD) % tp:
        yield error(
            "parallel.vocab", "config.json: vocab_size", f"a multiple of {tp} once padded to a multiple of {_VOCAB_PAD}",
            f"{vocab}, padded {_up(vocab, _VOCAB_PAD)}", _RAISES, _OTHER_TP,
        )  # fmt: skip


def _experts(scope: Scope, text: Mapping[str, Any], tp: int, ep: bool) -> Iterator[Finding]:
    key = scope.experts_key(text)
    count = _count(text, key) if scope.experts else None
    if ep and count is None:
        mend = "serve without --enable-expert-parallel"
        yield error("parallel.no-experts", "--ep", "a model with routed experts", "none", _RAISES, mend)
    if count is None or scope.experts is None:
        return
    if tp > count:
        yield error("parallel.experts", f"config.json: {key}", f"at least {tp}", f"{count}", _RAISES, _OTHER_TP)
    name = next((key for key in ("moe_intermediate_size", "intermediate_size") if key in text), "")  # Mixtral's is the second
    size = _count(text, name)
    if size is not None and not ep and size % tp:
        yield error("parallel.expert-size", f"config.json: {name}", f"a multiple of {tp}", f"{size}", _RAISES, _OTHER_EP)


def _expert_blocks(linear: ServerLinear, form: Format, sizes: list[tuple[int, int]], tp: int, server: Server) -> Iterator[Finding]:
    """Gate and up are cut by rows, down by columns; the server asks for whole blocks of rows with one rank too."""
    if form.block is None:
        return
    (rows, columns), gated = form.block, len(sizes) > 1
    size, hidden = sizes[0] if gated else (sizes[0][1], sizes[0][0])
    if size % tp:
        return
    per_rank, wanted = size // tp, rows if gated else columns
    if per_rank % wanted == 0 or (not gated and tp == 1):
        return
    what = (linear.shards[0], f"an intermediate size per rank that is a multiple of {wanted}", f"{per_rank}")
    if form.refined and server.refines_moe_blocks and gcd(rows, columns, per_rank, hidden) >= _FINEST_BLOCK:
        yield warning(
            "parallel.expert-refined", *what, "vLLM cuts the blocks finer, which only its Triton kernels can use: slower", _OTHER_EP
        )  # fmt: skip
    else:
        effect = _OTHER_SCALES if form.unchecked == "columns" else _RAISES
        yield error("parallel.expert-block", *what, effect, f"{_OTHER_EP}, {_OTHER_FORMAT}")


@dataclass(frozen=True, slots=True)
class _Cut:
    """One linear and how it is shared out. `tp` is 1 where it is not. `or_else`: what helps beside another number of ranks."""

    linear: ServerLinear
    form: Format | None
    split: Split
    tp: int
    server: Server
    or_else: str


def _linear(cut: _Cut, sizes: list[tuple[int, int]], heads: tuple[int, int] | None) -> Iterator[Finding]:
    rows, columns = [n for n, _ in sizes], sizes[0][1]
    if cut.split == "heads":
        if heads is None or heads[0] % cut.tp or (kv := _kv_per_rank(heads[1], cut.tp)) is None:
            return
        if len(rows) == 1:  # q, k and v stored as one
            rows = [rows[0] * count // (heads[0] + 2 * heads[1]) for count in (heads[0], heads[1], heads[1])]
        rows = [rows[0] // cut.tp, *(n // heads[1] * kv for n in rows[1:])]
    elif cut.split == "rows":
        if len(rows) == 1 and cut.linear.prefix.endswith(".gate_up_proj"):  # stored as one: models/phi3.py
            rows = [rows[0] // 2] * 2
        if any(n % cut.tp for n in rows):
            yield _uneven(cut, "rows", max(rows, key=lambda n: n % cut.tp))
            return
        rows = [n // cut.tp for n in rows]
    elif cut.split == "columns":
        if columns % cut.tp:
            yield _uneven(cut, "columns", columns)
            return
        columns //= cut.tp
    if cut.form is None:
        return
    if cut.form.block is not None:
        yield from _blocks(cut, cut.form, cut.form.block, rows, columns)
    elif cut.tp > 1 and (sum(rows) % cut.form.aligned or columns % cut.form.aligned):
        yield warning(
            "parallel.alignment", _subject(cut), f"rows and columns per rank that are multiples of {cut.form.aligned}",
            f"{sum(rows)} rows and {columns} columns per rank",
            "vLLM's CUTLASS kernel pads at every call; where it is not built in, torch's kernel refuses at the first request",
            _OTHER_TP,
        )  # fmt: skip


def _blocks(cut: _Cut, form: Format, block: tuple[int, int], rows: list[int], columns: int) -> Iterator[Finding]:
    """`rows` per rank of each shard, `columns` per rank, against blocks of [rows, columns].

    fp8_utils.py validate_fp8_block_shape lets the last block of a linear be partial where nothing follows it, and with one rank
    the columns' too. ModelOpt's FP8_PB_WO wants whole blocks of columns always; its rows nothing validates: linear.py
    adjust_block_scale_shard rounds a shard's place up, so its scales come to lie beside other rows. Groups are parts of one row;
    those of compressed-tensors nothing validates, and a rank's start is rounded down.
    """
    followed = rows if cut.split in ("heads", "rows") and cut.tp > 1 else rows[:-1]
    bad = next((n for n in followed if n % block[0]), None)
    padded = form.unchecked == "rows" and cut.server.pads_block_rows
    if bad is None and form.unchecked == "rows" and not padded and sum(rows) % block[0]:
        bad = sum(rows)
    if bad is not None:
        yield error(
            "parallel.block-rows", _subject(cut), f"rows per shard and rank that are a multiple of {block[0]}", f"{bad} rows",
            _OTHER_SCALES if padded else _RAISES, f"{_OTHER_TP}, {_OTHER_FORMAT}",
        )  # fmt: skip
    if (form.whole_columns or (cut.split == "columns" and cut.tp > 1)) and columns % block[1]:
        yield error(
            "parallel.block-columns", _subject(cut), f"columns per rank that are a multiple of {block[1]}", f"{columns} columns",
            _OTHER_SCALES if form.unchecked == "columns" else _RAISES, f"{_OTHER_TP}, {_OTHER_FORMAT}",
        )  # fmt: skip


def _uneven(cut: _Cut, what: str, size: int) -> Finding:
    found, mend = f"{size} {what}", _OTHER_TP + cut.or_else
    return error("parallel.size", _subject(cut), f"{what} that are a multiple of {cut.tp}", found, _RAISES, mend)


def _subject(cut: _Cut) -> str:
    """The stored modules in brief: of several shards the first stands for all."""
    return f"{cut.linear.shards[0]}.{cut.form.weight if cut.form else 'weight'}"


def _head_counts(scope: Scope, config: Mapping[str, Any], linear: ServerLinear) -> tuple[int, int] | None:
    """(heads, KV heads) of the part that a linear is in."""
    if linear.part == "tower":
        tower = next((t for t in scope.towers if linear.prefix.startswith(server_name(f"{t.prefix}.", scope))), None)
        heads = _count(tower.config(config), tower.heads) if tower else None
        return (heads, heads) if heads is not None else None
    text = scope.text(config)
    heads, kv = _count(text, "num_attention_heads"), _count(text, "num_key_value_heads")
    return (heads, kv) if heads is not None and kv is not None else None


def split_of(scope: Scope) -> Callable[[ServerLinear], Split]:
    """How each linear is shared out; "none" for those that the scope does not name: heads, experts."""
    layers = (*scope.linears, *(scope.experts.linears if scope.experts else ()))
    found: dict[str, Split] = {f"{scope.server_layers}.{{i}}.{fused.runtime}": fused.split for fused in layers}
    for tower in scope.towers:
        found |= {server_name(f"{tower.prefix}.{fused.runtime}", scope): fused.split for fused in tower.linears}
    return lambda linear: found.get(re.sub(r"(?<=\.)\d+(?=\.)", "{i}", linear.prefix, count=1), "none")


def _matrix(shape: tuple[int, ...] | None) -> tuple[int, int] | None:
    """A shape of two positive dimensions, else None."""
    return (shape[0], shape[1]) if shape is not None and len(shape) == 2 and min(shape) > 0 else None


def _count(section: Mapping[str, Any], key: str) -> int | None:
    """A positive integer of config.json, else None: what is no number is for others to report."""
    value = section.get(key)
    return value if type(value) is int and value > 0 else None


def _up(size: int, step: int) -> int:
    return -(-size // step) * step
