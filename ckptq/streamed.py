"""A transformers model whose decoder layers are on disk: built on `meta`, real only where and while it is needed.

Facts about transformers are from 5.17.0: `core_model_loading.rename_source_key` maps a stored name to the one in memory,
`initialize_weights` fills whatever no file fills (rotary frequencies) and leaves alone what is marked as loaded.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ckptq.checkpoint import Component, Reader, SourceTensor, TensorSpec
from ckptq.errors import SourceError, UnsupportedError
from ckptq.plan import module_of
from ckptq.scopes import Scope
from ckptq.tensors import blank, raw, typed
from ckptq.validators.dtypes import served_dtype

ALIGNMENT = 64
STAGED = 1 << 26
"""Bytes on their way to a GPU at a time. Pinning memory takes time; two layers of a 72B would take 3.6 GB of it."""


class StreamedModel:
    """The model, its decoder layers in order, and what fills each parameter.

    `device` is where layers compute; embeddings and towers are put there too while samples enter. `unused`: stored tensors that
    no sample reaches, the output head's.
    """

    def __init__(self, root: Path, component: Component, scope: Scope, reader: Reader, device: torch.device) -> None:
        self.device = device
        self._reader = reader
        self._scope = scope
        self.model = _build(root / component.folder, component, scope)
        self._modules: dict[str, torch.nn.Module] = dict(self.model.named_modules())
        self._memory_name = _memory_names(self.model, component)
        self._layers_name = self._find_layers(component)
        self.layers: list[torch.nn.Module] = list(self.model.get_submodule(self._layers_name))
        self._layer_sources: list[dict[str, SourceTensor]] = [{} for _ in self.layers]
        self._resident_sources: dict[str, SourceTensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self.unused: list[SourceTensor] = []
        self._assign(component)
        self.layer_bytes = max(sum(_slot(t.spec) for t in sources.values()) for sources in self._layer_sources)
        self._slots: list[torch.Tensor] = []
        self._staging: torch.Tensor | None = None
        self._stream: torch.cuda.Stream | None = None

    def module(self, source_module: str) -> torch.nn.Module:
        """The module in memory that has the weight of a module of the source."""
        return self._modules[module_of(self._memory_name[f"{source_module}.weight"])]

    def around(self, source_module: str) -> torch.nn.Module:
        """The module that this one is a direct part of: the attention around k_proj."""
        return self._modules[module_of(module_of(self._memory_name[f"{source_module}.weight"]))]

    def load_resident(self, look: Callable[[SourceTensor, torch.Tensor], None] = lambda source, values: None) -> None:
        """Gives real weights to everything but decoder layers and output head, and computes buffers that no file holds.

        `look` is shown each tensor as it is stored.
        """
        for name, source in self._resident_sources.items():
            buffer = torch.empty(_slot(source.spec), dtype=torch.uint8, device=self.device)
            self._read(source, buffer)
            stored = typed(buffer, source.spec)
            look(source, stored)
            _set(self.model, name, stored.to(self._dtypes[name]))
        _fill_buffers(self.model, self.device)

    def drop_resident(self) -> None:
        """Frees them again; samples that wait at a decoder layer no longer need them."""
        for name, source in self._resident_sources.items():
            _set(self.model, name, blank(source.spec, self._dtypes[name]))

    def read_layer(self, index: int) -> torch.Tensor:
        """A layer's weights as bytes on `device`, in one of two buffers that are used in turn.

        Runs in a thread of its own while the layer before computes.
        """
        with self._aside():
            if not self._slots:
                self._slots = [torch.empty(self.layer_bytes, dtype=torch.uint8, device=self.device) for _ in range(2)]
            slot, at = self._slots[index % 2], 0
            for source in self._layer_sources[index].values():
                self._read(source, slot[at:])
                at += _slot(source.spec)
        return slot

    @contextlib.contextmanager
    def use_layer(
        self, index: int, slot: torch.Tensor, look: Callable[[SourceTensor, torch.Tensor], None] = lambda source, values: None
    ) -> Iterator[None]:
        """The layer has its weights, from what `read_layer` returned, until the block ends. `look`: see load_resident."""
        names, at = self._layer_sources[index], 0
        for name, source in names.items():
            stored = typed(slot[at:], source.spec)
            look(source, stored)
            # As transformers and vLLM load it: what is stored wider than the model computes, a norm in F32 say, is cast.
            _set(self.model, name, stored.to(self._dtypes[name]))
            at += _slot(source.spec)
        try:
            yield
        finally:
            for name, source in names.items():
                _set(self.model, name, blank(source.spec, self._dtypes[name]))
            if self.device.type == "cuda":  # the buffer is filled again while the next layer computes
                torch.cuda.current_stream(self.device).synchronize()

    def release(self) -> None:
        """Frees the layer buffers."""
        self._slots.clear()

    def _read(self, source: SourceTensor, target: torch.Tensor) -> None:
        """Reads a tensor's bytes into memory of the device: a GPU's piece by piece, through a pinned buffer."""
        nbytes = source.spec.nbytes
        if self.device.type != "cuda":
            self._reader.read_into(source, 0, raw(target)[:nbytes])
            return
        if self._staging is None:
            self._staging = torch.empty(STAGED, dtype=torch.uint8, pin_memory=True)
        for at in range(0, nbytes, STAGED):
            piece = self._staging[: min(STAGED, nbytes - at)]
            self._reader.read_into(source, at, raw(piece))
            target[at : at + len(piece)].copy_(piece, non_blocking=True)
            torch.cuda.current_stream(self.device).synchronize()

    def _aside(self) -> contextlib.AbstractContextManager[object]:
        """On a GPU a stream of its own, so that nothing here waits for a layer that computes, or takes memory it still reads."""
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(self._stream)

    def _find_layers(self, component: Component) -> str:
        for name, memory in self._memory_name.items():
            at = self._scope.layer_of(name)
            if at is not None:
                return memory.removesuffix(f".{at[0]}.{at[1]}")
        raise SourceError(f"no tensor of a decoder layer ({self._scope.layers}.N.*) in the checkpoint")

    def _assign(self, component: Component) -> None:
        """Every parameter and stored buffer gets its source once; a shape that disagrees with config.json is an error."""
        wanted = dict(self.model.named_parameters()) | {n: b for n, b in self.model.named_buffers() if n in self.model.state_dict()}
        head = _head_parameters(self.model)
        filled: set[str] = set()
        for name, tensor in component.tensors.items():
            memory = self._memory_name[name]
            if memory in head:  # stored beside tied embeddings too, where the model has no such parameter
                self.unused.append(tensor)
                continue
            if memory not in wanted:
                raise SourceError(f"{name}: stored, but the model that config.json describes has no {memory}")
            if memory in filled:
                raise SourceError(f"{name}: a second tensor for {memory}")
            if tuple(wanted[memory].shape) != tensor.spec.shape:
                expected = list(wanted[memory].shape)
                raise SourceError(f"{name}: shape {list(tensor.spec.shape)}, config.json calls for {expected}")
            filled.add(memory)
            self._dtypes[memory] = wanted[memory].dtype
            if memory.startswith(self._layers_name + "."):
                self._layer_sources[int(memory[len(self._layers_name) + 1 :].split(".")[0])][memory] = tensor
            else:
                self._resident_sources[memory] = tensor
        if empty := sorted(set(wanted) - filled - head):
            raise SourceError(f"{empty[0]}: no tensor of the checkpoint fills it ({len(empty)} such parameters)")


def _build(folder: Path, component: Component, scope: Scope) -> Any:
    """The model on `meta`. No code of the checkpoint is run, and a quantization_config that it may have is not looked at."""
    import transformers

    with quiet():
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model = getattr(transformers, scope.auto_class).from_config(config, dtype=_served_dtype(component, scope))
    return model.eval().requires_grad_(False)


def _served_dtype(component: Component, scope: Scope) -> torch.dtype:
    """The dtype in which vLLM serves the output, so that calibration sees the server's activations.

    vLLM 0.32.0 config/model.py _resolve_auto_dtype: float32 is served in bfloat16. So is what config.json leaves open, by
    transformers_utils/model_arch_config_convertor.py get_torch_dtype: the widest stored dtype decides, and scales are F32.
    """
    return torch.float16 if served_dtype(component.config, scope) == "float16" else torch.bfloat16


def _memory_names(model: Any, component: Component) -> dict[str, str]:
    """{stored name: name in memory}, by transformers' own mapping. Raises UnsupportedError where tensors would be merged."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    names = {}
    for name in component.tensors:
        names[name], merged = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if merged is not None:
            raise UnsupportedError(f"{name}: transformers merges it with others ({merged}); ckptq can't calibrate that yet")
    return names


def _head_parameters(model: Any) -> set[str]:
    """Names of the output head's parameters: each forward ends after the last decoder layer, so they stay on `meta`."""
    head = model.get_output_embeddings()
    if head is None:
        return set()
    name = next(n for n, m in model.named_modules() if m is head)
    return {f"{name}.{n}" for n, _ in head.named_parameters()}


def _fill_buffers(model: Any, device: torch.device) -> None:
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


def _slot(spec: TensorSpec) -> int:
    return -(-spec.nbytes // ALIGNMENT) * ALIGNMENT


def _set(model: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Puts a tensor in the place of a parameter or buffer. Tied uses follow, because modules share no storage here."""
    owner = model.get_submodule(module_of(name))
    leaf = name.rpartition(".")[2]
    if leaf in owner._parameters:
        owner._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the chatter of transformers off stdout and out of the warnings."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
