"""Training: teacher forcing with everything that makes a run worth its night.

    showtell train --dataset flickr8k --data-dir data/flickr8k --recipe flickr8k-show-tell --out runs/flickr8k

A run folder holds `best.safetensors`, `last.safetensors`, `resume.pt`, `training_log.txt`, `training_log.jsonl`,
`curve.png` and `run.json`. Stopped at any moment, `--resume` goes on; on the same machine, bit for bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from showtell import __version__, datasets, metrics
from showtell.checkpoint import Checkpoint, load_resume, save_checkpoint, save_resume, start_from
from showtell.data_loader import CaptionDataset, get_loader
from showtell.datasets import CaptionSet
from showtell.decoders import IGNORE
from showtell.decoding import DecodingOptions
from showtell.errors import UserError
from showtell.evaluate import image_loader, perplexity, write_captions
from showtell.features import FeatureCache
from showtell.files import lock, require_free_space, write_json
from showtell.model import CaptionModel, caption_loss
from showtell.recipes import Recipe
from showtell.training_log import Totals, TrainingLog, draw_curve, perplexity_of
from showtell.vocabulary import Vocabulary

METRICS = ("CIDEr", "Bleu_4", "Bleu_1", "ROUGE_L", "loss")  # what "best" can mean


@dataclass(frozen=True)
class Run:
    """What is trained on what, and how the run behaves; the recipe says how it learns.

    Attributes:
        dataset, data_dir: as in `showtell.datasets.load`. out: the run folder.
        weights: of the backbone, see `Backbone`. seed: of everything random.
        init: a trained model's checkpoint to start from, see `showtell.checkpoint.start_from`; it has `weights` too.
        subset: train on so many images only, to tune hyper-parameters; 0 is all.
        val_images: how many validation images are captioned and scored every epoch; 0 is all.
        best_by: what the best checkpoint is best by. patience: stop after so many epochs without a better one; 0 never.
        device: `"cpu"`, `"cuda"`, …. num_workers: loader processes.
        features: folder of the feature cache, `""` for no cache; it holds what the backbone's frozen layers give, and
            serves training without random crops.
        save_minutes: how often the run is saved inside an epoch. print_every: steps between log lines.
        max_broken: unreadable images left out before the run stops. tensorboard: whether to write its event files.
    """

    dataset: str = "synthetic"
    data_dir: str | None = None
    out: str = "runs/last"
    weights: str | None = "imagenet"
    init: str = ""
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

    def __post_init__(self) -> None:
        if self.best_by not in METRICS:
            raise UserError(f"best_by={self.best_by!r} is not known; choose one of {', '.join(METRICS)}")
        least = dict.fromkeys(("subset", "val_images", "patience", "num_workers", "save_minutes", "max_broken"), 0)
        for name, lowest in {**least, "print_every": 1}.items():
            if not getattr(self, name) >= lowest:
                raise UserError(f"{name}={getattr(self, name)} is too low; give {lowest} or more")


class Stopped(Exception):
    """Ctrl-C or SIGTERM ended a run; it is saved, and the message says how to go on."""


class Trainer:
    """One run: builds the model and the loaders, trains, validates, saves, resumes.

    Attributes:
        model, vocab, transform: what is trained. recipe, run: its settings.
        history: one dict an epoch: losses, perplexities, scores, seconds.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: Run,
        train_set: CaptionSet | None = None,
        val_set: CaptionSet | None = None,
        state: dict | None = None,
        dry: bool = False,
    ) -> None:
        """Opens the data, builds the vocabulary and the model, and caches features where that is possible.

        Args:
            recipe: how it learns.
            run: on what, and where.
            train_set: instead of opening the run's data set.
            val_set: likewise for validation.
            state: what `resume` read from a stopped run.
            dry: whether to compute and write nothing, for `describe` alone.

        Raises:
            UserError: settings or data that cannot be, or a run folder that holds another run.
        """
        self.recipe, self.run = recipe, run
        self.out = Path(run.out)
        self.resumed = bool(state)
        self._refuse_another_run()
        self.device = torch.device(run.device)
        seed_everything(run.seed)
        self.train_set = train_set or datasets.load(run.dataset, run.data_dir, "train")
        self.val_set = val_set or datasets.load(run.dataset, run.data_dir, "val")
        if run.subset:
            self.train_set = self.train_set.subset(run.subset, run.seed)
        self.vocab = Vocabulary.build(self.train_set.all_captions(), recipe.threshold, recipe.tokenizer)
        self.data = _digest(self.train_set, self.val_set)
        if state and (self.data, self.vocab.to_dict()) != (state["data"], state["vocabulary"]):
            raise UserError(
                f"the images or captions of {run.data_dir or run.dataset} have changed since {self.out} was begun; "
                "bring them back as they were, or begin a new run with another --out"
            )
        self.transform = recipe.transform()
        weights = None if state or run.init else run.weights
        self.model = CaptionModel(recipe.model_config(len(self.vocab)), weights)
        if run.init and not state:
            start_from(self.model, self.vocab, run.init)
        if state:  # before the cache is opened, which recognises the backbone by its weights
            self.model.load_state_dict(state["model"])
        self.model.encoder.backbone.fine_tune(recipe.layers_to_train())
        self.model.to(self.device)
        self._open_loaders(dry)
        self.optimizer = _optimizer(self.model, recipe)
        self.total_steps = recipe.epochs * len(self.loader)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: _warm_cosine(step, recipe.warmup, self.total_steps)
        )
        self.epoch = self.step = 0  # the next to do; `step` counts inside the epoch
        self.totals = Totals()
        self.history: list[dict] = []
        self.best, self.best_epoch = -math.inf, 0
        self.stop_signal = 0
        if state:
            self._restore(state)

    def _open_loaders(self, dry: bool) -> None:
        recipe, run = self.recipe, self.run
        cache = mirror_cache = None
        stem = self.model.encoder.backbone.frozen_part()  # what the whole run leaves as it is
        if run.features and not dry and stem and not recipe.random_crop:
            precision = "bfloat16" if self._autocast() else "float32"
            still = self.transform.evaluation()
            cache = FeatureCache.open(run.features, stem, still, precision)
            wanted = [(cache, self.train_set), (cache, self.val_set)]
            if recipe.flip:
                mirror_cache = FeatureCache.open(run.features, stem, replace(still, mirror=True), precision)
                wanted.append((mirror_cache, self.train_set))
            for opened, captions in wanted:
                opened.build(captions, device=self.device, num_workers=run.num_workers, max_broken=run.max_broken)
        options = {"vocab": self.vocab, "cache": cache, "num_workers": run.num_workers, "max_broken": run.max_broken}
        self.loader = get_loader(
            self.transform,
            "train",
            recipe.batch_size,
            dataset=self.train_set,
            group=recipe.group,
            captions_per_image=recipe.captions_per_image,
            mirror_cache=mirror_cache,
            seed=run.seed,
            **options,
        )
        self.val_loader = get_loader(
            self.transform, "val", recipe.batch_size, dataset=self.val_set, group=recipe.group, **options
        )
        scored = self.val_set.subset(run.val_images, run.seed) if run.val_images else self.val_set
        self.scored = image_loader(
            CaptionDataset(scored, self.vocab, self.transform, "val", "image", cache=cache),
            batch_size=100,
            num_workers=run.num_workers,
            max_broken=run.max_broken,
        )

    def describe(self) -> str:
        """Says in a few lines what is trained on what."""
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.model.parameters())
        n_captions = sum(map(len, self.train_set.captions))
        config = self.model.config
        return (
            f"{self.run.dataset}: {len(self.train_set):,} images with {n_captions:,} captions to train on, "
            f"{len(self.val_set):,} images to validate; {len(self.vocab):,} words "
            f"(threshold {self.recipe.threshold}, tokeniser {self.recipe.tokenizer})\n"
            f"{config['encoder']['backbone']} + {config['decoder']['name']}: "
            f"{trained:,} of {total:,} parameters train; "
            f"{self.recipe.epochs} epochs of {len(self.loader):,} steps on {self.device}; in {self.out}"
        )

    def _autocast(self) -> bool:
        """Whether to compute in bfloat16: where asked for, and by itself on a GPU that has it."""
        if self.recipe.precision == "auto":
            return self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        return self.recipe.precision == "bfloat16"

    # ------------------------------------------------------------------------------------------------ the loop

    def fit(self, on_epoch: Callable[[dict], None] | None = None, progress: bool = True) -> list[dict]:
        """Trains to the last epoch, or until validation stops improving for `patience` epochs.

        Args:
            on_epoch: called after each epoch with its record, which is also in `history`.
            progress: whether to show a bar with loss, perplexity and captions a second.

        Raises:
            Stopped: Ctrl-C or SIGTERM came; the run is saved.
            UserError: the loss is not finite, or the folder is in use or holds another run.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(lock(self.out, "is training in"))
            self._refuse_another_run()  # that may have come and gone since this one was opened
            for rubbish in self.out.glob(".*.tmp"):  # of a save that was killed
                rubbish.unlink(missing_ok=True)
            stack.enter_context(self._signals())
            log = stack.enter_context(TrainingLog(self.out, self.run.tensorboard, quiet=not progress))
            write_json(self.out / "run.json", {"recipe": self.recipe.to_dict(), "run": asdict(self.run)})
            while self.epoch < self.recipe.epochs and not self._out_of_patience():
                self._stop_if_asked()
                record = self._train_epoch(log, progress)
                record |= self._validate(progress)
                self._finish_epoch(record, log)
                if on_epoch:
                    on_epoch(record)
        return self.history

    def _refuse_another_run(self) -> None:
        if self.resumed:
            return
        if (self.out / "resume.pt").exists():
            raise UserError(f"{self.out} already holds a run; add --resume to continue it, or choose another --out")
        if (self.out / "best.safetensors").exists():
            raise UserError(f"{self.out} holds the model of an older run; move it away, or choose another --out")

    def _train_epoch(self, log: TrainingLog, progress: bool) -> dict:
        sampler = self.loader.batch_sampler
        sampler.epoch, sampler.skip = self.epoch, self.step
        self.loader.dataset.set_epoch(self.epoch)
        n_steps, epochs = len(self.loader), self.recipe.epochs
        saved = time.monotonic()
        self.model.train()
        description = f"epoch {self.epoch + 1}/{epochs}"
        with tqdm(total=n_steps, initial=self.step, desc=description, unit=" steps", disable=not progress) as bar:
            started, captions_seen, first = time.monotonic(), 0, self.step
            for images, captions in self.loader:
                loss, words = self._train_step(images, captions)
                self.totals.add(loss, words)
                self.step = first + self.loader.drawn  # a batch whose images are all broken counts, for resuming
                captions_seen += int((captions[..., 0] != IGNORE).sum())
                if self.step % self.run.print_every == 0 or self.step == n_steps:
                    log.step(self.epoch + 1, epochs, self.step, n_steps, self.totals)
                if self.step % 10 == 0 or self.step == n_steps:
                    rate = captions_seen / (time.monotonic() - started)
                    loss = self.totals.recent
                    bar.set_postfix_str(f"loss {loss:.3f}, perplexity {perplexity_of(loss):.2f}, {rate:.0f} captions/s")
                bar.update()
                self._stop_if_asked()
                if time.monotonic() - saved > 60 * self.run.save_minutes:
                    self.save_resume()
                    saved = time.monotonic()
        sampler.skip = 0
        record = {
            "epoch": self.epoch + 1,
            "train_loss": self.totals.mean,
            "train_perplexity": perplexity_of(self.totals.mean),
        }
        return record | {"lr": self.scheduler.get_last_lr()[0], "seconds": round(time.monotonic() - started, 1)}

    def _train_step(self, images: Tensor, captions: Tensor) -> tuple[float, int]:
        """One step of the optimiser; returns the batch's summed negative log-likelihood and its words."""
        images = images.to(self.device, non_blocking=True)
        captions = captions.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast()):
            logits, alphas = self.model(images, drop_words(captions, self.recipe.word_dropout, self.vocab.unk_id))
        loss = caption_loss(logits, captions, self.recipe.label_smoothing)
        objective = loss.objective / loss.words
        if self.recipe.attention_cost and alphas is not None:
            objective = objective + self.recipe.attention_cost * doubly_stochastic_penalty(alphas, captions)
        self.optimizer.zero_grad(set_to_none=True)
        objective.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        if not (objective.isfinite() & norm.isfinite()):
            self._refuse_step(objective.item(), norm.item())
        self.optimizer.step()
        self.scheduler.step()
        return loss.nll.item(), int(loss.words)

    def _refuse_step(self, loss: float, norm: float) -> None:
        batches = self.loader.batch_sampler
        batches.skip = self.step
        indices = next(iter(batches))
        samples: CaptionDataset = self.loader.dataset
        images = samples.image_of[indices] if self.recipe.group == "length" else indices
        names = [str(samples.caption_set.image_ids[i]) for i in dict.fromkeys(map(int, images))]
        raise UserError(
            f"the loss became {loss:.4g} and the norm of its gradient {norm:.4g} at step {self.step + 1} of epoch "
            f"{self.epoch + 1}, in the batch of the images {', '.join(names[:5])}{' …' if len(names) > 5 else ''}; "
            "nothing after the last save is kept: lower lr or clip, or look at these images and captions"
        )

    # --------------------------------------------------------------------------------------------- validation

    def _validate(self, progress: bool) -> dict:
        """Perplexity over the validation split, and the scores of free-running captions of its images."""
        self.val_loader.dataset.set_epoch(self.epoch)
        loss, ppl = perplexity(self.model, self.val_loader, self.device, on_batch=self._stop_if_asked)
        rules = DecodingOptions.of(self.vocab, length_penalty=self.recipe.length_penalty, max_len=self.recipe.max_len)
        found = write_captions(
            self.model, self.scored, rules, self.recipe.beam_size, self.device, on_batch=self._stop_if_asked
        )
        references = self.scored.dataset.caption_set.references()
        written = {i: self.vocab.decode(h.ids) for i, h in found.items()}
        scores = metrics.score({i: references[i] for i in written}, written).corpus
        return {
            "val_loss": loss,
            "val_perplexity": ppl,
            "scores": {name: round(scores[name], 6) for name in METRICS[:-1]},
        }

    def _finish_epoch(self, record: dict, log: TrainingLog) -> None:
        value = -record["val_loss"] if self.run.best_by == "loss" else record["scores"][self.run.best_by]
        record["best"] = value > self.best
        self.history.append(record)
        self.epoch, self.step, self.totals = self.epoch + 1, 0, Totals()
        if record["best"]:
            self.best, self.best_epoch = value, self.epoch
            self._save_model("best.safetensors", record)
        self._save_model("last.safetensors", record)
        self.save_resume()
        log.epoch(record, self.recipe.epochs, self.device)
        draw_curve(self.out / "curve.png", self.history)

    def _out_of_patience(self) -> bool:
        return bool(self.run.patience) and self.epoch - self.best_epoch >= self.run.patience

    # ------------------------------------------------------------------------------------- saving and resuming

    def _meta(self, record: dict) -> dict:
        run = {"dataset": self.run.dataset, "seed": self.run.seed, "subset": self.run.subset}
        return {"recipe": self.recipe.to_dict(), "run": run, "epoch": record["epoch"], "validation": record}

    def _save_model(self, name: str, record: dict) -> None:
        save_checkpoint(self.out / name, self.model, self.vocab, self.transform, self._meta(record))

    def checkpoint(self) -> Checkpoint:
        """The model as it is now, ready to caption."""
        return Checkpoint(self.model.eval(), self.vocab, self.transform.evaluation(), {})

    def save_resume(self) -> None:
        """Writes `resume.pt`, all that is needed to go on from this step."""
        needed = 3 * sum(p.nbytes for p in self.model.parameters())  # Adam keeps two numbers a parameter
        require_free_space(self.out, needed, f"saving {self.out / 'resume.pt'}")
        generators = {"torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.device)
        save_resume(
            self.out / "resume.pt",
            {
                "showtell": __version__,
                "recipe": self.recipe.to_dict(),
                "run": asdict(self.run),
                "data": self.data,
                "vocabulary": self.vocab.to_dict(),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "generators": generators,
                "epoch": self.epoch,
                "step": self.step,
                "totals": asdict(self.totals),
                "history": self.history,
                "best": [self.best, self.best_epoch],
            },
        )

    @classmethod
    def resume(
        cls,
        out: str | os.PathLike,
        train_set: CaptionSet | None = None,
        val_set: CaptionSet | None = None,
        **changes: object,
    ) -> Trainer:
        """Opens a stopped run where it was saved last.

        Args:
            out: the run folder.
            train_set: instead of opening the run's data set again.
            val_set: likewise for validation.
            changes: attributes of `Run` that do not change what is learnt, such as `device` or `num_workers`.

        Raises:
            UserError: the folder holds no run, or its data are not those it was begun with.
        """
        path = Path(out) / "resume.pt"
        if not path.is_file():
            raise UserError(f"{out} holds no run to resume (there is no {path}); leave --resume out to begin one")
        state = load_resume(path)
        try:
            recipe, run = Recipe(**state["recipe"]), Run(**state["run"])
        except TypeError as error:
            raise UserError(
                f"{path} was written by showtell {state['showtell']}, whose settings this one ({__version__}) does not "
                "know; go on with that version, or begin a new run with another --out"
            ) from error
        return cls(recipe, replace(run, out=str(out), **changes), train_set, val_set, state)

    def _restore(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.epoch, self.step, self.history = state["epoch"], state["step"], state["history"]
        self.totals = Totals(**state["totals"])
        self.best, self.best_epoch = state["best"]
        torch.set_rng_state(state["generators"]["torch"].cpu())
        if self.device.type == "cuda" and "cuda" in state["generators"]:
            torch.cuda.set_rng_state(state["generators"]["cuda"].cpu(), self.device)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the run after the step in hand and save it; a second one ends it at once, unsaved."""

        def note(number: int, _: object) -> None:
            self.stop_signal = number
            signal.signal(number, signal.default_int_handler)

        numbers = (signal.SIGINT, signal.SIGTERM)
        try:
            before = {number: signal.signal(number, note) for number in numbers}
        except ValueError:  # not the main thread: signals are somebody else's
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop_if_asked(self) -> None:
        """Validation changes nothing that is saved: stopped there, the epoch is resumed after its last step."""
        if self.stop_signal:
            self.save_resume()
            raise Stopped(
                f"stopped in epoch {self.epoch + 1} after step {self.step}, and saved; "
                f"to go on, type: showtell train --resume --out {shlex.quote(str(self.out))}"
            )


def seed_everything(seed: int) -> None:
    """Seeds Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _digest(*sets: CaptionSet) -> str:
    """32 characters that differ when images, captions or their order do."""
    digest = hashlib.blake2b(digest_size=16)
    for captions in sets:
        digest.update(json.dumps([captions.image_ids, captions.captions]).encode())
    return digest.hexdigest()


def drop_words(captions: Tensor, rate: float, unk_id: int) -> Tensor:
    """Hides a part of the words a decoder reads, so that it has to look at the image to go on.

    Word dropout (Bowman et al. 2016, arXiv 1511.06349): each word but `<start>` is `<unk>` with probability `rate`.

    Args:
        captions: `(…, T)`, padded with `IGNORE`, which stays.
        rate: from 0 to below 1.
        unk_id: the id of `<unk>`.
    """
    if not rate:
        return captions
    hidden = (torch.rand(captions.shape, device=captions.device) < rate) & (captions != IGNORE)
    hidden[..., 0] = False
    return captions.masked_fill(hidden, unk_id)


def doubly_stochastic_penalty(alphas: Tensor, captions: Tensor) -> Tensor:
    """Asks attention to look at every cell about once in a caption (Xu et al. 2015, eq. 14), mean over captions.

    Args:
        alphas: `(N, T-1, L)`.
        captions: `(N, T)` or `(B, K, T)`, padded with `IGNORE`, where attention does not count.
    """
    real = (captions.flatten(0, -2)[:, 1:] != IGNORE).unsqueeze(2)
    captions_with_words = real.any(1).sum().clamp(min=1)
    looked = (alphas * real).sum(1)  # (N, L)
    return ((1 - looked).square() * real.any(1)).sum() / captions_with_words


def _optimizer(model: CaptionModel, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser; a pretrained backbone that trains has its own learning rate."""
    backbone = [p for p in model.encoder.backbone.parameters() if p.requires_grad]
    others = [*model.decoder.parameters(), *model.encoder.embed.parameters()]
    groups = [{"params": others, "lr": recipe.lr}]
    if backbone:
        groups.append({"params": backbone, "lr": recipe.lr if recipe.encoder == "tiny" else recipe.backbone_lr})
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=recipe.weight_decay, fused=True)
    return torch.optim.Adam(groups, fused=True)  # one pass over the memory: a third of the time on a CPU


def _warm_cosine(step: int, warmup: int, total: int) -> float:
    """Rises in a line to 1 over the warm-up, then falls to 0 as half a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))
