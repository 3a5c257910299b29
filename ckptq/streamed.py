"""A transformers model whose decoder layers are on disk: built on `meta`, real only where and while it is needed.

Facts about transformers are from 5.17.0: `initialize_weights` fills whatever no file fills (rotary frequencies) and leaves alone
what is marked as loaded. Which tensors fill a parameter says `ckptq.placement`.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ckptq.blocks import Blocks
from ckptq.checkpoint import Component, Reader
from ckptq.errors import SourceError, UnsupportedError
from ckptq.placement import fill, place
from ckptq.plan import module_of
from ckptq.scopes import Scope
from ckptq.validators.dtypes import served_dtype

KERNELS, KERNEL_CACHES = 64, ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""On a CPU oneDNN keeps a kernel of some 0.7 MB for each number of rows, of 1024 by default, and experts bring all there are.
Read at the first product of matrices. To make one again takes half a millisecond.
"""


class StreamedModel(Blocks):
    """The model, its decoder layers in order, and what fills each parameter.

    `device` is where layers compute; embeddings and towers are put there too while samples enter. `ahead`: layers that are read
    while one computes, 1 or 0. `unused`: stored tensors that no sample reaches: the output head's, and what the model's class does
    not know.
    """

    def __init__(
        self, root: Path, component: Component, scope: Scope, reader: Reader, device: torch.device, *, ahead: int = 1
    ) -> None:
        super().__init__(_build(root / component.folder, component, scope), reader, device, ahead)
        self._scope = scope
        self._modules: dict[str, torch.nn.Module] = dict(self.model.named_modules())
        self.unused = [tensor for name, tensor in component.tensors.items() if scope.skips(name)]
        component = replace(component, tensors={n: t for n, t in component.tensors.items() if not scope.skips(n)})
        placement = place(self.model, component, scope)
        self._memory_name = placement.parameters
        self._layers_name = self._find_layers(component)
        self.layers: list[torch.nn.Module] = list(self.model.get_submodule(self._layers_name))
        self._layer_sources = [{} for _ in self.layers]
        self._assign(component, placement.order)

    @property
    def decoder(self) -> torch.nn.Module:
        """The module that runs the layers one after another."""
        return self._modules[module_of(self._layers_name)]

    @property
    def decoder_name(self) -> str:
        """Its name in memory."""
        return module_of(self._layers_name)

    @property
    def names(self) -> Mapping[str, str]:
        """{stored tensor: the parameter in memory that it fills}."""
        return self._memory_name

    def module(self, source_module: str) -> torch.nn.Module:
        """The module in memory that has the weight of a module of the source: of a routed expert, that of all experts."""
        return self._modules[module_of(self._memory_name[f"{source_module}.weight"])]

    def parameter(self, source_module: str) -> str:
        """The name of that weight in there: `weight`, or of routed experts `gate_up_proj`, which holds those of all."""
        return self._memory_name[f"{source_module}.weight"].rpartition(".")[2]

    def around(self, source_module: str) -> torch.nn.Module:
        """The module that this one is a direct part of: the attention around k_proj."""
        return self._modules[module_of(module_of(self._memory_name[f"{source_module}.weight"]))]

    def fill_buffers(self) -> None:
        """Computes the buffers that no file holds."""
        fill_buffers(self.model, self.device)

    def _find_layers(self, component: Component) -> str:
        for name, memory in self._memory_name.items():
            at = self._scope.layer_of(name)
            if at is not None and memory.endswith(f".{at[0]}.{at[1]}"):  # a norm: experts have other names in memory
                return memory.removesuffix(f".{at[0]}.{at[1]}")
        raise SourceError(f"no tensor of a decoder layer ({self._scope.layers}.N.*) in the checkpoint")

    def _assign(self, component: Component, order: Mapping[str, tuple[str, ...]]) -> None:
        """Every parameter and stored buffer gets its sources once; a shape that disagrees with config.json is an error."""
        kept = self.model.state_dict()
        wanted = dict(self.model.named_parameters()) | {n: b for n, b in self.model.named_buffers() if n in kept}
        head = _head_parameters(self.model)
        joined = {name for names in order.values() for name in names}
        for name, tensor in component.tensors.items():
            memory = self._memory_name[name]
            if memory in head or memory not in wanted:  # a head is stored beside tied embeddings, too
                self.unused.append(tensor)
                continue
            if (memory in order) != (name in joined) or (memory in self._dtypes and memory not in order):
                raise SourceError(f"{name}: a second tensor for {memory}")
            if memory in self._dtypes:
                continue
            self._dtypes[memory] = wanted[memory].dtype
            sources = [component.tensors[n] for n in order.get(memory, (name,))]
            filling = fill(memory, tuple(wanted[memory].shape), sources)
            if memory.startswith(self._layers_name + "."):
                self._layer_sources[int(memory[len(self._layers_name) + 1 :].split(".")[0])][memory] = filling
            else:
                self._resident_sources[memory] = filling
        if empty := sorted(set(wanted) - set(self._dtypes) - head):
            unknown = [t.spec.name for t in self.unused if self._memory_name.get(t.spec.name, "") not in {"", *head}]
            told = f"; {', '.join(unknown[:3])} fill nothing" if unknown else ""
            raise SourceError(f"{empty[0]}: no tensor of the checkpoint fills it ({len(empty)} such parameters){told}")


def _build(folder: Path, component: Component, scope: Scope) -> Any:
    """The model on `meta`. No code of the checkpoint is run, and a quantization_config that it may have is not looked at.

    Raises UnsupportedError where transformers can't build it as the scope says.
    """
    import transformers

    for name in KERNEL_CACHES if scope.experts else ():
        os.environ.setdefault(name, str(KERNELS))
    with quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # what it raises depends on the key that it stumbles over
            said = str(error).strip().replace("\n", " ")
            raise SourceError(f"config.json: transformers {transformers.__version__} can't read it: {said:.500}") from error
        config = getattr(config, f"{scope.stage}_config", None) if scope.stage else config
        auto: Any = getattr(transformers, scope.auto_class, None)
        if type(config) not in getattr(auto, "_model_mapping", ()):
            what = f"{scope.stage}_config" if config is None else type(config).__name__
            raise UnsupportedError(
                f"the scope {scope.name}: {scope.auto_class} of transformers {transformers.__version__} builds no model of {what}",
                hint="see auto_class and stage of the scope, or take schemes that need no calibration",
            )
        # Of the ways to run experts the one that multiplies expert by expert: ModelOpt calibrates with it, and observe.py sees it.
        settings = {"dtype": _served_dtype(component, scope), "experts_implementation": "eager"}
        with torch.device("meta"):
            model = auto.from_config(config, **settings)
    return model.eval().requires_grad_(False)


def _served_dtype(component: Component, scope: Scope) -> torch.dtype:
    """The dtype in which vLLM serves the output, so that calibration sees the server's activations.

    vLLM 0.32.0 config/model.py _resolve_auto_dtype: float32 is served in bfloat16. So is what config.json leaves open, by
    transformers_utils/model_arch_config_convertor.py get_torch_dtype: the widest stored dtype decides, and scales are F32.
    """
    return torch.float16 if served_dtype(component.config, scope) == "float16" else torch.bfloat16


def _head_parameters(model: Any) -> set[str]:
    """Names of the output head's parameters: each forward ends after the last decoder layer, so they stay on `meta`."""
    head = model.get_output_embeddings()
    if head is None:
        return set()
    name = next(n for n, m in model.named_modules() if m is head)
    return {f"{name}.{n}" for n, _ in head.named_parameters()}


def fill_buffers(model: Any, device: torch.device) -> None:
    """Computes the buffers that no file holds. Loaded parameters are marked, so that they stay as they are."""
    for module in model.modules():
        module._is_hf_initialized = False
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta and name in module._non_persistent_buffers_set:
                module._buffers[name] = torch.empty_like(buffer, device=device)
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    with torch.no_grad(), quiet():
        model.initialize_weights()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the chatter of transformers off stdout and out of the warnings."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
