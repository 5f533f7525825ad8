"""Caption scores equal to coco-caption's without Java: BLEU-1..4, ROUGE-L, CIDEr-D, with intervals and comparisons.

    scores = score({"139": ["a dog runs", "a brown dog"]}, {"139": "a dog runs fast"})
    scores["CIDEr"], scores.per_image["ROUGE_L"], bootstrap(scores)["Bleu_4"]

Values run from 0 to 1 (CIDEr 0 to 10) as the reference implementation gives them; tables for people multiply by 100.
Sequences of captions go in raw (`score`, `health`) or as tokens (`bleu`, `rouge_l`, `cider_d`).
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from showtell.errors import MissingFileError, UserError
from showtell.files import atomic_path
from showtell.ngrams import NgramCounts, Tokens, longest_common_subsequence
from showtell.tokenizer import TOKENIZERS

LABELS = {
    "Bleu_1": "BLEU-1", "Bleu_2": "BLEU-2", "Bleu_3": "BLEU-3", "Bleu_4": "BLEU-4",
    "METEOR": "METEOR", "ROUGE_L": "ROUGE-L", "CIDEr": "CIDEr-D", "SPICE": "SPICE",
}  # fmt: skip
METRICS = tuple(LABELS)

# ---- the metrics; each first makes one row of numbers per image, whose sums over images give the corpus score ----


def _bleu_rows(counts: NgramCounts) -> np.ndarray:
    """(N, 10): matches of order 1..4, n-grams of order 1..4, candidate length, closest reference length."""
    rows = np.zeros((counts.n_images, 10))
    lengths = counts.lengths[: counts.n_images]
    for k, order in enumerate(counts.orders):
        allowed = np.zeros_like(order.candidate_count)
        np.maximum.at(allowed, order.match, order.reference_count[order.shared])
        matches = np.minimum(allowed, order.candidate_count)
        rows[:, k] = np.bincount(order.candidate, matches, minlength=counts.n_images)
        rows[:, 4 + k] = np.maximum(lengths - k, 0)
    rows[:, 8] = lengths
    reference_lengths = counts.lengths[counts.n_images :]
    images = counts.image[counts.n_images :]
    nearest = np.lexsort((reference_lengths, abs(reference_lengths - lengths[images]), images))  # the shorter of two
    rows[:, 9] = reference_lengths[nearest][np.cumsum(counts.n_references) - counts.n_references]
    return rows


def _bleu_from_rows(rows: np.ndarray) -> np.ndarray:
    """(..., 10) summed rows -> (..., 4) BLEU-1..4, with the small numbers the reference adds (1e-15 and 1e-9)."""
    precisions = (rows[..., :4] + 1e-15) / (rows[..., 4:8] + 1e-9)
    bleu = np.cumprod(precisions, axis=-1) ** (1 / np.arange(1, 5))
    ratio = (rows[..., 8:9] + 1e-15) / (rows[..., 9:10] + 1e-9)
    return bleu * np.exp(np.minimum(1 - 1 / ratio, 0))


def bleu(references: Sequence[Sequence[Tokens]], candidates: Sequence[Tokens]) -> tuple[np.ndarray, np.ndarray]:
    """BLEU-1..4 of the corpus `(4,)` and of each image `(N, 4)`.

    Papineni et al. 2002 as coco-caption computes it: clipped counts over the references, the closest reference length,
    no smoothing. The mean of the per-image scores is not the corpus score.
    """
    rows = _bleu_rows(NgramCounts(references, candidates))
    return _bleu_from_rows(rows.sum(axis=0)), _bleu_from_rows(rows)


def rouge_l(references: Sequence[Sequence[Tokens]], candidates: Sequence[Tokens]) -> tuple[float, np.ndarray]:
    """ROUGE-L of the corpus, the mean, and of each image `(N,)`.

    Lin 2004 as coco-caption computes it: beta 1.2, the best precision and the best recall over the references, which
    need not come from the same one.
    """
    per_image = np.zeros(len(candidates))
    for i, (candidate, group) in enumerate(zip(candidates, references, strict=True)):
        candidate = candidate or [""]  # nothing counts as one empty word, as in the reference
        group = [reference or [""] for reference in group]
        common = longest_common_subsequence(candidate, group)
        precision = max(common) / len(candidate)
        recall = max(n / len(reference) for n, reference in zip(common, group, strict=True))
        if precision and recall:
            per_image[i] = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    return float(per_image.mean()), per_image


@dataclass(frozen=True)
class DocumentFrequencies:
    """In the references of how many images each n-gram occurs: CIDEr-D's weights, from a corpus larger than a batch.

    Self-critical training scores batches against the frequencies of the whole training set. An n-gram of one image
    only weighs the same as an unknown one, so those are not kept.
    """

    counts: dict[str, int]
    n_images: int
    tokenizer: str = "ptb"

    @classmethod
    def build(cls, references: Iterable[Sequence[str]], tokenizer: str = "ptb") -> DocumentFrequencies:
        """Counts the n-grams of `references`, a list of captions for each image."""
        cut = _tokenizer(tokenizer)
        groups = [[cut(caption) for caption in group] for group in references]
        corpus = NgramCounts(groups, [[]] * len(groups))
        counts = {
            text: int(documents)
            for order in corpus.orders
            for text, documents in zip(order.texts(corpus), order.documents, strict=False)
            if documents > 1
        }
        return cls(counts, len(groups), tokenizer)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the table as gzipped JSON."""
        with atomic_path(path) as temporary, gzip.open(temporary, "wt", encoding="utf-8") as file:
            json.dump({"n_images": self.n_images, "tokenizer": self.tokenizer, "counts": self.counts}, file)

    @classmethod
    def load(cls, path: str | os.PathLike) -> DocumentFrequencies:
        """Reads what `save` wrote.

        Raises:
            MissingFileError: there is no such file.
            UserError: the file is not a table of document frequencies.
        """
        if not Path(path).is_file():
            raise MissingFileError(f"there is no document frequency table {path}; write one with save()")
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                table = json.load(file)
            return cls(table["counts"], table["n_images"], table["tokenizer"])
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is not a table written by DocumentFrequencies.save ({error}); build it again"
            ) from error


def _cider_per_image(counts: NgramCounts, frequencies: DocumentFrequencies | None = None) -> np.ndarray:
    n_images, image = counts.n_images, counts.image
    # The reference measures lengths in bigrams, which matters for empty captions alone.
    bigrams = np.maximum(counts.lengths - 1, 0)
    penalty = np.exp(-((bigrams[image] - bigrams) ** 2) / (2 * 6.0**2))[n_images:]
    similarity = np.zeros(len(image) - n_images)
    for order in counts.orders:
        documents: np.ndarray = order.documents
        if frequencies is not None:
            documents = np.array([frequencies.counts.get(text, 0) for text in order.texts(counts)] or [0])
        idf = math.log(frequencies.n_images if frequencies else n_images) - np.log(np.maximum(documents, 1))
        candidate = order.candidate_count * idf[order.candidate_code]
        reference = order.reference_count * idf[order.reference_code]
        squares = np.bincount(order.candidate, candidate**2, minlength=len(image))
        squares = squares + np.bincount(order.reference, reference**2, minlength=len(image))
        norm = np.sqrt(squares[:n_images])[image[n_images:]] * np.sqrt(squares[n_images:])
        shared = reference[order.shared]
        products = np.minimum(candidate[order.match], shared) * shared
        cosine = np.bincount(order.reference[order.shared] - n_images, products, minlength=len(similarity))
        similarity += np.divide(cosine, norm, out=cosine.astype(float), where=norm > 0)
    sums = np.bincount(image[n_images:], similarity * penalty, minlength=n_images)
    return sums / 4 / counts.n_references * 10


def cider_d(
    references: Sequence[Sequence[Tokens]],
    candidates: Sequence[Tokens],
    frequencies: DocumentFrequencies | None = None,
) -> tuple[float, np.ndarray]:
    """CIDEr-D of the corpus, the mean, from 0 to 10, and of each image `(N,)`.

    Vedantam et al. 2015 as coco-caption computes it under the name CIDEr: clipped counts, a Gaussian penalty on the
    difference of lengths (sigma 6), times 10. Document frequencies come from the references given, unless
    `frequencies` brings those of a larger corpus. With one image and no table every weight is log(1/1) = 0 and so is
    the score.
    """
    per_image = _cider_per_image(NgramCounts(references, candidates), frequencies)
    return float(per_image.mean()), per_image


# ---- all of them together ----


@dataclass
class Scores:
    """The scores of one system: of the corpus, of each image, and the rows from which both are computed.

    `corpus[name]` is None where a metric could not be computed; `notes` says why, in sentences.
    """

    ids: list[str]
    corpus: dict[str, float | None]
    per_image: dict[str, np.ndarray]
    tokenizer: str
    n_references: int
    notes: list[str] = field(default_factory=list)
    rows: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def __getitem__(self, metric: str) -> float | None:
        return self.corpus[metric]

    @property
    def n_images(self) -> int:
        return len(self.ids)

    def add(self, metric: str, rows: np.ndarray) -> None:
        """Adds METEOR's statistics `(N, 23)` or another metric's values `(N,)`, as `java_metrics` gives them."""
        self.rows[metric] = np.asarray(rows, dtype=float).reshape(len(self.ids), -1)
        self.corpus[metric] = float(_from_rows(metric, self.rows[metric].sum(axis=0), len(self.ids))[metric])
        self.per_image[metric] = _from_rows(metric, self.rows[metric], 1)[metric]


def _from_rows(metric: str, sums: np.ndarray, n_images: int) -> dict[str, np.ndarray]:
    """The scores of one set of images, or of many sets at once, from the sums of their rows."""
    if metric == "Bleu":
        return {f"Bleu_{k + 1}": _bleu_from_rows(sums)[..., k] for k in range(4)}
    if metric == "METEOR":
        from showtell.java_metrics import meteor_from_statistics

        return {metric: meteor_from_statistics(sums)}
    return {metric: sums[..., 0] / n_images}


def score(
    references: Mapping[str, Sequence[str]],
    candidates: Mapping[str, str],
    *,
    tokenizer: str = "ptb",
    frequencies: DocumentFrequencies | None = None,
) -> Scores:
    """Scores one caption for each image against the image's references.

    Args:
        references: the true captions of each image; images without a candidate are left out.
        candidates: one caption for each image, raw text.
        tokenizer: a name of `TOKENIZERS`; only "ptb" gives figures comparable with publications.
        frequencies: CIDEr-D's document frequencies, if not those of the references.

    Raises:
        UserError: no candidates, a candidate without references, a caption that is not text.
    """
    ids = list(candidates)
    if not ids:
        raise UserError("there are no candidates to score; give one caption for each image")
    unknown = [image for image in ids if not references.get(image)]
    if unknown:
        raise UserError(
            f"{len(unknown)} candidates have no references, the first {unknown[0]!r}; "
            "remove them or add their true captions to the references"
        )
    for image in ids:
        if isinstance(references[image], str) or not all(
            isinstance(caption, str) for caption in (candidates[image], *references[image])
        ):
            raise UserError(
                f"image {image!r} has captions that are not text; give a string as candidate and a list of strings as "
                "references"
            )
    cut = _tokenizer(tokenizer)
    words = [cut(candidates[image]) for image in ids]
    true_words = [[cut(caption) for caption in references[image]] for image in ids]
    counts = NgramCounts(true_words, words)
    rows = {
        "Bleu": _bleu_rows(counts),
        "ROUGE_L": rouge_l(true_words, words)[1][:, None],
        "CIDEr": _cider_per_image(counts, frequencies)[:, None],
    }
    corpus: dict[str, float | None] = dict.fromkeys(METRICS)
    per_image = {}
    for metric, values in rows.items():
        corpus |= {name: float(value) for name, value in _from_rows(metric, values.sum(axis=0), len(ids)).items()}
        per_image |= _from_rows(metric, values, 1)
    scores = Scores(ids, corpus, per_image, tokenizer, int(counts.n_references.sum()), rows=rows)
    if len(ids) == 1 and frequencies is None:
        scores.notes.append(
            "CIDEr is 0 by its definition for a single image: every n-gram is in the references of all images."
        )
    if tokenizer != "ptb":
        scores.notes.append(
            f"Tokens by {tokenizer!r}: these figures do not compare with published ones, made with ptb."
        )
    return scores


def _tokenizer(name: str) -> Callable[[str], list[str]]:
    if name not in TOKENIZERS:
        raise UserError(f"there is no tokeniser {name!r}; choose one of {', '.join(TOKENIZERS)}")
    return TOKENIZERS[name]


def perplexity(total_nll: float, n_tokens: int) -> float:
    """Perplexity per word from the summed negative log-likelihood (in nats) of `n_tokens` words of a whole split.

    Weighting by words, not by batches or captions, makes it independent of how the split was batched.

    Raises:
        UserError: there are no words.
    """
    if n_tokens < 1:
        raise UserError(f"perplexity needs at least one word, not {n_tokens}; check that the split has captions")
    return math.exp(min(total_nll / n_tokens, 700.0))  # beyond, a float overflows


# ---- confidence ----


def bootstrap(
    scores: Scores, n_resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """The interval of every corpus score when the images are drawn again with replacement (percentile bootstrap).

    CIDEr's document frequencies stay those of the full set. Reproducible with `seed`.
    """
    resampled = _resampled_scores(scores.rows, _resamples(scores.n_images, n_resamples, seed))
    return {name: _interval(resampled[name], confidence) for name in METRICS if name in resampled}


@dataclass(frozen=True)
class Difference:
    """How much the second system scores above the first, the interval, and the p-value of there being no difference."""

    difference: float
    low: float
    high: float
    p_value: float


def paired(
    first: Scores, second: Scores, n_resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Difference]:
    """Compares two systems on the same images, metric by metric.

    The interval is the bootstrap's over images, both systems drawn together; the p-value (two-sided) is that of an
    approximate randomisation test, which exchanges the two captions of an image at random (Riezler and Maxwell 2005).

    Raises:
        UserError: the two did not caption the same images.
    """
    if set(first.ids) != set(second.ids):
        raise UserError(
            f"the two systems share {len(set(first.ids) & set(second.ids))} images and caption {len(first.ids)} and "
            f"{len(second.ids)}; score both on the same images to compare them"
        )
    where = {image: i for i, image in enumerate(second.ids)}
    order = [where[image] for image in first.ids]
    metrics = [metric for metric in first.rows if metric in second.rows]
    a = {metric: first.rows[metric] for metric in metrics}
    b = {metric: second.rows[metric][order] for metric in metrics}

    weights = _resamples(len(order), n_resamples, seed)
    resampled_a, resampled_b = _resampled_scores(a, weights), _resampled_scores(b, weights)
    exchanged = np.random.default_rng(seed + 1).integers(2, size=weights.shape, dtype=weights.dtype)
    mixed_a, mixed_b = _resampled_scores(a, 1 - exchanged, b), _resampled_scores(b, 1 - exchanged, a)
    differences = {}
    for name in (name for name in METRICS if name in resampled_a):
        difference = second.corpus[name] - first.corpus[name]
        by_chance = abs(mixed_b[name] - mixed_a[name]) >= abs(difference) - 1e-12
        p_value = (1 + int(by_chance.sum())) / (1 + n_resamples)
        low, high = _interval(resampled_b[name] - resampled_a[name], confidence)
        differences[name] = Difference(difference, low, high, p_value)
    return differences


def _resamples(n_images: int, n_resamples: int, seed: int) -> np.ndarray:
    """(resamples, images): how often each image was drawn."""
    rng = np.random.default_rng(seed)
    weights = np.empty((n_resamples, n_images), dtype=np.int8)  # an image drawn 128 times does not happen
    for row in weights:
        row[:] = np.bincount(rng.integers(n_images, size=n_images), minlength=n_images)
    return weights


def _resampled_scores(
    rows: Mapping[str, np.ndarray], weights: np.ndarray, others: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """The corpus scores of every resample; an image that `weights` leaves out gives its row in `others`, if given."""
    scores: dict[str, np.ndarray] = {}
    blocks = np.array_split(weights, max(1, weights.size // 2_000_000))  # a block at a time becomes float
    for metric, values in rows.items():
        base = others[metric] if others else np.zeros_like(values)
        sums = np.concatenate([block.astype(float) @ (values - base) for block in blocks]) + base.sum(axis=0)
        scores |= _from_rows(metric, sums, len(values))
    return scores


def _interval(values: np.ndarray, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


# ---- health ----

_BAD_ENDINGS = frozenset(
    "a an and are as at before behind beside between by for from her his in into is its near next of on onto or over "
    "that the their there this to under very was were while with".split()
)


def health(
    captions: Sequence[str],
    training_captions: Iterable[str] | None = None,
    vocabulary_size: int | None = None,
    tokenizer: str = "ptb",
) -> dict[str, float | int | None]:
    """What scores do not show about a system's captions: sameness, copying, stutter, captions that break off.

    Args:
        captions: what the system wrote.
        training_captions: with them, the share of captions that are not among them.
        vocabulary_size: with it, the share of the vocabulary in use.

    Returns:
        `captions`; `distinct`, the share of different captions; `distinct_1`, `distinct_2`, different words and word
        pairs per word and per pair; `words_used`; `vocabulary_used`; `novel`; `mean_length` in words; `repeats`, the
        share with a word twice in a row or three words that come again; `bad_endings`, the share ending in "a",
        "with the" and the like; `unk`, the share of words that are `<unk>`. Shares are from 0 to 1, None if unknown.
    """
    if not captions:
        raise UserError("there are no captions to look at; give at least one")
    cut = _tokenizer(tokenizer)
    unks = sum(caption.count("<unk>") for caption in captions)
    tokens = [tuple(cut(caption.replace("<unk>", " unk "))) for caption in captions]
    words = [word for caption in tokens for word in caption]
    pairs = [pair for caption in tokens for pair in itertools.pairwise(caption)]
    novel = None
    if training_captions is not None:
        seen = {tuple(cut(caption)) for caption in training_captions}
        novel = sum(caption not in seen for caption in tokens) / len(tokens)
    return {
        "captions": len(captions),
        "distinct": len(set(tokens)) / len(tokens),
        "distinct_1": len(set(words)) / max(len(words), 1),
        "distinct_2": len(set(pairs)) / max(len(pairs), 1),
        "words_used": len(set(words)),
        "vocabulary_used": len(set(words)) / vocabulary_size if vocabulary_size else None,
        "novel": novel,
        "mean_length": len(words) / len(tokens),
        "repeats": sum(map(_repeats, tokens)) / len(tokens),
        "bad_endings": sum(caption[-1] in _BAD_ENDINGS for caption in tokens if caption) / len(tokens),
        "unk": unks / max(len(words), 1),
    }


def _repeats(tokens: tuple[str, ...]) -> bool:
    triples = [tokens[i : i + 3] for i in range(len(tokens) - 2)]
    return len(set(triples)) < len(triples) or any(word == following for word, following in itertools.pairwise(tokens))
