"""Score captions against references: from files or memory, one system or several, without a model or torch.

    results = score_files("captions_val2017.json", ["mine.json", "baseline.csv"])
    print(format_table(results))

Checks that the images match, adds confidence intervals, and compares the later systems with the first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from showtell import java_metrics, metrics
from showtell.annotations import read_candidates, read_captions
from showtell.errors import UserError
from showtell.tokenizer import ptb


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _matched(
    references: Mapping[str, Sequence[str]], candidates: Mapping[str, str], name: str, allow_missing: bool
) -> tuple[dict[str, str], list[str]]:
    """Return the candidates that can be scored, and notes on what is left out."""
    described = sorted(image for image, group in references.items() if group)
    kept = {image: caption for image, caption in candidates.items() if references.get(image)}
    unknown = [image for image in candidates if image not in kept]
    absent = [image for image in described if image not in kept]
    if not kept:
        given = f"it names {_some(unknown)}, the references {_some(described)}"
        raise UserError(f"no image of {name} has references: {given}; write the same image ids in both")
    parts = [f"{len(unknown)} of {len(candidates)} images have no references ({_some(unknown)})"] if unknown else []
    if absent:
        parts.append(f"{len(absent)} of {len(described)} images have no candidate ({_some(absent)})")
    if parts and not allow_missing:
        raise UserError(f"{name}: {' and '.join(parts)}; complete the files or score the rest with --allow-missing")
    notes = [f"Left out: {part}." for part in parts]
    if empty := [image for image, caption in kept.items() if not caption.strip()]:
        notes.append(f"{len(empty)} candidates are empty and score 0: {_some(empty)}.")
    return kept, notes


def _some(images: Sequence[str], n: int = 3) -> str:
    return ", ".join(map(repr, images[:n])) + (", …" if len(images) > n else "")


@dataclass
class Result:
    """The scores of one system."""

    name: str  # of its file
    scores: metrics.Scores
    health: dict[str, float | int | None]
    captions: dict[str, str]  # by image
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)  # metric -> 95 % over images, if requested
    against: str | None = None  # the name of the first system, with which the later ones are compared
    differences: dict[str, metrics.Difference] = field(default_factory=dict)  # metric -> from the first system
    missing: dict[str, str] = field(default_factory=dict)  # metric -> why it was not computed, and what to do about it

    def to_json(self) -> dict[str, object]:
        """Return the scores by name, then `n_images`, `n_references`, `tokenizer`, `intervals`, `health` …"""
        document: dict[str, object] = self.scores.corpus | {
            "n_images": self.scores.n_images,
            "n_references": self.scores.n_references,
            "tokenizer": self.scores.tokenizer,
            "intervals": {metric: list(interval) for metric, interval in self.intervals.items()},
            "health": self.health,
            "missing": self.missing,
            "notes": self.scores.notes,
        }
        if self.against is not None:
            differences = {metric: vars(difference) for metric, difference in self.differences.items()}
            document["paired"] = {"against": self.against, **differences}
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
    """Score one or several systems against the same references, and compare the later ones with the first.

    Args:
        references: the true captions of each image.
        systems: name -> one caption for each image.
        tokenizer, frequencies: see `metrics.score`.
        allow_missing: score the images that are on both sides, instead of raising an error for the others.
        java: compute METEOR where pycocoevalcap and Java are installed.
        spice: also compute SPICE, which may download a large file; `announce` is called with a message first.
        intervals: compute confidence intervals.
        training_captions: for the share of novel captions, see `metrics.health`.
        n_resamples, seed: of the resamples that give intervals and p-values.

    Images that differ on the two sides raise a `UserError`, as do the mistakes that `metrics.score` lists.
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
    results: Sequence[Result], references: Mapping[str, Sequence[str]], java: bool, spice: bool, announce: Callable
) -> None:
    """Add METEOR and SPICE, or the reason why they are missing; the jar starts once for all systems."""
    true = [list(references[image]) for result in results for image in result.scores.ids]
    written = [result.captions[image] for result in results for image in result.scores.ids]

    def meteor() -> np.ndarray:  # expects the tokens of ptb, as in coco-caption
        return java_metrics.meteor_statistics([[ptb(c) for c in group] for group in true], [ptb(c) for c in written])

    ends = np.cumsum([result.scores.n_images for result in results])[:-1]
    for metric, wanted, compute, reason in (
        ("METEOR", java, meteor, "left out with --no-java"),
        ("SPICE", spice, lambda: java_metrics.spice_values(true, written, announce), "ask for it with --spice"),
    ):
        try:
            rows = np.split(compute(), ends) if wanted else []
        except java_metrics.JavaMetricError as error:
            rows, reason = [], str(error)
        for i, result in enumerate(results):
            if rows:
                result.scores.add(metric, rows[i])
            else:
                result.missing[metric] = reason


def score_files(references: str | Path, candidates: Sequence[str | Path], **options) -> list[Result]:
    """Score caption files against a file of references; `options` are those of `score_captions`.

    Systems are named after their files, or by the whole path where two files have the same name. The files have any
    form that `showtell.annotations` reads.
    """
    names = [Path(path).name for path in candidates]
    if len(set(names)) < len(names):
        names = [str(path) for path in candidates]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{twice[0]} is given more than once; name each file of candidates once")
    systems = {name: read_candidates(path) for name, path in zip(names, candidates, strict=True)}
    return score_captions(read_captions(references), systems, **options)


def format_table(results: Sequence[Result]) -> str:
    """Return the scores × 100 as text: what was scored, the table, differences, health and notes."""
    first, labels = results[0], metrics.labels()
    sizes = {(result.scores.n_images, result.scores.n_references) for result in results}
    what = ", ".join(f"{images:,} images with {references:,} references" for images, references in sorted(sizes))
    interval = ", 95 % intervals over images" if first.intervals else ""
    lines = [f"{what}; tokeniser {first.scores.tokenizer}; scores × 100{interval}", ""]
    rows = [["", *(result.name for result in results), ""]]
    for metric, label in labels.items():
        rows.append([label, *(_cell(result, metric) for result in results), first.missing.get(metric, "")])
    lines += _aligned(rows)
    for result in results[1:]:
        lines += ["", f"{result.name} minus {result.against}"]
        rows = []
        for metric, d in result.differences.items():
            interval = f"[{100 * d.low:+.1f}, {100 * d.high:+.1f}]"
            rows.append([labels[metric], f"{100 * d.difference:+.1f} {interval}", p_value(d)])
        lines += _aligned(rows)
    lines += ["", *_aligned(health_rows(results)), ""]
    notes = {note: [r.name for r in results if note in r.scores.notes] for r in results for note in r.scores.notes}
    lines += [note if len(names) == len(results) else f"{', '.join(names)}: {note}" for note, names in notes.items()]
    return "\n".join(lines).rstrip()


def _cell(result: Result, metric: str) -> str:
    value = result.scores.corpus[metric]
    if value is None:
        return "-"
    low, high = result.intervals.get(metric, (None, None))
    return f"{100 * value:.1f}" + (f" [{100 * low:.1f}, {100 * high:.1f}]" if low is not None else "")


def p_value(difference: metrics.Difference) -> str:
    """Return `p = 0.012`, or `p < 0.002`, which is as small as 1,000 trials can tell."""
    return f"p = {difference.p_value:.3f}" if difference.p_value >= 0.0015 else "p < 0.002"


def health_rows(results: Sequence[Result]) -> list[list[str]]:
    """Return the rows of `metrics.health` that are known, for people: the measure, and its value for each system."""
    forms = {"words_used": "{:,}", "mean_length": "{:.1f} words", "distinct_1": "{:.3f}", "distinct_2": "{:.3f}"}
    rows = []
    for key, label in metrics.HEALTH.items():
        values = [result.health[key] for result in results]
        cells = ["-" if value is None else forms.get(key, "{:.1%}").format(value) for value in values]
        if set(cells) != {"-"}:
            rows.append([label, *cells])
    return rows


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
