"""Prompts: from the recipe, from files, or built in; with images to edit."""

import json
from pathlib import Path

import pytest
from PIL import Image

from ckptq.calibration import digest, load_samples
from ckptq.errors import CalibrationError
from ckptq.sections import PromptCalibration


def test_prompts_come_from_recipe_and_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n  two \n", encoding="utf-8")
    lines = [{"prompt": "three", "negative_prompt": "dull"}, {"prompt": "four", "image": "red.png"}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    for name in ("red.png", "blue.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    settings = PromptCalibration(source="prompts", prompts=["zero"], files=files, negative_prompt="noise")
    samples = load_samples(settings)
    assert {s.text: s.negative for s in samples} == dict.fromkeys(("zero", "one", "two", "four"), "noise") | {"three": "dull"}
    assert {s.text: s.image for s in samples if s.image} == {"four": tmp_path / "red.png"}
    assert [s.text for s in load_samples(settings.model_copy(update={"samples": 2}))] == [s.text for s in samples[:2]]
    with_images = load_samples(settings.model_copy(update={"images": [str(tmp_path / "blue.png")]}))
    assert {s.image and s.image.name for s in with_images if s.text != "four"} == {"blue.png"}
    assert len({digest(s) for s in (samples, with_images, load_samples(settings.model_copy(update={"negative_prompt": "x"})))}) == 3


def test_the_built_in_prompts_are_there() -> None:
    samples = load_samples(PromptCalibration(source="prompts"))
    assert len({s.text for s in samples}) == 32


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n\n", "holds no prompt"),
        ("a.csv", "x", "expected .txt or .jsonl"),
        ("a.jsonl", "{", "a.jsonl:1: not JSON"),
        ("a.jsonl", "[]", "expected a JSON object, found list"),
        ("a.jsonl", '{"promt": "x"}', "did you mean prompt?"),
        ("a.jsonl", '{"image": "x.png"}', "has no prompt"),
        ("a.jsonl", '{"prompt": 3}', "should be a text, found int"),
        ("a.jsonl", '{"prompt": "x", "image": "absent.png"}', "absent.png"),
    ],
)
def test_what_is_wrong_with_prompts_is_said(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(CalibrationError) as found:
        load_samples(PromptCalibration(source="prompts", files=[str(tmp_path / name)]))
    assert message in str(found.value)
    with pytest.raises(CalibrationError, match="number 1 is blank"):
        load_samples(PromptCalibration(source="prompts", prompts=[" "]))
