"""What belongs to a step of the optimiser: several batches and processes, learning rates, signals."""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from showtell import distributed
from showtell.data_loader import CaptionDataset, CaptionLoader
from showtell.errors import UserError
from showtell.model import CaptionModel, Loss
from showtell.recipes import Recipe


class Sums(NamedTuple):
    """Of a step: objective, negative log-likelihood and words as in `Loss`; the sum of rewards and their number."""

    objective: Tensor
    nll: Tensor
    words: Tensor
    reward: Tensor
    samples: Tensor


def add_up(model: CaptionModel, losses: Sequence[Loss]) -> Sums:
    """Return the sums over the batches of a step on all processes; a process may have none.

    With several processes, gradients are replaced by their sum, and the statistics of the head's batch norm by their
    mean over the processes that have a batch, so that models stay equal.
    """
    device = next(model.parameters()).device
    nothing = torch.zeros((), device=device)
    rows = [Sums(nothing, nothing, nothing, nothing, nothing)] if len(losses) != 1 else []
    for loss in losses:
        rewards = nothing if loss.rewards is None else loss.rewards
        samples = torch.tensor(0 if loss.rewards is None else rewards.numel())
        rows.append(Sums(loss.objective.detach(), loss.nll, loss.words, rewards.sum(), samples))
    sums = Sums(*(sum(each) if len(each) > 1 else each[0] for each in zip(*rows, strict=True)))
    if distributed.world_size() == 1:
        return sums
    parameters = [p for p in model.parameters() if p.requires_grad]
    statistics = list(model.encoder.embed.buffers())
    busy = float(bool(losses))
    own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    own += [busy * each for each in statistics]
    own.append(torch.stack([torch.tensor(busy, device=device), *(each.to(device).float() for each in sums)]))
    *shared, (n_busy, *sums) = distributed.summed(own)
    for p, gradient, sum_of_all in zip(parameters, own, shared, strict=False):
        p.grad = gradient.copy_(sum_of_all)  # in the memory format of the parameter, which fused optimisers expect
    for each, mean in zip(statistics, shared[len(parameters) :], strict=True):
        each.copy_(mean / n_busy)
    return Sums(*sums)


def refuse(loss: float, norm: float, loader: CaptionLoader, before: int, n: int) -> None:
    """Raise the error of a step that is not finite: of the `n` batches, of all processes, after those `before`."""
    loader.batch_sampler.skip = before
    samples: CaptionDataset = loader.dataset
    indices = list(chain(*loader.batch_sampler.left()[:n]))
    images = samples.image_of[indices] if samples.by_caption else indices
    names = [str(samples.caption_set.image_ids[i]) for i in dict.fromkeys(map(int, images))]
    where = f"step {math.ceil(before / n) + 1} of epoch {loader.batch_sampler.epoch + 1}"
    raise UserError(
        f"the loss became {loss:.4g} and the norm of its gradient {norm:.4g} at {where}, in the batch of the images "
        f"{', '.join(names[:5])}{' …' if len(names) > 5 else ''}; "
        "nothing after the last save is kept: lower lr or clip, or check these images and captions"
    )


def optimizer_of(model: CaptionModel, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the recipe's optimiser; a pretrained backbone that trains has its own learning rate."""
    backbone = [p for p in model.encoder.backbone.parameters() if p.requires_grad]
    others = [*model.decoder.parameters(), *model.encoder.embed.parameters()]
    groups = [{"params": others, "lr": recipe.lr}]
    if backbone:
        groups.append({"params": backbone, "lr": recipe.lr if recipe.encoder == "tiny" else recipe.backbone_lr})
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=recipe.weight_decay, fused=True)
    return torch.optim.Adam(groups, fused=True)  # one pass over the memory: a third of the time on a CPU


@contextlib.contextmanager
def noted_signals(note: Callable[[int], None]) -> Iterator[None]:
    """On Ctrl-C or SIGTERM, call `note` with the number of the signal; on a second, end at once."""
    before = {}

    def handle(number: int, _: object) -> None:
        note(number)
        signal.signal(number, signal.default_int_handler)
        # PyTorch's handler raises wherever the program is, if the same signal ends a loader worker.
        if (child := getattr(signal, "SIGCHLD", None)) and child not in before:
            before[child] = signal.signal(child, signal.SIG_DFL)

    with contextlib.suppress(ValueError):  # not the main thread, which alone handles signals
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
