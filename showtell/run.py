"""The settings of a training run, and how a saved run is opened again."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from showtell import __version__, distributed, metrics
from showtell.checkpoint import load_resume
from showtell.datasets import CaptionSet
from showtell.errors import UserError
from showtell.recipes import Recipe, recipe_named

MAY_CHANGE = (  # when a run is resumed: none of it changes what is learned
    "data_dir", "patience", "device", "num_workers", "features", "save_minutes", "print_every", "max_broken",
    "tensorboard", "wandb", "timeout_minutes",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What is trained on which data, and how the run behaves; the recipe says how the model learns.

    Attributes:
        dataset, data_dir: as in `showtell.datasets.load`. out: the run folder.
        weights: of the backbone, see `Backbone`. seed: the random seed.
        init: a checkpoint to start from, see `showtell.checkpoint.start_from`; it replaces `weights`.
        new_vocabulary: with `init`, use the words of the training captions only; by default, they are added to those of
            the checkpoint.
        subset: the number of images to train on, to tune hyper-parameters; 0 for all.
        val_images: the number of validation images that are captioned and scored every epoch; 0 for all.
        best_by: the score, or `loss`, that selects the best checkpoint.
        patience: the number of epochs without improvement after which training stops; 0 for never.
        device: `"cpu"`, `"cuda"`, …. num_workers: loader processes.
        features: folder of the feature cache, `""` for no cache; it holds the output of the backbone's frozen layers,
            and is used where the recipe has no random crops.
        save_minutes: the time between saves inside an epoch. print_every: the number of steps between log lines.
        max_broken: the number of unreadable images to leave out before stopping.
        tensorboard, wandb: whether to write events for TensorBoard, and whether to log to Weights & Biases.
        timeout_minutes: how long one of several processes may not answer before the others end.
    """

    dataset: str = "synthetic"
    data_dir: str | None = None
    out: str = "runs/last"
    weights: str | None = "imagenet"
    init: str = ""
    new_vocabulary: bool = False
    seed: int = 0
    subset: int = 0
    val_images: int = 1000
    best_by: str = "CIDEr"
    patience: int = 0
    device: str = "cpu"
    num_workers: int = 0
    features: str = "runs/features"
    save_minutes: float = 10.0
    print_every: int = 100
    max_broken: int = 100
    tensorboard: bool = False
    wandb: bool = False
    timeout_minutes: float = 10.0

    def __post_init__(self) -> None:
        accepted = [*metrics.names(), "loss"]
        if self.best_by not in accepted:
            raise UserError(f"best_by={self.best_by!r} is not known; choose one of {', '.join(accepted)}")
        if self.new_vocabulary and not self.init:
            raise UserError("new_vocabulary is about a model to start from; add --init MODEL, or leave it out")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed} is out of range; give a whole number from 0 to {2**32 - 1}")
        least = dict.fromkeys(("subset", "val_images", "patience", "num_workers", "save_minutes", "max_broken"), 0)
        for name, lowest in {**least, "print_every": 1, "timeout_minutes": 0.01}.items():
            if not getattr(self, name) >= lowest:
                raise UserError(f"{name}={getattr(self, name)} is too low; give {lowest} or more")


def read_run(
    out: str | os.PathLike, recipe: str | None, settings: Mapping[str, object] | None, changes: Mapping[str, object]
) -> tuple[Recipe, Run, dict]:
    """Return recipe, settings and state of a saved run; see `showtell.train.Trainer.resume` for the arguments."""
    path = Path(out) / "resume.pt"
    if not path.is_file():
        raise UserError(f"{out} holds no run to resume (there is no {path}); leave --resume out to start one")
    state = load_resume(path)
    if not isinstance(state, dict) or not {"recipe", "run"} <= state.keys():
        raise damaged(path, "it lacks the settings")
    try:
        own, run = Recipe(**state["recipe"]), Run(**state["run"])
    except TypeError as error:
        versions = f"showtell {state.get('showtell')}, with settings that this one ({__version__}) does not know"
        raise UserError(f"{path} is of {versions}; resume with that version, or give another --out") from error
    old = own.to_dict() | asdict(run)
    new = (recipe_named(recipe) if recipe else own).with_settings(settings or {}).to_dict()
    new |= {name: value for name, value in changes.items() if name not in MAY_CHANGE}
    if "epochs" in (settings or {}) and new["epochs"] > own.epochs:
        own = replace(own, epochs=new.pop("epochs"))
    if different := [name for name, value in new.items() if value != old.get(name)]:
        listed = ", ".join(f"{name} from {old.get(name)} to {new[name]}" for name in different)
        flags = f"--resume continues with the settings in {out}, and these flags would change {listed}"
        raise UserError(f"{flags}; leave them out, or start a new run with another --out")
    return own, replace(run, out=str(out), **changes), state


def damaged(path: Path, reason: str) -> UserError:
    """Return the error for a file that cannot be resumed from."""
    return UserError(f"{path} is damaged ({reason}); restore it from a copy, or start a new run with another --out")


def digest_of_data(*sets: CaptionSet) -> str:
    """Return 32 characters that differ when images, captions or their order do."""
    digest = hashlib.blake2b(digest_size=16)
    for caption_set in sets:
        digest.update(json.dumps([caption_set.image_ids, caption_set.captions]).encode())
    return digest.hexdigest()


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def generator_states(device: torch.device) -> list[dict[str, Tensor]]:
    """Return each process's states of the random number generators of the CPU and of a device (CUDA, MPS, XPU, …)."""
    states = {"torch": torch.get_rng_state()}
    if hasattr(module := torch.get_device_module(device), "get_rng_state"):
        states[device.type] = module.get_rng_state(device)
    return distributed.of_all(states)


def set_generator_states(device: torch.device, of_all: list[dict[str, Tensor]] | dict[str, Tensor]) -> None:
    """Restore what `generator_states` returned, as far as it is about this process and this type of device."""
    of_all = [of_all] if isinstance(of_all, dict) else of_all  # as runs of one process were saved
    if distributed.rank() >= len(of_all):
        return
    states = of_all[distributed.rank()]
    torch.set_rng_state(states["torch"].cpu())
    if device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type].cpu(), device)
