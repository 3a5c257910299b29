"""The models of a diffusion pipeline, on `meta`: denoisers and text encoders read block by block, the rest as a whole.

Facts are from diffusers 0.42.1 and transformers 5.17.0. No code of a checkpoint is run and no pickle is read: classes are the
libraries' own, weights come from safetensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ckptq.blocks import Blocks
from ckptq.checkpoint import Component, Reader, read_config
from ckptq.errors import SourceError, UnsupportedError
from ckptq.placement import fill, place
from ckptq.streamed import fill_buffers, quiet

SERVED = torch.bfloat16
"""vLLM-Omni 0.30.0 diffusion/data.py OmniDiffusionConfig.dtype: what a pipeline is served in where nobody asks for another."""


class PipelineModel(Blocks):
    """One model of a pipeline. `blocks`: those that are read one by one, in the order in which they run; [] where it is read whole.

    `stacks`: names of the lists that hold the blocks. `head`: parameters that nobody reads, which stay on `meta`.
    """

    def __init__(
        self,
        component: Component,
        model: Any,
        stacks: Sequence[str],
        reader: Reader,
        device: torch.device,
        *,
        ahead: int = 1,
        head: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(model.eval().requires_grad_(False), reader, device, ahead)
        self.folder = component.folder
        self._prefixes = [f"{stack}.{i}." for stack in stacks for i in range(len(model.get_submodule(stack)))]
        self.blocks: list[torch.nn.Module] = [model.get_submodule(prefix[:-1]) for prefix in self._prefixes]
        self._layer_sources = [{} for _ in self.blocks]
        self._assign(component, head)

    @property
    def from_transformers(self) -> bool:
        return hasattr(self.model, "initialize_weights")

    def fill_buffers(self) -> None:
        """Computes the buffers that no file holds; diffusers' are real from the start."""
        if self.from_transformers:
            fill_buffers(self.model, self.device)

    def _assign(self, component: Component, head: frozenset[str]) -> None:
        """Every parameter and stored buffer gets its sources; a shape that disagrees with config.json is an error."""
        kept = self.model.state_dict()
        canonical: dict[int, str] = {}
        wanted: dict[str, torch.Tensor] = {}
        alias: dict[str, str] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            alias[name] = canonical.setdefault(id(parameter), name)
            if alias[name] == name:
                wanted[name] = parameter
            else:
                self._tied.setdefault(alias[name], []).append(name)
        wanted |= {name: buffer for name, buffer in self.model.named_buffers() if name in kept}
        placement = place(self.model, component, None) if self.from_transformers else None
        for stored in component.tensors:
            memory = placement.parameters[stored] if placement else stored
            memory = alias.get(memory, memory)
            if memory in self._dtypes or memory not in wanted or memory in head:
                continue
            self._dtypes[memory] = self._dtype(memory, wanted[memory])
            names = placement.order.get(memory, (stored,)) if placement else (stored,)
            filling = fill(memory, tuple(wanted[memory].shape), [component.tensors[n] for n in names])
            at = next((i for i, prefix in enumerate(self._prefixes) if memory.startswith(prefix)), None)
            (self._resident_sources if at is None else self._layer_sources[at])[memory] = filling
        if empty := sorted(set(wanted) - set(self._dtypes) - head):
            raise SourceError(f"{component.folder}: no tensor of the checkpoint fills {empty[0]} ({len(empty)} such parameters)")

    def _dtype(self, name: str, tensor: torch.Tensor) -> torch.dtype:
        """As from_pretrained(torch_dtype=bfloat16) has it: diffusers models/model_loading_utils.py load_model_dict_into_meta,
        transformers modeling_utils.py _get_dtype_plan."""
        if not tensor.is_floating_point():
            return tensor.dtype
        if self.from_transformers:
            wide = self.model._get_dtype_plan(SERVED)
            return next((dtype for pattern, dtype in wide.items() if re.search(rf"(^|\.){pattern}($|\.)", name)), SERVED)
        parts = set(name.split("."))
        return torch.float32 if parts & set(self.model._keep_in_fp32_modules or ()) else SERVED


def diffusers_model(
    component: Component, name: str, stacks: Iterable[str], reader: Reader, device: torch.device, ahead: int = 1
) -> PipelineModel:
    """A denoiser, or with no stacks a VAE, of diffusers' class `name`. Raises UnsupportedError for a config that suits it not."""
    import diffusers

    model = _built(getattr(diffusers, name), component.config, component.folder)
    for module in model.modules():
        for key, buffer in module.named_buffers(recurse=False):
            module._buffers[key] = buffer.to(device)
    return PipelineModel(component, model, list(stacks), reader, device, ahead=ahead)


def unfilled(cls: Any, folder: Path) -> Any:
    """A model without weights, for what pipelines ask of its config. Raises UnsupportedError for a text encoder."""
    config = read_config(folder)[1]
    if "_class_name" not in config:
        raise UnsupportedError(f"{folder.name}: has no weights in safetensors, and ckptq reads no pickles", hint="convert it first")
    return _built(cls, config, folder.name)


def _built(cls: Any, config: Mapping[str, Any], folder: str) -> Any:
    try:
        with _default_dtype(SERVED), _parameters_on_meta(), quiet():
            return cls.from_config(dict(config))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UnsupportedError(f"{folder}/config.json: {cls.__name__} of diffusers can't be built of it: {error}") from error


def transformers_model(
    root: Path, component: Component, name: str, reader: Reader, device: torch.device, *, whole: bool = False, ahead: int = 1
) -> PipelineModel:
    """A text encoder of transformers' class `name`, read block by block unless it is wanted `whole`.

    Its output head is left out: pipelines read hidden states. One that is `whole` keeps it, for `generate`.
    """
    import transformers

    folder, cls = root / component.folder, getattr(transformers, name)
    with quiet():
        config = cls.config_class.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = cls._from_config(config, dtype=SERVED)
        if whole and (folder / "generation_config.json").is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    head: frozenset[str] = frozenset()
    if not whole and (output := model.get_output_embeddings()) is not None:
        output.forward = lambda hidden: hidden[..., :0]
        if output.weight is not model.get_input_embeddings().weight:
            at = next(n for n, module in model.named_modules() if module is output)
            head = frozenset(f"{at}.{n}" for n, _ in output.named_parameters())
    return PipelineModel(component, model, [] if whole else list(_stacks(model)), reader, device, ahead=ahead, head=head)


def _stacks(model: torch.nn.Module) -> Iterator[str]:
    """The outermost lists of modules that hold most of a model's parameters."""
    total = sum(p.numel() for p in model.parameters())
    found: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.ModuleList) or any(name.startswith(f"{outer}.") for outer in found):
            continue
        if sum(p.numel() for p in module.parameters()) * 20 > total:
            found.append(name)
    yield from found


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built in this context have their parameters on `meta`, and real buffers, which no file holds."""
    plain = torch.nn.Module.register_parameter

    def register(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        blank = None if parameter is None else torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        plain(module, name, blank)

    torch.nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = plain  # type: ignore[method-assign]


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
