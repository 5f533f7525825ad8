"""Weights in 8 bits, for files: one scale per output channel, symmetric around 0."""

from __future__ import annotations

import torch
from torch import Tensor

_SCALE = ".int8_scale"  # after the name of a weight, the name of its scales


def quantise(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Return a weight `(C, …)` as int8 and its scales `(C,)` as float16; the error is at most half a scale.

    Tensors of fewer dimensions, and weights whose scales are out of float16's range, are returned as they are.
    """
    if weight.dim() < 2 or not weight.is_floating_point():
        return {name: weight}
    rows = weight.float().flatten(1)
    scale = (rows.abs().amax(1) / 127).half()
    if not scale.isfinite().all():
        return {name: weight}
    steps = rows / scale.float().clamp(min=torch.finfo(torch.float16).tiny / 1024).unsqueeze(1)
    return {name: steps.round().clamp(-127, 127).to(torch.int8).view(weight.shape), name + _SCALE: scale}


def dequantise(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with those that `quantise` wrote in single precision; raise `ValueError` if scales do not fit."""
    scales = {name.removesuffix(_SCALE): scale for name, scale in tensors.items() if name.endswith(_SCALE)}
    weights = {name: tensor for name, tensor in tensors.items() if not name.endswith(_SCALE)}
    for name, scale in scales.items():
        if scale.shape != weights[name].shape[:1]:
            raise ValueError(f"{name} has the shape {tuple(weights[name].shape)} and {len(scale)} scales")
        weights[name] = weights[name].float() * scale.float().view(-1, *[1] * (weights[name].dim() - 1))
    return weights
