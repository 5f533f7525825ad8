"""`showtell score REFERENCES CANDIDATES [MORE …]`: the scores of any captions, from files, without a model.

Reads COCO annotation json, COCO results json, `{"id": ["…"]}` json and csv/tsv; checks that the images match; prints
one table with intervals and the paired difference of several systems, or one JSON document. Needs numpy alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from showtell import java_metrics, metrics
from showtell.annotations import read_candidates, read_captions
from showtell.errors import UserError
from showtell.tokenizer import TOKENIZERS


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _matched(
    references: Mapping[str, Sequence[str]], candidates: Mapping[str, str], name: str, allow_missing: bool
) -> tuple[dict[str, str], list[str]]:
    """The candidates that can be scored, and notes on what is left out."""
    described = {image for image, group in references.items() if group}
    unknown = [image for image in candidates if image not in described]
    absent = [image for image in described if image not in candidates]
    if len(unknown) == len(candidates):
        raise UserError(
            f"no image of {name} has references: it names {_some(unknown)}, the references {_some(sorted(described))}; "
            "write the same image ids in both"
        )
    if (unknown or absent) and not allow_missing:
        parts = [f"{len(unknown)} of {len(candidates)} images have no references ({_some(unknown)})"] if unknown else []
        if absent:
            parts.append(f"{len(absent)} of {len(described)} images have no candidate ({_some(sorted(absent))})")
        raise UserError(f"{name}: {' and '.join(parts)}; complete the files or score the rest with --allow-missing")
    notes = [f"{len(unknown)} candidates without references were left out: {_some(unknown)}."] if unknown else []
    if absent:
        notes.append(f"{len(absent)} images with references have no candidate and were left out: {_some(absent)}.")
    kept = {image: caption for image, caption in candidates.items() if image in described}
    empty = [image for image, caption in kept.items() if not caption.strip()]
    if empty:
        notes.append(f"{len(empty)} candidates are empty and score 0: {_some(empty)}.")
    return kept, notes


def _some(images: Sequence[str], n: int = 3) -> str:
    return ", ".join(map(repr, images[:n])) + (", …" if len(images) > n else "")


# ---- scoring ----


@dataclass
class Result:
    """What is known about one system.

    Attributes:
        name: its file's name.
        scores: the scores, `scores.corpus[metric]` from 0 to 1 (CIDEr to 10).
        health: see `metrics.health`.
        intervals: metric -> 95 % interval over images; empty where not asked for.
        against: the name of the first system, which this one is compared with, if there are several.
        differences: metric -> how this one differs from the first.
        captions: its captions, by image.
        missing: metric -> why it could not be computed and what to do about it.
    """

    name: str
    scores: metrics.Scores
    health: dict[str, float | int | None]
    captions: dict[str, str]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    against: str | None = None
    differences: dict[str, metrics.Difference] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """The scores under their names, then `n_images`, `n_references`, `tokenizer`, `intervals`, `health` …"""
        document: dict[str, object] = dict(self.scores.corpus)
        document |= {
            "n_images": self.scores.n_images,
            "n_references": self.scores.n_references,
            "tokenizer": self.scores.tokenizer,
            "intervals": {metric: list(interval) for metric, interval in self.intervals.items()},
            "health": self.health,
            "missing": self.missing,
            "notes": self.scores.notes,
        }
        if self.against is not None:
            document["paired"] = {
                "against": self.against,
                **{metric: vars(difference) for metric, difference in self.differences.items()},
            }
        return document


def score_captions(
    references: Mapping[str, Sequence[str]],
    systems: Mapping[str, Mapping[str, str]],
    *,
    tokenizer: str = "ptb",
    frequencies: metrics.DocumentFrequencies | None = None,
    allow_missing: bool = False,
    java: bool = True,
    spice: bool = False,
    intervals: bool = True,
    training_captions: Iterable[str] | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
    announce: Callable[[str], None] = _say,
) -> list[Result]:
    """Scores one system or several, each against the same references, and compares the later ones with the first.

    Args:
        references: the true captions of each image.
        systems: name -> one caption for each image.
        allow_missing: score the images on both sides instead of refusing when some are missing on one.
        java: compute METEOR where pycocoevalcap and a Java are present.
        spice: compute SPICE too, which may fetch a large file; `announce` is told before it does.

    Raises:
        UserError: the images on the two sides differ, or see `metrics.score`.
    """
    training = list(training_captions) if training_captions is not None else None
    results = []
    for name, captions in systems.items():
        kept, notes = _matched(references, captions, name, allow_missing)
        scores = metrics.score(references, kept, tokenizer=tokenizer, frequencies=frequencies)
        scores.notes[:0] = notes
        health = metrics.health(list(kept.values()), training, tokenizer=tokenizer)
        results.append(Result(name, scores, health, kept))
    _add_java(results, references, java, spice, announce)
    if intervals:
        for result in results:
            result.intervals = metrics.bootstrap(result.scores, n_resamples, seed=seed)
    for result in results[1:]:
        result.against = results[0].name
        result.differences = metrics.paired(results[0].scores, result.scores, n_resamples, seed=seed)
    return results


def _add_java(
    results: Sequence[Result],
    references: Mapping[str, Sequence[str]],
    java: bool,
    spice: bool,
    announce: Callable[[str], None],
) -> None:
    """Adds METEOR and SPICE, or why they are not there; all systems share one start of the jar."""

    def add(metric: str, wanted: bool, compute: Callable[[], np.ndarray], how: str) -> None:
        reason = how
        if wanted:
            try:
                sizes = np.cumsum([result.scores.n_images for result in results])[:-1]
                for result, rows in zip(results, np.split(compute(), sizes), strict=True):
                    result.scores.add(metric, rows)
                return
            except java_metrics.JavaMetricError as error:
                reason = str(error)
        for result in results:
            result.missing[metric] = reason

    true = [list(references[image]) for result in results for image in result.scores.ids]
    written = [result.captions[image] for result in results for image in result.scores.ids]
    cut = TOKENIZERS["ptb"]  # METEOR's and SPICE's own rules stand on it, as in coco-caption
    add(
        "METEOR",
        java,
        lambda: java_metrics.meteor_statistics([[cut(c) for c in group] for group in true], [cut(c) for c in written]),
        "left out with --no-java",
    )
    add("SPICE", spice, lambda: java_metrics.spice_values(true, written, announce), "ask for it with --spice")


def score_files(references: str | Path, candidates: Sequence[str | Path], **options) -> list[Result]:
    """Scores files of captions against a file of references; `options` are those of `score_captions`.

    Systems are named after their files, or by the whole path where two files have one name.
    """
    names = [Path(path).name for path in candidates]
    if len(set(names)) < len(names):
        names = [str(path) for path in candidates]
    if len(set(names)) < len(names):
        raise UserError(f"{names[0]} is given more than once; name each file of candidates once")
    systems = {name: read_candidates(path) for name, path in zip(names, candidates, strict=True)}
    return score_captions(read_captions(references), systems, **options)


# ---- showing ----


def format_table(results: Sequence[Result]) -> str:
    """The scores × 100 for people: what was scored, the table, the differences, the health, the notes."""
    first = results[0].scores
    sizes = {(result.scores.n_images, result.scores.n_references) for result in results}
    what = ", ".join(f"{images:,} images with {references:,} references" for images, references in sorted(sizes))
    interval = ", 95 % intervals over images" if results[0].intervals else ""
    lines = [f"{what}; tokeniser {first.tokenizer}; scores × 100{interval}", ""]
    rows = [["", *(result.name for result in results), ""]]
    for metric, label in metrics.LABELS.items():
        rows.append([label, *(_cell(result, metric) for result in results), results[0].missing.get(metric, "")])
    lines += _aligned(rows)
    for result in results[1:]:
        lines += ["", f"{result.name} minus {result.against}"]
        lines += _aligned(
            [
                metrics.LABELS[metric],
                f"{100 * d.difference:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]",
                _p(d.p_value),
            ]
            for metric, d in result.differences.items()
        )
    lines += ["", *_aligned(_health_rows(results)), ""]
    notes = {note: [r.name for r in results if note in r.scores.notes] for r in results for note in r.scores.notes}
    lines += [note if len(names) == len(results) else f"{', '.join(names)}: {note}" for note, names in notes.items()]
    return "\n".join(lines).rstrip()


def _cell(result: Result, metric: str) -> str:
    value = result.scores.corpus[metric]
    if value is None:
        return "-"
    low, high = result.intervals.get(metric, (None, None))
    return f"{100 * value:.1f}" + (f" [{100 * low:.1f}, {100 * high:.1f}]" if low is not None else "")


def _p(p_value: float) -> str:
    return f"p = {p_value:.3f}" if p_value >= 0.0015 else "p < 0.002"


def _health_rows(results: Sequence[Result]) -> list[list[str]]:
    shown = [
        ("different captions", "distinct", "{:.1%}"),
        ("distinct-1, -2", None, ""),
        ("words used", "words_used", "{:,}"),
        ("not in the training set", "novel", "{:.1%}"),
        ("mean length", "mean_length", "{:.1f} words"),
        ("repeat themselves", "repeats", "{:.1%}"),
        ("break off", "bad_endings", "{:.1%}"),
        ("<unk> among words", "unk", "{:.1%}"),
    ]
    rows = []
    for label, key, form in shown:
        if key is None:
            cells = [f"{r.health['distinct_1']:.3f}, {r.health['distinct_2']:.3f}" for r in results]
        else:
            cells = ["-" if r.health[key] is None else form.format(r.health[key]) for r in results]
        if set(cells) != {"-"}:
            rows.append([label, *cells])
    return rows


def _aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


# ---- the command ----


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `showtell score`."""
    parser.add_argument("references", help="true captions: COCO annotation json, {id: [captions]} json, csv or tsv")
    parser.add_argument(
        "candidates", nargs="+", help="captions to score, a file for each system: the same or COCO results json"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one json document, values from 0 to 1, CIDEr 0 to 10"
    )
    parser.add_argument("--allow-missing", action="store_true", help="score the images that are on both sides")
    parser.add_argument(
        "--tokenizer", choices=sorted(TOKENIZERS), default="ptb", help="default ptb, that of publications"
    )
    parser.add_argument(
        "--document-frequencies", metavar="FILE", help="CIDEr-D's table, instead of the references' own"
    )
    parser.add_argument(
        "--training-captions", metavar="FILE", help="to count the captions that are not in the training set"
    )
    parser.add_argument("--no-java", dest="java", action="store_false", help="leave METEOR out even where it could run")
    parser.add_argument("--spice", action="store_true", help="compute SPICE (Java, 8 GB, fetches 0.4 GB on first use)")
    parser.add_argument("--no-intervals", dest="intervals", action="store_false", help="leave the intervals out")
    parser.add_argument("--seed", type=int, default=0, help="of the intervals and p-values (default 0)")


def run(args: argparse.Namespace) -> list[Result]:
    """Runs `showtell score` and prints what it asks for; mistakes of the user come out as `UserError`."""
    frequencies = training = None
    if args.document_frequencies:
        frequencies = metrics.DocumentFrequencies.load(args.document_frequencies)
    if args.training_captions:
        training = [caption for group in read_captions(args.training_captions).values() for caption in group]
    results = score_files(
        args.references,
        args.candidates,
        tokenizer=args.tokenizer,
        frequencies=frequencies,
        allow_missing=args.allow_missing,
        java=args.java,
        spice=args.spice,
        intervals=args.intervals,
        training_captions=training,
        seed=args.seed,
    )
    if args.json:
        print(json.dumps({result.name: result.to_json() for result in results}, indent=1, ensure_ascii=False))
    else:
        print(format_table(results))
    return results
