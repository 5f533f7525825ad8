"""Several models as one: the mean of their word probabilities at each step, with any decoding strategy.

    showtell evaluate --model runs/a,runs/b,runs/c --dataset flickr8k --data-dir data/flickr8k --split val

The members may have different encoders and decoders; vocabulary and image transform must be the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import islice
from os import PathLike

import torch
from torch import Tensor, nn

from showtell.checkpoint import Checkpoint
from showtell.decoders import Decoder, Memory, State
from showtell.errors import UserError


class Features(tuple):
    """The features of every member for a batch of images; its attributes (shape, device, …) are the first member's."""

    def __getattr__(self, name: str) -> object:
        return getattr(self[0], name)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None) -> Features:
        """Apply a function of a list of features, such as `torch.cat`, member by member."""
        return cls(function(own, *args[1:], **(kwargs or {})) for own in zip(*args[0], strict=True))


class _Members(nn.Module):
    """The same part of every member: one input for all, or the features of each."""

    def __init__(self, members: Iterable[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, inputs: Tensor | Features) -> Features:
        inputs = inputs if isinstance(inputs, Features) else [inputs] * len(self.members)
        return Features(member(own) for member, own in zip(self.members, inputs, strict=True))


class EnsembleBackbone(_Members):
    """The members' backbones; name and network are the first's."""

    @property
    def name(self) -> str:
        return self.members[0].name

    @property
    def net(self) -> nn.Module:
        return self.members[0].net

    def in_bfloat16(self) -> EnsembleBackbone:
        """Return copies for inference, see `Backbone.in_bfloat16`."""
        return EnsembleBackbone(member.in_bfloat16() for member in self.members)


class EnsembleEncoder(_Members):
    """The members' encoders, each of which encodes the image itself."""

    @property
    def backbone(self) -> EnsembleBackbone:
        return EnsembleBackbone(member.backbone for member in self.members)

    @property
    def embed(self) -> _Members:
        return _Members(member.embed for member in self.members)


class EnsembleDecoder(Decoder):
    """The members' decoders as one: its logits are the logarithm of the mean of the word probabilities.

    There is no attention, because the members' grids may differ.
    """

    def __init__(self, decoders: Sequence[Decoder]) -> None:
        super().__init__()
        self.members = nn.ModuleList(decoders)

    def start(self, features: Features) -> tuple[tuple[Memory, ...], State]:
        """Start every member; the state is that of all, one after the other."""
        memories, states = zip(*(m.start(own) for m, own in zip(self.members, features, strict=True)), strict=True)
        self.lengths = [len(state) for state in states]  # the same for every image
        return memories, tuple(tensor for state in states for tensor in state)

    def step(self, words: Tensor, memory: tuple[Memory, ...], state: State) -> tuple[Tensor, State, None]:
        tensors, log_probs, new_state = iter(state), [], []
        for member, own, n in zip(self.members, memory, self.lengths, strict=True):
            logits, own_state, _ = member.step(words, own, tuple(islice(tensors, n)))
            log_probs.append(logits.float().log_softmax(-1))  # (N, V)
            new_state += own_state
        return torch.stack(log_probs).logsumexp(0) - math.log(len(log_probs)), tuple(new_state), None


class EnsembleModel(nn.Module):
    """An encoder and a decoder like those of `CaptionModel`, for inference."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.encoder = EnsembleEncoder([model.encoder for model in models])
        self.decoder = EnsembleDecoder([model.decoder for model in models])


def ensemble(members: Sequence[tuple[PathLike, Checkpoint]]) -> Checkpoint:
    """Return the ensemble of models, given with their paths; length penalty and maximum length are the first's.

    Raises:
        UserError: the members' vocabularies or image transforms differ.
    """
    (first, one), *others = members
    for name, other in others:
        if (one.vocab, one.transform) != (other.vocab, other.transform):
            what = "image transforms" if one.vocab == other.vocab else "vocabularies"
            given = f"{first} and {name} cannot form an ensemble, because their {what} differ"
            raise UserError(f"{given}; give models that were trained on the same data with the same image size")
    meta = {name: value for name, value in one.meta.items() if name != "confidence"}  # calibrated for one model
    return Checkpoint(EnsembleModel([member.model for _, member in members]), one.vocab, one.transform, meta)
