"""The sections of a recipe: strict pydantic models. `ckptq.recipe` puts them together and reads the YAML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, ValidatorFunctionWrapHandler
from pydantic_core import PydanticCustomError

from ckptq.compare.policy import read_limit
from ckptq.errors import RecipeError
from ckptq.mistakes import close

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_size(value: object) -> int:
    """`"5GB"` -> 5000000000. Raises ValueError for anything that is no positive size."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
    unit = match and _UNITS.get(match[2].upper())
    if not match or not unit or (size := int(float(match[1]) * unit)) <= 0:
        raise ValueError(f"expected a size such as 5GB or 512MiB, found {value!r}")
    return size


def size_option(option: str, value: str | None) -> int | None:
    """A size given on the command line, or None. Raises RecipeError naming the option."""
    try:
        return None if value is None else parse_size(value)
    except ValueError as error:
        raise RecipeError(f"{option}: {error}") from None


def strings(value: object) -> object:
    """One pattern for a list of one."""
    return [value] if isinstance(value, str) else value


Size = Annotated[int, BeforeValidator(parse_size)]
Patterns = Annotated[list[str], BeforeValidator(strings), Field(min_length=1)]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values are not coerced from other types, and nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


SchemeName = Literal[
    "fp8", "fp8-tensor", "fp8-dynamic", "fp8-block", "int8", "nvfp4", "nvfp4a16", "mxfp8", "mxfp4", "mxfp4-dualscale"
]  # fmt: skip


class Rule(Section):
    """Which modules get which scheme. The first rule that matches a module decides; `keep` comes before all rules."""

    modules: Patterns
    scheme: SchemeName


Storage = Literal["fp8-storage", "fp8-storage-channel"]
"""FP8 weights in a form that no server reads: ckptq/storage.py."""


class Treatment(Section):
    """What becomes of one component of a pipeline. Exactly one of `action`, `scheme` and `quantize` is given.

    action    the component stays, file by file, or its weights are stored in FP8
    scheme    for every linear that the server can build with it, less those in `keep`
    quantize  rules, as for a language model; `keep` comes before them
    """

    action: Literal["keep"] | Storage | None = None
    scheme: SchemeName | None = None
    quantize: list[Rule] = []
    keep: Annotated[list[str], BeforeValidator(strings)] = []


def _treatment(value: object) -> object:
    """`transformer: fp8` for `transformer: {scheme: fp8}`, `vae: keep` for `vae: {action: keep}`."""
    actions = ("keep", *get_args(Storage))
    if isinstance(value, str):
        if value in actions:
            return {"action": value}
        if value not in get_args(SchemeName):
            known = (*actions, *get_args(SchemeName))
            raise ValueError(f"expected keep, a scheme, a storage form or a section, found {value!r}{close(value, known)}")
        return {"scheme": value}
    if isinstance(value, dict):
        given = [key for key in ("action", "scheme", "quantize") if value.get(key)]
        if set(value) - set(Treatment.model_fields):
            return value  # unknown keys are told by name
        if len(given) != 1:
            raise ValueError(f"expected one of action, scheme and quantize, found {' and '.join(given) or 'none of them'}")
        if "action" in given and value.get("keep"):
            raise ValueError(f"expected no keep beside action {value['action']!r}, found {value['keep']!r}")
    return value


Components = dict[str, Annotated[Treatment, BeforeValidator(_treatment)]]


def rules_or_components(value: object, read: ValidatorFunctionWrapHandler, info: ValidationInfo) -> list[Rule]:
    """`quantize` of a plain model; [] where `components` stand in its place. Raises for neither, and for both."""
    components: Mapping[str, Treatment] = info.data.get("components", {"": None})  # without them: they have mistakes of their own
    if value is None:
        if not components:
            raise PydanticCustomError("missing", "is required")
        return []
    rules: list[Rule] = read(value)
    if not rules:
        raise PydanticCustomError("too_short", "at least 1 item", {"min_length": 1})
    for pattern in (pattern for rule in rules for pattern in rule.modules):
        treatment = components.get(pattern.partition(".")[0])
        if treatment is not None and treatment.action == "keep":
            raise ValueError(f"expected no rule for a component that is to be kept, found the pattern {pattern!r}")
    if components and "" not in components:
        raise ValueError("expected no rules beside components: each has its own, under components.NAME.quantize")
    return rules


class _Samples(Section):
    samples: Annotated[int, Field(ge=1)] = 128
    seed: int = 0


class _Calibration(_Samples):
    sequence_length: Annotated[int, Field(ge=8)] = 2048
    save_every: Annotated[int, Field(ge=0, le=600)] = 60
    """Seconds between saves of the state; 0 saves after each layer. It is saved between layers: a kill costs what came since."""
    all_experts: bool = False
    """Whether every routed expert sees every token. Else those that the router chooses see it, as when the model is served."""


class CocoCalibration(_Calibration):
    """Images with their captions, joined by image_id. Captions come in COCO's `captions_*.json`."""

    source: Literal["coco"]
    images: str
    annotations: str
    prompt: str = "Describe the image."
    max_pixels: Annotated[int, Field(ge=784)] | None = None


class TextCalibration(_Calibration):
    """.txt, .jsonl, .parquet or COCO captions files, or one Hub dataset `org/name[@revision]`."""

    source: Literal["text"]
    files: Patterns
    field: str = "text"


class MediaCalibration(_Calibration):
    """.jsonl files of samples with images, audio, both or neither: ckptq/calibration/media.py says what a line holds."""

    source: Literal["media"]
    files: Patterns
    max_pixels: Annotated[int, Field(ge=784)] | None = None


class BuiltinCalibration(_Calibration):
    """The small English set that ships with ckptq."""

    source: Literal["builtin"]


class PromptCalibration(_Samples):
    """What the denoiser of a pipeline is run with: prompts, given here or in files (.txt one a line, .jsonl), or those built in.

    images    for edit pipelines: one goes with each prompt that brings none, in turn
    guidance  what the pipeline's own `guidance_scale`, or `true_cfg_scale`, is set to; None for its own default
    frames    of a video; None for the pipeline's own default
    """

    source: Literal["prompts"]
    prompts: Annotated[list[str], BeforeValidator(strings)] = []
    files: Annotated[list[str], BeforeValidator(strings)] = []
    images: Annotated[list[str], BeforeValidator(strings)] = []
    negative_prompt: str | None = None
    samples: Annotated[int, Field(ge=1)] = 32
    steps: Annotated[int, Field(ge=1, le=1000)] = 8
    height: Annotated[int, Field(ge=16, multiple_of=16)] = 512
    width: Annotated[int, Field(ge=16, multiple_of=16)] = 512
    frames: Annotated[int, Field(ge=1)] | None = None
    guidance: Annotated[float, Field(ge=0, strict=False)] | None = None


Calibration = Annotated[
    CocoCalibration | TextCalibration | MediaCalibration | BuiltinCalibration | PromptCalibration, Field(discriminator="source")
]


def of_models(settings: Calibration) -> CocoCalibration | TextCalibration | MediaCalibration | BuiltinCalibration:
    """The settings, which are for a language model. Raises RecipeError for prompts."""
    if isinstance(settings, PromptCalibration):
        raise RecipeError(
            "calibration.source prompts: is for a pipeline's denoiser; a language model is run on samples",
            hint="choose coco, text, media or builtin",
        )
    return settings


SOURCES: Mapping[str, type[Section]] = {
    "coco": CocoCalibration,
    "text": TextCalibration,
    "media": MediaCalibration,
    "builtin": BuiltinCalibration,
    "prompts": PromptCalibration,
}


class Export(Section):
    """How the output is stored."""

    format: Literal["modelopt", "compressed-tensors", "fp8", "int8", "mxfp8", "mxfp4-dualscale"] = "modelopt"
    shard_size: Size = 5 * 10**9


class Validation(Section):
    """What is checked on the finished output before it is published."""

    values: bool = True
    passthrough: bool = True


def _limit(text: str) -> str:
    read_limit(text)
    return text


class Quality(Section):
    """What a comparison of the output with its source must not show, as `ckptq compare` measures it.

    fail_on  limits, `kl_mean>0.02`: ckptq/compare/policy.py has the metrics
    samples  what both models are run on; None for those of the calibration
    """

    fail_on: Annotated[list[Annotated[str, AfterValidator(_limit)]], BeforeValidator(strings)] = []
    samples: Calibration | None = None
