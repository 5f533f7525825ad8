"""Training: a stopped run continues bit for bit, a killed one from its last save, and the recipe is followed."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from showtell import checkpoint as checkpoint_module
from showtell import datasets, metrics, train
from showtell import run as run_module
from showtell.checkpoint import load_checkpoint, load_resume, read_header
from showtell.data_loader import ImageBatchSampler
from showtell.datasets import CaptionSet, SyntheticSet
from showtell.decoders import DECODERS, IGNORE
from showtell.decoding import DecodingOptions, greedy
from showtell.errors import UserError
from showtell.evaluate import mean_loss
from showtell.model import caption_loss, doubly_stochastic_penalty, drop_words, feed_predictions
from showtell.recipes import Recipe
from showtell.train import Run, Stopped, Trainer
from showtell.vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden" / "losses.json"

# Dropout and augmentation are on, so that a wrong generator or epoch shows.
SMALL = Recipe(
    encoder="tiny", decoder="transformer", embed_size=16, hidden_size=16, attention_size=16, num_heads=2, dropout=0.3,
    word_dropout=0.1, resize=20, crop=16, random_crop=True, flip=True, threshold=1, group="image", batch_size=4,
    epochs=2, optimizer="adamw", lr=1e-3, warmup=3, clip=1.0, label_smoothing=0.0, max_len=12,
)  # fmt: skip
PLAIN = SMALL.with_settings({"dropout": 0, "word_dropout": 0, "random_crop": False, "flip": False})
RESNET = PLAIN.with_settings({"encoder": "resnet18", "resize": 32, "crop": 32, "decoder": "show-tell", "epochs": 1})


@pytest.fixture(autouse=True)
def one_thread():
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture
def no_curve(monkeypatch):
    monkeypatch.setattr(train, "draw_curve", lambda *_: None)


@pytest.fixture
def no_files(monkeypatch, no_curve):
    """For large backbones, whose checkpoints are not read here."""
    monkeypatch.setattr(Trainer, "_save_models", lambda *_: None)
    monkeypatch.setattr(Trainer, "save_resume", lambda _: None)


def drawn(n: int = 20, split: str = "train", captions: int = 2) -> SyntheticSet:
    """Return scenes of 16 pixels with `captions` captions each."""
    full = datasets.load("synthetic", split=split, n=n, size=16)
    return SyntheticSet(split, range(n), 16, 0, [texts[:captions] for texts in full.captions])


def trainer_in(out: Path, recipe: Recipe = SMALL, train_set=None, val_set=None, **run) -> Trainer:
    run = {"weights": None, "features": "", "print_every": 1} | run
    return Trainer(recipe, Run(out=str(out), **run), train_set or drawn(), val_set or drawn(5, "val"))


def resumed(out: Path, **changes) -> Trainer:
    torch.manual_seed(999)  # must have no effect
    return Trainer.resume(out, drawn(), drawn(5, "val"), **changes)


def before_each_step(trainer: Trainer, action) -> None:
    """Call `action` with the captions of each batch, just before the step."""
    take_step = trainer._train_step

    def step(batches, counts):
        action(batches[0][1])
        return take_step(batches, counts)

    trainer._train_step = step


def signal_at(trainer: Trainer, number: int, step: int) -> None:
    """Send this process a signal in the middle of a step of the first epoch."""
    before_each_step(
        trainer, lambda _: signal.raise_signal(number) if (trainer.epoch, trainer.step + 1) == (0, step) else None
    )


def stop_at(trainer: Trainer, step: int, number: int = signal.SIGTERM, match: str | None = None) -> str:
    """Train until a signal in a step of the first epoch; return what it prints."""
    signal_at(trainer, number, step)
    with pytest.raises(Stopped, match=match) as stopped:
        trainer.fit(progress=False)
    return str(stopped.value)


def timeless(history: list[dict]) -> list[dict]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in history]


def log_of(out: Path) -> list[dict]:
    return timeless([json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()])


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in log_of(out) if "step" in record]


def assert_same_run(one: Path, other: Path) -> None:
    """Compare log, weights, optimiser, generators and history of two run folders, bit for bit."""
    assert log_of(one) == log_of(other), "the steps after the last save are logged twice, or not again"
    a, b = load_resume(one / "resume.pt"), load_resume(other / "resume.pt")
    assert timeless(a["history"]) == timeless(b["history"])
    assert a.keys() == b.keys()
    parts = {"model", "optimizer", "scheduler", "generators", "epoch", "step", "totals", "best", "average"}
    for key in parts & a.keys():
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0, msg=lambda text, key=key: f"{key}: {text}")
    for name in ("best.safetensors", "last.safetensors"):
        weights = [load_checkpoint(out / name).model.state_dict() for out in (one, other)]
        torch.testing.assert_close(*weights, rtol=0, atol=0)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Return the folder of an uninterrupted run, made once for each recipe."""
    done: dict[Recipe, Path] = {}

    def run(recipe: Recipe) -> Path:
        if recipe not in done:
            done[recipe] = tmp_path_factory.mktemp("straight")
            trainer_in(done[recipe], recipe).fit(progress=False)
        return done[recipe]

    return run


WAYS = [
    ({"decoder": "show-tell", "group": "length", "num_layers": 2}, 0, signal.SIGINT),
    ({"decoder": "every-step", "captions_per_image": 1, "label_smoothing": 0.1, "ema": 0.9}, 0, signal.SIGTERM),
    ({"decoder": "attend", "attention_cost": 1.0, "optimizer": "adam"}, 2, signal.SIGTERM),
    ({"decoder": "transformer", "group": "length", "scheduled_sampling": 0.5}, 2, signal.SIGINT),
]


@pytest.mark.parametrize(("settings", "num_workers", "number"), WAYS, ids=[way[0]["decoder"] for way in WAYS])
def test_a_stopped_run_continues_bit_for_bit(settings, num_workers, number, straight, tmp_path, no_curve):
    recipe = SMALL.with_settings(settings)
    trainer = trainer_in(tmp_path / "a run", recipe, num_workers=num_workers)
    before = signal.getsignal(number)
    said = stop_at(trainer, 3, number, re.escape(f"showtell train --resume --out '{tmp_path / 'a run'}'"))
    assert "stopped in epoch 1 after step 3, and saved" in said
    assert signal.getsignal(number) is before
    assert len(trainer.loader) > 4, "the epoch was over before it was stopped"
    assert trainer.history == []

    again = resumed(tmp_path / "a run", num_workers=num_workers)
    assert (again.epoch, again.step, again.recipe) == (0, 3, recipe)
    again.fit(progress=False)
    assert_same_run(tmp_path / "a run", straight(recipe))


def test_workers_change_nothing(straight, tmp_path, no_curve):
    trainer_in(tmp_path, num_workers=2).fit(progress=False)
    assert_same_run(tmp_path, straight(SMALL))


def test_dropout_and_augmentation_are_on_in_these_tests(straight):
    assert losses(straight(SMALL))[0] != losses(straight(PLAIN))[0]
    assert losses(straight(SMALL)) != losses(straight(SMALL.with_settings({"flip": False})))


@pytest.mark.parametrize("where", ["mean_loss", "write_captions"])
def test_stopped_while_validating_the_epoch_is_not_trained_again(where, straight, tmp_path, monkeypatch, no_curve):
    work = getattr(train, where)

    def interrupted(*args, **options):
        signal.raise_signal(signal.SIGTERM)
        return work(*args, **options)

    trainer = trainer_in(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(train, where, interrupted)
        with pytest.raises(Stopped):
            trainer.fit(progress=False)
    assert (trainer.epoch, trainer.step, trainer.history) == (0, len(trainer.loader), [])
    again = resumed(tmp_path)
    again.fit(progress=False)
    assert_same_run(tmp_path, straight(SMALL))


def test_stopped_between_epochs(straight, tmp_path, no_curve):
    trainer = trainer_in(tmp_path)
    with pytest.raises(Stopped, match="stopped in epoch 2 after step 0"):
        trainer.fit(on_epoch=lambda _: signal.raise_signal(signal.SIGTERM), progress=False)
    resumed(tmp_path).fit(progress=False)
    assert_same_run(tmp_path, straight(SMALL))


def test_a_signal_after_the_last_epoch_finds_the_run_done(tmp_path, no_curve):
    recipe = SMALL.with_settings({"epochs": 1})
    history = trainer_in(tmp_path, recipe).fit(lambda _: signal.raise_signal(signal.SIGTERM), progress=False)
    assert len(history) == 1
    again = resumed(tmp_path)
    again._train_step = None  # it would be called
    assert again.fit(progress=False) == history


def test_a_second_signal_ends_at_once(tmp_path):
    trainer = trainer_in(tmp_path)
    signal_at(trainer, signal.SIGINT, 2)
    signal_at(trainer, signal.SIGINT, 2)  # around the first: two signals in one step
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(progress=False)
    assert not (tmp_path / "resume.pt").exists()


def test_saves_inside_an_epoch_when_it_is_time(tmp_path, no_curve, monkeypatch):
    saved_at: list[tuple[int, int]] = []
    often, never = trainer_in(tmp_path / "often", save_minutes=0), trainer_in(tmp_path / "never", save_minutes=60)
    monkeypatch.setattr(Trainer, "save_resume", lambda self: saved_at.append((self.epoch, self.step)))
    often.fit(progress=False)
    steps = range(1, len(often.loader) + 1)
    assert saved_at == [*((0, step) for step in steps), (1, 0), *((1, step) for step in steps), (2, 0)]
    saved_at.clear()
    never.fit(progress=False)
    assert saved_at == [(1, 0), (2, 0)]


def start(function: str, *args: str) -> subprocess.Popen:
    """Run a function of this file in a new process."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ["PYTHONPATH"]])
    code = f"import sys, test_train; test_train.{function}(*sys.argv[1:])"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    # A new session is a process group, as a terminal gives it.
    return subprocess.Popen([sys.executable, "-c", code, *args], env=environment, start_new_session=True, **pipes)


class SlowSet(SyntheticSet):
    def image(self, i: int) -> torch.Tensor:
        time.sleep(0.2)
        return super().image(i)


def run_until_told(out: str, num_workers: str, where: str) -> None:
    """Train, and print when it is time for a signal: in the third step, or just before the loader has to wait."""
    torch.set_num_threads(1)
    torch.multiprocessing.set_start_method("spawn")
    data = drawn()
    data.__class__ = SlowSet if where == "loader" else SyntheticSet
    trainer = trainer_in(Path(out), train_set=data, num_workers=int(num_workers))

    def wait(_):
        if trainer.step == (2 if where == "step" else 1):
            print("ready", flush=True)
            deadline = time.monotonic() + 120
            while where == "step" and not trainer.stop_signal and time.monotonic() < deadline:
                time.sleep(0.01)

    before_each_step(trainer, wait)
    try:
        trainer.fit(progress=False)
    except Stopped as stopped:
        print(stopped)


@pytest.mark.parametrize(
    ("number", "num_workers", "where"),
    [(signal.SIGTERM, 0, "step"), (signal.SIGINT, 2, "loader"), (signal.SIGTERM, 2, "step")],
    ids=["no workers", "Ctrl-C", "SIGTERM"],
)
def test_a_signal_to_all_processes_saves_the_run(number, num_workers, where, straight, tmp_path, no_curve):
    """As Ctrl-C sends in a terminal, and a batch system at its time limit; spawned workers inherit no handler."""
    second = trainer_in(tmp_path)
    with start("run_until_told", str(tmp_path), str(num_workers), where) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            with pytest.raises(UserError, match=f"process {process.pid} on .* is training in .*; wait until it ends"):
                second.fit(progress=False)
            time.sleep(0.2 if where == "loader" else 0)
            os.killpg(process.pid, number)
            printed, errors = process.communicate(timeout=120)
        finally:
            process.kill()
    assert re.search("stopped in epoch 1 after step [2-5]" if where == "loader" else "epoch 1 after step 3", printed)
    assert (process.returncode, errors) == (0, "")
    with pytest.raises(UserError, match="already holds a run; add --resume"):
        second.fit(progress=False)  # the first has ended, and its run must not be overwritten
    resumed(tmp_path).fit(progress=False)
    assert_same_run(tmp_path, straight(SMALL))


@pytest.mark.parametrize("loader", ["loader", "val_loader", "scored_loader"])
def test_a_loader_that_fails_after_a_signal_is_a_saved_stop(loader, tmp_path, no_curve):
    trainer = trainer_in(tmp_path)

    def fail():
        signal.raise_signal(signal.SIGINT)
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Interrupt.")
        yield

    getattr(trainer, loader)._collated = fail
    with pytest.raises(Stopped, match="and saved"):
        trainer.fit(progress=False)
    trainer.stop_signal = 0
    assert resumed(tmp_path).step == (0 if loader == "loader" else len(trainer.loader))


KILLS = [("step", 2), ("save", 1), ("save", 3), ("step", 4)]


def run_and_be_killed(out: str) -> None:
    """Start a run again and again; kill it the n-th time it is in a step, or half through a save."""
    torch.set_num_threads(1)
    folder = Path(out)
    next(iter(trainer_in(folder).loader))  # imports what all of them need
    for where, nth in [*KILLS, ("never", 0)]:
        reader, writer = os.pipe()
        if not (child := os.fork()):
            os.close(reader)
            status = 1
            try:
                _train_telling(folder, writer)
                status = 0
            finally:
                os._exit(status)
        os.close(writer)
        seen = 0
        while word := os.read(reader, 4).decode():
            seen += word == where
            if word == where and seen == nth:
                os.kill(child, signal.SIGKILL)
                break
        os.close(reader)
        _, status = os.waitpid(child, 0)
        print("killed" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}", where, flush=True)
        if (folder / "resume.pt").exists():
            load_resume(folder / "resume.pt")  # whole, or this raises


def _train_telling(folder: Path, writer: int) -> None:
    """Train, saving at every step; write where it is, and stay there for a moment."""
    begun = (folder / "resume.pt").exists()
    trainer = resumed(folder) if begun else trainer_in(folder, save_minutes=0)
    torch_save = torch.save

    def tell(where: bytes) -> None:
        os.write(writer, where)
        time.sleep(0.03)

    def slow_save(value, path):
        torch_save(value, path)
        size = path.stat().st_size
        os.truncate(path, size // 2)
        tell(b"save")
        torch_save(value, path)

    before_each_step(trainer, lambda _: tell(b"step"))
    torch.save = slow_save
    trainer.fit(progress=False)


def test_killed_in_steps_and_saves_the_run_ends_as_if_nothing_happened(straight, tmp_path):
    with start("run_and_be_killed", str(tmp_path)) as process:
        printed, _ = process.communicate(timeout=300)
    ends = [line for line in printed.splitlines() if not line.startswith("Epoch")]
    assert ends == [*(f"killed {where}" for where, _ in KILLS), "exit 0 never"]
    assert_same_run(tmp_path, straight(SMALL))
    assert len((tmp_path / "training_log.txt").read_text().splitlines()) == len(log_of(tmp_path))
    assert list(tmp_path.glob(".*.tmp")) == [], "half a save was left behind"


def die_in_every_rename(out: str) -> None:
    """Start seven runs; kill the n-th when it gives the n-th file its name."""
    torch.set_num_threads(1)
    rename, calls = os.replace, iter(range(1, 8))

    def rename_or_die(*names: str) -> None:
        os._exit(9) if next(calls) == nth else rename(*names)

    for nth in range(1, 8):
        if not os.fork():
            os.replace = rename_or_die
            trainer_in(Path(out) / str(nth)).fit(progress=False)
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 9


def test_killed_in_its_first_save_a_run_is_resumed_or_started_again(straight, tmp_path):
    with start("die_in_every_rename", str(tmp_path)) as process:
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    found = {}
    for folder in sorted(tmp_path.iterdir()):
        files = [path.name for path in folder.iterdir() if path.suffix in (".json", ".pt", ".safetensors")]
        found[int(folder.name)] = {name.partition(".")[0] for name in files}
        trainer = resumed(folder) if "resume.pt" in files else trainer_in(folder)
        trainer.fit(progress=False)
        assert_same_run(folder, straight(SMALL))
    assert [found[nth] for nth in range(1, 5)] == [
        set(), {"run"}, {"run", "resume"}, {"run", "resume", "best"}
    ]  # fmt: skip


def test_a_disk_that_is_full_at_the_first_save_does_not_spoil_the_folder(straight, tmp_path, monkeypatch, no_curve):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    for name in ("save_resume", "save_checkpoint"):
        with monkeypatch.context() as patch:
            patch.setattr(train, name, full)
            with pytest.raises(OSError, match="No space left"):
                trainer_in(tmp_path).fit(progress=False)
    resumed(tmp_path).fit(progress=False)
    assert_same_run(tmp_path, straight(SMALL))


@pytest.mark.parametrize("failing", ["torch.save", "os.replace", "shutil.disk_usage"])
def test_a_save_that_fails_leaves_the_old_one_whole(failing, tmp_path, monkeypatch, no_curve):
    trainer = trainer_in(tmp_path)
    stop_at(trainer, 2)
    old = (tmp_path / "resume.pt").read_bytes()

    def half_written(_, path):
        Path(path).write_bytes(old[:1000])
        raise OSError(28, "No space left on device")

    again = resumed(tmp_path)
    again.batches = 7
    message = "No space left"
    if failing == "torch.save":
        monkeypatch.setattr(torch, "save", half_written)
    elif failing == "os.replace":
        monkeypatch.setattr(os, "replace", lambda *_: half_written(None, tmp_path / "elsewhere"))
    else:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        message = r"saving .*resume.pt needs .* has 1000 bytes free"
    with pytest.raises((OSError, UserError), match=message):
        again.save_resume()
    assert (tmp_path / "resume.pt").read_bytes() == old
    assert list(tmp_path.glob(".*.tmp")) == []
    assert resumed(tmp_path).step == 2


def test_a_folder_with_a_run_is_refused(straight, tmp_path):
    with pytest.raises(UserError, match="already holds a run; add --resume to continue it, or choose another --out"):
        trainer_in(straight(SMALL))
    (tmp_path / "best.safetensors").write_bytes(b"the only copy")
    with pytest.raises(UserError, match="holds the model of an older run; move it away, or choose another --out"):
        trainer_in(tmp_path)


def test_a_run_of_another_version_is_not_resumed(straight, tmp_path):
    state = load_resume(straight(SMALL) / "resume.pt")
    state["recipe"]["cleverness"] = 11
    state["showtell"] = "9.9"
    checkpoint_module.save_resume(tmp_path / "resume.pt", state)
    message = r"is of showtell 9\.9, with settings that this one \(.*\) does not know; resume with"
    with pytest.raises(UserError, match=message):
        resumed(tmp_path)


@pytest.mark.parametrize("run_json", ["{}", "[3]", "no json", '{"recipe": {"epochs": "x"}, "run": 4}'])
def test_run_json_is_not_needed_to_resume(run_json, straight, tmp_path):
    shutil.copytree(straight(SMALL), tmp_path, dirs_exist_ok=True)
    (tmp_path / "run.json").write_text(run_json)
    assert resumed(tmp_path, recipe=None, settings={"epochs": "2"}, patience=3).run.patience == 3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("recipe", None), ("run", None), ("model", None), ("model", {"x": 1}), ("optimizer", {}), ("scheduler", 3),
        ("generators", {}), ("totals", {"nll": 1, "x": 2}), ("best", 3), ("epoch", None),
    ],
)  # fmt: skip
def test_a_damaged_state_is_one_sentence(key, value, straight, tmp_path):
    state = load_resume(straight(SMALL) / "resume.pt")
    state[key] = value
    if value is None:
        del state[key]
    checkpoint_module.save_resume(tmp_path / "resume.pt", state)
    with pytest.raises(UserError, match=r"resume\.pt is damaged \(.*\); restore it from a copy, or start a") as error:
        resumed(tmp_path)
    assert "\n" not in str(error.value)


def test_what_may_change_when_a_run_is_resumed(straight):
    out = straight(SMALL)
    new = {"num_workers": 2, "patience": 5, "features": "x", "print_every": 7, "save_minutes": 1.0, "max_broken": 3}
    run = resumed(out, **new, seed=0, settings={"lr": "1e-3"}).run
    assert {name: getattr(run, name) for name in new} == new
    for changes, named in (
        ({"settings": {"epochs": 1}}, "epochs from 2 to 1"),
        ({"settings": {"epochs": 9, "lr": 1}}, "lr from 0.001 to 1"),
        ({"recipe": "demo"}, "epochs from 2 to 6"),  # a longer run has to be asked for
        ({"recipe": "demo", "settings": {"epochs": 2}}, "embed_size from 16 to 128"),
        ({"seed": 4, "best_by": "loss"}, "seed from 0 to 4, best_by from CIDEr to loss"),
        ({"weights": "x.pth"}, "weights from None to x.pth"),
    ):
        message = rf"--resume continues with .* would change .*{named}.*; leave them out, or"
        with pytest.raises(UserError, match=message):
            resumed(out, **changes)


def test_nothing_to_resume(tmp_path):
    with pytest.raises(UserError, match=r"holds no run to resume .*leave --resume out to start one"):
        Trainer.resume(tmp_path)


def changed(captions: CaptionSet, change: str) -> CaptionSet:
    texts = [list(own) for own in captions.captions]
    if change == "a zebra":
        texts[0][0] = "zebra"
    if change == "a new word":
        texts[3][0] += " zebra"
    elif change == "the same words in another order":
        texts[3].reverse()
    indices = captions.indices
    if change == "one image fewer":
        indices, texts = indices[1:], texts[1:]
    return SyntheticSet(captions.split, indices, 16, 0, texts)


@pytest.mark.parametrize("change", ["a new word", "the same words in another order", "one image fewer"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_changed_data_are_not_resumed(change, split, straight):
    sets = {"train": drawn(), "val": drawn(5, "val")}
    assert Trainer.resume(straight(SMALL), *sets.values()).epoch == SMALL.epochs
    sets[split] = changed(sets[split], change)
    with pytest.raises(UserError, match=r"have changed since .* was started; restore them, or start a new"):
        Trainer.resume(straight(SMALL), *sets.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"best_by": "beauty"}, "best_by='beauty' is not known; choose one of Bleu_1"),
        ({"print_every": 0}, "print_every=0 is too low; give 1 or more"),
        ({"patience": -1}, "patience=-1 is too low; give 0 or more"),
        ({"num_workers": -1}, "num_workers=-1 is too low"),
        ({"save_minutes": float("nan")}, "save_minutes=nan is too low"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Run(**settings)


def on_disk(folder: Path, scenes: SyntheticSet, *broken: int) -> CaptionSet:
    """Return the same images as files with ids 100, 101, …; some are broken."""
    folder.mkdir(exist_ok=True)
    names = [f"{i:03d}.png" for i in range(len(scenes))]
    for i, name in enumerate(names):
        Image.fromarray(scenes.image(i).permute(1, 2, 0).numpy()).save(folder / name)
        if i in broken:
            (folder / name).write_text("no image")
    return CaptionSet("folder", scenes.split, list(range(100, 100 + len(scenes))), scenes.captions, names, folder)


@pytest.mark.filterwarnings("ignore:left out")
def test_broken_images_are_left_out_up_to_a_limit(tmp_path, no_curve):
    data = on_disk(tmp_path / "train", drawn(12), 0, 7), on_disk(tmp_path / "val", drawn(5, "val"), 2)
    trainer = trainer_in(tmp_path / "run", PLAIN.with_settings({"epochs": 1}), *data, max_broken=2)
    (record,) = trainer.fit(progress=False)
    assert math.isfinite(record["val_loss"])
    assert [Path(path).name for path in sorted(trainer.loader.broken)] == ["000.png", "007.png"]
    assert trainer.scored_loader.max_broken == 2
    with pytest.raises(UserError, match="2 images cannot be read, more than the 1 allowed") as error:
        trainer_in(tmp_path / "other", PLAIN, *data, max_broken=1).fit(progress=False)
    assert all(name in str(error.value) for name in ("000.png", "007.png"))


@pytest.mark.filterwarnings("ignore:left out")
def test_a_batch_without_a_readable_image_is_not_counted_twice_when_resuming(tmp_path, no_curve):
    recipe = SMALL.with_settings({"batch_size": 1})
    second = list(ImageBatchSampler(6, 1))[1][0]
    data = on_disk(tmp_path / "train", drawn(6), second), drawn(5, "val")
    trainer_in(tmp_path / "straight", recipe, *data).fit(progress=False)
    trainer = trainer_in(tmp_path / "stopped", recipe, *data)
    stop_at(trainer, 3, match="after step 3")
    torch.manual_seed(999)
    Trainer.resume(tmp_path / "stopped", *data).fit(progress=False)
    assert_same_run(tmp_path / "stopped", tmp_path / "straight")
    assert len(losses(tmp_path / "stopped")) == 2 * 5


def tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("cached", [False, True])
def test_a_frozen_backbone_never_changes(cached, tmp_path, no_files):
    trainer = trainer_in(tmp_path / "run", RESNET, features=str(tmp_path / "features") if cached else "")
    before = tensors(trainer)
    trainer.fit(progress=False)
    changed = moved(before, tensors(trainer))
    assert not [name for name in changed if name.startswith("encoder.backbone")]
    assert {"encoder.embed.weight", "encoder.embed.bias", "decoder.embed.weight", "decoder.linear.weight"} <= changed
    assert any(name.endswith("running_mean") for name in before), "there is no batch norm to watch"
    assert (tmp_path / "features").exists() == cached


@pytest.mark.parametrize("fine_tune", ["layer4", "layer1, layer3", "all"])
def test_fine_tuning_moves_the_named_layers_at_their_own_rate(fine_tune, tmp_path, no_files):
    settings = {"fine_tune": fine_tune, "backbone_lr": 1e-6, "lr": 1e-3, "batch_size": 8, "warmup": 0, "clip": 1e9}
    trainer = trainer_in(tmp_path / "run", RESNET.with_settings(settings), drawn(8))
    assert len(trainer.loader) == 1
    before = tensors(trainer)
    trainer.fit(progress=False)
    after = tensors(trainer)
    backbone = {name for name in moved(before, after) if name.startswith("encoder.backbone")}
    layers = ("",) if fine_tune == "all" else tuple(fine_tune.split(", "))
    own = {name for name, _ in trainer.model.encoder.backbone.net.named_parameters() if name.startswith(layers)}
    assert backbone == {f"encoder.backbone.net.{name}" for name in own}  # batch norm's statistics are no parameters
    # Adam's first step is the learning rate, for any gradient.
    steps = [(after[name] - before[name]).abs().max() for name in backbone]
    assert max(steps).item() == pytest.approx(1e-6, rel=0.2)
    embed = after["encoder.embed.weight"] - before["encoder.embed.weight"]
    assert embed.abs().max().item() == pytest.approx(1e-3, rel=0.01)


def test_the_tiny_backbone_trains_whole_at_the_full_rate(tmp_path, no_curve):
    trainer = trainer_in(tmp_path, PLAIN.with_settings({"epochs": 1, "backbone_lr": 1e-9}))
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {PLAIN.lr}
    before = tensors(trainer)
    trainer.fit(progress=False)
    names = {f"encoder.backbone.net.{name}" for name, _ in trainer.model.encoder.backbone.net.named_parameters()}
    assert names <= moved(before, tensors(trainer))


@pytest.mark.parametrize("new_vocabulary", [False, True])
def test_a_run_can_start_from_a_trained_model(new_vocabulary, straight, tmp_path):
    first = straight(SMALL) / "best.safetensors"
    data = changed(drawn(3), "a zebra")
    trainer = trainer_in(tmp_path, init=str(first), train_set=data, seed=7, new_vocabulary=new_vocabulary)
    before = load_checkpoint(first)
    own = Vocabulary.build(data.all_captions(), 1)
    theirs = list(before.vocab.word2idx)
    kept = [word for word in theirs if word in own] if new_vocabulary else theirs
    assert trainer.vocab == (own if new_vocabulary else Vocabulary([*theirs, "zebra"], 1))
    counts = f"has {len(theirs)} words: {len(kept)} are kept with their weights, {len(theirs) - len(kept)} dropped"
    (note,) = (note for note in trainer.notes() if str(first) in note)
    assert f"{counts}, and 1 added; its perplexity and those of this run are over different words" in note
    torch.testing.assert_close(trainer.model.encoder.state_dict(), before.model.encoder.state_dict(), rtol=0, atol=0)
    word = next(word for word in before.vocab.word2idx if word.isalpha())
    new, old = trainer.model.decoder.embed.weight, before.model.decoder.embed.weight
    assert torch.equal(new[trainer.vocab.word2idx[word]], old[before.vocab.word2idx[word]])


def test_the_note_of_a_run_with_the_same_words_does_not_mention_perplexities(straight, tmp_path):
    trainer = trainer_in(tmp_path, init=str(straight(SMALL) / "best.safetensors"))
    (note,) = (note for note in trainer.notes() if "are kept" in note)
    assert note.endswith("0 dropped, and 0 added")


def test_a_run_that_started_from_a_model_is_resumed_without_it(straight, tmp_path, no_curve):
    model = shutil.copy(straight(SMALL) / "best.safetensors", tmp_path)
    sets = drawn(12), drawn(3, "val")
    stop_at(trainer_in(tmp_path / "run", SMALL, *sets, init=model), 2)
    Path(model).unlink()
    trainer = Trainer.resume(tmp_path / "run", *sets)
    assert len(trainer.vocab) > len(Vocabulary.build(sets[0].all_captions(), 1)), "the words of the model are gone"
    trainer.fit(progress=False)
    assert trainer.epoch == SMALL.epochs


def test_new_vocabulary_needs_a_model_to_start_from():
    with pytest.raises(UserError, match="add --init MODEL, or leave it out"):
        Run(new_vocabulary=True)


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_can_be_extended(finished, straight, tmp_path, no_curve):
    """Its learning rates are from then on those of a run that was planned with as many epochs."""
    rates: list[float] = []

    def record(trainer: Trainer) -> Trainer:
        before_each_step(trainer, lambda _: rates.append(trainer.optimizer.param_groups[0]["lr"]))
        return trainer

    longer = SMALL.with_settings({"epochs": SMALL.epochs + 2})
    record(trainer_in(tmp_path / "planned", longer)).fit(progress=False)
    planned, rates[:] = list(rates), []
    if finished:
        shutil.copytree(straight(SMALL), tmp_path / "run")
    else:
        stop_at(trainer_in(tmp_path / "run"), 3)
    done = load_resume(tmp_path / "run" / "resume.pt")["scheduler"]["last_epoch"]
    history = record(resumed(tmp_path / "run", settings={"epochs": longer.epochs})).fit(progress=False)
    assert rates == planned[done:]
    assert max(rates) > SMALL.lr / 4, "a run that is at the end of its schedule learns nothing"
    assert len(history) == longer.epochs
    assert resumed(tmp_path / "run").recipe == longer


def test_an_unknown_layer_is_named(tmp_path):
    with pytest.raises(UserError, match="resnet18 has no layer 'layer9' to fine-tune; choose from conv1"):
        trainer_in(tmp_path, RESNET.with_settings({"fine_tune": "layer9"}))


@pytest.mark.parametrize(
    ("decoder", "fine_tune", "flip"),
    [
        ("show-tell", "", False),
        ("attend", "", True),
        ("top-down", "layer4", True),
        ("show-tell", "layer3,layer4", False),
    ],
)
def test_training_from_the_cache_equals_training_from_images(decoder, fine_tune, flip, tmp_path, no_files):
    recipe = RESNET.with_settings({"decoder": decoder, "dropout": 0.3, "resize": 64, "crop": 64, "lr": 5e-3})
    recipe = recipe.with_settings({"fine_tune": fine_tune, "backbone_lr": 1e-3, "flip": flip})
    data = drawn(12), drawn(3, "val")
    cached = trainer_in(tmp_path / "cached", recipe, *data, features=str(tmp_path / "features"))
    assert not (tmp_path / "features").exists(), "constructing a Trainer computes no features"
    (from_cache,) = cached.fit(progress=False)
    assert cached.loader.dataset.cache is not None
    fresh = trainer_in(tmp_path / "fresh", recipe, *data)
    (from_images,) = fresh.fit(progress=False)
    assert fresh.loader.dataset.cache is None
    assert len(losses(tmp_path / "cached")) == len(cached.loader)
    close = 1e-3 if fine_tune else 1e-4  # the cache's half precision, which layers that train carry on
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "fresh"), rel=close)
    assert from_cache["val_loss"] == pytest.approx(from_images["val_loss"], rel=close)


def test_a_run_from_the_cache_is_resumed_bit_for_bit_and_computes_nothing_again(tmp_path, no_curve):
    recipe = RESNET.with_settings({"dropout": 0.3})
    features = str(tmp_path / "features")
    trainer_in(tmp_path / "straight", recipe, features=features).fit(progress=False)
    (rows,) = (tmp_path / "features").rglob("features.f16")
    size = rows.stat().st_size
    trainer = trainer_in(tmp_path / "stopped", recipe, features=features)
    stop_at(trainer, 2)
    resumed(tmp_path / "stopped").fit(progress=False)
    assert_same_run(tmp_path / "stopped", tmp_path / "straight")
    assert list((tmp_path / "features").rglob("features.f16")) == [rows]
    assert rows.stat().st_size == size


@pytest.mark.parametrize("settings", [{"fine_tune": "all"}, {"resize": 36, "random_crop": True}])
def test_nothing_is_cached_where_all_layers_train_or_crops_are_random(settings, tmp_path):
    trainer = trainer_in(tmp_path, RESNET.with_settings(settings), features=str(tmp_path / "features"))
    trainer.prepare()
    assert trainer.loader.dataset.cache is None
    assert not (tmp_path / "features").exists()


@pytest.mark.parametrize("decoder", DECODERS)
def test_both_groupings_give_the_same_loss_when_the_weights_stay(decoder, tmp_path, no_files):
    recipe = PLAIN.with_settings({"decoder": decoder, "lr": 1e-30, "epochs": 1})
    uneven = [texts[: 1 + i % 3] for i, texts in enumerate(drawn(10, captions=3).captions)]
    data = SyntheticSet("train", range(10), 16, 0, uneven)
    records = [
        trainer_in(tmp_path / group, recipe.with_settings({"group": group}), data).fit(progress=False)[0]
        for group in ("length", "image")
    ]
    for name in ("train_loss", "val_loss"):
        assert records[0][name] == pytest.approx(records[1][name], rel=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_mixed_precision_trains_single_precision_weights(precision, straight, tmp_path, no_curve):
    trainer = trainer_in(tmp_path, PLAIN.with_settings({"precision": precision}))
    trainer.fit(progress=False)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert (losses(tmp_path) == losses(straight(PLAIN))) == (precision == "float32")
    assert losses(tmp_path) == pytest.approx(losses(straight(PLAIN)), rel=0.02)


@pytest.mark.parametrize(("capability", "native"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_precision_auto_asks_this_runs_gpu_for_bfloat16_in_hardware(capability, native, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)  # by emulation
    of_device = {torch.device("cuda:1"): capability, torch.device("cuda:0"): (8, 0) if not native else (7, 5)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", of_device.__getitem__)
    assert train.uses_bfloat16("auto", torch.device("cuda:1")) == native
    assert train.uses_bfloat16("bfloat16", torch.device("cuda:1"))
    assert not train.uses_bfloat16("float32", torch.device("cuda:1"))
    assert not train.uses_bfloat16("auto", torch.device("cpu"))


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_the_random_numbers_of_any_device_are_saved_and_restored(kind, monkeypatch):
    device, state, restored = torch.device(kind, 0), torch.arange(5, dtype=torch.uint8), []
    module = getattr(torch, kind)
    monkeypatch.setattr(module, "get_rng_state", lambda of: state if of == device else None)
    monkeypatch.setattr(module, "set_rng_state", lambda value, of: restored.append((value.tolist(), of)))
    (states,) = run_module.generator_states(device)
    assert states.keys() == {"torch", kind}
    numbers = torch.rand(3)
    run_module.set_generator_states(device, [states])
    assert restored == [(state.tolist(), device)]
    assert torch.equal(torch.rand(3), numbers)
    run_module.set_generator_states(torch.device("cpu"), [states])  # a run may continue on another device
    run_module.set_generator_states(device, run_module.generator_states(torch.device("cpu")))
    assert len(restored) == 1


def padded_captions() -> torch.Tensor:
    """(2, 2, 6): two captions an image, of 6, 4, 3 and no words."""
    captions = torch.tensor([[0, 5, 6, 7, 8, 1], [0, 9, 4, 1] + [IGNORE] * 2, [0, 3, 1] + [IGNORE] * 3, [IGNORE] * 6])
    return captions.view(2, 2, 6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("image_step", [0, 1])
def test_the_loss_is_torchs_cross_entropy(smoothing, image_step):
    captions = padded_captions()
    logits = torch.randn(4, 5 + image_step, 10, requires_grad=True)
    loss = caption_loss(logits, captions, smoothing)
    arguments = (logits[:, image_step:].flatten(0, 1), captions.flatten(0, 1)[:, 1:].flatten())
    expected = F.cross_entropy(*arguments, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing)
    assert loss.objective.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.nll.item() == pytest.approx(F.cross_entropy(*arguments, reduction="sum").item(), rel=1e-5)
    assert int(loss.words) == 5 + 3 + 2
    gradients = [torch.autograd.grad(value, logits, retain_graph=True) for value in (loss.objective, expected)]
    torch.testing.assert_close(*gradients)


def test_hidden_words():
    captions = torch.randint(3, 50, (400, 2, 6))
    captions[..., 0], captions[::2, 1, 3:] = 0, IGNORE
    assert drop_words(captions, 0.0, 2) is captions
    dropped = drop_words(captions, 0.3, 2)
    assert torch.equal(dropped == IGNORE, captions == IGNORE)
    assert (dropped[..., 0] == 0).all()
    hidden = dropped != captions
    assert (dropped[hidden] == 2).all()
    assert hidden.sum().item() / (captions[..., 1:] != IGNORE).sum().item() == pytest.approx(0.3, abs=0.03)


def test_words_are_hidden_from_the_decoder_and_not_from_the_loss(tmp_path):
    trainer = trainer_in(tmp_path, PLAIN.with_settings({"word_dropout": 0.5}))
    images, captions = next(iter(trainer.loader))
    torch.manual_seed(1)
    with torch.no_grad():
        logits, _ = trainer.model(images, drop_words(captions, 0.5, trainer.vocab.unk_id))
    torch.manual_seed(1)
    trainer._train_step([(images, captions)])
    assert trainer.totals.nll == pytest.approx(caption_loss(logits, captions).nll.item())
    assert trainer.totals.words == (captions[..., 1:] >= 0).sum()


@pytest.mark.parametrize("decoder", ["show-tell", "attend"])
def test_scheduled_sampling_feeds_the_models_own_predictions(decoder, tmp_path):
    trainer = trainer_in(tmp_path, PLAIN.with_settings({"decoder": decoder}))
    images, captions = next(iter(trainer.loader))
    captions[:2, 1] = IGNORE
    decoder, features = trainer.model.decoder, trainer.model.encoder(images)
    assert torch.equal(feed_predictions(decoder, features, captions, 0.0), captions)
    decoder.linear.bias.data[5] = 40.0  # a model that is sure of one word
    fed = feed_predictions(decoder, features, captions, 1.0)
    real = captions != IGNORE
    real[..., 0] = False
    assert (fed[real] == 5).all()
    assert torch.equal(fed[~real], captions[~real])
    many = captions.repeat(1, 40, 1)
    changed = feed_predictions(decoder, features, many, 0.3)[real.repeat(1, 40, 1)] == 5
    assert changed.float().mean().item() == pytest.approx(0.3, abs=0.05)


def test_predictions_are_those_after_the_true_words_before(tmp_path):
    trainer = trainer_in(tmp_path, PLAIN.with_settings({"decoder": "transformer"}))
    images, captions = next(iter(trainer.loader))
    trainer.model.decoder.linear.weight.data *= 1e4  # one word has all the probability
    features = trainer.model.encoder(images)
    logits, _ = trainer.model.decoder.teacher_force(features, captions.flatten(0, 1))
    fed = feed_predictions(trainer.model.decoder, features, captions, 1.0).flatten(0, 1)[:, 1:]
    real = captions.flatten(0, 1)[:, 1:] != IGNORE
    assert torch.equal(fed[real], logits.argmax(-1)[real])


def test_scheduled_sampling_rises_over_the_run_and_is_off_by_default(tmp_path, monkeypatch, no_curve):
    rates = []
    monkeypatch.setattr(train, "feed_predictions", lambda *args: rates.append(args[3]) or args[2])
    trainer_in(tmp_path / "off", PLAIN).fit(progress=False)
    assert rates == []
    trainer = trainer_in(tmp_path / "on", PLAIN.with_settings({"scheduled_sampling": 0.5}))
    trainer.fit(progress=False)
    n = trainer.total_steps
    assert rates == pytest.approx([0.5 * step / (n - 1) for step in range(n)])
    assert losses(tmp_path / "on") == losses(tmp_path / "off"), "the pass for the predictions changes the loss"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_parameter_learns_from_predicted_words(precision, tmp_path):
    """Autocast must not reuse weights that it has converted without gradient."""
    recipe = SMALL.with_settings({"decoder": "show-tell", "scheduled_sampling": 0.9, "precision": precision})
    trainer = trainer_in(tmp_path, recipe)
    trainer.scheduler.last_epoch = trainer.total_steps - 1
    trainer._train_step([next(iter(trainer.loader))])
    assert not [name for name, p in trainer.model.named_parameters() if p.grad is None or not p.grad.any()]


def test_the_average_of_the_weights_is_validated_and_saved(tmp_path, no_curve):
    recipe = RESNET.with_settings({"decoder": "show-tell", "batch_norm": True, "ema": 0.6, "tie_embeddings": True})
    trainer = trainer_in(tmp_path, recipe, drawn(20))
    expected = tensors(trainer)
    step, take_step = 0, trainer._train_step

    def averaged(*batch):
        nonlocal step
        result = take_step(*batch)
        step += 1
        decay = min(0.6, (1 + step) / (10 + step))
        for name, new in trainer.model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * new if new.is_floating_point() else new.clone()
        return result

    trainer._train_step = averaged
    (record,) = trainer.fit(progress=False)
    saved = load_checkpoint(tmp_path / "last.safetensors").model
    torch.testing.assert_close(saved.state_dict(), expected, rtol=1e-4, atol=1e-6)
    assert moved(tensors(trainer), saved.state_dict()) > {"decoder.embed.weight", "encoder.embed.1.running_mean"}
    assert record["val_loss"] == pytest.approx(mean_loss(saved, trainer.val_loader))
    assert record["val_loss"] != pytest.approx(mean_loss(trainer.model, trainer.val_loader), rel=1e-4)
    frozen = {p.data_ptr() for p in trainer.model.parameters() if not p.requires_grad}
    both = [{p.data_ptr() for p in model.parameters()} for model in (trainer.model, trainer.average)]
    assert frozen == both[0] & both[1]


def test_without_an_average_there_is_no_second_model(tmp_path):
    trainer = trainer_in(tmp_path, PLAIN)
    assert trainer.average is trainer.model


def test_doubly_stochastic_penalty_against_a_plain_loop():
    captions = padded_captions()
    alphas = torch.rand(4, 5, 7).softmax(-1)
    total, counted = 0.0, 0
    for n, caption in enumerate(captions.flatten(0, 1).tolist()):
        words = [t for t in range(5) if caption[t + 1] != IGNORE]
        if not words:
            continue
        counted += 1
        for cell in range(7):
            total += (1 - sum(alphas[n, t, cell].item() for t in words)) ** 2
    assert counted == 3
    assert doubly_stochastic_penalty(alphas, captions).item() == pytest.approx(total / counted, rel=1e-5)


def test_the_attention_cost_is_added_to_the_objective(tmp_path):
    gradients = []
    for cost in (0.0, 2.0):
        recipe = PLAIN.with_settings({"decoder": "attend", "attention_cost": cost, "clip": 1e9})
        trainer = trainer_in(tmp_path / str(cost), recipe)
        images, captions = next(iter(trainer.loader))
        trainer._train_step([(images, captions)])
        gradients.append(trainer.model.decoder.attention.query.weight.grad.clone())
    trainer = trainer_in(tmp_path / "fresh", recipe)
    _, alphas = trainer.model(images, captions)
    (2 * doubly_stochastic_penalty(alphas, captions)).backward()
    torch.testing.assert_close(gradients[1] - gradients[0], trainer.model.decoder.attention.query.weight.grad)


def test_the_log_has_the_loss_of_the_words_before_the_step(tmp_path, no_curve):
    recipe = PLAIN.with_settings({"label_smoothing": 0.3, "epochs": 1})
    trainer = trainer_in(tmp_path, recipe)
    with torch.no_grad():
        images, captions = next(iter(trainer.loader))
        logits, _ = trainer.model(images, captions)
    targets = captions.flatten(0, 1)[:, 1:]
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE).item()
    (record,) = trainer.fit(progress=False)
    assert losses(tmp_path)[0] == pytest.approx(expected, rel=1e-5)
    assert record["train_perplexity"] == pytest.approx(math.exp(record["train_loss"]))


def test_the_epochs_loss_weighs_words_not_batches(tmp_path, no_curve):
    trainer = trainer_in(tmp_path, PLAIN.with_settings({"group": "length", "epochs": 1}))
    sizes: list[int] = []
    before_each_step(trainer, lambda captions: sizes.append(int((captions[:, 1:] != IGNORE).sum())))
    (record,) = trainer.fit(progress=False)
    steps = losses(tmp_path)
    weighted = sum(loss * size for loss, size in zip(steps, sizes, strict=True)) / sum(sizes)
    assert len(set(sizes)) > 1
    assert record["train_loss"] == pytest.approx(weighted)
    assert record["train_loss"] != pytest.approx(sum(steps) / len(steps), rel=1e-6)


def test_warm_up_and_cosine():
    values = [train.warm_cosine(step, 4, 12) for step in range(13)]
    assert values[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert values[8] == pytest.approx(0.5)
    assert values[12] == pytest.approx(0.0)
    assert values[4:] == sorted(values[4:], reverse=True)
    assert train.warm_cosine(0, 0, 10) == 1.0
    assert train.warm_cosine(5, 10, 10) == 0.6  # a run no longer than its warm-up
    assert train.warm_cosine(10, 10, 10) == 1.0


@pytest.mark.parametrize(("warmup", "steps"), [(50, 1), (1, 1), (0, 0)])
def test_the_warm_up_is_at_most_a_tenth_of_the_run(warmup, steps, tmp_path):
    trainer = trainer_in(tmp_path, PLAIN.with_settings({"warmup": warmup}))
    assert (trainer.total_steps, trainer.warmup) == (10, steps)
    said = f"note: warmup={warmup} is shortened to {steps}, a tenth of the run's 10 steps"
    assert (said in trainer.describe()) == (warmup > steps)


def test_the_optimiser_gets_these_rates(tmp_path, no_curve):
    trainer = trainer_in(tmp_path, PLAIN)
    rates: list[float] = []
    before_each_step(trainer, lambda _: rates.append(trainer.optimizer.param_groups[0]["lr"]))
    trainer.fit(progress=False)
    total = 2 * len(trainer.loader)
    expected = [PLAIN.lr * train.warm_cosine(step, trainer.warmup, total) for step in range(total)]
    assert rates == pytest.approx(expected)


def test_the_gradient_is_clipped(tmp_path):
    trainer = trainer_in(tmp_path, PLAIN.with_settings({"clip": 0.01}))
    trainer._train_step([next(iter(trainer.loader))])
    norm = torch.stack([p.grad.norm() for p in trainer.model.parameters()]).norm()
    assert norm.item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("group", ["length", "image"])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(group, tmp_path):
    trainer = trainer_in(tmp_path, PLAIN.with_settings({"lr": 1e30, "warmup": 0, "group": group}))
    with pytest.raises(UserError, match=r"the loss became (nan|inf) and the norm of its gradient") as error:
        trainer.fit(progress=False)
    step = trainer.step + 1
    assert step > 1, "the first step cannot know"
    batches = trainer_in(tmp_path / "other", trainer.recipe).loader.batch_sampler
    batch = list(batches)[step - 1]
    images = [trainer.loader.dataset.image_of[n] for n in batch] if group == "length" else batch
    names = list(dict.fromkeys(f"train-0-{i}" for i in images))
    assert f"at step {step} of epoch 1, in the batch of the images {', '.join(names)};" in str(error.value)
    assert not (tmp_path / "resume.pt").exists()


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_reaches_the_weights(tmp_path):
    trainer = trainer_in(tmp_path, PLAIN)
    trainer.model.decoder.linear.weight.register_hook(lambda gradient: gradient * math.inf)
    before = tensors(trainer)
    message = r"the loss became \d.* the norm of its gradient (inf|nan) at step 1 of epoch 1"
    with pytest.raises(UserError, match=message):
        trainer.fit(progress=False)
    assert moved(before, tensors(trainer)) == set()


@pytest.mark.parametrize("check_every", [1, 4])
def test_losses_left_on_the_device_are_the_same(check_every, tmp_path, no_curve):
    trainer = trainer_in(tmp_path / "run", PLAIN.with_settings({"epochs": 1}), print_every=3)
    trainer.check_every = check_every
    (record,) = trainer.fit(progress=False)
    straight = trainer_in(tmp_path / "straight", trainer.recipe, print_every=3)
    (expected,) = straight.fit(progress=False)
    assert record["train_loss"] == expected["train_loss"]
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")


def test_a_loss_that_is_found_to_be_not_finite_later_names_its_own_batch(tmp_path, no_curve):
    messages = []
    for every in (1, 7):
        trainer = trainer_in(tmp_path / str(every), PLAIN.with_settings({"lr": 1e30, "warmup": 0}))
        trainer.check_every = every
        with pytest.raises(UserError, match="the loss became") as error:
            trainer.fit(progress=False)
        messages.append(re.sub(r"the loss became .* at step", "", str(error.value)))
        assert not (tmp_path / str(every) / "resume.pt").exists()
    assert messages[0] == messages[1]


def test_a_huge_loss_is_no_error(tmp_path, no_curve):
    trainer = trainer_in(tmp_path, PLAIN.with_settings({"epochs": 1}))
    trainer.model.decoder.linear.weight.data *= 1e5
    (record,) = trainer.fit(progress=True)
    assert record["train_loss"] > 709
    assert record["train_perplexity"] == math.exp(700)


def scripted(trainer: Trainer, ciders: list[float], val_losses: list[float]) -> Trainer:
    """Replace validation by given scores and losses."""

    def validate() -> dict:
        scores = {"CIDEr": ciders[trainer.epoch], "Bleu_4": 0.0, "Bleu_1": 0.0, "ROUGE_L": 0.0}
        captions = {"distinct": 1.0, "bad_endings": 0.0, "mean_length": 9.0}
        return {"val_loss": val_losses[trainer.epoch], "val_perplexity": 1.0, "scores": scores, "captions": captions}

    trainer._validate = validate
    return trainer


@pytest.mark.parametrize(("best_by", "best"), [("CIDEr", 2), ("loss", 3), ("Bleu_1", 1)])
def test_best_and_last(best_by, best, tmp_path, no_curve):
    trainer = trainer_in(tmp_path, PLAIN.with_settings({"epochs": 4}), best_by=best_by)
    weights = []
    scripted(trainer, [0.1, 0.3, 0.2, 0.3], [3.0, 2.0, 1.0, 1.5]).fit(lambda _: weights.append(tensors(trainer)), False)
    assert trainer.best_epoch == best
    for name, epoch in (("best", best), ("last", 4)):
        meta = read_header(tmp_path / f"{name}.safetensors")["meta"]
        assert meta["epoch"] == meta["validation"]["epoch"] == epoch
        saved = load_checkpoint(tmp_path / f"{name}.safetensors")
        torch.testing.assert_close(saved.model.state_dict(), weights[epoch - 1], rtol=0, atol=0, check_device=False)
        assert saved.transform == PLAIN.transform().evaluation()
        assert saved.meta["recipe"] == trainer.recipe.to_dict()
    assert [record["best"] for record in trainer.history] == [epoch <= best for epoch in (1, 2, 3, 4)]


def test_patience(tmp_path, no_curve):
    recipe = PLAIN.with_settings({"epochs": 6})
    ciders, val_losses = [0.2, 0.3, 0.1, 0.3, 0.4, 0.5], 6 * [1.0]
    patient = scripted(trainer_in(tmp_path / "patient", recipe, patience=2), ciders, val_losses)
    assert len(patient.fit(progress=False)) == 4
    again = scripted(resumed(tmp_path / "patient"), ciders, val_losses)
    assert (again.best, again.best_epoch) == (0.3, 2)
    assert len(again.fit(progress=False)) == 4, "resuming forgot that patience had run out"
    for epochs in (6, 9):  # a larger number does not change that, and is not ignored silently
        asked = resumed(tmp_path / "patient", settings={"epochs": epochs})
        assert any("ended after patience=2 epochs without improvement; to continue" in note for note in asked.notes())
    on = resumed(tmp_path / "patient", patience=0)
    assert not any("patience" in note for note in on.notes())
    endless = scripted(trainer_in(tmp_path / "endless", recipe, patience=0), ciders, val_losses)
    assert len(endless.fit(progress=False)) == 6


def test_the_scores_are_those_of_the_saved_models_captions(tmp_path, no_curve):
    trainer = trainer_in(tmp_path, PLAIN.with_settings({"lr": 5e-3}))
    record = trainer.fit(progress=False)[-1]
    saved, data = load_checkpoint(tmp_path / "last.safetensors"), drawn(5, "val")
    rules = DecodingOptions.of(saved.vocab, length_penalty=PLAIN.length_penalty, max_len=PLAIN.max_len)
    captions, nll, words = {}, 0.0, 0
    with torch.no_grad():
        for i, name in enumerate(data.image_ids):
            features = saved.model.encoder(saved.transform(data.image(i)).unsqueeze(0))
            captions[name] = saved.vocab.decode(greedy(saved.model.decoder, features, rules)[0].ids)
            for text in data.captions[i]:
                ids = torch.tensor([saved.vocab.encode(text)])
                logits = saved.model.decoder(features, ids)[:, 1 - ids.shape[1] :]
                nll += F.cross_entropy(logits[0], ids[0, 1:], reduction="sum").item()
                words += ids.shape[1] - 1
    scores = metrics.score(dict(zip(data.image_ids, data.captions, strict=True)), captions)
    assert record["scores"]["Bleu_1"] > 0
    for name, value in record["scores"].items():
        assert value == pytest.approx(scores[name], abs=1e-6)
    assert record["val_loss"] == pytest.approx(nll / words, rel=1e-5)
    assert record["val_perplexity"] == pytest.approx(math.exp(nll / words), rel=1e-4)


def test_subset_and_validation_images(tmp_path):
    trainer = trainer_in(tmp_path, PLAIN.with_settings({"threshold": 1}), subset=6, val_images=3, seed=4)
    expected = drawn().subset(6, 4)
    assert trainer.train_set.image_ids == expected.image_ids
    assert len(trainer.train_set) == 6
    assert trainer.vocab.words(range(3, len(trainer.vocab))) == list(
        dict.fromkeys(word for text in expected.all_captions() for word in trainer.vocab.tokenize(text))
    )
    assert len(trainer.scored_loader.dataset) == 3
    assert len(trainer.val_loader.dataset.caption_set) == 5
    assert len(trainer_in(tmp_path, val_images=0).scored_loader.dataset) == 5


def test_the_seed_decides_everything(straight, tmp_path, no_curve):
    torch.manual_seed(5)
    trainer_in(tmp_path / "same").fit(progress=False)
    assert log_of(tmp_path / "same") == log_of(straight(SMALL))
    trainer_in(tmp_path / "other", seed=1).fit(progress=False)
    assert losses(tmp_path / "other")[0] != losses(straight(SMALL))[0]


def test_describing_a_run_writes_nothing(tmp_path):
    data, run = (drawn(), drawn(5, "val")), Run(out=str(tmp_path / "run"), features=str(tmp_path / "f"), weights=None)
    trainer = Trainer(RESNET.with_settings({"warmup": 0}), run, *data)
    text = trainer.describe()
    assert "20 images with 40 captions to train on, 5 images to validate" in text
    assert "resnet18 + show-tell" in text
    assert "note: attention_size=16 has no effect: the decoder show-tell does not have it" in text
    assert list(tmp_path.iterdir()) == []


def test_captions_that_are_cut_are_noted(tmp_path):
    long = drawn()
    long.captions[3][0] = "a red circle " * 500
    trainer = trainer_in(tmp_path, train_set=long)
    assert "note: 1 captions have over 100 words and are cut to that" in trainer.describe()
    assert max(trainer.loader.dataset.caption_lengths) == 100


def test_the_folder_and_its_logs(tmp_path):
    recipe = SMALL.with_settings({"group": "length"})
    trainer = trainer_in(tmp_path, recipe, print_every=4)
    stop_at(trainer, 6, signal.SIGINT)
    assert len((tmp_path / "training_log.txt").read_text().splitlines()) == 1  # step 4
    resumed(tmp_path).fit(progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {
        "best.safetensors", "last.safetensors", "resume.pt", "training_log.txt", "training_log.jsonl", "curve.png",
        "run.json", "lock",
    }  # fmt: skip

    n = len(trainer.loader)
    shown = [*range(4, n, 4), n]
    lines = (tmp_path / "training_log.txt").read_text().splitlines()
    pattern = re.compile(r"Epoch \[(\d+)/(\d+)\], Step \[(\d+)/(\d+)\], Loss: (\d+\.\d{4}), Perplexity: (\d+\.\d{4})")
    steps = [pattern.fullmatch(line) for line in lines if "Step" in line]
    assert [tuple(map(int, step.groups()[:4])) for step in steps] == [(e, 2, s, n) for e in (1, 2) for s in shown]
    for step in steps:
        assert math.exp(float(step[5])) == pytest.approx(float(step[6]), rel=1e-3)
    epochs = [line for line in lines if "Step" not in line]
    assert [line[:11] for line in epochs] == ["Epoch [1/2]", "Epoch [2/2]"]
    assert "best so far" in epochs[0]
    assert "GPU" not in epochs[0]

    records = [json.loads(line) for line in (tmp_path / "training_log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "step" in r] == 2 * shown
    assert [f"{r['loss']:.4f}" for r in records if "step" in r] == [step[5] for step in steps]
    assert [r for r in records if "step" not in r] == load_resume(tmp_path / "resume.pt")["history"]

    with Image.open(tmp_path / "curve.png") as curve:
        assert curve.format == "PNG"
        assert curve.width > curve.height > 100
    run = json.loads((tmp_path / "run.json").read_text())
    assert Recipe(**run["recipe"]) == recipe
    assert Run(**run["run"]).out == str(tmp_path)


def test_progress_shows_loss_perplexity_and_speed(tmp_path, capsys, no_curve):
    trainer_in(tmp_path, PLAIN.with_settings({"epochs": 1})).fit()
    bar = capsys.readouterr().err
    assert "epoch 1/1: 100%" in bar
    assert re.search(r"loss \d\.\d{3}, perplexity \d+\.\d\d, \d+ captions/s", bar)


@pytest.fixture
def recorded(monkeypatch) -> list[dict]:
    """What is logged to Weights & Biases, of which only a few functions are here."""
    rows: list[dict] = []
    run = SimpleNamespace(log=rows.append, define_metric=lambda *_, **__: None, finish=lambda: rows.append({}))
    init = lambda **options: rows.append(options) or run  # noqa: E731
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=KeyError))
    return rows


def test_tensorboard_and_wandb_show_the_same_numbers(recorded, tmp_path, no_curve):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = trainer_in(tmp_path / "run", PLAIN, tensorboard=True, wandb=True)
    history = trainer.fit(progress=False)
    options, *rows, end = recorded
    assert (options["name"], options["config"]["lr"], options["config"]["seed"], end) == ("run", 1e-3, 0, {})
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    shown = {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}
    logged: dict[str, dict[int, float]] = {}
    for row in rows:
        (axis,) = row.keys() & {"step", "epoch"}
        for name in row.keys() - {axis}:
            logged.setdefault(name, {})[row[axis]] = pytest.approx(row[name])
    assert shown == logged
    assert list(shown["train/loss"].values()) == pytest.approx(losses(tmp_path / "run"))
    assert list(shown["train/loss"]) == list(range(1, 2 * len(trainer.loader) + 1))
    for name, values in {
        "train/lr": [r["lr"] for r in history],
        "train/epoch_loss": [r["train_loss"] for r in history],
        "val/loss": [r["val_loss"] for r in history],
        "val/CIDEr": [r["scores"]["CIDEr"] for r in history],
    }.items():
        assert list(shown[name].values()) == pytest.approx(values), name


def test_wandb_offline(tmp_path, no_curve, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (record, *_) = trainer_in(tmp_path, PLAIN.with_settings({"epochs": 1}), wandb=True).fit(progress=False)
    (log,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    deadline = time.monotonic() + 60
    while b"hidden_size" not in log.read_bytes() and time.monotonic() < deadline:  # wandb's own process writes it
        time.sleep(0.2)
    for part in ("train/loss", "train/lr", "val/CIDEr", f"{record['val_loss']:.9f}"[:-2], "hidden_size"):
        assert part.encode() in log.read_bytes(), part


def test_wandb_without_a_key_is_one_sentence(tmp_path, monkeypatch):
    def init(**_: object) -> None:
        raise KeyError("api_key not configured (no-tty).")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=KeyError))
    with pytest.raises(UserError, match=r"--wandb: .*api_key not configured.*; type wandb login, or set WANDB_MODE="):
        trainer_in(tmp_path, wandb=True).fit(progress=False)


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_log_whose_package_is_not_installed(name, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf'--{name} needs {name}; type pip install "showtell\[{name}\]"'):
        trainer_in(tmp_path, **{name: True}).fit(progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


PAIRS = """a red circle
two small blue squares
a large green star above a yellow cross
there is a purple triangle
three orange circles next to a blue star
a small yellow square
a picture of two green crosses
one large red triangle and one small red star""".split("\n")


class Blocks(CaptionSet):
    """Eight images of coloured blocks, each with its caption, repeated."""

    def __init__(self, times: int) -> None:
        colors = torch.randint(0, 256, (8, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        self.images = colors.repeat_interleave(8, 2).repeat_interleave(8, 3)
        super().__init__("blocks", "train", list(range(8 * times)), times * [[text] for text in PAIRS], [])

    def image(self, i: int) -> torch.Tensor:
        return self.images[i % 8]

    def path(self, i: int) -> None:
        """None: they are in memory."""

    def subset(self, n: int, seed: int = 0) -> Blocks:
        return self


@pytest.mark.parametrize("decoder", DECODERS)
def test_it_overfits_eight_pairs(decoder, tmp_path, no_files):
    attends = DECODERS[decoder].grid
    recipe = RESNET.with_settings(
        {"decoder": decoder, "embed_size": 64, "hidden_size": 64, "attention_size": 64, "batch_norm": not attends}
        | {"batch_size": 8, "lr": 1e-2, "warmup": 10, "clip": 5, "max_len": 20}
    )
    steps = 100 if attends and decoder != "top-down" else 200  # in one epoch, so that there is one validation
    trainer = trainer_in(tmp_path / "run", recipe, Blocks(steps), Blocks(1), features=str(tmp_path / "features"))
    (record,) = trainer.fit(progress=False)
    assert len(trainer.loader) == steps
    assert record["val_loss"] < 0.1
    assert record["scores"]["Bleu_4"] == pytest.approx(1)


def test_the_first_losses_are_golden(tmp_path, no_curve):
    """Compare the first thirty losses of a fixed run.

    After a change that alters training: `SHOWTELL_GOLDEN=write python -m pytest tests/test_train.py -k golden`, and say
    why in the commit.
    """
    recipe = SMALL.with_settings({"group": "length", "lr": 5e-3, "epochs": 3, "dropout": 0.1})
    trainer_in(tmp_path, recipe).fit(progress=False)
    found = losses(tmp_path)[:30]
    assert len(found) == 30
    if os.environ.get("SHOWTELL_GOLDEN") == "write":
        GOLDEN.write_text(json.dumps([round(loss, 6) for loss in found], indent=0) + "\n")
    assert found == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-3)
    assert sum(found[-5:]) < sum(found[:5])


@pytest.mark.gpu
def test_on_a_gpu(tmp_path, no_curve):
    recipe = SMALL.with_settings({"decoder": "attend", "attention_cost": 1.0})
    trainer = trainer_in(tmp_path / "run", recipe, device="cuda")
    stop_at(trainer, 3)
    resumed(tmp_path / "run").fit(progress=False)
    trainer_in(tmp_path / "straight", recipe, device="cuda").fit(progress=False)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "straight"), rel=1e-3)
    assert re.search(r"GPU memory \d+ MB", (tmp_path / "run" / "training_log.txt").read_text())
    load_checkpoint(tmp_path / "run" / "best.safetensors")
