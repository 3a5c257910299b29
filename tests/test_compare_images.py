"""`ckptq compare` of two folders of outputs: formulas against values worked out by hand, forms of outputs, and what is refused."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ckptq.compare import images
from ckptq.compare.images import Generation, compare_images, figures, grade, holds_outputs
from ckptq.errors import SourceError

Pixels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


def save(path: Path, pixels: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)


def pair(tmp: Path) -> tuple[Path, Path]:
    for side in ("a", "b"):
        (tmp / side).mkdir()
    return tmp / "a", tmp / "b"


def test_by_hand(tmp_path: Path) -> None:
    """One pixel [3, 4, 0] against [3, 9, 0]: d = [0, 5, 0]."""
    a, b = pair(tmp_path)
    save(a / "x.png", [[[3, 4, 0]]])
    save(b / "x.png", [[[3, 9, 0]]])
    found = compare_images(a, b).output_metrics
    assert found.all_frames_metrics == pytest.approx(
        {
            "cosine_similarity": 45 / (5 * math.sqrt(90)),
            "mae": 5 / 3,
            "mse": 25 / 3,
            "rmse": 5 / math.sqrt(3),
            "max_abs": 5,
            "l2": 5,
            "relative_l2": 1,
            "psnr_db": 20 * math.log10(255) - 10 * math.log10(25 / 3),
        },
        rel=1e-14,
    )
    data = found.data()
    assert data["num_frames"] == data["num_images"] == 1
    for frames, alias in (("frame0", "image0"), ("mid_frame", "mid_image"), ("all_frames", "all_images")):
        assert data[f"{frames}_metrics"] == data[f"{alias}_metrics"] == dict(found.all_frames_metrics)


BLACK, WHITE = np.zeros((2, 2, 3)), np.full((2, 2, 3), 255)


@pytest.mark.parametrize(
    ("a", "b", "cosine", "relative", "psnr"),
    [
        (BLACK, BLACK, 1, 0, math.inf),
        (WHITE, WHITE, 1, 0, math.inf),
        (BLACK, WHITE, 0, math.inf, 0),
        (WHITE, BLACK, 0, 1, 0),
    ],
)
def test_zeros_and_equality(a: Pixels, b: Pixels, cosine: float, relative: float, psnr: float, tmp_path: Path) -> None:
    one, two = pair(tmp_path)
    save(one / "x.png", a)
    save(two / "x.png", b)
    found = compare_images(one, two).output_metrics.frame0_metrics
    assert (found["cosine_similarity"], found["relative_l2"], found["psnr_db"]) == (cosine, relative, pytest.approx(psnr))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), count=st.integers(1, 5), height=st.integers(1, 9), piece=st.sampled_from((1, 7, 1 << 16)))
def test_frames_as_one_stack(tmp_path_factory: pytest.TempPathFactory, seed: int, count: int, height: int, piece: int) -> None:
    """The first, the middle and all frames of a video, by NumPy over the whole stack; in natural order."""
    random = np.random.default_rng(seed)
    a, b = (random.integers(0, 256, (count, height, 5, 3), dtype=np.uint8) for _ in range(2))
    tmp = tmp_path_factory.mktemp("video")
    for side, frames in (("a", a), ("b", b)):
        for number, frame in enumerate(frames):
            save(tmp / side / "clip" / f"frame_{number + 8}.png", frame)  # 8, 9, 10: as text 10 would be first
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "_PIECE", piece)
        (found,) = compare_images(tmp / "a", tmp / "b").outputs.values()
    assert (found.num_frames, found.mid_frame_index) == (count, count // 2)
    for metrics, x, y in (
        (found.frame0_metrics, a[0], b[0]),
        (found.mid_frame_metrics, a[count // 2], b[count // 2]),
        (found.all_frames_metrics, a, b),
    ):
        x, y = x.astype(np.float64), y.astype(np.float64)
        assert metrics["mse"] == pytest.approx(((x - y) ** 2).mean())
        assert metrics["mae"] == pytest.approx(np.abs(x - y).mean())
        assert metrics["max_abs"] == np.abs(x - y).max()
        assert metrics["l2"] == pytest.approx(np.linalg.norm((x - y).ravel()))
        assert metrics["relative_l2"] == pytest.approx(np.linalg.norm((x - y).ravel()) / np.linalg.norm(x.ravel()))
        assert metrics["cosine_similarity"] == pytest.approx((x * y).sum() / np.linalg.norm(x.ravel()) / np.linalg.norm(y.ravel()))


def test_outputs_together_and_worst_first(tmp_path: Path) -> None:
    """Images, a video and arrays in one folder; others' files do not count. A PNG in gray or with a palette counts as RGB."""
    a, b = pair(tmp_path)
    gray = np.full((4, 4), 100, np.uint8)
    for folder, by in ((a, 0), (b, 10)):
        save(folder / "image_2.png", gray + by // 2)
        save(folder / "image_10.png", np.stack([gray + by] * 3, 2))
        save(folder / "clip" / "0.png", gray)
        np.save(folder / "video.npy", np.full((2, 4, 4, 3), 100 + 2 * by, np.uint8))
        (folder / "notes.json").write_text("{}")
        (folder / ".hidden.png").write_bytes(b"")
        (folder / "empty").mkdir()
    found = compare_images(a, b)
    assert list(found.outputs) == ["video.npy", "image_10.png", "image_2.png", "clip"]
    assert [f.all_frames_metrics["mae"] for f in found.outputs.values()] == [20, 10, 5, 0]
    assert found.output_metrics.num_frames == 5
    assert found.output_metrics.frame0_metrics["mae"] == 0, "natural order: the clip, the images, the video"
    assert found.output_metrics.all_frames_metrics["mae"] == (0 + 5 + 10 + 20 + 20) / 5
    told = figures(found)
    assert (told["mae"], told["mae_max"], told["cosine_similarity_min"]) == (11, 20, pytest.approx(1))
    assert told["psnr_db_min"] == found.outputs["video.npy"].all_frames_metrics["psnr_db"] < told["psnr_db"]
    assert not any("ratio" in name for name in told), "nothing was supplied"


def test_arrays_of_floats_have_no_psnr(tmp_path: Path) -> None:
    a, b = pair(tmp_path)
    for folder, value in ((a, 1.0), (b, 1.5)):
        np.savez(folder / "x.npz", latents=np.full((2, 3), value, np.float32), more=np.full((2, 2, 3, 1), value))
    found = compare_images(a, b)
    assert found.output_metrics.num_frames == 3
    assert found.output_metrics.all_frames_metrics["relative_l2"] == 0.5
    assert "psnr_db" not in figures(found)


def test_what_the_caller_measured(tmp_path: Path) -> None:
    a, b = pair(tmp_path)
    for folder in (a, b):
        save(folder / "x.png", WHITE)
    found = compare_images(
        a, b, reference_generation=Generation((9.0, 3.0), (200.0,)), candidate_generation=Generation((3.0,), (90.0, 100.0))
    )
    told = figures(found)
    assert told["avg_generation_time_ratio_candidate_over_reference"] == 0.5
    assert told["max_peak_memory_ratio_candidate_over_reference"] == 0.5
    assert found.data()["reference_generation"] == {
        "generation_time_s": 3.0,
        "avg_generation_time_s": 6.0,
        "per_run_generation_time_s": [9.0, 3.0],
        "peak_memory_mb": 200.0,
        "avg_peak_memory_mb": 200.0,
        "max_peak_memory_mb": 200.0,
        "per_run_peak_memory_mb": [200.0],
    }


@pytest.mark.parametrize(
    ("metric", "value", "said"),
    [
        ("psnr_db", 31, "strict"), ("psnr_db", 25, "good"), ("psnr_db", 20, "recommended"), ("psnr_db", 19.9, "none"),
        ("mae", 3, "strict"), ("mae", 6.1, "recommended"), ("cosine_similarity", 0.99, "recommended"),
        ("relative_l2", 0.21, "none"), ("max_peak_memory_ratio_candidate_over_reference", 0.9, "target"), ("l2", 3, ""),
    ],
)  # fmt: skip
def test_thresholds(metric: str, value: float, said: str) -> None:
    assert grade(metric, value) == said


def extra(a: Path, b: Path) -> None:
    save(b / "y.png", WHITE)


def smaller(a: Path, b: Path) -> None:
    save(b / "x.png", WHITE[:1])


def shorter(a: Path, b: Path) -> None:
    for folder, count in ((a, 3), (b, 2)):
        for number in range(count):
            save(folder / "v" / f"{number}.png", WHITE)


def cut(a: Path, b: Path) -> None:
    (b / "x.png").write_bytes((b / "x.png").read_bytes()[:40])


def gone(a: Path, b: Path) -> None:
    (b / "x.png").unlink()


def pickled(a: Path, b: Path) -> None:
    for folder in (a, b):
        np.save(folder / "y.npy", np.array([{}], object), allow_pickle=True)


def other_dtype(a: Path, b: Path) -> None:
    np.save(a / "y.npy", np.zeros(3))
    np.save(b / "y.npy", np.zeros(3, np.float32))


def complex_numbers(a: Path, b: Path) -> None:
    for folder in (a, b):
        np.save(folder / "y.npy", np.zeros(3, np.complex64))


def nothing(a: Path, b: Path) -> None:
    for folder in (a, b):
        np.save(folder / "y.npy", np.zeros((0, 3)))


def no_frames(a: Path, b: Path) -> None:
    for folder in (a, b):
        np.save(folder / "y.npy", np.zeros((0, 3, 3, 3), np.uint8))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (extra, "y.png: not in .*a; 1 outputs against 2"),
        (smaller, r"x.png: uint8 \[2, 2, 3\] against uint8 \[1, 2, 3\]: expected one size and dtype"),
        (shorter, "v, frame 2: the candidate has no such frame; the counts differ"),
        (cut, "x.png: can't be decoded as an image"),
        (gone, "b: expected images, folders of frames"),
        (pickled, "y.npy: can't be read as arrays of numbers"),
        (other_dtype, r"y.npy: float64 \[3\] against float32 \[3\]"),
        (complex_numbers, "y.npy: expected numbers, found complex64"),
        (nothing, "y.npy: there is nothing in it"),
        (no_frames, "y.npy: there is no frame in it"),
    ],
)
def test_refused(spoil: Callable[[Path, Path], None], said: str, tmp_path: Path) -> None:
    a, b = pair(tmp_path)
    for folder in (a, b):
        save(folder / "x.png", WHITE)
    spoil(a, b)
    with pytest.raises(SourceError, match=said):
        compare_images(a, b)


def test_a_checkpoint_is_no_folder_of_outputs(tmp_path: Path, example_model: Path) -> None:
    save(tmp_path / "x.png", WHITE)
    assert holds_outputs(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    assert not holds_outputs(tmp_path)
    assert not holds_outputs(example_model)
    assert not holds_outputs(tmp_path / "absent")
