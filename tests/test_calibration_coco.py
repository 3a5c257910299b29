"""COCO images and captions: the join, the choice, and everything that can be wrong with the files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ckptq.calibration import Sample, coco, digest, load_samples
from ckptq.errors import CalibrationError
from ckptq.sections import CocoCalibration

SCENES = Path(__file__).parents[1] / "examples" / "scenes"
CAPTIONS = json.loads((SCENES / "annotations" / "captions_calib.json").read_text())


def scenes(**changes: Any) -> CocoCalibration:
    given = {"images": str(SCENES / "calib"), "annotations": str(SCENES / "annotations" / "captions_calib.json"), "samples": 8}
    return CocoCalibration(source="coco", **{**given, **changes})


def small_set(folder: Path, images: int = 4) -> dict[str, Any]:
    """A COCO set with three captions per image, its images on disk, its annotations returned."""
    for i in range(images):
        Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(folder / f"{i}.png")
    return {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(images)],
        "annotations": [
            {"id": 10 * i + k, "image_id": i, "caption": f"caption {k} of {i}"} for i in range(images) for k in range(3)
        ],
    }


def load(folder: Path, content: Any, **changes: Any) -> list[Sample]:
    (folder / "captions.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return coco.load(scenes(images=str(folder), annotations=str(folder / "captions.json"), **changes))


def test_joined_by_image_id() -> None:
    samples = load_samples(scenes(samples=1000))
    files = {image["id"]: image["file_name"] for image in CAPTIONS["images"]}
    expected = {files[a["image_id"]]: a["caption"] for a in CAPTIONS["annotations"]}
    assert {s.image.name: s.text for s in samples if s.image} == expected
    assert {s.prompt for s in samples} == {"Describe the image."}


def test_the_seed_decides() -> None:
    first, again, other = load_samples(scenes()), load_samples(scenes()), load_samples(scenes(seed=1))
    assert first == again
    assert digest(first) != digest(other)
    assert load_samples(scenes(samples=3)) == first[:3]


def test_several_captions_give_one_of_them(tmp_path: Path) -> None:
    content = small_set(tmp_path)
    texts = set()
    for seed in range(20):
        samples = load(tmp_path, content, seed=seed)
        assert sorted(s.image.name for s in samples if s.image) == ["0.png", "1.png", "2.png", "3.png"]
        assert all(s.image and s.text.endswith(f" of {s.image.stem}") for s in samples)
        texts |= {s.text for s in samples}
    assert len(texts) == 12


@settings(max_examples=25, deadline=None)
@given(shuffled=st.randoms(use_true_random=False))
def test_any_order_gives_the_same_samples(tmp_path_factory: pytest.TempPathFactory, shuffled: random.Random) -> None:
    folder = tmp_path_factory.mktemp("coco")
    content = small_set(folder)
    before = load(folder, content, samples=3)
    shuffled.shuffle(content["images"])
    shuffled.shuffle(content["annotations"])
    assert load(folder, content, samples=3) == before


def test_images_without_a_caption_are_left_out(tmp_path: Path) -> None:
    content = small_set(tmp_path)
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 2]
    for annotation in content["annotations"]:
        if annotation["image_id"] == 1:
            annotation["caption"] = " \n"
    (tmp_path / "2.png").unlink()
    assert sorted(s.image.name for s in load(tmp_path, content) if s.image) == ["0.png", "3.png"]


def test_no_caption_at_all(tmp_path: Path) -> None:
    content = {**small_set(tmp_path), "annotations": []}
    (tmp_path / "captions.json").write_text(json.dumps(content))
    with pytest.raises(CalibrationError, match="no usable sample"):
        load_samples(scenes(images=str(tmp_path), annotations=str(tmp_path / "captions.json")))


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    content = small_set(tmp_path)
    (tmp_path / "2.png").unlink()
    with pytest.raises(CalibrationError) as caught:
        load(tmp_path, content)
    assert caught.value.exit_code == 2
    assert all(part in str(caught.value) for part in ("2.png", str(tmp_path), "captions.json", "image_id 2"))


def test_an_image_that_is_not_chosen_may_be_missing(tmp_path: Path) -> None:
    content = small_set(tmp_path)
    (chosen,) = load(tmp_path, content, samples=1)
    for i in range(4):
        if chosen.image != tmp_path / f"{i}.png":
            (tmp_path / f"{i}.png").unlink()
    assert load(tmp_path, content, samples=1) == [chosen]


@pytest.mark.parametrize("keep", [0, 40, 0.6])
def test_an_image_that_cannot_be_decoded_is_found_at_once(tmp_path: Path, keep: float) -> None:
    content = small_set(tmp_path, images=1)
    whole = (SCENES / "calib" / "000001000000.jpg").read_bytes()
    (tmp_path / "0.png").write_bytes(whole[: int(keep if keep >= 1 else keep * len(whole))])
    with pytest.raises(CalibrationError, match=r"0\.png: can't be decoded"):
        load(tmp_path, content)


@pytest.mark.parametrize("name", ["../0.png", "/etc/passwd", "a/../../0.png", "..\\0.png", "C:\\0.png"])
def test_file_names_stay_in_the_folder(tmp_path: Path, name: str) -> None:
    content = small_set(tmp_path, images=1)
    content["images"][0]["file_name"] = name
    with pytest.raises(CalibrationError, match="leads out of"):
        load(tmp_path, content)


def test_images_in_subfolders(tmp_path: Path) -> None:
    content = small_set(tmp_path, images=1)
    (tmp_path / "val2014").mkdir()
    (tmp_path / "0.png").rename(tmp_path / "val2014" / "0.png")
    content["images"][0]["file_name"] = "val2014/0.png"
    assert load(tmp_path, content)[0].image == tmp_path / "val2014" / "0.png"


def test_captions_of_images_that_are_not_listed(tmp_path: Path) -> None:
    content = small_set(tmp_path)
    content["images"] = content["images"][:2]
    with pytest.raises(CalibrationError, match="image_id 2, which its images don't list, and for 1 more"):
        load(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("\x00", "not JSON"),
        ([], "expected a JSON object with a list 'images'"),
        ({"images": []}, "expected a JSON object with a list 'annotations'"),
        ({"images": [{"id": 1}], "annotations": []}, r"images\[0\] has no id with a text as file_name"),
        ({"images": ["1.png"], "annotations": []}, r"images\[0\]"),
        (
            {"images": [{"id": 1, "file_name": "1.png"}], "annotations": [{"id": 1, "image_id": 1, "bbox": [0, 0, 1, 1]}]},
            r"annotations\[0\] has no image_id with a text as caption",
        ),
        ({"images": [{"id": 1, "file_name": n} for n in ("1.png", "2.png")], "annotations": []}, "image id 1 is given twice"),
    ],
)
def test_annotations_that_cannot_be_understood(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message) as caught:
        load(tmp_path, content)
    assert "captions.json" in str(caught.value)


def test_missing_folder_and_missing_annotations(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="nowhere: no such folder"):
        coco.load(scenes(images="nowhere"))
    with pytest.raises(CalibrationError, match=r"nothing\.json: can't be read"):
        coco.load(scenes(annotations=str(tmp_path / "nothing.json")))
