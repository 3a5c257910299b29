"""Reads audio: WAV files with 16-bit PCM, which every tool writes. `wave` of the standard library is all it takes."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptq.errors import CalibrationError

if TYPE_CHECKING:
    import numpy as np

_BYTES = 2


def read_wav(path: Path) -> tuple[np.ndarray[Any, Any], int]:
    """(samples F32 [T] from -1 to 1, samples a second). Channels are averaged, as vLLM 0.32.0 multimodal/audio.py does.

    Raises CalibrationError where it can't be read, is in another format, is cut short or empty.
    """
    import numpy as np

    try:
        with wave.open(str(path), "rb") as file:
            channels, width, rate, count = file.getparams()[:4]
            frames = file.readframes(count)
    except FileNotFoundError as error:
        raise CalibrationError(f"{path.name}: no such file in {path.parent}") from error
    except (OSError, EOFError, wave.Error) as error:
        why = str(error) or "it ends early"
        raise CalibrationError(f"{path.name}: can't be read as a WAV file: {why}", hint=to_wav(path)) from error
    if width != _BYTES:
        raise CalibrationError(f"{path.name}: {8 * width}-bit samples, expected 16-bit PCM", hint=to_wav(path))
    if not count or len(frames) != count * width * channels:
        found = len(frames) // (width * channels)
        raise CalibrationError(f"{path.name}: says that it holds {count} samples, holds {found}", hint=to_wav(path))
    samples = np.frombuffer(frames, "<i2").astype(np.float32).reshape(-1, channels) / 32768
    return samples.mean(axis=1), rate


def to_wav(path: Path, rate: int = 16000) -> str:
    """What makes such a file of any other."""
    return f"ffmpeg -i {path.name} -ac 1 -ar {rate} -c:a pcm_s16le {path.stem}-{rate}.wav makes one that can be used"
