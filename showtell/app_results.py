"""The HTML that `showtell app` shows: captions with coloured words and attention maps, a table of many images.

The style and the script are in `app.html`. Every text is escaped, and images are inside the page, as data URIs.
"""

from __future__ import annotations

import base64
import csv
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from showtell.captioner import Caption, Captioner
from showtell.transforms import Transform

SAMPLES = sorted(Path(__file__).resolve().parent.joinpath("samples").glob("*.jpg"))
LEGEND = """<p class="st-legend"><span>0 %</span><i></i><span>100 %</span>
<span>probability of a word, given the image and the words before it</span></p>"""
EMPTY = '<div class="st"><p class="st-note">Add an image, or choose an example: its caption appears here.</p></div>'


@dataclass
class Result:
    """An image with the captions of each model, or why it has none."""

    name: str
    captions: dict[str, list[Caption]] = field(default_factory=dict)  # by model, best first
    preview: str = ""  # a data URI
    size: tuple[int, int] = (0, 0)  # width and height
    error: str = ""

    def rows(self) -> list[dict]:
        """Return plain values, a row per model, as `showtell caption --json` prints them."""
        if self.error:
            return [{"image": self.name, "captions": [], "error": self.error}]
        return [
            {"image": self.name, "model": model, "captions": [caption.to_dict() for caption in captions]}
            for model, captions in self.captions.items()
        ]


def page(results: Sequence[Result], captioners: Mapping[str, Captioner], n: int) -> str:
    """Return the HTML of results: everything about a single image, a table of several; `n` are expected."""
    if n == 1:
        (result,) = results
        return alert(result.error) if result.error else f'<div class="st">{_card(result, captioners)}</div>'
    return f'<div class="st">{_table(results, list(captioners), n)}</div>'


def _card(result: Result, captioners: Mapping[str, Captioner]) -> str:
    (best, *_), *_ = result.captions.values()
    attends = any(caption.alphas is not None for captions in result.captions.values() for caption in captions)
    note = "Choose a word to see where the model looked." if attends else "This model has no attention maps."
    sections = []
    for name, captions in result.captions.items():
        region = _region(captioners[name].transform, *result.size)
        items = "".join(
            f'<li>{_words(c, region)}<p class="st-row">{_facts(c)}{_copy("Copy text", c.text)}'
            f"{_copy('Copy alt attribute', alt_attribute(c.text))}</p></li>"
            for c in captions
        )
        sections.append(f"<section><h3>{html.escape(name)}</h3><ol>{items}</ol></section>")
    return f"""<div class="st-card">
<figure><div class="st-image"><img src="{result.preview}" alt="{html.escape(best.text)}"><canvas hidden>
</canvas></div><figcaption role="status" data-note="{note}">{note}</figcaption></figure>
<div>{"".join(sections)}{LEGEND}</div></div>"""


def _words(caption: Caption, region: str) -> str:
    """Return the words as buttons, coloured and labelled by probability, with their attention maps."""
    words = []
    for i, (piece, p) in enumerate(zip(caption.pieces, caption.word_probs, strict=True)):
        word, percent = html.escape(piece.strip()), f"{p:.0%}".replace("%", " %")
        data = ""
        if caption.alphas is not None:
            alphas = caption.alphas[i]
            levels = bytes(int(255 * value / float(alphas.max())) for value in alphas.flatten().tolist())
            data = f' data-map="{levels.hex()}" data-columns="{alphas.shape[1]}" data-region="{region}"'
        words.append(
            f'<button type="button" class="st-word" style="--p:{p:.2f}" aria-pressed="false" title="{word}: {percent}"'
            f"{data}><span>{word}</span><small>{percent}</small></button>"
        )
    return f'<p class="st-words">{"".join(words) or "(empty caption)"}</p>'


def _facts(caption: Caption) -> str:
    sure = "" if caption.confidence is None else f"confidence {100 * caption.confidence:.0f} %, "
    score = f"{caption.score:.2f}".replace("-", "\N{MINUS SIGN}")
    meaning = "log-probability, normalised by length; 0 is the highest"
    return f'<span class="st-facts" title="{meaning}">{sure}score {score}</span>'


def alt_attribute(text: str) -> str:
    """Return a caption as an attribute to paste into HTML."""
    return f'alt="{html.escape(text)}"'


def _copy(label: str, text: str) -> str:
    return f'<button type="button" class="st-copy" data-copy="{html.escape(text)}">{label}</button>'


def sample_buttons() -> str:
    """Return the examples as buttons."""
    buttons = []
    for i, path in enumerate(SAMPLES):
        image = f'<img src="{preview(Image.open(path), 120)}" alt="{path.stem}">'
        buttons.append(f'<button type="button" data-sample="{i}" title="{path.stem}">{image}</button>')
    return f'<div class="st"><h3>Examples</h3><div class="st-samples">{"".join(buttons)}</div></div>'


def _table(results: Sequence[Result], models: Sequence[str], n: int) -> str:
    rows = []
    for result in results:
        name, image = html.escape(result.name), ""
        if result.error:
            cells = f'<td colspan="{len(models)}">{alert(result.error)}</td>'
        else:
            best = [captions[0] for captions in result.captions.values()]
            cells = "".join(f"<td>{html.escape(caption.text)}<br>{_facts(caption)}</td>" for caption in best)
            image = f'<img src="{result.preview}" alt="">'
        rows.append(f'<tr><th scope="row">{image}{name}</th>{cells}</tr>')
    heads = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in ("image", *models))
    table = f'<div class="st-scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    if len(results) < n:
        return f'<p role="status">{len(results)} of {n} images</p>{table}'
    text = csv_text(results)
    uri = f"data:text/csv;base64,{base64.b64encode(text.encode()).decode()}"
    link = f'<a class="st-copy" download="captions.csv" href="{uri}">Download csv</a>'
    return f'<p class="st-row" role="status">{n} images {_copy("Copy as csv", text)}{link}</p>{table}'


def csv_text(results: Iterable[Result]) -> str:
    """Return a table of the captions; a name that a spreadsheet would take for a formula starts with an apostrophe."""
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["image", "model", "caption", "score", "confidence"])
    for result in results:
        name = f"'{result.name}" if result.name.startswith(("=", "+", "-", "@")) else result.name
        for model, captions in result.captions.items():
            plain = [caption.to_dict() for caption in captions]
            writer.writerows([name, model, *map(c.get, ("text", "score", "confidence"))] for c in plain)
    return table.getvalue()


def alert(sentence: str) -> str:
    """Return an error message."""
    text = html.escape(sentence[0].upper() + sentence[1:])
    return f'<div class="st"><p class="st-error" role="alert">{text}.</p></div>'


def _region(transform: Transform, width: int, height: int) -> str:
    """Return the part of an image that the network sees, as CSS: all of it unless the transform crops."""
    left, top, right, bottom = transform.region(width, height)
    sides = {"left": left, "top": top, "width": right - left, "height": bottom - top}
    return "".join(f"{name}:{share:.2%};" for name, share in sides.items())


def preview(image: Image.Image, side: int = 800) -> str:
    """Return an image as a JPEG in a data URI, made smaller in place."""
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
