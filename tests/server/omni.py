"""What the real vLLM-Omni makes of pipelines' folders: the tests' side of omni_load.py."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm/bin/python"
OMNI = ROOT / ".venv-vllm/omni"
"""vllm_omni and what it imports: on the path of this process alone, for it registers itself with every vLLM that sees it."""


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear of the server's, by its module's name within the component.

    prefix   the name that patterns of the config are compared with
    method   the class that quantizes it: ModelOptLinearMethod, Fp8LinearMethod, UnquantizedLinearMethod, or torch's own Linear
    dtype    of its weight as loaded: "float8_e4m3fn", "bfloat16", "int8", ..
    written  all of its weight was
    scales   {weight_scale, input_scale, ..: its first values, None where one is as the server makes it: never written}
    process  what its post-processing raised, or None
    drift    by how much that has changed what the weight stands for, in root mean square and relative: up to 0.03 where the shards
             of a fused linear get one scale. None where there is nothing to compare
    """

    prefix: str
    method: str
    dtype: str
    shape: tuple[int, ...]
    written: bool
    scales: Mapping[str, Sequence[float] | None]
    process: str | None
    drift: float | None

    @property
    def quantized(self) -> bool:
        return self.method != "Linear" and not self.method.startswith("Unquantized")

    @property
    def missing(self) -> tuple[str, ...]:
        """What nothing wrote, of weight and scales."""
        return (*(() if self.written else ("weight",)), *(name for name, values in self.scales.items() if values is None))


@dataclass(frozen=True, slots=True)
class Component:
    """A folder that the server loads weights from; those it leaves to transformers or diffusers are none.

    class_       the server's
    adapter      the ModelOpt adapter is between the files and the class
    dequantized  stored tensors that it turned into full precision
    linears      {module: Linear}
    unwritten    parameters, by name, with an element that nothing wrote
    unread       stored tensors that went into no parameter
    parameters   {parameter: the stored tensors that it was written from}
    """

    class_: str
    adapter: bool
    dequantized: tuple[str, ...]
    linears: Mapping[str, Linear]
    unwritten: tuple[str, ...]
    unread: tuple[str, ...]
    parameters: Mapping[str, Sequence[str]]

    @property
    def quantized(self) -> dict[str, Linear]:
        return {name: linear for name, linear in self.linears.items() if linear.quantized}


@dataclass(frozen=True, slots=True)
class Loaded:
    """`stage`: config, create, load, process or done, where it ended. `error`: "TypeError: ..", or None."""

    stage: str
    error: str | None
    pipeline: str | None
    quantization: str | None
    components: Mapping[str, Component]

    @property
    def missing(self) -> list[str]:
        """ "component/module.weight_scale" of every quantized linear's that nothing wrote."""
        return [
            f"{folder}/{name}.{leaf}"
            for folder, component in self.components.items()
            for name, linear in component.quantized.items()
            for leaf in linear.missing
        ]


def load(folders: Iterable[Path], **settings: Any) -> dict[Path, Loaded]:
    """One after the other, in a process that stays for the next ones.

    `settings` are OmniDiffusionConfig's: quantization_config="fp8" for the server's `--quantization fp8`.
    """
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    loaded = {}
    for folder in folders:
        print(json.dumps([str(folder), settings]), file=server.stdin, flush=True)
        line = server.stdout.readline()
        assert line, f"vLLM-Omni died of {folder}"
        loaded[folder] = _loaded(json.loads(line))
    return loaded


@cache
def _server() -> subprocess.Popen[str]:
    command = [PYTHON, "-W", "ignore", ROOT / "tests/server/omni_load.py"]
    environment = {**os.environ, "PYTHONPATH": str(OMNI)}
    pipe = subprocess.PIPE
    server = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=environment, text=True)
    atexit.register(_end, server)
    return server


def _end(server: subprocess.Popen[str]) -> None:
    with server:
        server.kill()


def _loaded(line: Mapping[str, Any]) -> Loaded:
    assert not line.get("problems"), line["problems"]
    error = line["error"] and f"{line['error']['type']}: {line['error']['message']} ({line['error']['where']})"
    components = {folder: _component(of) for folder, of in line["components"].items()}
    return Loaded(line["stage"], error, line["pipeline"], line["quantization"], components)


def _component(of: Mapping[str, Any]) -> Component:
    linears = {name: Linear(**{**linear, "shape": tuple(linear["shape"])}) for name, linear in of["linears"].items()}
    named = {"dequantized": tuple(of["dequantized"]), "unwritten": tuple(of["unwritten"]), "unread": tuple(of["unread"])}
    return Component(of["class"], of["adapter"], linears=linears, parameters=of["parameters"], **named)
