"""The attention of the LSTM decoders to the grid of image features.

Shapes: B images, K captions or beams per image, N = B*K rows, L grid cells, E embedding size, H hidden size, A
attention size.
"""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Soft attention with a one-layer perceptron (Bahdanau et al. 2015; Xu et al. 2015, arXiv 1502.03044, eq. 4-5)."""

    def __init__(self, query_size: int, key_size: int, attention_size: int) -> None:
        super().__init__()
        self.query = nn.Linear(query_size, attention_size)
        self.key = nn.Linear(key_size, attention_size, bias=False)
        self.energy = nn.Linear(attention_size, 1, bias=False)  # a bias would cancel in the softmax

    def keys(self, features: Tensor) -> Tensor:
        """Project the grid `(B, L, E)` to keys `(B, L, A)`, once per image."""
        return 2 * self.key(features)

    def forward(self, query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Query `(N, H)`, keys `(B, L, A)` and values `(B, L, E)` -> context `(N, E)`, weights `(N, L)`."""
        # tanh(x) = 2 sigmoid(2x) - 1, whose constant cancels in the softmax; a sigmoid takes a fifth of the time.
        query = 2 * self.query(query).unflatten(0, (keys.shape[0], -1))  # (B, K, A)
        weight = 2 * self.energy.weight.to(query.dtype)  # (1, A)
        if torch.is_grad_enabled():
            energies = _Energies.apply(query, keys, weight)  # (B, K, L)
        else:
            energies, _ = _energies(query, keys, weight)
        alphas = energies.softmax(-1)  # (B, K, L)
        return (alphas @ values).flatten(0, 1), alphas.flatten(0, 1)  # (N, E), (N, L)


def _energies(query: Tensor, keys: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Query `(B, K, A)`, keys `(B, L, A)` and weight `(1, A)` -> energies `(B, K, L)`, hidden layer `(B, K, L, A)`."""
    hidden = (query.unsqueeze(2) + keys.unsqueeze(1)).sigmoid_()  # the largest tensor of a step
    return F.linear(hidden, weight).squeeze(3), hidden


class _Energies(torch.autograd.Function):
    """`_energies` with a backward pass that writes one tensor of its size; PyTorch's own writes two and reads more."""

    @staticmethod
    def forward(ctx, query: Tensor, keys: Tensor, weight: Tensor) -> Tensor:
        energies, hidden = _energies(query, keys, weight)
        ctx.save_for_backward(hidden, weight)
        return energies

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight = ctx.saved_tensors
        slopes = torch.ops.aten.sigmoid_backward(grad.unsqueeze(3).expand_as(hidden), hidden)  # (B, K, L, A)
        keys = reduce(torch.add, slopes.unbind(1))  # (B, L, A); `sum` over a middle dimension takes twice as long
        return slopes.sum(2) * weight, keys * weight, grad.reshape(1, -1) @ hidden.flatten(0, 2)
