"""Self-critical sequence training: sampled captions are scored, and those better than the baseline become more likely.

    showtell train --recipe flickr8k-attend-self-critical --init MODEL --dataset flickr8k --data-dir DIR --out runs/rl

Shapes: B images, K sampled captions per image, R references per image, T caption length, V vocabulary size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property

import torch
from torch import Tensor

from showtell import distributed
from showtell.data_loader import CaptionDataset, pad_captions
from showtell.decoders import IGNORE, Decoder
from showtell.decoding import DecodingOptions, greedy, roll_out
from showtell.metrics import DocumentFrequencies, bleu, cider_d
from showtell.model import Counts, Loss, count
from showtell.recipes import Recipe


class SelfCritical:
    """The objective of self-critical training: REINFORCE with a baseline (Rennie et al. 2017, arXiv 1612.00563).

    The baseline of a sample is the mean reward of the image's other samples (Luo 2020, arXiv 2003.09971) or, as in the
    first paper, the reward of the greedy caption. The image is encoded once. The log-probabilities of the samples are
    computed by teacher forcing, with dropout; unless the recipe turns it off, they are drawn with dropout, too.
    """

    def __init__(
        self,
        decoder: Decoder,
        samples: CaptionDataset,
        recipe: Recipe,
        autocast: Callable[[], AbstractContextManager],
        cross_entropy: Callable[[Tensor, Tensor, Counts | None], Loss],
    ) -> None:
        """Take what is trained and the training set, whose captions give the document frequencies.

        `cross_entropy` returns the loss of features and captions that is added with the weight `recipe.xe_weight`.
        """
        self.decoder, self.samples, self.recipe = decoder, samples, recipe
        self.autocast, self.cross_entropy = autocast, cross_entropy
        self.options = DecodingOptions.of(samples.vocab, max_len=recipe.max_len)

    @cached_property
    def reward(self) -> Reward:
        """The reward, computed at the first step from all training captions."""
        return Reward(self.samples, self.recipe.bleu_weight)

    def __call__(self, features: Tensor, references: Tensor, counts: Counts | None = None) -> Loss:
        """Return the objective of a batch.

        Args:
            features: from the encoder, with its gradient.
            references: `(B, R, T)`, all captions of the images, padded with `IGNORE`.
            counts: of the step, if it has several batches; those that processes have at a time are divided by their
                words, as those of later ones are not sampled yet.

        Returns:
            The objective, the negative log-likelihood of the sampled words (an estimate of the entropy of the model's
            captions), their number, and the rewards.
        """
        recipe = self.recipe
        captions = self._draw(features.detach(), self.options.beginning_as(references))  # (B, K, T)
        rewards = self.reward(captions, references)  # (B, K)
        captions = captions.to(features.device)
        if recipe.baseline == "greedy":
            rewards, baseline, captions = rewards[:, :-1], rewards[:, -1:], captions[:, :-1]
        else:
            baseline = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
        with self.autocast():
            logits, _ = self.decoder.teacher_force(features, captions.flatten(0, 1))
        kept = self._some(references, recipe.captions_per_image) if recipe.xe_weight else references[:0]
        words = None
        if counts:
            sampled, true = count([(features, captions)]), count([(features, kept)])
            sums = distributed.total(sampled.words, true.words, true.captions, 1)
            words, *true = (each * counts.batches / sums[-1] for each in sums)
            counts = Counts(*true)
        loss = reinforce(logits, captions, rewards - baseline, self.options.banned, words)._replace(rewards=rewards)
        if recipe.xe_weight:
            objective = loss.objective + recipe.xe_weight * self.cross_entropy(features, kept, counts).objective
            loss = loss._replace(objective=objective)
        return loss

    @staticmethod
    def idle(n: int) -> None:
        """Count nothing `n` times, while other processes have a batch."""
        for _ in range(n):
            distributed.total(0, 0, 0, 0)

    def _draw(self, features: Tensor, options: DecodingOptions) -> Tensor:
        """Sample K captions per image, `(B, K, T)`; for the greedy baseline, the greedy caption is one more."""

        def draw(allowed: Tensor) -> Tensor:
            return allowed.softmax(1).multinomial(1).squeeze(1)  # (N, V) -> (N,)

        with torch.no_grad(), self.autocast():
            self.decoder.train(self.recipe.sample_with_dropout)
            drawn = roll_out(self.decoder, features, self.recipe.samples_per_image, options, draw)
            if self.recipe.baseline == "greedy":
                self.decoder.eval()
                best = greedy(self.decoder, features, options)
                drawn = [[*own, found] for own, found in zip(drawn, best, strict=True)]
            self.decoder.train()
        starts = zip(options.start_id, drawn, strict=True)
        return pad_captions(
            [[torch.tensor([start, *found.ids, options.end_id]) for found in own] for start, own in starts]
        )

    @staticmethod
    def _some(references: Tensor, n: int) -> Tensor:
        """Return `n` random captions of each image, `(B, n, T)`, or all of them for 0."""
        if not 0 < n < references.shape[1]:
            return references
        order = torch.rand(references.shape[:2], device=references.device)
        order = order.masked_fill(references[..., 0] == IGNORE, 2.0).argsort(1)[:, :n, None]  # padding last
        return references.gather(1, order.expand(-1, -1, references.shape[2]))


def reinforce(
    logits: Tensor, captions: Tensor, advantages: Tensor, banned: Sequence[int] = (), words: float | None = None
) -> Loss:
    """Return the mean over words of the negative log-likelihood times the caption's advantage, the objective.

    The likelihood is that of sampling, in which banned words have no share. Otherwise words of captions below the
    baseline would lose probability to banned words, which are never sampled and so never lose it again.

    Args:
        logits: `(N, T, V)` or `(N, T-1, V)`, as in `caption_loss`. captions: `(B, K, T)`.
        advantages: `(B, K)`, reward minus baseline. banned: ids of words that are not sampled.
        words: the number of words of the mean, if it is over more than these.
    """
    targets = captions.flatten(0, 1)[:, 1:]  # (N, T-1)
    real = targets != IGNORE
    logits = logits[:, -targets.shape[1] :][real].float()  # (words, V)
    logits = logits.index_fill(1, torch.tensor(banned, dtype=torch.long, device=logits.device), -math.inf)
    nll = -logits.log_softmax(-1).gather(1, targets[real].unsqueeze(1)).squeeze(1)  # (words,)
    weights = advantages.flatten().to(nll).repeat_interleave(real.sum(1))
    weighted = weights * nll
    return Loss(weighted.mean() if words is None else weighted.sum() / words, nll.detach().sum(), real.sum())


class Reward:
    """CIDEr-D, from 0 to 10, plus `bleu_weight` times BLEU-4, from 0 to 1, of the captions of a batch.

    The document frequencies of CIDEr-D are those of the training captions. Words are those of the vocabulary, and
    `<end>` is one of them, so that a caption is rewarded for ending as its references do.
    """

    def __init__(self, samples: CaptionDataset, bleu_weight: float = 0.0) -> None:
        """Count the images of a training set whose captions contain each n-gram."""
        self.bleu_weight = bleu_weight
        images = range(len(samples.caption_set))
        references = ([_words(ids.tolist()) for ids in samples.captions_of(i)] for i in images)
        self.frequencies = DocumentFrequencies.count(references)

    def __call__(self, captions: Tensor, references: Tensor) -> Tensor:
        """Return the rewards `(B, K)` of captions `(B, K, T)` with `references` `(B, R, T)`, padded with `IGNORE`."""
        own = [_words(ids) for ids in captions.flatten(0, 1).tolist()]
        true = [[words for ids in group if (words := _words(ids))] for group in references.tolist()]
        true = [group for group in true for _ in range(captions.shape[1])]
        rewards = cider_d(true, own, self.frequencies)[1]
        if self.bleu_weight:
            rewards = rewards + self.bleu_weight * bleu(true, own)[1][:, 3]
        return torch.from_numpy(rewards).view(captions.shape[:2])


def _words(ids: list[int]) -> list[str]:
    """Return a caption's words and `<end>` as the scorers take them."""
    return [str(i) for i in ids[1:] if i != IGNORE]
