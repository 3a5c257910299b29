"""vLLM-Omni 0.30.0: what it builds of a diffusion pipeline, against what is stored.

`examine` looks at one denoiser, of a folder or of a plan; `check_pipeline` at what one component's configuration does to
the others.
"""

from __future__ import annotations

import dataclasses

from ckptq.checkpoint import Inventory
from ckptq.scopes.denoisers import Denoiser
from ckptq.validators import Code, Finding, Stored, error, warning
from ckptq.validators.omni import others, pipeline, sections, tensors
from ckptq.validators.omni.built import Built, build
from ckptq.validators.omni.server import KINDS, OMNI

CODES = {
    "layout.omni-talker": Code(
        "a talker's linear that the language model's configuration would build quantized, stored unquantized",
        f"{OMNI} config/model.py OmniModelArchConfigConvertor.get_quantization_config",
    )
}


def of_talker(finding: Finding) -> Finding:
    """vLLM passes a talker over; vLLM-Omni builds it as a stage of its own, with the same configuration: the finding says so."""
    if finding.code != "layout.draft-not-excluded" or not finding.subject.startswith("talker."):
        return finding
    return error(
        "layout.omni-talker", finding.subject, finding.expected, finding.found,
        "vLLM-Omni builds the talker with the same configuration and casts it to codes, silently: the speech is noise",
        finding.mend,
    )  # fmt: skip


def check_pipeline(inventory: Inventory) -> list[Finding]:
    """What the components do to one another. Raises UnsupportedError for a pipeline, or a format, that ckptq does not know."""
    return list(pipeline.check(inventory))


def examine(folder: str, stored: Stored, denoiser: Denoiser) -> tuple[list[Finding], Built | None]:
    """(what the server would find wrong with a denoiser, or would not find: names, dtypes, shapes, its config; what it will
    build, or None where it builds nothing quantized). Pure, no torch.

    folder  of the component in the pipeline, which findings begin with; "" for a root checkpoint
    Raises SourceError for a config without its numbers of blocks, UnsupportedError for a method that the server knows and ckptq
    does not.
    """
    findings, built = _examine(folder, stored, denoiser)
    return [inside(folder, finding) for finding in findings], built


def inside(folder: str, finding: Finding) -> Finding:
    """The finding with its component before its subject."""
    return dataclasses.replace(finding, subject=f"{folder}/{finding.subject}") if folder else finding


def _examine(folder: str, stored: Stored, denoiser: Denoiser) -> tuple[list[Finding], Built | None]:
    at = "config.json: quantization_config"
    section = sections.section_of(stored.config)
    if section is None:
        return ([sections.no_section(at)] if _coded(stored) else []), None
    found, findings = sections.read(section, at)
    if found is None:
        return findings, None
    findings += _option(found, denoiser)
    built = build(denoiser, folder, stored.config, stored.tensors, found)
    return [*findings, *tensors.check(built), *others.check(built)], built


def _coded(stored: Stored) -> bool:
    """Whether a weight is stored as codes."""
    weights = (spec for name, spec in stored.tensors.items() if name.endswith("weight"))
    return any(spec.dtype in ("F8_E4M3", "I8", "U8") for spec in weights) or any(n.endswith(KINDS) for n in stored.tensors)


def _option(section: sections.Section, denoiser: Denoiser) -> list[Finding]:
    """Where the files alone do not do."""
    option = denoiser.options.get(section.method)
    if option is None:
        return []
    return [
        warning(
            "config.omni-option", section.file, f"the server started with `{option}`", f"quant_method {section.method}",
            "vLLM-Omni raises without it", f"start it with `{option}`, or convert to another format",
        )
    ]  # fmt: skip
