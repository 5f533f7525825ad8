"""Results to look at: one self-contained HTML page, or one PNG.

`write_page` writes the pages of `showtell demo`, `caption --html`, `evaluate --html` and `score --html` from sections
(`Gallery` of `Card`, `Table`, `Curve`, `Histogram`, `Bars`); the page's style and script are in `report.html`.
`write_figure` draws a PNG with Pillow alone. Every text is escaped, every picture is inside, and
nothing is fetched.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from showtell.figures import (
    SCALE,
    TONES,
    Bars,
    Curve,
    Histogram,
    chart_image,
    drawable,
    escape,
    save_png,
    section_html,
    write_label,
)
from showtell.files import write_text


class Tile(NamedTuple):
    """A key number in a page's header. A plain tuple `(label, value)` or `(label, value, hint)` does as well."""

    label: str
    value: object
    hint: str = ""


class Interval(NamedTuple):
    """A table cell that shows a figure with its confidence interval, rounded to `digits` decimals."""

    value: float
    low: float
    high: float
    digits: int = 1


@dataclass(frozen=True, eq=False)
class Card:
    """One captioned picture.

    Attributes:
        image: anything `showtell.transforms.read_image` reads (a path, bytes, a PIL image, an array, a uint8 tensor of
            shape (3, H, W)), or None where there is no picture.
        title: what the picture is called: its id or file name.
        predicted: the caption the model wrote.
        references: the true captions.
        pieces: `predicted` cut into its words, each with the space before it (`Caption.pieces`).
        word_probs: their probabilities, 0 to 1, one for each of `pieces`.
        score: how good the caption is, higher being better; cards are sorted by it.
        ok: whether the caption is right, where something can tell.
        notes: the reasons why it is right or wrong.
        alternatives: further predicted captions, such as the rest of an n-best list.
    """

    image: Any
    title: str
    predicted: str
    references: Sequence[str] = ()
    pieces: Sequence[str] = ()
    word_probs: Sequence[float] = ()
    score: float | None = None
    ok: bool | None = None
    notes: Sequence[str] = ()
    alternatives: Sequence[str] = ()

    def __post_init__(self) -> None:
        if len(self.word_probs) not in (0, len(self.pieces)):
            raise ValueError(f"card {self.title}: {len(self.pieces)} pieces have {len(self.word_probs)} word_probs")

    @property
    def verdict(self) -> str:
        """`"right"`, `"wrong"`, or nothing where nobody can tell."""
        return "" if self.ok is None else "right" if self.ok else "wrong"

    def html(self, thumbnail: int = 160, score_name: str = "score", score_format: str = ".2f") -> str:
        """Returns the card as an `<li>`, its picture shrunk to at most `thumbnail` pixels a side."""
        score = _finite(self.score)
        attributes = f' data-verdict="{self.verdict}"' if self.verdict else ""
        head = f'<span class="name" dir="auto" data-text>{escape(self.title)}</span>'
        if self.verdict:
            head += f'<span class="badge {self.verdict}">{self.verdict}</span>'
        if score is not None:
            attributes += f' data-score="{score!r}"'
            head += f'<span>{escape(score_name)} <span class="score">{format(score, score_format)}</span></span>'
        body = f'<p class="predicted" dir="auto" data-text>{self._predicted_html()}</p>'
        if self.notes:
            body += f'<ul class="notes">{_items(self.notes)}</ul>'
        if self.alternatives:
            body += f'<p class="label">Also likely</p><ul class="others">{_items(self.alternatives)}</ul>'
        true = ""
        if self.references:
            label = "True caption" if len(self.references) == 1 else "True captions"
            true = f'<div class="true"><p class="label">{label}</p><ul>{_items(self.references)}</ul></div>'
        picture = "<span>no picture</span>"
        if self.image is not None:
            alt = self.references[0] if self.references else f"picture {self.title}"
            picture = f'<img src="{_data_uri(self.image, thumbnail)}" alt="{escape(alt)}" decoding="async">'
        return (
            f'<li class="card {self.verdict}"{attributes}><div class="picture">{picture}</div>'
            f'<div class="head">{head}</div><div class="body">{body}</div>{true}</li>'
        )

    def _predicted_html(self) -> str:
        """The caption, each word tinted by its probability where the probabilities are known."""
        if not self.predicted.strip() and not self.pieces:
            return '<span class="label">(empty caption)</span>'
        if not len(self.word_probs):
            return escape(self.predicted)
        parts = []
        for piece, probability in zip(self.pieces, self.word_probs, strict=True):
            percent, word = f"{100 * probability:.0f}", piece.lstrip()
            parts.append(escape(piece[: len(piece) - len(word)]))
            parts.append(f'<span class="w" style="--p:{probability:.2f}" data-p="{percent}" title="{percent} %">')
            parts.append(f"{escape(word)}</span>")
        return "".join(parts)


@dataclass(frozen=True, eq=False)
class Gallery:
    """Cards that can be searched, sorted by score and filtered by verdict; these controls appear as the cards allow."""

    title: str
    cards: Sequence[Card]
    note: str = ""
    score_name: str = "score"
    score_format: str = ".2f"
    thumbnail: int = 160

    def html(self) -> str:
        """Returns the section with its controls and all its cards."""
        right, wrong = (sum(card.ok is verdict for card in self.cards) for verdict in (True, False))
        label = f"Search in {escape(self.title)}"
        controls = f'<input type="search" placeholder="Search captions and names" aria-label="{label}">'
        if right or wrong:
            choices = {"all": f"all {len(self.cards)}", "right": f"right {right}", "wrong": f"wrong {wrong}"}
            controls += _buttons("Show", "show", choices)
        if any(_finite(card.score) is not None for card in self.cards):
            controls += _buttons("Sort", "sort", {"order": "as listed", "best": "best first", "worst": "worst first"})
        legend = ""
        if any(len(card.word_probs) for card in self.cards):
            legend = (
                '<p class="legend"><span>Word probability: 0 %</span><span class="ramp"></span><span>100 %</span>'
                '<label class="needs-script" hidden><input type="checkbox" class="numbers-switch">show numbers</label>'
                "</p>"
            )
        cards = "\n".join(card.html(self.thumbnail, self.score_name, self.score_format) for card in self.cards)
        count = '<output class="count" aria-live="polite"></output>'
        return section_html(
            self,
            f'<div class="controls needs-script" hidden>{controls}{count}</div>'
            f'{legend}<ul class="cards" role="list">\n{cards}\n</ul><p class="nothing" hidden>No card matches.</p>',
            "wide gallery many" if len(self.cards) > 100 else "wide gallery",  # many: drawn as they scroll into view
        )


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of text, numbers and `Interval`s; None shows as a dash, and columns of numbers are set to the right.

    Floats have `digits` decimals, or four significant digits where that is None.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str = ""
    digits: int | None = None

    def html(self) -> str:
        """Returns the section; a table too wide for the screen scrolls by itself."""
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.title}: a row has {len(row)} cells for {len(self.columns)} columns")
        numeric = [all(_is_number(row[i]) for row in self.rows) and i > 0 for i in range(len(self.columns))]
        style = [' class="number"' if number else "" for number in numeric]
        head = "".join(f'<th scope="col"{s}>{escape(name)}</th>' for name, s in zip(self.columns, style, strict=True))
        body = ""
        for row in self.rows:
            cells = [f"{s}>{_cell(value, self.digits)}" for value, s in zip(row, style, strict=True)]
            body += f'<tr><th scope="row" dir="auto"{cells[0]}</th>'
            body += "".join(f'<td dir="auto"{cell}</td>' for cell in cells[1:]) + "</tr>\n"
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        box = f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(self.title)}">{table}</div>'
        return section_html(self, box, "wide" if len(self.columns) > 4 else "")


Section = Gallery | Table | Curve | Histogram | Bars


def write_page(
    path: str | os.PathLike,
    title: str,
    summary: str = "",
    tiles: Iterable[tuple] = (),
    sections: Iterable[Section] = (),
) -> Path:
    """Writes one HTML file that opens anywhere, offline, in light or dark; returns its path.

    Args:
        path: the file to write; its folder is made.
        title: the page's heading.
        summary: a sentence or two under it.
        tiles: key numbers, each `(label, value)` or `(label, value, hint)`.
        sections: what the page shows, in order; charts and narrow tables stand side by side where there is room.

    Raises:
        BrokenImageError: a card's picture cannot be read.
    """
    page, script = resources.files("showtell").joinpath("report.html").read_text("utf-8").split("<!-- script -->\n")
    boxes = ""
    for label, value, hint in (Tile(*tile) for tile in tiles):
        small = f'<dd class="hint">{escape(hint)}</dd>' if hint else ""
        boxes += f'<div><dt>{escape(label)}</dt><dd class="value">{_cell(value)}</dd>{small}</div>\n'
    parts = {
        "title": escape(title),
        "summary": f'<p class="summary" dir="auto">{escape(summary)}</p>' if summary else "",
        "tiles": f'<dl class="tiles">{boxes}</dl>' if boxes else "",
        "sections": "\n".join(section.html() for section in sections),
        "script": script,
        # The browser runs this very script and no other: a second lock behind the escaping of captions.
        "script_hash": "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    write_text(path, re.sub(r"@@(\w+)@@", lambda found: parts[found[1]], page))
    return Path(path)


def write_figure(
    path: str | os.PathLike,
    cards: Sequence[Card],
    curve: Curve | None = None,
    title: str = "",
    columns: int = 4,
) -> Path:
    """Writes a PNG of captioned pictures, with a training curve under them, and returns its path.

    Each picture stands over its first true caption and the predicted one; a wrong one is framed, marked and written
    in red, with the first reason. The font is the one inside Pillow, which has no accents and Latin letters only:
    accents are left out, and letters of other scripts show as boxes (`write_page` shows them all).

    Raises:
        BrokenImageError: a card's picture cannot be read.
    """
    margin, gap, side = 24, 20, 216
    columns = max(1, min(columns, len(cards)))
    width = 2 * margin + max(columns * (side + gap) - gap, 560)
    captions = [_figure_lines(card, side) for card in cards]
    rows = [range(i, min(i + columns, len(cards))) for i in range(0, len(cards), columns)]
    row_heights = [side + 10 + 18 * max(len(captions[i]) for i in row) + gap for row in rows]
    head = margin + (40 if title else 0)
    foot = 320 if curve else 0
    image = Image.new("RGB", (SCALE * width, SCALE * (head + sum(row_heights) + foot + margin // 2)), TONES["paper"])
    draw = ImageDraw.Draw(image)
    if title:
        write_label(draw, (margin, margin + 10), title, 22, "ink")
    top = head
    for row, row_height in zip(rows, row_heights, strict=True):
        for column, i in enumerate(row):
            left = margin + column * (side + gap)
            _figure_picture(image, draw, cards[i], left, top, side)
            for k, (text, tone) in enumerate(captions[i]):
                write_label(draw, (left, top + side + 18 + 18 * k), text, 14, tone)
        top += row_height
    if curve:
        image.paste(chart_image(curve, width - 2 * margin + 16, foot), (SCALE * (margin - 6), SCALE * top))
    return save_png(image, path)


def _items(texts: Iterable[str]) -> str:
    return "".join(f'<li dir="auto" data-text>{escape(text)}</li>' for text in texts)


def _buttons(label: str, key: str, choices: Mapping[str, str]) -> str:
    """A row of buttons of which the first is pressed."""
    buttons = ""
    for i, (value, text) in enumerate(choices.items()):
        state = f'data-key="{key}" data-value="{value}" aria-pressed="{"false" if i else "true"}"'
        buttons += f'<button type="button" {state}>{text}</button>'
    return f'<div class="group" role="group" aria-label="{label}">{buttons}</div>'


def _cell(value: object, digits: int | None = None) -> str:
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, Interval):
        figure, low, high = (f"{x:.{value.digits}f}" for x in value[:3])
        return f'{figure} <span class="interval">{low} to {high}</span>'
    if isinstance(value, Real) and not isinstance(value, Integral):
        return f"{value:.4g}" if digits is None else f"{value:.{digits}f}"
    return escape(f"{value:,}" if isinstance(value, Integral) else value)


def _is_number(value: object) -> bool:
    if value is None or isinstance(value, (Real, Interval)):
        return True
    return re.fullmatch("[<>]? ?[-+\N{MINUS SIGN}]?[\\d.,]+ ?%?", str(value)) is not None


def _finite(score: float | None) -> float | None:
    return float(score) if score is not None and math.isfinite(score) else None


def _picture(image: Any) -> Image.Image:
    from showtell.transforms import read_image  # brings torch, which a page of tables and charts can do without

    return Image.fromarray(read_image(image).permute(1, 2, 0).contiguous().numpy())


def _data_uri(image: Any, side: int) -> str:
    """A thumbnail inside a URI: JPEG, or PNG where that is the smaller, as it is for drawings."""
    picture = _picture(image)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    files = {}
    for kind, options in (("jpeg", {"quality": 82}), ("png", {})):
        file = io.BytesIO()
        picture.save(file, kind, **options)
        files[kind] = file.getvalue()
    kind = min(files, key=lambda kind: len(files[kind]))
    return f"data:image/{kind};base64,{base64.b64encode(files[kind]).decode()}"


def _figure_lines(card: Card, width: int) -> list[tuple[str, str]]:
    """The lines under a picture of a figure, each with its tone."""
    texts = [(f"true: {reference}", "muted") for reference in card.references[:1]]
    texts.append((f"predicted: {card.predicted}", "wrong" if card.ok is False else "ink"))
    texts += [(f"({note})", "wrong") for note in card.notes[:1] if card.ok is False]
    return [(line, tone) for text, tone in texts for line in _wrapped(text, width, 14)]


def _wrapped(text: str, width: float, size: float, max_lines: int = 4) -> list[str]:
    """Breaks a text into lines that are not wider than `width`, a long word anywhere, and clips what is too long."""
    font = ImageFont.load_default(size * SCALE)

    def fits(line: str) -> bool:
        return font.getlength(line) <= width * SCALE

    lines = [""]
    for word in " ".join(drawable(text).split())[:1000].split(" "):
        if fits(f"{lines[-1]} {word}".lstrip()):
            lines[-1] = f"{lines[-1]} {word}".lstrip()
            continue
        lines.append("")
        for letter in word:
            lines[-1:] = [lines[-1] + letter] if fits(lines[-1] + letter) else [lines[-1], letter]
    lines = [line for line in lines if line]
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while not fits(f"{last}..."):
            last = last[:-1]
        lines[max_lines - 1 :] = [f"{last.rstrip()}..."]
    return lines


def _figure_picture(image: Image.Image, draw: ImageDraw.ImageDraw, card: Card, left: int, top: int, side: int) -> None:
    x, y, size = SCALE * left, SCALE * top, SCALE * side
    draw.rectangle((x, y, x + size - 1, y + size - 1), fill=TONES["hole"])
    if card.image is not None:
        picture = _picture(card.image)
        grow = size / max(picture.size)
        picture = picture.resize([max(1, round(grow * length)) for length in picture.size], Image.Resampling.BICUBIC)
        image.paste(picture, (x + (size - picture.width) // 2, y + (size - picture.height) // 2))
    if card.ok is False:
        draw.rectangle((x - 6, y - 6, x + size + 5, y + size + 5), outline=TONES["wrong"], width=6)
        draw.rectangle((x, y, x + 108, y + 42), fill=TONES["wrong"])
        write_label(draw, (left + 27, top + 10), "wrong", 14, "paper", "middle")
