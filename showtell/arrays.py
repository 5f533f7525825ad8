"""What decoding needs of arrays, for torch tensors and NumPy arrays alike; importing this module does not import torch.

Functions that both libraries name alike are called through `library(array)`; here are the others.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Union

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Array = Union[np.ndarray, "Tensor"]


def library(array: Array) -> ModuleType:
    """Return numpy for its arrays, and torch for everything else."""
    return np if isinstance(array, np.ndarray) else sys.modules["torch"]


def full(shape: tuple[int, ...], value: float, like: Array) -> Array:
    """Return an array of one value, on the device of `like`: bool, int64, or float32 in both libraries."""
    if isinstance(like, np.ndarray):
        return np.full(shape, value, np.float32 if isinstance(value, float) else None)
    return library(like).full(shape, value, device=like.device)


def integers(values: Sequence[int], like: Array) -> Array:
    """Return the integers as an array on the device of `like`."""
    return np.asarray(values) if isinstance(like, np.ndarray) else library(like).tensor(values, device=like.device)


def repeat_rows(state: tuple[Array, ...], k: int) -> tuple[Array, ...]:
    """Repeat every image's rows k times, side by side: `(B, …)` -> `(B*k, …)`."""
    if k == 1:
        return state
    return tuple(a.repeat(k, 0) if isinstance(a, np.ndarray) else a.repeat_interleave(k, 0) for a in state)


def log_softmax(logits: Array) -> Array:
    """Return the log-probabilities of logits `(N, V)`, in single precision."""
    if not isinstance(logits, np.ndarray):
        return logits.float().log_softmax(1)
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def top_k(scores: Array, k: int) -> tuple[Array, Array]:
    """Return the k highest values of each row, highest first, and their indices, `(B, k)` each."""
    if not isinstance(scores, np.ndarray):
        return scores.topk(k, 1)
    found = np.sort(np.argpartition(scores, -k, 1)[:, -k:], 1)
    order = np.argsort(-np.take_along_axis(scores, found, 1), 1, kind="stable")
    found = np.take_along_axis(found, order, 1)
    return np.take_along_axis(scores, found, 1), found


def sort_probabilities(logits: Array) -> tuple[Array, Array]:
    """Return the probabilities of logits `(N, V)`, highest first, and their indices."""
    if not isinstance(logits, np.ndarray):
        return logits.softmax(1).sort(1, descending=True)
    probs = np.exp(log_softmax(logits))
    order = np.argsort(-probs, 1, kind="stable")
    return np.take_along_axis(probs, order, 1), order


def draw(weights: Array, generator: object) -> Array:
    """Draw an index `(N,)` from each row of weights `(N, V)`; None is the library's global generator."""
    if not isinstance(weights, np.ndarray):
        return library(weights).multinomial(weights, 1, generator=generator).squeeze(1)
    sums = weights.cumsum(1, dtype=np.float64)
    points = (generator or np.random.default_rng()).random((len(weights), 1)) * sums[:, -1:]
    return (sums <= points).sum(1)


def pick(array: Array, columns: Array) -> Array:
    """Return the element in the given column of each row, `(N, V)` and `(N,)` -> `(N,)`."""
    if not isinstance(array, np.ndarray):
        return array.gather(1, columns[:, None]).squeeze(1)
    return array[np.arange(len(array)), columns]


def to_cpu(array: Array) -> Array:
    """Return a tensor in the memory of the CPU; a NumPy array is there."""
    return array if isinstance(array, np.ndarray) else array.cpu()


def without_gradients(function: Callable) -> Callable:
    """Decorate a function of a decoder and its features: with tensors, nothing is recorded for a backward pass."""

    @functools.wraps(function)
    def call(decoder: object, features: Array, *args: object, **kwargs: object) -> object:
        numpy = isinstance(features, np.ndarray)
        with contextlib.nullcontext() if numpy else library(features).no_grad():
            return function(decoder, features, *args, **kwargs)

    return call
