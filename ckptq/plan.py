"""The plan's frozen types: every tensor, byte range and file of the output, known before any arithmetic.

`ckptq.planner` makes a plan. What it decides is never inferred again: dry run, disk check, calibration, encoding, index,
resume and validation all read this one value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ckptq.checkpoint import TensorSpec
from ckptq.schemes import Scheme


@dataclass(frozen=True, slots=True)
class Observer:
    """A place whose largest magnitude is measured. `module` is a source name.

    One observer serves a whole fused group's input, and one the same linear of all routed experts of a layer: the server takes the
    largest of theirs (vLLM 0.32.0 quantization/utils/fp8_utils.py process_fp8_input_tensor_strategy_moe).
    """

    module: str
    kind: Literal["weight", "input", "k", "v"]
    layer: int

    @property
    def name(self) -> str:
        return f"{self.module}.{self.kind}_amax"


@dataclass(frozen=True, slots=True)
class Copy:
    """The source tensor's bytes, unchanged."""

    source: str
    output: TensorSpec

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return (self.output,)


@dataclass(frozen=True, slots=True)
class Scale:
    """One float32 scale, in every place of `output`: the largest of `amax`, divided by `limit`; 1 where `amax` is empty or zero.

    `inverse` stores limit / amax instead.
    """

    amax: tuple[Observer, ...]
    limit: float
    output: TensorSpec
    inverse: bool = False

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return (self.output,)


@dataclass(frozen=True, slots=True)
class Encode:
    """The weight in codes of `scheme`.

    whole   the scale of the whole tensor, which a Scale op stores; None where the scheme has none
    local   the scales of channels, blocks or groups, taken from the weight as it is encoded; None where the scheme has none
    """

    source: str
    scheme: Scheme
    codes: TensorSpec
    whole: Scale | None = None
    local: TensorSpec | None = None

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return (self.codes,) if self.local is None else (self.codes, self.local)


Op = Copy | Encode | Scale


CARRIED = "carried over as it is"
"""The reason of a Decision on what is no part of the model: see Plan.carried."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of a module, and by which line of the recipe. `rule` is "" where no line speaks of it."""

    module: str
    action: str
    rule: str
    reason: str


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """An output file: its operations in order, and each tensor's byte offset from the start of the data section."""

    file: str
    ops: tuple[Op, ...]
    offsets: Mapping[str, int]
    data_bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """All that is written. `files` are the generated ones, whole; `config_changes` says what config.json gains.

    `carried`: tensors that are no part of the model as the scope knows it, and are copied as they are.
    """

    digest: str
    shards: tuple[ShardSpec, ...]
    decisions: tuple[Decision, ...]
    observers: tuple[Observer, ...]
    files: Mapping[str, str]
    config_changes: tuple[str, ...]
    sidecars: tuple[str, ...]
    left_out: tuple[str, ...]
    layer_count: int
    carried: tuple[str, ...] = ()

    @property
    def ops(self) -> Iterator[Op]:
        return (op for shard in self.shards for op in shard.ops)

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        return {spec.name: spec for op in self.ops for spec in op.outputs}

    @property
    def nbytes(self) -> int:
        return sum(shard.data_bytes for shard in self.shards)

    @property
    def renamed(self) -> dict[str, str]:
        """{tensor of the source: what the output calls it} of those whose name changes."""
        pairs = ((op.source, op.outputs[0].name) for op in self.ops if not isinstance(op, Scale))
        return {source: name for source, name in pairs if source != name}

    @property
    def calibrated(self) -> bool:
        """Whether any scale comes from activations, so that samples must run through the model."""
        return any(o.kind != "weight" for o in self.observers)


@dataclass(frozen=True, slots=True)
class QuantizedGroup:
    """A fused group with its scheme: the source modules whose weights share a scale, in the server's order.

    observed  the module whose input is measured for all of them; "" for the first. Routed experts of a layer share one
    routed    whether it is a routed expert's
    """

    layer: int
    modules: tuple[str, ...]
    scheme: Scheme
    observed: str = ""
    routed: bool = False

    @property
    def weight_amax(self) -> tuple[Observer, ...]:
        return tuple(Observer(m, "weight", self.layer) for m in self.modules)

    @property
    def input_amax(self) -> tuple[Observer, ...]:
        """One observer: all shards of a group read the same input, so the first one's stands for all."""
        return (Observer(self.observed or self.modules[0], "input", self.layer),)


@dataclass(frozen=True, slots=True)
class Layout:
    """What an exporter needs for the configuration files.

    groups        who is quantized
    kept_parts    roots that stay: towers, output head, embeddings
    kept_linears  linears of the language model's layers that stay, routers among them
    kept_outside  linears outside the layers, one by one: of the towers, and the output head
    kv_cache      what the KV cache is, None for the model's dtype
    stage         which of several models in the checkpoint this is about (`thinker`), "" where it is one model alone. A server of
                  all of them has names of its own, longer ones, so that what speaks of single linears must not begin with it
    kept_fused    then, of the linears in kept_linears, the names as servers fuse them
    listed        whether what is quantized must be listed, because no list of what stays reaches all that does
    kept_experts  layers' routed experts that stay, by the name of the module around them
    server        who loads it. For vLLM-Omni's denoisers kept_linears is the whole list of what stays, in the server's own names
    """

    groups: tuple[QuantizedGroup, ...]
    kept_parts: tuple[str, ...]
    kept_linears: tuple[str, ...]
    kept_outside: tuple[str, ...]
    kv_cache: str | None
    stage: str = ""
    kept_fused: tuple[str, ...] = ()
    listed: bool = False
    kept_experts: tuple[str, ...] = ()
    server: Literal["vllm", "vllm-omni"] = "vllm"

    @property
    def schemes(self) -> dict[str, tuple[str, ...]]:
        """{scheme: its modules}, in the order of the layers."""
        found: dict[str, list[str]] = {}
        for group in self.groups:
            found.setdefault(group.scheme.name, []).extend(group.modules)
        return {name: tuple(modules) for name, modules in found.items()}


class Exporter(Protocol):
    """An on-disk format: a module in ckptq/exporters with these functions, found by its file name.

    SCHEMES   {scheme: the format's own word for it}, of all that the format has a form for
    READERS   who reads the format, for the report
    PATTERNS  whether its list of what stays may hold patterns; otherwise names count whole
    """

    SCHEMES: Mapping[str, str]
    READERS: str
    PATTERNS: bool

    def check(self, layout: Layout) -> None:
        """Raises RecipeError, with the reason, for schemes together or a KV cache that the format has no form for."""

    def linear_ops(self, module: str, weight: TensorSpec, group: QuantizedGroup) -> tuple[Op, ...]:
        """The tensors that take the place of `<module>.weight`."""

    def kv_ops(self, k: Observer, v: Observer) -> tuple[Op, ...]:
        """The tensors that hold one attention layer's KV scales."""

    def quantization_config(self, layout: Layout) -> dict[str, Any]:
        """The section that config.json gains."""

    def extra_files(self, layout: Layout) -> dict[str, dict[str, Any]]:
        """Further JSON files of the format, by name."""


def module_of(tensor: str) -> str:
    """`a.b.weight` -> `a.b`."""
    return tensor.rpartition(".")[0]
