"""Reports: one self-contained HTML page, or one PNG.

`write_page` writes the pages of `showtell demo`, `caption --html`, `evaluate --html` and `score --html` from sections
(`Gallery` of `Card`, `Table`, `Curve`, `Histogram`, `Bars`) with the Jinja2 template `report.html`. Every text is
escaped, every image is inside the file, and nothing is loaded from elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from showtell import __version__
from showtell.figures import DARK, LIGHT, Bars, Curve, Histogram, clean, pixels, write_figure
from showtell.files import write_text

__all__ = [
    "Bars", "Card", "Curve", "Gallery", "Histogram", "Interval", "Section", "Table", "Tile", "write_figure",
    "write_page",
]  # fmt: skip


class Tile(NamedTuple):
    """A key number in a page's header. A plain tuple `(label, value)` or `(label, value, hint)` does as well."""

    label: str
    value: object
    hint: str = ""


class Interval(NamedTuple):
    """A table cell that shows a number with its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Card:
    """One captioned image."""

    image: Any  # whatever `showtell.transforms.read_image` reads, or None where there is no image
    title: str  # the image's id or file name
    predicted: str
    references: Sequence[str] = ()  # the true captions
    pieces: Sequence[str] = ()  # `predicted` cut into its words, each with the space before it (`Caption.pieces`)
    word_probs: Sequence[float] = ()  # the probability of each of `pieces`, 0 to 1
    score: float | None = None  # the higher the better; cards are sorted by it
    ok: bool | None = None  # whether the caption is right, or None where that is unknown
    notes: Sequence[str] = ()  # why it is wrong
    alternatives: Sequence[str] = ()  # further predicted captions, such as the rest of an n-best list
    systems: Sequence[tuple[str, str, float | None]] = ()  # instead of `predicted`: name, caption and score of several
    alphas: Sequence[Any] = ()  # an attention map over the image for each of `pieces`, (rows, columns), at most 1

    def __post_init__(self) -> None:
        for name in ("word_probs", "alphas"):
            if (n := len(getattr(self, name))) not in (0, len(self.pieces)):
                raise ValueError(f"card {self.title}: {len(self.pieces)} pieces have {n} {name}")

    @property
    def verdict(self) -> str:
        """`"right"`, `"wrong"`, or nothing where that is unknown."""
        return "" if self.ok is None else "right" if self.ok else "wrong"

    @property
    def finite_score(self) -> float | None:
        """The score as a float, or None for NaN and infinities."""
        return float(self.score) if self.score is not None and math.isfinite(self.score) else None


@dataclass(frozen=True, eq=False)
class Gallery:
    """Cards that can be searched, sorted by score and filtered by verdict; these controls appear as the cards allow.

    The score is a caption's log-probability or, with the `score_name` "confidence", the probability that it is right;
    the page explains both. With another name, say what it means in `note`.
    """

    title: str
    cards: Sequence[Card]
    note: str = ""
    score_name: str = "score"

    @property
    def image_side(self) -> int:
        """The longer side in pixels of the stored images, each of which is shown on its card and enlarged."""
        return 800 if len(self.cards) <= 100 else 320

    def controls(self) -> list[tuple[str, str, dict[str, str]]]:
        """Return the groups of buttons: label, key, and the text of each value."""
        groups = []
        right, wrong = (sum(card.verdict == verdict for card in self.cards) for verdict in ("right", "wrong"))
        if right or wrong:
            choices = {"all": f"all {len(self.cards)}", "right": f"right {right}", "wrong": f"wrong {wrong}"}
            groups.append(("Show", "show", choices))
        if any(card.finite_score is not None for card in self.cards):
            best, worst = f"highest {self.score_name} first", f"lowest {self.score_name} first"
            if self.score_name in ("score", "confidence"):  # a sure caption may well be wrong
                best, worst = "most confident first", "least confident first"
            groups.append(("Sort", "sort", {"order": "as listed", "best": best, "worst": worst}))
        return groups


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of text, numbers and `Interval`s; None shows as a dash, and columns of numbers are aligned to the right.

    Floats have `digits` decimals, or four significant digits where that is None.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str = ""
    digits: int | None = None

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.title}: a row has {len(row)} cells for {len(self.columns)} columns")

    def numeric(self) -> list[bool]:
        """Return which columns hold numbers only."""
        return [i > 0 and all(_is_number(row[i]) for row in self.rows) for i in range(len(self.columns))]


Section = Gallery | Table | Curve | Histogram | Bars


def write_page(
    path: str | os.PathLike,
    title: str,
    summary: str = "",
    tiles: Iterable[tuple] = (),
    sections: Iterable[Section] = (),
) -> Path:
    """Write one HTML file that opens anywhere, offline, in light or dark mode; return its path.

    `summary` is a sentence or two under the title. Charts and narrow tables stand side by side where there is room. A
    card's image that cannot be read raises a `BrokenImageError`.
    """
    from jinja2 import Environment, StrictUndefined

    def finalize(value: Any) -> Any:
        return value if hasattr(value, "__html__") else clean(value)  # what is HTML already stays as it is

    options = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(autoescape=True, finalize=finalize, **options)
    environment.filters |= {"cell": _cell, "data_uri": _data_uri, "map_data": _map_data, "sha256": _sha256}
    environment.globals |= {"light": LIGHT, "dark": DARK, "version": __version__}
    template = environment.from_string(resources.files("showtell").joinpath("report.html").read_text("utf-8"))
    tiles = [Tile(*tile) for tile in tiles]
    write_text(path, template.render(title=title, summary=summary, tiles=tiles, sections=list(sections)))
    return Path(path)


def _cell(value: object, digits: int | None = None) -> str:
    """Return the content of a table's cell or a tile."""
    from markupsafe import Markup  # Jinja2's

    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, Interval):
        return Markup('{:.1f} <span class="interval">{:.1f} to {:.1f}</span>').format(*value)
    if isinstance(value, Real) and not isinstance(value, Integral):
        return f"{value:.4g}" if digits is None else f"{value:.{digits}f}"
    return f"{value:,}" if isinstance(value, Integral) else str(value)


def _is_number(value: object) -> bool:
    if value is None or isinstance(value, (Real, Interval)):
        return True
    return re.fullmatch("[<>]? ?[-+\N{MINUS SIGN}]?[\\d.,]+ ?%?", str(value)) is not None


def _data_uri(image: Any, side: int) -> str:
    """Return an image, reduced to `side`, as a URI: JPEG, or PNG where that is the smaller, as it is for drawings."""
    thumbnail = Image.fromarray(pixels(image))
    thumbnail.thumbnail((side, side), Image.Resampling.LANCZOS)
    files = {"jpeg": io.BytesIO(), "png": io.BytesIO()}
    for kind, file in files.items():
        thumbnail.save(file, kind, quality=75)  # PNG has no quality and ignores it
    kind = min(files, key=lambda kind: files[kind].getbuffer().nbytes)
    return f"data:image/{kind};base64,{base64.b64encode(files[kind].getvalue()).decode()}"


def _map_data(alpha: Any) -> str:
    """Return an attention map as its number of columns and a hexadecimal digit per cell."""
    return f"{len(alpha[0])} " + "".join(f"{round(15 * float(weight)):x}" for row in alpha for weight in row)


def _sha256(script: str) -> str:
    """Return the hash by which a Content-Security-Policy names a script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
