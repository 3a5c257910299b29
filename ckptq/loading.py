"""A component of a pipeline with FP8 weights as a model of diffusers or transformers: the weights become BF16 as it is built.

    from ckptq.loading import load_component

    vae = load_component("OUT/vae", dtype=torch.bfloat16)
    pipeline = QwenImagePipeline.from_pretrained("OUT", vae=vae, torch_dtype=torch.bfloat16)

The model is the one that `from_pretrained` makes of what `ckptq restore` writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptq import quantized
from ckptq.checkpoint import Reader, read_inventory

if TYPE_CHECKING:
    import torch


def load_component(folder: str | Path, cls: Any = None, *, dtype: torch.dtype | None = None) -> Any:
    """The model in `folder`, on the CPU, ready to be run. It is whole in memory, and no file is written.

    cls    its class; by default the one that config.json names
    dtype  of its parameters, but for those that the class keeps in float32; by default what the library makes of the files

    Raises RecipeError for a component that is not quantized, UnsupportedError for one whose codes are not FP8, or whose class is in
    neither library; DataError for scales that are not finite.
    """
    import torch

    from ckptq.classes import find_class
    from ckptq.tensors import TORCH_DTYPES, raw

    inventory = quantized.dense(read_inventory(Path(folder)))
    component = inventory.main
    cls = cls or find_class(component)
    state = {}
    with Reader(inventory.root, component) as reader:
        for name, tensor in component.tensors.items():
            state[name] = torch.empty(tensor.spec.shape, dtype=TORCH_DTYPES[tensor.spec.dtype])
            if tensor.spec.numel:
                reader.read_into(tensor, 0, raw(state[name]))
    if not hasattr(cls, "load_config"):  # transformers
        config = cls.config_class.from_dict(dict(component.config))
        model = cls.from_pretrained(None, config=config, state_dict=state, dtype=dtype or "auto")
        if "generation_config.json" in component.sidecars:
            model.generation_config = type(model.generation_config).from_pretrained(folder)
        return model.eval()
    model = cls.from_config(dict(component.config))
    model._fix_state_dict_keys_on_load(state)
    wide = cls._keep_in_fp32_modules or ()  # diffusers 0.42.1 models/modeling_utils.py from_pretrained
    for name, parameter in model.named_parameters():
        kept = any(part in name.split(".") for part in wide)
        parameter.data = parameter.data.to(torch.float32 if kept or dtype is None else dtype)
    model.load_state_dict(state)
    return model.eval()
