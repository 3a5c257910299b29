"""The class of diffusers or transformers that a component's config.json names, and what it makes of the stored weights.

The class is built on `meta`, from config.json alone: no weights are read, and no code of the checkpoint's own runs. It is built
in a process of its own, because both libraries take more memory than what converts a checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ckptq import errors
from ckptq.checkpoint import Component, SourceTensor, TensorSpec
from ckptq.errors import CkptqError, SourceError, UnsupportedError
from ckptq.folder import printable
from ckptq.plan import module_of
from ckptq.scopes import MOST_LAYERS

_KEEP = "name the component `keep`"


def kinds(component: Component) -> dict[str, str]:
    """{stored weight: what holds it}: "Linear", "Conv1d", "Conv2d", "Conv3d", or why it is none of them: "Embedding", "LayerNorm".

    A linear that shares its weight with an embedding is one. The dict has the stored tensors called `<module>.weight`.
    Raises UnsupportedError where no class can be built, SourceError for a weight of another shape than the class has.
    """
    library = "diffusers" if "_class_name" in component.config else "transformers"
    return _kinds(component) if library in sys.modules else _asked(component)


def _asked(component: Component) -> dict[str, str]:
    specs = {name: (t.spec.dtype, t.spec.shape) for name, t in component.tensors.items() if name.endswith(".weight")}
    body = json.dumps({"folder": component.folder, "config": dict(component.config), "tensors": specs})
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-W", "ignore", "-m", __name__]
    done = subprocess.run(  # noqa: S603  our own module
        command, input=body, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    try:
        found = json.loads(done.stdout)
    except ValueError:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}") from None
    if isinstance(found, list):
        kind, message, hint = found
        raise getattr(errors, kind)(message, hint=hint)
    return {str(name): str(kind) for name, kind in found.items()}


def main() -> None:
    """The other process: a component on stdin, its `kinds` on stdout, or [error's class, message, hint]."""
    told = sys.stdout
    sys.stdout = sys.stderr
    asked = json.load(sys.stdin)
    tensors = {n: SourceTensor(TensorSpec(n, dtype, tuple(shape)), "", 0) for n, (dtype, shape) in asked["tensors"].items()}
    try:
        found: object = _kinds(Component(asked["folder"], "", asked["config"], tensors, (), (), ()))
    except CkptqError as error:
        found = [type(error).__name__, str(error), error.hint]
    json.dump(found, told)


def _kinds(component: Component) -> dict[str, str]:
    import torch

    model = build(component)
    place = _places(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    found = {}
    for name, tensor in component.tensors.items():
        if not name.endswith(".weight"):
            continue
        at = place(name)
        if (parameter := parameters.get(at)) is None:
            found[name] = f"not in {type(model).__name__}"
            continue
        if parameter.shape != tensor.spec.shape:
            shapes = f"shape {list(tensor.spec.shape)}, config.json calls for {list(parameter.shape)}"
            raise SourceError(f"{printable(name)}: {shapes}", hint="fetch the checkpoint again")
        module = model.get_submodule(module_of(at))
        found[name] = "Embedding" if id(parameter) in embedded else _kind(module)
    return found


def _kind(module: Any) -> str:
    from torch import nn

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return next((kind.__name__ for kind in kinds if isinstance(module, kind)), type(module).__name__)


def build(component: Component) -> Any:
    """The model, all of it on `meta`. Raises UnsupportedError where neither library has its class, or it can't be built."""
    import torch

    from ckptq.streamed import quiet

    if endless := next((key for key, count in _counts(component.config) if count > MOST_LAYERS), None):
        raise UnsupportedError(f"{_of(component)}: {endless} is above {MOST_LAYERS}", hint=_KEEP)
    cls = find_class(component)
    try:
        with quiet(), torch.device("meta"):
            if hasattr(cls, "load_config"):  # diffusers
                return cls.from_config(dict(component.config))
            model = cls(cls.config_class.from_dict(dict(component.config)))
            model.tie_weights()
            return model
    except Exception as problem:  # the libraries raise anything at a config.json that they can't use
        told = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise UnsupportedError(f"{_of(component)}: {cls.__name__} can't be built: {told:.300}", hint=_KEEP) from problem


def find_class(component: Component) -> Any:
    """The class that config.json names: `_class_name` of diffusers', `architectures` of transformers' models."""
    config = component.config
    said = config.get("architectures")
    names = [config["_class_name"]] if "_class_name" in config else said if isinstance(said, list) else []
    name = names[0] if len(names) == 1 and isinstance(names[0], str) else ""
    library, base = ("diffusers", "ModelMixin") if "_class_name" in config else ("transformers", "PreTrainedModel")
    if not name.isidentifier():
        raise UnsupportedError(f"{_of(component)}: config.json names no class, so nothing says what is a linear in it", hint=_KEEP)
    try:
        import importlib

        module = importlib.import_module(library)
        cls = getattr(module, name, None)
        known = isinstance(cls, type) and issubclass(cls, getattr(module, base))
    except ImportError as problem:
        raise UnsupportedError(
            f"{_of(component)}: {name} can't be had: {printable(str(problem).splitlines()[0])}",
            hint="install ckptq[diffusion], which has diffusers",
        ) from problem
    if not known:
        what = f"{printable(name)} is no model of {library} {module.__version__}"
        raise UnsupportedError(f"{_of(component)}: {what}, so nothing says what is a linear in it", hint=_KEEP)
    return cls


def _places(model: Any) -> Any:
    """A function: stored name -> the parameter that the library fills with it."""
    if not hasattr(model, "base_model_prefix"):
        return str
    # transformers 5.17.0 core_model_loading.py rename_source_key; what it computes on the way has another name here and so stays.
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()

    def place(name: str) -> str:
        at, merged = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        return "" if merged is not None else str(at)

    return place


def _counts(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """What config.json counts and a model is built by, in any section: nobody shall be made to build a million layers."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _counts(value)
        for number in value if isinstance(value, list) else (value,):
            if isinstance(number, int) and re.search("(layers?|depth|blocks?|experts)$", key):
                yield key, number


def _of(component: Component) -> str:
    return component.folder or "the checkpoint"


if __name__ == "__main__":
    main()
