"""A figure of matplotlib as SVG within a page: its colors are the page's, its text is text, and it is the same on every run."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

LEVELS = 16
"""Steps of the heat maps' colors."""
INK, MUTED, GRID, ACCENT, ODD, EQUAL = (f"#0100{number:02x}" for number in range(6))
_HEAT = tuple(f"#0200{level:02x}" for level in range(LEVELS))
_COLORS: Mapping[str, str] = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    ACCENT: "var(--accent)",
    ODD: "var(--odd)",
    EQUAL: "var(--equal)",
    **{color: f"var(--h{level})" for level, color in enumerate(_HEAT)},
}
"""{what a figure is drawn with: what the page has in its place}."""
_SVG, _LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_PLACEHOLDER = re.compile(r"#0[12]00[0-9a-f]{2}")
_FONT = re.compile(r"font(-family)?: [^;]*;?")
_SIZE = re.compile(r"\b(\d+(?:\.\d+)?)px")
_USED = re.compile(r"url\(#([^)]+)\)")


def heat(level: int) -> str:
    """What a figure is drawn with for that step of the heat maps' colors."""
    return _HEAT[level]


@contextmanager
def drawing(salt: str) -> Iterator[None]:
    """In it figures are drawn alike whatever the user's matplotlibrc says. `salt`: of ids, another for each figure of a page."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams["svg.hashsalt"] = salt
        matplotlib.rcParams["svg.fonttype"] = "none"
        matplotlib.rcParams["text.parse_math"] = False
        matplotlib.rcParams["axes.unicode_minus"] = False
        yield


def blank(width: float, height: float) -> Figure:
    """Of that many CSS pixels."""
    return Figure(figsize=(width / 72, height / 72), dpi=72)


def inline(figure: Figure, label: str, titles: Mapping[str, str | Sequence[str]]) -> Markup:
    """The figure as an `svg` element. `label`: for who can't see it.

    titles  {gid of an artist: what a pointer on it shows, or on each of its points}
    """
    kept = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(kept, format="svg", transparent=True, metadata=nothing)
    root = ElementTree.fromstring(kept.getvalue())  # noqa: S314  matplotlib's own, and it escapes
    for parent in list(root.iter()):
        for child in [c for c in parent if _local(c) in ("metadata", "style")]:
            parent.remove(child)
    used = {name for e in root.iter() for value in e.attrib.values() for name in _USED.findall(value)}
    used |= {value[1:] for e in root.iter() for key, value in e.attrib.items() if key.endswith("href")}
    for element in root.iter():
        if (name := element.get("id")) is not None and name in titles:
            _entitle(element, titles[name])
        _clean(element, used)
    width, height = (root.attrib.pop(side).removesuffix("pt") for side in ("width", "height"))
    root.attrib.update({"width": width, "height": height, "role": "img", "aria-label": label})
    root.attrib.pop("version", None)
    for prefix, address in (("", _SVG), ("xlink", _LINK)):
        ElementTree.register_namespace(prefix, address)
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # noqa: S704  every text in it is escaped by the line itself


def _entitle(element: ElementTree.Element, said: str | Sequence[str]) -> None:
    element.set("class", "told")
    targets = [element] if isinstance(said, str) else [e for e in element.iter() if _local(e) == "use"]
    for target, text in zip(targets, [said] if isinstance(said, str) else said, strict=True):
        title = ElementTree.Element(f"{{{_SVG}}}title")
        title.text = text
        target.insert(0, title)


def _clean(element: ElementTree.Element, used: set[str]) -> None:
    """Ids that nothing refers to go: pages have several figures. Fonts are the page's, but for their sizes; so are colors."""
    if (name := element.get("id")) is not None and name not in used:
        del element.attrib["id"]
        if name.startswith("mono"):
            element.set("class", "mono")
    for key in [key for key in element.attrib if key.endswith("}href")]:
        element.set("href", element.attrib.pop(key))
    style = element.get("style")
    if style is None:
        return
    if _local(element) == "text" and (size := _SIZE.search(style)):
        style = f"font-size: {size[1]}px; {_FONT.sub('', style).strip()}"
    element.set("style", _PLACEHOLDER.sub(lambda found: _COLORS[found[0]], style))
    if _local(element) == "text" and "fill:" not in style:
        element.set("fill", "currentColor")


def _local(element: ElementTree.Element) -> str:
    return str(element.tag).rpartition("}")[2]
