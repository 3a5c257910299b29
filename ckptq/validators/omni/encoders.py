"""What a denoiser's configuration does to the pipeline's text encoder, which some pipelines build with it, too."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ckptq.checkpoint import FLOATS, TensorSpec
from ckptq.scopes.denoisers import Denoiser, Encoder
from ckptq.validators import Code, Finding, error
from ckptq.validators.formats import Format
from ckptq.validators.omni.built import matcher
from ckptq.validators.omni.sections import Section
from ckptq.validators.omni.server import OMNI, facts_of

CODES = {
    "layout.omni-encoder": Code(
        "the text encoder would be built quantized with the denoiser's configuration, and is not stored so",
        f"{OMNI} diffusion/models/flux2/pipeline_flux2.py Flux2Pipeline, models/utils.py recursive_replace_linear",
    ),
}
_SHARDS: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d{1,6}\..+)\.weight")


def check(
    section: Section, denoiser: Denoiser, encoder: Encoder, config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]
) -> Iterator[Finding]:
    """Findings on a text encoder, by the server's names of its linears. `config` and `tensors` are the encoder's.

    Raises SourceError for a config without its number of layers.
    """
    treat = matcher(section, facts_of(denoiser.name))
    stored = _stored(tensors)
    for name in encoder.names(config):
        form = treat(name)
        weights = [stored[n] for n in _sources(name.removeprefix(f"{encoder.layers}."), encoder) if n in stored]
        if not isinstance(form, Format):
            yield from (_coded(weight, encoder) for weight in weights if weight.dtype not in FLOATS)
            continue
        if all(_quantized(weight, form, tensors) for weight in weights) and weights:
            continue
        exact = f"its {len(encoder.names(config))} linears by their exact names"
        add = " and ".join(encoder.patterns) if section.method == "modelopt" else exact
        yield error(
            "layout.omni-encoder", f"{encoder.folder}/{name.removeprefix(f'{encoder.folder}.')}",
            f"{section.key} holds the text encoder's linears, which are stored unquantized",
            f"not this one{'' if weights else ', which is tied to the embeddings'}",
            "vLLM-Omni builds the text encoder with the transformer's configuration and casts its weights to codes without a "
            "scale, silently: what the prompt says is lost",
            f"add {add} to {section.key} of the transformer's config.json",
        )  # fmt: skip


def _coded(weight: TensorSpec, encoder: Encoder) -> Finding:
    return error(
        "layout.omni-encoder", f"{encoder.folder}/{weight.name}", "the source's dtype: the list keeps the text encoder unquantized",
        weight.dtype, "vLLM-Omni takes the codes for values, silently", "serve the source's text encoder, or take it off the list",
    )  # fmt: skip


def _stored(tensors: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Weights by their name inside the layers, `3.mlp.up_proj`, or whole; of vision towers the language model's are the later."""
    found: dict[str, TensorSpec] = {}
    for name, spec in tensors.items():
        inside = _LAYER.fullmatch(name)
        if inside is None or "vision" not in name:
            found[inside[1] if inside else name.removesuffix(".weight").rpartition(".")[2]] = spec
    return found


def _sources(name: str, encoder: Encoder) -> tuple[str, ...]:
    head, _, last = name.rpartition(".")
    return tuple(f"{head}.{shard}" if head else shard for shard in _SHARDS.get(last, (last,)))


def _quantized(weight: TensorSpec, form: Format, tensors: Mapping[str, TensorSpec]) -> bool:
    module = weight.name.removesuffix(".weight")
    return weight.dtype not in FLOATS and all(f"{module}.{kind}" in tensors for kind in form.kinds)
