"""The wheel: what is in it, and that it works where nothing else of the repository is."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from ckptq import __version__
from ckptq.recipe import shipped

REPOSITORY = Path(__file__).parent.parent
PARTS = ("ckptq", "recipes", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, as building leaves folders behind; without isolation, so that no index is asked."""
    root = tmp_path_factory.mktemp("wheel")
    for part in PARTS:
        source = REPOSITORY / part
        if source.is_dir():
            shutil.copytree(source, root / "source" / part, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.is_file():
            shutil.copy(source, root / "source" / part)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(root)]
    subprocess.run(command, cwd=root / "source", check=True)
    (built,) = root.glob("*.whl")
    return built


def test_what_is_in_it(wheel: Path) -> None:
    assert wheel.name == f"ckptq-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    expected = {p.relative_to(REPOSITORY).as_posix() for p in (REPOSITORY / "ckptq").rglob("*.py")}
    expected |= {f"ckptq/recipes/{name}.yaml" for name in shipped()} | {"ckptq/py.typed"}
    expected |= {f"ckptq/calibration/{name}.txt" for name in ("builtin", "prompts")}
    expected |= {p.relative_to(REPOSITORY).as_posix() for p in (REPOSITORY / "ckptq/compare/report").iterdir() if p.is_file()}
    assert {n for n in names if ".dist-info/" not in n} == expected


def test_it_works_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    """In an environment that has the dependencies of this one, but of ckptq the wheel alone."""
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    (packages,) = (tmp_path / "env").glob("lib/python*/site-packages")
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "-q", str(wheel)]
    subprocess.run(command, check=True)
    # A line in a .pth adds the folder alone: the .pth files in it, the editable ckptq's among them, are not read.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")} | {"COLUMNS": "80"}

    def run(*arguments: str) -> str:
        done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return done.stdout

    assert run(str(python), "-c", "import ckptq; print(ckptq.__file__)").strip() == str(packages / "ckptq" / "__init__.py")
    program = str(tmp_path / "env" / "bin" / "ckptq")
    listed = run(program, "recipes")
    assert all(name in listed for name in shipped())
    assert run(program, "recipes", "demo") == shipped()["demo"]
    assert run(str(python), "-m", "ckptq", "--version") == f"{__version__}\n"
    code = "from ckptq.calibration.builtin import load; from ckptq.sections import BuiltinCalibration; "
    code += "print(len(load(BuiltinCalibration(source='builtin'))))"
    assert int(run(str(python), "-c", code)) > 0
