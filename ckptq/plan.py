"""The plan's frozen types: every tensor, byte range and file of the output, known before any arithmetic.

`ckptq.planner` makes a plan. What it decides is never inferred again: dry run, disk check, calibration, encoding, index,
resume and validation all read this one value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Protocol

from ckptq.checkpoint import TensorSpec


@dataclass(frozen=True, slots=True)
class Scheme:
    """A number format and how its scales are had. `granularity` is that of the weight; `activation` that of the input."""

    name: str
    weight: Literal["F8_E4M3"]
    granularity: Literal["tensor"]
    activation: Literal["static"]


SCHEMES: Mapping[str, Scheme] = MappingProxyType({"fp8": Scheme("fp8", "F8_E4M3", "tensor", "static")})


@dataclass(frozen=True, slots=True)
class Observer:
    """A place whose largest magnitude is measured. `module` is a source name; one observer serves a whole fused group's input."""

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


@dataclass(frozen=True, slots=True)
class Encode:
    """The weight in codes of `scheme`, under the one scale that the largest of `amax` gives."""

    source: str
    scheme: Scheme
    amax: tuple[Observer, ...]
    output: TensorSpec


@dataclass(frozen=True, slots=True)
class Scale:
    """One float32 scale, F32 []: the largest of `amax`, divided by the largest finite code."""

    amax: tuple[Observer, ...]
    output: TensorSpec


Op = Copy | Encode | Scale


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
    """All that is written. `files` are the generated ones, whole; `config_changes` says what config.json gains."""

    digest: str
    shards: tuple[ShardSpec, ...]
    decisions: tuple[Decision, ...]
    observers: tuple[Observer, ...]
    files: Mapping[str, str]
    config_changes: tuple[str, ...]
    sidecars: tuple[str, ...]
    left_out: tuple[str, ...]
    layer_count: int

    @property
    def ops(self) -> Iterator[Op]:
        return (op for shard in self.shards for op in shard.ops)

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        return {op.output.name: op.output for op in self.ops}

    @property
    def nbytes(self) -> int:
        return sum(shard.data_bytes for shard in self.shards)

    @property
    def calibrated(self) -> bool:
        """Whether any scale comes from activations, so that samples must run through the model."""
        return any(o.kind != "weight" for o in self.observers)


@dataclass(frozen=True, slots=True)
class QuantizedGroup:
    """A fused group with its scheme: the source modules whose weights share a scale, in the server's order."""

    layer: int
    modules: tuple[str, ...]
    scheme: Scheme

    @property
    def weight_amax(self) -> tuple[Observer, ...]:
        return tuple(Observer(m, "weight", self.layer) for m in self.modules)

    @property
    def input_amax(self) -> tuple[Observer, ...]:
        """One observer: all shards of a group read the same input, so the first one's stands for all."""
        return (Observer(self.modules[0], "input", self.layer),)


@dataclass(frozen=True, slots=True)
class Layout:
    """What an exporter needs for the configuration files: who is quantized, which parts stay, and what the KV cache is."""

    groups: tuple[QuantizedGroup, ...]
    kept_parts: tuple[str, ...]
    kept_linears: tuple[str, ...]
    kv_cache: str | None


class Exporter(Protocol):
    """An on-disk format: a module in ckptq/exporters with these functions, found by its file name."""

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
