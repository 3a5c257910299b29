"""Qwen-Image-Edit: Qwen-Image's components, with images in the prompt."""

from pathlib import Path

from pipelines import Pipeline, qwen_image


def make(folder: Path, layers: int = 2, pipeline: str = "QwenImageEditPipeline", **config: object) -> None:
    """`pipeline`: "QwenImageEditPlusPipeline" for later releases, the last with zero_cond_t=True in the transformer's config."""
    from pipelines import parts

    qwen_image.make(folder, layers, **config)
    parts.qwen_processor(folder / "processor")
    parts.amend(folder, _class_name=pipeline, processor=["transformers", "Qwen2_5_VLProcessor"])


PIPELINE = Pipeline(make, ("transformer",), "QwenImageEditPipeline", "QwenImageEditPipeline")
