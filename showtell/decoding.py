"""Writing captions with a trained decoder: greedy, beam search, sampling; batched, with scores, under one set of rules.

Shapes: B images, K beams (or samples) an image, N = B*K rows, t words so far, L grid cells, V vocabulary size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from showtell.decoders import Decoder, repeat_rows
from showtell.errors import UserError
from showtell.vocabulary import Vocabulary


@dataclass(frozen=True)
class Hypothesis:
    """One caption as a decoder wrote it.

    Attributes:
        ids: its words, without `<start>` and `<end>`.
        log_probs: the model's log-probability of each word, and last that of `<end>`, in nats.
        score: their sum divided by their number to the power `DecodingOptions.length_penalty`.
        alphas: attention `(len(ids), L)` at each word, from decoders that have it, when asked for.
    """

    ids: list[int]
    log_probs: list[float]
    score: float
    alphas: Tensor | None = None


@dataclass(frozen=True)
class DecodingOptions:
    """What a caption may be, and how captions of different lengths compare.

    Attributes:
        banned: ids never written: `<start>`, and `<unk>` unless it is allowed.
        min_len: the fewest words.
        max_len: the most words; after so many only `<end>` can follow, so that every caption ends.
        no_repeat_ngram: no run of so many words occurs twice; 0 turns this off.
        length_penalty: alpha in `sum of log-probabilities / length ** alpha`, `<end>` counted; 0 favours the short.
    """

    start_id: int = 0
    end_id: int = 1
    banned: tuple[int, ...] = (0, 2)
    min_len: int = 0
    max_len: int = 25
    no_repeat_ngram: int = 0
    length_penalty: float = 0.7

    def __post_init__(self) -> None:
        if not 0 <= self.min_len <= self.max_len or self.max_len < 1:
            raise UserError(
                f"a caption of {self.min_len} to {self.max_len} words cannot be; give 0 <= min_len <= max_len"
            )
        if self.length_penalty < 0 or self.no_repeat_ngram < 0:
            raise UserError("length_penalty and no_repeat_ngram cannot be negative; 0 turns either off")

    @classmethod
    def of(cls, vocab: Vocabulary, allow_unk: bool = False, **options: float) -> DecodingOptions:
        """The rules for a vocabulary's special words; `options` are the other attributes."""
        special = {vocab.start_id, vocab("<pad>") if "<pad>" in vocab else vocab.start_id}
        banned = special if allow_unk else special | {vocab.unk_id}
        return cls(vocab.start_id, vocab.end_id, tuple(sorted(banned)), **options)

    def score(self, log_probs: list[float]) -> float:
        """The length-normalised score of a finished caption."""
        return math.fsum(log_probs) / len(log_probs) ** self.length_penalty

    def apply(self, log_probs: Tensor, history: Tensor) -> Tensor:
        """Masks the next words: log-probabilities `(N, V)` after words `(N, t)`, with -inf for what is not allowed.

        Where nothing is left, `<end>` is.
        """
        t = history.shape[1]
        end = log_probs[:, self.end_id]
        allowed = log_probs.clone()
        if t >= self.max_len:
            allowed.fill_(-math.inf)
            allowed[:, self.end_id] = end
            return allowed
        allowed[:, [i for i in self.banned if i < log_probs.shape[1]]] = -math.inf
        n = self.no_repeat_ngram
        if n and t >= n:
            runs = history.unfold(1, n, 1)  # (N, t-n+1, n)
            repeats = (runs[..., :-1] == history[:, None, t - n + 1 :]).all(-1)
            row, place = repeats.nonzero(as_tuple=True)
            allowed[row, runs[row, place, -1]] = -math.inf
        if t < self.min_len:
            allowed[:, self.end_id] = -math.inf
        stuck = allowed.isneginf().all(1)
        allowed[stuck, self.end_id] = end[stuck]
        return allowed


@torch.no_grad()
def greedy(
    decoder: Decoder, features: Tensor, rules: DecodingOptions | None = None, alphas: bool = False
) -> list[Hypothesis]:
    """Takes the most likely word at every step.

    Args:
        decoder: any decoder, in eval mode.
        features: the encoder's output, `(B, E)` or `(B, L, E)`.
        rules: see `DecodingOptions`.
        alphas: whether to keep the attention.

    Returns:
        one hypothesis an image.
    """
    rows = _roll_out(decoder, features, 1, rules or DecodingOptions(), lambda allowed: allowed.argmax(1), alphas)
    return [row[0] for row in rows]


@torch.no_grad()
def sample(
    decoder: Decoder,
    features: Tensor,
    rules: DecodingOptions | None = None,
    n: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    alphas: bool = False,
) -> list[list[Hypothesis]]:
    """Draws `n` captions an image from the model's distribution, in the order drawn.

    Args:
        decoder: any decoder, in eval mode.
        features: the encoder's output, `(B, E)` or `(B, L, E)`.
        rules: see `DecodingOptions`.
        n: how many captions an image.
        temperature: below 1 sharpens the distribution, above 1 flattens it.
        top_k: draws from the so many likeliest words only; 0 from all.
        top_p: draws from the likeliest words that together reach this probability (Holtzman et al. 2020, arXiv
            1904.09751); 1 from all.
        generator: makes the draw repeatable.
        alphas: whether to keep the attention.

    Raises:
        UserError: an argument is out of its range.
    """
    if n < 1 or temperature <= 0 or top_k < 0 or not 0 < top_p <= 1:
        raise UserError(
            f"cannot sample with n={n}, temperature={temperature}, top_k={top_k}, top_p={top_p}; "
            "give n >= 1, temperature > 0, top_k >= 0 and 0 < top_p <= 1"
        )

    def draw(allowed: Tensor) -> Tensor:
        probs = (allowed / temperature).softmax(1)
        ordered, index = probs.sort(1, descending=True)
        out = ordered.cumsum(1) - ordered >= top_p  # what comes before a word already reaches top_p
        if top_k:
            out[:, top_k:] = True
        choice = torch.multinomial(ordered.masked_fill(out, 0.0), 1, generator=generator)
        return index.gather(1, choice).squeeze(1)

    return _roll_out(decoder, features, n, rules or DecodingOptions(), draw, alphas)


def _roll_out(
    decoder: Decoder,
    features: Tensor,
    k: int,
    rules: DecodingOptions,
    choose: Callable[[Tensor], Tensor],
    keep_alphas: bool,
) -> list[list[Hypothesis]]:
    """Writes k captions an image, each on its own, with `choose` picking a word for every row."""
    memory, state = decoder.start(features)
    state = repeat_rows(state, k)
    n = features.shape[0] * k
    words = torch.full((n,), rules.start_id, device=features.device)
    history = words.new_empty(n, 0)
    log_probs, alphas = [], []
    open_rows = torch.ones(n, dtype=torch.bool, device=features.device)
    while open_rows.any():
        logits, state, alpha = decoder.step(words, memory, state)
        log_prob = logits.float().log_softmax(1)
        words = choose(rules.apply(log_prob, history)).where(open_rows, words.new_tensor(rules.end_id))
        history = torch.cat([history, words[:, None]], 1)
        log_probs.append(log_prob.gather(1, words[:, None]))
        alphas.append(alpha)
        open_rows &= words != rules.end_id
    lengths = (history == rules.end_id).int().argmax(1).tolist()
    steps = torch.stack(alphas, 1) if keep_alphas and alphas[0] is not None else None  # (N, t, L)
    values = torch.cat(log_probs, 1).tolist()
    rows = []
    for i, length in enumerate(lengths):
        own = values[i][: length + 1]
        looked = None if steps is None else steps[i, :length].cpu()
        rows.append(Hypothesis(history[i, :length].tolist(), own, rules.score(own), looked))
    return [rows[i : i + k] for i in range(0, n, k)]


@torch.no_grad()
def beam_search(
    decoder: Decoder,
    features: Tensor,
    rules: DecodingOptions | None = None,
    beam_size: int = 5,
    n_best: int = 1,
    alphas: bool = False,
) -> list[list[Hypothesis]]:
    """Finds captions of high score by keeping the `beam_size` best beginnings at every step, all images at once.

    A caption that ends takes its place in the beam along, so that with `beam_size` 1 this is `greedy`, and with a beam
    as wide as the number of possible captions it is exhaustive. An image is done early when nothing still open can
    reach the captions it has.

    Args:
        decoder: any decoder, in eval mode.
        features: the encoder's output, `(B, E)` or `(B, L, E)`.
        rules: see `DecodingOptions`.
        beam_size: K.
        n_best: how many captions to return an image, at most `beam_size`.
        alphas: whether to keep the attention.

    Returns:
        for each image its captions, best first.

    Raises:
        UserError: `n_best` is not between 1 and `beam_size`.
    """
    if not 1 <= n_best <= beam_size:
        raise UserError(f"cannot return {n_best} captions from a beam of {beam_size}; give 1 <= n_best <= beam_size")
    rules = rules or DecodingOptions()
    b, k = features.shape[0], beam_size
    memory, state = decoder.start(features)
    state = repeat_rows(state, k)
    words = torch.full((b * k,), rules.start_id, device=features.device)
    history = words.new_empty(b, k, 0)  # (B, K, t)
    word_log_probs = features.new_empty(b, k, 0, dtype=torch.float)
    looked: Tensor | None = None  # (B, K, t, L)
    totals = features.new_full((b, k), -math.inf, dtype=torch.float)
    totals[:, 0] = 0.0  # the K beams of an image begin as one
    places = torch.full((b, 1), k, device=features.device)  # of the beam, not yet taken by captions that ended
    rank = torch.arange(k, device=features.device)
    first_row = torch.arange(b, device=features.device)[:, None] * k
    finished: list[list[Hypothesis]] = [[] for _ in range(b)]

    for _ in range(rules.max_len + 1):
        logits, state, alpha = decoder.step(words, memory, state)
        log_probs = logits.float().log_softmax(1)
        v = log_probs.shape[1]
        allowed = rules.apply(log_probs, history.flatten(0, 1))
        scores = (totals.view(-1, 1) + allowed).view(b, k * v)
        totals, best = scores.topk(k, 1)
        parents, words = best // v, best % v  # (B, K)
        rows = (first_row + parents).flatten()
        state = tuple(tensor[rows] for tensor in state)
        history = torch.cat([_reorder(history, parents), words[..., None]], 2)
        new = log_probs.view(b, k * v).gather(1, best)
        word_log_probs = torch.cat([_reorder(word_log_probs, parents), new[..., None]], 2)
        if alphas and alpha is not None:
            alpha = alpha.view(b, k, 1, -1)
            looked = _reorder(alpha if looked is None else torch.cat([looked, alpha], 2), parents)

        alive = (rank < places) & ~totals.isneginf()
        ended = alive & (words == rules.end_id)
        for i, j in ended.nonzero().tolist():
            own = word_log_probs[i, j].tolist()
            view = None if looked is None else looked[i, j, :-1].cpu()
            finished[i].append(Hypothesis(history[i, j, :-1].tolist(), own, rules.score(own), view))
        places -= ended.sum(1, keepdim=True)
        totals = totals.masked_fill(~alive | ended, -math.inf)
        # Log-probabilities only fall, so no open caption can end above its total over the longest length's power.
        bounds = (totals.amax(1) / (rules.max_len + 1) ** rules.length_penalty).tolist()
        for i, bound in enumerate(bounds):
            if bound > -math.inf and len(finished[i]) >= n_best:
                reached = sorted(h.score for h in finished[i])[-n_best]
                if reached >= bound:
                    totals[i] = -math.inf
        if totals.isneginf().all():
            break
        words = words.flatten()
    return [sorted(own, key=lambda h: -h.score)[:n_best] for own in finished]


def decode(
    decoder: Decoder,
    features: Tensor,
    strategy: str = "beam",
    options: DecodingOptions | None = None,
    n: int = 1,
    beam_size: int = 5,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    alphas: bool = False,
) -> list[list[Hypothesis]]:
    """Captions encoded images with any strategy: `beam`, `greedy` or `sample`; `n` captions an image.

    Raises:
        UserError: there is no such strategy, or an argument is out of its range.
    """
    if strategy == "beam":
        return beam_search(decoder, features, options, max(beam_size, n), n, alphas)
    if strategy == "greedy":
        return [[found] for found in greedy(decoder, features, options, alphas)]
    if strategy == "sample":
        return sample(decoder, features, options, n, temperature, top_k, top_p, generator, alphas)
    raise UserError(f"there is no decoding strategy {strategy!r}; choose one of beam, greedy, sample")


def _reorder(beams: Tensor, parents: Tensor) -> Tensor:
    """Takes each image's beams `(B, K, …)` in the order of `parents` `(B, K)`."""
    index = parents.view(*parents.shape, *(1,) * (beams.dim() - 2)).expand(-1, -1, *beams.shape[2:])
    return beams.gather(1, index)
