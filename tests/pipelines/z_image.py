"""Z-Image: one stream, after a refiner for each of image and text."""

from pathlib import Path

from pipelines import Pipeline


def make(folder: Path, layers: int = 2, dim: int = 96) -> None:
    """`dim` is a multiple of 48: then the feed-forward's, 8/3 of it, is one of 16."""
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    from pipelines import parts

    transformer = ZImageTransformer2DModel(
        dim=dim,
        n_layers=layers,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=64,
        axes_dims=[dim // 6, dim // 6, dim // 6],
        axes_lens=[1024, 64, 64],
    )
    ZImagePipeline(
        scheduler=parts.scheduler(),
        vae=parts.kl_vae(),
        text_encoder=parts.qwen3(),
        tokenizer=parts.tokenizer(),
        transformer=parts.filled(transformer),
    ).save_pretrained(folder)


PIPELINE = Pipeline(make, ("transformer",), "ZImagePipeline", "ZImagePipeline")
