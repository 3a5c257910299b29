"""What else a denoiser's file holds, and whether each tensor has the shape that vLLM-Omni reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ckptq.checkpoint import TensorSpec
from ckptq.scopes.denoisers import Stack
from ckptq.validators import Code, Finding, error, warning
from ckptq.validators.formats import Format
from ckptq.validators.omni.built import Built, Linear
from ckptq.validators.omni.parameters import parameters
from ckptq.validators.omni.server import KINDS, OMNI
from ckptq.validators.omni.tensors import kept
from ckptq.validators.vllm_rules import Parameter

CODES = {
    "layout.omni-missing-tensor": Code(
        "a tensor that the server reads is not stored", f"{OMNI} diffusion/model_loader/diffusers_loader.py _check_unloaded_weights"
    ),
    "layout.omni-unknown-tensor": Code("a tensor that the server has no place for", f"{OMNI} diffusion/models load_weights"),
    "layout.omni-further-block": Code("a block beyond those that config.json counts", f"{OMNI} diffusion/models load_weights"),
    "layout.omni-shape": Code("a shape that config.json contradicts", "vLLM 0.32.0 model_executor/parameter.py"),
}
_CODES = ("F8_E4M3", "F8_E5M2", "I8", "U8")


def check(at: Built) -> Iterator[Finding]:
    """Findings on shapes, on tensors beside the linears, and on those that nobody asks for."""
    known = parameters(at.denoiser, at.config)
    linears: set[str] = set()
    for linear in at.linears:
        names = {name for part in (*linear.shards, linear.whole) for name in part}
        linears |= {f"{name}.{kind}" for name in names for kind in ("weight", "bias", *KINDS)}
        yield from _shapes(linear, at, known)
    read = {name for name in known if name not in linears}
    every = read | linears
    further: dict[tuple[Stack, str], None] = {}
    for name in sorted(read | (at.tensors.keys() - linears)):
        spec = at.tensors.get(name)
        if spec is None:
            yield _missing(known[name])
        elif name in read:
            yield from _read(spec, known[name], at)
        elif (place := _beyond(name, at)) is not None:
            further[place] = None
        elif not _scale_of(name, every):
            yield from _unknown(spec, at, listed=bool(known))
    yield from (_further(stack, number, at) for stack, number in further)


def _read(spec: TensorSpec, parameter: Parameter, at: Built) -> Iterator[Finding]:
    if not _fits(spec.shape, parameter.shape):
        yield _shape(spec, parameter.shape)
    if spec.dtype in _CODES or spec.name.endswith(".weight"):
        yield from kept(spec, at)


def _scale_of(name: str, known: set[str]) -> bool:
    """Whether it is a scale of a tensor that is known, of which `kept` has spoken."""
    module, _, kind = name.rpartition(".")
    return kind in KINDS and f"{module}.weight" in known


def _unknown(spec: TensorSpec, at: Built, *, listed: bool) -> Iterator[Finding]:
    """`listed`: whether it is known what the server reads."""
    if not listed:
        yield from kept(spec, at) if spec.dtype in _CODES else ()
        return
    drops = not at.facts.refuses or (at.adapted and spec.name.endswith(KINDS))
    yield (warning if drops else error)(
        "layout.omni-unknown-tensor", spec.name, "the tensors that the server reads, and scales of its linears", "a further one",
        f"{OMNI} {'drops it' if drops else 'raises at such a key'}", "remove it, or give it the name that the server looks for",
    )  # fmt: skip


def _further(stack: Stack, number: str, at: Built) -> Finding:
    return error(
        "layout.omni-further-block", f"{stack.prefix}.{number}", f"the blocks that {stack.depth} counts", "a further one",
        f"{OMNI} {'raises at such a key' if at.facts.refuses else 'drops it, and computes without the block'}",
        f"mend {stack.depth} in config.json, or remove the block",
    )  # fmt: skip


def _beyond(name: str, at: Built) -> tuple[Stack, str] | None:
    """(stack, number) of a block whose number is too high."""
    for stack in at.denoiser.stacks:
        number = name.removeprefix(f"{stack.prefix}.").partition(".")[0]
        if name.startswith(f"{stack.prefix}.") and number.isdecimal() and int(number) >= stack.count(at.config):
            return stack, number
    return None


def _shapes(linear: Linear, at: Built, known: Mapping[str, Parameter]) -> Iterator[Finding]:
    """A linear's weights and biases; of a fused one that is stored as one the shards' rows add up."""
    whole = at.units(linear) == (linear.whole,)
    for names, sources in [(linear.whole, linear.shards)] if whole else [(names, (names,)) for names in linear.shards]:
        for kind in ("weight", "bias"):
            wanted = [p.shape for n in sources if (p := known.get(f"{n[0]}.{kind}")) is not None]
            spec = at.find(names, kind)
            if not wanted:
                continue
            shape = (_sum([s[0] for s in wanted]), *wanted[0][1:])
            if spec is None:
                yield from () if kind == "weight" or linear.optional else (_missing(Parameter(f"{names[0]}.{kind}", shape)),)
            elif not _fits(_unpacked(spec, at.treatment[linear.prefix]), shape):
                yield _shape(spec, shape)
            if spec is not None and kind == "bias" and spec.dtype in _CODES:
                yield from kept(spec, at)


def _unpacked(spec: TensorSpec, form: object) -> tuple[int, ...]:
    packed = isinstance(form, Format) and len(spec.shape) == 2 and spec.dtype == form.codes
    return form.weight_shape(spec.shape) if packed and isinstance(form, Format) else spec.shape


def _sum(rows: Sequence[int | None]) -> int | None:
    known = [n for n in rows if n is not None]
    return sum(known) if len(known) == len(rows) else None


def _fits(have: tuple[int, ...], want: tuple[int | None, ...]) -> bool:
    return len(have) == len(want) and all(w in (None, h) for w, h in zip(want, have, strict=True))


def _shape(spec: TensorSpec, want: tuple[int | None, ...]) -> Finding:
    return error(
        "layout.omni-shape", spec.name, f"{_spelled(want)}, from config.json", str(list(spec.shape)),
        "vLLM-Omni raises, or loads a part of it", "export again, or mend the sizes in config.json",
    )  # fmt: skip


def _missing(parameter: Parameter) -> Finding:
    return error(
        "layout.omni-missing-tensor", parameter.name, f"a tensor {_spelled(parameter.shape)}", "not stored",
        "vLLM-Omni raises, or leaves the memory of one shard of a fused linear as it found it, silently",
        "take the tensor over from the source",
    )  # fmt: skip


def _spelled(shape: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("?" if n is None else str(n) for n in shape) + "]"
