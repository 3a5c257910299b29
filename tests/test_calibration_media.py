"""Samples with audio and images: the .jsonl files, the WAV files, and what Qwen's Omni processors make of them."""

from __future__ import annotations

import json
import shutil
import wave
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import EXAMPLE, ROOT
from families.qwen2_5_omni import MEL, TOKENS, processor
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptq.calibration import Sample, digest, load_samples
from ckptq.calibration.encode import Encoder
from ckptq.calibration.wav import read_wav
from ckptq.errors import CalibrationError
from ckptq.sections import MediaCalibration

DATA = ROOT / "tests/data/omni"
RISING = DATA / "rising.wav"


def media(files: Path, **changes: Any) -> MediaCalibration:
    return MediaCalibration(source="media", files=[str(files)], **changes)


def write_wav(path: Path, frames: bytes, *, channels: int = 1, width: int = 2, rate: int = 16000) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(frames)
    return path


@given(st.lists(st.integers(-(2**15), 2**15 - 1), min_size=2, max_size=40), st.integers(1, 3), st.sampled_from([8000, 16000]))
@settings(max_examples=30)
def test_samples_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, values: list[int], channels: int, rate: int
) -> None:
    values = values[: len(values) // channels * channels] or [0] * channels
    path = write_wav(tmp_path_factory.mktemp("wav") / "a.wav", np.array(values, "<i2").tobytes(), channels=channels, rate=rate)
    samples, found = read_wav(path)
    assert found == rate
    assert samples.dtype == np.float32
    np.testing.assert_allclose(samples, np.reshape(values, (-1, channels)).mean(axis=1) / 32768, atol=1e-6)


def no_file(path: Path) -> None:
    path.unlink()


def no_wav(path: Path) -> None:
    path.write_bytes(b"ID3 an mp3")


def no_bytes(path: Path) -> None:
    path.write_bytes(b"")


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def silent(path: Path) -> None:
    write_wav(path, b"")


def narrow(path: Path) -> None:
    write_wav(path, bytes(20), width=1)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (no_file, "a.wav: no such file"),
        (no_wav, "a.wav: can't be read as a WAV file: file does not start with RIFF id"),
        (no_bytes, "a.wav: can't be read as a WAV file: it ends early"),
        (cut_short, "a.wav: says that it holds 8000 samples, holds 7950"),
        (silent, "a.wav: says that it holds 0 samples, holds 0"),
        (narrow, "a.wav: 8-bit samples, expected 16-bit PCM"),
    ],
)
def test_audio_that_cannot_be_read(tmp_path: Path, fault: Callable[[Path], None], said: str) -> None:
    shutil.copyfile(RISING, tmp_path / "a.wav")
    (tmp_path / "samples.jsonl").write_text('{"text": "x", "audio": "a.wav"}\n')
    fault(tmp_path / "a.wav")
    with pytest.raises(CalibrationError, match=said) as refused:
        load_samples(media(tmp_path / "samples.jsonl"))
    assert str(refused.value).startswith("samples.jsonl:1: a.wav: ")
    assert fault is no_file or "ffmpeg -i a.wav" in str(refused.value.hint)


def test_what_a_line_holds() -> None:
    samples = {sample.name: sample for sample in load_samples(media(DATA / "samples.jsonl"))}
    assert samples["samples.jsonl:1"].audio == RISING
    assert samples["samples.jsonl:1"].prompt == "What do you hear?"
    image = samples["samples.jsonl:2"].image
    assert image is not None
    assert image.resolve() == ROOT / "examples/scenes/calib/000001000001.jpg"
    plain = samples["samples.jsonl:3"]
    assert (plain.prompt, plain.image, plain.audio) == (None, None, None)
    both = samples["samples.jsonl:4"]
    assert both.image
    assert both.audio


def test_a_smaller_number_gives_the_first_of_a_larger() -> None:
    every = load_samples(media(DATA / "samples.jsonl", samples=4))
    assert load_samples(media(DATA / "samples.jsonl", samples=2)) == every[:2]
    assert load_samples(media(DATA / "samples.jsonl", samples=4, seed=1)) != every


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "samples.jsonl:2: not JSON"),
        ("[]", "samples.jsonl:2: expected a JSON object, found list"),
        ('{"text": "x", "audios": "a.wav"}', "samples.jsonl:2: unknown key 'audios'; did you mean audio"),
        ('{"text": "x", "prompt": ["y"]}', "samples.jsonl:2: 'prompt' should be a text, found list"),
        ('{"audio": "a.wav"}', "samples.jsonl:2: has no 'text'"),
        ('{"text": " "}', "samples.jsonl:2: has no 'text'"),
        ('{"text": "x", "image": "a.png"}', "samples.jsonl:2: a.png: no such file"),
    ],
)
def test_lines_that_cannot_be_understood(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "samples.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(CalibrationError, match=said.replace("[", r"\[")):
        load_samples(media(tmp_path / "samples.jsonl"))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"none\.jsonl: no such file") as refused:
        load_samples(media(tmp_path / "none.jsonl"))
    assert '"audio": "clips/0001.wav"' in str(refused.value.hint)


def test_the_digest_is_of_the_audio_too(tmp_path: Path) -> None:
    shutil.copyfile(RISING, tmp_path / "a.wav")
    sample = Sample("s", "text", "prompt", audio=tmp_path / "a.wav")
    before = digest([sample])
    assert before == digest([replace(sample, audio=RISING)])
    assert before != digest([replace(sample, audio=None)])
    shutil.copyfile(DATA / "falling.wav", tmp_path / "a.wav")
    assert before != digest([sample])


# --- what the model gets ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("omni")
    processor(made, "Qwen2_5OmniProcessor", 14)
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(EXAMPLE / name, made / name)
    return made


SPOKEN = Sample("spoken", "It rises.", "What do you hear?", audio=RISING)


def test_audio_becomes_features_and_as_many_tokens(folder: Path) -> None:
    """0.5 s are 50 frames of 10 ms: 25 after a convolution of stride 2, 12 after pooling pairs."""
    inputs = Encoder(folder, None, 512).encode(SPOKEN)
    assert inputs["input_features"].shape[:2] == (1, MEL)
    assert int(inputs["feature_attention_mask"].sum()) == 50
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(TOKENS["audio_token_id"]) == 12
    first = ids.index(TOKENS["audio_token_id"])
    assert ids[first - 1] == TOKENS["audio_start_token_id"]
    assert set(ids[first : first + 12]) == {TOKENS["audio_token_id"]}
    assert bool(inputs["attention_mask"].all())


def test_audio_and_an_image_together(folder: Path) -> None:
    image = ROOT / "examples/scenes/calib/000001000001.jpg"
    inputs = Encoder(folder, None, 512).encode(replace(SPOKEN, image=image))
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(TOKENS["audio_token_id"]) == 12
    assert ids.count(TOKENS["image_token_id"]) == int(inputs["image_grid_thw"].prod()) // 4
    assert inputs.keys() >= {"pixel_values", "input_features"}


def test_text_is_cut_and_frames_are_not(folder: Path) -> None:
    """Even where there are as many tokens as frames."""
    whole = Encoder(folder, None, 4096)
    spare = 200 - whole.encode(replace(SPOKEN, text="a"))["input_ids"].shape[1]
    long = replace(SPOKEN, text="a" + " a" * spare)
    tokens = whole.encode(long)["input_ids"].shape[1]
    frames = whole.encode(long)["feature_attention_mask"].shape[1]
    cut = Encoder(folder, None, 100).encode(long)
    assert tokens == frames == 200
    assert cut["input_ids"].shape[1] == 100
    assert cut["feature_attention_mask"].shape[1] == frames


@pytest.mark.parametrize(
    ("sample", "length", "said"),
    [
        (SPOKEN, 10, "rising.wav: its 12 audio tokens end at token"),
        (replace(SPOKEN, text="<|audio_pad|>"), 512, "spoken: its text holds <.audio_pad.>"),
    ],
)
def test_samples_that_do_not_fit(folder: Path, sample: Sample, length: int, said: str) -> None:
    with pytest.raises(CalibrationError, match=said):
        Encoder(folder, None, length).encode(sample)


def test_audio_at_another_rate(folder: Path, tmp_path: Path) -> None:
    path = write_wav(tmp_path / "low.wav", bytes(1600), rate=8000)
    with pytest.raises(
        CalibrationError, match=r"low\.wav: 8000 samples a second, the checkpoint's processor takes 16000"
    ) as refused:
        Encoder(folder, None, 512).encode(replace(SPOKEN, audio=path))
    assert "-ar 16000" in str(refused.value.hint)


def test_a_template_that_leaves_the_audio_out(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "deaf")
    (tmp_path / "deaf/chat_template.json").unlink()
    settings = json.loads((tmp_path / "deaf/tokenizer_config.json").read_text())
    settings["chat_template"] = settings["chat_template"].replace("<|audio_pad|>", "")
    (tmp_path / "deaf/tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CalibrationError, match="chat template leaves the audio out"):
        Encoder(tmp_path / "deaf", None, 512).encode(SPOKEN)


def test_a_checkpoint_without_a_processor_for_audio() -> None:
    with pytest.raises(CalibrationError, match=r"rising\.wav: audio, for which the checkpoint has no processor"):
        Encoder(EXAMPLE, None, 512).encode(SPOKEN)


def test_nothing_is_padded(folder: Path) -> None:
    """Of the frames none beyond the sample is marked, so that the audio tower sees no padding."""
    inputs = Encoder(folder, None, 512).encode(SPOKEN)
    mask = inputs["feature_attention_mask"][0]
    assert torch.equal(mask, (torch.arange(len(mask)) < 50).to(mask.dtype))
