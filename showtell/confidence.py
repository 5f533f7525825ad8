"""How sure a captioner is: the estimated probability that a caption is right, calibrated on validation data.

A caption counts as right if every thing it names is in a true caption (`is_right`). The confidence is a logistic
regression on three signals of the generated words (`signals`), so it needs neither the image nor a particular way of
decoding. `docs/evaluation.md` describes it, `docs/results.md` the signals that were tried. The word lists are English.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from showtell.errors import UserError
from showtell.tokenizer import ptb

MALE = set("man men boy boys guy male he his him".split())
FEMALE = set("woman women girl girls lady female she her".split())
PEOPLE = (
    MALE | FEMALE | set("person people child children kid kids baby toddler adult adults guys ladies crowd".split())
)
# People, and the common words of captions that name no thing; words in -ing and -ed, but for a few, are none either.
_NO_THINGS = PEOPLE | set(
    """
a an the this that these those another each some several many few all both no other others one two three four five six
it its they them their there who which what someone something and or but as while with without picture of in on at to
by from into onto over under through near next off up down out along across behind between around for against above
below beside during inside outside toward towards about after before away together not very back front top bottom left
right middle side edge end is are was were be have has had do does runs run jumps jump leaps walks walk stands stand
sits sit plays play lays looks look holds hold wears wear rides ride carries catches catch takes poses pose watches
smiles swims climbs throws kicks hits hit gets red green blue yellow purple orange black white brown gray grey pink
tan blond blonde dark bright colorful small little large big young old older long short tall high wet dry open full
wide close wooden grassy snowy sandy rocky cloudy sunny dirty busy empty group couple pair lot bunch pile piece photo
image view background body air area day trick game race
""".split()
)
_THINGS = set("building ceiling clothing crossing painting railing spring string swing wedding".split())
SIGNALS = ("log_prob", "lowest_thing", "things")
MIN_CAPTIONS = 10  # right ones and wrong ones, to fit
FOLDS = 5


def things(words: Iterable[str]) -> list[str]:
    """Return those words that name a thing; people are none."""
    return [
        word
        for word in words
        if word[:1].isalpha()
        and word not in _NO_THINGS
        and (word in _THINGS or len(word) < 5 or not word.endswith(("ing", "ed")))
    ]


def is_right(caption: str, references: Iterable[str]) -> bool:
    """Return whether all things that a caption names are in one of the true captions, in the singular or plural.

    People are right if a true caption has people and does not contradict their gender: "a boy" may be "a child" there.
    """
    words, known = set(ptb(caption)), {word for text in references for word in ptb(text)}
    if words & PEOPLE and not known & PEOPLE:
        return False
    if any(words & own and known & other and not known & own for own, other in ((MALE, FEMALE), (FEMALE, MALE))):
        return False
    return {_singular(word) for word in things(words)} <= {_singular(word) for word in known}


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def signals(words: Sequence[str], word_probs: Sequence[float]) -> tuple[float, float, float]:
    """Return `SIGNALS`: the words' log-probability, the lowest one of a thing (or 0), the number of different things.

    Each word has its probability given the words before it.
    """
    log_probs = [math.log(max(p, 1e-9)) for p in word_probs]
    named = set(things(words))
    lowest = min((p for word, p in zip(words, log_probs, strict=True) if word in named), default=0.0)
    return math.fsum(log_probs), lowest, float(len({_singular(word) for word in named}))


@dataclass(frozen=True)
class Calibration:
    """A logistic regression on `SIGNALS`, as a checkpoint's `meta["confidence"]` holds it."""

    weights: Mapping[str, float]  # of each signal, in log-odds
    bias: float
    fitted: Mapping[str, object]  # the data, and how well held-out captions were predicted

    def confidence(self, words: Sequence[str], word_probs: Sequence[float]) -> float:
        """Return the estimated probability that a caption is right, given its words and their probabilities."""
        pairs = zip(self.weights.values(), signals(words, word_probs), strict=True)
        return float(_sigmoid(self.bias + math.fsum(weight * value for weight, value in pairs)))

    @classmethod
    def of(cls, meta: Mapping) -> Calibration | None:
        """Return the calibration in a checkpoint's metadata; None if there is none, or one of other signals."""
        plain = meta.get("confidence")
        if not isinstance(plain, dict) or list(plain.get("weights") or ()) != list(SIGNALS):
            return None
        return cls(plain["weights"], plain["bias"], plain["fitted"])

    @classmethod
    def fit(
        cls, rows: Sequence[Sequence[float]], right: Sequence[bool], **data: object
    ) -> tuple[Calibration, Reliability]:
        """Fit to the signals of captions and whether each is right; `data` describes them.

        Return also how well the confidence of captions that were held out is calibrated, by cross-validation over
        `FOLDS` parts with equal shares of right captions. There is no randomness. Raises a `UserError` for fewer than
        `MIN_CAPTIONS` right or wrong captions.
        """
        x, y = np.array(rows, float), np.array(right, float)
        if not MIN_CAPTIONS <= y.sum() <= len(y) - MIN_CAPTIONS:
            given = f"{int(y.sum())} of {len(y)} captions are right, too few or too many to calibrate a confidence"
            raise UserError(f"{given}; give images with {MIN_CAPTIONS} right and {MIN_CAPTIONS} wrong captions or more")
        fold = np.where(y > 0, np.cumsum(y), np.cumsum(1 - y)) % FOLDS
        held_out = np.empty(len(y))
        for k in range(FOLDS):
            held_out[fold == k] = _sigmoid(_padded(x[fold == k]) @ _regression(x[fold != k], y[fold != k]))
        reliability = Reliability.of(held_out, y)
        *weights, bias = _regression(x, y).tolist()
        quality = {"auroc": reliability.auroc, "calibration_error": reliability.error}
        fitted = {**data, "captions": len(y), "right": float(y.mean()), **quality}
        return cls(dict(zip(SIGNALS, weights, strict=True)), bias, fitted), reliability


@dataclass(frozen=True)
class Reliability:
    """How well confidences predict which captions are right.

    `auroc` is the probability that a right caption has a higher confidence than a wrong one; None if all are right or
    wrong. `error` is the expected calibration error: the mean distance, over captions, between the mean confidence and
    the share of right captions of their bin. `bins` has, for each tenth from 0 to 1 that has captions, mean confidence,
    share right and number of captions.
    """

    auroc: float | None
    error: float
    bins: list[tuple[float, float, int]]

    @classmethod
    def of(cls, confidences: Sequence[float], right: Sequence[bool]) -> Reliability:
        p, y = np.array(confidences, float), np.array(right, float)
        place = np.minimum((p * 10).astype(int), 9)
        bins = [
            (p[own].mean().item(), y[own].mean().item(), int(own.sum())) for k in range(10) if (own := place == k).any()
        ]
        error = sum(abs(confidence - share) * n for confidence, share, n in bins) / len(p)
        wrong, auroc = np.sort(p[y == 0]), None
        if 0 < len(wrong) < len(p):
            below = sum(np.searchsorted(wrong, p[y == 1], side) for side in ("left", "right")) / 2  # a tie is a half
            auroc = float(below.mean() / len(wrong))
        return cls(auroc, error, bins)

    def to_json(self) -> dict:
        """Return plain values, as `showtell evaluate --json` prints them."""
        names = ("confidence", "right", "captions")
        bins = [dict(zip(names, values, strict=True)) for values in self.bins]
        return {"auroc": self.auroc, "calibration_error": self.error, "bins": bins}

    def table(self) -> str:
        """Return the values for people."""
        auroc = "-" if self.auroc is None else f"{self.auroc:.3f}"
        lines = [f"AUROC {auroc}, calibration error {self.error:.3f}"]
        names = ("mean confidence", "share right", "captions")
        for name, values in zip(names, zip(*self.bins, strict=True), strict=True):
            lines.append(f"{name:15}" + "".join(f"{v:6}" if isinstance(v, int) else f"{v:6.2f}" for v in values))
        return "\n".join(lines)


def _sigmoid(x: np.ndarray | float) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))


def _padded(x: np.ndarray) -> np.ndarray:
    return np.column_stack([x, np.ones(len(x))])


def _regression(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return weights and bias by Newton's method, with an L2 penalty of 1 on the weights of the normalised signals."""
    mean, deviation = x.mean(0), x.std(0)
    deviation[deviation < 1e-9] = 1  # of a constant
    x = _padded((x - mean) / deviation)
    penalty = np.diag([1.0] * (x.shape[1] - 1) + [1e-6])
    w = np.zeros(x.shape[1])
    for _ in range(50):
        p = _sigmoid(x @ w)
        step = np.linalg.solve((x.T * (p * (1 - p))) @ x + penalty, x.T @ (p - y) + penalty @ w)
        w -= step
        if abs(step).max() < 1e-10:
            break
    weights = w[:-1] / deviation
    return np.append(weights, w[-1] - weights @ mean)
