"""Caption metrics: BLEU-1..4, ROUGE-L and CIDEr-D as coco-caption computes them, without Java; intervals and tests.

    scores = score({"139": ["a dog runs", "a brown dog"]}, {"139": "a dog runs fast"})
    scores["CIDEr"], scores.per_image["ROUGE_L"], bootstrap(scores)["Bleu_4"]

Values are from 0 to 1 (CIDEr 0 to 10), as in the reference implementation; printed tables are multiplied by 100.
`score` and `health` take captions as text; `bleu`, `rouge_l` and `cider_d` take them as tokens.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from showtell.errors import UserError
from showtell.java_metrics import meteor_from_statistics
from showtell.ngrams import NgramCounts, Tokens, longest_common_subsequence
from showtell.tokenizer import TOKENIZERS


@dataclass
class Corpus:
    """Tokenised captions, as a metric gets them: a list of references and one candidate for each image.

    `frequencies` are CIDEr-D's document frequencies, if not those of the references; `counts` are the n-grams.
    """

    references: Sequence[Sequence[Tokens]]
    candidates: Sequence[Tokens]
    frequencies: DocumentFrequencies | None = None

    @functools.cached_property
    def counts(self) -> NgramCounts:
        return NgramCounts(self.references, self.candidates)


@dataclass(frozen=True)
class Metric:
    """One entry of `METRICS`; a higher value is a better one."""

    label: str | Mapping[str, str]  # in tables; or value name -> label, for a metric of several values
    # From a `Corpus`, the numbers of each image, (N,) or (N, K). None if they come from outside and reach the scores
    # through `Scores.add`, as those of METEOR and SPICE do.
    rows: Callable[[Corpus], np.ndarray] | None = None
    # From the sums of any number of rows, (..., K), and the number of images, the metric's values for them: (...), or
    # (..., number of labels). Bootstrap and paired tests use it too.
    values: Callable[[np.ndarray, int], np.ndarray] = lambda sums, n_images: sums[..., 0] / n_images  # the mean

    def labels(self, key: str) -> Mapping[str, str]:
        return {key: self.label} if isinstance(self.label, str) else self.label


def _bleu_rows(corpus: Corpus) -> np.ndarray:
    """(N, 10): matches of order 1..4, n-grams of order 1..4, candidate length, closest reference length."""
    counts, n_images = corpus.counts, corpus.counts.n_images
    rows = np.zeros((n_images, 10))
    lengths, reference_lengths = counts.lengths[:n_images], counts.lengths[n_images:]
    for k, order in enumerate(counts.orders):
        allowed = np.zeros_like(order.candidate_count)
        np.maximum.at(allowed, order.match, order.reference_count[order.shared])
        matches = np.minimum(allowed, order.candidate_count)
        rows[:, k] = np.bincount(order.candidate, matches, minlength=n_images)
        rows[:, 4 + k] = np.maximum(lengths - k, 0)
    rows[:, 8] = lengths
    images = counts.image[n_images:]
    nearest = np.lexsort((reference_lengths, abs(reference_lengths - lengths[images]), images))  # the shorter of two
    rows[:, 9] = reference_lengths[nearest][np.cumsum(counts.n_references) - counts.n_references]
    return rows


def _bleu_values(rows: np.ndarray, n_images: int = 1) -> np.ndarray:
    """(..., 10) summed rows -> (..., 4) BLEU-1..4, with the reference's small constants (1e-15 and 1e-9)."""
    precisions = (rows[..., :4] + 1e-15) / (rows[..., 4:8] + 1e-9)
    bleu = np.cumprod(precisions, axis=-1) ** (1 / np.arange(1, 5))
    ratio = (rows[..., 8:9] + 1e-15) / (rows[..., 9:10] + 1e-9)
    return bleu * np.exp(np.minimum(1 - 1 / ratio, 0))


def bleu(references: Sequence[Sequence[Tokens]], candidates: Sequence[Tokens]) -> tuple[np.ndarray, np.ndarray]:
    """Compute BLEU-1..4 of the corpus `(4,)` and of each image `(N, 4)`.

    Papineni et al. 2002 as coco-caption computes it: counts clipped over the references, the closest reference length,
    no smoothing. The mean of the per-image scores is not the corpus score.
    """
    rows = _bleu_rows(Corpus(references, candidates))
    return _bleu_values(rows.sum(axis=0)), _bleu_values(rows)


def _rouge_rows(corpus: Corpus) -> np.ndarray:
    per_image = np.zeros(len(corpus.candidates))
    for i, (candidate, group) in enumerate(zip(corpus.candidates, corpus.references, strict=True)):
        candidate = candidate or [""]  # an empty caption counts as one empty word, as in the reference
        group = [reference or [""] for reference in group]
        common = longest_common_subsequence(candidate, group)
        precision = max(common) / len(candidate)
        recall = max(n / len(reference) for n, reference in zip(common, group, strict=True))
        if precision and recall:
            per_image[i] = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    return per_image


def rouge_l(references: Sequence[Sequence[Tokens]], candidates: Sequence[Tokens]) -> tuple[float, np.ndarray]:
    """Compute ROUGE-L of the corpus, the mean, and of each image `(N,)`.

    Lin 2004 as coco-caption computes it: beta 1.2, the best precision and the best recall over the references, which
    may come from different references.
    """
    per_image = _rouge_rows(Corpus(references, candidates))
    return float(per_image.mean()), per_image


@dataclass(frozen=True)
class DocumentFrequencies:
    """The number of images whose references contain each n-gram: CIDEr-D's weights, from a corpus larger than a batch.

    Self-critical training scores batches with the frequencies of the whole training set. An n-gram of a single image
    has the weight of an unknown one, so those are not kept.
    """

    IMAGES_AT_ONCE: ClassVar[int] = 5000
    counts: dict[str, int]
    n_images: int
    tokenizer: str = "ptb"

    @classmethod
    def build(cls, references: Iterable[Sequence[str]], tokenizer: str = "ptb") -> DocumentFrequencies:
        """Count the n-grams of `references`, a list of captions for each image."""
        tokenize = _tokenizer(tokenizer)
        # Tuples: the garbage collector ignores tuples of strings, and takes as long as the tokeniser for lists.
        return cls.count(([tuple(tokenize(caption)) for caption in group] for group in references), tokenizer)

    @classmethod
    def count(cls, references: Iterable[Sequence[Tokens]], tokenizer: str = "") -> DocumentFrequencies:
        """Count the n-grams of captions that are tokens already, of whatever kind.

        `IMAGES_AT_ONCE` at a time: what grows with the data is the table of different n-grams.
        """
        references, counts, n_images = iter(references), Counter(), 0
        while part := list(itertools.islice(references, cls.IMAGES_AT_ONCE)):
            corpus = NgramCounts(part, [[]] * len(part))
            for order in corpus.orders:
                counts.update(dict(zip(order.texts(corpus), order.documents.tolist(), strict=False)))
            n_images += len(part)
        return cls({text: n for text, n in counts.items() if n > 1}, n_images, tokenizer)


def _cider_rows(corpus: Corpus) -> np.ndarray:
    counts, frequencies = corpus.counts, corpus.frequencies
    n_images, image = counts.n_images, counts.image
    # The reference measures lengths in bigrams, which differs for empty captions only.
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
        norms = np.sqrt(squares + np.bincount(order.reference, reference**2, minlength=len(image)))
        norm = norms[:n_images][image[n_images:]] * norms[n_images:]
        shared = reference[order.shared]
        products = np.minimum(candidate[order.match], shared) * shared
        cosine = np.bincount(order.reference[order.shared] - n_images, products, minlength=len(similarity))
        similarity += np.divide(cosine, norm, out=cosine.astype(float), where=norm > 0)
    sums = np.bincount(image[n_images:], similarity * penalty, minlength=n_images)
    return sums / 4 / counts.n_references * 10


def cider_d(
    references: Sequence[Sequence[Tokens]], candidates: Sequence[Tokens], frequencies: DocumentFrequencies | None = None
) -> tuple[float, np.ndarray]:
    """Compute CIDEr-D of the corpus, the mean, from 0 to 10, and of each image `(N,)`.

    Vedantam et al. 2015 as coco-caption computes it under the name CIDEr: clipped counts, a Gaussian penalty on the
    difference of lengths (sigma 6), times 10. Document frequencies are those of the references, or `frequencies`,
    whose `tokenizer` must also have made the tokens. For one image and no table every weight is log(1/1) = 0, and so
    is the score.
    """
    per_image = _cider_rows(Corpus(references, candidates, frequencies))
    return float(per_image.mean()), per_image


METRICS: dict[str, Metric] = {
    "Bleu": Metric({f"Bleu_{n}": f"BLEU-{n}" for n in range(1, 5)}, _bleu_rows, _bleu_values),
    "METEOR": Metric("METEOR", values=lambda sums, n_images: meteor_from_statistics(sums)),
    "ROUGE_L": Metric("ROUGE-L", _rouge_rows),
    "CIDEr": Metric("CIDEr-D", _cider_rows),
    "SPICE": Metric("SPICE"),
}


def labels() -> dict[str, str]:
    """Return the name of every value of the registered metrics, with its label in tables: `{"Bleu_1": "BLEU-1", …}`."""
    return {name: label for key, metric in METRICS.items() for name, label in metric.labels(key).items()}


def names() -> list[str]:
    """Return the names of the values that `score` computes: all but those of Java's METEOR and SPICE."""
    return [name for key, metric in METRICS.items() if metric.rows for name in metric.labels(key)]


@dataclass
class Scores:
    """The scores of one system: of the corpus, of each image, and the rows from which both are computed.

    `corpus[name]` is None if a value was not computed; `notes` are sentences on what to know about the scores.
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
        """Add a registered metric from its numbers for each image, `(N,)` or `(N, K)`."""
        self.rows[metric] = rows = np.asarray(rows, dtype=float).reshape(self.n_images, -1)
        self.per_image |= _values(metric, rows, 1)
        self.corpus |= {name: float(v) for name, v in _values(metric, rows.sum(axis=0), self.n_images).items()}


def _values(metric: str, sums: np.ndarray, n_images: int) -> dict[str, np.ndarray]:
    """The values of one set of images, or of many sets at once, from the sums of their rows."""
    values, labels = METRICS[metric].values(sums, n_images), METRICS[metric].labels(metric)
    return dict(zip(labels, np.moveaxis(np.reshape(values, (*sums.shape[:-1], len(labels))), -1, 0), strict=True))


def score(
    references: Mapping[str, Sequence[str]],
    candidates: Mapping[str, str],
    *,
    tokenizer: str = "ptb",
    frequencies: DocumentFrequencies | None = None,
) -> Scores:
    """Score one caption for each image against the image's references, with every metric that needs no Java.

    Only the tokeniser "ptb" gives scores comparable with publications. `frequencies` are CIDEr-D's document
    frequencies, if not those of the references.

    Raises:
        UserError: there are no candidates, a candidate has no references, a caption is not text, or `frequencies`
            were counted with another tokeniser.
    """
    ids = list(candidates)
    if not ids:
        raise UserError("there are no candidates to score; give one caption for each image")
    if unknown := [image for image in ids if not references.get(image)]:
        advice = "remove them or add their true captions to the references"
        raise UserError(f"{len(unknown)} candidates have no references, the first {unknown[0]!r}; {advice}")
    for image in ids:
        group = references[image]
        if isinstance(group, str) or not all(isinstance(caption, str) for caption in (candidates[image], *group)):
            advice = "give a string as candidate and a list of strings as references"
            raise UserError(f"image {image!r} has captions that are not text; {advice}")
    tokenize = _tokenizer(tokenizer)
    if frequencies is not None and frequencies.tokenizer != tokenizer:
        advice = f"count them with DocumentFrequencies.build(references, {tokenizer!r})"
        given = f"the document frequencies were counted with the tokeniser {frequencies.tokenizer!r}"
        raise UserError(f"{given}, not {tokenizer!r}; {advice}")
    groups = [[tokenize(caption) for caption in references[image]] for image in ids]
    corpus = Corpus(groups, [tokenize(candidates[image]) for image in ids], frequencies)
    scores = Scores(ids, dict.fromkeys(labels()), {}, tokenizer, sum(map(len, groups)))
    for name, metric in METRICS.items():
        if metric.rows:
            scores.add(name, metric.rows(corpus))
    if len(ids) == 1 and frequencies is None:
        scores.notes.append("CIDEr is 0 by definition for a single image: every n-gram has the weight log(1/1) = 0.")
    if tokenizer != "ptb":
        scores.notes.append(f"Tokenised with {tokenizer!r}: not comparable with published scores, which use ptb.")
    return scores


def _tokenizer(name: str) -> Callable[[str], list[str]]:
    if name not in TOKENIZERS:
        raise UserError(f"no tokeniser is called {name!r}; choose one of {', '.join(TOKENIZERS)}")
    return TOKENIZERS[name]


def perplexity(total_nll: float, n_tokens: int = 1) -> float:
    """Compute the perplexity per word from the sum of the negative log-likelihoods (in nats) of `n_tokens` words.

    With one argument, from their mean. Weighting by words, not by batches or captions, makes the perplexity of a split
    independent of the batches. Without words it raises a `UserError`.
    """
    if n_tokens < 1:
        raise UserError(f"perplexity needs at least one word, not {n_tokens}; check that the split has captions")
    return math.exp(min(total_nll / n_tokens, 700.0))  # a larger exponent overflows


def bootstrap(
    scores: Scores, n_resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Compute the interval of every corpus score over resamples of the images with replacement (percentile bootstrap).

    CIDEr's document frequencies remain those of the full set. Reproducible with `seed`, which is at least 0.
    """
    resampled = _resampled_scores(scores.rows, _resamples(scores.n_images, n_resamples, seed))
    return {name: _interval(resampled[name], confidence) for name in labels() if name in resampled}


@dataclass(frozen=True)
class Difference:
    """The second system's score minus the first's, its interval, and the p-value of the null hypothesis of equality."""

    difference: float
    low: float
    high: float
    p_value: float


def paired(
    first: Scores, second: Scores, n_resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Difference]:
    """Compare two systems metric by metric; if they did not caption the same images, raise a `UserError`.

    The interval is a bootstrap over images, which resamples both systems together; the two-sided p-value is that of an
    approximate randomisation test, which swaps the two captions of an image at random (Riezler and Maxwell 2005).
    """
    if set(first.ids) != set(second.ids):
        n_shared = len(set(first.ids) & set(second.ids))
        given = f"the two systems share {n_shared} images and caption {len(first.ids)} and {len(second.ids)}"
        raise UserError(f"{given}; score both on the same images to compare them")
    where = {image: i for i, image in enumerate(second.ids)}
    order = [where[image] for image in first.ids]
    a = {metric: rows for metric, rows in first.rows.items() if metric in second.rows}
    b = {metric: second.rows[metric][order] for metric in a}

    weights = _resamples(len(order), n_resamples, seed)
    resampled_a, resampled_b = _resampled_scores(a, weights), _resampled_scores(b, weights)
    swapped = np.random.default_rng(seed + 1).integers(2, size=weights.shape, dtype=weights.dtype)
    mixed_a, mixed_b = _resampled_scores(a, 1 - swapped, b), _resampled_scores(b, 1 - swapped, a)
    differences = {}
    for name in (name for name in labels() if name in resampled_a):
        difference = second.corpus[name] - first.corpus[name]
        by_chance = abs(mixed_b[name] - mixed_a[name]) >= abs(difference) - 1e-12
        p_value = (1 + int(by_chance.sum())) / (1 + n_resamples)
        low, high = _interval(resampled_b[name] - resampled_a[name], confidence)
        differences[name] = Difference(difference, low, high, p_value)
    return differences


def _resamples(n_images: int, n_resamples: int, seed: int) -> np.ndarray:
    """(resamples, images): the number of times each image was drawn."""
    rng = np.random.default_rng(seed)
    weights = np.empty((n_resamples, n_images), dtype=np.int8)  # no image is drawn 128 times
    for row in weights:
        row[:] = np.bincount(rng.integers(n_images, size=n_images), minlength=n_images)
    return weights


def _resampled_scores(
    rows: Mapping[str, np.ndarray], weights: np.ndarray, others: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """The corpus scores of every resample; an image of weight 0 contributes its row in `others`, if given."""
    scores: dict[str, np.ndarray] = {}
    blocks = np.array_split(weights, max(1, weights.size // 2_000_000))  # a block at a time becomes float
    for metric, values in rows.items():
        base = others[metric] if others else np.zeros_like(values)
        sums = np.concatenate([block.astype(float) @ (values - base) for block in blocks]) + base.sum(axis=0)
        scores |= _values(metric, sums, len(values))
    return scores


def _interval(values: np.ndarray, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


_BAD_ENDINGS = frozenset(
    "a an and are as at before behind beside between by for from her his in into is its near next of on onto or over "
    "that the their there this to under very was were while with".split()
)


HEALTH = {  # the measures of `health` as every table names them; docs/evaluation.md defines them
    "distinct": "distinct captions", "distinct_1": "distinct-1", "distinct_2": "distinct-2",
    "words_used": "distinct words", "vocabulary_used": "vocabulary used", "novel": "novel captions",
    "mean_length": "mean length", "repeats": "repetitions", "bad_endings": "incomplete captions",
    "unk": "unknown words",
}  # fmt: skip


def health(
    captions: Sequence[str],
    training_captions: Iterable[str] | None = None,
    vocabulary_size: int | None = None,
    tokenizer: str = "ptb",
) -> dict[str, float | int | None]:
    """Measure what scores do not show about a system's captions: diversity, copying, repetition, broken endings.

    Returns:
        `captions`; `distinct`, the number of distinct captions per caption; `distinct_1`, `distinct_2`, distinct words
        and word pairs per word and per pair; `words_used`, the number of distinct words; `vocabulary_used`, their share
        of the `vocabulary_size` words; `novel`, the share of captions that are not among the `training_captions`;
        `mean_length` in words; `repeats`, the share with a word twice in a row or the same three words twice;
        `bad_endings`, the share ending in "a", "with the" and the like; `unk`, the share of words that are `<unk>`.
        Shares are from 0 to 1, None if unknown.
    """
    if not captions:
        raise UserError("there are no captions to examine; give at least one")
    tokenize = _tokenizer(tokenizer)
    unks = sum(caption.count("<unk>") for caption in captions)
    tokens = [tuple(tokenize(caption.replace("<unk>", " unk "))) for caption in captions]
    words = [word for caption in tokens for word in caption]
    pairs = [pair for caption in tokens for pair in itertools.pairwise(caption)]
    seen = None if training_captions is None else {tuple(tokenize(caption)) for caption in training_captions}
    return {
        "captions": len(captions),
        "distinct": len(set(tokens)) / len(tokens),
        "distinct_1": len(set(words)) / max(len(words), 1),
        "distinct_2": len(set(pairs)) / max(len(pairs), 1),
        "words_used": len(set(words)),
        "vocabulary_used": len(set(words)) / vocabulary_size if vocabulary_size else None,
        "novel": None if seen is None else sum(caption not in seen for caption in tokens) / len(tokens),
        "mean_length": len(words) / len(tokens),
        "repeats": sum(map(_repeats, tokens)) / len(tokens),
        "bad_endings": sum(caption[-1] in _BAD_ENDINGS for caption in tokens if caption) / len(tokens),
        "unk": unks / max(len(words), 1),
    }


def _repeats(tokens: tuple[str, ...]) -> bool:
    triples = [tokens[i : i + 3] for i in range(len(tokens) - 2)]
    return len(set(triples)) < len(triples) or any(word == following for word, following in itertools.pairwise(tokens))
