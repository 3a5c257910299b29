"""FLUX.2 klein: FLUX.2's blocks with Qwen3 for a text encoder and without an embedding of the guidance."""

from pathlib import Path

from pipelines import Pipeline


def make(folder: Path, layers: int = 2, single_layers: int = 2) -> None:
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel

    from pipelines import parts

    transformer = Flux2Transformer2DModel(
        in_channels=64,
        num_layers=layers,
        num_single_layers=single_layers,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=96,
        timestep_guidance_channels=32,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(block_out_channels=(8, 8, 16, 16), layers_per_block=1, latent_channels=16, norm_num_groups=4)
    Flux2KleinPipeline(
        scheduler=parts.shifting_scheduler(),
        vae=parts.filled(vae, seed=2),
        text_encoder=parts.qwen3(hidden=32, layers=30),
        tokenizer=parts.tokenizer(),
        transformer=parts.filled(transformer),
        is_distilled=True,
    ).save_pretrained(folder)


PIPELINE = Pipeline(make, ("transformer",), "Flux2KleinPipeline", "Flux2KleinPipeline")
