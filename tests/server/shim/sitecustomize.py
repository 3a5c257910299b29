"""Makes an environment with CUDA builds of torchvision, torchaudio and torchcodec usable beside a CPU build of torch.

Python runs this at start where its folder is on PYTHONPATH. It does not touch vLLM: torchvision's Python part imports once the
two operators that its missing library would define have a schema, and the other two count as not installed.
"""

import sys
from collections.abc import Sequence

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

            self.library = library = torch.library.Library("torchvision", "FRAGMENT")
            for schema in SCHEMAS:
                library.define(schema)


sys.meta_path.insert(0, DefineOperators())
for missing in ("torchaudio", "torchcodec"):
    sys.modules[missing] = None  # type: ignore[assignment]
