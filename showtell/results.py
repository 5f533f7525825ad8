"""The report of one system's scores: `showtell evaluate --html` and `showtell score --html`."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from showtell.annotations import read_json
from showtell.errors import MissingFileError
from showtell.metrics import labels
from showtell.report import Bars, Card, Gallery, Histogram, Interval, Section, Table, Tile, write_page
from showtell.scoring import Result, _health_rows

N_SHOWN = 30  # images among the best, and among the worst
CIDER = "CIDEr-D: how many phrases the caption shares with the true captions, rare ones counting more; 0 is none."


def write_results(
    path: str | os.PathLike,
    result: Result,
    references: Mapping[str, Sequence[str]],
    image: Callable[[str], object],
    about: str,
    tiles: Sequence[Tile] = (),
    captions: Mapping[str, Any] | None = None,
    sections: Sequence[Section] = (),
) -> Path:
    """Write one self-contained page: scores with intervals, best and worst images, health, lengths and words.

    `image` leads from an image id to anything `showtell.transforms.read_image` reads, or to None; `about` is one line
    that says what was scored; `captions`, if there are any, are the `showtell.captioner.Caption`s with the word
    probabilities; `sections` are shown after the scores.
    """
    scores, per_image = result.scores, result.scores.per_image
    cider, rouge = (dict(zip(scores.ids, per_image[name].tolist(), strict=True)) for name in ("CIDEr", "ROUGE_L"))
    order = sorted(cider, key=cider.__getitem__, reverse=True)

    def card(i: str) -> Card:
        own = captions[i] if captions else None
        pieces, probs = (own.pieces, own.word_probs) if own else ((), ())
        notes = [f"confidence {own.confidence:.2f}"] if own and own.confidence is not None else []
        return Card(image(i), i, result.captions[i], references[i], pieces, probs, cider[i], notes=notes)

    rows = []
    for name, label in labels().items():
        if (value := scores.corpus[name]) is not None:
            bounds = result.intervals.get(name)
            rows.append([label, Interval(100 * value, *(100 * b for b in bounds)) if bounds else 100 * value])
    lengths = {
        "predicted": [len(text.split()) for text in result.captions.values()],
        "true": [len(text.split()) for i in scores.ids for text in references[i]],
    }
    words = Counter(word for text in result.captions.values() for word in text.lower().split())
    listed = [[i, cider[i], rouge[i], result.captions[i]] for i in order[::-1]]
    n = min(N_SHOWN, len(order) // 2 or 1)
    sections = [
        Table("Scores", ["metric", "x 100"], rows, f"95 % intervals over images; tokeniser {scores.tokenizer}"),
        Table("Health", ["measure", "value"], _health_rows([result])),
        *sections,
        Gallery(f"The {n} best", [card(i) for i in order[:n]], CIDER, "CIDEr-D"),
        Gallery(f"The {n} worst", [card(i) for i in order[::-1][:n]], CIDER, "CIDEr-D"),
        Histogram("Caption lengths", lengths, "words", "share of captions, %"),
        Bars("Most frequent words", dict(words)),
        Table("Every image, worst first", ["image", "CIDEr-D", "ROUGE-L", "predicted"], listed, digits=3),
    ]
    tiles = [*tiles, Tile("images", len(order))]
    tiles += [Tile(labels()[name], f"{100 * scores.corpus[name]:.1f}") for name in ("Bleu_4", "CIDEr")]
    return write_page(path, "Captions, actual and predicted", about, tiles, sections)


def image_finder(folder: str | os.PathLike, references: str | os.PathLike) -> Callable[[str], Path | None]:
    """Return a function from image ids to files of a folder, of any depth, by name or by number in the name.

    If `references` is a file of COCO annotations, its `images` map ids to file names too. A folder that does not exist
    raises a `MissingFileError`.
    """
    if not Path(folder).is_dir():
        raise MissingFileError(f"there is no folder {folder}; give the folder of the images with --images")
    found: dict[str, Path] = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            number = re.search(r"(\d+)$", path.stem)
            for key in (path.name, path.stem, *([str(int(number[1]))] if number else ())):
                found.setdefault(key, path)
    if Path(references).suffix == ".json":
        content = read_json(Path(references))
        listed = content.get("images") if isinstance(content, dict) else None
        for image in listed if isinstance(listed, list) else ():
            if isinstance(image, dict) and image.get("file_name") in found:
                found[str(image.get("id"))] = found[image["file_name"]]
    return found.get
