"""The log of a training run: text and JSON lines, TensorBoard events, and a plot of the losses."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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
    """`training_log.txt`, `training_log.jsonl` and, on request, TensorBoard events; all are appended to."""

    def __init__(self, out: Path, tensorboard: bool = False, quiet: bool = False) -> None:
        """Open the log of the run in `out`; unless `quiet`, each epoch's line is printed too."""
        self.quiet = quiet
        self.board = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError('--tensorboard needs tensorboard; type pip install "showtell[tensorboard]"') from None
            self.board = SummaryWriter(str(out))
        self.text, self.lines = ((out / name).open("a", encoding="utf-8", buffering=1) for name in FILES)

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.text.close()
        self.lines.close()
        if self.board:
            self.board.close()

    def step(self, epoch: int, epochs: int, step: int, steps: int, totals: Totals) -> None:
        loss, ppl = totals.recent, perplexity(totals.recent)
        self.text.write(f"Epoch [{epoch}/{epochs}], Step [{step}/{steps}], Loss: {loss:.4f}, Perplexity: {ppl:.4f}\n")
        self.lines.write(json.dumps({"epoch": epoch, "step": step, "loss": loss, "perplexity": ppl}) + "\n")
        if self.board:
            self.board.add_scalar("train/loss", loss, (epoch - 1) * steps + step)

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
        if self.board:
            self.board.add_scalar("lr", record["lr"], record["epoch"])
            for name in ("train_loss", "val_loss", "val_perplexity"):
                self.board.add_scalar(name.replace("_", "/", 1), record[name], record["epoch"])
            for name, value in record["scores"].items():
                self.board.add_scalar(f"val/{name}", value, record["epoch"])


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
