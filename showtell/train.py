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
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from showtell import __version__, datasets, distributed, metrics
from showtell.backbones import uses_bfloat16
from showtell.checkpoint import Checkpoint, load_checkpoint, read_header, save_checkpoint, save_resume, start_from
from showtell.data_loader import MAX_WORDS, Batch, CaptionDataset, CaptionLoader
from showtell.datasets import CaptionSet
from showtell.decoders import IGNORE
from showtell.decoding import DecodingOptions
from showtell.errors import UserError
from showtell.evaluate import mean_loss, write_captions
from showtell.features import FeatureCache
from showtell.files import lock, require_free_space, write_json
from showtell.model import (
    CaptionModel,
    Counts,
    Loss,
    average_weights,
    caption_loss,
    count,
    doubly_stochastic_penalty,
    drop_words,
    feed_predictions,
    source_weights,
)
from showtell.recipes import Recipe, warm_cosine
from showtell.run import Run, damaged, digest_of_data, generator_states, read_run, seed_everything, set_generator_states
from showtell.self_critical import SelfCritical
from showtell.steps import add_up, noted_signals, optimizer_of, refuse
from showtell.training_log import Totals, TrainingLog, draw_curve, log_sizes
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
        self.rank, self.n_processes = distributed.rank(), distributed.world_size()
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
        self.objective = self._cross_entropy
        if self_critical:
            samples = self.loader.dataset
            self.objective = SelfCritical(self.model.decoder, samples, recipe, self.autocast, self._cross_entropy)
        self.optimizer = optimizer_of(self.model, recipe)
        # Resumed, as many batches per step as before, if the number of processes has changed.
        self.accumulate = math.ceil(state.get("step_batches", 1) / self.n_processes) if state else recipe.accumulate
        self.batches_per_step = self.accumulate * self.n_processes
        self.steps_per_epoch = math.ceil(self.loader.batch_sampler.n_batches() / self.batches_per_step)
        self.total_steps = recipe.epochs * self.steps_per_epoch
        self.warmup = min(recipe.warmup, self.total_steps // 10)  # a small data set must reach its learning rate
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: warm_cosine(step, self.warmup, self.total_steps)
        )
        self.epoch = self.batches = 0  # to train next; `batches` of all processes, inside the epoch
        self.totals, self.history = Totals(), []
        self._unchecked: list[tuple[int, Tensor]] = []  # the losses of the last steps, still on the device
        # A GPU computes ahead while nothing waits for it. A model that is not finite cannot sample words.
        self.check_every = 1 if self.device.type == "cpu" or self_critical or recipe.scheduled_sampling else 10
        self.best, self.best_epoch, self.stop_signal = -math.inf, 0, 0
        # A run that was killed before its first save starts again, with a new log.
        self._log_sizes: dict | None = {} if (self.out / "run.json").exists() else None
        if self.rank:  # other dropout than process 0
            torch.manual_seed(run.seed + (self.rank << 32))
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
        options |= {"rank": self.rank, "world_size": self.n_processes}
        self.loader = CaptionLoader(train, recipe.batch_size, seed=run.seed, **options)
        self.val_loader = CaptionLoader(val, recipe.batch_size, shuffle=False, **options)
        self.scored_loader = CaptionLoader(scored, 100, shuffle=False, **options)

    def describe(self) -> str:
        """Return a few lines about what is trained on which data, and the `notes`."""
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.model.parameters())
        n_captions = sum(map(len, self.train_set.captions))
        config = self.model.config
        each = f" of {self.batches_per_step} batches" if self.batches_per_step > 1 else ""
        text = (
            f"{self.run.dataset}: {len(self.train_set):,} images with {n_captions:,} captions to train on, "
            f"{len(self.val_set):,} images to validate; {len(self.vocab):,} words "
            f"(threshold {self.recipe.threshold}, tokeniser {self.recipe.tokenizer})\n"
            f"{config['encoder']['backbone']} + {config['decoder']['name']}: "
            f"{trained:,} of {total:,} parameters train; "
            f"{self.recipe.epochs} epochs of {self.steps_per_epoch:,} steps{each} on {self.device}; in {self.out}"
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
            stack.enter_context(contextlib.nullcontext() if self.rank else lock(self.out, "is training in"))
            self._refuse_another_run()  # one that came and ended since this one was opened
            self.prepare(progress)
            stack.enter_context(noted_signals(partial(setattr, self, "stop_signal")))
            stack.callback(self.loader.close)
            log = None if self.rank else stack.enter_context(self._open_log(progress))
            if self.history and not self.batches and not self.rank:
                self._save_models()  # unless they are there: the last save may have been killed half way
            patience = self.run.patience or math.inf
            while self.epoch < self.recipe.epochs and self.epoch - self.best_epoch < patience:
                self._stop_if_asked(None if self.n_processes == 1 else 0)
                try:
                    record = distributed.of_first(self._train_epoch(log, progress) | self._validate())
                except (RuntimeError, OSError):  # the signal that asked for it may have ended loader workers as well
                    self._stop_if_asked(None if self.n_processes == 1 else 0)
                    raise
                self._finish_epoch(record, log)
                if on_epoch:
                    on_epoch(record)
        return self.history

    def _open_log(self, progress: bool) -> TrainingLog:
        for temporary in self.out.glob(".*.tmp"):  # of a save that was killed
            temporary.unlink(missing_ok=True)
        log = TrainingLog(self.out, self.recipe.to_dict() | asdict(self.run), not progress, self._log_sizes)
        self._log_sizes = None
        write_json(self.out / "run.json", {"recipe": self.recipe.to_dict(), "run": asdict(self.run)})
        return log

    def _refuse_another_run(self) -> None:
        if self.resumed:
            return
        if (self.out / "resume.pt").exists():
            raise UserError(f"{self.out} already holds a run; add --resume to continue it, or choose another --out")
        if (self.out / "best.safetensors").exists():  # not this code's: it saves resume.pt first
            raise UserError(f"{self.out} holds the model of an older run; move it away, or choose another --out")

    @property
    def step(self) -> int:
        """The number of steps in this epoch so far."""
        return math.ceil(self.batches / self.batches_per_step)

    def _train_epoch(self, log: TrainingLog | None, progress: bool) -> dict:
        sampler = self.loader.batch_sampler
        sampler.epoch, sampler.skip = self.epoch, self.batches
        self.loader.dataset.set_epoch(self.epoch)
        n_steps, epochs, saved = self.steps_per_epoch, self.recipe.epochs, time.monotonic()
        self.model.train()
        description = f"epoch {self.epoch + 1}/{epochs}"
        with tqdm(total=n_steps, initial=self.step, desc=description, unit=" steps", disable=not progress) as bar:
            started, captions_seen = time.monotonic(), 0
            for batches in self.loader.steps(self.accumulate):
                counts, asked, due = None, None, not self.rank and time.monotonic() - saved > 60 * self.run.save_minutes
                if self.batches_per_step > 1:
                    *numbers, due, asked = distributed.total(*count(batches), due, self.stop_signal)
                    counts = Counts(*numbers)
                if trains := counts.batches if counts else batches:  # not if all images of a batch are broken
                    self._train_step(batches, counts)
                self.batches = min(self.batches + self.batches_per_step, sampler.n_batches())
                if not trains:
                    continue
                captions_seen += sum(int((captions[..., 0] != IGNORE).sum()) for _, captions in batches)
                log_now, show_now = (self.step % n == 0 or self.step == n_steps for n in (self.run.print_every, 10))
                if log_now or show_now:
                    self._check_steps()
                if log and log_now:
                    log.step(self.epoch + 1, epochs, self.step, n_steps, self.totals)
                if show_now:
                    rate = self.n_processes * captions_seen / (time.monotonic() - started)
                    loss, ppl = self.totals.recent, metrics.perplexity(self.totals.recent)
                    bar.set_postfix_str(f"loss {loss:.3f}, perplexity {ppl:.2f}, {rate:.0f} captions/s")
                bar.update()
                self._stop_if_asked(asked if self.n_processes > 1 else None)
                if due:
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

    def _train_step(self, batches: Sequence[Batch], counts: Counts | None = None) -> None:
        """Take a step of this or, by `counts`, several batches; on a CPU, only if loss and gradient are finite."""
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for images, captions in batches:
            images, captions = (part.to(self.device, non_blocking=True) for part in (images, captions))
            with self.autocast():
                features = self.model.encoder(images)
            loss = self.objective(features, captions, counts)
            loss.objective.backward()
            losses.append(loss._replace(objective=loss.objective.detach()))
        if isinstance(self.objective, SelfCritical):
            self.objective.idle(self.accumulate - len(batches))
        sums = add_up(self.model, losses)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self._unchecked.append((self.batches, torch.stack([sums.objective, norm, sums.nll, sums.words])))
        if len(self._unchecked) >= self.check_every:
            self._check_steps()
        self.optimizer.step()
        self.scheduler.step()
        if self.recipe.ema:
            average_weights(self.average, self.model, self.recipe.ema, self.scheduler.last_epoch)
        if isinstance(self.objective, SelfCritical):
            self.totals.reward += sums.reward.item()
            self.totals.samples += int(sums.samples)

    def _check_steps(self) -> None:
        """Add the losses of the last steps to the totals, or raise if one is not finite; waits for the device."""
        for before, (objective, norm, nll, words) in [(before, values.tolist()) for before, values in self._unchecked]:
            if not (math.isfinite(objective) and math.isfinite(norm)):
                refuse(objective, norm, self.loader, before, self.batches_per_step)
            self.totals.add(nll, int(words))
        self._unchecked.clear()

    def _cross_entropy(self, features: Tensor, captions: Tensor, counts: Counts | None = None) -> Loss:
        """Return the loss of true captions, the objective as a mean over words (`counts`) and with attention's cost."""
        recipe = self.recipe
        words = drop_words(captions, recipe.word_dropout, self.vocab.unk_id)
        with self.autocast():
            if recipe.scheduled_sampling:
                rate = recipe.scheduled_sampling * self.scheduler.last_epoch / max(1, self.total_steps - 1)
                words = feed_predictions(self.model.decoder, features, words, rate)
            logits, alphas = self.model.decoder.teacher_force(features, words.flatten(0, -2))
        loss = caption_loss(logits, captions, recipe.label_smoothing, self.weights)
        objective = loss.objective / (counts.words if counts else loss.words)
        if recipe.attention_cost and alphas is not None:
            penalty = doubly_stochastic_penalty(alphas, captions, counts.captions if counts else None)
            objective = objective + recipe.attention_cost * penalty
        return loss._replace(objective=objective)

    def _validate(self) -> dict:
        """Return the loss over the validation split, and the scores of generated captions of its images."""
        recipe = self.recipe
        if self.n_processes > 1:  # one that a signal stops below does not wait for the others to save
            self.save_resume()
        stop = partial(self._stop_if_asked, save=self.n_processes == 1)
        loss = mean_loss(self.average, self.val_loader, self.device, stop)
        options = DecodingOptions.of(self.vocab, length_penalty=recipe.length_penalty, max_len=recipe.max_len)
        loader = self.scored_loader
        found = write_captions(self.average, loader, options, recipe.beam_size, self.device, stop)
        shares = distributed.of_all_at_first({i: self.vocab.decode(h.ids) for i, h in found.items()})
        if self.rank:
            return {}  # process 0 scores the captions of all
        captions = {i: text for share in shares for i, text in share.items()}
        references = loader.dataset.caption_set.references()
        scores = metrics.score({i: references[i] for i in captions}, captions).corpus
        health = metrics.health(list(captions.values()))
        return {
            "val_loss": loss,
            "val_perplexity": metrics.perplexity(loss),
            "scores": {name: round(value, 6) for name, value in scores.items() if value is not None},
            "captions": {key: round(health[key], 6) for key in ("captions", "distinct", "bad_endings", "mean_length")},
        }

    def _finish_epoch(self, record: dict, log: TrainingLog | None) -> None:
        value = -record["val_loss"] if self.run.best_by == "loss" else record["scores"][self.run.best_by]
        record["best"] = value > self.best
        self.history.append(record)
        self.epoch, self.batches, self.totals = self.epoch + 1, 0, Totals()
        if record["best"]:
            self.best, self.best_epoch = value, self.epoch
        if log:
            log.epoch(record, self.recipe.epochs, self.device)
        self.save_resume()  # first: a run that is killed before its models are written writes them when it is resumed
        if log:
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
        generators = generator_states(self.device)
        if self.rank:
            return
        needed = 3 * sum(p.nbytes for p in self.model.parameters())  # Adam keeps two numbers per parameter
        require_free_space(self.out, needed, f"saving {self.out / 'resume.pt'}")
        state = {"showtell": __version__, "recipe": self.recipe.to_dict(), "run": asdict(self.run)}
        state |= {"data": self.data, "vocabulary": self.vocab.to_dict(), "generators": generators}
        state |= {part: getattr(self, part).state_dict() for part in self._parts()}
        state |= {"epoch": self.epoch, "step": self.batches, "totals": asdict(self.totals), "log": log_sizes(self.out)}
        state |= {"history": self.history, "best": [self.best, self.best_epoch], "step_batches": self.batches_per_step}
        save_resume(self.out / "resume.pt", state)

    def _parts(self) -> list[str]:
        return ["model", "optimizer", "scheduler", *(["average"] if self.recipe.ema else [])]

    def _restore(self, state: dict) -> None:
        try:
            for part in self._parts():
                getattr(self, part).load_state_dict(state[part])
            self.epoch, self.batches, self.history = state["epoch"], state["step"], state["history"]
            self.totals = Totals(**state["totals"])
            self.best, self.best_epoch = state["best"]
            set_generator_states(self.device, state["generators"])
            if (before := state.get("step_batches", 1)) != self.batches_per_step:
                self.scheduler.last_epoch = round(self.scheduler.last_epoch * before / self.batches_per_step)
            at = warm_cosine(self.scheduler.last_epoch, self.warmup, self.total_steps)
            for group, lr in zip(self.optimizer.param_groups, self.scheduler.base_lrs, strict=True):
                group["lr"] = lr * at  # as saved, unless the number of epochs has been raised
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise damaged(self.out / "resume.pt", f"{type(error).__name__}: {error}".splitlines()[0]) from error
        self._log_sizes = state.get("log")

    def _stop_if_asked(self, asked: float | None = None, save: bool = True) -> None:
        """Save and raise if a signal came; stopped in validation, the epoch is resumed after its last step."""
        if self.stop_signal if asked is None else asked:  # the sum over all processes, which stop together
            if save:
                self.save_resume()
                distributed.total(0)  # no process ends before the file is there
            command = f"{distributed.command()} train --resume --out {shlex.quote(str(self.out))}"
            where = f"epoch {self.epoch + 1} after step {self.step}"
            raise Stopped(f"stopped in {where}, and saved; to continue, type: {command}")
