"""What vLLM 0.32.0's CPU build lacks to load FP8 checkpoints of every kind, in torch. Runs under the interpreter that has vLLM.

    import standins; standins.install()     # before a model is made

Parameters, loaders, and what is made of them after loading (which scale wins, what is quantized again) stay vLLM's own. Ours are
three pieces of arithmetic at the places where vLLM chooses among devices:

    requantize  the operator that quantizes to FP8 under a given scale, which requantize_with_max_scale and
                process_fp8_weight_tensor_strategy_moe call on shards that differ in scale
    block       the product of 128x128 blocks; the input's quantization and the weight's processing are vLLM's, as on a GPU
    moe         the product of the experts, with their inputs left in BF16. vLLM's Triton backend is named as the one that runs it,
                because that one takes the weights as they were loaded and processed

The AMX kernels are taken out, so that a CPU that has them loads by the same path: they would repack weights.
Generating works with all three; how well is not to be judged by it, because experts see inputs that are not quantized.
"""

from __future__ import annotations

import os
from typing import Any

import torch

E4M3_MAX = 448.0


def install() -> None:
    """Puts all three in place, for the life of the process. Once is enough, twice does no harm."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import _custom_ops

    if not hasattr(_custom_ops.scaled_fp8_quant, "stands_in"):
        requantize()
        linears()
        experts()


def requantize() -> None:
    """For one scale and nothing else: whatever else vLLM asks of scaled_fp8_quant goes to its own.

    csrc/quantization/w8a8/fp8/common.cuh scaled_fp8_conversion: a float32 product with the scale's reciprocal, clamped.
    """
    from vllm import _custom_ops

    own = _custom_ops.scaled_fp8_quant

    def scaled_fp8_quant(input: torch.Tensor, scale: torch.Tensor | None = None, *args: Any, **more: Any) -> Any:
        if scale is None or scale.numel() != 1 or args or any(value is not None for value in more.values()):
            return own(input, scale, *args, **more)
        product = input.float() * (1.0 / scale.float())
        return product.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale

    scaled_fp8_quant.stands_in = True  # type: ignore[attr-defined]
    _custom_ops.scaled_fp8_quant = scaled_fp8_quant


def linears() -> None:
    """vLLM's choice of kernels for a CPU: those in torch, which are its own, and ours for blocks."""
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel
    from vllm.platforms import PlatformEnum

    class BlockStandIn(Fp8BlockScaledMMLinearKernel):
        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            return True, None

        def apply_block_scaled_mm(self, A: torch.Tensor, B: torch.Tensor, As: torch.Tensor, Bs: torch.Tensor) -> torch.Tensor:
            inputs = spread(A, As, (1, A.shape[1] // As.shape[1]))
            return inputs @ spread(B, Bs, tuple(self.weight_group_shape)).t()

    linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU] = [BlockStandIn]
    linear._POSSIBLE_FP8_KERNELS[PlatformEnum.CPU] = [
        linear.PerTensorTorchFP8ScaledMMLinearKernel,
        linear.ChannelWiseTorchFP8ScaledMMLinearKernel,
    ]


def experts() -> None:
    """For FP8 experts vLLM gets one kernel to choose, ours."""
    from vllm.model_executor.layers.fused_moe import modular_kernel as mk
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation, apply_moe_activation
    from vllm.model_executor.layers.fused_moe.oracle import fp8
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP

    class ExpertsStandIn(mk.FusedMoEExpertsModular):
        expects_unquantized_inputs = True

        @staticmethod
        def is_supported_config(*_: Any) -> tuple[bool, str | None]:
            return True, None

        @staticmethod
        def activation_format() -> mk.FusedMoEActivationFormat:
            return mk.FusedMoEActivationFormat.Standard

        def workspace_shapes(self, M: int, N: int, K: int, *_: Any) -> tuple[tuple[int, ...], ...]:
            return (0,), (0,), (M, K)

        def finalize_weight_and_reduce_impl(self) -> Any:
            return TopKWeightAndReduceNoOP()

        def apply(
            self,
            output: torch.Tensor,
            hidden_states: torch.Tensor,
            w1: torch.Tensor,
            w2: torch.Tensor,
            topk_weights: torch.Tensor,
            topk_ids: torch.Tensor,
            activation: MoEActivation,
            *_: Any,
            **__: Any,
        ) -> None:
            gate_up, down = (self.dequantized(w, s) for w, s in ((w1, self.w1_scale), (w2, self.w2_scale)))
            total = torch.zeros_like(output, dtype=torch.float32)
            for expert in topk_ids.unique().tolist():
                rows, places = (topk_ids == expert).nonzero(as_tuple=True)
                both = hidden_states[rows].float() @ gate_up[expert].t()
                inner = torch.empty(len(rows), both.shape[1] // 2)
                apply_moe_activation(activation, inner, both)
                total.index_add_(0, rows, (inner @ down[expert].t()) * topk_weights[rows, places, None])
            output.copy_(total)

        def dequantized(self, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
            """float32 [experts, out, in]; scales one an expert, one a row, or one a block."""
            assert scale is not None
            scale = scale.reshape(len(weight), *scale.shape[1:], *[1] * (3 - scale.ndim))
            block = self.block_shape
            return torch.stack([spread(w, s, (block[0], block[1])) if block else w.float() * s for w, s in zip(weight, scale)])

    for unasked in ("current_device", "no_act_and_mul", "quant_scheme", "activation", "parallel_config"):
        setattr(ExpertsStandIn, f"_supports_{unasked}", staticmethod(lambda *_: True))
    ExpertsStandIn.__abstractmethods__ = frozenset()
    fp8.backend_to_kernel_cls = lambda backend: [ExpertsStandIn] if backend is fp8.Fp8MoeBackend.TRITON else []


def spread(codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """codes [rows, columns] times the scale of their block, scales [ceil(rows / block[0]), ceil(columns / block[1])], in float32."""
    wide = scales.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return codes.float() * wide[: codes.shape[0], : codes.shape[1]]
