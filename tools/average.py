"""Average the weights of several models into one.

    python tools/average.py runs/9.safetensors runs/7/last.safetensors=0.35 runs/8/last.safetensors=0.65

The numbers are the weights of the mean and sum to 1. It helps where one model was fine-tuned from another (Wortsman et
al. 2022, arXiv 2203.05482); the mean of models trained independently is useless.
"""

from __future__ import annotations

import sys

import torch

from showtell.checkpoint import load_checkpoint, save_checkpoint
from showtell.errors import UserError


def average(out: str, *parts: str) -> None:
    """Write the mean of models given as `path=weight`; all but the parameters is copied from the last one.

    Raises:
        UserError: the weights do not sum to 1, or the models differ in vocabulary or architecture.
    """
    paths, weights = zip(*(part.rsplit("=", 1) for part in parts), strict=True)
    weights = torch.tensor([float(weight) for weight in weights])
    if abs(weights.sum() - 1) > 1e-6:
        raise UserError(f"the weights sum to {weights.sum():g}; make it 1")
    models = [load_checkpoint(path) for path in paths]
    last = models[-1]
    if any(other.vocab != last.vocab or other.model.config != last.model.config for other in models):
        raise UserError("the models differ in vocabulary or architecture; give models fine-tuned from one another")
    states = [other.model.state_dict() for other in models]
    for name, tensor in last.model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.stack([state[name] for state in states], -1) @ weights)
    meta = {name: value for name, value in last.meta.items() if name not in ("validation", "confidence")}
    save_checkpoint(out, last.model, last.vocab, last.transform, meta | {"mean_of": parts})


if __name__ == "__main__":
    average(*sys.argv[1:])
    print(sys.argv[1])
