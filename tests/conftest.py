"""What most tests start from: the example model and scenes of the repository, and copies of the model to break."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from peers.pair import IMAGES, TEXT, Pair, make_pair

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


@pytest.fixture(scope="session")
def image_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """ckptq's and ModelOpt's outputs for the same scenes with captions."""
    return make_pair(IMAGES, tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="session")
def text_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The same for text."""
    return make_pair(TEXT, tmp_path_factory.mktemp("text"))
