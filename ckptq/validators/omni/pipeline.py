"""A pipeline's components beside one another: which of them are built with whose configuration, and what no server reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckptq.checkpoint import Component, Inventory, component_names
from ckptq.errors import UnsupportedError
from ckptq.folder import printable
from ckptq.scopes.denoisers import Denoiser, all_denoisers, find_denoiser
from ckptq.validators import Code, Finding, error, warning
from ckptq.validators.methods import spelled
from ckptq.validators.omni import encoders, sections
from ckptq.validators.omni.server import OMNI

_WAN = f"{OMNI} diffusion/models/wan2_2/pipeline_wan2_2.py resolve_wan_transformer_quant_config"
CODES = {
    "config.omni-other": Code("a second transformer whose configuration is not the first one's", _WAN),
    "config.omni-unread": Code(
        "settings in a place where the server looks for none", f"{OMNI} diffusion/data.py OmniDiffusionConfig.enrich_config"
    ),
    "files.omni-component": Code(
        "a component that model_index.json names is not there",
        f"{OMNI} diffusion/model_loader/diffusers_loader.py _prepare_weights",
    ),
    "layout.omni-component": Code(
        "a component that the server loads unquantized is stored as codes", f"{OMNI} diffusion/models, from_pretrained"
    ),
    "layout.omni-storage": Code("a component in ckptq's form for storage, which no server reads"),
    "config.omni-unchecked": Code("a component quantized in a way that ckptq does not know"),
}
_RESTORE = "serve the source's component; `ckptq restore OUT BF16_DIR` makes one of what ckptq stored"
_OTHER = "hf_quant_config.json"
_CODES = ("F8_E4M3", "F8_E5M2", "I8", "U8")


def denoisers_of(inventory: Inventory) -> dict[str, Denoiser]:
    """{folder: denoiser} of the components that have one."""
    pipeline = class_of(inventory)
    found = {c.folder: find_denoiser(c.config, pipeline) for c in inventory.components}
    return {folder: denoiser for folder, denoiser in found.items() if denoiser is not None}


def class_of(inventory: Inventory) -> str | None:
    """`_class_name` of model_index.json, None for a root checkpoint."""
    return str(inventory.pipeline.get("_class_name")) if inventory.pipeline is not None else None


def refuse_unknown(inventory: Inventory) -> None:
    """Raises UnsupportedError for formats that ckptq does not know, and for a pipeline of which nothing is known."""
    names = [*inventory.files, *inventory.left_out]
    names += [f"{c.folder}/{name}" for c in inventory.components for name in (*c.sidecars, *c.left_out)]
    for name in names:
        last = name.rpartition("/")[2]
        kind = "GGUF" if last.endswith(".gguf") else "msModelSlim" if last.startswith("quant_model_description") else ""
        if kind:
            raise UnsupportedError(f"{printable(name)}: {kind}, which ckptq does not check")
    known = sorted({name for d in all_denoisers() for name in (d.pipelines or d.classes)})
    if denoisers_of(inventory) or class_of(inventory) in known or any(map(_for_storage, inventory.components)):
        return
    raise UnsupportedError(f"{_called(inventory)}: no denoiser is known for it; known: {', '.join(known)}")


def _called(inventory: Inventory) -> str:
    if inventory.pipeline is not None:
        return f"model_index.json: _class_name {class_of(inventory)!r:.80}"
    return f"config.json: architectures {inventory.main.config.get('architectures')!r:.200}"


def section_in_force(inventory: Inventory, folder: str) -> Mapping[str, Any] | None:
    """The section that a denoiser is built with, as it stands in some config.json.

    Of two transformers each has its own, unless the server has to be told that there is one (`Denoiser.options`): then it is the
    first one's for both.
    """
    denoiser, configs = denoisers_of(inventory)[folder], {c.folder: c.config for c in inventory.components}
    own, first = sections.section_of(configs[folder]), sections.section_of(configs.get(denoiser.folders[0], {}))
    shared = first is not None and _method(first) in denoiser.options
    return first if shared else own


def _method(section: Mapping[str, Any]) -> str:
    return str(section.get("quant_method") or section.get("method") or "").lower()


def check(inventory: Inventory) -> Iterator[Finding]:
    """All findings, one for each place. Raises UnsupportedError as `refuse_unknown`, SourceError as `examine`."""
    refuse_unknown(inventory)
    found = denoisers_of(inventory)
    yield from _absent(inventory)
    yield from _unread(inventory)
    yield from _two(inventory, found)
    built = {folder for folder, denoiser in found.items() for folder in _encoder(inventory, folder, denoiser)}
    for component in inventory.components:
        if component.folder in found:
            yield from _leak(inventory, component.folder, found[component.folder])
        elif _for_storage(component):
            yield error(
                "layout.omni-storage", component.folder, "a component that the server's libraries read", "FP8 for storage",
                "diffusers and transformers refuse it by its config.json; where vLLM-Omni builds it, codes are taken for values",
                _RESTORE,
            )  # fmt: skip
        elif component.folder not in built:
            yield from _unquantized(component)


def _absent(inventory: Inventory) -> Iterator[Finding]:
    for name in component_names(inventory.pipeline or {}):
        if not (inventory.root / name).is_dir():
            yield error(
                "files.omni-component", name, "the component that model_index.json names", "no such folder", f"{OMNI} raises",
                "copy the component from the source",
            )  # fmt: skip


def _unread(inventory: Inventory) -> Iterator[Finding]:
    files = [*inventory.files, *(f"{c.folder}/{n}" if c.folder else n for c in inventory.components for n in c.sidecars)]
    for name in files:
        if name == _OTHER or name.endswith(f"/{_OTHER}"):
            yield warning(
                "config.omni-unread", name, "settings in the transformer's own config.json", "a further file",
                "vLLM-Omni reads no such file of a diffusion pipeline", "remove it",
            )  # fmt: skip
    if inventory.pipeline is not None and "quantization_config" in inventory.pipeline:
        yield warning(
            "config.omni-unread", "model_index.json: quantization_config", "settings in the transformer's own config.json",
            "settings here", "vLLM-Omni looks for none in model_index.json", "put them into the transformer's config.json",
        )  # fmt: skip


def _two(inventory: Inventory, found: Mapping[str, Denoiser]) -> Iterator[Finding]:
    """Of Wan's two transformers."""
    for folder, denoiser in found.items():
        first = denoiser.folders[0]
        if folder == first or first not in found:
            continue
        configs = {c.folder: c.config for c in inventory.components}
        own, other = (sections.section_of(configs[name]) for name in (folder, first))
        if {_method(s) for s in (own, other) if s is not None} & denoiser.options.keys() and own != other:
            gone = own is None or other is None
            report = error if gone or _method(own or {}) != _method(other or {}) else warning
            yield report(
                "config.omni-other", f"{folder}/config.json: quantization_config", f"the section of {first}/config.json",
                "absent" if own is None else f"another one, {spelled(own, 'quant_method')}",
                f"vLLM-Omni builds both with the section in {first}" if other is not None else
                f"{OMNI} raises: the first has none, and the methods differ",
                "write the same section in both, with everything that either of them keeps",
            )  # fmt: skip


def _encoder(inventory: Inventory, folder: str, denoiser: Denoiser) -> tuple[str, ...]:
    """The folder of the text encoder that this denoiser's configuration reaches, if there is one."""
    encoder = denoiser.encoder
    reached = encoder is not None and folder == denoiser.folders[0] and class_of(inventory) in encoder.pipelines
    return (encoder.folder,) if encoder is not None and reached else ()


def _leak(inventory: Inventory, folder: str, denoiser: Denoiser) -> Iterator[Finding]:
    section = section_in_force(inventory, folder)
    encoder = denoiser.encoder
    if section is None or encoder is None:
        return
    read, _ = sections.read(section, f"{folder}/config.json: quantization_config")
    for component in inventory.components:
        reached = component.folder in _encoder(inventory, folder, denoiser) and not _for_storage(component)
        if read is not None and reached:
            specs = {name: tensor.spec for name, tensor in component.tensors.items()}
            yield from encoders.check(read, denoiser, encoder, component.config, specs)


def _for_storage(component: Component) -> bool:
    """See ckptq/storage.py."""
    section = sections.section_of(component.config)
    return section is not None and "ckptq" in section and "quant_method" not in section


def _unquantized(component: Component) -> Iterator[Finding]:
    """A component that transformers or diffusers load: codes are values to them."""
    section = sections.section_of(component.config)
    known = section is None or _method(section) in ("modelopt", "fp8", "")
    if not known and section is not None:
        yield warning(
            "config.omni-unchecked", f"{component.folder}/config.json: quantization_config", "an unquantized component",
            spelled(section, "quant_method"), "whoever loads it has to know this method; ckptq has not looked at it", "try it",
        )  # fmt: skip
        return
    for name, tensor in component.tensors.items():
        if tensor.spec.dtype in _CODES and not name.endswith(("weight_scale", "weight_scale_inv")):
            yield error(
                "layout.omni-component", f"{component.folder}/{name}",
                "the source's dtype: vLLM-Omni builds this component unquantized", tensor.spec.dtype,
                "its codes are taken for values, silently, and the scales are left out", _RESTORE,
            )  # fmt: skip
