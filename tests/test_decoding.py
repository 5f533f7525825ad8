"""Decoding: step by step equals teacher forcing, a full beam equals exhaustive search, a batch equals its images."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from showtell.decoders import DECODERS, repeat_rows
from showtell.decoding import STRATEGIES, DecodingOptions, beam_search, decode, greedy, sample
from showtell.errors import UserError

pytestmark = pytest.mark.parametrize("name", DECODERS)
V, E, H, L = 6, 8, 16, 4


@pytest.fixture
def decoder(name):
    torch.manual_seed(3)
    decoder = DECODERS[name](E, H, V).eval()
    for parameter in decoder.parameters():  # larger than the usual start, so that distributions are not flat
        parameter.data.mul_(3)
    return decoder


def features_for(decoder, n, seed=0):
    return torch.randn((n, L, E) if decoder.grid else (n, E), generator=torch.Generator().manual_seed(seed))


def log_prob_of(decoder, features, ids):
    """Teacher-forced log-probability of `<start> ids`, the oracle that decoding is held against."""
    captions = torch.tensor([[0, *ids]])
    logits = decoder(features, captions)[:, -len(ids) :].log_softmax(-1)
    return logits.gather(2, captions[:, 1:, None]).sum().item()


def test_teacher_forcing_equals_step_by_step(decoder):
    features = features_for(decoder, 3)
    captions = torch.randint(0, V, (6, 7), generator=torch.Generator().manual_seed(1))
    whole = decoder(features, captions)[:, -6:]
    memory, state = decoder.start(features)
    state = repeat_rows(state, 2)
    for t in range(6):
        logits, state, alphas = decoder.step(captions[:, t], memory, state)
        torch.testing.assert_close(logits, whole[:, t], atol=1e-5, rtol=1e-4)
        if alphas is not None:
            torch.testing.assert_close(alphas.sum(1), torch.ones(6))


def test_captions_of_one_image_equal_the_image_repeated(decoder):
    features = features_for(decoder, 2)
    captions = torch.randint(0, V, (6, 5), generator=torch.Generator().manual_seed(1))
    shared = decoder(features, captions)
    repeated = decoder(features.repeat_interleave(3, 0), captions)
    torch.testing.assert_close(shared, repeated, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 1.0])
def test_full_beam_is_exhaustive(decoder, length_penalty):
    options = DecodingOptions(max_len=3, length_penalty=length_penalty)
    features = features_for(decoder, 2)
    words = range(3, V)
    for i in range(2):
        scored = []
        for n in range(options.max_len + 1):
            for ids in itertools.product(words, repeat=n):
                total = log_prob_of(decoder, features[i : i + 1], [*ids, 1])
                scored.append((total / (n + 1) ** length_penalty, list(ids)))
        scored.sort(key=lambda pair: -pair[0])
        found = beam_search(decoder, features, options, beam_size=64, n_best=10)[i]
        assert [h.ids for h in found] == [ids for _, ids in scored[:10]]
        assert [h.score for h in found] == pytest.approx([s for s, _ in scored[:10]], abs=1e-4)


def test_beam_of_one_is_greedy(decoder):
    features = features_for(decoder, 8)
    one = [h[0] for h in beam_search(decoder, features, beam_size=1)]
    assert [h.ids for h in one] == [h.ids for h in greedy(decoder, features)]
    assert [h.score for h in one] == pytest.approx([h.score for h in greedy(decoder, features)], abs=1e-5)


@pytest.mark.parametrize("gap", [0.0, 2e-7, 4e-7])
def test_beam_of_one_is_greedy_at_ties_with_end(decoder, gap):
    """A gap of two units in the last place vanishes when a log-probability is added to a caption's total."""
    decoder.linear.weight.data.zero_()
    features = features_for(decoder, 2)
    for options in (DecodingOptions(), DecodingOptions(min_len=3)):
        for other in (3, 4, 5):
            decoder.linear.bias.data.zero_()
            decoder.linear.bias.data[1] = 2.0
            decoder.linear.bias.data[other] = 2.0 + gap
            one = [h[0].ids for h in beam_search(decoder, features, options, beam_size=1)]
            assert one == [h.ids for h in greedy(decoder, features, options)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_decode_gives_the_captions_of_each_strategy(decoder, strategy):
    features, options = features_for(decoder, 3), DecodingOptions(max_len=5)
    n = 1 if strategy == "greedy" else 3
    found = decode(decoder, features, strategy, options, n, 2, generator=torch.Generator().manual_seed(1))
    expected = {
        "beam": lambda: beam_search(decoder, features, options, 3, 3),
        "greedy": lambda: [[h] for h in greedy(decoder, features, options)],
        "sample": lambda: sample(decoder, features, options, 3, generator=torch.Generator().manual_seed(1)),
    }[strategy]()
    assert found == expected
    assert [len(captions) for captions in found] == [n] * 3
    with pytest.raises(UserError, match="the model computes values that are not finite"):
        decode(decoder, features * math.nan, "beam", options)


def test_a_batch_equals_its_images_one_by_one(decoder):
    features = features_for(decoder, 7)
    together = beam_search(decoder, features, beam_size=4, n_best=3)
    for i in range(7):
        (alone,) = beam_search(decoder, features[i : i + 1], beam_size=4, n_best=3)
        assert [h.ids for h in alone] == [h.ids for h in together[i]]
        assert [h.score for h in alone] == pytest.approx([h.score for h in together[i]], abs=1e-4)
    assert [h.ids for h in greedy(decoder, features)] == [greedy(decoder, f[None])[0].ids for f in features]


def test_scores_are_those_of_the_model(decoder):
    features = features_for(decoder, 3)
    for i, hypotheses in enumerate(beam_search(decoder, features, beam_size=3, n_best=3)):
        for h in hypotheses:
            total = log_prob_of(decoder, features[i : i + 1], [*h.ids, 1])
            assert math.fsum(h.log_probs) == pytest.approx(total, abs=1e-4)
            assert h.score == pytest.approx(total / (len(h.ids) + 1) ** 0.7, abs=1e-4)


def test_attention_is_one_map_a_word(decoder):
    features = features_for(decoder, 3)
    found = beam_search(decoder, features, alphas=True)
    for h in [*greedy(decoder, features, alphas=True), *itertools.chain.from_iterable(found)]:
        if decoder.grid:
            assert h.alphas.shape == (len(h.ids), L)
            torch.testing.assert_close(h.alphas.sum(1), torch.ones(len(h.ids)))
        else:
            assert h.alphas is None


def test_beam_attention_follows_its_own_beam(decoder):
    if not decoder.grid:
        pytest.skip("this decoder has no attention")
    features = features_for(decoder, 4)
    for i, hypotheses in enumerate(beam_search(decoder, features, beam_size=4, n_best=4, alphas=True)):
        for h in hypotheses:
            _, forced = decoder.teacher_force(features[i : i + 1], torch.tensor([[0, *h.ids, 1]]))
            torch.testing.assert_close(h.alphas, forced[0, : len(h.ids)], atol=1e-5, rtol=1e-4)


def test_lengths_are_kept(decoder):
    features = features_for(decoder, 6)
    options = DecodingOptions(min_len=4, max_len=6)
    for search in STRATEGIES.values():
        for result in search(decoder, features, options):
            for h in result if isinstance(result, list) else [result]:
                assert 4 <= len(h.ids) <= 6
                assert len(h.log_probs) == len(h.ids) + 1


def test_a_beam_that_never_ends_is_cut_at_max_len(decoder):
    decoder.linear.bias.data[1] = -100.0
    found = beam_search(decoder, features_for(decoder, 3), DecodingOptions(max_len=5), beam_size=3, n_best=3)
    assert all(len(h.ids) == 5 for hypotheses in found for h in hypotheses)


def test_banned_words_are_not_generated(decoder):
    decoder.linear.bias.data[[0, 2]] = 50.0
    features = features_for(decoder, 4)
    for h in [*greedy(decoder, features), *(s for row in sample(decoder, features, n=3) for s in row)]:
        assert not {0, 1, 2} & set(h.ids)
    allowed = greedy(decoder, features, DecodingOptions(banned=(0,)))
    assert any(2 in h.ids for h in allowed)


def test_no_ngram_comes_twice(decoder):
    decoder.linear.bias.data[1] = -100.0
    for n in (1, 2, 3):
        options = DecodingOptions(no_repeat_ngram=n, max_len=12)
        for hypotheses in beam_search(decoder, features_for(decoder, 3), options):
            ids = hypotheses[0].ids
            runs = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
            assert len(runs) == len(set(runs)) > 0


def test_sampling_follows_the_distribution_and_its_seed(decoder):
    features = features_for(decoder, 1)
    options = DecodingOptions(max_len=1, banned=(0,))
    memory, state = decoder.start(features)
    logits, _, _ = decoder.step(torch.tensor([0]), memory, state)
    no_words = torch.empty(1, 0, dtype=torch.long)
    expected = DecodingOptions(banned=(0,)).apply(logits.log_softmax(1), no_words).softmax(1)[0]

    def first_words(seed, **narrowed):
        drawn = sample(decoder, features, options, n=4000, generator=torch.Generator().manual_seed(seed), **narrowed)[0]
        return torch.tensor([h.ids[0] if h.ids else 1 for h in drawn])

    words = first_words(0)
    assert torch.equal(words, first_words(0))
    assert not torch.equal(words, first_words(1))
    assert (torch.bincount(words, minlength=V) / 4000 - expected).abs().max() < 0.04
    best = expected.topk(2).indices
    assert set(first_words(0, top_k=2).tolist()) <= set(best.tolist())
    assert set(first_words(0, top_p=1e-6).tolist()) == {int(best[0])}
    assert set(first_words(0, temperature=0.01).tolist()) == {int(best[0])}


def test_arguments_out_of_range_are_refused(decoder):
    features = features_for(decoder, 1)
    with pytest.raises(UserError, match="1 <= n_best <= beam_size"):
        beam_search(decoder, features, beam_size=2, n_best=3)
    with pytest.raises(UserError, match="temperature > 0"):
        sample(decoder, features, temperature=0.0)
    for arguments, message in {
        ("annealing",): "no decoding strategy 'annealing'; choose one of beam, greedy, sample",
        ("greedy", None, 2): "greedy decoding gives one caption per image, not 2; use the strategy beam or sample",
        ("beam", None, 1, 0): "cannot decode with n=1 and beam_size=0; give whole numbers from 1 up",
    }.items():
        with pytest.raises(UserError, match=message):
            decode(decoder, features, *arguments)
    with pytest.raises(UserError, match="min_len <= max_len"):
        DecodingOptions(min_len=9, max_len=3)
