"""What vLLM 0.32.0's CPU build lacks to load FP8 checkpoints, stood in for. Runs in the interpreter that has vLLM.

On any other device nothing of vLLM is touched.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_EXPERT_METHODS = ("fp8", "modelopt", "compressed_tensors.compressed_tensors_moe", "quark.quark_moe", "online.fp8", "online.mxfp8")


@contextmanager
def stand_in(used: list[str]) -> Iterator[None]:
    """On a CPU, stands in for what vLLM 0.32.0 has for GPUs alone, so that a checkpoint can be loaded here.

    scaled_fp8_quant  (_custom_ops.py): x / scale, clamped, to float8_e4m3fn, which fused linears need whose shards differ in scale
    linear kernels    vLLM's own emulations for NVFP4 and MXFP8, and its torch kernel for FP8 blocks, which loads but can't compute
    FP8 MoE           no kernel: what its post-processing makes of weights and scales stays vLLM's

    Elsewhere it does nothing. `used` gets the names of those that were needed.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        yield
        return
    undo: list[Callable[[], None]] = []
    try:
        _stand_in_quant(used, undo)
        _stand_in_linears(used, undo)
        _stand_in_experts(used, undo)
        yield
    finally:
        for step in reversed(undo):
            step()


def _swap(undo: list[Callable[[], None]], owner: Any, name: str, value: Any) -> None:
    old = getattr(owner, name)
    setattr(owner, name, value)
    undo.append(lambda: setattr(owner, name, old))


def _use(used: list[str], name: str) -> None:
    if name not in used:
        used.append(name)


def _stand_in_quant(used: list[str], undo: list[Callable[[], None]]) -> None:
    import torch
    from vllm import _custom_ops

    real = _custom_ops.scaled_fp8_quant

    def scaled_fp8_quant(input: Any, scale: Any = None, *args: Any, **kwargs: Any) -> Any:
        if scale is None or scale.numel() != 1 or args or kwargs:
            return real(input, scale, *args, **kwargs)
        _use(used, "scaled_fp8_quant")
        limit = torch.finfo(torch.float8_e4m3fn).max
        return (input.float() / scale.float()).clamp(-limit, limit).to(torch.float8_e4m3fn), scale

    _swap(undo, _custom_ops, "scaled_fp8_quant", scaled_fp8_quant)


def _stand_in_linears(used: list[str], undo: list[Callable[[], None]]) -> None:
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.scaled_mm.pytorch import BlockWiseTorchFP8ScaledMMLinearKernel
    from vllm.platforms import PlatformEnum

    def standing_in(kernel: Any) -> Any:
        def supported(cls: Any, compute_capability: int | None = None) -> tuple[bool, str | None]:
            return True, None

        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            _use(used, kernel.__name__)
            kernel.__init__(self, *args, **kwargs)

        return type(kernel.__name__, (kernel,), {"is_supported": classmethod(supported), "__init__": init})

    for table, kernel in (
        ("_POSSIBLE_FP8_BLOCK_KERNELS", BlockWiseTorchFP8ScaledMMLinearKernel),
        ("_POSSIBLE_NVFP4_KERNELS", linear.EmulationNvFp4LinearKernel),
        ("_POSSIBLE_MXFP8_KERNELS", linear.EmulationMxfp8LinearKernel),
    ):
        possible = getattr(linear, table)
        before = possible.get(PlatformEnum.CPU)
        possible[PlatformEnum.CPU] = [*(before or ()), standing_in(kernel)]

        def restore(possible: Any = possible, before: Any = before) -> None:
            possible.pop(PlatformEnum.CPU)
            if before is not None:
                possible[PlatformEnum.CPU] = before

        undo.append(restore)


def _stand_in_experts(used: list[str], undo: list[Callable[[], None]]) -> None:
    from vllm.model_executor.layers.fused_moe.oracle import fp8

    nothing = fp8.Fp8MoeBackend.NONE
    choose, convert, make = fp8.select_fp8_moe_backend, fp8.convert_to_fp8_moe_kernel_format, fp8.make_fp8_moe_kernel

    def select_fp8_moe_backend(*args: Any, **kwargs: Any) -> Any:
        backend, experts = choose(*args, **kwargs)
        if backend == nothing:
            _use(used, "FP8 MoE")
        return backend, object if backend == nothing else experts

    def convert_to_fp8_moe_kernel_format(fp8_backend: Any, layer: Any, **kwargs: Any) -> Any:
        if fp8_backend != nothing:
            return convert(fp8_backend=fp8_backend, layer=layer, **kwargs)
        return kwargs["w13"], kwargs["w2"], kwargs["w13_scale"], kwargs["w2_scale"]

    def make_fp8_moe_kernel(*args: Any, **kwargs: Any) -> Any:
        return None if kwargs["experts_cls"] is object else make(*args, **kwargs)

    # Those that import them by name, before: one that is imported later would keep ours.
    for method in _EXPERT_METHODS:
        importlib.import_module(f"vllm.model_executor.layers.quantization.{method}")
    swaps = {select_fp8_moe_backend: choose, convert_to_fp8_moe_kernel_format: convert, make_fp8_moe_kernel: make}
    for new, real in swaps.items():
        for module in [m for name, m in sys.modules.items() if name.startswith("vllm.")]:
            if vars(module).get(new.__name__) is real:
                _swap(undo, module, new.__name__, new)
