"""Charts laid out once, as a list of marks, and drawn from it as inline SVG or, with Pillow alone, as pixels.

Sizes are in points; `SCALE` pixels make a point, so that a PNG is crisp on a fine screen.
"""

from __future__ import annotations

import html
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageDraw, ImageFont

from showtell.files import atomic_path

Point = tuple[float, float]


@dataclass(frozen=True)
class Mark:
    """A piece of a chart, which `_svg` and `chart_image` both draw.

    `xy` holds the points of a line, the centre of a dot, two opposite corners of a box, or where a text is anchored.
    `text` is the text itself, or what a dot or box says under the mouse.
    """

    kind: Literal["line", "dot", "box", "text"]
    xy: tuple[Point, ...]
    tone: str = "muted"
    text: str = ""
    anchor: Literal["start", "middle", "end"] = "start"


class Chart:
    """What charts share: a subclass lays out `marks(width, height)` and says its content in words in `alt()`."""

    height = 270

    def html(self) -> str:
        """Returns the section with the chart as inline SVG."""
        return section_html(self, _svg(self.marks(460, self.height), 460, self.height, f"{self.title}: {self.alt()}"))


@dataclass(frozen=True, eq=False)
class Curve(Chart):
    """Lines over a common axis, such as the training and validation loss: `series` maps a name to (x, y) points.

    Points that are not finite are left out, and so are those not above zero where `log_y` asks for a logarithmic axis.
    """

    title: str
    series: Mapping[str, Sequence[Point]]
    x_label: str = ""
    y_label: str = ""
    note: str = ""
    log_y: bool = False

    def points(self) -> dict[str, list[Point]]:
        """Returns the points that can be drawn, by series."""
        lowest = 0.0 if self.log_y else -math.inf
        return {
            name: [(float(x), float(y)) for x, y in line if math.isfinite(x) and math.isfinite(y) and y > lowest]
            for name, line in self.series.items()
        }

    def alt(self) -> str:
        """Returns where each line starts and ends."""
        lines = {name: line for name, line in self.points().items() if line}
        ends = (f"{name} from {_tick(line[0][1])} to {_tick(line[-1][1])}" for name, line in lines.items())
        return ", ".join(ends) or "nothing to draw"

    def marks(self, width: float, height: float) -> list[Mark]:
        """Returns axes, legend, lines, and dots that say their value."""
        lines = self.points()
        xs, ys = ([point[i] for line in lines.values() for point in line] for i in (0, 1))
        if not xs:
            return _nothing(width, height)
        x_low, x_high = _widened(min(xs), max(xs))
        x_ticks = _ticks(x_low, x_high, whole=all(x == int(x) for x in xs))
        y_ticks = (_log_ticks if self.log_y else _ticks)(*_widened(min(ys), max(ys)), outward=True)
        scale = math.log10 if self.log_y else float
        marks, place = _axes(
            (width, height), (x_low, x_high), {x: _tick(x) for x in x_ticks}, y_ticks, (self.x_label, self.y_label),
            list(lines), scale,
        )  # fmt: skip
        for i, (name, line) in enumerate(lines.items()):
            if not line:
                continue
            marks.append(Mark("line", tuple(place(x, y) for x, y in _thinned(line, 1000)), f"s{i % 6}"))
            for x, y in _thinned(line, 40):
                text = f"{name}: {self.y_label} {_tick(y)}, {self.x_label} {_tick(x)}"
                marks.append(Mark("dot", (place(x, y),), f"s{i % 6}", text))
        return marks


@dataclass(frozen=True, eq=False)
class Histogram(Chart):
    """How often each value occurs, such as caption lengths.

    `values` is a sequence of numbers, or a mapping from number to count, or a mapping from a name to either: several
    named series are drawn side by side, as shares, because their totals differ. Whole numbers in a span of less than
    40 get a bar each, everything else is put in at most 30 bins or so.
    """

    title: str
    values: Sequence[float] | Mapping[float, int] | Mapping[str, Any]
    x_label: str = ""
    y_label: str = ""
    note: str = ""

    def counts(self) -> dict[str, Counter]:
        """Returns how often each finite value occurs, by series; an unnamed series is called `""`."""
        values = self.values
        named = isinstance(values, Mapping) and all(isinstance(key, str) for key in values)
        counts = {name: Counter(series) for name, series in (values if named else {"": values}).items()}
        return {name: Counter({v: n for v, n in c.items() if math.isfinite(v)}) for name, c in counts.items()}

    def alt(self) -> str:
        """Returns the number of values and their mean, by series."""
        said = []
        for name, count in self.counts().items():
            if total := count.total():
                said.append(f"{name} {total} values, mean {sum(v * n for v, n in count.items()) / total:.1f}".strip())
        return "; ".join(said) or "nothing to draw"

    def marks(self, width: float, height: float) -> list[Mark]:
        """Returns axes, legend and bars."""
        counts = self.counts()
        values = [value for count in counts.values() for value in count]
        if not values:
            return _nothing(width, height)
        whole = all(value == int(value) for value in values)
        one_each = whole and max(values) - min(values) < 40
        step = 1 if one_each else _step(*_widened(min(values), max(values)), 30, whole)
        left = min(values) - 0.5 if one_each else math.floor(min(values) / step) * step

        def bin_of(
            value: float,
        ) -> int:  # 0.3 is in the bin that begins there, whatever the last bit of a division says
            return max(0, math.floor((value - left) / step + 1e-9))

        n_bins = bin_of(max(values)) + 1
        share = len(counts) > 1
        bars = {}
        for name, count in counts.items():
            bars[name] = [0.0] * n_bins
            for value, n in count.items():
                bars[name][bin_of(value)] += 100 * n / count.total() if share else n
        right = left + n_bins * step
        y_ticks = _ticks(0, max(map(max, bars.values())), whole=not share, outward=True)
        marks, place = _axes(
            (width, height), (left, right), {x: _tick(x) for x in _ticks(left, right, whole=whole)}, y_ticks,
            (self.x_label, self.y_label or ("share, %" if share else "count")), list(bars),
        )  # fmt: skip
        bar = 0.84 * step / len(bars)
        for i, (name, heights) in enumerate(bars.items()):
            for k, value in enumerate(heights):
                start = left + k * step
                x = start + 0.08 * step + i * bar
                span = _tick(start + 0.5) if one_each else f"{_tick(start)} to {_tick(start + step)}"
                text = f"{name + ', ' if name else ''}{span}: {_tick(value)}{' %' if share else ''}"
                if value:
                    marks.append(Mark("box", (place(x, value), place(x + bar, 0)), f"s{i % 6}", text))
        return marks


@dataclass(frozen=True, eq=False)
class Bars(Chart):
    """The largest of many named numbers as horizontal bars, such as the most frequent words."""

    title: str
    counts: Mapping[str, float]
    limit: int = 20
    note: str = ""

    @property
    def height(self) -> int:  # one row a bar, whatever their number
        return 22 * max(1, len(self.largest())) + 8

    def largest(self) -> list[tuple[str, float]]:
        """Returns at most `limit` pairs of name and number, the largest first."""
        return sorted(self.counts.items(), key=lambda pair: -pair[1])[: self.limit]

    def alt(self) -> str:
        """Returns the first five names with their numbers."""
        return ", ".join(f"{name} {_tick(value)}" for name, value in self.largest()[:5]) or "nothing to draw"

    def marks(self, width: float, height: float) -> list[Mark]:
        """Returns a row for each name: the name, its bar, its number."""
        rows = self.largest()
        if not rows:
            return _nothing(width, height)
        top, right = max(value for _, value in rows) or 1, width - 60
        left = 16 + 7.2 * max(len(clipped(name, 16)) for name, _ in rows)
        marks = []
        for i, (name, value) in enumerate(rows):
            y, end = 22 * i + 15, left + (right - left) * max(0, value) / top
            marks.append(Mark("text", ((left - 8, y),), "ink", clipped(name, 16), "end"))
            marks.append(Mark("box", ((left, y - 7), (end, y + 7)), "s0", f"{name}: {_tick(value)}"))
            marks.append(Mark("text", ((end + 6, y),), "muted", _tick(value)))
        return marks


def write_curve(
    path: str | os.PathLike,
    series: Mapping[str, Sequence[Point]] | Sequence[Curve],
    title: str = "",
    x_label: str = "epoch",
    y_label: str = "loss",
    log_y: bool = False,
) -> Path:
    """Writes a training curve as a PNG and returns its path.

    Args:
        path: the file to write; its folder is made.
        series: a name for each line and its (x, y) points; or several `Curve`s, drawn side by side (loss, perplexity),
            which bring their own titles and labels.
        title: stands above the curve.
        x_label: what x is.
        y_label: what y is.
        log_y: whether y is drawn on a logarithmic axis.
    """
    curves = [Curve(title, series, x_label, y_label, log_y=log_y)] if isinstance(series, Mapping) else list(series)
    panels = [chart_image(curve, 580, 340) for curve in curves]
    image = Image.new("RGB", (sum(panel.width for panel in panels), panels[0].height), TONES["paper"])
    for i, panel in enumerate(panels):
        image.paste(panel, (i * panel.width, 0))
    return save_png(image, path)


def escape(text: object) -> str:
    """Any text as HTML: markup escaped, characters that no HTML or UTF-8 can hold replaced."""
    clean = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", str(text))
    return html.escape(clean.encode("utf-8", "replace").decode("utf-8"))


def section_html(section: Any, content: str, kind: str = "") -> str:
    note = f'<p class="note" dir="auto">{escape(section.note)}</p>' if section.note else ""
    content = note + content if "gallery" in kind else content + note
    title = escape(section.title)
    return f'<section class="{kind}" aria-label="{title}"><h2 dir="auto">{title}</h2>{content}</section>'


def clipped(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _axes(
    size: tuple[float, float],
    x_range: tuple[float, float],
    x_ticks: Mapping[float, str],
    y_ticks: Sequence[float],
    labels: tuple[str, str],
    names: Sequence[str],
    scale: Callable[[float], float] = float,
) -> tuple[list[Mark], Callable[[float, float], Point]]:
    """Lays out grid, ticks, labels and legend; returns them and the function from data to the place on the chart."""
    width, height = size
    x_label, y_label = labels
    left, right = 18 + 7.5 * max(len(_tick(y)) for y in y_ticks), width - 14
    names = [name for name in names if name]
    spaces = [36 + 7.2 * len(clipped(name, 30)) for name in names]
    beside = sum(spaces) <= right - left - 7.2 * len(y_label)  # the legend has room to the right of the y label
    marks = [Mark("text", ((6, 12),), "muted", y_label)] if y_label else []
    x, y = (right - sum(spaces), 12) if beside else (left, 32)
    for i, (name, space) in enumerate(zip(names, spaces, strict=True)):
        if x + space > right + 1 and x > left:
            x, y = left, y + 20
        marks.append(Mark("line", ((x + 8, y), (x + 26, y)), f"s{i % 6}"))
        marks.append(Mark("text", ((x + 32, y),), "ink", clipped(name, 30)))
        x += space
    top, bottom = (y if names else 12) + 22, height - (44 if x_label else 26)
    y_low, y_high = scale(y_ticks[0]), scale(y_ticks[-1])

    def place(x: float, y: float) -> Point:
        across = (x - x_range[0]) / (x_range[1] - x_range[0])
        up = (scale(y) - y_low) / (y_high - y_low)
        return round(left + across * (right - left), 1), round(bottom - up * (bottom - top), 1)

    for y in y_ticks:
        level = place(x_range[0], y)[1]
        marks.append(Mark("line", ((left, level), (right, level)), "grid"))
        marks.append(Mark("text", ((left - 8, level),), "muted", _tick(y), "end"))
    marks.append(Mark("line", ((left, bottom), (right, bottom)), "axis"))
    for x, text in x_ticks.items():
        marks.append(Mark("text", ((place(x, y_ticks[0])[0], bottom + 14),), "muted", text, "middle"))
    if x_label:
        marks.append(Mark("text", (((left + right) / 2, height - 9),), "muted", x_label, "middle"))
    return marks, place


def _nothing(width: float, height: float) -> list[Mark]:
    return [Mark("text", ((width / 2, height / 2),), "muted", "nothing to draw yet", "middle")]


def _widened(low: float, high: float) -> tuple[float, float]:
    """A range wide enough for floats to divide, so that a single point has an axis too."""
    if high - low > max(1e-9 * max(abs(low), abs(high)), 1e-300):
        return low, high
    pad = abs(low) * 0.1 or 1.0
    return low - pad, high + pad


def _step(low: float, high: float, n: int, whole: bool = False) -> float:
    """The step of 1, 2 or 5 times a power of ten that makes at most `n` steps of a range."""
    rough = (high - low) / n
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if rough <= m * power * (1 + 1e-9))
    return max(1, round(step)) if whole else step


def _ticks(low: float, high: float, whole: bool = False, outward: bool = False) -> list[float]:
    """Round numbers inside a range, or, `outward`, the fewest that enclose it."""
    step = _step(low, high, 5 if outward else 8, whole)
    # A range that ends on a round number ends there, whatever the last bit of the division says.
    if outward:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    else:
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _log_ticks(low: float, high: float, outward: bool = True) -> list[float]:
    """Round numbers that enclose a range on a logarithmic axis: 1, 2, 5, 10, … or, in a long range, powers of ten."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if last - first > 2:
        stride = math.ceil((last - first) / 6)
        return [10.0**exponent for exponent in range(first, last + stride, stride)]
    ticks = [digit * 10.0**exponent for exponent in range(first, last + 1) for digit in (1, 2, 5)]
    start = max(i for i, tick in enumerate(ticks) if tick <= low * (1 + 1e-9))
    stop = min(i for i, tick in enumerate(ticks) if tick >= high * (1 - 1e-9))
    return ticks[start : stop + 1]


def _tick(value: float) -> str:
    """A number short enough for an axis."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"


def _thinned(points: Sequence[Point], limit: int) -> Sequence[Point]:
    """At most about `limit` of the points, evenly, always with the last."""
    stride = math.ceil(len(points) / limit)
    return points if stride <= 1 else [*points[:-1:stride], points[-1]]


def _svg(marks: Sequence[Mark], width: float, height: float, alt: str) -> str:
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(alt)}">']
    for mark in marks:
        (x, y), (x2, y2) = mark.xy[0], mark.xy[-1]
        title = f"<title>{escape(mark.text)}</title>"
        if mark.kind == "line":
            points = " ".join(f"{x:g},{y:g}" for x, y in mark.xy)
            parts.append(f'<polyline class="{mark.tone}" points="{points}"/>')
        elif mark.kind == "dot":
            parts.append(f'<circle class="{mark.tone}" cx="{x:g}" cy="{y:g}" r="3">{title}</circle>')
        elif mark.kind == "box":
            size = f'width="{x2 - x:.1f}" height="{y2 - y:.1f}"'
            parts.append(f'<rect class="{mark.tone}" x="{x:.1f}" y="{y:.1f}" {size} rx="2">{title}</rect>')
        else:
            place = f'x="{x:g}" y="{y:g}" text-anchor="{mark.anchor}" dominant-baseline="central"'
            parts.append(f'<text class="{mark.tone}" {place}>{escape(mark.text)}</text>')
    return "".join(parts) + "</svg>"


SCALE = 2


TONES = {
    "paper": "#ffffff", "ink": "#1a2029", "muted": "#586173", "grid": "#dde2ea", "axis": "#586173", "hole": "#eceff4",
    "s0": "#1f5fd6", "s1": "#d2600a", "s2": "#12866b", "s3": "#8a3fd1", "s4": "#b5307f", "s5": "#6b7280",
    "wrong": "#b3202c",
}  # fmt: skip


_ANCHORS = {"start": "lm", "middle": "mm", "end": "rm"}


def write_label(
    draw: ImageDraw.ImageDraw, xy: Point, text: str, size: float, tone: str, anchor: str = "start", scale: int = SCALE
) -> None:
    font = ImageFont.load_default(size * scale)
    draw.text((xy[0] * scale, xy[1] * scale), drawable(text), fill=TONES[tone], font=font, anchor=_ANCHORS[anchor])


def drawable(text: str) -> str:
    """A text as near as Pillow's own font can write it: without accents, with plain dashes."""
    letters = unicodedata.normalize("NFKD", text)
    plain = {ord("\N{EN DASH}"): "-", ord("\N{EM DASH}"): "-", ord("\N{MULTIPLICATION SIGN}"): "x"}
    return "".join(letter for letter in letters if not unicodedata.combining(letter)).translate(plain)


def chart_image(chart: Chart, width: int, height: int) -> Image.Image:
    """A chart under its title, drawn at twice the size and reduced, because Pillow's lines have jagged edges."""
    scale, head = 2 * SCALE, 40
    image = Image.new("RGB", (width * scale, height * scale), TONES["paper"])
    draw = ImageDraw.Draw(image)
    write_label(draw, (6, 20), chart.title, 17, "ink", scale=scale)
    for mark in chart.marks(width - 12, height - head):
        xy = [(x * scale, (y + head) * scale) for x, y in mark.xy]
        tone, (x, y) = TONES[mark.tone], xy[0]
        if mark.kind == "line":
            draw.line(xy, fill=tone, width=(2 if mark.tone.startswith("s") else 1) * scale, joint="curve")
        elif mark.kind == "dot":
            radius = 2.5 * scale
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tone)
        elif mark.kind == "box":
            draw.rectangle(xy, fill=tone)
        else:
            write_label(draw, (x / scale, y / scale), mark.text, 13, mark.tone, mark.anchor, scale)
    return image.reduce(2)


def save_png(image: Image.Image, path: str | os.PathLike) -> Path:
    with atomic_path(path) as temporary:
        image.save(temporary, "PNG", dpi=(72 * SCALE, 72 * SCALE))
    return Path(path)
