"""Where calibration samples come from: one file per source, each with `load(settings) -> list[Sample]`. Found by the source's name.

A source only finds and chooses. Which samples, and in which order, follows from the files' content and the seed alone.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptq.errors import CalibrationError
from ckptq.sections import Calibration


@dataclass(frozen=True, slots=True)
class Sample:
    """One calibration sample. `name` says where it came from, for messages.

    With an image, audio or both: the user shows it and asks `prompt`, the assistant answers `text`. With a prompt alone: the same
    without them. Without any: `text` as it stands, with no chat template. Of source `prompts` `text` is the prompt, `negative` what
    it is guided away from, and `image` the one to edit.
    """

    name: str
    text: str
    prompt: str | None = None
    image: Path | None = None
    audio: Path | None = None
    negative: str | None = None


def load_samples(settings: Calibration) -> list[Sample]:
    """The chosen samples, in the seed's order; at most `settings.samples`. Raises CalibrationError where there are none."""
    samples: list[Sample] = importlib.import_module(f"{__name__}.{settings.source}").load(settings)
    if not samples:
        raise CalibrationError(f"calibration source {settings.source!r} holds no usable sample")
    return samples


def digest(samples: Sequence[Sample]) -> str:
    """SHA-256 over texts, prompts, images' and audio's bytes, in order: what the result depends on, and no path."""
    total = hashlib.sha256()
    for sample in samples:
        texts = (text.encode(errors="surrogatepass") for text in (sample.text, sample.prompt or ""))
        media = (sample.image.read_bytes() if sample.image else b"", *([sample.audio.read_bytes()] if sample.audio else []))
        away = () if sample.negative is None else (sample.negative.encode(errors="surrogatepass"),)
        parts = (*texts, *media, *away)
        for part in parts:
            total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()
