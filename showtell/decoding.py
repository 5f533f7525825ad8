"""Caption generation with any decoder: greedy, beam search and sampling, for batches of images.

Features, memory and state are torch tensors or NumPy arrays; torch is not imported for the latter.

All take a decoder in eval mode, the encoder's output `(B, E)` or `(B, L, E)`, `DecodingOptions`, and whether to return
the attention (`alphas`).

Shapes: B images, K beams (or samples) per image, N = B*K rows, t words so far, L grid cells, V vocabulary size.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from showtell.arrays import (
    Array,
    draw,
    full,
    integers,
    library,
    log_softmax,
    pick,
    repeat_rows,
    sort_probabilities,
    to_cpu,
    top_k,
    without_gradients,
)
from showtell.errors import UserError
from showtell.vocabulary import Vocabulary

if TYPE_CHECKING:
    from showtell.decoders import Decoder, Memory


@dataclass(frozen=True)
class Hypothesis:
    """A generated caption.

    Attributes:
        ids: the words, without `<start>` and `<end>`.
        log_probs: the log-probability of each word and, last, of `<end>`, in nats.
        score: their sum divided by their number to the power `DecodingOptions.length_penalty`.
        alphas: the attention `(len(ids), L)` at each word, if requested and the decoder attends.
    """

    ids: list[int]
    log_probs: list[float]
    score: float
    alphas: Array | None = None


@dataclass(frozen=True)
class DecodingOptions:
    """Constraints on captions, and the length normalisation of their scores.

    Attributes:
        start_id: the word that captions begin with; several, one per image.
        banned: ids that are never generated: start words, and `<unk>` unless it is allowed.
        min_len: the minimum number of words.
        max_len: the maximum number of words; `<end>` is forced after them.
        no_repeat_ngram: n-grams of this size occur at most once; 0 disables.
        length_penalty: alpha in `sum of log-probabilities / length ** alpha`, `<end>` counted; 0 favours short ones.
    """

    start_id: int | tuple[int, ...] = 0
    end_id: int = 1
    banned: tuple[int, ...] = (0, 2)
    min_len: int = 0
    max_len: int = 25
    no_repeat_ngram: int = 0
    length_penalty: float = 0.7

    def __post_init__(self) -> None:
        if not 0 <= self.min_len <= self.max_len or self.max_len < 1:
            given = f"min_len={self.min_len} and max_len={self.max_len}"
            raise UserError(f"{given} allow no caption; give 0 <= min_len <= max_len and max_len >= 1")
        if self.length_penalty < 0 or self.no_repeat_ngram < 0:
            given = f"length_penalty={self.length_penalty} and no_repeat_ngram={self.no_repeat_ngram}"
            raise UserError(f"{given} must not be negative; 0 disables")

    @classmethod
    def of(cls, vocab: Vocabulary, allow_unk: bool = False, **options: float) -> DecodingOptions:
        """Return the options for a vocabulary's special words; `options` are the other attributes."""
        special = {vocab.start_id, vocab("<pad>") if "<pad>" in vocab else vocab.start_id, *vocab.styles.values()}
        banned = special if allow_unk else special | {vocab.unk_id}
        given = {"start_id": vocab.start_of(), "end_id": vocab.end_id, "banned": tuple(sorted(banned))}
        return cls(**(given | options))

    def beginning_as(self, captions: Array) -> DecodingOptions:
        """Return options with which each image's captions begin with the first word of its captions `(B, K, T)`."""
        return replace(self, start_id=tuple(captions[:, 0, 0].tolist()))

    def first_words(self, features: Array, k: int) -> Array:
        """Return the first word of k captions per image, `(B*k,)`."""
        if isinstance(self.start_id, int):
            return full((features.shape[0] * k,), self.start_id, features)
        return repeat_rows((integers(self.start_id, features),), k)[0]

    def score(self, log_probs: list[float]) -> float:
        """Return the length-normalised score of a finished caption."""
        return math.fsum(log_probs) / len(log_probs) ** self.length_penalty

    def apply(self, log_probs: Array, history: Array) -> Array:
        """Set log-probabilities `(N, V)` of words that may not follow `(N, t)` to -inf; `<end>` is left if all are."""
        t = history.shape[1]
        end = log_probs[:, self.end_id]
        if t >= self.max_len:
            allowed = full(log_probs.shape, -math.inf, log_probs)
            allowed[:, self.end_id] = end
            return allowed
        allowed = 1 * log_probs  # a copy
        allowed[:, [i for i in self.banned if i < log_probs.shape[1]]] = -math.inf
        n = self.no_repeat_ngram
        if n and t >= n:
            runs = history[:, [range(i, i + n) for i in range(t - n + 1)]]  # (N, t-n+1, n)
            repeats = (runs[..., :-1] == history[:, None, t - n + 1 :]).all(-1)
            row, place = library(repeats).where(repeats)
            allowed[row, runs[row, place, -1]] = -math.inf
        if t < self.min_len:
            allowed[:, self.end_id] = -math.inf
        stuck = library(allowed).isneginf(allowed).all(1)
        allowed[stuck, self.end_id] = end[stuck]
        return allowed


@without_gradients
def greedy(
    decoder: Decoder, features: Array, options: DecodingOptions | None = None, alphas: bool = False
) -> list[Hypothesis]:
    """Choose the most likely word at every step; return one hypothesis per image."""
    totals = full((features.shape[0], 1), 0.0, features)

    def choose(allowed: Array) -> Array:
        nonlocal totals
        totals, words = top_k(totals + allowed, 1)  # ties are broken as in `beam_search`, (B, 1)
        return words.squeeze(1)  # (B,)

    return [found for (found,) in roll_out(decoder, features, 1, options or DecodingOptions(), choose, alphas)]


@without_gradients
def sample(
    decoder: Decoder,
    features: Array,
    options: DecodingOptions | None = None,
    n: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: object = None,
    alphas: bool = False,
) -> list[list[Hypothesis]]:
    """Sample `n` captions per image from the model's distribution, returned in the order drawn.

    Args:
        temperature: below 1 sharpens the distribution, above 1 flattens it.
        top_k: sample from the k most likely words; 0 disables.
        top_p: sample from the smallest set of most likely words with at least this probability (nucleus sampling,
            Holtzman et al. 2020, arXiv 1904.09751); 1 disables.

    Raises:
        UserError: an argument is out of range.
    """
    if n < 1 or temperature <= 0 or top_k < 0 or not 0 < top_p <= 1:
        given = f"cannot sample with n={n}, temperature={temperature}, top_k={top_k}, top_p={top_p}"
        raise UserError(f"{given}; give n >= 1, temperature > 0, top_k >= 0 and 0 < top_p <= 1")

    def choose(allowed: Array) -> Array:
        probs, index = sort_probabilities(allowed / temperature)
        out = probs.cumsum(1) - probs >= top_p  # the words before this one already reach top_p
        if top_k:
            out[:, top_k:] = True
        probs[out] = 0.0
        return pick(index, draw(probs, generator))  # (N,)

    return roll_out(decoder, features, n, options or DecodingOptions(), choose, alphas)


def roll_out(
    decoder: Decoder, features: Array, k: int, options: DecodingOptions, choose: Callable, keep_alphas: bool = False
) -> list[list[Hypothesis]]:
    """Generate k independent captions per image; `choose` takes log-probabilities `(N, V)` and returns words `(N,)`."""
    memory, state = decoder.start(features)
    state = repeat_rows(state, k)
    n = features.shape[0] * k
    words = options.first_words(features, k)
    history = full((n, 0), 0, features)  # (N, t)
    log_probs, alphas = [], []
    open_rows = full((n,), True, features)
    xp = library(words)
    while open_rows.any() and history.shape[1] <= options.max_len:  # NaN never chooses `<end>`
        logits, state, alpha = decoder.step(words, memory, state)
        log_prob = log_softmax(logits)
        words = xp.where(open_rows, choose(options.apply(log_prob, history)), options.end_id)
        history = xp.concatenate([history, words[:, None]], 1)
        log_probs.append(pick(log_prob, words))
        alphas.append(alpha)
        open_rows &= words != options.end_id
    lengths = (1 * (history == options.end_id)).argmax(1).tolist()
    steps = xp.stack(alphas, 1) if keep_alphas and alphas[0] is not None else None  # (N, t, L)
    values = xp.stack(log_probs, 1).tolist()
    found = []
    for i, length in enumerate(lengths):
        own = values[i][: length + 1]
        attention = None if steps is None else to_cpu(steps[i, :length])
        found.append(Hypothesis(history[i, :length].tolist(), own, options.score(own), attention))
    return [found[i : i + k] for i in range(0, n, k)]


@without_gradients
def beam_search(
    decoder: Decoder,
    features: Array,
    options: DecodingOptions | None = None,
    beam_size: int = 5,
    n_best: int = 1,
    alphas: bool = False,
) -> list[list[Hypothesis]]:
    """Search for the `n_best` captions per image, best first, keeping `beam_size` (K) partial captions per image.

    A finished caption keeps its beam slot. Therefore a beam of 1 gives the captions of `greedy`, and a beam as wide as
    the number of possible captions is an exhaustive search. The search of an image stops early when none of its partial
    captions can reach the scores of the finished ones.

    Raises:
        UserError: `n_best` is not between 1 and `beam_size`.
    """
    if not 1 <= n_best <= beam_size:
        raise UserError(f"cannot return {n_best} captions from a beam of {beam_size}; give 1 <= n_best <= beam_size")
    options = options or DecodingOptions()
    b, k = features.shape[0], beam_size
    memory, state = decoder.start(features)
    state = repeat_rows(state, k)
    words = options.first_words(features, k)
    xp = library(words)
    history = full((b * k, 0), 0, features)  # (N, t)
    word_log_probs = full((b * k, 0), 0.0, features)
    attention: Array | None = None  # (N, t, L)
    totals = full((b, k), -math.inf, features)
    totals[:, 0] = 0.0  # the K beams of an image begin as one
    slots = full((b, 1), k, features)  # of the beam, not taken by finished captions
    rank = integers(range(k), features)
    first_row = integers(range(0, b * k, k), features)[:, None]
    finished: list[list[Hypothesis]] = [[] for _ in range(b)]
    images = list(range(b))  # those still searched; from here on, B is their number

    for _ in range(options.max_len + 1):
        logits, state, alpha = decoder.step(words, memory, state)
        log_probs = log_softmax(logits)
        v = log_probs.shape[1]
        scores = (totals.reshape(-1, 1) + options.apply(log_probs, history)).reshape(-1, k * v)
        totals, best = top_k(scores, k)  # (B, K)
        rows = (first_row[: len(images)] + best // v).flatten()  # (N,): the rows that go on, in new order
        words = (best % v).flatten()  # (N,)
        history = xp.concatenate([history[rows], words[:, None]], 1)
        word_log_probs = xp.concatenate([word_log_probs[rows], log_probs[rows, words][:, None]], 1)
        if alphas and alpha is not None:
            alpha = alpha[:, None]  # (N, 1, L)
            attention = (alpha if attention is None else xp.concatenate([attention, alpha], 1))[rows]

        alive = (rank < slots) & ~xp.isneginf(totals)
        ended = alive & (words.reshape(totals.shape) == options.end_id)
        for i, j in xp.argwhere(ended).tolist():
            row = i * k + j
            own = word_log_probs[row].tolist()
            view = None if attention is None else to_cpu(attention[row, :-1])
            finished[images[i]].append(Hypothesis(history[row, :-1].tolist(), own, options.score(own), view))
        slots -= ended.sum(1)[:, None]
        totals[~alive | ended] = -math.inf
        # A total only falls, so that no partial caption can finish with a higher score than this.
        bounds = (xp.amax(totals, 1) / (options.max_len + 1) ** options.length_penalty).tolist()
        going = []  # indices into `images`
        for i, (image, bound) in enumerate(zip(images, bounds, strict=True)):
            scores = sorted((h.score for h in finished[image]), reverse=True)
            if bound > (scores[n_best - 1] if len(scores) >= n_best else -math.inf):
                going.append(i)
        if not going:
            break
        if len(going) < len(images):
            images = [images[i] for i in going]
            index = integers(going, features)  # (B,)
            kept = (first_row[index] + rank).flatten()  # (N,)
            totals, slots, memory = totals[index], slots[index], _select(memory, index)
            rows, words, history, word_log_probs = rows[kept], words[kept], history[kept], word_log_probs[kept]
            attention = None if attention is None else attention[kept]
        state = tuple(array[rows] for array in state)
    return [sorted(own, key=lambda h: -h.score)[:n_best] for own in finished]


def _select(memory: Memory, images: Array) -> Memory:
    """Return the memory of some images, by index."""
    if isinstance(memory, tuple):
        return tuple(_select(part, images) for part in memory)
    return None if memory is None else memory[images]


# `decode` passes a strategy the arguments that its signature names.
STRATEGIES: dict[str, Callable] = {"beam": beam_search, "greedy": greedy, "sample": sample}


def decode(
    decoder: Decoder,
    features: Array,
    strategy: str = "beam",
    options: DecodingOptions | None = None,
    n: int = 1,
    beam_size: int = 5,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: object = None,
    alphas: bool = False,
) -> list[list[Hypothesis]]:
    """Generate `n` captions per image with any of `STRATEGIES`; see the three functions for the arguments.

    `beam_size` is raised to `n` where it is smaller.

    Raises:
        UserError: there is no such strategy, an argument is out of range, or the model computes NaN.
    """
    require_strategy(strategy, n, beam_size)
    function = STRATEGIES[strategy]
    arguments = {"beam_size": max(beam_size, n), "n_best": n, "n": n, "generator": generator, "alphas": alphas}
    arguments |= {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    accepted = inspect.signature(function).parameters
    found = function(decoder, features, options, **{name: arguments[name] for name in accepted if name in arguments})
    found = [[captions] if isinstance(captions, Hypothesis) else captions for captions in found]  # `greedy` gives one
    if not all(captions and math.isfinite(captions[0].score) for captions in found):
        raise UserError("the model computes values that are not finite, so it is damaged; fetch or train it again")
    return found


def require_strategy(strategy: str, n: int = 1, beam_size: int = 1) -> None:
    """Raise `UserError` if `decode` does not accept these arguments; needs no model."""
    if strategy not in STRATEGIES:
        raise UserError(f"there is no decoding strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}")
    if n < 1 or beam_size < 1:
        raise UserError(f"cannot decode with n={n} and beam_size={beam_size}; give whole numbers from 1 up")
    if strategy == "greedy" and n > 1:
        raise UserError(f"greedy decoding gives one caption per image, not {n}; use the strategy beam or sample")
