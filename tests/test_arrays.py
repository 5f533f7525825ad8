"""Decoding with NumPy arrays: the same rules as with tensors, without importing torch."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from showtell.arrays import top_k
from showtell.decoders import DECODERS
from showtell.decoding import DecodingOptions, beam_search, decode, greedy, sample

ROOT = Path(__file__).resolve().parent.parent
V, E, H, L = 9, 8, 16, 4


def as_numpy(value):
    """Convert nested tuples of tensors, and None."""
    if isinstance(value, tuple):
        return tuple(map(as_numpy, value))
    return value if value is None else value.numpy()


def as_torch(value):
    if isinstance(value, tuple):
        return tuple(map(as_torch, value))
    return value if value is None else torch.from_numpy(np.ascontiguousarray(value))


class NumpyDecoder:
    """A decoder whose inputs and outputs are NumPy arrays."""

    def __init__(self, decoder):
        self.decoder = decoder

    def start(self, features):
        return as_numpy(self.decoder.start(as_torch(features)))

    def step(self, words, memory, state):
        assert words.dtype == np.int64
        assert all(array.dtype == np.float32 for array in state)
        return as_numpy(self.decoder.step(as_torch(words), as_torch(memory), as_torch(state)))


@pytest.fixture(params=list(DECODERS))
def decoder(request):
    torch.manual_seed(3)
    decoder = DECODERS[request.param](E, H, V).eval().requires_grad_(False)
    for parameter in decoder.parameters():  # larger than the usual start, so that distributions are not flat
        parameter.data.mul_(3)
    return decoder


def features_for(decoder, n):
    return torch.randn((n, L, E) if decoder.grid else (n, E), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "options", [{}, {"min_len": 3, "max_len": 7}, {"no_repeat_ngram": 2, "length_penalty": 0.0}, {"no_repeat_ngram": 1}]
)
def test_the_hypotheses_are_those_of_torch(decoder, options):
    features, options = features_for(decoder, 6), DecodingOptions(**options)
    for search, arguments in ((beam_search, {"beam_size": 4, "n_best": 3}), (greedy, {}), (beam_search, {})):
        expected = search(decoder, features, options, alphas=True, **arguments)
        found = search(NumpyDecoder(decoder), features.numpy(), options, alphas=True, **arguments)
        if search is greedy:
            expected, found = [[h] for h in expected], [[h] for h in found]
        for ours, theirs in zip(found, expected, strict=True):
            assert [h.ids for h in ours] == [h.ids for h in theirs]
            for h, other in zip(ours, theirs, strict=True):
                assert h.log_probs == pytest.approx(other.log_probs, abs=1e-5)
                assert h.score == pytest.approx(other.score, abs=1e-5)
                assert (h.alphas is None) == (other.alphas is None)
                if h.alphas is not None:
                    np.testing.assert_allclose(h.alphas, other.alphas.numpy(), atol=1e-6)


def test_samples_follow_the_distribution_and_their_seed(decoder):
    features = features_for(decoder, 1)
    options = DecodingOptions(max_len=1, banned=(0,))
    memory, state = decoder.start(features)
    logits = decoder.step(torch.tensor([0]), memory, state)[0]
    log_probs = options.apply(logits.log_softmax(1), torch.empty(1, 0, dtype=torch.long))
    expected = log_probs.softmax(1)[0].numpy()

    def first_words(seed, **narrowed):
        generator = np.random.default_rng(seed)
        (drawn,) = sample(NumpyDecoder(decoder), features.numpy(), options, 4000, generator=generator, **narrowed)
        return np.array([h.ids[0] if h.ids else 1 for h in drawn])

    words = first_words(0)
    assert np.array_equal(words, first_words(0))
    assert not np.array_equal(words, first_words(1))
    assert np.abs(np.bincount(words, minlength=V) / 4000 - expected).max() < 0.04
    best = np.argsort(-expected)
    assert set(first_words(0, top_k=2)) <= set(best[:2])
    assert set(first_words(0, top_p=1e-6)) == set(first_words(0, temperature=1e-4)) == {best[0]}
    (drawn,) = decode(NumpyDecoder(decoder), features.numpy(), "sample", DecodingOptions(), 3)
    assert len(drawn) == 3


def test_the_highest_values_come_first_and_equal_ones_in_their_order():
    values, index = top_k(np.array([[1.0, 3.0, 3.0, -math.inf, 2.0]]), 4)
    assert values.tolist() == [[3.0, 3.0, 2.0, 1.0]]
    assert index.tolist() == [[1, 2, 4, 0]]


def test_decoding_does_not_import_torch():
    code = "import sys, showtell.decoding; print({'torch', 'torchvision'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr) == ("set()", "")
