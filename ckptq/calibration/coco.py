"""COCO images with their captions: a folder, and a captions file {images: [{id, file_name}], annotations: [{image_id, caption}]}.

Joined by image_id, in no order of the file's: images are sorted by id and captions by text before the seed chooses. One caption
is chosen per image. Images without a caption are left out, captions for an image that the file does not list are an error.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ckptq.calibration import Sample
from ckptq.calibration.encode import read_image
from ckptq.errors import CalibrationError
from ckptq.sections import CocoCalibration

_HINT = "calibration.annotations should be a captions file in COCO's format, such as captions_val2017.json"


def load(settings: CocoCalibration) -> list[Sample]:
    """At most `settings.samples` images with a caption each. A smaller number gives the first of a larger one.

    Every chosen image is decoded once, so that a broken file is found before the long work.

    Raises CalibrationError for annotations that can't be understood and for images that are missing or can't be decoded.
    """
    folder = Path(settings.images).expanduser()
    if not folder.is_dir():
        raise CalibrationError(
            f"{settings.images}: no such folder", hint="name the folder of the images (calibration.images, or --coco)"
        )
    images = read_captions(Path(settings.annotations).expanduser())
    draw = random.Random(settings.seed)  # noqa: S311, a seeded choice is the point
    draw.shuffle(images)
    samples = []
    for image_id, file_name, captions in images[: settings.samples]:
        caption = draw.choice(captions)
        path = _inside(folder, file_name, settings.annotations)
        if not path.is_file():
            raise CalibrationError(
                f"{file_name}: no such file in {folder}; {settings.annotations} names it as image_id {image_id}",
                hint="name the folder that goes with these annotations (calibration.images, or --coco), or fetch the image",
            )
        read_image(path)
        samples.append(Sample(f"{file_name} (image_id {image_id})", caption, settings.prompt, path))
    return samples


def read_captions(path: Path) -> list[tuple[int | str, str, Sequence[str]]]:
    """(image_id, file_name, its captions sorted) of every image that has a caption, sorted by image_id.

    Raises CalibrationError where the file is no COCO captions file or contradicts itself.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CalibrationError(f"{path}: can't be read: {error.strerror}", hint=_HINT) from error
    except ValueError as error:
        raise CalibrationError(f"{path}: not JSON: {error}", hint=_HINT) from error
    files: dict[int | str, str] = {}
    for image_id, file_name in _fields(path, content, "images", "id", "file_name"):
        if files.setdefault(image_id, file_name) != file_name:
            raise CalibrationError(f"{path}: image id {image_id} is given twice, to {files[image_id]} and to {file_name}")
    captions: dict[int | str, list[str]] = {}
    for image_id, caption in _fields(path, content, "annotations", "image_id", "caption"):
        captions.setdefault(image_id, []).append(caption.strip())
    if unknown := _sorted(captions.keys() - files.keys()):
        raise CalibrationError(
            f"{path}: captions for image_id {unknown[0]}, which its images don't list"
            + (f", and for {len(unknown) - 1} more such images" if len(unknown) > 1 else ""),
            hint="images and annotations must be of the same set",
        )
    usable = {image_id: sorted(filter(None, texts)) for image_id, texts in captions.items()}
    return [(image_id, files[image_id], usable[image_id]) for image_id in _sorted(usable) if usable[image_id]]


def _fields(path: Path, content: Any, section: str, id_key: str, text_key: str) -> list[tuple[int | str, str]]:
    """The two fields of every entry of a section."""
    entries = content.get(section) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise CalibrationError(f"{path}: expected a JSON object with a list {section!r}", hint=_HINT)
    found: list[tuple[int | str, str]] = []
    for number, entry in enumerate(entries):
        image_id, text = (entry.get(id_key), entry.get(text_key)) if isinstance(entry, dict) else (None, None)
        if not isinstance(image_id, int | str) or not isinstance(text, str):
            raise CalibrationError(f"{path}: {section}[{number}] has no {id_key} with a text as {text_key}", hint=_HINT)
        found.append((image_id, text))
    return found


def _sorted(ids: Any) -> list[int | str]:
    return sorted(ids, key=lambda image_id: (isinstance(image_id, str), image_id))


def _inside(folder: Path, file_name: str, annotations: str) -> Path:
    """`folder / file_name`. Raises CalibrationError for a name that leads out of the folder."""
    for name in (PurePosixPath(file_name), PureWindowsPath(file_name)):
        if name.anchor or ".." in name.parts:
            raise CalibrationError(
                f"{annotations}: the file_name {file_name!r} leads out of {folder}",
                hint="file names must be relative to calibration.images",
            )
    return folder / file_name
