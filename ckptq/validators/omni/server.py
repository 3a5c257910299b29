"""What vLLM-Omni does with a denoiser beyond what ckptq/scopes/denoisers says: lists, and tensors that it doesn't know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ckptq.validators.formats import SCALE_KINDS

OMNI = "vLLM-Omni 0.30.0"
KINDS = (*SCALE_KINDS, "weight_dual_scale", "mul_scale")
"""Names of scales that a denoiser's linear may have beside its codes."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Of one denoiser. All this was read in its transformer's file and its pipeline's.

    renames  (part of a name on a list, what the server makes of it); after `^` a beginning: the pipeline's hf_to_vllm_mapper
    refuses  whether a tensor that it has no place for makes it raise; others drop it
    """

    renames: tuple[tuple[str, str], ...] = ()
    refuses: bool = False


_PLAIN = Facts()
_FACTS: Mapping[str, Facts] = {
    # omnigen2_transformer.py and z_image_transformer.py load_weights look every name up in params_dict.
    "omnigen2": Facts(refuses=True),
    "z_image": Facts(refuses=True),
    # hunyuan_image3/pipeline_hunyuan_image3.py HunyuanImage3Pipeline.
    "hunyuan_image3": Facts(renames=(("^model.", ""), ("mlp.gate.wg.", "mlp.gate."), ("gate_and_up_proj.", "gate_up_proj."))),
}


def facts_of(name: str) -> Facts:
    """Those of a denoiser, by its name."""
    return _FACTS.get(name, _PLAIN)
