"""Samples with images, audio, both or neither: .jsonl files, one sample a line.

    {"text": "It rains.", "prompt": "What do you hear?", "audio": "clips/0001.wav"}
    {"text": "A red door.", "prompt": "Describe the image.", "image": "images/0001.jpg"}
    {"text": "Dear Sir or Madam, ..."}

text    what the assistant answers, or without the other keys text as it stands
prompt  what the user asks
image   a file that Pillow reads
audio   a .wav file, 16-bit PCM, with the samples a second that the checkpoint's processor takes: 16,000 for Qwen's Omni models

Files are relative to the folder of the .jsonl file. A line of another key is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ckptq.calibration import Sample
from ckptq.calibration.encode import read_image
from ckptq.calibration.text import choose
from ckptq.calibration.wav import read_wav
from ckptq.errors import CalibrationError
from ckptq.mistakes import close
from ckptq.sections import MediaCalibration

_KEYS = ("text", "prompt", "image", "audio")
_HINT = 'a line should be such as {"text": "It rains.", "prompt": "What do you hear?", "audio": "clips/0001.wav"}'


def load(settings: MediaCalibration) -> list[Sample]:
    """At most `settings.samples` of all lines. Images and audio of the chosen ones are decoded once, so that a broken file is
    found before the long work.

    Raises CalibrationError for lines that can't be understood, and for files that are missing or can't be decoded. It names the
    .jsonl file and the line.
    """
    found = (sample for entry in settings.files for sample in _lines(Path(entry).expanduser()))
    samples = choose(found, settings.samples, settings.seed)
    for sample in samples:
        try:
            if sample.image:
                read_image(sample.image)
            if sample.audio:
                read_wav(sample.audio)
        except CalibrationError as error:
            raise CalibrationError(f"{sample.name}: {error}", hint=error.hint) from error
    return samples


def _lines(path: Path) -> Iterator[Sample]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _sample(f"{path.name}:{number}", line, path.parent)
    except FileNotFoundError as error:
        raise CalibrationError(f"{path}: no such file; calibration.files should name .jsonl files", hint=_HINT) from error
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: can't be read: {error}", hint=_HINT) from error


def _sample(name: str, line: str, folder: Path) -> Sample:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise CalibrationError(f"{name}: not JSON: {error}", hint=_HINT) from error
    if not isinstance(row, dict):
        raise CalibrationError(f"{name}: expected a JSON object, found {type(row).__name__}", hint=_HINT)
    for key, value in row.items():
        if key not in _KEYS:
            raise CalibrationError(f"{name}: unknown key {key!r}{close(key, _KEYS)}", hint=_HINT)
        if not isinstance(value, str):
            raise CalibrationError(f"{name}: {key!r} should be a text, found {type(value).__name__}", hint=_HINT)
    if not row.get("text", "").strip():
        raise CalibrationError(f"{name}: has no 'text', which is what the assistant answers", hint=_HINT)
    return Sample(name, row["text"], row.get("prompt"), _file(row, "image", folder), _file(row, "audio", folder))


def _file(row: dict[str, Any], key: str, folder: Path) -> Path | None:
    return folder / row[key] if key in row else None
