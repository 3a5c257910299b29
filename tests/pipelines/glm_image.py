"""GLM-Image: one stream of text and image, conditioned on tokens that a language model wrote.

The files of its processor stand for those of the class, which wants torchvision: diffusers' pipeline runs here without it and the
language model, given `prior_token_ids`.
"""

from pathlib import Path

from pipelines import Pipeline


def make(folder: Path, layers: int = 2, heads: int = 2) -> None:
    from diffusers import GlmImageTransformer2DModel
    from transformers import ByT5Tokenizer

    from pipelines import parts

    transformer = GlmImageTransformer2DModel(
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=heads,
        text_embed_dim=64,
        time_embed_dim=32,
        condition_dim=16,
        prior_vq_quantizer_codebook_size=64,
    )
    parts.filled(transformer).save_pretrained(folder / "transformer")
    parts.kl_vae().save_pretrained(folder / "vae")
    parts.t5("T5").save_pretrained(folder / "text_encoder")
    ByT5Tokenizer().save_pretrained(folder / "tokenizer")
    parts.scheduler().save_pretrained(folder / "scheduler")
    parts.glm_image_writer().save_pretrained(folder / "vision_language_encoder")
    parts.qwen_processor(folder / "processor")
    components = {
        "processor": ("transformers", "GlmImageProcessor"),
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
        "text_encoder": ("transformers", "T5EncoderModel"),
        "tokenizer": ("transformers", "ByT5Tokenizer"),
        "transformer": ("diffusers", "GlmImageTransformer2DModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "vision_language_encoder": ("transformers", "GlmImageForConditionalGeneration"),
    }
    parts.index(folder, "GlmImagePipeline", components)


PIPELINE = Pipeline(make, ("transformer",), "GlmImagePipeline", "GlmImagePipeline")
