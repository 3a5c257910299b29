"""A page as a browser shows it: headless Chromium, in both color schemes and at any width. What it measures, and its pixels."""

from __future__ import annotations

import html
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from PIL import Image

Scheme = Literal["light", "dark"]
NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
MISSING = (
    "the report is looked at in a real browser, and there is none: on Debian or Ubuntu `apt-get install --no-install-recommends "
    "chromium fonts-dejavu-core` as root (it is a snap on Ubuntu: Google's Chrome does, too); one that lies elsewhere is named by "
    "the variable CHROMIUM"
)
# A frame has the width that is asked for: a headless window is never narrower than 500. The page lies in it as it is, so its own
# policy holds for it; the script that measures is the page's around it.
MEASURE = r"""
function rgb(text) {
  const found = text.match(/[\d.]+/g).map(Number);
  return [found[0], found[1], found[2], found.length > 3 ? found[3] : 1];
}
function luminance(color) {
  const [r, g, b] = color.map(c => c / 255).map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b;
}
function contrast(a, b) {
  const [x, y] = [luminance(a), luminance(b)].sort((m, n) => n - m);
  return (x + .05) / (y + .05);
}
function look(frame) {
  const page = frame.contentDocument, view = frame.contentWindow, style = e => view.getComputedStyle(e);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const color = rgb(style(e).backgroundColor);
      if (color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  for (const e of page.querySelectorAll("details")) e.open = true;
  const walker = page.createTreeWalker(page.body, 4), texts = [];
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
    if (!text || ["title", "style"].includes(e.localName) || !e.getClientRects().length) continue;
    const color = rgb(e.localName === "text" ? style(e).fill : style(e).color);
    texts.push([contrast(color, behind(e)), text.slice(0, 60), Number.parseFloat(style(e).fontSize)]);
  }
  const cells = [...page.querySelectorAll("svg g.told")].filter(e => e.querySelector(":scope > path")).map(e => {
    const box = e.getBoundingClientRect(), path = e.querySelector(":scope > path");
    const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
    return {title: e.querySelector("title").textContent, fill: rgb(style(path).fill), x, y};
  });
  return {
    dark: view.matchMedia("(prefers-color-scheme: dark)").matches,
    width: page.documentElement.clientWidth,
    scrolls: page.documentElement.scrollWidth,
    fetched: view.performance.getEntriesByType("resource").map(e => e.name),
    page: rgb(style(page.body).backgroundColor).slice(0, 3),
    worst: texts.sort((a, b) => a[0] - b[0]).slice(0, 5),
    smallest: Math.min(...texts.map(t => t[2])),
    texts: texts.length,
    images: [...page.images].map(e => [e.naturalWidth, e.alt]),
    scripts: view.ran === undefined ? 0 : view.ran,
    cells,
  };
}
onload = () => { found.textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(look)); };
"""


@dataclass(frozen=True)
class View:
    """A page at one width. `picture`: what lies in `height` pixels of it."""

    picture: Image.Image
    found: dict[str, Any]


def chromium() -> str:
    """The program. Fails the test where there is none."""
    named = os.environ.get("CHROMIUM")
    program = named or next((path for name in NAMES if (path := shutil.which(name))), None)
    return program or pytest.fail(MISSING)


def look_at(page: str, scheme: Scheme, widths: Sequence[int], folder: Path, height: int = 2000) -> list[View]:
    """The page in that color scheme, at each width."""
    frame = '<iframe style="border: 0; display: block; width: {}px; height: {}px" srcdoc="{}"></iframe>'
    frames = "".join(frame.format(width, height, html.escape(page)) for width in widths)
    around = folder / "around.html"
    around.write_text(
        f'<!doctype html><meta charset="utf-8"><body style="margin: 0">{frames}<pre id="found"></pre><script>{MEASURE}</script>',
        encoding="utf-8",
    )
    command = [
        chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run",
        "--disable-background-networking", "--force-device-scale-factor=1", f"--user-data-dir={folder / 'profile'}",
        f"--blink-settings=preferredColorScheme={('dark', 'light').index(scheme)}",
        f"--window-size={max(500, *widths)},{height * len(widths)}", f"--screenshot={folder / 'page.png'}", "--dump-dom",
        around.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    text = done.stdout.rpartition('<pre id="found">')[2].partition("</pre>")[0]
    measured = json.loads(html.unescape(text))
    with Image.open(folder / "page.png") as opened:
        whole = opened.convert("RGB")
    parts = [whole.crop((0, height * at, width, height * (at + 1))) for at, width in enumerate(widths)]
    return [View(part, found) for part, found in zip(parts, measured, strict=True)]
