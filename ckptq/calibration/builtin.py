"""The small set that ships with ckptq: builtin.txt, pieces of prose, code, dialogue and data, parted by lines of one `%`.

It is for when nothing else is at hand. Samples like those that the model will be asked for give better scales.
"""

from __future__ import annotations

import importlib.resources

from ckptq.calibration import Sample
from ckptq.calibration.text import choose
from ckptq.sections import BuiltinCalibration


def load(settings: BuiltinCalibration) -> list[Sample]:
    """At most `settings.samples` of the pieces, as plain text, so that checkpoints without a chat template can use them."""
    text = (importlib.resources.files("ckptq.calibration") / "builtin.txt").read_text(encoding="utf-8")
    pieces = (piece.strip() for piece in text.split("\n%\n"))
    return choose((Sample(f"builtin.txt piece {n}", piece) for n, piece in enumerate(pieces, 1)), settings.samples, settings.seed)
