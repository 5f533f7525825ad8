"""The captioning model: an image encoder, a caption decoder and the training loss.

Shapes are those of `showtell.decoders`: B images or captions in the batch, K captions per image, N = B*K, L grid cells,
D feature size, E embedding size, T caption length with <start> and <end>, V vocabulary size.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from itertools import chain
from os import PathLike
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from showtell.backbones import Backbone
from showtell.decoders import IGNORE, Decoder, find_decoder
from showtell.errors import UserError
from showtell.vocabulary import Vocabulary


class EncoderCNN(nn.Module):
    """A backbone and a linear head that projects its features to the decoder's input size.

    `encoder(images) == encoder.embed(encoder.backbone(images))`; the head `encoder.embed` always trains.
    """

    def __init__(
        self,
        embed_size: int,
        backbone: str = "resnet50",
        *,
        grid: bool = False,
        weights: str | PathLike | None = "imagenet",
        stride_in_1x1: bool = False,
        batch_norm: bool = False,
    ) -> None:
        """Build an encoder with output size E = `embed_size`; the next four arguments are those of `Backbone`.

        `batch_norm` adds `BatchNorm1d` after the linear layer, as some published captioners do; with a grid, the
        statistics are over all cells of all images.
        """
        super().__init__()
        self.backbone = Backbone(backbone, grid, weights, stride_in_1x1)
        self.embed: nn.Module = nn.Linear(self.backbone.feature_size, embed_size)
        if batch_norm:
            self.embed = nn.Sequential(self.embed, _BatchNorm(embed_size))

    def forward(self, images: Tensor) -> Tensor:
        """Encode images `(B, 3, S, S)` to `(B, E)`, or `(B, L, E)` with a grid.

        Instead of images it takes what a feature cache holds, the output of `backbone.frozen_part()` in any precision.
        """
        if images.dim() == 4:
            return self.embed(self.backbone(images))
        return self.embed(self.backbone.forward_from_frozen(images.to(next(self.embed.parameters()).dtype)))


class _BatchNorm(nn.BatchNorm1d):
    """Batch norm that also takes grids, and batches of one vector, which it normalises by the running statistics.

    These are cumulative means until their momentum has fallen to 0.01. From their initial values 0 and 1, a momentum of
    0.01 alone would need hundreds of steps: after 63 steps, 53 % of a running mean would still be its initial value.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.dim() == 3:
            return self(inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2])  # over (B*L, E)
        if self.training and inputs.shape[0] == 1:
            return F.batch_norm(inputs, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        # The counter is part of the state dict, so that a resumed run continues exactly. A GPU is asked for it until
        # the momentum is constant.
        if self.training and self.momentum != 0.01:
            self.momentum = max(0.01, 1 / (1 + int(self.num_batches_tracked)))
        return super().forward(inputs)


class CaptionModel(nn.Module):
    """An encoder with a matching decoder.

    Attributes:
        config: `{"encoder": {…}, "decoder": {"name": …, …}}`, the constructor arguments of both, as checkpoints store.
    """

    def __init__(self, config: dict, weights: str | PathLike | None = None) -> None:
        """Build both; `weights` are the backbone's (see `Backbone`), `None` for random ones.

        Raises:
            UserError: there is no decoder or backbone of the configured name.
        """
        super().__init__()
        self.config = config
        arguments = dict(config["decoder"])
        self.decoder = find_decoder(arguments.pop("name"))(**arguments)
        self.encoder = EncoderCNN(**config["encoder"], grid=self.decoder.grid, weights=weights)

    def forward(self, images: Tensor, captions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute logits, as `Decoder.forward` does, and the attention `(N, T-1, L)` or `None`, by teacher forcing.

        Args:
            images: `(B, 3, S, S)`, or the output of `encoder.backbone.frozen_part()` for them, `(B, D)` or `(B, L, C)`.
            captions: `(B, T)`, or `(B, K, T)` with K captions per image, padded with `IGNORE`.
        """
        return self.decoder.teacher_force(self.encoder(images), captions.flatten(0, -2))  # captions (N, T)

    def with_backbone(self, backbone: Backbone) -> CaptionModel:
        """Return a model with another backbone, which shares everything else with this one."""
        model = copy.copy(self)
        model._modules = {**self._modules, "encoder": copy.copy(self.encoder)}
        model.encoder._modules = {**self.encoder._modules, "backbone": backbone}
        return model


class Loss(NamedTuple):
    """Sums over the words of a batch: divide by `words` for means; `exp(nll / words)` is the perplexity.

    Attributes:
        objective: the quantity to minimise; `nll` itself without label smoothing.
        nll: the negative log-likelihood in nats, without gradient.
        words: the number of words, without `<start>` and padding.
        rewards: of the sampled captions, `(B, K)`, in self-critical training.
    """

    objective: Tensor
    nll: Tensor
    words: Tensor
    rewards: Tensor | None = None


class Counts(NamedTuple):
    """The numbers of true words, captions and batches in a step, on all processes: what its objective is divided by."""

    words: float
    captions: float
    batches: float


def count(batches: Sequence[tuple[Tensor, Tensor]]) -> Counts:
    """Count words, captions and batches of (images, captions)."""
    real = [captions[..., 1:] != IGNORE for _, captions in batches]
    return Counts(sum(int(each.sum()) for each in real), sum(int(each.any(-1).sum()) for each in real), len(real))


def caption_loss(logits: Tensor, captions: Tensor, label_smoothing: float = 0.0, weights: Tensor | None = None) -> Loss:
    """Compute the cross-entropy of teacher-forced logits, padding excluded.

    Args:
        logits: `(N, T, V)` or `(N, T-1, V)`; only the last T-1 steps are used, those that predict a word.
        captions: `(N, T)` or `(B, K, T)`, beginning with `<start>`, padded with `IGNORE`.
        label_smoothing: the part of the target that is spread over all words (Szegedy et al. 2016, arXiv 1512.00567).
        weights: of the captions in the objective, by their first word, `(V,)`.
    """
    targets = captions.flatten(0, -2)[:, 1:]  # (N, T-1)
    real = targets != IGNORE
    log_probs = logits[:, -targets.shape[1] :][real].float().log_softmax(-1)  # (words, V)
    true = log_probs.gather(1, targets[real].unsqueeze(1)).squeeze(1)  # (words,)
    own = 1 if weights is None else weights[captions.flatten(0, -2)[:, 0].clamp(min=0)].repeat_interleave(real.sum(1))
    nll, objective = -true.sum(), -(own * true).sum()
    if label_smoothing:
        objective = (1 - label_smoothing) * objective - label_smoothing * (own * log_probs.mean(-1)).sum()
    return Loss(objective, nll.detach(), real.sum())


def source_weights(
    vocab: Vocabulary, styles: Sequence[str], weights: str, device: torch.device | None = None
) -> Tensor | None:
    """Return the weights of captions by their first word, `(V,)`, or None if there are none.

    Args:
        vocab: with the start words of the styles. styles: of the training images, in the order of their data sets.
        weights: a number for each data set, such as `1,1,0.5`.

    Raises:
        UserError: something else than one number of 0 or more for each data set, or the vocabulary has no styles.
    """
    if not weights:
        return None
    names = list(dict.fromkeys(styles))
    table = torch.ones(len(vocab))
    try:
        numbers = [float(number) for number in weights.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != len(names) or not all(0 <= number < math.inf for number in numbers):
        accepted = f"give {len(names)} numbers of 0 or more, for {', '.join(names)}"
        raise UserError(f"source_weights={weights} are not the weights of the data sets; {accepted}")
    if not vocab.styles:
        raise UserError("source_weights needs the start words of the data sets; add condition_on_source=true")
    table[vocab.starts_of(names)] = torch.tensor(numbers)
    return table.to(device)


def drop_words(captions: Tensor, rate: float, unk_id: int) -> Tensor:
    """Replace words that the decoder reads by `<unk>`, so that it relies on the image.

    Word dropout (Bowman et al. 2016, arXiv 1511.06349): each word but `<start>` is `<unk>` with probability `rate`.

    Args:
        captions: `(…, T)`, padded with `IGNORE`, which is kept.
        rate: from 0 to below 1.
        unk_id: the id of `<unk>`.
    """
    if not rate:
        return captions
    hidden = (torch.rand(captions.shape, device=captions.device) < rate) & (captions != IGNORE)
    hidden[..., 0] = False
    return captions.masked_fill(hidden, unk_id)


@torch.no_grad()
def feed_predictions(decoder: Decoder, features: Tensor, captions: Tensor, rate: float) -> Tensor:
    """Replace words that the decoder reads by words sampled from its own predictions, as it reads them in decoding.

    Scheduled sampling (Bengio et al. 2015, arXiv 1506.03099) in two passes (Mihaylova and Martins 2019, arXiv
    1906.07651): the predictions are those after the true words, computed for all steps by teacher forcing.

    Args:
        features: of the images, `(B, E)` or `(B, L, E)`.
        captions: `(B, T)` or `(B, K, T)`, padded with `IGNORE`, which is kept.
        rate: the probability that a word is replaced; `<start>` never is.
    """
    replaced = (torch.rand(captions.shape, device=captions.device) < rate) & (captions != IGNORE)
    replaced[..., 0] = False
    logits, _ = decoder.teacher_force(features, captions.flatten(0, -2))  # (N, T or T-1, V)
    logits = logits[:, 1 - captions.shape[-1] :][replaced.flatten(0, -2)[:, 1:]]  # (words, V)
    return captions.masked_scatter(replaced, logits.float().softmax(-1).multinomial(1))


@torch.no_grad()
def average_weights(average: CaptionModel, model: CaptionModel, decay: float, step: int) -> None:
    """Move an exponential moving average of the weights towards the weights after a step.

    Batch norm's statistics are averaged as well, because they depend on the weights. The decay rises over the first
    steps, `(1 + step) / (10 + step)`, so that the average does not keep the weights that training starts from.

    Args:
        average: a copy of the model, which may share layers that do not train with it.
        decay: from 0 to below 1, such as 0.999.
        step: the number of steps so far.
    """
    decay = min(decay, (1 + step) / (10 + step))
    pairs = (chain(each.parameters(), each.buffers()) for each in (average, model))
    for own, new in zip(*pairs, strict=True):
        if not own.is_floating_point():  # the number of batches
            own.copy_(new)
        elif own is not new:
            own.lerp_(new, 1 - decay)


def doubly_stochastic_penalty(alphas: Tensor, captions: Tensor, n: float | None = None) -> Tensor:
    """Penalise attention whose sum over a caption is not 1 for every cell (Xu et al. 2015, eq. 14), mean over captions.

    Args:
        alphas: `(N, T-1, L)`.
        captions: `(N, T)` or `(B, K, T)`, padded with `IGNORE`, where attention does not count.
        n: the number of captions of the mean, if it is over more than these.
    """
    real = (captions.flatten(0, -2)[:, 1:] != IGNORE).unsqueeze(2)
    captions_with_words = real.any(1).sum().clamp(min=1)
    attended = (alphas * real).sum(1)  # (N, L)
    return ((1 - attended).square() * real.any(1)).sum() / (captions_with_words if n is None else n)
