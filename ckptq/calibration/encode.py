"""One calibration sample -> the model's forward inputs, by the checkpoint's own tokenizer, processor and chat template.

Images are read as vLLM 0.32.0 multimodal/media/image.py does: turned by their EXIF orientation, transparency laid on white.
They are processed by transformers' PIL backend wherever this runs: the torchvision backend rounds differently, and amaxes
would depend on whether it is installed.

torch and transformers are imported where an Encoder is made, not with this file: `read_image` needs neither.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

from ckptq.calibration import Sample
from ckptq.errors import CalibrationError

if TYPE_CHECKING:
    import torch

_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


class Encoder:
    """Encodes samples with what lies in the checkpoint folder; nothing is fetched and no code of the checkpoint is run."""

    def __init__(self, folder: Path, max_pixels: int | None, sequence_length: int) -> None:
        """Raises CalibrationError where the checkpoint's tokenizer can't be loaded."""
        from transformers import AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self._folder = folder
        self._max_pixels = max_pixels
        self._sequence_length = sequence_length
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            # transformers 5.17 makes an empty tokenizer where the vocabulary's file is missing
            if not self._tokenizer("a", add_special_tokens=False)["input_ids"]:
                raise ValueError("its vocabulary is empty or missing")
        except Exception as error:
            raise CalibrationError(
                f"the tokenizer of {folder} can't be loaded: {error}",
                hint="the checkpoint must hold its tokenizer's files, such as tokenizer.json and tokenizer_config.json",
            ) from error

    def encode(self, sample: Sample) -> dict[str, torch.Tensor]:
        """The forward inputs of `sample`, unpadded.

        input_ids        [1, T] int64, T <= sequence_length: cut at the end, never inside the image's tokens
        attention_mask   [1, T] int64, all ones
        and with an image what the checkpoint's processor adds, for Qwen2.5-VL:
        pixel_values       [P, C] float32, P = t * h * w patches
        image_grid_thw     [1, 3] int64
        mm_token_type_ids  [1, T] int64, 1 for image tokens: rope positions follow from it

        Raises CalibrationError for an empty text, an image that can't be read or doesn't fit, and a checkpoint without a
        chat template or processor where the sample needs one.
        """
        if not sample.text.strip():
            raise CalibrationError(f"{sample.name}: its text is empty")
        if any("\ud800" <= char <= "\udfff" for char in sample.text + (sample.prompt or "")):
            raise CalibrationError(f"{sample.name}: its text is not valid Unicode: it holds half of a surrogate pair")
        if sample.image:
            inputs = self._encode_image(sample, sample.image)
        else:
            plain = sample.prompt is None
            text = sample.text if plain else self._render(sample, as_parts=self._has_processor)
            # a template writes its own special tokens
            encoded = self._tokenizer(text, add_special_tokens=plain, return_tensors="pt")
            inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        tokens = inputs["input_ids"].shape
        return {name: t[:, : self._sequence_length] if t.shape == tokens else t for name, t in inputs.items()}

    def _encode_image(self, sample: Sample, path: Path) -> dict[str, torch.Tensor]:
        processor = self._processor
        for token in processor.all_special_multimodal_tokens:
            if token in sample.text or token in (sample.prompt or ""):
                raise CalibrationError(f"{sample.name}: its text holds {token}, which the checkpoint reserves for images and such")
        image = read_image(path)
        text = self._render(sample, as_parts=True)
        try:
            encoded = processor(images=[image], text=[text], add_special_tokens=False, return_tensors="pt")
        except ValueError as error:
            raise CalibrationError(
                f"{path.name}: the checkpoint's processor refuses this image of {image.width} x {image.height} pixels: {error}",
                hint="take the image out of the calibration set",
            ) from error
        inputs = dict(encoded)
        (types,) = processor.create_mm_token_type_ids(inputs["input_ids"])
        if not any(types):
            raise CalibrationError(
                f"{sample.name}: the checkpoint's chat template leaves the image out",
                hint="calibrate it with source: text",
            )
        end = max(i for i, kind in enumerate(types) if kind) + 1
        if end > self._sequence_length:
            raise CalibrationError(
                f"{path.name}: its {sum(map(bool, types))} image tokens end at token {end}, after "
                f"calibration.sequence_length = {self._sequence_length}",
                hint=f"set calibration.sequence_length to {end} or more, or a lower calibration.max_pixels",
            )
        return inputs

    def _render(self, sample: Sample, *, as_parts: bool) -> str:
        """The conversation as the chat template writes it; processors' templates take content as a list of parts."""
        user = [{"type": "image"}] if sample.image else []
        if sample.prompt is not None:
            user.append({"type": "text", "text": sample.prompt})
        answer = [{"type": "text", "text": sample.text}]
        conversation = [
            {"role": "user", "content": user if as_parts else sample.prompt},
            {"role": "assistant", "content": answer if as_parts else sample.text},
        ]
        try:
            rendered = self._tokenizer.apply_chat_template(conversation, chat_template=self._template, tokenize=False)
        except CalibrationError:
            raise
        except Exception as error:  # jinja2's own, and whatever a template's expressions raise
            raise CalibrationError(f"{sample.name}: the checkpoint's chat template can't render it: {error}") from error
        return str(rendered)

    @cached_property
    def _has_processor(self) -> bool:
        return any((self._folder / name).is_file() for name in _PROCESSOR_FILES[:2])

    @cached_property
    def _processor_settings(self) -> dict[str, Any]:
        from transformers import ProcessorMixin

        settings: dict[str, Any] = ProcessorMixin.get_processor_dict(self._folder, local_files_only=True)[0]
        return settings

    @cached_property
    def _template(self) -> str:
        """The processor's template comes before the tokenizer's, as in vLLM 0.32.0 renderers/hf.py."""
        template = self._processor_settings.get("chat_template") or self._tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if not template:
            raise CalibrationError(
                f"{self._folder} has no chat template, and calibration samples with a prompt or an image need one",
                hint="add the model's chat_template.jinja to the folder, or calibrate with source: text or builtin",
            )
        return str(template)

    @cached_property
    def _processor(self) -> Any:
        if not self._has_processor:
            raise CalibrationError(
                f"{self._folder} has no image processor ({' or '.join(_PROCESSOR_FILES[:2])}), and the calibration samples "
                "have images",
                hint="calibrate a checkpoint without a vision tower with source: text or builtin",
            )
        try:
            return _build_processor(self._folder, self._tokenizer, self._processor_settings, self._max_pixels)
        except CalibrationError:
            raise
        except Exception as error:
            raise CalibrationError(f"the image processor of {self._folder} can't be loaded: {error}") from error


def _build_processor(folder: Path, tokenizer: Any, settings: dict[str, Any], max_pixels: int | None) -> Any:
    """transformers' own processor of that checkpoint, with the PIL image processor and without one for video or audio.

    AutoProcessor would insist on a video processor, which transformers 5.17 has for torchvision alone, and so does the name
    `transformers.AutoImageProcessor`, though not the class behind it.
    """
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True, trust_remote_code=False)
    if max_pixels is not None:
        _limit(image_processor, max_pixels)
    base = _processor_class(folder)
    # `None` is no video processor, and transformers would say so
    processor_class: Any = type(base.__name__, (base,), {"check_argument_for_proper_class": lambda *_: None})
    parts = {"tokenizer": tokenizer, "image_processor": image_processor}
    return processor_class.from_args_and_dict([parts.get(name) for name in base.get_attributes()], settings)


def _processor_class(folder: Path) -> Any:
    """The class that the checkpoint's files name, else the one that goes with its config, as AutoProcessor finds it."""
    from transformers import AutoConfig
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name

    for file in _PROCESSOR_FILES:
        path = folder / file
        name = json.loads(path.read_text(encoding="utf-8")).get("processor_class") if path.is_file() else None
        if name and (found := processor_class_from_name(name)):
            return found
    return PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False))]


def _limit(image_processor: Any, max_pixels: int) -> None:
    """Sets the largest number of pixels that an image is scaled to."""
    if "max_pixels" not in image_processor.valid_kwargs.__annotations__:
        raise CalibrationError(
            f"calibration.max_pixels: the checkpoint's {type(image_processor).__name__} has no such limit",
            hint="remove calibration.max_pixels",
        )
    size = dict(image_processor.size)
    # a copy: transformers 5.17 shares the default between all processors of a class
    limits = {"shortest_edge": min(size["shortest_edge"], max_pixels), "longest_edge": max_pixels}
    image_processor.size = type(image_processor.size)(**{**size, **limits})


def read_image(path: Path) -> Image.Image:
    """The image as RGB, 8 bits a channel, upright. Raises CalibrationError where it can't be read or decoded whole.

    EXIF orientation is applied; a broken one is ignored. Transparency is laid on white. 16-bit gray is scaled to 8 bits,
    which Pillow's own conversion would clip to white. Of an animation it is the first frame.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, on odd but readable files
            with Image.open(path) as opened:
                opened.load()
                image: Image.Image = opened
                with contextlib.suppress(Exception):
                    image = ImageOps.exif_transpose(opened)
                return _rgb(image)
    except FileNotFoundError as error:
        raise CalibrationError(f"{path.name}: no such file in {path.parent}") from error
    except Exception as error:  # each of Pillow's decoders has errors of its own
        raise CalibrationError(
            f"{path.name}: can't be decoded as an image: {error}",
            hint=f"fetch {path} again, or take it out of the calibration set",
        ) from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        import numpy as np

        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    whole = Image.new("RGB", image.size, (255, 255, 255))
    whole.paste(layer, mask=layer.getchannel("A"))
    return whole
