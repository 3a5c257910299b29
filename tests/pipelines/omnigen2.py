"""OmniGen2: blocks of Lumina 2's kind, and a refiner for each of text, image and reference images.

diffusers has no class of it. Its own code names its modules as diffusers' Lumina 2 does, whose blocks the transformer here has.
"""

from pathlib import Path
from typing import Any

from pipelines import Pipeline


def make(folder: Path, layers: int = 2, hidden: int = 72, multiple_of: int = 32) -> None:
    """72 is no multiple of 16, as the published 2520 is none, for the same reason: three heads of 24."""
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.configuration_utils import register_to_config
    from diffusers.models.normalization import LuminaLayerNormContinuous
    from diffusers.models.transformers.transformer_lumina2 import Lumina2CombinedTimestepCaptionEmbedding, Lumina2TransformerBlock
    from torch import nn

    from pipelines import parts

    class OmniGen2Transformer2DModel(ModelMixin, ConfigMixin):  # type: ignore[misc]
        @register_to_config  # type: ignore[untyped-decorator]
        def __init__(
            self, patch_size: int, in_channels: int, hidden_size: int, num_layers: int, num_refiner_layers: int,
            num_attention_heads: int, num_kv_heads: int, multiple_of: int, ffn_dim_multiplier: float | None, norm_eps: float,
            axes_dim_rope: list[int], axes_lens: list[int], text_feat_dim: int, timestep_scale: float,
        ) -> None:  # fmt: skip
            super().__init__()
            shape = (hidden_size, num_attention_heads, num_kv_heads, multiple_of, ffn_dim_multiplier, norm_eps)
            patch = patch_size**2 * in_channels

            def blocks(count: int, modulated: bool = True) -> Any:
                return nn.ModuleList(Lumina2TransformerBlock(*shape, modulation=modulated) for _ in range(count))

            self.x_embedder = nn.Linear(patch, hidden_size)
            self.ref_image_patch_embedder = nn.Linear(patch, hidden_size)
            self.time_caption_embed = Lumina2CombinedTimestepCaptionEmbedding(hidden_size, text_feat_dim, 256, norm_eps)
            self.noise_refiner, self.ref_image_refiner = blocks(num_refiner_layers), blocks(num_refiner_layers)
            self.context_refiner = blocks(num_refiner_layers, modulated=False)
            self.layers = blocks(num_layers)
            self.norm_out = LuminaLayerNormContinuous(
                hidden_size, min(hidden_size, 1024), elementwise_affine=False, eps=1e-6, bias=True, out_dim=patch
            )
            self.image_index_embedding = nn.Parameter(parts.torch.zeros(5, hidden_size))

    transformer = OmniGen2Transformer2DModel(
        patch_size=2, in_channels=16, hidden_size=hidden, num_layers=layers, num_refiner_layers=1, num_attention_heads=3,
        num_kv_heads=1, multiple_of=multiple_of, ffn_dim_multiplier=None, norm_eps=1e-5, axes_dim_rope=[hidden // 9] * 3,
        axes_lens=[64, 64, 64], text_feat_dim=64, timestep_scale=1000.0,
    )  # fmt: skip
    parts.filled(transformer).save_pretrained(folder / "transformer")
    parts.kl_vae().save_pretrained(folder / "vae")
    parts.qwen2_5_vl().save_pretrained(folder / "mllm")
    parts.qwen_processor(folder / "processor")
    parts.scheduler().save_pretrained(folder / "scheduler")
    components = {
        "mllm": ("transformers", "Qwen2_5_VLForConditionalGeneration"),
        "processor": ("transformers", "Qwen2_5_VLProcessor"),
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
        "transformer": ("transformer_omnigen2", "OmniGen2Transformer2DModel"),
        "vae": ("diffusers", "AutoencoderKL"),
    }
    parts.index(folder, "OmniGen2Pipeline", components)


PIPELINE = Pipeline(make, ("transformer",), "", "OmniGen2Pipeline")
