"""`ckptq compare --report html=FILE`: the page of real comparisons in a real browser, and of whatever a comparison can come to."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
import signal
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import browser
import matplotlib
import numpy as np
import pytest
import torch
from browser import Scheme, look_at
from corpus.edit import alter, times
from hypothesis import given
from hypothesis import strategies as st
from make_coded import make_coded
from PIL import Image

from ckptq.cli import main
from ckptq.compare import Comparison
from ckptq.compare.behavior import Behavior, Gap, LayerGap, SampleGap, TokenGap, WorstSample
from ckptq.compare.images import Generation, compare_images
from ckptq.compare.images import figures as of_images
from ckptq.compare.matched import Unmatched
from ckptq.compare.policy import judge, parse_policy
from ckptq.compare.report import grids, html
from ckptq.compare.sampled import figures as of_behavior
from ckptq.compare.weights import WeightError, worst_first
from ckptq.compare.weights import figures as of_weights

WIDTHS = (1200, 360)
TAGS = {
    "html", "head", "meta", "title", "style", "body", "header", "main", "section", "nav", "article", "figure", "figcaption",
    "details", "summary", "h1", "h2", "h3", "h4", "p", "a", "ul", "li", "dl", "dt", "dd", "div", "span", "mark", "strong", "em",
    "code", "pre", "wbr", "img", "table", "thead", "tbody", "tr", "th", "td", "svg", "g", "path", "use", "defs", "text",
    "clippath", "rect",
}  # fmt: skip
ATTRIBUTES = {
    "lang", "charset", "name", "content", "http-equiv", "class", "id", "href", "src", "alt", "title", "role", "tabindex", "scope",
    "aria-label", "aria-labelledby", "style", "xmlns", "width", "height", "viewbox", "d", "x", "y", "transform", "clip-path",
    "fill",
}  # fmt: skip


class Page(HTMLParser):
    """What is in a page. Raises where an element or attribute is not among those that a report has, or one is left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.titles: list[str] = []
        self.images: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        assert {tag} <= TAGS
        assert found.keys() <= ATTRIBUTES
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"]] if "href" in found else []
        self.titles += [found["title"]] if "title" in found else []
        self.images += [found["src"]] if "src" in found else []
        if tag not in ("meta", "img", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def sound(text: str) -> Page:
    """The page, if it is whole in itself: no script, nothing to fetch, each link to a place in it."""
    page = Page(text)
    assert len(set(page.ids)) == len(page.ids)
    assert all(link[0] == "#" and link[1:] in page.ids for link in page.links)
    assert all(image.startswith("data:image/jpeg;base64,") for image in page.images)
    assert set(re.findall(r"url\(([^)]*)\)", text)) <= {f"#{name}" for name in page.ids}
    assert "@import" not in text
    text.encode()
    return page


def distance(color: list[float], page: list[float]) -> float:
    """How far a color stands out from the page's: what counts for the eye is its lightness."""
    weights = (0.2126, 0.7152, 0.0722)
    return abs(sum(w * ((a / 255) ** 2.2 - (b / 255) ** 2.2) for w, a, b in zip(weights, color, page, strict=False)))


def seen(page: str, scheme: Scheme, folder: Path, height: int = 2000) -> list[browser.View]:
    """The page on a wide screen and on a narrow one. It can be read there, does not scroll sideways and asks for nothing."""
    views = look_at(page, scheme, WIDTHS, folder, height)
    for view, width in zip(views, WIDTHS, strict=True):
        found = view.found
        assert found["dark"] == (scheme == "dark")
        assert (found["width"], found["scrolls"]) == (width, width)
        assert (found["fetched"], found["scripts"]) == ([], 0)
        assert found["texts"] > 50
        assert found["worst"][0][0] >= 4.5, f"contrast of {found['worst']}"
        assert found["smallest"] >= 11
        assert all(across > 0 and alt for across, alt in found["images"])
        corner = view.picture.getpixel((2, 2))
        assert list(corner) == found["page"]
        assert (max(corner) < 64) == (scheme == "dark")
        assert (min(corner) > 192) == (scheme == "light")
        shades = np.asarray(view.picture.convert("L"), np.float32)
        assert (np.abs(shades - shades[2, 2]) > 100).mean() > 0.01, "there is no ink on the page"
    return views


# --- real comparisons ---


@pytest.fixture(scope="module")
def planted(example_model: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a candidate of which one scale is twice what it should be, by the command line."""
    tmp = tmp_path_factory.mktemp("planted")
    folder = make_coded(example_model, tmp / "fp8", "qwen25vl-lm-fp8-dynamic-modelopt")
    alter(times(2), "model.layers.3.mlp.down_proj.weight_scale")(folder)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        main(
            ["compare", str(example_model), str(folder), "--coco", str(scenes / "eval"),
             str(scenes / "annotations/captions_eval.json"), "--samples", "4",
             "--fail-on", "kl_mean>100", "--fail-on", "weight_relative_l2_max>0.05",
             "--report", f"html={tmp / 'r.html'}"]
        )  # fmt: skip
    signal.signal(signal.SIGTERM, before)
    assert stop.value.code == 1
    return (tmp / "r.html").read_text(encoding="utf-8")


def test_what_the_page_says(planted: str, example_model: Path) -> None:
    page = sound(planted)
    for said in (
        "Failed: 1 of 2 limits broken", "weight_relative_l2_max>0.05", "95 % interval", "model.layers.3.mlp.down_proj.weight",
        "Describe the image.", "finds likeliest", "mean over tokens, nats", "42 that differ", "transformers",
        "images", "these are checkpoints", "sequence_length",
    ):  # fmt: skip
        assert said in page.text, said
    assert len(page.images) == 4
    assert sum(title.startswith("KL ") and " · NLL " in title for title in page.titles) >= 8
    assert str(example_model) in page.text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser_the_fault_leaps_to_the_eye(planted: str, scheme: Scheme, tmp_path: Path) -> None:
    wide, _ = seen(planted, scheme, tmp_path)
    cells = {cell["title"].rpartition(": ")[0]: cell for cell in wide.found["cells"]}
    salience = {name: distance(cell["fill"], wide.found["page"]) for name, cell in cells.items() if cell["fill"][3] == 1}
    weights = {name: value for name, value in salience.items() if "model.layers" in name}
    assert len(weights) == 42
    assert max(weights, key=lambda name: weights[name]) == "layer 3, model.layers: mlp.down_proj"
    assert sorted(weights.values())[-1] > 1.5 * sorted(weights.values())[-2]
    states = {name: value for name, value in salience.items() if "in the layer" in name}
    assert len(states) == 54
    fault = "layer 3, in the layer: mlp.down_proj"
    assert salience[fault] == max(states.values())
    assert salience["layer 3, hidden states"] > 1.5 * salience["layer 2, hidden states"]
    at = cells[fault]
    assert wide.picture.getpixel((round(at["x"]), round(at["y"]))) == pytest.approx(at["fill"][:3], abs=1)
    assert not any("visual" in name for name in salience), "what is equal is hollow"


def test_a_tower_that_was_quantized_by_mistake_has_rows_of_its_own(
    example_model: Path, copy_model: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = copy_model(tmp_path)
    alter(lambda t: t.mul(16).to(torch.float8_e4m3fn).to(t.dtype).div(16), "visual.blocks.*.attn.qkv.weight")(folder)
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(example_model), str(folder), "--weights-only", "--report", f"html={tmp_path / 'r.html'}"])
    assert stop.value.code == 0
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    page = sound(text)
    assert "No limit was given" in page.text
    assert "The candidate has no record of a recipe." in page.text
    assert "left out by --weights-only" in page.text
    colored = re.findall(r"<title>([^<]*)</title><path [^>]*fill: var\(--h\d+\)", text)
    assert [name.rpartition(": ")[0] for name in colored] == [f"layer {layer}, visual.blocks: attn.qkv" for layer in range(4)]


def test_outputs_side_by_side(tmp_path: Path) -> None:
    """Images, an animation of which the worst frame is shown, numbers that are no image; seconds and memory."""
    sides = [tmp_path / "a", tmp_path / "b"]
    random = np.random.default_rng(0)
    noise = random.integers(0, 200, (2, 96, 128, 3), np.uint8)
    for side, more in zip(sides, (0, 40), strict=True):
        (side / "video").mkdir(parents=True)
        Image.fromarray(noise[0] + np.uint8(more)).save(side / "far.png")
        Image.fromarray(noise[1]).save(side / "same.png")
        for frame in range(3):
            Image.fromarray(np.full((8, 6, 3), 100 + (more // 2 if frame == 1 else 0), np.uint8)).save(
                side / "video" / f"{frame}.png"
            )
        np.save(side / "latent.npy", np.ones((4, 8, 8), np.float32))
    taken = Generation((4.0, 2.0), (100.0,)), Generation((1.5,))
    images = compare_images(*sides, reference_generation=taken[0], candidate_generation=taken[1])
    figures = of_images(images)
    limits = judge([parse_policy("mae_max<50")], figures)
    sizes = {"reference": 4, "candidate": 4}
    found = Comparison(*map(str, sides), images=images, figures=figures, limits=limits, sizes=sizes)
    text = html.text(found)
    page = sound(text)
    assert len(page.images) == 9
    for said in (
        "video",
        "frame 1 of 3",
        "12.8 times as bright",
        "no image: float32 [4, 8, 8]",
        "≤ 0.08",
        "4, 2",
        "Failed: 1 of 1",
    ):
        assert said in page.text, said
    seen(text, "dark", tmp_path)
    shutil.rmtree(sides[1])
    assert "it can't be read any more" in sound(html.text(found)).text


# --- whatever a comparison can come to ---

NASTY = "</style></script><script>ran=1</script><img src=x onerror=ran=1>\" onload='ran=1' $x^2$ {{ 7*7 }} ]]> \u202e\x1b\ud800"


def weight(name: str, error: float, coding: str = "FP8 tensor", note: str = "") -> WeightError:
    sqnr = math.inf if error == 0 else -20 * math.log10(error) if math.isfinite(error) else math.nan
    return WeightError(name, "F8_E4M3", coding, (8, 4), 1 - min(error, 1) / 2, error, error, sqnr, note)


def behavior(samples: int = 1, kl: float = 0.25, error: float = 0.1, name: str = "a") -> Behavior:
    tokens = tuple(TokenGap(f"{name}{at}", kl, 0.5, 0.75, f"{name}\n", f"{name}?") for at in range(3))
    gap = Gap(error, 0.9, 20.0)
    return Behavior(
        gap,
        (LayerGap(0, gap, {f"{name}_proj": error}),),
        tuple(SampleGap(f"{name} {at}", 3, kl, kl, 0.5, 0.75, name) for at in range(samples)),
        (WorstSample(f"{name} 0", name, Path(f"{name}.png".replace("/", "")), Path("x.wav"), tokens),),
        (kl,) * 3 * samples,
        (0.5,) * 3 * samples,
        (0.75,) * 3 * samples,
        (False,) * 3 * samples,
    )


def comparison(
    name: str = "a", weights: tuple[WeightError, ...] | None = None, seen: Behavior | None = None, limits: str = "", **more: Any
) -> Comparison:
    with np.errstate(all="ignore"):
        figures = {**of_weights(weights or (), 0), **(of_behavior(seen) if seen else {})}
    ordered = None if weights is None else tuple(worst_first(weights))
    judged = judge([parse_policy(limit) for limit in limits.split()], figures)
    return Comparison(f"{name}/r", f"{name}/c", ordered, behavior=seen, figures=figures, limits=judged, **more)


LAYERS = tuple(weight(f"model.layers.{at}.mlp.up_proj.weight", 0.026) for at in range(80))
COMES = {
    "nothing": comparison(),
    "no tensors": comparison(weights=()),
    "all equal": comparison(weights=(weight("a.weight", 0.0), weight("b.0.c.weight", 0.0)), limits="weight_cosine_min<0.5"),
    "infinite": comparison(weights=(weight("a.weight", math.inf), weight("a.1.b.weight", math.nan, note="the shapes differ"))),
    "one sample": comparison(seen=behavior(), sizes={"reference": 0, "candidate": 7}),
    "no error": comparison(seen=behavior(2, 0.0, 0.0)),
    "broken": comparison(seen=behavior(2, math.nan, math.nan), limits="kl_mean>1"),
    "endless": comparison(seen=behavior(2, math.inf, math.inf)),
    "large": comparison(weights=(*LAYERS, weight("model.layers.41.mlp.down_proj.weight", 1.5)), seen=behavior(3000)),
    "many types": comparison(weights=tuple(weight(f"l.{at % 300}.m{at}.weight", at / 1000) for at in range(1, 900))),
    "a recipe": comparison(weights=(weight("a.1.b", 0.1),), recipe={"quantize": [{"modules": ["*"]}], "odd": {1: Path("x")}}),
}  # fmt: skip


@pytest.mark.parametrize("name", COMES)
def test_every_comparison_has_a_page(name: str) -> None:
    found = COMES[name]
    text = html.text(found)
    page = sound(text)
    assert len(text) < 1_000_000
    assert found.candidate in page.text
    if found.weights:
        shown = min(html.WORST, sum(error.relative_l2 != 0 for error in found.weights))
        assert text.count('<th scope="row"><code>') >= shown
    if name == "a recipe":
        assert "quantize:\n- modules:\n  - '*'" in page.text
    if name == "infinite":
        assert page.text.count("×") >= 3
        assert "the shapes differ" in page.text


def test_names_and_texts_are_nothing_but_text(tmp_path: Path) -> None:
    """In the parser, and in a browser that would run what is in them. One of them is too long for any screen."""
    long = "x" * 400
    nasty = comparison(
        NASTY,
        (weight(f"{NASTY}.3.{NASTY}.weight", 0.5, NASTY, NASTY), weight(f"{long}.1.{long}", 0.1), weight("t.2.$a_b$.weight", 0.2)),
        behavior(2, name=NASTY),
        unmatched=(Unmatched(NASTY, NASTY),),
        versions={NASTY: NASTY},
        settings={NASTY: NASTY, long: long},
        recipe={NASTY: [NASTY, long]},
        skipped={"images": NASTY},
        limits="kl_mean>0.1",
    )
    text = html.text(nasty)
    page = sound(text)
    kept = "<img src=x onerror=ran=1>\" onload='ran=1' $x^2$ {{ 7*7 }} ]]> \\u202e\\x1b\\ud800"
    assert page.text.count(kept) > 10
    assert not set(page.text) & set("\u202e\x1b\ud800")
    seen(text, "light", tmp_path, 1200)


def test_a_script_that_came_in_would_not_run(tmp_path: Path) -> None:
    """The page's own policy stops it, and `seen` would find it: without the policy it runs."""
    text = html.text(COMES["all equal"]).replace("</main>", "<script>window.ran = 1</script></main>")
    view = look_at(text, "light", [360], tmp_path, 800)[0]
    assert view.found["scripts"] == 0
    opened = re.sub(r"<meta http-equiv[^>]*>", "", text)
    assert look_at(opened, "light", [360], tmp_path, 800)[0].found["scripts"] == 1


def test_equal_comparisons_have_equal_pages_whatever_the_users_matplotlib_is_set_to() -> None:
    found = COMES["large"]
    text = html.text(found)
    with matplotlib.rc_context({"font.size": 40, "text.parse_math": True, "svg.fonttype": "path", "axes.facecolor": "red"}):
        assert html.text(found) == text
        assert matplotlib.rcParams["font.size"] == 40


def test_without_a_browser_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CHROMIUM", raising=False)
    with pytest.raises(pytest.fail.Exception, match="apt-get install --no-install-recommends chromium"):
        browser.chromium()


# --- what is drawn ---


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.mlp.up_proj.weight", ("model.layers", "mlp.up_proj", 3)),
        ("model.layers.10.mlp.experts.7.up_proj.weight", ("model.layers", "mlp.experts.*.up_proj", 10)),
        ("visual.merger.mlp.2.weight", ("visual.merger.mlp", "*", 2)),
        ("transformer/blocks.0.attn.to_out.0.bias", ("transformer/blocks", "attn.to_out.*.bias", 0)),
        ("lm_head.weight", ("", "lm_head", -1)),
        ("model.conv1d.weight", ("", "model.conv1d", -1)),
    ],
)
def test_where_a_tensor_is_drawn(name: str, place: tuple[str, str, int]) -> None:
    assert grids.placed(name) == place


ERRORS = st.floats(min_value=0) | st.just(math.nan)


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["a.{}.b.weight", "a.{}.e.{}.c.weight", "d"]), ERRORS), min_size=1))
def test_a_cell_is_the_worst_of_its_tensors(tensors: list[tuple[int, str, float]]) -> None:
    errors = [
        dataclasses.replace(weight("", 0.5), name=form.format(at, i), relative_l2=e) for i, (at, form, e) in enumerate(tensors)
    ]
    grid = grids.of_weights(errors)
    assert grid.left == 0
    cells = {(row.part, row.name, layer): v for row in grid.rows for layer, v in zip(grid.columns, row.values, strict=True)}
    for error in errors:
        part, name, layer = grids.placed(error.name)
        cell = cells[part, name, grids.ALONE if layer < 0 else str(layer)]
        assert cell is not None
        assert math.isnan(cell) or cell >= error.relative_l2


@given(st.lists(ERRORS))
def test_every_token_is_in_the_histogram(kl: list[float]) -> None:
    found = grids.bins(kl)
    assert sum(found.counts) + found.none + found.odd == len(kl)
    assert found.none == sum(value < grids.TINY for value in kl)


@given(st.lists(st.floats(min_value=0, exclude_min=True, allow_infinity=False), min_size=1))
def test_larger_errors_have_larger_places(values: list[float]) -> None:
    scale = grids.span(values)
    places = [scale.place(value) for value in sorted(values)]
    assert places == sorted(places)
    assert 0 <= places[0] <= places[-1] <= 1
    assert scale.place(max(1.0, *values)) == pytest.approx(1)
