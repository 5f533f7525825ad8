"""N-gram counts and longest common subsequences of a whole corpus at once, for the caption metrics."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

Tokens = Sequence[str]


class NgramCounts:
    """The n-grams (n = 1..4) of N candidates and of their references, numbered, with their count in each caption.

    Captions are numbered as well: the N candidates first, then the references, image by image.
    """

    def __init__(self, references: Sequence[Sequence[Tokens]], candidates: Sequence[Tokens]) -> None:
        captions = [_without_inner_spaces(tokens) for tokens in itertools.chain(candidates, *references)]
        self.lengths = np.array([len(tokens) for tokens in captions], dtype=np.int64)
        self.n_images = len(candidates)
        self.n_references = np.array([len(group) for group in references], dtype=np.int64)
        images = np.arange(self.n_images)
        self.image = np.concatenate([images, np.repeat(images, self.n_references)])  # of each caption

        self.words = list(itertools.chain.from_iterable(captions))
        numbers: defaultdict[str, int] = defaultdict(itertools.count().__next__)
        ids = np.fromiter(map(numbers.__getitem__, self.words), np.int64, len(self.words))
        caption = np.repeat(np.arange(len(captions)), self.lengths)

        self.orders: list[_Order] = []
        start, codes = np.arange(len(ids)), ids
        for n in range(1, 5):
            if n > 1:  # extend by one word where the caption has one
                longer = np.flatnonzero(start + n - 1 < len(ids))
                longer = longer[caption[start[longer] + n - 1] == caption[start[longer]]]
                start, codes = start[longer], codes[longer] * len(numbers) + ids[start[longer] + n - 1]
            distinct, codes = np.unique(codes, return_inverse=True)  # return_index as well takes four times as long
            place = np.empty(len(distinct), np.int64)
            place[codes] = start
            self.orders.append(_Order(self, n, caption[start], codes, place))


class _Order:
    """The n-grams of one order, and (caption, n-gram, count) entries of the candidates and of the references."""

    def __init__(self, corpus: NgramCounts, n: int, caption: np.ndarray, codes: np.ndarray, place: np.ndarray) -> None:
        self.n, self.size = n, max(len(place), 1)
        self.place = place  # of each n-gram in corpus.words
        keys, counts = np.unique(caption * self.size + codes, return_counts=True)
        captions, codes = np.divmod(keys, self.size)
        split = int(np.searchsorted(captions, corpus.n_images))
        self.candidate, self.candidate_code, self.candidate_count = captions[:split], codes[:split], counts[:split]
        self.reference, self.reference_code, self.reference_count = captions[split:], codes[split:], counts[split:]
        image_keys = corpus.image[self.reference] * self.size + self.reference_code
        # number of images whose references contain each n-gram
        image_ngrams = np.sort(image_keys, kind="stable")
        image_ngrams = image_ngrams[np.diff(image_ngrams, prepend=-1) > 0]
        self.documents = np.bincount(image_ngrams % self.size, minlength=self.size)
        # entries of the references whose n-gram the candidate of their image has, and the candidate's entry
        at = np.searchsorted(keys[:split], image_keys)
        self.shared = np.flatnonzero(np.append(keys[:split], -1)[at] == image_keys)
        self.match = at[self.shared]

    def texts(self, corpus: NgramCounts, codes: np.ndarray | slice = slice(None)) -> list[str]:
        """Return the n-grams with these numbers (by default all, in order), each as words joined by spaces."""
        return [" ".join(corpus.words[at : at + self.n]) for at in self.place[codes].tolist()]


def _without_inner_spaces(tokens: Tokens) -> Tokens:
    # The ptb tokeniser joins "3 1/2" with a no-break space; the reference's BLEU and CIDEr split it again.
    joined = " ".join(tokens)
    return joined.split() if "\xa0" in joined else tokens


def longest_common_subsequence(candidate: Tokens, references: Iterable[Tokens]) -> list[int]:
    """Compute the length of the longest common subsequence of `candidate` with each of `references`.

    Bit-parallel (Hyyrö 2004): one addition of long integers per word, fast even for captions of 10,000 words.
    """
    positions: dict[str, int] = {}
    for i, word in enumerate(candidate):
        positions[word] = positions.get(word, 0) | 1 << i
    everything = (1 << len(candidate)) - 1
    found = []
    for reference in references:
        rows = everything
        for word in reference:
            if same := positions.get(word):
                both = rows & same
                rows = (rows + both) | (rows - both)
        found.append(len(candidate) - (rows & everything).bit_count())
    return found
