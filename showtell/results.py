"""Reports of scores, of one system or several: `showtell evaluate --html` and `showtell score --html`."""

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
from showtell.scoring import Result, health_rows, p_value

N_SHOWN = 30  # images with the highest, and with the lowest score
N_COMPARED = 100  # images on which several systems differ most
CIDER = "CIDEr-D: how many phrases the caption shares with the true captions, rare ones counting more; 0 is none."
Images = Callable[[str], object]  # from an id to anything `showtell.transforms.read_image` reads, or to None


def write_results(
    path: str | os.PathLike,
    result: Result,
    references: Mapping[str, Sequence[str]],
    image: Images,
    about: str,
    tiles: Sequence[Tile] = (),
    captions: Mapping[str, Any] | None = None,
    sections: Sequence[Section] = (),
) -> Path:
    """Write the page of one system: scores, caption statistics, images with the highest and lowest CIDEr-D, lengths.

    `about` is one line that says what was scored; `captions`, if there are any, are the `showtell.captioner.Caption`s
    with the word probabilities; `sections` are shown after the scores.
    """
    scores, (cider, rouge) = result.scores, (_by_image(result, name) for name in ("CIDEr", "ROUGE_L"))
    order = sorted(cider, key=cider.__getitem__, reverse=True)

    def card(i: str) -> Card:
        own = captions[i] if captions else None
        pieces, probs = (own.pieces, own.word_probs) if own else ((), ())
        notes = [f"confidence {own.confidence:.2f}"] if own and own.confidence is not None else []
        return Card(image(i), i, result.captions[i], references[i], pieces, probs, cider[i], notes=notes)

    words = Counter(word for text in result.captions.values() for word in text.lower().split())
    listed = [[i, cider[i], rouge[i], result.captions[i]] for i in order[::-1]]
    n = min(N_SHOWN, len(order) // 2 or 1)
    sections = [
        *_score_tables([result]),
        *sections,
        Gallery(f"The {n} highest CIDEr-D", [card(i) for i in order[:n]], CIDER, "CIDEr-D"),
        Gallery(f"The {n} lowest CIDEr-D", [card(i) for i in order[::-1][:n]], CIDER, "CIDEr-D"),
        _lengths([result], references),
        Bars("Most frequent words", dict(words)),
        Table("Every image, lowest CIDEr-D first", ["image", "CIDEr-D", "ROUGE-L", "predicted"], listed, digits=3),
    ]
    tiles = [*tiles, Tile("images", len(order))]
    tiles += [Tile(labels()[name], f"{100 * scores.corpus[name]:.1f}") for name in ("Bleu_4", "CIDEr")]
    return write_page(path, "Captions, actual and predicted", about, tiles, sections)


def write_comparison(
    path: str | os.PathLike,
    results: Sequence[Result],
    references: Mapping[str, Sequence[str]],
    image: Images,
    about: str,
) -> Path:
    """Write the page of several systems: scores side by side, and the images on which their captions differ most.

    The difference between two systems is the second's CIDEr-D minus the first's; among more, the highest minus the
    lowest.
    """
    names, ciders = [result.name for result in results], [_by_image(result, "CIDEr") for result in results]
    values = {i: [cider[i] for cider in ciders] for i in ciders[0]}  # all have the same images, or no differences
    if len(results) == 2:
        what, difference = f"{names[1]} minus {names[0]}", {i: b - a for i, (a, b) in values.items()}
    else:
        what, difference = "the highest minus the lowest", {i: max(row) - min(row) for i, row in values.items()}
    order = sorted(values, key=lambda i: abs(difference[i]), reverse=True)

    def card(i: str) -> Card:
        systems = [(r.name, r.captions[i], value) for r, value in zip(results, values[i], strict=True)]
        return Card(image(i), i, "", references[i], score=difference[i], systems=systems)

    note = f"The difference in CIDEr-D: {what}. {CIDER}"
    cards = [card(i) for i in order[:N_COMPARED]]
    listed = [[i, *values[i], difference[i]] for i in order]
    sections = [
        *_score_tables(results),
        Gallery(f"The {len(cards)} largest differences", cards, note, "difference"),
        _lengths(results, references),
        Table("Every image, largest difference first", ["image", *names, "difference"], listed, "CIDEr-D", digits=3),
    ]
    tiles = [
        Tile("images", len(values)),
        *(Tile(f"CIDEr-D, {r.name}", 100 * r.scores.corpus["CIDEr"]) for r in results),
    ]
    return write_page(path, "Captions of several systems", about, tiles, sections)


def _by_image(result: Result, metric: str) -> dict[str, float]:
    return dict(zip(result.scores.ids, result.scores.per_image[metric].tolist(), strict=True))


def _score_tables(results: Sequence[Result]) -> list[Table]:
    """Return the tables of scores, of differences from the first system, if there are several, and of statistics."""
    names = [result.name for result in results] if len(results) > 1 else ["x 100"]
    rows, differences = [], []
    for metric, label in labels().items():
        if any(result.scores.corpus[metric] is not None for result in results):
            rows.append([label, *(_interval(r.scores.corpus[metric], r.intervals.get(metric)) for r in results)])
    for result in results[1:]:
        for metric, d in result.differences.items():
            interval = _interval(d.difference, (d.low, d.high))
            differences.append([labels()[metric], result.name, interval, p_value(d)])
    note = f"x 100; 95 % intervals over images; tokeniser {results[0].scores.tokenizer}"
    tables = [Table("Scores", ["metric", *names], rows, note)]
    if differences:
        title = f"Differences from {results[0].name}"
        tables.append(Table(title, ["metric", "system", "difference", ""], differences, "x 100; 95 % intervals"))
    return [
        *tables,
        Table("Caption statistics", ["", *names] if len(results) > 1 else ["", "value"], health_rows(results)),
    ]


def _interval(value: float | None, bounds: tuple[float, float] | None) -> Interval | float | None:
    if value is None or bounds is None:
        return value and 100 * value
    return Interval(100 * value, *(100 * bound for bound in bounds))


def _lengths(results: Sequence[Result], references: Mapping[str, Sequence[str]]) -> Histogram:
    named = {result.name if len(results) > 1 else "predicted": result.captions.values() for result in results}
    named["true"] = [text for i in results[0].scores.ids for text in references[i]]
    lengths = {name: [len(text.split()) for text in texts] for name, texts in named.items()}
    return Histogram("Caption lengths", lengths, "words", "share of captions, %")


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
