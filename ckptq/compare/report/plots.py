"""What a report draws, by matplotlib: heat maps of errors, and what the samples showed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from ckptq.compare.render import number
from ckptq.compare.report.grids import TINY, Grid, Span, bins, span
from ckptq.compare.report.svg import ACCENT, EQUAL, GRID, INK, LEVELS, MUTED, ODD, blank, drawing, heat, inline
from ckptq.reports import safe_text

if TYPE_CHECKING:
    from ckptq.compare.behavior import SampleGap

_ROW, _COLUMN, _LETTER = 20, (11, 40), 6.9
"""CSS pixels: a row's height, a column's least and largest width, and the width of a letter in the labels."""
_KEY = 240
"""Width of the colors' key."""
_LONGEST = 44
"""Letters of a label."""
_PLOT = (340, 250)
"""Width and height of a plot: narrow screens have it whole."""
_MOST = 2000
"""Points of a plot."""


def heat_map(grid: Grid, name: str, label: str) -> Markup:
    """Rows are module types, columns layers. Colors: of `span`; hollow is no error at all, a cross one without bounds."""
    scale = span(grid.values)
    names = [_short(safe_text(row.name)) for row in grid.rows]
    parts = [_short(safe_text(row.part)) for row in grid.rows]
    headings = [bool(part) and (at == 0 or part != parts[at - 1]) for at, part in enumerate(parts)]
    left = 16 + _LETTER * max([len(text) for text in (*names, *parts)], default=0)
    wide = max(_COLUMN[0], min(_COLUMN[1], 900 // max(1, len(grid.columns))))
    tops, top = [], 0.0
    for heading in headings:
        top += _ROW if heading else 0.0
        tops.append(top)
        top += _ROW
    beside = _beside(grid.values)
    width = max(left + wide * len(grid.columns) + 12, left + _KEY + sum(26 + _LETTER * len(text) for _, text in beside) + 60)
    height = top + 92
    titles: dict[str, str | Sequence[str]] = {}
    with drawing(name):
        figure = blank(width, height)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.axis("off")
        for at, (row, y) in enumerate(zip(grid.rows, tops, strict=True)):
            if headings[at]:
                axes.text(6, y - _ROW / 2 + 2, parts[at], color=INK, va="center", gid=f"mono-part-{at}", fontsize=11.5)
            axes.text(left - 8, y + _ROW / 2, names[at], color=MUTED, ha="right", va="center", gid=f"mono-{at}", fontsize=11.5)
            for column, value in enumerate(row.values):
                if value is not None:
                    gid = f"cell-{at}-{column}"
                    titles[gid] = f"{_full(row.part, row.name, grid.columns[column])}: {number(value)}"
                    _cell(axes, (left + wide * column, y), (wide, _ROW), value, scale, gid)
        step = 1 if wide >= 22 else 5
        for column, text in enumerate(grid.columns):
            x, side = (left + wide * (column + 0.5), "center") if text.isdecimal() else (left + wide * (column + 1) - 1, "right")
            if not text.isdecimal() or int(text) % step == 0:
                axes.text(x, top + 4, text, color=MUTED, ha=side, va="top", fontsize=11.5)
        axes.text(left + wide * len(grid.columns) / 2, top + 20, "layer", color=MUTED, ha="center", va="top", fontsize=11.5)
        _key(axes, left, top + 48, scale, beside)
        return inline(figure, label, titles)


def _full(part: str, name: str, column: str) -> str:
    where = f"layer {column}, " if column.isdecimal() else "before the first layer, " if column == "in" else ""
    return safe_text(f"{where}{f'{part}: ' if part else ''}{name}")


def _short(text: str) -> str:
    """The end of a long name tells more than its beginning."""
    return text if len(text) <= _LONGEST else f"…{text[1 - _LONGEST :]}"


def _cell(axes: Axes, corner: tuple[float, float], size: tuple[float, float], value: float, scale: Span, gid: str | None) -> None:
    x, y, (width, height) = corner[0] + 1, corner[1] + 1, (side - 2 for side in size)
    if value == 0:
        box = Rectangle((x + 0.5, y + 0.5), width - 1, height - 1, facecolor=EQUAL, edgecolor=GRID, lw=1, clip_on=False, gid=gid)
    elif math.isfinite(value):
        box = Rectangle((x, y), width, height, facecolor=heat(level(scale.place(value))), clip_on=False, gid=gid)
    else:
        box = Rectangle((x, y), width, height, facecolor=ODD, clip_on=False, gid=gid)
    axes.add_patch(box)
    if not math.isfinite(value):
        axes.text(x + width / 2, y + height / 2, "×", color=INK, ha="center", va="center", fontsize=12)


def level(place: float) -> int:
    """The step of the colors for a place from 0 to 1."""
    return min(LEVELS - 1, int(place * LEVELS))


def _beside(values: Sequence[float]) -> list[tuple[float, str]]:
    """What is not in the colors' scale, of these values."""
    found = [(0.0, "equal")] if 0 in values else []
    return found if all(map(math.isfinite, values)) else [*found, (math.inf, "infinite, or no number")]


def _key(axes: Axes, left: float, top: float, scale: Span, beside: Iterable[tuple[float, str]]) -> None:
    """What the colors stand for."""
    for at in range(LEVELS):
        axes.add_patch(Rectangle((left + _KEY / LEVELS * at, top), _KEY / LEVELS, 10, facecolor=heat(at), clip_on=False))
    low, high = math.ceil(math.log10(scale.low) - 1e-9), math.floor(math.log10(scale.high) + 1e-9)
    for power in range(low, high + 1):
        x = left + _KEY * scale.place(10.0**power)
        axes.plot((x, x), (top + 10, top + 14), color=MUTED, lw=1, clip_on=False)
        axes.text(x, top + 16, f"{10.0**power:g}", color=MUTED, ha="center", va="top", fontsize=11)
    x = left + _KEY + 24
    for value, text in beside:
        _cell(axes, (x, top - 5), (_ROW, _ROW), value, scale, None)
        axes.text(x + 26, top + 5, text, color=MUTED, va="center", fontsize=11)
        x += 34 + _LETTER * len(text)


def kl_histogram(values: Sequence[float], marks: Mapping[str, float], label: str) -> Markup:
    """Tokens by their KL; those without any at the left, those beyond all bounds at the right."""
    found = bins(values)
    first, last = found.first, found.first + len(found.counts) / 2
    with drawing("histogram"):
        figure = blank(*_PLOT)
        axes = _axes(figure.add_axes((0.2, 0.17, 0.78, 0.66)))
        ends = (first - (1.2 if found.none else 0.1), last + (1.2 if found.odd else 0.1))
        axes.bar([first + at / 2 for at in range(len(found.counts))], found.counts, width=0.46, align="edge", color=ACCENT)
        for there, at in ((found.none, first - 1), (found.odd, last + 0.5)):
            if there:
                axes.bar([at], [there], width=0.46, align="edge", color=MUTED)
        height = 1.16 * max([1, found.none, found.odd, *found.counts])
        axes.set(xlim=ends, ylim=(0, height), xlabel="KL of a token, nats", ylabel="tokens")
        step = max(1, math.ceil((last - first) / 5))
        powers_shown = [power for power in range(math.ceil(first), math.floor(last) + 1) if power % step == 0]
        extra = [(first - 0.77, "0")] * bool(found.none) + [(last + 0.73, "∞, nan")] * bool(found.odd)
        axes.set_xticks([*powers_shown, *(at for at, _ in extra)], [*map(_power, powers_shown), *(text for _, text in extra)])
        axes.locator_params(axis="y", nbins=5)
        for at, (name, value) in enumerate(marks.items()):
            if TINY <= value < math.inf:
                x = math.log10(value)
                axes.plot((x, x), (0, height), color=INK, lw=1, ls=(0, (4, 3)))
                y = height * (1.01 + 0.075 * at)
                place = (x - ends[0]) / (ends[1] - ends[0])
                side = "left" if place < 0.25 else "right" if place > 0.75 else "center"
                axes.text(x, y, f"{name} {number(value)}", color=INK, ha=side, va="bottom", fontsize=11)
        return inline(figure, label, {})


def losses(samples: Sequence[SampleGap], label: str) -> Markup:
    """A point for each sample: its mean NLL by the reference, and by the candidate."""
    told = [s for s in samples if math.isfinite(s.nll_reference) and math.isfinite(s.nll_candidate)][:_MOST]
    both = [value for s in told for value in (s.nll_reference, s.nll_candidate) if value > TINY]
    wide = bool(both) and max(both) > 30 * min(both)
    floor = max(TINY, min(both, default=1.0)) if wide else -math.inf
    x, y = ([max(floor, getattr(s, name)) for s in told] for name in ("nll_reference", "nll_candidate"))
    with drawing("losses"):
        figure = blank(*_PLOT)
        axes = _axes(figure.add_axes((0.2, 0.17, 0.76, 0.74)))
        low, high = min([*x, *y], default=0.0), max([*x, *y], default=1.0)
        room = (high / low) ** 0.06 if wide else 0.06 * (high - low) or 0.05
        ends = (low / room, high * room) if wide else (low - room, high + room)
        if wide:
            axes.set(xscale="log", yscale="log")
            for axis in (axes.xaxis, axes.yaxis):
                _decades(axis, *ends)
        else:
            for side in ("x", "y"):
                axes.locator_params(axis=side, nbins=5)
        axes.plot(ends, ends, color=MUTED, lw=1, ls=(0, (4, 3)))
        axes.scatter(x, y, s=26, color=ACCENT, alpha=0.65, linewidths=0, gid="points")
        axes.set(xlim=ends, ylim=ends, xlabel="NLL of a sample's tokens, reference", ylabel="candidate")
        said = [f"{safe_text(s.name)}: {number(s.nll_reference)} → {number(s.nll_candidate)}" for s in told]
        return inline(figure, label, {"points": said} if told else {})


def sorted_kl(samples: Sequence[SampleGap], label: str) -> Markup:
    """Mean KL of each sample, largest first: whether a few carry it all."""
    told = sorted((s for s in samples if math.isfinite(s.kl_mean)), key=lambda s: -s.kl_mean)[:_MOST]
    values = [max(TINY, s.kl_mean) for s in told]
    with drawing("sorted"):
        figure = blank(*_PLOT)
        axes = _axes(figure.add_axes((0.2, 0.17, 0.76, 0.74)))
        low, high = min(values, default=0.1), max(values, default=1.0)
        room = max(1.3, (high / low) ** 0.06)
        axes.set(yscale="log", ylim=(low / room, high * room), xlabel="samples, largest first", ylabel="mean KL, nats")
        _decades(axes.yaxis, low / room, high * room)
        axes.scatter(range(1, len(values) + 1), values, s=26, color=ACCENT, alpha=0.65, linewidths=0, gid="points")
        axes.set_xlim(0, len(values) + 1)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        return inline(figure, label, {"points": [f"{safe_text(s.name)}: {number(s.kl_mean)}" for s in told]} if told else {})


def _axes(axes: Axes) -> Axes:
    """Quiet ones: a grid behind, no box."""
    axes.set_axisbelow(True)
    axes.grid(color=GRID, lw=1, axis="y")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(colors=MUTED, length=0, labelsize=11)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=MUTED, fontsize=11.5)
    return axes


def _decades(axis: Any, low: float, high: float) -> None:
    """At most six powers of ten as ticks; within a decade 1, 2 and 5 of it."""
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    step = max(1, math.ceil((last - first) / 6))
    powers = [10.0**power for power in range(first, last + 1, step)]
    form: Callable[[float, int], str] = lambda value, _: _power(round(math.log10(value)))  # noqa: E731
    if len(powers) < 2:
        around = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        powers = [k * 10.0**power for power in around for k in (1, 2, 5) if low <= k * 10.0**power <= high]
        form = lambda value, _: f"{value:.3g}"  # noqa: E731
    axis.set_major_locator(FixedLocator(powers))
    axis.set_major_formatter(FuncFormatter(form))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _power(power: int) -> str:
    """10 to that power, as people read it."""
    if -3 <= power <= 3:
        return f"{10.0**power:g}"
    return "10" + str(power).translate(_RAISED)


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def ramp(names: Iterable[tuple[str, float, float]]) -> list[list[tuple[str, str]]]:
    """For each (colormap, from, to): the (color, ink that is read on it) of every step."""
    import matplotlib
    from matplotlib.colors import to_hex

    found = []
    for name, first, last in names:
        colors = [matplotlib.colormaps[name](first + (last - first) * at / (LEVELS - 1)) for at in range(LEVELS)]
        found.append([(to_hex(color), "#000" if _luminance(color) > 0.18 else "#fff") for color in colors])
    return found


def _luminance(color: Sequence[float]) -> float:
    """Relative, of sRGB: WCAG 2.2. At 0.18 black and white have the same contrast."""
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3])
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
