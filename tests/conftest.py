"""What most tests start from: the example model and scenes of the repository, and copies of the model to break.

`make test` runs two processes (pytest-xdist). A file is the work of one of them, or several files that share what is slow to make.
"""

import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peers.pair import IMAGES, TEXT, Pair, make_pairs

EXAMPLES = Path(__file__).parent.parent / "examples"
SHARING = {
    "test_corpus_bases": "loads",  # a process of vLLM that loads what it is told to
    "test_vllm_load": "loads",
    "test_quark": "loads",
    "test_carried": "loads",
    "test_propose": "loads",
    "test_methods": "answers",  # one that answers questions
    "test_vllm_rules": "answers",
    "test_parity": "pairs",  # ModelOpt's and ckptq's outputs of the same samples
    "test_server": "pairs",
    "test_faults": "kills",  # a process that forks what is to be killed
    "test_kill": "kills",
    "test_vllm_does_what_was_recorded": "recorded",  # tests that share nothing with their files, and take long
    "test_a_good_export_answers": "generated",
    "test_where_this_machine_has_no_kernel_the_answers_are_said_not_to_be_the_servers": "generated",
    "test_a_broken_one_answers_noise_and_sees_nothing": "generated",
}
"""{file or test: what it is a part of}; of a file of its own otherwise."""
LONGEST = (
    "pairs", "recorded", "loads", "test_families", "generated", "test_agreement", "test_architectures", "test_served",
    "test_hostile", "kills", "answers",
)  # fmt: skip
"""These go first, so that little is left when one process has nothing more to do."""


def part(nodeid: str) -> str:
    path, _, name = nodeid.partition("::")
    file = Path(path).stem
    return SHARING.get(name.partition("[")[0]) or SHARING.get(file, file)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(part(item.nodeid), len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Parts(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return part(nodeid)

    return Parts(config, log)


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported is no garbage


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The tables of figures that tests gave to `record_property`."""
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, text in report.user_properties:
                if name == "table":
                    terminalreporter.section(report.nodeid.partition("::")[0])
                    terminalreporter.write_line(str(text))


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
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    return make_pairs([IMAGES, TEXT], tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="session")
def image_pair(pairs: list[Pair]) -> Pair:
    """ckptq's and ModelOpt's outputs for the same scenes with captions."""
    return pairs[0]


@pytest.fixture(scope="session")
def text_pair(pairs: list[Pair]) -> Pair:
    """The same for text."""
    return pairs[1]
