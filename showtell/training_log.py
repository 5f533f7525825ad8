"""The log of a training run: text and JSON lines, TensorBoard, Weights & Biases, and a plot of the losses."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from showtell.errors import UserError
from showtell.figures import Curve, write_curve
from showtell.metrics import perplexity

FILES = ("training_log.txt", "training_log.jsonl")  # for people, and for programs


@dataclass
class Totals:
    """Token-weighted sums over the epoch so far; `recent` is the mean loss of the last batch.

    `samples` captions were sampled in self-critical training, with the sum of rewards `reward`.
    """

    nll: float = 0.0
    words: int = 0
    recent: float = 0.0
    reward: float = 0.0
    samples: int = 0

    def add(self, nll: float, words: int) -> None:
        self.nll, self.words, self.recent = self.nll + nll, self.words + words, nll / max(1, words)

    @property
    def mean(self) -> float:
        return self.nll / max(1, self.words)

    def sampled(self) -> dict[str, float]:
        """Return the mean reward of the sampled captions and their mean length without `<end>`, if there were any."""
        if not self.samples:
            return {}
        return {"reward": self.reward / self.samples, "sampled_length": self.words / self.samples - 1}


def log_sizes(out: Path) -> dict[str, int]:
    """Return the sizes of the log files in bytes, to save with a run."""
    return {name: (out / name).stat().st_size for name in FILES if (out / name).is_file()}


def cut_logs(out: Path, sizes: Mapping[str, int]) -> None:
    """Cut the log files back to the sizes of the last save: the steps logged since then are trained again."""
    for name, size in log_sizes(out).items():
        if size > sizes.get(name, 0):
            os.truncate(out / name, sizes.get(name, 0))


class TrainingLog:
    """`training_log.txt`, `training_log.jsonl` and, on request, TensorBoard and Weights & Biases; all are appended to.

    These two show the same numbers: the loss by step, the others by epoch.
    """

    def __init__(
        self, out: Path, settings: Mapping[str, object], quiet: bool = False, sizes: Mapping[str, int] | None = None
    ) -> None:
        """Open the log of the run in `out`; unless `quiet`, each epoch's line is printed too.

        `settings` are those of the run; `tensorboard` and `wandb` ask for these logs. `sizes`: see `cut_logs`.
        """
        if sizes is not None:
            cut_logs(out, sizes)
        self.quiet = quiet
        self.board = None
        if settings["tensorboard"]:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError('--tensorboard needs tensorboard; type pip install "showtell[tensorboard]"') from None
            self.board = SummaryWriter(str(out))
        self.wandb = _start_wandb(out, settings) if settings["wandb"] else None
        self.text, self.lines = ((out / name).open("a", encoding="utf-8", buffering=1) for name in FILES)

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.text.close()
        self.lines.close()
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()

    def step(self, epoch: int, epochs: int, step: int, steps: int, totals: Totals) -> None:
        loss, ppl = totals.recent, perplexity(totals.recent)
        self.text.write(f"Epoch [{epoch}/{epochs}], Step [{step}/{steps}], Loss: {loss:.4f}, Perplexity: {ppl:.4f}\n")
        self.lines.write(json.dumps({"epoch": epoch, "step": step, "loss": loss, "perplexity": ppl}) + "\n")
        self._show("step", (epoch - 1) * steps + step, {"train/loss": loss})

    def epoch(self, record: dict, epochs: int, device: torch.device) -> None:
        scores = ", ".join(f"{name} {100 * value:.1f}" for name, value in record["scores"].items())
        own = record["captions"]
        health = f"distinct captions {own['distinct']:.1%}, incomplete captions {own['bad_endings']:.1%}, "
        health += f"mean length {own['mean_length']:.1f} words"
        sampled = ""
        if "reward" in record:
            sampled = f"reward {record['reward']:.3f}, sampled length {record['sampled_length']:.1f}, "
        gpu = device.type == "cuda"
        memory = f", GPU memory {torch.cuda.max_memory_allocated(device) / 2**20:.0f} MB" if gpu else ""
        line = (
            f"Epoch [{record['epoch']}/{epochs}], train perplexity {record['train_perplexity']:.3f}, {sampled}"
            f"validation loss {record['val_loss']:.4f}, perplexity {record['val_perplexity']:.3f}, {scores}, {health}, "
            f"{record['seconds']} s{memory}{', best so far' if record['best'] else ''}"
        )
        self.text.write(line + "\n")
        self.lines.write(json.dumps(record) + "\n")
        if not self.quiet:
            tqdm.write(line)
        values = {"train/epoch_loss": record["train_loss"], "train/lr": record["lr"]}
        values |= {"val/loss": record["val_loss"], "val/perplexity": record["val_perplexity"]}
        values |= {f"val/{name}": value for name, value in record["scores"].items()}
        self._show("epoch", record["epoch"], values)

    def _show(self, axis: str, position: int, values: Mapping[str, float]) -> None:
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, position)
        if self.wandb:
            self.wandb.log({axis: position, **values})


def _start_wandb(out: Path, settings: Mapping[str, object]) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError('--wandb needs wandb; type pip install "showtell[wandb]"') from None
    try:
        project = os.environ.get("WANDB_PROJECT", "showtell")
        run = wandb.init(project=project, name=out.name, dir=out, config=dict(settings))
    except wandb.Error as error:  # no key, no connection
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"--wandb: {reason}; type wandb login, or set WANDB_MODE=offline") from None
    run.define_metric("*", step_metric="epoch")
    run.define_metric("train/loss", step_metric="step")
    return run


def curves(history: Sequence[dict]) -> tuple[Curve, Curve, Curve]:
    """Return the loss and the perplexity of every epoch, training and validation, and the learning rate at its end."""

    def series(kind: str) -> dict[str, list[tuple[float, float]]]:
        return {
            name: [(record["epoch"], record[f"{part}_{kind}"]) for record in history]
            for name, part in (("training", "train"), ("validation", "val"))
        }

    loss = Curve("Loss", series("loss"), "epoch", "nats per word")
    rate = {"": [(record["epoch"], record["lr"]) for record in history]}
    ppl = Curve("Perplexity", series("perplexity"), "epoch", "perplexity", log_y=True)
    return loss, ppl, Curve("Learning rate", rate, "epoch", "at the end of the epoch")


def draw_curve(path: str | os.PathLike, history: Sequence[dict]) -> None:
    """Plot the `curves` as a PNG."""
    write_curve(path, curves(history))
