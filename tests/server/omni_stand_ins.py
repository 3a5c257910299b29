"""What the real vLLM-Omni 0.30.0 needs to load pipelines beside this vLLM and without a GPU. Runs in the interpreter that has them.

the package    its `__init__` imports servers of language models and patches vLLM 0.30 from within; here it is its folder alone
MISSING        packages that its modules import, and that no load of weights uses: caches of blocks, video files, tables, configs
a platform     for the CPU, which it has none of: gloo, torch's attention
INT8, MXFP     its methods that serve on GPUs and on NPUs: their tensors are made and loaded as there, INT8's post-processed by the
               kernel of GPUs, those of NPUs not at all, which is torch_npu's
Z-Image        its pipeline makes the transformer with the published sizes, whatever config.json says: here with the folder's
BAGEL          the same of its VAE: here a small one
HunyuanImage-3 its config is code that the hub has beside the weights; here vLLM-Omni's own class of it
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

MISSING = ("av", "cache_dit", "omegaconf", "prettytable")
ATTENTION = "vllm_omni.diffusion.attention.backends.sdpa.SDPABackend"


class Anything(type):
    """Classes that have every attribute."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})


class Absent(ModuleType):
    """A package that has every module and every class."""

    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})


class Absence:
    """Finds the packages of MISSING where nothing else does."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> Any:
        return importlib.machinery.ModuleSpec(name, Absence, is_package=True) if name.split(".")[0] in MISSING else None

    @staticmethod
    def create_module(spec: Any) -> ModuleType:
        return Absent(spec.name)

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        pass


def install() -> None:
    """Before anything of vllm_omni is imported. Raises ImportError where it isn't on the path."""
    found = importlib.util.find_spec("vllm_omni")
    if found is None or not found.submodule_search_locations:
        raise ImportError("vllm_omni is not on the path")
    sys.meta_path.append(Absence)  # type: ignore[arg-type]
    sys.modules["vllm_omni"] = package = ModuleType("vllm_omni")
    package.__path__ = [*found.submodule_search_locations]

    from vllm_omni import platforms
    from vllm_omni.platforms.interface import UnspecifiedOmniPlatform

    class CpuPlatform(UnspecifiedOmniPlatform):
        dist_backend = "gloo"

        @classmethod
        def get_device_count(cls) -> int:
            return 1

        @classmethod
        def set_device(cls, device: Any) -> None:
            pass

        @classmethod
        def is_initialized(cls) -> bool:
            return False

        @classmethod
        def get_diffusion_attn_backend_cls(cls, *args: Any, **kwargs: Any) -> str:
            return ATTENTION

    platforms._current_omni_platform = CpuPlatform()

    # After the platform, which they ask when they are imported.
    from vllm_omni.quantization import int8_config, mxfp4_config, mxfp8_config

    class Gpu(CpuPlatform):
        def is_cuda(self) -> bool:
            return True

    class Npu(CpuPlatform):
        def is_npu(self) -> bool:
            return True

    from vllm.model_executor.kernels import linear
    from vllm.platforms import PlatformEnum

    class OnGpu(linear.CutlassInt8ScaledMMLinearKernel):  # type: ignore[misc]
        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            return True, None

    linear._POSSIBLE_INT8_KERNELS[PlatformEnum.CPU] = [OnGpu]
    int8_config.current_omni_platform = Gpu()
    mxfp4_config.current_omni_platform = mxfp8_config.current_omni_platform = Npu()


@contextmanager
def of_folder(config: Any) -> Iterator[None]:
    """What these pipelines take from elsewhere, from the folder of a tiny one."""
    swaps: list[tuple[Any, str, Any]] = []
    if config.model_class_name == "ZImagePipeline":
        from vllm_omni.diffusion.models.z_image import pipeline_z_image
        from vllm_omni.diffusion.utils.tf_utils import get_transformer_config_kwargs

        real: Any = pipeline_z_image.ZImageTransformer2DModel
        sized = partial(real, **get_transformer_config_kwargs(config.tf_model_config, real))
        swaps = [(pipeline_z_image, "ZImageTransformer2DModel", sized)]
    elif "HunyuanImage3" in (config.model_class_name or ""):
        from vllm_omni.diffusion.models.hunyuan_image3 import hunyuan_image3_transformer, pipeline_hunyuan_image3

        def get_config(model: str, **kwargs: Any) -> Any:
            return hunyuan_image3_transformer.HunyuanImage3Config.from_pretrained(model)

        swaps = [(pipeline_hunyuan_image3, "get_config", get_config)]
    elif config.model_class_name == "BagelPipeline":
        from vllm_omni.diffusion.models.bagel import pipeline_bagel

        published = pipeline_bagel.default_ae_params
        swaps = [(pipeline_bagel, "default_ae_params", lambda: replace(published(), ch=32, ch_mult=[1, 1], num_res_blocks=1))]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in swaps]
    for owner, name, value in swaps:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


@contextmanager
def surroundings(config: Any, scratch: Path) -> Iterator[None]:
    """As OMNI/diffusion/worker/diffusion_worker.py `init_device` and `load_model` make them; the groups once a process."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm_omni.diffusion.distributed import parallel_state
    from vllm_omni.diffusion.forward_context import set_forward_context
    from vllm_omni.diffusion.vllm_config import create_diffusion_vllm_config

    vllm_config = create_diffusion_vllm_config(torch.device("cpu"), config)
    with set_forward_context(vllm_config=vllm_config, omni_diffusion_config=config), set_current_vllm_config(vllm_config):
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.init_distributed_environment(1, 0, f"file://{scratch}/group", 0)
            parallel_state.initialize_model_parallel(1, 1, 1)
        yield
