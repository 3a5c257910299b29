"""Sources in F16 and F32, and in several dtypes at once: encoded from the stored values, the rest kept byte for byte."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptq.checkpoint import Reader, read_inventory
from ckptq.console import Console
from ckptq.convert import convert, prepare
from ckptq.errors import DataError
from ckptq.recipe import load_recipe
from ckptq.scopes import find_scope
from ckptq.streamed import StreamedModel
from ckptq.validate import examine

ROOT = Path(__file__).parent.parent
NAMES = {torch.float16: "float16", torch.float32: "float32", torch.bfloat16: "bfloat16"}
Kind = Callable[[str], torch.dtype]
CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()


def mixed(name: str) -> torch.dtype:
    """Other dtypes inside one fused linear, and for towers and norms."""
    kinds = {"q_proj": torch.float32, "k_proj": torch.float16, "mlp.up_proj": torch.float16, "norm": torch.float32}
    return next((dtype for part, dtype in kinds.items() if part in name), torch.bfloat16)


def written(model: Path, folder: Path, kind: Kind, declared: torch.dtype, *, finer: bool) -> Path:
    """The model in other dtypes, with values that BF16 has not where `finer`."""
    shutil.copytree(model, folder)
    generator = torch.Generator().manual_seed(0)
    for file in sorted(folder.glob("*.safetensors")):
        tensors = {}
        for name, tensor in load_file(file).items():
            wide = tensor.float()
            if finer:
                wide = wide * (1 + torch.rand(wide.shape, generator=generator) / 300)
            tensors[name] = wide.to(kind(name))
        save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": NAMES[declared]}))
    return folder


def converted(source: Path, output: Path) -> dict[str, torch.Tensor]:
    recipe = load_recipe("demo", ["calibration.samples=3"], model=str(source), output=str(output))
    convert(prepare(recipe), resume=False, device="cpu", memory=None, console=Console(quiet=True))
    found = examine(output, source=source)
    assert found.findings == ()
    return read(output)


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("kind", "declared", "served"),
    [
        (lambda _: torch.float16, torch.float16, torch.float16),
        (lambda _: torch.float32, torch.float32, torch.bfloat16),
        (mixed, torch.bfloat16, torch.bfloat16),
    ],
    ids=["F16", "F32", "mixed"],
)
def test_codes_are_those_of_the_stored_values(
    kind: Kind, declared: torch.dtype, served: torch.dtype, example_model: Path, tmp_path: Path
) -> None:
    """The nearest codes by float64, but where float32's division may tip a tie; calibrated in the dtype that vLLM serves."""
    source = written(example_model, tmp_path / "source", kind, declared, finer=True)
    ours, plain = converted(source, tmp_path / "out"), read(source)
    coded = [name for name, tensor in ours.items() if tensor.dtype == torch.float8_e4m3fn]
    assert len(coded) == 42
    for name in coded:
        scale = ours[f"{name}_scale"].double()
        quotient = plain[name].double() / scale
        assert plain[name].double().abs().max() <= scale * 448 * (1 + 2**-23)
        found = (CODES[ours[name].view(torch.uint8).long()] - quotient).abs()
        grid = CODES[~CODES.isnan()].sort().values
        above = torch.bucketize(quotient, grid).clamp(1, len(grid) - 1)
        best = torch.minimum((grid[above] - quotient).abs(), (quotient - grid[above - 1]).abs())
        assert (found <= best + quotient.abs() * 2**-22).all(), name
    for name in set(plain) - set(coded):
        assert plain[name].dtype == ours[name].dtype == kind(name)
        assert torch.equal(raw(plain[name]), raw(ours[name])), name
    component = read_inventory(source).main
    with Reader(source, component) as reader:
        model = StreamedModel(source, component, find_scope(component.config), reader, torch.device("cpu"))
    assert {p.dtype for p in model.model.parameters()} == {served}


def test_wider_stored_bf16_gives_the_same(example_model: Path, tmp_path: Path) -> None:
    """Every amax and every code: float32 is served, and calibrated, in bfloat16."""
    source = written(example_model, tmp_path / "source", lambda _: torch.float32, torch.float32, finer=False)
    wide, plain = converted(source, tmp_path / "wide"), converted(example_model, tmp_path / "plain")
    amaxes = [json.loads((tmp_path / name / "ckptq.json").read_text())["amax"] for name in ("wide", "plain")]
    assert amaxes[0] == amaxes[1]
    for name, tensor in plain.items():
        other = wide[name] if tensor.dtype != torch.bfloat16 else wide[name].bfloat16()
        assert torch.equal(raw(tensor), raw(other)), name


@pytest.mark.parametrize("where", ["model.layers.2.mlp.up_proj.weight", "visual.merger.mlp.0.weight"])
def test_f16_that_overflowed(where: str, example_model: Path, tmp_path: Path) -> None:
    source = written(example_model, tmp_path / "source", lambda _: torch.float16, torch.float16, finer=False)
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        if where in tensors:
            tensors[where][3, 1] = torch.inf
            save_file(tensors, file, metadata={"format": "pt"})
    recipe = load_recipe("qwen25vl-lm-fp8-dynamic-modelopt", model=str(source), output=str(tmp_path / "out"))
    with pytest.raises(DataError, match=f"{where}: holds infinite values"):
        convert(prepare(recipe), resume=False, device="cpu", memory=None, console=Console(quiet=True))
