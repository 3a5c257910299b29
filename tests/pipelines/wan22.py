"""Wan2.2: two transformers of one kind, for high noise and for low, parted at a timestep."""

from pathlib import Path

from pipelines import Pipeline


def make(folder: Path, layers: int = 2, heads: int = 2, ffn_dim: int = 128) -> None:
    from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    from pipelines import parts

    def transformer(seed: int) -> object:
        model = WanTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=32,
            text_dim=64,
            freq_dim=32,
            ffn_dim=ffn_dim,
            num_layers=layers,
            rope_max_seq_len=64,
        )
        return parts.filled(model, seed)

    WanPipeline(
        tokenizer=parts.t5_tokenizer(),
        text_encoder=parts.t5("UMT5"),
        vae=parts.wan_vae(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
        transformer=transformer(0),
        transformer_2=transformer(3),
        boundary_ratio=0.875,
    ).save_pretrained(folder)


PIPELINE = Pipeline(make, ("transformer", "transformer_2"), "WanPipeline", "WanPipeline")
