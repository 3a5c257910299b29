"""How far two folders of generated images, videos or arrays are apart, in the words of vLLM-Omni's similarity tool.

vLLM-Omni 0.30.0 quantization/tools/compare_diffusion_trajectory_similarity.py has the formulas (metrics.py), the names and the
thresholds. Each entry of a folder is an output: an image (an animation is its frames), a folder of frames in natural order, an
array in .npy, or each array of an .npz; of an array with four or more dimensions the first counts frames. Images are compared in
RGB of 8 bits; arrays as they are, and psnr_db is of uint8 alone.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ckptq.compare.metrics import Sums, extreme, sums
from ckptq.errors import SourceError
from ckptq.folder import printable
from ckptq.index import natural

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

IMAGES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"))
ARRAYS = frozenset((".npy", ".npz"))
_CHECKPOINT = ("config.json", "model_index.json")
_PIECE = 1 << 16
_ALIKE = "make both outputs with one height, width and number of frames"
_NAMES = ("cosine_similarity", "mae", "mse", "rmse", "max_abs", "l2", "relative_l2")

THRESHOLDS: Mapping[str, Mapping[str, Mapping[str, float]]] = MappingProxyType(
    {
        "output_images_or_frames_uint8": {
            "psnr_db": {"recommended_min": 20.0, "good_min": 25.0, "strict_min": 30.0},
            "mae": {"recommended_max": 12.0, "good_max": 6.0, "strict_max": 3.0},
            "cosine_similarity": {"recommended_min": 0.98, "strict_min": 0.995},
            "relative_l2": {"recommended_max": 0.20, "strict_max": 0.08},
        },
        "performance": {
            "avg_generation_time_ratio_candidate_over_reference": {"recommended_max": 1.10},
            "max_peak_memory_ratio_candidate_over_reference": {"recommended_max": 1.00, "target_max": 0.95},
        },
    }
)
"""The tool's `recommended_thresholds`. They are for the reader: neither it nor this gates by them, --fail-on does."""


@dataclass(frozen=True, slots=True)
class Frames:
    """Metrics of some frames, by the tool's names."""

    num_frames: int
    frame0_metrics: Mapping[str, float]
    mid_frame_index: int
    mid_frame_metrics: Mapping[str, float]
    all_frames_metrics: Mapping[str, float]

    def data(self) -> dict[str, Any]:
        """The tool's `output_metrics`, with its second name for each."""
        return {
            "num_frames": self.num_frames,
            "frame0_metrics": dict(self.frame0_metrics),
            "mid_frame_index": self.mid_frame_index,
            "mid_frame_metrics": dict(self.mid_frame_metrics),
            "all_frames_metrics": dict(self.all_frames_metrics),
            "num_images": self.num_frames,
            "image0_metrics": dict(self.frame0_metrics),
            "mid_image_index": self.mid_frame_index,
            "mid_image_metrics": dict(self.mid_frame_metrics),
            "all_images_metrics": dict(self.all_frames_metrics),
        }


@dataclass(frozen=True, slots=True)
class Generation:
    """What one side took for its outputs, as the caller measured it: seconds and peaks of device memory (MiB), run by run."""

    seconds: tuple[float, ...] = ()
    peak_memory_mb: tuple[float, ...] = ()

    def data(self) -> dict[str, Any]:
        """The tool's `reference_generation`; null what was not supplied."""
        seconds, peaks = self.seconds, self.peak_memory_mb
        return {
            "generation_time_s": seconds[-1] if seconds else None,
            "avg_generation_time_s": sum(seconds) / len(seconds) if seconds else None,
            "per_run_generation_time_s": list(seconds),
            "peak_memory_mb": peaks[-1] if peaks else None,
            "avg_peak_memory_mb": sum(peaks) / len(peaks) if peaks else None,
            "max_peak_memory_mb": max(peaks, default=None),
            "per_run_peak_memory_mb": list(peaks),
        }


@dataclass(frozen=True, slots=True)
class ImageMetrics:
    """Of all outputs as the frames of one, and of each by itself, {name: Frames}, worst first: by relative L2."""

    output_metrics: Frames
    outputs: Mapping[str, Frames]
    reference_generation: Generation = Generation()
    candidate_generation: Generation = Generation()

    def data(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "output_metrics": self.output_metrics.data(),
            "outputs": [{"name": name, "output_metrics": frames.data()} for name, frames in self.outputs.items()],
            "reference_generation": self.reference_generation.data(),
            "candidate_generation": self.candidate_generation.data(),
            "metric_guidance": {"recommended_thresholds": {k: {m: dict(v) for m, v in t.items()} for k, t in THRESHOLDS.items()}},
        }


def holds_outputs(folder: Path) -> bool:
    """Whether it is a folder of outputs and no checkpoint."""
    return folder.is_dir() and not any((folder / name).is_file() for name in _CHECKPOINT) and bool(output_names(folder))


def compare_images(
    reference: Path,
    candidate: Path,
    *,
    reference_generation: Generation = Generation(),
    candidate_generation: Generation = Generation(),
    advance: Callable[[int], None] = lambda _: None,
) -> ImageMetrics:
    """The outputs in two folders, one frame of each side in memory at a time. `advance` is told of each output.

    Raises SourceError where names, counts, sizes or dtypes differ, and for what can't be read.
    """
    names = _common(reference, candidate)
    total, outputs = _Tally(), dict[str, Frames]()
    for name in names:
        tally = _Tally()
        both = itertools.zip_longest(frames_of(reference / name), frames_of(candidate / name))
        for number, (a, b) in enumerate(both):
            where = f"{printable(name)}, frame {number}" if number else printable(name)
            found = _frame(a, b, where)
            tally.add(*found)
            total.add(*found)
        outputs[name] = tally.frames(name)
        advance(1)
    errors = {name: frames.all_frames_metrics["relative_l2"] for name, frames in outputs.items()}
    worst = sorted(outputs, key=lambda name: (not math.isnan(errors[name]), -errors[name]))
    return ImageMetrics(total.frames(str(reference)), {n: outputs[n] for n in worst}, reference_generation, candidate_generation)


def figures(found: ImageMetrics) -> dict[str, float]:
    """{metric: value}: of all pixels, of the worst output, and the ratios of what was supplied of both."""
    together = dict(found.output_metrics.all_frames_metrics)
    worst = [frames.all_frames_metrics for frames in found.outputs.values()]
    for name in ("cosine_similarity_min", "mae_max", "relative_l2_max", "psnr_db_min"):
        metric, _, end = name.rpartition("_")
        if metric in together:
            together[name] = extreme(min if end == "min" else max, (metrics[metric] for metrics in worst))
    mine, theirs = found.candidate_generation.data(), found.reference_generation.data()
    for metric in ("avg_generation_time", "max_peak_memory"):
        unit = "s" if metric.endswith("time") else "mb"
        a, b = theirs[f"{metric}_{unit}"], mine[f"{metric}_{unit}"]
        if a and b is not None:
            together[f"{metric}_ratio_candidate_over_reference"] = b / a
    return together


def grade(metric: str, value: float) -> str:
    """The strictest of the tool's thresholds that the value meets: `strict`, `good`, `recommended`, `target`; "none" or ""."""
    levels = next((table[metric] for table in THRESHOLDS.values() if metric in table), {})
    met = [name for name, limit in levels.items() if (value >= limit if name.endswith("_min") else value <= limit)]
    return met[-1].rpartition("_")[0] if met else "none" if levels else ""


class _Tally:
    """The first, the middle and all of some frames, of which nobody knows how many there will be."""

    def __init__(self) -> None:
        self.each: list[Sums] = []
        self.bytes_alone = True

    def add(self, found: Sums, is_uint8: bool) -> None:
        self.each.append(found)
        self.bytes_alone &= is_uint8

    def frames(self, name: str) -> Frames:
        if not self.each:
            raise SourceError(f"{printable(name)}: there is no frame in it")
        middle = len(self.each) // 2
        first, mid, together = (self._metrics(s) for s in (self.each[0], self.each[middle], sum(self.each, Sums())))
        return Frames(len(self.each), first, middle, mid, together)

    def _metrics(self, found: Sums) -> Mapping[str, float]:
        values = (found.cosine, found.mae, found.mse, found.mse**0.5, found.largest, found.l2, found.relative_l2)
        return {**dict(zip(_NAMES, values, strict=True)), **({"psnr_db": found.psnr_db} if self.bytes_alone else {})}


def _common(reference: Path, candidate: Path) -> list[str]:
    """The names of the outputs, the same on both sides, in natural order."""
    theirs, ours = output_names(reference), output_names(candidate)
    for folder, names in ((reference, theirs), (candidate, ours)):
        if not names:
            raise SourceError(
                f"{folder}: expected images, folders of frames, .npy or .npz", hint="a video's frames go into a folder, as images"
            )
    odd = [(name, candidate) for name in theirs if name not in ours] + [(name, reference) for name in ours if name not in theirs]
    if odd:
        more = f", and {len(odd) - 1} more differ" if len(odd) > 1 else ""
        raise SourceError(
            f"{printable(odd[0][0])}: not in {odd[0][1]}; {len(theirs)} outputs against {len(ours)}{more}",
            hint="outputs of one prompt and seed have one name in both folders",
        )
    return theirs


def output_names(folder: Path) -> list[str]:
    """Hidden entries and files of other kinds do not count, nor do folders without frames."""
    found = [p for p in folder.iterdir() if not p.name.startswith(".")]
    return sorted((p.name for p in found if p.suffix.lower() in IMAGES | ARRAYS or (p.is_dir() and _images(p))), key=natural)


def _images(folder: Path) -> list[Path]:
    return sorted((p for p in folder.iterdir() if p.suffix.lower() in IMAGES and p.name[0] != "."), key=lambda p: natural(p.name))


def frames_of(path: Path) -> Iterator[Array]:
    """The frames of an output, one at a time."""
    if path.is_dir():
        for image in _images(path):
            yield from _decoded(image)
    elif path.suffix.lower() in IMAGES:
        yield from _decoded(path)
    else:
        for array in _arrays(path):
            yield from array if array.ndim > 3 else (array,)


def _decoded(path: Path) -> Iterator[Array]:
    """RGB, uint8 [height, width, 3], by Pillow's own conversion, as the tool does it."""
    import numpy as np
    from PIL import Image, ImageSequence

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, on odd but readable files
            with Image.open(path) as opened:
                for frame in ImageSequence.Iterator(opened):
                    yield np.asarray(frame.convert("RGB"))
    except Exception as error:  # each of Pillow's decoders has errors of its own
        raise SourceError(f"{printable(str(path))}: can't be decoded as an image: {error}", hint="write it again") from error


def _arrays(path: Path) -> Iterator[Array]:
    """The array of an .npy, without reading it whole; those of an .npz by name."""
    import numpy as np

    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        arrays = [found] if isinstance(found, np.ndarray) else None
        if arrays is None:
            with found:
                for name in sorted(found.files, key=natural):
                    yield _numbers(found[name], path)
            return
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise SourceError(f"{printable(str(path))}: can't be read as arrays of numbers: {error}") from error
    yield _numbers(arrays[0], path)


def _numbers(array: Array, path: Path) -> Array:
    if array.dtype.kind not in "biuf":
        raise SourceError(f"{printable(str(path))}: expected numbers, found {array.dtype}")
    return array


def _frame(a: Array | None, b: Array | None, where: str) -> tuple[Sums, bool]:
    """(sums, whether both are uint8)."""
    import numpy as np

    if a is None or b is None:
        raise SourceError(
            f"{where}: the {'reference' if a is None else 'candidate'} has no such frame; the counts differ", hint=_ALIKE
        )
    if a.shape != b.shape or a.dtype != b.dtype:
        raise SourceError(
            f"{where}: {a.dtype} {list(a.shape)} against {b.dtype} {list(b.shape)}: expected one size and dtype", hint=_ALIKE
        )
    if not a.size:
        raise SourceError(f"{where}: there is nothing in it")
    flat = [np.ascontiguousarray(side).reshape(-1) for side in (a, b)]
    spare, found = np.empty(_PIECE), Sums()
    for at in range(0, a.size, _PIECE):
        one, two = (side[at : at + _PIECE].astype(np.float64) for side in flat)
        found += sums(one, two, spare[: len(one)])
    return found, a.dtype == np.uint8
