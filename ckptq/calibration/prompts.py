"""Prompts for the denoiser of a pipeline: given in the recipe, or in files, or the small set that ships with ckptq.

.txt    one prompt a line; blank lines are left out
.jsonl  one a line: {"prompt": "A red door.", "negative_prompt": "blurry", "image": "images/0001.jpg"}, the last two where wanted

Images are those that an edit pipeline edits; files are relative to the folder of the .jsonl file. A line of another key is an
error. `calibration.images` go round among the prompts that bring none.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckptq.calibration import Sample
from ckptq.calibration.text import choose
from ckptq.errors import CalibrationError
from ckptq.mistakes import close
from ckptq.sections import PromptCalibration

_KEYS = ("prompt", "negative_prompt", "image")
_HINT = 'a line should be such as {"prompt": "A red door.", "negative_prompt": "blurry"}'


def load(settings: PromptCalibration) -> list[Sample]:
    """At most `settings.samples` of all prompts, with their images, each decoded once, so that a broken file is found early.

    Raises CalibrationError for files that are missing or can't be read, and for lines that can't be understood.
    """
    from ckptq.calibration.encode import read_image

    samples = choose(_found(settings), settings.samples, settings.seed)
    if settings.images:
        images = [Path(name).expanduser() for name in settings.images]
        samples = [s if s.image else replace(s, image=images[i % len(images)]) for i, s in enumerate(samples)]
    for image in dict.fromkeys(s.image for s in samples if s.image):
        read_image(image)
    return [s if s.negative is not None else replace(s, negative=settings.negative_prompt) for s in samples]


def _found(settings: PromptCalibration) -> Iterator[Sample]:
    if not settings.prompts and not settings.files:
        text = (importlib.resources.files("ckptq.calibration") / "prompts.txt").read_text(encoding="utf-8")
        yield from (Sample(f"built-in prompt {n}", line) for n, line in enumerate(text.splitlines(), 1))
    for number, prompt in enumerate(settings.prompts, 1):
        if not prompt.strip():
            raise CalibrationError(f"calibration.prompts: number {number} is blank", hint="take it out")
        yield Sample(f"prompt {number}", prompt)
    for entry in settings.files:
        yield from _file(Path(entry).expanduser())


def _file(path: Path) -> Iterator[Sample]:
    if path.suffix.lower() not in (".txt", ".jsonl"):
        raise CalibrationError(f"{path}: unknown kind of file {path.suffix!r}; expected .txt or .jsonl")
    empty = True
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    empty = False
                    name = f"{path.name}:{number}"
                    yield Sample(name, line.strip()) if path.suffix.lower() == ".txt" else _sample(name, line, path.parent)
    except FileNotFoundError as error:
        raise CalibrationError(f"{path}: no such file", hint="calibration.files should name .txt or .jsonl files") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: can't be read: {error}") from error
    if empty:
        raise CalibrationError(f"{path}: holds no prompt", hint="take it out of calibration.files")


def _sample(name: str, line: str, base: Path) -> Sample:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise CalibrationError(f"{name}: not JSON: {error}", hint=_HINT) from error
    if not isinstance(row, dict):
        raise CalibrationError(f"{name}: expected a JSON object, found {type(row).__name__}", hint=_HINT)
    if unknown := [key for key in row if key not in _KEYS]:
        raise CalibrationError(f"{name}: unknown key {unknown[0]!r}{close(unknown[0], _KEYS)}", hint=_HINT)
    text = _text(name, row, "prompt")
    if not text or not text.strip():
        raise CalibrationError(f"{name}: has no prompt", hint=_HINT)
    image = _text(name, row, "image")
    return Sample(name, text, image=base / image if image else None, negative=_text(name, row, "negative_prompt"))


def _text(name: str, row: dict[str, Any], key: str) -> str | None:
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise CalibrationError(f"{name}: {key!r} should be a text, found {type(value).__name__}", hint=_HINT)
    return value
