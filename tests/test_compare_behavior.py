"""compare: two checkpoints in lock-step. Against transformers' own forward, and with faults planted that the figures must show."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from corpus.edit import Edit, alter, swap, times
from hypothesis import given, settings
from hypothesis import strategies as st
from peers.served import read

from ckptq.calibration import Sample
from ckptq.calibration.encode import Encoder
from ckptq.checkpoint import read_inventory
from ckptq.compare.behavior import Behavior, measure_behavior
from ckptq.compare.decoded import Decoded, decoded
from ckptq.compare.head import Head, compare_heads
from ckptq.compare.spans import judged
from ckptq.compare.tally import gap
from ckptq.console import Console
from ckptq.convert import convert
from ckptq.errors import RecipeError, UnsupportedError
from ckptq.numerics import find_numerics
from ckptq.prepare import prepare
from ckptq.recipe import load_recipe
from ckptq.schemes import SCHEMES
from ckptq.tensors import raw

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "examples" / "tiny-qwen2.5-vl"
SCENES = ROOT / "examples" / "scenes"


def scenes(count: int) -> list[Sample]:
    data = json.loads((SCENES / "annotations/captions_eval.json").read_text())
    files = {image["id"]: image["file_name"] for image in data["images"]}
    rows = [(files[a["image_id"]], a["caption"]) for a in data["annotations"][:count]]
    return [Sample(name, caption, "Describe the image.", SCENES / "eval" / name) for name, caption in rows]


TEXT = (ROOT / "tests/data/heldout.txt").read_text()
SAMPLES = [Sample(f"text {i}", TEXT[i * 400 : (i + 1) * 400]) for i in range(4)] + scenes(3)


def measure(candidate: Path, samples: list[Sample] = SAMPLES, reference: Path = SOURCE, memory: int = 10**9) -> Behavior:
    return measure_behavior(
        reference,
        candidate,
        samples,
        sequence_length=512,
        max_pixels=None,
        device=torch.device("cpu"),
        memory=memory,
        console=Console(quiet=True),
    )


def mean(values: tuple[float, ...]) -> float:
    return math.fsum(values) / len(values)


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fp8") / "out"
    calibration = (
        f"calibration={{source: coco, images: {SCENES}/calib, annotations: {SCENES}/annotations/captions_calib.json, samples: 16}}"
    )
    recipe = load_recipe("qwen25vl-lm-fp8", [calibration], model=str(SOURCE), output=str(out))
    convert(prepare(recipe), resume=False, device="cpu", memory=None, console=Console(quiet=True))
    return out


@pytest.fixture(scope="module")
def good(fp8: Path) -> Behavior:
    return measure(fp8)


def test_a_checkpoint_beside_itself_has_no_error() -> None:
    found = measure(SOURCE)
    assert max(found.kl) == 0
    assert all(found.same_top)
    assert found.nll_reference == found.nll_candidate
    assert all(layer.hidden.relative_l2 == 0 for layer in found.layers)


def test_losses_are_those_of_the_resident_model(good: Behavior) -> None:
    """The reference's, of transformers' own forward with its own head, on the judged tokens."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(SOURCE, dtype=torch.bfloat16)
    encoder = Encoder(SOURCE, None, 512)
    with torch.inference_mode():
        for sample, found in zip(SAMPLES, good.samples, strict=True):
            inputs = encoder.encode(sample)
            span = judged(sample, inputs, encoder)
            scored = torch.log_softmax(model(**inputs, use_cache=False).logits[0].float(), -1)
            wanted = [-float(scored[at - 1, inputs["input_ids"][0, at]]) for at in span]
            assert found.tokens == len(span)
            assert found.nll_reference == pytest.approx(math.fsum(wanted) / len(wanted), rel=1e-3, abs=1e-5)


def test_an_answer_is_judged_and_its_prompt_is_not() -> None:
    encoder = Encoder(SOURCE, None, 512)
    sample = scenes(1)[0]
    inputs = encoder.encode(sample)
    span = judged(sample, inputs, encoder)
    told = encoder.text(inputs["input_ids"][0, span.start : span.stop].tolist())
    assert told == f"{sample.text}<|im_end|>"


def test_waves_change_nothing(fp8: Path, good: Behavior) -> None:
    assert measure(fp8, memory=1) == good


FORMS = {  # recipe: its scheme, the scale of groups and of the whole tensor, and the mean KL that it may have
    "qwen25vl-lm-fp8-dynamic-modelopt": ("fp8-dynamic", "weight_scale", "", 0.2),
    "qwen25vl-lm-fp8-block-fp8": ("fp8-block", "weight_scale_inv", "", 0.2),
    "qwen25vl-lm-int8-compressed-tensors": ("int8", "weight_scale", "", 0.2),
    "qwen25vl-lm-mxfp8-modelopt": ("mxfp8", "weight_scale", "", 0.2),
    "qwen25vl-lm-mxfp4-compressed-tensors": ("mxfp4", "weight_scale", "", 2),
    "qwen25vl-lm-nvfp4a16-modelopt": ("nvfp4a16", "weight_scale", "weight_scale_2", 1),
}


@pytest.mark.parametrize("recipe", FORMS)
def test_every_format_computes(recipe: str, tmp_path: Path) -> None:
    """Weights are decoded as ckptq/numerics decodes them, which shares no code with it; and the model still says what it said."""
    scheme, local, whole, limit = FORMS[recipe]
    settings = load_recipe(recipe, model=str(SOURCE), output=str(tmp_path / "out"))
    convert(prepare(settings), resume=False, device="cpu", memory=None, console=Console(quiet=True))
    inventory = read_inventory(tmp_path / "out")
    component = decoded(inventory.main)
    stored = read(tmp_path / "out")
    with Decoded(inventory.root, component, inventory.main) as reader:
        for module in (f"model.layers.3.{name}" for name in ("self_attn.k_proj", "mlp.down_proj")):
            tensor = component.tensors[f"{module}.weight"]
            values = torch.empty(tensor.spec.shape, dtype=torch.bfloat16)
            reader.read_into(tensor, 0, raw(values))
            codes = stored.get(f"{module}.weight", stored.get(f"{module}.weight_packed"))
            scales = stored[f"{module}.{local}"]
            factor = float(stored[f"{module}.{whole}"]) if whole else None
            wanted = find_numerics(SCHEMES[scheme]).decode(codes, SCHEMES[scheme], factor, in_numerics(scales, scheme))
            assert torch.equal(values, wanted.to(torch.bfloat16))
            later = torch.empty(values.numel() - 64, dtype=torch.bfloat16)
            reader.read_into(tensor, 128, raw(later))
            assert torch.equal(later, values.flatten()[64:])
    found = measure(tmp_path / "out", SAMPLES[:1])
    assert 0 < mean(found.kl) < limit


def in_numerics(scales: torch.Tensor, scheme: str) -> torch.Tensor:
    """As ckptq/numerics has them: [rows, 1] of channels."""
    return scales.reshape(len(scales), -1) if scheme in ("fp8-dynamic", "int8") else scales


CLEAR = {
    "a transposed weight": alter(lambda t: t.t().contiguous(), "model.layers.2.self_attn.o_proj.weight"),
    "a reciprocal scale": alter(lambda t: 1 / t, "model.layers.2.self_attn.o_proj.weight_scale"),
    "one layer's scales doubled": alter(times(2), "model.layers.2.*.weight_scale"),
    "K's and V's scales swapped": swap("k_proj.k_scale", "v_proj.v_scale", "*.k_scale"),
}


@pytest.mark.parametrize("fault", CLEAR)
def test_planted_faults_show(fault: str, fp8: Path, good: Behavior, tmp_path: Path) -> None:
    """In the KL, and those of one layer in the first layer whose error leaps."""
    change: Edit = CLEAR[fault]
    shutil.copytree(fp8, folder := tmp_path / "faulty")
    change(folder)
    found = measure(folder)
    assert mean(found.kl) > 1.15 * mean(good.kl)
    leaps = [b.hidden.relative_l2 / a.hidden.relative_l2 for a, b in zip(good.layers, found.layers, strict=True)]
    if "swapped" not in fault:
        assert next(i for i, leap in enumerate(leaps) if leap > 1.5) == 2


def head(rows: torch.Tensor, read: list[range] | None = None) -> Head:
    """One with these rows. `read`: which were asked for."""
    found = Head.__new__(Head)
    found.size, found.finish = len(rows), lambda logits: logits

    def asked(first: int, last: int) -> torch.Tensor:
        if read is not None:
            read.append(range(first, last))
        return rows[first:last]

    found.rows = asked  # type: ignore[method-assign]
    return found


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from((3, 5000)), st.floats(0, 3))
def test_heads_in_pieces_are_heads_as_a_whole(seed: int, vocabulary: int, noise: float) -> None:
    """KL, losses and the likeliest token of two candidates against log_softmax over all of the vocabulary, in float64."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(vocabulary, 8, generator=generator) for _ in range(2)]
    rows[1] = rows[0] + noise * rows[1]
    hidden = [torch.randn(7, 8, generator=generator) * 3 for _ in range(2)]
    tokens = torch.randint(vocabulary, (7,), generator=generator)
    one, other = map(head, rows)
    p = torch.log_softmax((hidden[0] @ rows[0].T).double(), -1)
    after = [hidden[0] @ rows[1].T, hidden[1] @ rows[0].T]
    both = compare_heads([one, other, one], [hidden[0], hidden[0], hidden[1]], tokens)
    for found, logits in zip(both, after, strict=True):
        q = torch.log_softmax(logits.double(), -1)
        assert torch.allclose(found.kl, (p.exp() * (p - q)).sum(-1), atol=1e-5, rtol=1e-4)
        assert torch.allclose(found.nll_reference, -p.gather(1, tokens[:, None])[:, 0], atol=1e-4)
        assert torch.allclose(found.nll_candidate, -q.gather(1, tokens[:, None])[:, 0], atol=1e-4)
        assert found.same_top.tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(8, 30), st.floats(-7, 0), st.floats(-1, 1))
def test_the_kl_of_easy_tokens_is_told(seed: int, sure: float, small: float, shift: float) -> None:
    """One token is nearly certain, and the candidate's logits are all a little off: the KL is far below float32's 1e-7 of 1."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, 5000, generator=generator)
    logits[range(6), range(0, 5000, 900)] = sure
    others = logits + shift + 10**small * torch.randn(6, 5000, generator=generator)
    logits, others = (values.bfloat16().float() for values in (logits, others))  # as models have them
    here = torch.eye(6)  # so that a head's rows are the logits themselves
    found = compare_heads([head(logits.T), head(others.T)], [here, here], torch.zeros(6, dtype=torch.int64))[0]
    p, q = (torch.log_softmax(values.double(), -1) for values in (logits, others))
    assert torch.allclose(found.kl, (p.exp() * (p - q)).sum(-1), rtol=1e-3, atol=1e-9)


def test_rows_are_read_once_however_many_candidates_there_are() -> None:
    """None of these changes another's figures, and the same states differ in nothing."""
    read: list[range] = []
    shared = head(torch.randn(9000, 8), read)
    hidden, tokens = [torch.randn(1100, 8) for _ in range(3)], torch.randint(9000, (1100,))
    found = compare_heads([shared] * 4, [*hidden, hidden[0]], tokens)
    assert read == [range(4096), range(4096, 8192), range(8192, 9000)]
    assert torch.equal(found[1].kl, compare_heads([shared] * 2, [hidden[0], hidden[2]], tokens)[0].kl)
    assert float(found[2].kl.max()) == 0 < float(found[0].kl.min())
    with pytest.raises(UnsupportedError, match="the vocabularies differ: 9000 tokens and 8"):
        compare_heads([shared, shared, head(torch.zeros(8, 8))], hidden, tokens)


def test_other_models_are_refused(tmp_path: Path) -> None:
    shutil.copytree(SOURCE, folder := tmp_path / "short")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] -= 1
    config["text_config"]["layer_types"].pop()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match="differ in their number of layers: 6 and 5"):
        measure(folder)


def test_a_gap_is_defined_where_there_is_nothing() -> None:
    assert gap(0, 0, 0, 0).relative_l2 == 0
    assert gap(1, 0, 1, 0).relative_l2 == math.inf
    assert gap(0, 4, 4, 4) == type(gap(0, 4, 4, 4))(0.0, 1.0, math.inf)
    assert gap(1, 4, 4, 3).sqnr_db == pytest.approx(20 * math.log10(2))
