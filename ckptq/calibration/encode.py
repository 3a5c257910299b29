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
from ckptq.calibration.wav import read_wav, to_wav
from ckptq.errors import CalibrationError

if TYPE_CHECKING:
    import torch

_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
_KINDS = {1: "image", 3: "audio"}
_OF_AUDIO = ("input_features", "feature_attention_mask")


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
                f"the tokenizer of {folder} can't be loaded: {' '.join(str(error).split())}",
                hint="the checkpoint must hold its tokenizer's files, such as tokenizer.json and tokenizer_config.json",
            ) from error

    def encode(self, sample: Sample) -> dict[str, torch.Tensor]:
        """The forward inputs of `sample`, unpadded.

        input_ids        [1, T] int64, T <= sequence_length: cut at the end, never inside the image's tokens
        attention_mask   [1, T] int64, all ones
        and with an image or audio what the checkpoint's processor adds, for Qwen2.5-VL:
        pixel_values       [P, C] float32, P = t * h * w patches
        image_grid_thw     [1, 3] int64
        mm_token_type_ids  [1, T] int64, 1 for image tokens: rope positions follow from it
        for Gemma 3 and LLaVA:
        pixel_values       [1, 3, H, W] float32
        token_type_ids     [1, T] int64, 1 for image tokens: they see one another (Gemma 3)
        for Qwen2.5-Omni with audio:
        input_features          [1, 128, F] float32
        feature_attention_mask  [1, F] int64, 1 for frames of the sample: the audio tower sees no others

        Raises CalibrationError for an empty text, an image or audio that can't be read or doesn't fit, and a checkpoint without
        a chat template or processor where the sample needs one.
        """
        if not sample.text.strip():
            raise CalibrationError(f"{sample.name}: its text is empty")
        if any("\ud800" <= char <= "\udfff" for char in sample.text + (sample.prompt or "")):
            raise CalibrationError(f"{sample.name}: its text is not valid Unicode: it holds half of a surrogate pair")
        if sample.image or sample.audio:
            inputs = self._encode_media(sample)
        else:
            plain = sample.prompt is None
            text = sample.text if plain else self.rendered(sample)
            # a template writes its own special tokens
            encoded = self._tokenizer(text, add_special_tokens=plain, return_tensors="pt")
            inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        tokens = inputs["input_ids"].shape
        cut = {name for name, t in inputs.items() if t.shape == tokens and name not in _OF_AUDIO}
        return {name: t[:, : self._sequence_length] if name in cut else t for name, t in inputs.items()}

    def tokens(self, text: str) -> list[int]:
        """The ids of a text alone, without special ones."""
        found: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def rendered(self, sample: Sample) -> str:
        """The conversation as its chat template writes it, before images and audio take their places. Raises CalibrationError."""
        return self._render(sample, as_parts=self._has_processor or bool(sample.image or sample.audio))

    def places(self, text: str) -> tuple[list[int], list[tuple[int, int]]] | None:
        """(ids of a rendered text, where in it each begins and ends); None where the tokenizer does not say."""
        if not self._tokenizer.is_fast:
            return None
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return found["input_ids"], found["offset_mapping"]

    def text(self, ids: list[int]) -> str:
        """What ids stand for."""
        found: str = self._tokenizer.decode(ids)
        return found

    def _encode_media(self, sample: Sample) -> dict[str, torch.Tensor]:
        processor = self._processor
        for token in _reserved(processor):
            if token in sample.text or token in (sample.prompt or ""):
                raise CalibrationError(f"{sample.name}: its text holds {token}, which the checkpoint reserves for images and such")
        media: dict[str, list[Any]] = {}
        size = ""
        if sample.audio:
            media["audio"] = [self._read_audio(sample.audio)]
        if sample.image:
            image = read_image(sample.image)
            media["images"], size = [image], f" of {image.width} x {image.height} pixels"
        kinds = {1: sample.image, 3: sample.audio}  # as `create_mm_token_type_ids` numbers them
        what = " and ".join(_KINDS[kind] for kind, path in kinds.items() if path)
        called = " and ".join(path.name for path in kinds.values() if path)
        text = self.rendered(sample)
        try:
            encoded = processor(**media, text=[text], add_special_tokens=False, return_tensors="pt")
        except (ValueError, TypeError) as error:
            raise CalibrationError(
                f"{called}: the checkpoint's processor refuses this {what}{size}: {error}",
                hint=f"take the {what} out of the calibration set",
            ) from error
        inputs = dict(encoded)
        (types,) = processor.create_mm_token_type_ids(inputs["input_ids"])
        for kind, path in kinds.items():
            if path and kind not in types:
                raise CalibrationError(
                    f"{sample.name}: the checkpoint's chat template leaves the {_KINDS[kind]} out",
                    hint="calibrate it with source: text",
                )
        end = max(i for i, kind in enumerate(types) if kind) + 1
        if end > self._sequence_length:
            raise CalibrationError(
                f"{called}: its {sum(map(bool, types))} {what} tokens end at token {end}, after "
                f"calibration.sequence_length = {self._sequence_length}",
                hint=f"set calibration.sequence_length to {end} or more"
                + ", or a lower calibration.max_pixels" * bool(sample.image),
            )
        return inputs

    def _read_audio(self, path: Path) -> Any:
        """F32 [T]. The server resamples; ckptq does not, and wants what the checkpoint's processor takes."""
        extractor = getattr(self._processor, "feature_extractor", None)
        if extractor is None:
            raise CalibrationError(
                f"{path.name}: audio, for which the checkpoint has no processor", hint="take it out of the calibration set"
            )
        samples, rate = read_wav(path)
        if rate != extractor.sampling_rate:
            raise CalibrationError(
                f"{path.name}: {rate} samples a second, the checkpoint's processor takes {extractor.sampling_rate}",
                hint=to_wav(path, extractor.sampling_rate),
            )
        return samples

    def _render(self, sample: Sample, *, as_parts: bool) -> str:
        """The conversation as the chat template writes it; processors' templates take content as a list of parts."""
        user = [{"type": "audio"}] if sample.audio else []
        user += [{"type": "image"}] if sample.image else []
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
                f"{self._folder} has no chat template, and samples with a prompt or an image need one",
                hint="add the model's chat_template.jinja to the folder, or take source: text or builtin",
            )
        return str(template)

    @cached_property
    def _processor(self) -> Any:
        if not self._has_processor:
            raise CalibrationError(
                f"{self._folder} has no image processor ({' or '.join(_PROCESSOR_FILES[:2])}), and the samples "
                "have images or audio",
                hint="for a checkpoint without a vision tower take source: text or builtin",
            )
        try:
            return _build_processor(self._folder, self._tokenizer, self._processor_settings, self._max_pixels)
        except CalibrationError:
            raise
        except Exception as error:
            raise CalibrationError(f"the image processor of {self._folder} can't be loaded: {error}") from error


def _build_processor(folder: Path, tokenizer: Any, settings: dict[str, Any], max_pixels: int | None) -> Any:
    """transformers' own processor of that checkpoint, with the PIL image processor and without one for video.

    AutoProcessor would insist on a video processor, which transformers 5.17 has for torchvision alone, and so does the name
    `transformers.AutoImageProcessor`, though not the class behind it.
    """
    from transformers.models.auto.feature_extraction_auto import AutoFeatureExtractor
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True, trust_remote_code=False)
    if max_pixels is not None:
        _limit(image_processor, max_pixels)
    base = _processor_class(folder)
    # `None` is no video processor, and transformers would say so
    processor_class: Any = type(base.__name__, (base,), {"check_argument_for_proper_class": lambda *_: None})
    parts = {"tokenizer": tokenizer, "image_processor": image_processor}
    if "feature_extractor" in base.get_attributes():
        parts["feature_extractor"] = AutoFeatureExtractor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        # Omni processors ask for its merge_size, video or none; it is the image processor's.
        parts["video_processor"] = image_processor
    processor = processor_class.from_args_and_dict([parts.get(name) for name in base.get_attributes()], settings)
    for kind in _KINDS.values():  # Omni processors tell tokens alone, and `create_mm_token_type_ids` looks for ids
        token = getattr(processor, f"{kind}_token", None)
        if token is not None and getattr(processor, f"{kind}_token_ids") == [None]:
            setattr(processor, f"{kind}_token_ids", [tokenizer.convert_tokens_to_ids(token)])
    return processor


def _reserved(processor: Any) -> tuple[str, ...]:
    """Tokens that stand for an image and such in a text, and those that take their place: Gemma 3 has one of each."""
    ids = (*processor.image_token_ids, *processor.video_token_ids, *processor.audio_token_ids)
    tokens = processor.tokenizer.convert_ids_to_tokens([i for i in ids if i is not None])
    return (*processor.all_special_multimodal_tokens, *filter(None, tokens))


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
