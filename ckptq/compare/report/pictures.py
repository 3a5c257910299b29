"""Images in a report: small, as `data:` addresses, and what differs between two."""

from __future__ import annotations

import base64
import io
import itertools
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from ckptq.compare.images import frames_of
from ckptq.errors import SourceError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    Array = np.ndarray[Any, Any]

SIDE = 288
"""Pixels of a picture's longer side, at most; of small ones at least half of it."""


@dataclass(frozen=True, slots=True)
class Shown:
    """One frame of an output: the one with the largest error. Without pictures `why` says what is in the way.

    gain  by which the difference is brightened
    """

    name: str
    frame: int = 0
    reference: Markup | None = None
    candidate: Markup | None = None
    difference: Markup | None = None
    gain: float = 1.0
    why: str = ""


def small(path: Path) -> Markup | None:
    """The address of an image in a file; None for what can't be shown."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, on odd but readable files
            with Image.open(path) as opened:
                opened.draft("RGB", (2 * SIDE, 2 * SIDE))
                return _address(opened.convert("RGB"))
    except Exception:  # each of Pillow's decoders has errors of its own; the model had it, so it was said already
        return None


def beside(reference: Path, candidate: Path, name: str) -> Shown:
    """An output of two folders."""
    import numpy as np
    from PIL import Image

    worst: tuple[float, int, Array, Array] | None = None
    try:
        both = itertools.zip_longest(frames_of(reference / name), frames_of(candidate / name))
        for number, (a, b) in enumerate(both):
            if a is None or b is None or a.shape != b.shape or not _is_image(a) or not _is_image(b):
                return Shown(name, why=f"no image: {'a frame less' if a is None or b is None else f'{a.dtype} {list(a.shape)}'}")
            error = float(np.square(a.astype(np.float32) - b).sum())
            if worst is None or error > worst[0]:
                worst = error, number, np.array(a), np.array(b)
    except (SourceError, OSError) as problem:
        return Shown(name, why=f"it can't be read any more: {problem}")
    if worst is None:
        return Shown(name, why="there is no frame in it")
    _, number, a, b = worst
    apart = np.abs(a.astype(np.int16) - b).reshape(*a.shape[:2], -1).max(2)
    gain = 255 / max(1, int(apart.max()))
    bright = Image.fromarray((apart * gain).astype(np.uint8))
    return Shown(name, number, _address(_image(a)), _address(_image(b)), _address(bright), gain)


def _is_image(array: Array) -> bool:
    return array.dtype == "uint8" and array.size > 0 and (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4)))


def _image(array: Array) -> Image:
    from PIL import Image

    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array).convert("RGB")


def _address(image: Image) -> Markup:
    from PIL import Image

    longest = max(image.size)
    if longest > SIDE:
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    elif longest <= SIDE // 2:
        factor = SIDE // longest
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    kept = io.BytesIO()
    image.save(kept, "JPEG", quality=90, subsampling=0)
    return Markup("data:image/jpeg;base64,") + base64.b64encode(kept.getvalue()).decode()
