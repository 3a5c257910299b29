"""The server's side of the comparison: what vLLM will build from a checkpoint, and from which tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ckptq.checkpoint import TensorSpec
from ckptq.errors import SourceError
from ckptq.scopes import Scope
from ckptq.validators import Stored
from ckptq.validators.formats import Format
from ckptq.validators.methods import Settings, Treatment, load_method
from ckptq.validators.vllm_rules import Parameter, ServerLinear, is_tied, parameters, server_linears

MOST_MATCHES, _MOST_PASSES = 10_000_000, 200_000
"""Pairs of a linear and an entry; a server has some thousand linears at most, a list some hundred entries."""


@dataclass(frozen=True, slots=True)
class Expected:
    """Made once for a checkpoint.

    parameters  every tensor but scales that the server reads, by the checkpoint's name, in the form in which it is stored
    linears     by checkpoint module: each shard of a fused linear points at the whole
    built       by server prefix
    tied        whether lm_head may lean on the embeddings
    """

    scope: Scope
    settings: Settings
    tensors: Mapping[str, TensorSpec]
    parameters: Mapping[str, Parameter]
    linears: Mapping[str, ServerLinear]
    built: Mapping[str, Treatment]
    tied: bool

    def format_of(self, module: str) -> Format | None:
        """How the server stores this linear, or None where it is not quantized, or no linear."""
        linear = self.linears.get(module)
        treatment = self.built[linear.prefix] if linear else None
        return treatment if isinstance(treatment, Format) else None

    def codes_of(self, module: str) -> TensorSpec | None:
        """The weight of a linear under the name that the server looks for, or None where it is not stored."""
        form = self.format_of(module)
        return self.tensors.get(f"{module}.{form.weight if form else 'weight'}")

    def weight_shape(self, module: str) -> tuple[int, ...] | None:
        """[n, k] of a linear's stored weight, unpacked; None where none is stored."""
        spec, form = self.codes_of(module), self.format_of(module)
        packed = form is not None and spec is not None and len(spec.shape) == 2 and spec.dtype in ("U8", "I8")
        return None if spec is None else form.weight_shape(spec.shape) if form and packed else spec.shape


def expect(stored: Stored, scope: Scope, settings: Settings) -> Expected:
    """What vLLM will look for. Raises SourceError as `vllm_rules.parameters` does."""
    linears = server_linears(scope, stored.config, stored.tensors)
    built = treatments(linears, scope, settings)
    treated = {f"{module}.weight": built[linear.prefix] for linear in linears for module in linear.shards}
    found = (_as_stored(p, treated.get(p.name)) for p in parameters(scope, stored.config, stored.tensors))
    return Expected(
        scope,
        settings,
        stored.tensors,
        {p.name: p for p in found},
        {module: linear for linear in linears for module in linear.shards},
        built,
        is_tied(scope, stored.config),
    )


def _as_stored(weight: Parameter, form: Treatment | None) -> Parameter:
    """A quantized weight under the name and in the shape of its codes; anything else as it is."""
    if not isinstance(form, Format) or len(weight.shape) != 2:
        return weight
    n, k = weight.shape
    name = f"{weight.name.removesuffix('.weight')}.{form.weight}"
    return Parameter(name, (n, None if k is None else k // form.packed), weight.required)


def treatments(linears: tuple[ServerLinear, ...], scope: Scope, settings: Settings) -> dict[str, Treatment]:
    """How each linear is built, by the server's name for it. Raises SourceError for a list that would take hours to match."""
    places = len({linear.prefix for linear in linears})
    if places * len(settings.exclude) > MOST_MATCHES:
        raise SourceError(
            f"{settings.file}.{settings.key}: {len(settings.exclude)} entries against {places} linears: too many to match"
        )
    treat = load_method(settings.method).matcher(settings, scope)
    return {linear.prefix: treat(linear) for linear in linears}


def absent_layers(at: Expected) -> frozenset[int]:
    """The numbers of the layers that config.json counts and of which nothing is stored."""
    stored, wanted = (
        {layer[0] for name in names if (layer := at.scope.layer_of(name)) is not None} for names in (at.tensors, at.parameters)
    )
    return frozenset(wanted - stored)


def idle_entries(at: Expected) -> tuple[str, ...]:
    """The entries of the exclude list that, taken alone, keep nothing which would be quantized without them.

    Those that speak of a linear which is kept anyway are merely superfluous, and left out. Of a long list nothing is said: it
    takes a pass over the linears for each entry.
    """
    linears = tuple(dict.fromkeys(at.linears.values()))
    if len(linears) * len(at.settings.exclude) > _MOST_PASSES:
        return ()
    without = treatments(linears, at.scope, dataclasses.replace(at.settings, exclude=()))
    reachable = tuple(linear for linear in linears if without[linear.prefix] != "kept")
    superfluous = _words(linear for linear in linears if without[linear.prefix] == "kept") - _words(reachable)

    def idle(entry: str) -> bool:
        alone = treatments(reachable, at.scope, dataclasses.replace(at.settings, exclude=(entry,)))
        return all(isinstance(treatment, Format) for treatment in alone.values())

    return tuple(e for e in at.settings.exclude if not any(word in e for word in superfluous) and idle(e))


def _words(linears: Iterable[ServerLinear]) -> set[str]:
    """The parts of the linears' names, without numbers."""
    return {
        word for linear in linears for name in (linear.prefix, *linear.shards) for word in name.split(".") if not word.isdigit()
    }
