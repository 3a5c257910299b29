"""What most tests start from: the example model and scenes of the repository, and copies of the model to break."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="session")
def example_model() -> Path:
    """The trained tiny Qwen2.5-VL. Read only: use copy_model to change it."""
    return EXAMPLES / "tiny-qwen2.5-vl"


@pytest.fixture(scope="session")
def scenes() -> Path:
    """Images with captions in COCO's layout. Read only."""
    return EXAMPLES / "scenes"


@pytest.fixture(scope="session")
def copy_model(example_model: Path) -> Callable[[Path], Path]:
    """copy_model(tmp_path) -> a copy of the example model under it, free to change."""
    return lambda folder: shutil.copytree(example_model, folder / "model")
