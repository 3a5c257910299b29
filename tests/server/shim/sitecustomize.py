"""Makes an environment with CUDA builds of torchvision, torchaudio and torchcodec usable beside a CPU build of torch.

Python runs this at start where its folder is on PYTHONPATH, or it lies in site-packages, where `make` puts it. It does not touch
vLLM: torchvision's Python part imports once the two operators that its library would define have a schema, and the other two count
as not installed. Where torchvision's library loads, nothing is done for it.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class DefineOperators:
    """Defines the schemas when torchvision is first looked for, so that torch is imported by those alone who use it."""

    library: object = None

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> None:
        if name == "torchvision" and self.library is None:
            import torch

            found = PathFinder.find_spec(name, path)
            if found is None or found.origin is None:
                return
            try:
                for file in Path(found.origin).parent.glob("_C*.so"):
                    torch.ops.load_library(file)
                    return
            except OSError:
                pass
            self.library = library = torch.library.Library("torchvision", "FRAGMENT")
            for schema in SCHEMAS:
                library.define(schema)


sys.meta_path.insert(0, DefineOperators())
for missing in ("torchaudio", "torchcodec"):
    sys.modules[missing] = None  # type: ignore[assignment]
