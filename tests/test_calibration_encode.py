"""Samples -> forward inputs, on the example checkpoint: against transformers' own pieces and through its own model."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ckptq.calibration import Sample, digest, load_samples
from ckptq.calibration.encode import Encoder, read_image
from ckptq.errors import CalibrationError
from ckptq.sections import CocoCalibration

ROOT = Path(__file__).parents[1] / "examples"
MODEL = ROOT / "tiny-qwen2.5-vl"
SCENE = ROOT / "scenes" / "calib" / "000001000000.jpg"
TOKENIZER = AutoTokenizer.from_pretrained(MODEL)
IMAGE_PAD, USER, ASSISTANT = "<|image_pad|>", "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(MODEL, None, 512)


def scene(text: str = "A circle.", prompt: str | None = "Describe the image.", image: Path = SCENE) -> Sample:
    return Sample(image.name, text, prompt, image)


def copy(folder: Path, *, without: tuple[str, ...] = (), **changes: dict[str, Any]) -> Path:
    """The checkpoint without its weights and the files named; `changes` updates the JSON files, None removes a key."""
    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors", *without))
    for name, change in changes.items():
        path = folder / f"{name}.json"
        content = {**json.loads(path.read_text()), **change}
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return folder


def saved(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def picture(width: int = 70, height: int = 40) -> Image.Image:
    """Different in each corner, so that a turn or a lost channel shows."""
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([255 * x / width, 255 * y / height, 255 * (x * y) / (width * height)], axis=-1)
    return Image.fromarray(rgb.astype(np.uint8))


def test_image_sample_equals_transformers_pieces(encoder: Encoder) -> None:
    inputs = encoder.encode(scene())
    pixels = Qwen2VLImageProcessorPil.from_pretrained(MODEL)(Image.open(SCENE), return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], pixels["pixel_values"])
    assert torch.equal(inputs["image_grid_thw"], pixels["image_grid_thw"])
    count = int(pixels["image_grid_thw"].prod()) // 4
    conversation = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the image."}]},
        {"role": "assistant", "content": "A circle."},
    ]
    rendered = TOKENIZER.apply_chat_template(conversation, tokenize=False)
    assert rendered == f"{USER}<|vision_start|>{IMAGE_PAD}<|vision_end|>Describe the image.{ASSISTANT}A circle.<|im_end|>\n"
    ids = TOKENIZER(rendered.replace(IMAGE_PAD, count * IMAGE_PAD))["input_ids"]
    assert inputs["input_ids"].tolist() == [ids]
    is_image = inputs["input_ids"] == TOKENIZER.convert_tokens_to_ids(IMAGE_PAD)
    assert int(is_image.sum()) == count
    assert torch.equal(inputs["mm_token_type_ids"], is_image.long())
    assert torch.equal(inputs["attention_mask"], torch.ones_like(inputs["input_ids"]))
    assert inputs["input_ids"].dtype == torch.int64
    assert inputs["pixel_values"].dtype == torch.float32
    assert inputs["pixel_values"].shape == (4 * count, 3 * 2 * 14 * 14)


def test_text_samples(encoder: Encoder) -> None:
    plain = encoder.encode(Sample("t", "two words"))
    assert plain["input_ids"].tolist() == [TOKENIZER("two words")["input_ids"]]
    asked = encoder.encode(Sample("t", "two words", "say"))
    assert TOKENIZER.decode(asked["input_ids"][0]) == f"{USER}say{ASSISTANT}two words<|im_end|>\n"
    for inputs in (plain, asked):
        assert set(inputs) == {"input_ids", "attention_mask"}
        assert inputs["attention_mask"].tolist() == [[1] * inputs["input_ids"].shape[1]]
    with pytest.raises(CalibrationError, match="its text is empty"):
        encoder.encode(Sample("t", " \n"))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(min_size=1).filter(str.strip),
    prompt=st.none() | st.text(max_size=9),
    length=st.integers(40, 60),
    image=st.booleans(),
)
def test_no_sample_exceeds_the_length(encoder: Encoder, text: str, prompt: str | None, length: int, image: bool) -> None:
    sample = Sample("t", text, prompt, SCENE if image else None)
    whole = encoder.encode(sample)
    encoder._sequence_length = length
    try:
        cut = encoder.encode(sample)
    finally:
        encoder._sequence_length = 512
    assert cut["input_ids"].shape[1] == min(whole["input_ids"].shape[1], length)
    assert cut.keys() == whole.keys()
    for name, tensor in cut.items():
        of_tokens = whole[name].shape == whole["input_ids"].shape
        assert torch.equal(tensor, whole[name][:, :length] if of_tokens else whole[name])


def test_image_tokens_are_never_cut() -> None:
    ids = Encoder(MODEL, None, 512).encode(scene())["input_ids"][0].tolist()
    last = max(i for i, token in enumerate(ids) if token == TOKENIZER.convert_tokens_to_ids(IMAGE_PAD)) + 1
    assert Encoder(MODEL, None, last).encode(scene())["input_ids"].tolist() == [ids[:last]]
    with pytest.raises(CalibrationError, match=rf"000001000000\.jpg: its 16 image tokens end at token {last}") as caught:
        Encoder(MODEL, None, last - 1).encode(scene())
    assert str(last - 1) in str(caught.value)
    assert "calibration.max_pixels" in (caught.value.hint or "")


def test_max_pixels(encoder: Encoder) -> None:
    small = Encoder(MODEL, 56 * 56, 512).encode(scene())
    assert small["image_grid_thw"].tolist() == [[1, 4, 4]]
    expected = Qwen2VLImageProcessorPil.from_pretrained(MODEL, max_pixels=56 * 56)(Image.open(SCENE), return_tensors="pt")
    assert torch.equal(small["pixel_values"], expected["pixel_values"])
    assert Encoder(MODEL, 784, 512).encode(scene())["image_grid_thw"].tolist() == [[1, 2, 2]]  # below the checkpoint's minimum
    assert encoder.encode(scene())["image_grid_thw"].tolist() == [[1, 8, 8]]  # and nobody else's limit changed


def test_kinds_of_images(tmp_path: Path) -> None:
    base = picture()
    pixels = np.asarray(base)
    gray = base.convert("L")
    assert np.array_equal(read_image(saved(base, tmp_path / "rgb.png")), pixels)
    assert np.array_equal(read_image(saved(gray, tmp_path / "gray.png")), np.asarray(gray)[..., None].repeat(3, -1))
    cmyk = read_image(saved(base.convert("CMYK"), tmp_path / "cmyk.tif"))
    assert np.abs(np.asarray(cmyk).astype(int) - pixels).max() <= 2
    palette = base.quantize(16)
    assert np.array_equal(read_image(saved(palette, tmp_path / "palette.png")), np.asarray(palette.convert("RGB")))
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    assert np.array_equal(read_image(saved(deep, tmp_path / "deep.png")), np.asarray(gray)[..., None].repeat(3, -1))
    assert np.array_equal(read_image(saved(base.convert("1"), tmp_path / "bits.png")).convert("1"), base.convert("1"))


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 255))
    image.putpixel((0, 0), (10, 20, 30, 0))
    image.putpixel((1, 0), (0, 0, 0, 128))
    found = read_image(saved(image, tmp_path / "a.png"))
    assert [found.getpixel((x, 0)) for x in range(3)] == [(255, 255, 255), (127, 127, 127), (10, 20, 30)]
    gray = Image.new("LA", (2, 1), (40, 0))
    assert read_image(saved(gray, tmp_path / "la.png")).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert read_image(saved(palette, tmp_path / "p.png", transparency=1)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(picture(), tmp_path / "turned.png", exif=exif)
    found = read_image(path)
    assert found.size == ((70, 40) if orientation < 5 else (40, 70))
    assert np.array_equal(found, np.asarray(ImageOps.exif_transpose(Image.open(path))))
    assert (orientation == 1) == (found.size == (70, 40) and np.array_equal(found, picture()))


@pytest.mark.parametrize("size", [(3, 60), (60, 3), (1, 100), (1, 1), (4, 1)])
def test_thin_images(encoder: Encoder, tmp_path: Path, size: tuple[int, int]) -> None:
    path = saved(Image.new("RGB", size, (255, 0, 0)), tmp_path / "thin.png")
    inputs = encoder.encode(scene(image=path))
    _, h, w = inputs["image_grid_thw"][0].tolist()
    assert (w > h) == (size[0] > size[1])
    red, green, blue = inputs["pixel_values"].reshape(-1, 3, 2 * 14 * 14).unbind(1)
    assert red.min() > 1.9
    assert max(green.max(), blue.max()) < -1.4


def test_an_image_the_processor_refuses(encoder: Encoder, tmp_path: Path) -> None:
    path = saved(Image.new("RGB", (300, 1)), tmp_path / "line.png")
    with pytest.raises(CalibrationError, match=r"line\.png: .* 300 x 1 pixels: absolute aspect ratio"):
        encoder.encode(scene(image=path))


def test_images_that_cannot_be_read(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "short.jpg").write_bytes(SCENE.read_bytes()[:-400])
    (tmp_path / "words.png").write_text("no image")
    for name in ("short.jpg", "words.png"):
        with pytest.raises(CalibrationError, match=f"{name}: can't be decoded"):
            encoder.encode(scene(image=tmp_path / name))
    with pytest.raises(CalibrationError, match=r"gone\.png: no such file"):
        encoder.encode(scene(image=tmp_path / "gone.png"))


def test_reserved_tokens_in_the_text(encoder: Encoder) -> None:
    with pytest.raises(CalibrationError, match=r"its text holds <\|image_pad\|>"):
        encoder.encode(scene("what is <|image_pad|>?"))


def test_text_that_is_no_unicode(encoder: Encoder) -> None:
    for sample in (Sample("x.jsonl:7", "half \ud83d"), Sample("x.jsonl:7", "whole", "half \ud83d")):
        digest([sample])
        with pytest.raises(CalibrationError, match=r"x\.jsonl:7: its text is not valid Unicode"):
            encoder.encode(sample)


def test_chat_template_from_any_place(tmp_path: Path) -> None:
    template = json.loads((MODEL / "chat_template.json").read_text())["chat_template"]
    bare = copy(tmp_path / "bare", without=("chat_template.json",), tokenizer_config={"chat_template": None})
    with pytest.raises(CalibrationError, match="has no chat template"):
        Encoder(bare, None, 512).encode(scene())
    with pytest.raises(CalibrationError, match="has no chat template"):
        Encoder(bare, None, 512).encode(Sample("t", "text", "prompt"))
    assert Encoder(bare, None, 512).encode(Sample("t", "text"))["input_ids"].numel()

    expected = Encoder(MODEL, None, 512).encode(scene())
    only_json = copy(tmp_path / "json", tokenizer_config={"chat_template": None})
    only_tokenizer = copy(tmp_path / "tokenizer", without=("chat_template.json",))
    (bare / "chat_template.jinja").write_text(template)
    for folder in (only_json, only_tokenizer, bare):
        assert torch.equal(Encoder(folder, None, 512).encode(scene())["input_ids"], expected["input_ids"])

    (bare / "chat_template.jinja").write_text("{{ raise_exception('no pictures here') }}")
    with pytest.raises(CalibrationError, match="chat template can't render it: no pictures here"):
        Encoder(bare, None, 512).encode(scene())
    (bare / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(CalibrationError, match="chat template leaves the image out"):
        Encoder(bare, None, 512).encode(scene())


def test_a_checkpoint_without_a_vision_tower(tmp_path: Path) -> None:
    """Its template takes contents as strings, and writes its own special tokens."""
    template = "{% for m in messages %}<|im_start|>{{ m.role + ': ' + m.content }}{% endfor %}"
    folder = copy(
        tmp_path / "text", without=("preprocessor_config.json", "chat_template.json"), tokenizer_config={"chat_template": template}
    )
    inputs = Encoder(folder, None, 512).encode(Sample("t", "yes", "really?"))
    assert TOKENIZER.decode(inputs["input_ids"][0]) == "<|im_start|>user: really?<|im_start|>assistant: yes"
    with pytest.raises(CalibrationError, match="has no image processor"):
        Encoder(folder, None, 512).encode(scene())


def test_a_checkpoint_without_a_tokenizer(tmp_path: Path) -> None:
    folder = copy(tmp_path / "x", without=("tokenizer.json", "vocab.json", "merges.txt"))
    with pytest.raises(CalibrationError, match=f"the tokenizer of {folder} can't be loaded"):
        Encoder(folder, None, 512)


def test_special_tokens_are_the_templates(tmp_path: Path) -> None:
    """A tokenizer that begins each text with a token of its own does so for plain text, and not before a template's."""
    folder = copy(tmp_path / "bos")
    path = folder / "tokenizer.json"
    first = {"id": "<|endoftext|>", "ids": [4088], "tokens": ["<|endoftext|>"]}
    single = [{"SpecialToken": {"id": first["id"], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    processor = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {first["id"]: first}}
    path.write_text(json.dumps({**json.loads(path.read_text()), "post_processor": processor}))
    encoder = Encoder(folder, None, 512)
    for sample, starts in ((Sample("t", "text"), True), (Sample("t", "text", "prompt"), False), (scene(), False)):
        assert (encoder.encode(sample)["input_ids"][0, 0] == 4088) == starts


def test_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    try:
        quiet = Encoder(MODEL, 784, 512)
        quiet.encode(scene("word " * 5000))
        quiet.encode(Sample("t", "word " * 5000))
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert records == []
    assert capfd.readouterr() == ("", "")


def test_the_model_prefers_the_right_caption() -> None:
    """The real model's loss: images reach it in the places and the order that it was trained with."""
    samples = load_samples(
        CocoCalibration(
            source="coco",
            images=str(ROOT / "scenes" / "calib"),
            annotations=str(ROOT / "scenes" / "annotations" / "captions_calib.json"),
            samples=4,
        )
    )
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32).eval()
    encoder = Encoder(MODEL, None, 512)

    def loss(sample: Sample, caption: str) -> float:
        inputs = encoder.encode(Sample("x", caption, sample.prompt, sample.image))
        ids = inputs["input_ids"]
        start = ids.shape[1] - len(TOKENIZER(f"{caption}<|im_end|>\n")["input_ids"])
        labels = torch.where(torch.arange(ids.shape[1]) >= start, ids, -100)
        with torch.inference_mode():
            return float(model(**inputs, labels=labels, use_cache=False).loss)

    for sample, other in zip(samples, samples[1:] + samples[:1], strict=True):
        assert loss(sample, sample.text) < 0.01
        assert loss(sample, other.text) > 0.5
