"""The pass over the weights: the same bytes however it is cut, odd values found anywhere, and no tensor whole in memory."""

import json
import math
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ckptq import digest, encode
from ckptq.checkpoint import DTYPE_BYTES, Component, Reader, TensorSpec, read_inventory
from ckptq.errors import DataError
from ckptq.numerics import Desk, find_numerics, fp8
from ckptq.pipeline import write_shards
from ckptq.plan import Copy, Encode, Observer, Op, Plan, Scale, ShardSpec
from ckptq.schemes import SCHEMES, Scheme
from ckptq.tensors import SAFETENSORS_DTYPES, TORCH_DTYPES, raw
from ckptq.threads import Line, in_order

NAMES = ("q", "k", "v")
"""A fused group; each weight is in another file of the source and of the output."""


def source(folder: Path, weights: Mapping[str, torch.Tensor]) -> Component:
    """A checkpoint of these weights, and an embedding, each in a file of its own."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    index = {}
    for name, tensor in weights.items():
        index[f"{name}.weight"] = file = f"{name}.safetensors"
        save_file({f"{name}.weight": tensor.contiguous()}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return read_inventory(folder).main


def plan(component: Component, scheme: Scheme, names: Sequence[str] = NAMES) -> Plan:
    """Everything in `names` is quantized as one group, all else is copied; a file for each."""
    observers = tuple(Observer(name, "weight", 0) for name in names)
    shards = []
    for name, tensor in component.tensors.items():
        module = name.removesuffix(".weight")
        ops: tuple[Op, ...] = (Copy(name, tensor.spec),)
        if module in names:
            shape = tensor.spec.shape
            whole = Scale(observers, scheme.limit, TensorSpec(f"{module}.scale", "F32", ())) if scheme.limit else None
            local = TensorSpec(f"{module}.scales", scheme.scale, scheme.scale_shape(shape)) if scheme.scale else None
            ops = (Encode(name, scheme, scheme.codes_spec(name, shape), whole, local), *([whole] if whole else []))
        offsets, at = {}, 0
        for spec in sorted((spec for op in ops for spec in op.outputs), key=lambda s: -DTYPE_BYTES[s.dtype]):
            offsets[spec.name] = at
            at += spec.nbytes
        shards.append(ShardSpec(f"out-{module}.safetensors", ops, offsets, at))
    return Plan("", tuple(shards), (), observers if scheme.limit else (), {}, (), (), (), 1)


def write(work: Path, component: Component, planned: Plan, amax: dict[Observer, float], workers: int = 2) -> dict[str, str]:
    digests: dict[str, str] = {}
    out = work / "out"
    out.mkdir(exist_ok=True)
    with Reader(work / "in", component) as reader:
        write_shards(
            out, planned, planned.shards, component, reader, amax, lambda _, found: digests.update(found), lambda _: None,
            workers=workers,
        )  # fmt: skip
    return digests


def expected(weights: Mapping[str, torch.Tensor], scheme: Scheme) -> dict[str, bytes]:
    """Every stored tensor's bytes, from one call a weight."""
    found: dict[str, bytes] = {}
    scale = fp8.scale(max(fp8.amax(weights[name]) for name in NAMES), scheme.limit) if scheme.limit else None
    for name, weight in weights.items():
        if name not in NAMES:
            found[f"{name}.weight"] = bytes(raw(weight))
            continue
        codes = torch.empty(scheme.codes_spec("", tuple(weight.shape)).shape, dtype=TORCH_DTYPES[scheme.codes])
        local = torch.empty(scheme.scale_shape(tuple(weight.shape)), dtype=TORCH_DTYPES[scheme.scale]) if scheme.scale else None
        find_numerics(scheme).encode(weight, scheme, scale, codes, local, Desk())
        found[f"{name}.weight"] = bytes(raw(codes))
        if local is not None:
            found[f"{name}.scales"] = bytes(raw(local))
        if scale is not None:
            found[f"{name}.scale"] = bytes(raw(torch.tensor([scale])))
    return found


def digest_of(dtype: str, data: bytes) -> str:
    """As the definition has it: of the digests of parts, where there are several."""
    cuts = range(0, len(data), digest.PART) or range(1)
    return digest.join([digest.of_bytes(dtype, memoryview(data)[at : at + digest.PART]) for at in cuts])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    scheme=st.sampled_from(sorted(SCHEMES)),
    rows=st.tuples(*[st.integers(1, 400)] * 3),
    groups=st.integers(1, 6),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    part=st.integers(50, 2500),
    band=st.integers(200, 60_000),
    workers=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_however_it_is_cut(
    tmp_path_factory: pytest.TempPathFactory, scheme: str, rows: tuple[int, int, int], groups: int, dtype: torch.dtype,
    part: int, band: int, workers: int, seed: int,
) -> None:  # fmt: skip
    """Parts, bands and threads change no byte, no scale and no amax; digests are those of the files."""
    work, how = tmp_path_factory.mktemp("cut"), SCHEMES[scheme]
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(n, groups * 32, generator=generator).mul(0.02).to(dtype)
        for name, n in zip((*NAMES, "embed"), (*rows, 50), strict=True)
    }
    component = source(work / "in", weights)
    planned, amax = plan(component, how), dict[Observer, float]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digest, "PART", part * 16)  # no value lies across an edge
        patch.setattr(encode, "BAND", band)
        digests = write(work, component, planned, amax, workers)
        wanted = expected(weights, how)
        written = {name: t for shard in planned.shards for name, t in load_file(work / "out" / shard.file).items()}
        assert {name: bytes(raw(t)) for name, t in written.items()} == wanted
        assert digests == {name: digest_of(SAFETENSORS_DTYPES[t.dtype], wanted[name]) for name, t in written.items()}
    assert amax == ({o: fp8.amax(weights[o.module]) for o in planned.observers})


SMALL = {name: torch.full((256, 64), 0.5, dtype=torch.bfloat16) for name in (*NAMES, "embed")}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["embed", "q", "v"])
def test_an_odd_value_is_named(tmp_path: Path, scheme: str, value: float, where: str) -> None:
    """In a copy, in a weight, and in the last weight of a group of which the first is written before."""
    weights = {name: tensor.clone() for name, tensor in SMALL.items()}
    weights[where][200, 63] = value
    component = source(tmp_path / "in", weights)
    what = "NaN" if math.isnan(value) else "infinite"
    with pytest.raises(DataError, match=rf"^{where}\.weight: holds {what} values \(in {where}\.safetensors\); expected finite"):
        write(tmp_path, component, plan(component, SCHEMES[scheme]), {})
    assert not (tmp_path / "out" / f"out-{where}.safetensors").exists()


def test_a_known_amax_is_not_measured_again(tmp_path: Path) -> None:
    """Calibration has seen the weights: what it found counts, whatever it is."""
    component = source(tmp_path / "in", SMALL)
    planned = plan(component, SCHEMES["fp8"])
    amax = dict.fromkeys(planned.observers, 448.0)
    write(tmp_path, component, planned, amax)
    assert load_file(tmp_path / "out" / "out-q.safetensors")["q.scale"] == 1.0


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("amax", [1.0, 0.337, 128.0, 1e-35])
def test_an_inverse_is_float32(default: torch.dtype, amax: float) -> None:
    """Whatever torch's default dtype is: transformers changes it, for all threads, while it builds the model that calibrates."""
    observer = Observer("q", "weight", 0)
    divisor = Scale((observer,), 2688.0, TensorSpec("q.weight_global_scale", "F32", (1,)), inverse=True)
    torch.set_default_dtype(default)
    try:
        stored, used = (value(divisor, {observer: amax}) for value in (encode.stored_value, encode.multiplier))
    finally:
        torch.set_default_dtype(torch.float32)
    one = np.float32(1)
    assert stored == float(one / (np.float32(amax) / np.float32(2688)))
    assert used == float(one / np.float32(stored))


@pytest.mark.parametrize("amax", [1e-36, 1e-40, 1e-45])
def test_a_divisor_is_finite(amax: float) -> None:
    """Of weights that are next to nothing, too."""
    observer = Observer("q", "weight", 0)
    divisor = Scale((observer,), 2688.0, TensorSpec("q.weight_global_scale", "F32", (1,)), inverse=True)
    assert encode.multiplier(divisor, {observer: amax}) > 0
    assert math.isfinite(encode.stored_value(divisor, {observer: amax}))


def test_amaxes_of_files_that_are_there_already(tmp_path: Path) -> None:
    """A resumed run writes no file twice, and still tells every amax."""
    component = source(tmp_path / "in", SMALL)
    planned, amax = plan(component, SCHEMES["fp8"]), dict[Observer, float]()
    (tmp_path / "out").mkdir()
    with Reader(tmp_path / "in", component) as reader:
        write_shards(tmp_path / "out", planned, (), component, reader, amax, lambda *_: None, lambda _: None)
    assert amax == dict.fromkeys(planned.observers, 0.5)
    assert not list((tmp_path / "out").iterdir())


def test_progress_adds_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "PART", 1000)
    component = source(tmp_path / "in", SMALL)
    planned, told = plan(component, SCHEMES["nvfp4"]), list[int]()
    (tmp_path / "out").mkdir()
    with Reader(tmp_path / "in", component) as reader:
        write_shards(tmp_path / "out", planned, planned.shards, component, reader, {}, lambda *_: None, told.append)
    assert sum(told) == component.nbytes


MEMORY = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
import torch
from test_encode import plan, write
from ckptq.checkpoint import read_inventory
from ckptq.cost import peak_rss
from ckptq.schemes import SCHEMES
work = Path(sys.argv[1])
component = read_inventory(work / "in").main
before = peak_rss()
write(work, component, plan(component, SCHEMES[sys.argv[2]], ("large",)), {}, workers=2)
print(peak_rss() - before)
"""


def test_no_tensor_is_whole_in_memory(tmp_path: Path) -> None:
    """One of 272 MB, as wide as a 72B's down_proj, to be quantized, and one of 134 MB that stays."""
    schemes = ["fp8", "fp8-block", "nvfp4"]
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    shapes = {"large.weight": (4608, 29568), "embed.weight": (8192, 8192)}
    header, at = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + 2 * math.prod(shape)]}
        at += 2 * math.prod(shape)
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:  # its data is a hole, which takes no disk
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    here = Path(__file__).parent
    for scheme in schemes:
        command = [sys.executable, "-c", MEMORY, tmp_path, scheme, here.parent, here]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert int(done.stdout) < 130e6, f"{scheme}: {done.stdout}"


# Threads


def test_results_come_in_order_and_only_a_few_are_ahead() -> None:
    begun: list[int] = []
    free = threading.Event()

    def work(number: int) -> int:
        begun.append(number)
        if number == 0:
            free.wait(60)
        return number

    taken: list[int] = []
    with Line(object, 3, 5) as line:
        for number in range(5):
            line.put(lambda _, n=number: work(n), taken.append)  # type: ignore[misc]
            assert not taken
        threading.Timer(0.05, free.set).start()
        for number in range(5, 50):
            line.put(lambda _, n=number: work(n), taken.append)  # type: ignore[misc]
            assert len(begun) - len(taken) <= 6
        line.drain()
    assert taken == [*range(50)]


def test_work_may_wait_for_earlier_work() -> None:
    with Line(object, 2, 4) as line:
        first = line.put(lambda _: 20)
        second = line.put(lambda _: first.result() + 1)
        assert line.put(lambda _: second.result() * 2).result() == 42


def test_after_an_error_nothing_more_begins() -> None:
    begun: list[int] = []

    def work(number: int, desk: object) -> int:
        begun.append(number)
        if number == 3:
            raise ValueError("three")
        return number

    def numbers() -> Iterator[int]:
        yield from range(100_000)

    with pytest.raises(ValueError, match="three"):
        list(in_order(work, numbers(), object))
    assert len(begun) < 1000
    assert threading.active_count() < 10
