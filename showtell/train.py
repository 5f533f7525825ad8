"""The training loop: validation, checkpoints, resuming.

    showtell train --dataset flickr8k --data-dir data/flickr8k --recipe flickr8k-show-tell --out runs/flickr8k

A run folder holds `best.safetensors`, `last.safetensors`, `resume.pt`, `training_log.txt`, `training_log.jsonl`,
`curve.png` and `run.json`. A run that was stopped or killed continues with `--resume`, bit for bit on the same machine.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from showtell import __version__, datasets, metrics
from showtell.backbones import uses_bfloat16
from showtell.checkpoint import Checkpoint, load_checkpoint, read_header, save_checkpoint, save_resume, start_from
from showtell.data_loader import MAX_WORDS, CaptionDataset, CaptionLoader
from showtell.datasets import CaptionSet
from showtell.decoders import IGNORE
from showtell.decoding import DecodingOptions
from showtell.errors import UserError
from showtell.evaluate import mean_loss, write_captions
from showtell.features import FeatureCache
from showtell.files import lock, require_free_space, write_json
from showtell.model import (
    CaptionModel,
    Loss,
    average_weights,
    caption_loss,
    doubly_stochastic_penalty,
    drop_words,
    feed_predictions,
    source_weights,
)
from showtell.recipes import Recipe, warm_cosine
from showtell.run import Run, damaged, digest_of_data, generator_states, read_run, seed_everything, set_generator_states
from showtell.self_critical import SelfCritical
from showtell.training_log import Totals, TrainingLog, cut_logs, draw_curve, log_sizes
from showtell.vocabulary import Vocabulary


class Stopped(Exception):
    """Ctrl-C or SIGTERM ended a run; it is saved, and the message says how to continue."""


class Trainer:
    """One run: build the model and the loaders, train, validate, save, resume.

    Attributes:
        model, vocab, transform: what is trained. recipe, run: its settings.
        average: the moving average of `model`'s weights, or `model` itself; it is validated and saved.
        history: one dict per epoch: losses, perplexities, scores, seconds.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: Run,
        train_set: CaptionSet | None = None,
        val_set: CaptionSet | None = None,
        state: dict | None = None,
    ) -> None:
        """Open the data, and build the vocabulary and the model; nothing is computed or written yet.

        Open sets replace those of the run's data set; `state` is what `resume` read from a stopped run.

        Raises:
            UserError: settings or data that cannot be used, or a run folder that holds another run.
        """
        self.recipe, self.run = recipe, run
        self.out = Path(run.out)
        self.resumed = bool(state)
        self._refuse_another_run()
        self.device = torch.device(run.device)
        self.bfloat16 = uses_bfloat16(recipe.precision, self.device)
        self.autocast = partial(torch.autocast, self.device.type, torch.bfloat16, enabled=self.bfloat16)
        seed_everything(run.seed)
        self.train_set = train_set or datasets.load(run.dataset, run.data_dir, "train")
        self.val_set = val_set or datasets.load(run.dataset, run.data_dir, "val")
        if run.subset:
            self.train_set = self.train_set.subset(run.subset, run.seed)
        self.vocab = Vocabulary.build(self.train_set.all_captions(), recipe.threshold, recipe.tokenizer)
        if recipe.condition_on_source:
            self.vocab.add_styles(self.train_set.styles)
        self_critical = recipe.objective == "self-critical"
        if self_critical and (not run.init or run.new_vocabulary):
            given = "self-critical training improves a trained model and keeps its words"
            raise UserError(f"{given}; add --init MODEL, without --new-vocabulary")
        init = load_checkpoint(run.init) if run.init and not state else None
        self._init_vocab = init and init.vocab
        if run.init and not run.new_vocabulary:  # a run that is resumed has the words of the model already
            theirs = self._init_vocab or Vocabulary.from_dict(state["vocabulary"])
            self.vocab = theirs if self_critical else theirs.extended(self.vocab)  # new words would be sampled
        self.data = digest_of_data(self.train_set, self.val_set)
        if state and (self.data, self.vocab.to_dict()) != (state.get("data"), state.get("vocabulary")):
            data = f"the images or captions of {run.data_dir or run.dataset}"
            remedy = "restore them, or start a new run with another --out"
            raise UserError(f"{data} have changed since {self.out} was started; {remedy}")
        self.transform = recipe.transform()
        self.model = CaptionModel(recipe.model_config(len(self.vocab)), None if state or run.init else run.weights)
        if init:
            start_from(self.model, self.vocab, run.init, init)
        self.model.encoder.backbone.fine_tune(recipe.layers_to_train())
        self.model.to(self.device)
        self.weights = source_weights(self.vocab, self.train_set.styles, recipe.source_weights, self.device)
        frozen = {id(p): p for p in self.model.parameters() if not p.requires_grad}  # which the average shares
        self.average = copy.deepcopy(self.model, frozen) if recipe.ema else self.model
        self._make_loaders()
        self.objective: Callable[[Tensor, Tensor], Loss] = self._cross_entropy
        if self_critical:
            samples = self.loader.dataset
            self.objective = SelfCritical(self.model.decoder, samples, recipe, self.autocast, self._cross_entropy)
        self.optimizer = _optimizer(self.model, recipe)
        self.total_steps = recipe.epochs * len(self.loader)
        self.warmup = min(recipe.warmup, self.total_steps // 10)  # a small data set must reach its learning rate
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: warm_cosine(step, self.warmup, self.total_steps)
        )
        self.epoch = self.step = 0  # the next to train; `step` counts inside the epoch
        self.totals, self.history = Totals(), []
        self._unchecked: list[tuple[int, Tensor]] = []  # the losses of the last steps, still on the device
        # A GPU computes ahead while nothing waits for it. A model that is not finite cannot sample words.
        self.check_every = 1 if self.device.type == "cpu" or self_critical or recipe.scheduled_sampling else 10
        self.best, self.best_epoch, self.stop_signal = -math.inf, 0, 0
        # A run that was killed before its first save starts again, with a new log.
        self._log_sizes: dict | None = {} if (self.out / "run.json").exists() else None
        if state:
            self._restore(state)

    @classmethod
    def resume(
        cls,
        out: str | os.PathLike,
        train_set: CaptionSet | None = None,
        val_set: CaptionSet | None = None,
        *,
        recipe: str | None = None,
        settings: dict[str, object] | None = None,
        **changes: object,
    ) -> Trainer:
        """Open a stopped run where it was last saved.

        Args:
            out: the run folder.
            train_set, val_set: used instead of opening the run's data set again.
            recipe, settings: name and settings of the recipe, if given again; they must be those of the run, except
                that `epochs` in `settings` may be larger. The learning rate then continues where a run planned with
                that number would be: after a finished run, whose rate was 0, it jumps there.
            changes: attributes of `Run`: new values for those in `MAY_CHANGE`; the others must be as in the run.

        Raises:
            UserError: the folder holds no run, its state is damaged, its data have changed, or something else than
                `MAY_CHANGE` would change.
        """
        own_recipe, run, state = read_run(out, recipe, settings, changes)
        return cls(own_recipe, run, train_set, val_set, state)

    def _make_loaders(self) -> None:
        recipe, run = self.recipe, self.run
        # Rewards need all captions of an image; self-critical training draws those of its cross-entropy itself.
        per_image = recipe.captions_per_image if recipe.objective == "cross-entropy" else 0
        scored_set = self.val_set.subset(run.val_images, run.seed) if run.val_images else self.val_set
        train = CaptionDataset(
            self.train_set, self.vocab, self.transform, "train", recipe.group, 1, run.seed, per_image
        )
        val = CaptionDataset(self.val_set, self.vocab, self.transform, "val", recipe.group)
        scored = CaptionDataset(scored_set, self.vocab, self.transform, "val", "image")
        options = {"num_workers": run.num_workers, "max_broken": run.max_broken}
        self.loader = CaptionLoader(train, recipe.batch_size, seed=run.seed, **options)
        self.val_loader = CaptionLoader(val, recipe.batch_size, shuffle=False, **options)
        self.scored_loader = CaptionLoader(scored, 100, shuffle=False, **options)

    def describe(self) -> str:
        """Return a few lines about what is trained on which data, and the `notes`."""
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.model.parameters())
        n_captions = sum(map(len, self.train_set.captions))
        config = self.model.config
        text = (
            f"{self.run.dataset}: {len(self.train_set):,} images with {n_captions:,} captions to train on, "
            f"{len(self.val_set):,} images to validate; {len(self.vocab):,} words "
            f"(threshold {self.recipe.threshold}, tokeniser {self.recipe.tokenizer})\n"
            f"{config['encoder']['backbone']} + {config['decoder']['name']}: "
            f"{trained:,} of {total:,} parameters train; "
            f"{self.recipe.epochs} epochs of {len(self.loader):,} steps on {self.device}; in {self.out}"
        )
        return "\n".join([text, *(f"note: {note}" for note in self.notes())])

    def notes(self) -> list[str]:
        """Return what to know before training: settings without effect, words kept and dropped, a shorter warm-up, …"""
        notes = self.recipe.unused_settings() + self.vocab.concerns(self.train_set.all_captions())
        if theirs := self._init_vocab:
            kept = sum(word in self.vocab for word in theirs.word2idx)
            note = f"{self.run.init} has {len(theirs):,} words: {kept:,} are kept with their weights, "
            note += f"{len(theirs) - kept:,} dropped, and {len(self.vocab) - kept:,} added"
            if not kept == len(theirs) == len(self.vocab):
                note += "; its perplexity and those of this run are over different words and cannot be compared"
            notes.append(note)
        if self.run.patience and self.epoch - self.best_epoch >= self.run.patience:
            waited = f"the run has ended after patience={self.run.patience} epochs without improvement"
            notes.append(f"{waited}; to continue it, give a larger --patience, or 0")
        if n_cut := self.loader.dataset.n_cut + self.val_loader.dataset.n_cut:
            notes.append(f"{n_cut:,} captions have over {MAX_WORDS} words and are cut to that")
        if self.warmup < (asked := self.recipe.warmup):
            notes.append(
                f"warmup={asked} is shortened to {self.warmup}, a tenth of the run's {self.total_steps:,} steps"
            )
        return notes

    def prepare(self, progress: bool = True) -> None:
        """Compute the features that the cache lacks, where frozen layers can be cached; called by `fit`."""
        recipe, run = self.recipe, self.run
        frozen = self.model.encoder.backbone.frozen_part()
        if self.loader.dataset.cache is not None or not run.features or not frozen or recipe.random_crop:
            return

        def features(mirror: bool, *caption_sets: CaptionSet) -> FeatureCache:
            transform = replace(self.transform.evaluation(), mirror=mirror)
            precision = "bfloat16" if self.bfloat16 else "float32"
            cache = FeatureCache.open(run.features, frozen, transform, precision)
            for caption_set in caption_sets:
                cache.build(caption_set, run.num_workers, self.device, progress, run.max_broken)
            return cache

        cache = features(False, self.train_set, self.val_set)
        self.loader.dataset.use_features(cache, features(True, self.train_set) if recipe.flip else None)
        self.val_loader.dataset.use_features(cache)
        self.scored_loader.dataset.use_features(cache)

    def fit(self, on_epoch: Callable[[dict], None] | None = None, progress: bool = True) -> list[dict]:
        """Train to the last epoch, or until validation has not improved for `patience` epochs.

        `on_epoch` is called after each epoch with its record, which is also in `history`.

        Raises:
            Stopped: Ctrl-C or SIGTERM came; the run is saved.
            UserError: the loss is not finite, or the folder is in use or holds another run.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(lock(self.out, "is training in"))
            self._refuse_another_run()  # one that came and ended since this one was opened
            self.prepare(progress)
            for temporary in self.out.glob(".*.tmp"):  # of a save that was killed
                temporary.unlink(missing_ok=True)
            stack.enter_context(self._signals())
            stack.callback(self.loader.close)
            if self._log_sizes is not None:
                cut_logs(self.out, self._log_sizes)
                self._log_sizes = None
            log = stack.enter_context(TrainingLog(self.out, self.recipe.to_dict() | asdict(self.run), not progress))
            write_json(self.out / "run.json", {"recipe": self.recipe.to_dict(), "run": asdict(self.run)})
            if self.history and not self.step:
                self._save_models()  # unless they are there: the last save may have been killed half way
            patience = self.run.patience or math.inf
            while self.epoch < self.recipe.epochs and self.epoch - self.best_epoch < patience:
                self._stop_if_asked()
                try:
                    record = self._train_epoch(log, progress) | self._validate()
                except (RuntimeError, OSError):
                    self._stop_if_asked()  # the signal that asked for it may have ended loader workers as well
                    raise
                self._finish_epoch(record, log)
                if on_epoch:
                    on_epoch(record)
        return self.history

    def _refuse_another_run(self) -> None:
        if self.resumed:
            return
        if (self.out / "resume.pt").exists():
            raise UserError(f"{self.out} already holds a run; add --resume to continue it, or choose another --out")
        if (self.out / "best.safetensors").exists():  # not this code's: it saves resume.pt first
            raise UserError(f"{self.out} holds the model of an older run; move it away, or choose another --out")

    def _train_epoch(self, log: TrainingLog, progress: bool) -> dict:
        sampler = self.loader.batch_sampler
        sampler.epoch, sampler.skip = self.epoch, self.step
        self.loader.dataset.set_epoch(self.epoch)
        n_steps, epochs, saved = len(self.loader), self.recipe.epochs, time.monotonic()
        self.model.train()
        description = f"epoch {self.epoch + 1}/{epochs}"
        with tqdm(total=n_steps, initial=self.step, desc=description, unit=" steps", disable=not progress) as bar:
            started, captions_seen, first = time.monotonic(), 0, self.step
            for images, captions in self.loader:
                self._train_step(images, captions)
                self.step = first + self.loader.drawn  # a batch whose images are all broken counts, for resuming
                captions_seen += int((captions[..., 0] != IGNORE).sum())
                log_now, show_now = (self.step % n == 0 or self.step == n_steps for n in (self.run.print_every, 10))
                if log_now or show_now:
                    self._check_steps()
                if log_now:
                    log.step(self.epoch + 1, epochs, self.step, n_steps, self.totals)
                if show_now:
                    rate = captions_seen / (time.monotonic() - started)
                    loss, ppl = self.totals.recent, metrics.perplexity(self.totals.recent)
                    bar.set_postfix_str(f"loss {loss:.3f}, perplexity {ppl:.2f}, {rate:.0f} captions/s")
                bar.update()
                self._stop_if_asked()
                if time.monotonic() - saved > 60 * self.run.save_minutes:
                    self.save_resume()
                    saved = time.monotonic()
        self._check_steps()
        sampler.skip = 0
        return {
            "epoch": self.epoch + 1,
            "train_loss": self.totals.mean,
            "train_perplexity": metrics.perplexity(self.totals.mean),
            **self.totals.sampled(),
            "lr": self.scheduler.get_last_lr()[0],
            "seconds": round(time.monotonic() - started, 1),
        }

    def _train_step(self, images: Tensor, captions: Tensor) -> None:
        """Take one step; on a CPU, only if loss and gradient are finite."""
        images, captions = (part.to(self.device, non_blocking=True) for part in (images, captions))
        with self.autocast():
            features = self.model.encoder(images)
        loss = self.objective(features, captions)
        self.optimizer.zero_grad(set_to_none=True)
        loss.objective.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self._unchecked.append((self.step, torch.stack([loss.objective.detach(), norm, loss.nll, loss.words])))
        if len(self._unchecked) >= self.check_every:
            self._check_steps()
        self.optimizer.step()
        self.scheduler.step()
        if self.recipe.ema:
            average_weights(self.average, self.model, self.recipe.ema, self.scheduler.last_epoch)
        if loss.rewards is not None:
            self.totals.reward += loss.rewards.sum().item()
            self.totals.samples += loss.rewards.numel()

    def _check_steps(self) -> None:
        """Add the losses of the last steps to the totals, or raise if one is not finite; waits for the device."""
        for step, (objective, norm, nll, words) in [(step, values.tolist()) for step, values in self._unchecked]:
            if not (math.isfinite(objective) and math.isfinite(norm)):
                self._refuse_step(step, objective, norm)
            self.totals.add(nll, int(words))
        self._unchecked.clear()

    def _cross_entropy(self, features: Tensor, captions: Tensor) -> Loss:
        """Return the loss of true captions, the objective as a mean over words and with the cost of the attention."""
        recipe = self.recipe
        words = drop_words(captions, recipe.word_dropout, self.vocab.unk_id)
        with self.autocast():
            if recipe.scheduled_sampling:
                rate = recipe.scheduled_sampling * self.scheduler.last_epoch / max(1, self.total_steps - 1)
                words = feed_predictions(self.model.decoder, features, words, rate)
            logits, alphas = self.model.decoder.teacher_force(features, words.flatten(0, -2))
        loss = caption_loss(logits, captions, recipe.label_smoothing, self.weights)
        objective = loss.objective / loss.words
        if recipe.attention_cost and alphas is not None:
            objective = objective + recipe.attention_cost * doubly_stochastic_penalty(alphas, captions)
        return loss._replace(objective=objective)

    def _refuse_step(self, step: int, loss: float, norm: float) -> None:
        batches = self.loader.batch_sampler
        batches.skip = step
        indices = next(iter(batches))
        samples: CaptionDataset = self.loader.dataset
        images = samples.image_of[indices] if self.recipe.group == "length" else indices
        names = [str(samples.caption_set.image_ids[i]) for i in dict.fromkeys(map(int, images))]
        raise UserError(
            f"the loss became {loss:.4g} and the norm of its gradient {norm:.4g} at step {step + 1} of epoch "
            f"{self.epoch + 1}, in the batch of the images {', '.join(names[:5])}{' …' if len(names) > 5 else ''}; "
            "nothing after the last save is kept: lower lr or clip, or check these images and captions"
        )

    def _validate(self) -> dict:
        """Return the loss over the validation split, and the scores of generated captions of its images."""
        recipe = self.recipe
        loss = mean_loss(self.average, self.val_loader, self.device, self._stop_if_asked)
        options = DecodingOptions.of(self.vocab, length_penalty=recipe.length_penalty, max_len=recipe.max_len)
        loader = self.scored_loader
        found = write_captions(self.average, loader, options, recipe.beam_size, self.device, self._stop_if_asked)
        references = loader.dataset.caption_set.references()
        captions = {i: self.vocab.decode(h.ids) for i, h in found.items()}
        scores = metrics.score({i: references[i] for i in captions}, captions).corpus
        health = metrics.health(list(captions.values()))
        return {
            "val_loss": loss,
            "val_perplexity": metrics.perplexity(loss),
            "scores": {name: round(value, 6) for name, value in scores.items() if value is not None},
            "captions": {key: round(health[key], 6) for key in ("captions", "distinct", "bad_endings", "mean_length")},
        }

    def _finish_epoch(self, record: dict, log: TrainingLog) -> None:
        value = -record["val_loss"] if self.run.best_by == "loss" else record["scores"][self.run.best_by]
        record["best"] = value > self.best
        self.history.append(record)
        self.epoch, self.step, self.totals = self.epoch + 1, 0, Totals()
        if record["best"]:
            self.best, self.best_epoch = value, self.epoch
        log.epoch(record, self.recipe.epochs, self.device)
        self.save_resume()  # first: a run that is killed before its models are written writes them when it is resumed
        self._save_models()
        draw_curve(self.out / "curve.png", self.history)

    def _save_models(self) -> None:
        """Write the model of the epoch that has just ended, as `last` and perhaps `best`, where it is not there yet."""
        record = self.history[-1]
        run = {"dataset": self.run.dataset, "seed": self.run.seed, "subset": self.run.subset}
        meta = {"recipe": self.recipe.to_dict(), "run": run, "epoch": record["epoch"], "validation": record}
        for name in ("best", "last") if record["best"] else ("last",):
            path = self.out / f"{name}.safetensors"
            if not path.exists() or read_header(path)["meta"].get("epoch") != record["epoch"]:
                save_checkpoint(path, self.average, self.vocab, self.transform, meta)

    def checkpoint(self) -> Checkpoint:
        """Return the model as it is now, ready to caption."""
        return Checkpoint(self.average.eval(), self.vocab, self.transform.evaluation(), {})

    def save_resume(self) -> None:
        """Write `resume.pt`, which holds all that is needed to continue after this step."""
        self._check_steps()
        needed = 3 * sum(p.nbytes for p in self.model.parameters())  # Adam keeps two numbers per parameter
        require_free_space(self.out, needed, f"saving {self.out / 'resume.pt'}")
        state = {"showtell": __version__, "recipe": self.recipe.to_dict(), "run": asdict(self.run)}
        state |= {"data": self.data, "vocabulary": self.vocab.to_dict(), "generators": generator_states(self.device)}
        state |= {part: getattr(self, part).state_dict() for part in self._parts()}
        state |= {"epoch": self.epoch, "step": self.step, "totals": asdict(self.totals), "log": log_sizes(self.out)}
        state |= {"history": self.history, "best": [self.best, self.best_epoch]}
        save_resume(self.out / "resume.pt", state)

    def _parts(self) -> list[str]:
        return ["model", "optimizer", "scheduler", *(["average"] if self.recipe.ema else [])]

    def _restore(self, state: dict) -> None:
        try:
            for part in self._parts():
                getattr(self, part).load_state_dict(state[part])
            self.epoch, self.step, self.history = state["epoch"], state["step"], state["history"]
            self.totals = Totals(**state["totals"])
            self.best, self.best_epoch = state["best"]
            set_generator_states(self.device, state["generators"])
            at = warm_cosine(self.scheduler.last_epoch, self.warmup, self.total_steps)
            for group, lr in zip(self.optimizer.param_groups, self.scheduler.base_lrs, strict=True):
                group["lr"] = lr * at  # as saved, unless the number of epochs has been raised
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise damaged(self.out / "resume.pt", f"{type(error).__name__}: {error}".splitlines()[0]) from error
        self._log_sizes = state.get("log")

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """On Ctrl-C or SIGTERM, end the run after the current step and save it; on a second, end at once, unsaved."""
        before = {}

        def note(number: int, _: object) -> None:
            self.stop_signal = number
            signal.signal(number, signal.default_int_handler)
            # PyTorch's handler raises wherever the program is, if the same signal ends a loader worker.
            if (child := getattr(signal, "SIGCHLD", None)) and child not in before:
                before[child] = signal.signal(child, signal.SIG_DFL)

        with contextlib.suppress(ValueError):  # not the main thread, which alone handles signals
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop_if_asked(self) -> None:
        """Save and raise if a signal came; stopped in validation, the epoch is resumed after its last step."""
        if self.stop_signal:
            self.save_resume()
            command = f"showtell train --resume --out {shlex.quote(str(self.out))}"
            where = f"epoch {self.epoch + 1} after step {self.step}"
            raise Stopped(f"stopped in {where}, and saved; to continue, type: {command}")


def _optimizer(model: CaptionModel, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the recipe's optimiser; a pretrained backbone that trains has its own learning rate."""
    backbone = [p for p in model.encoder.backbone.parameters() if p.requires_grad]
    others = [*model.decoder.parameters(), *model.encoder.embed.parameters()]
    groups = [{"params": others, "lr": recipe.lr}]
    if backbone:
        groups.append({"params": backbone, "lr": recipe.lr if recipe.encoder == "tiny" else recipe.backbone_lr})
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=recipe.weight_decay, fused=True)
    return torch.optim.Adam(groups, fused=True)  # one pass over the memory: a third of the time on a CPU
