"""What vLLM 0.32.0's CPU build lacks to load quantized checkpoints, stood in for. Runs in the interpreter that has vLLM.

On any other device nothing of vLLM is touched.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

AS_GOOD = ("scaled_fp8_quant", "silu_and_mul_quant")
"""Those whose results are what the server's own would be."""
_CT_EXPERTS = "compressed_tensors.compressed_tensors_moe"
_EXPERT_METHODS = (
    "fp8", "modelopt", _CT_EXPERTS, f"{_CT_EXPERTS}.compressed_tensors_moe_w4a4_nvfp4", "quark.quark_moe", "online.fp8",
    "online.mxfp8", "online.nvfp4",
)  # fmt: skip


@contextmanager
def stand_in(used: list[str]) -> Iterator[None]:
    """On a CPU, stands in for what vLLM 0.32.0 has for GPUs alone, so that a checkpoint can be loaded here.

    scaled_fp8_quant    (_custom_ops.py): x / scale, clamped, to float8_e4m3fn, for fused linears whose shards differ in scale
    silu_and_mul_quant  (layers/fusion/fused_act_quant.py), which Llama's MLP calls before a linear of static FP8: the plain
                        activation, which that linear quantizes itself, as it does where nothing is fused
    linear kernels      vLLM's own emulations for NVFP4 and MXFP8. For FP8 blocks, MXFP4 and NVFP4 of weights alone, whose kernels
                        need a GPU, the dequantized weight times activations as they are
    FP8 MoE             no kernel: what its post-processing makes of weights and scales stays vLLM's
    NVFP4 MoE           the same, with the scales as vLLM's emulation takes them; of weights alone those that Marlin would repack

    Elsewhere it does nothing. `used` gets the names of those that were needed.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        yield
        return
    undo: list[Callable[[], None]] = []
    try:
        _stand_in_quant(used, undo)
        _stand_in_activation(used, undo)
        _stand_in_linears(used, undo)
        _stand_in_experts(used, undo)
        _stand_in_nvfp4_experts(used, undo)
        yield
    finally:
        for step in reversed(undo):
            step()


def _swap(undo: list[Callable[[], None]], owner: Any, name: str, value: Any) -> None:
    old = getattr(owner, name)
    setattr(owner, name, value)
    undo.append(lambda: setattr(owner, name, old))


def _swap_everywhere(undo: list[Callable[[], None]], real: Any, value: Any) -> None:
    """In every module of vLLM that has imported `real` by its name."""
    for module in [m for key, m in sys.modules.items() if key.startswith("vllm.") and vars(m).get(real.__name__) is real]:
        _swap(undo, module, real.__name__, value)


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


def _stand_in_activation(used: list[str], undo: list[Callable[[], None]]) -> None:
    import torch

    if hasattr(torch.ops._C, "silu_and_mul_quant"):
        return
    try:
        fusion = importlib.import_module("vllm.model_executor.layers.fusion.fused_act_quant")
    except ImportError:  # vLLM 0.26.0 fuses nothing there
        return
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticTensorSym

    def plain(x: Any, linear: Any) -> Any:
        _use(used, "silu_and_mul_quant")
        return SiluAndMul.forward_native(x)

    table, key = fusion._FUSED_ACT_QUANT, (SiluAndMul, kFp8StaticTensorSym)
    before = table.get(key)
    if before is not None:
        table[key] = plain
        undo.append(lambda: table.update({key: before}))


def _stand_in_linears(used: list[str], undo: list[Callable[[], None]]) -> None:
    """Each is called as the kernel of vLLM's that it is made from, and comes last, so that one that can run here is preferred."""
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.scaled_mm.pytorch import BlockWiseTorchFP8ScaledMMLinearKernel
    from vllm.platforms import PlatformEnum

    def standing_in(kernel: Any, values: Callable[[Any], Any] | None = None) -> Any:
        """`values` dequantizes a layer's weight where the kernel itself can't compute here: as it was loaded, packed no further."""

        def supported(cls: Any, compute_capability: int | None = None) -> tuple[bool, str | None]:
            return True, None

        def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
            _use(used, kernel.__name__)
            if values is None:
                kernel.__init__(self, config, *args, **kwargs)
            self.config = config

        def apply_weights(self: Any, layer: Any, x: Any, bias: Any = None, **kwargs: Any) -> Any:
            import torch

            assert values is not None
            return torch.nn.functional.linear(x, values(layer).to(x.dtype), bias)

        def process(self: Any, layer: Any) -> None:
            pass

        body: dict[str, Any] = {"is_supported": classmethod(supported), "__init__": init}
        if values is not None:
            body |= {"can_implement": classmethod(supported), "apply_weights": apply_weights}
            body |= {} if values is _blocks else {"process_weights_after_loading": process}
        return type(kernel.__name__, (kernel,), body)

    # For weights alone it is taken by its name, whatever the table has: here, and by modelopt.py of 0.26.0.
    importlib.import_module("vllm.model_executor.layers.quantization.modelopt")
    _swap_everywhere(undo, linear.MarlinNvFp4LinearKernel, standing_in(linear.MarlinNvFp4LinearKernel, _nvfp4))
    for table, kernel in (
        ("_POSSIBLE_FP8_BLOCK_KERNELS", standing_in(BlockWiseTorchFP8ScaledMMLinearKernel, _blocks)),
        ("_POSSIBLE_NVFP4_KERNELS", standing_in(linear.EmulationNvFp4LinearKernel)),
        ("_POSSIBLE_MXFP8_KERNELS", standing_in(linear.EmulationMxfp8LinearKernel)),
        ("_POSSIBLE_MXFP4_KERNELS", standing_in(linear.MarlinMxFp4LinearKernel, _mxfp4)),
    ):
        possible = getattr(linear, table)
        before = possible.get(PlatformEnum.CPU)
        possible[PlatformEnum.CPU] = [*(before or ()), kernel]

        def restore(possible: Any = possible, before: Any = before) -> None:
            possible.pop(PlatformEnum.CPU)
            if before is not None:
                possible[PlatformEnum.CPU] = before

        undo.append(restore)


def _blocks(layer: Any) -> Any:
    """F32 [n, k] of FP8 codes under a scale a block: weight_scale_inv in the native method, weight_scale in the others."""
    scale = getattr(layer, "weight_scale_inv", None)
    scale = layer.weight_scale if scale is None else scale
    (n, k), (down, across) = layer.weight.shape, getattr(layer, "weight_block_size", None) or (128, 128)
    return layer.weight.float() * scale.float().repeat_interleave(down, 0)[:n].repeat_interleave(across, 1)[:, :k]


def _nvfp4(layer: Any) -> Any:
    """F32 [n, k] of E2M1 codes under an E4M3 scale a group of 16 and one for all, which both methods make to multiply."""
    return _e2m1(layer.weight) * layer.weight_scale.float().repeat_interleave(16, 1) * layer.weight_global_scale.float()


def _mxfp4(layer: Any) -> Any:
    """F32 [n, k] of E2M1 codes under a power of two a group of 32."""
    return _e2m1(layer.weight) * (layer.weight_scale.float() - 127).exp2().repeat_interleave(32, 1)


def _e2m1(packed: Any) -> Any:
    """U8 [n, k / 2], the first of two codes in the low bits, as F32 [n, k]."""
    import torch

    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=packed.device)
    values = torch.cat([magnitudes, -magnitudes])
    return values[torch.stack([packed & 15, packed >> 4], -1).reshape(packed.shape[0], -1).long()]


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

    _swap_methods(undo, {select_fp8_moe_backend: choose, convert_to_fp8_moe_kernel_format: convert, make_fp8_moe_kernel: make})


def _stand_in_nvfp4_experts(used: list[str], undo: list[Callable[[], None]]) -> None:
    from vllm.model_executor.layers.fused_moe.oracle import nvfp4

    emulated, weights_alone = nvfp4.NvFp4MoeBackend.EMULATION, nvfp4.NvFp4MoeBackend.MARLIN
    choose, convert, make = nvfp4.select_nvfp4_moe_backend, nvfp4.convert_to_nvfp4_moe_kernel_format, nvfp4.make_nvfp4_moe_kernel
    no_kernel = SimpleNamespace(fused_experts=SimpleNamespace(process_weights_after_loading=lambda layer: None))

    def select_nvfp4_moe_backend(config: Any, weight_key: Any, activation_key: Any) -> Any:
        try:
            return choose(config=config, weight_key=weight_key, activation_key=activation_key)
        except NotImplementedError:
            _use(used, "NVFP4 MoE")
            return (weights_alone if activation_key is None else emulated), object

    def convert_to_nvfp4_moe_kernel_format(nvfp4_backend: Any, **kwargs: Any) -> Any:
        if nvfp4_backend != weights_alone:
            return convert(nvfp4_backend=nvfp4_backend, **kwargs)
        (w13, *w13_scales), (w2, *w2_scales) = ([kwargs[f"{w}{e}"] for e in ("", "_scale", "_scale_2")] for w in ("w13", "w2"))
        return w13, *w13_scales, None, w2, *w2_scales, None

    def make_nvfp4_moe_kernel(*args: Any, **kwargs: Any) -> Any:
        return no_kernel if kwargs["experts_cls"] is object else make(*args, **kwargs)

    _swap_methods(
        undo, {select_nvfp4_moe_backend: choose, convert_to_nvfp4_moe_kernel_format: convert, make_nvfp4_moe_kernel: make}
    )


def _swap_methods(undo: list[Callable[[], None]], swaps: Mapping[Any, Any]) -> None:
    """Everywhere, {ours: vLLM's}. Those that import them by name, before: one that is imported later would keep ours."""
    for method in _EXPERT_METHODS:
        importlib.import_module(f"vllm.model_executor.layers.quantization.{method}")
    for new, real in swaps.items():
        _swap_everywhere(undo, real, new)
