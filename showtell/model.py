"""The captioner: an encoder that sees, a decoder that writes, and the loss that teaches both.

Shapes are those of `showtell.decoders`: B images or captions in the batch, K captions an image, L grid cells,
D feature size, E embedding size, T caption length with <start> and <end>, V vocabulary size.
"""

from __future__ import annotations

from os import PathLike
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from showtell.backbones import Backbone
from showtell.decoders import DECODERS, IGNORE
from showtell.errors import UserError


class EncoderCNN(nn.Module):
    """A backbone and the head that turns its features into what a decoder reads.

    `encoder(images) == encoder.embed(encoder.backbone(images))`; `encoder.embed` is the part that always trains.
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
        """Builds the encoder; `backbone`, `grid`, `weights` and `stride_in_1x1` are those of `Backbone`.

        Args:
            embed_size: E, the size of what the decoder reads.
            batch_norm: adds `BatchNorm1d` behind the linear layer, as some published captioners do; over all cells of
                all images where there is a grid.
        """
        super().__init__()
        self.backbone = Backbone(backbone, grid, weights, stride_in_1x1)
        self.embed: nn.Module = nn.Linear(self.backbone.feature_size, embed_size)
        if batch_norm:
            self.embed = nn.Sequential(self.embed, _BatchNorm(embed_size, momentum=0.01))

    def forward(self, images: Tensor) -> Tensor:
        """`(B, 3, S, S)` -> `(B, E)`, or `(B, L, E)` with a grid; likewise from what a cache holds of them.

        A cache holds what `backbone.frozen_part()` gives, in half precision, which is brought to that of the weights.
        """
        if images.dim() == 4:
            return self.embed(self.backbone(images))
        return self.embed(self.backbone.forward_from_frozen(images.to(next(self.embed.parameters()).dtype)))


class _BatchNorm(nn.BatchNorm1d):
    """Takes grids too, and lets an epoch's last batch be a single vector, which takes the running statistics."""

    def forward(self, inputs: Tensor) -> Tensor:
        """`(B, E)` or `(B, L, E)`, and gives the same shape."""
        if inputs.dim() == 3:
            return self(inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2])
        if self.training and inputs.shape[0] == 1:
            return F.batch_norm(inputs, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(inputs)


class CaptionModel(nn.Module):
    """An encoder and a decoder that fit, and the plain configuration that builds them again.

    Attributes:
        config: `{"encoder": {…}, "decoder": {"name": …, …}}`, the constructors' arguments, as a checkpoint carries it.
    """

    def __init__(self, config: dict, weights: str | PathLike | None = None) -> None:
        """Builds both halves; `weights` is the backbone's (see `Backbone`), `None` when a checkpoint follows.

        Raises:
            UserError: the configuration names something that does not exist.
        """
        super().__init__()
        self.config = config
        arguments = dict(config["decoder"])
        name = arguments.pop("name")
        if name not in DECODERS:
            raise UserError(f"there is no decoder {name!r}; choose one of {', '.join(DECODERS)}")
        self.decoder = DECODERS[name](**arguments)
        self.encoder = EncoderCNN(**config["encoder"], grid=self.decoder.grid, weights=weights)

    def forward(self, images: Tensor, captions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Teacher forcing from images `(B, 3, S, S)`, or from what a cache holds of them.

        Args:
            images: images, or what `encoder.backbone.frozen_part()` gave for them: `(B, D)` or `(B, L, C)`.
            captions: `(B, T)`, or `(B, K, T)` with K captions an image, padded with `IGNORE`.

        Returns:
            logits as `Decoder.forward` gives them for `captions.flatten(0, -2)`, and attention or `None`.
        """
        return self.decoder.teacher_force(self.encoder(images), captions.flatten(0, -2))


class Loss(NamedTuple):
    """Sums over the real words of a batch: divide by `words` for means; `exp(nll / words)` is the perplexity.

    Attributes:
        objective: what training descends; `nll` itself unless labels are smoothed.
        nll: the negative log-likelihood in nats, without gradient.
        words: how many words were summed over: all but `<start>` and padding.
    """

    objective: Tensor
    nll: Tensor
    words: Tensor


def caption_loss(logits: Tensor, captions: Tensor, label_smoothing: float = 0.0) -> Loss:
    """Scores a decoder's teacher-forced logits against the captions, over real words only.

    Args:
        logits: `(N, T, V)` or `(N, T-1, V)`: the last T-1 steps are used, so that a decoder whose first step is the
            image and one whose first step is `<start>` are treated alike.
        captions: `(N, T)` or `(B, K, T)`, beginning with `<start>`, padded with `IGNORE`.
        label_smoothing: the part of the target spread over all words (Szegedy et al. 2016, arXiv 1512.00567).
    """
    targets = captions.flatten(0, -2)[:, 1:]
    real = targets != IGNORE
    log_probs = logits[:, -targets.shape[1] :][real].float().log_softmax(-1)  # (words, V)
    nll = -log_probs.gather(1, targets[real].unsqueeze(1)).sum()
    objective = nll
    if label_smoothing:
        objective = (1 - label_smoothing) * nll - label_smoothing * log_probs.mean(-1).sum()
    return Loss(objective, nll.detach(), real.sum())
