"""FLUX.2: blocks of two streams, then blocks of one whose attention and feed-forward share their linears."""

from pathlib import Path

from pipelines import Pipeline


def make(folder: Path, layers: int = 2, single_layers: int = 2, heads: int = 2) -> None:
    from diffusers import AutoencoderKLFlux2, Flux2Pipeline, Flux2Transformer2DModel

    from pipelines import parts

    transformer = Flux2Transformer2DModel(
        in_channels=64,
        num_layers=layers,
        num_single_layers=single_layers,
        attention_head_dim=32,
        num_attention_heads=heads,
        joint_attention_dim=96,
        timestep_guidance_channels=32,
        axes_dims_rope=(8, 8, 8, 8),
    )
    vae = AutoencoderKLFlux2(block_out_channels=(8, 8, 16, 16), layers_per_block=1, latent_channels=16, norm_num_groups=4)
    Flux2Pipeline(
        scheduler=parts.shifting_scheduler(),
        vae=parts.filled(vae, seed=2),
        text_encoder=parts.mistral3(),
        tokenizer=parts.tokenizer(),
        transformer=parts.filled(transformer),
    ).save_pretrained(folder)
    parts.pixtral_processor(folder / "tokenizer")


PIPELINE = Pipeline(make, ("transformer",), "Flux2Pipeline", "Flux2Pipeline")
