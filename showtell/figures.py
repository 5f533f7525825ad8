"""Charts with matplotlib in one palette: sections of a report, training curves, grids of captioned images.

On a page a chart is inline SVG with the page's CSS variables as colours, so that it follows light and dark mode. Only
`Figure` objects are made: no pyplot, no GUI backend, no lasting change of settings. matplotlib is imported on first
use. For plots of your own in the same style: `plt.rcParams.update(showtell.figures.STYLE)`.
"""

from __future__ import annotations

import io
import math
import os
import re
import textwrap
import threading
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from showtell.files import atomic_path

Point = tuple[float, float]

# The CSS variables of a page. Charts are drawn in the light colours, which `Chart.svg` replaces by the variables.
LIGHT = {
    "page": "#f4f6f9", "panel": "#ffffff", "ink": "#1a2029", "muted": "#586173", "line": "#dde2ea", "hole": "#eceff4",
    "right": "#0b6b3a", "right-back": "#dcf3e5", "wrong": "#b3202c", "wrong-back": "#fde4e4",
    "s0": "#1f5fd6", "s1": "#d2600a", "s2": "#12866b", "s3": "#8a3fd1", "s4": "#b5307f", "s5": "#6b7280",
}  # fmt: skip
DARK = {
    "page": "#0f1319", "panel": "#181d25", "ink": "#e8ebf0", "muted": "#a0a9b8", "line": "#2b323d", "hole": "#11151b",
    "right": "#7fdca6", "right-back": "#12351f", "wrong": "#ff9a9f", "wrong-back": "#47181c",
    "s0": "#79a6ff", "s1": "#ff9f4a", "s2": "#4fd1ae", "s3": "#c294ff", "s4": "#ff85c2", "s5": "#a0a9b8",
}  # fmt: skip
SERIES = [LIGHT[f"s{i}"] for i in range(6)]
STYLE = {
    "axes.prop_cycle": f"cycler(color={SERIES})", "axes.edgecolor": LIGHT["muted"], "axes.labelcolor": LIGHT["muted"],
    "axes.axisbelow": True, "axes.grid": True, "axes.grid.axis": "y", "grid.color": LIGHT["line"],
    "axes.spines.left": False, "axes.spines.right": False, "axes.spines.top": False, "legend.frameon": False,
    "xtick.color": LIGHT["muted"], "xtick.bottom": False, "ytick.color": LIGHT["muted"], "ytick.left": False,
    "lines.linewidth": 2, "lines.markersize": 5, "text.color": LIGHT["ink"], "font.size": 11,
}  # fmt: skip
_settings = threading.Lock()


class Chart:
    """Base of the charts: a subclass draws itself on matplotlib axes and describes itself in `alt()`."""

    height = 255  # points; the width is 420

    def svg(self, prefix: str = "") -> str:
        """Return the chart as inline SVG; `prefix` makes its ids unique on a page."""
        file = io.StringIO()
        with _style():
            figure = _figure(420, self.height)
            self.draw(figure.subplots())
            no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
        root = ElementTree.fromstring(file.getvalue())
        variables = {color: f"var(--{name})" for name, color in LIGHT.items()}
        for node in root.iter():
            node.tag, attributes = node.tag.rpartition("}")[2], dict(node.attrib)
            node.attrib.clear()
            for name, value in attributes.items():
                if name == "id":
                    value = prefix + value
                elif name == "style":
                    value = re.sub("#[0-9a-f]{6}", lambda found: variables.get(found[0], found[0]), value)
                elif name == "clip-path" or name.endswith("href"):
                    value = value.replace("#", f"#{prefix}")
                node.set(name.rpartition("}")[2], value)
        label = clean(f"{self.title}: {self.alt()}")
        root.attrib = {"viewBox": root.get("viewBox"), "role": "img", "aria-label": label}
        return ElementTree.tostring(root, "unicode")


@dataclass(frozen=True, eq=False)
class Curve(Chart):
    """Lines over a common axis, such as the training and validation loss: `series` maps a name to (x, y) points.

    Points beyond 1e100 are left out, and so are those not above 1e-100 where `log_y` asks for a logarithmic axis.
    """

    title: str
    series: Mapping[str, Sequence[Point]]
    x_label: str = ""
    y_label: str = ""
    note: str = ""
    log_y: bool = False

    def points(self) -> dict[str, list[Point]]:
        """Return the lines that have points to draw."""
        lowest = 1e-100 if self.log_y else -1e100
        lines = {}
        for name, line in self.series.items():
            lines[name] = [(float(x), float(y)) for x, y in line if abs(x) < 1e100 and lowest < y < 1e100]
        return {name: line for name, line in lines.items() if line}

    def alt(self) -> str:
        lines = self.points().items()
        return ", ".join(f"{name} from {_number(line[0][1])} to {_number(line[-1][1])}" for name, line in lines)

    def draw(self, axes: Any) -> None:
        from matplotlib.ticker import LogLocator, MaxNLocator

        lines, drawn = self.points(), {}
        for i, (name, line) in enumerate(lines.items()):
            points = line[:: -math.ceil(len(line) / 1000)]  # from the end, which is the point that matters
            marker = "o" if len(points) <= 40 else ""
            (drawn[name],) = axes.plot(*zip(*points, strict=True), marker=marker, color=SERIES[i % 6], clip_on=False)
        if lines and self.log_y:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            subs = (1, 2, 5) if high < 1000 * low else (1,)
            axes.yaxis.set_major_locator(MaxNLocator(6) if high < 10 * low else LogLocator(subs=subs))
            axes.minorticks_off()
        whole = all(x == int(x) for line in lines.values() for x, _ in line)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=whole))
        _dress(axes, drawn, self.x_label, self.y_label)


@dataclass(frozen=True, eq=False)
class Histogram(Chart):
    """How often each value occurs, such as caption lengths.

    `values` is a sequence of numbers, a mapping from number to count, or a mapping from a name to either: named series
    are drawn side by side, as shares. Whole numbers in a span of less than 40 get a bar each; others are put in bins.
    """

    title: str
    values: Sequence[float] | Mapping[float, int] | Mapping[str, Any]
    x_label: str = ""
    y_label: str = ""
    note: str = ""

    def counts(self) -> dict[str, Counter]:
        """Return how often each finite value occurs, by series; an unnamed series is called `""`."""
        named = isinstance(self.values, Mapping) and all(isinstance(key, str) for key in self.values)
        series = self.values if named else {"": self.values}
        counts = {name: Counter(values) for name, values in series.items()}
        return {name: Counter({v: n for v, n in c.items() if math.isfinite(v)}) for name, c in counts.items() if c}

    def alt(self) -> str:
        means = [(name, c.total(), sum(v * n for v, n in c.items()) / c.total()) for name, c in self.counts().items()]
        return "; ".join(f"{name} {total} values, mean {mean:.1f}".strip() for name, total, mean in means)

    def draw(self, axes: Any) -> None:
        import numpy as np
        from matplotlib.ticker import MaxNLocator

        counts, drawn = self.counts(), {}
        values = [value for count in counts.values() for value in count] or [0]
        low, high, whole = min(values), max(values), all(value == int(value) for value in values)
        step = math.ceil((high - low + 1) / 40) if whole else (high - low) / 30 or 1
        edges = np.arange(low, high + 1.5 * step, step) - (0.5 if whole else 0)
        share, width = len(counts) > 1, 0.84 * step / max(1, len(counts))
        for i, (name, count) in enumerate(counts.items()):
            heights, _ = np.histogram(list(count), edges, weights=list(count.values()))
            heights = heights * (100 / count.total() if share else 1)
            left = edges[:-1] + 0.08 * step + i * width
            drawn[name] = axes.bar(left, heights, width, align="edge", color=SERIES[i % 6])
        axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=whole))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=not share))
        _dress(axes, drawn, self.x_label, self.y_label or ("share, %" if share else "count"))


@dataclass(frozen=True, eq=False)
class Bars(Chart):
    """The largest of many named numbers as horizontal bars, such as the most frequent words."""

    title: str
    counts: Mapping[str, float]
    limit: int = 20
    note: str = ""

    @property
    def height(self) -> int:  # one row for each bar
        return 22 * max(2, len(self.largest())) + 8

    def largest(self) -> list[tuple[str, float]]:
        """Return at most `limit` pairs of name and number, the largest first."""
        return sorted(self.counts.items(), key=lambda pair: -pair[1])[: self.limit]

    def alt(self) -> str:
        return ", ".join(f"{name} {_number(value)}" for name, value in self.largest()[:5])

    def draw(self, axes: Any) -> None:
        rows = self.largest()
        bars = axes.barh(range(len(rows)), [max(0, value) for _, value in rows], 0.66, color=SERIES[0])
        axes.bar_label(bars, [_number(value) for _, value in rows], padding=4, color=LIGHT["muted"])
        _dress(axes, {"": bars} if rows else {})
        axes.set_yticks(range(len(rows)), [clipped(name, 16) for name, _ in rows], color=LIGHT["ink"])
        axes.set(ylim=(max(1, len(rows)) - 0.5, -0.5), xticks=[])
        axes.margins(x=0.12)
        axes.grid(False)
        axes.spines[:].set_visible(False)


def write_curve(path: str | os.PathLike, curves: Sequence[Curve]) -> Path:
    """Write training curves side by side as a PNG and return its path."""
    with _style():
        figure = _figure(500 * len(curves), 300)
        for curve, panel in zip(curves, figure.subfigures(1, len(curves), squeeze=False)[0], strict=True):
            panel.suptitle(clipped(curve.title, 50), x=0.02, ha="left")
            curve.draw(panel.subplots())
        return _save(figure, path)


def write_figure(
    path: str | os.PathLike, cards: Sequence[Any], curve: Curve | None = None, title: str = "", columns: int = 4
) -> Path:
    """Write a PNG of captioned images (`showtell.report.Card`s), with a training curve under them; return its path.

    Each image has its first true caption above and the predicted one below. A wrong one is framed and written in red,
    with the first reason. An image that cannot be read raises `BrokenImageError`.
    """
    columns = max(1, min(columns, len(cards)))
    texts = [_card_texts(card) for card in cards]
    lines = 1 + max((len("\n".join(pair).splitlines()) for pair in texts), default=0)
    rows, row_height = math.ceil(len(cards) / columns), 210 + 16 * lines
    with _style():
        heights = [max(40, rows * row_height + 30 * bool(title)), *([280] if curve else [])]
        figure = _figure(max(columns * 228, 600), sum(heights))
        panels = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        panels[0].suptitle(clipped(title, 60), x=0.02, ha="left", size=18)
        grid = panels[0].subplots(max(1, rows), columns, squeeze=False).flat
        for axes in grid[len(cards) :]:
            axes.set_axis_off()
        for axes, card, (above, below) in zip(grid, cards, texts, strict=False):
            axes.set_title(above, size=11, color=LIGHT["muted"], va="bottom")
            axes.set_xlabel(below, color=LIGHT["wrong" if card.ok is False else "ink"])
            _draw_card(axes, card)
        if curve:
            panels[1].suptitle(clipped(curve.title, 60), x=0.02, ha="left")
            curve.draw(panels[1].subplots())
        return _save(figure, path)


def spread_map(alpha: Any, size: tuple[int, int], region: Sequence[float] = (0, 0, 1, 1)) -> Any:
    """Return an attention map (rows, columns) as an array (H, W) over a whole image, its highest value 1.

    `size` is the image's width and height; `region` the part that the network saw, see `Transform.region`.
    """
    import numpy as np
    from PIL import Image

    left, top, right, bottom = (round(share * side) for share, side in zip(region, (*size, *size), strict=True))
    alpha = np.asarray(alpha, np.float32)
    part = Image.fromarray(alpha / alpha.max()).resize((right - left, bottom - top), Image.Resampling.BICUBIC)
    whole = np.zeros(size[::-1], np.float32)
    whole[top:bottom, left:right] = np.clip(part, 0, 1)
    return whole


def write_attention(path: str | os.PathLike, image: Any, weights: Any, word: str) -> Path:
    """Write a PNG of an image in light grey under the map of a word, (H, W) from 0 to 1, with the word as its title."""
    import numpy as np

    grey = pixels(image).mean(2)
    height, width = grey.shape
    with _style():
        figure = _figure(480, 480 * height / width + 30)
        axes = figure.subplots()
        axes.imshow(0.3 + 0.7 * grey / 255, cmap="gray", vmin=0, vmax=1)
        axes.imshow(weights, cmap="plasma", vmin=0, vmax=1, alpha=0.8 * np.asarray(weights))
        axes.set_title(clipped(word, 40), size=14)
        axes.set_axis_off()
        return _save(figure, path)


def pixels(image: Any) -> Any:
    """Return anything `showtell.transforms.read_image` reads as a uint8 array of shape (H, W, 3)."""
    import numpy as np

    from showtell.transforms import open_image

    return np.asarray(open_image(image))


def clean(text: object) -> str:
    """Return any text without the characters that no HTML, XML or UTF-8 can hold."""
    found = re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff]", "\N{REPLACEMENT CHARACTER}", str(text))
    return found.encode("utf-8", "replace").decode("utf-8")


def clipped(text: str, length: int) -> str:
    """Return a text on one line of at most `length` characters."""
    text = " ".join(clean(text).split())
    return text if len(text) <= length else text[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"


@contextmanager
def _style() -> Iterator[None]:
    """Draw with matplotlib's defaults and `STYLE`, whatever a notebook has set, and restore its settings."""
    from matplotlib import style

    ours = {"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "showtell"}  # "$" begins no formula
    with _settings, warnings.catch_warnings(), style.context(["default", STYLE, ours]):
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def _figure(width: float, height: float) -> Any:
    """Return an empty figure of a size in points."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72), layout="constrained")


def _save(figure: Any, path: str | os.PathLike) -> Path:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=144)
    return Path(path)


def _dress(axes: Any, drawn: Mapping[str, Any], x_label: str = "", y_label: str = "") -> None:
    """Add labels and, above the axes, a legend of the named series; say so where there are none."""
    axes.set(xlabel=clipped(x_label, 60), ylabel=clipped(y_label, 40))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: _number(value))
    if not drawn:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "nothing to draw yet", ha="center", transform=axes.transAxes, color=LIGHT["muted"])
    elif names := [clipped(name, 30) for name in drawn if name]:
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0}
        handles = [drawn[name] for name in drawn if name]
        legend = axes.legend(handles, range(len(names)), ncols=max(1, 64 // (6 + max(map(len, names)))), **place)
        for text, name in zip(legend.get_texts(), names, strict=True):
            text.set_text(name)  # afterwards, because older versions leave out labels that begin with "_"


def _number(value: float) -> str:
    """Return a number short enough for an axis."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"


def _card_texts(card: Any) -> tuple[str, str]:
    """Return the text above and the text below an image, each wrapped at the image's width."""

    def wrapped(text: str) -> str:
        text = clipped(text, 1000)
        width = 17 if any(unicodedata.east_asian_width(letter) in "WF" for letter in text) else 33
        return "\n".join(textwrap.wrap(text, width, max_lines=4, placeholder=" …"))

    above = "".join(wrapped(f"true: {reference}") for reference in card.references[:1])
    label = "predicted (wrong): " if card.ok is False else "predicted: " if card.references else ""
    reason = [wrapped(f"({note})") for note in card.notes[:1] if card.ok is False]
    return above, "\n".join([wrapped(label + (card.predicted.strip() or "(empty caption)")), *reason])


def _draw_card(axes: Any, card: Any) -> None:
    """Draw an image in the middle of square axes, with a red frame if its caption is wrong."""
    axes.set(xticks=[], yticks=[], facecolor=LIGHT["hole"], box_aspect=1)
    axes.spines[:].set(visible=card.ok is False, color=LIGHT["wrong"], linewidth=3)
    if card.image is None:
        axes.text(0.5, 0.5, "no image", ha="center", va="center", color=LIGHT["muted"])
        return
    image = pixels(card.image)
    height, width = image.shape[:2]
    half = max(height, width) / 2
    axes.imshow(image, extent=(-width / 2, width / 2, -height / 2, height / 2))
    axes.set(xlim=(-half, half), ylim=(-half, half))
