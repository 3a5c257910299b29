"""Qwen-Image: blocks of two streams, text and image."""

from pathlib import Path

from pipelines import Pipeline


def make(folder: Path, layers: int = 2, heads: int = 2, **config: object) -> None:
    """With heads of 32 dimensions. `config`: more of the transformer's."""
    from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

    from pipelines import parts

    transformer = QwenImageTransformer2DModel(
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=32,
        joint_attention_dim=64,
        axes_dims_rope=(8, 12, 12),
        **config,
    )
    QwenImagePipeline(
        scheduler=parts.shifting_scheduler(),
        vae=parts.qwen_vae(),
        text_encoder=parts.qwen2_5_vl(),
        tokenizer=parts.tokenizer(),
        transformer=parts.filled(transformer),
    ).save_pretrained(folder)


PIPELINE = Pipeline(make, ("transformer",), "QwenImagePipeline", "QwenImagePipeline")
