"""One model whose weights are the mean of several that were trained one from the other.

    python docs/average.py runs/9.safetensors runs/7/last.safetensors=0.35 runs/8/last.safetensors=0.65

The numbers are each one's share. It works where one model was fine-tuned from another, whose weights therefore lie in
one valley (Wortsman et al. 2022, arXiv 2203.05482); of models trained apart the mean is worth nothing.
"""

from __future__ import annotations

import sys

import torch

from showtell.checkpoint import load_checkpoint, save_checkpoint
from showtell.errors import UserError


def main(out: str, *parts: str) -> None:
    """Writes the mean; everything but the weights is the last model's."""
    paths, shares = zip(*(part.rsplit("=", 1) for part in parts), strict=True)
    shares = torch.tensor([float(share) for share in shares])
    if abs(shares.sum() - 1) > 1e-6:
        raise UserError(f"the shares are {shares.sum():g} together; make them 1")
    models = [load_checkpoint(path) for path in paths]
    last = models[-1]
    if any(other.vocab != last.vocab or other.model.config != last.model.config for other in models):
        raise UserError("these models differ in their words or their architecture; give models of one line of training")
    states = [other.model.state_dict() for other in models]
    for name, tensor in last.model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.stack([state[name] for state in states], -1) @ shares)
    meta = {name: value for name, value in last.meta.items() if name != "validation"}
    save_checkpoint(out, last.model, last.vocab, last.transform, meta | {"mean_of": parts})
    print(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
