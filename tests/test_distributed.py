"""Several processes train as one does: two with gloo on a CPU, started by torchrun.

Run by torchrun, this file is one of the processes, see `work`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_train import (
    PLAIN,
    RESNET,
    SMALL,
    before_each_step,
    drawn,
    log_of,
    losses,
    resumed,
    signal_at,
    timeless,
    trainer_in,
)

from showtell import datasets, distributed, train
from showtell.__main__ import main
from showtell.checkpoint import load_checkpoint, load_resume
from showtell.errors import UserError
from showtell.recipes import Recipe
from showtell.train import Run, Stopped, Trainer

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 60  # of a process that does not answer

# name: settings of PLAIN, number of images
RUNS: dict[str, tuple[dict, int]] = {
    "image": ({}, 20),
    "length": ({"group": "length", "label_smoothing": 0.1}, 20),
    "attend": ({"decoder": "attend", "attention_cost": 1.0, "ema": 0.9}, 19),
    "few": ({"batch_size": 2}, 3),
    "one": ({}, 1),
    "dropout": ({"dropout": 0.3, "batch_size": 1, "batch_norm": True, "epochs": 5}, 20),
}


def no_curve(*_: object) -> None:
    pass


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(train, "draw_curve", no_curve)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def recipe_of(name: str) -> Recipe:
    return PLAIN.with_settings(RUNS[name][0])


def torchrun(*args: str, n: int = 2, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this file in `n` processes."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ["PYTHONPATH"]])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **environment}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), __file__]
    return subprocess.run([*command, *args], env=environment, capture_output=True, text=True, timeout=120)


def work(task: str, folder: str, *args: str) -> int:
    """Do what a test asks of one of the processes."""
    train.draw_curve = no_curve
    if task == "train":
        datasets.READERS["few"] = lambda split: drawn(20 if split == "train" else 5, split)
        if os.environ.get("FAIL") == os.environ["RANK"]:
            take_step = Trainer._train_step

            def fail(trainer: Trainer, *batches):
                if trainer.step == 2:
                    os.kill(os.getpid(), int(os.environ["SIGNAL"]))
                return take_step(trainer, *batches)

            Trainer._train_step = fail
        return main(["train", "--out", folder, "--device", "cpu", *args])
    torch.set_num_threads(1)
    with distributed.one_error():
        distributed.join("cpu", 1)
        every_run(Path(folder))
    return 0


def every_run(folder: Path) -> None:
    rank = distributed.rank()
    for name, (_, n) in RUNS.items():
        trainer = trainer_in(folder / name, recipe_of(name), drawn(n))
        trainer.fit(progress=False)
        torch.save([trainer.model.state_dict(), trainer.optimizer.state_dict()], folder / f"{name}-{rank}.pt")

    # Signals reach one process only.
    trainer = trainer_in(folder / "stopped", recipe_of("dropout"), drawn(20))
    take_step = trainer._train_step

    def step(batches, counts):
        if rank and trainer.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return take_step(batches, counts)

    trainer._train_step = step
    with pytest.raises(Stopped):
        trainer.fit(progress=False)
    distributed.total(0)
    (folder / f"stopped-{rank}").write_text(str(trainer.step))
    again = resumed(folder / "stopped")
    again.fit(progress=False)
    torch.save([again.model.state_dict(), again.optimizer.state_dict()], folder / f"stopped-{rank}.pt")

    features = str(folder / "features")
    trainer_in(folder / "cached", RESNET, drawn(70), features=features).fit(progress=False)

    init = folder / "image" / "last.safetensors"
    settings = {"objective": "self-critical", "samples_per_image": 2, "xe_weight": 0.5, "captions_per_image": 1}
    trainer = trainer_in(folder / "rewarded", PLAIN.with_settings(settings), drawn(9), init=str(init))
    trainer.fit(progress=False)
    torch.save(trainer.model.state_dict(), folder / f"rewarded-{rank}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """The folder of the runs of two processes."""
    folder = tmp_path_factory.mktemp("two")
    done = torchrun("runs", str(folder))
    assert done.returncode == 0, done.stderr
    assert "Epoch" not in done.stdout + done.stderr
    return folder


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("image", {"batch_size": 8}),
        ("image", {"accumulate": 2}),
        ("length", {"accumulate": 2}),
        ("attend", {"accumulate": 2}),
        ("attend", {"batch_size": 8}),
        ("few", {"accumulate": 2}),
        ("one", {}),
    ],
)
def test_two_processes_train_as_one_with_the_same_batch(name, settings, two, tmp_path):
    one = trainer_in(tmp_path, recipe_of(name).with_settings(settings), drawn(RUNS[name][1]))
    one.fit(progress=False)
    assert len(losses(tmp_path)) == len(losses(two / name)) == one.total_steps
    assert losses(two / name) == pytest.approx(losses(tmp_path), rel=1e-5)
    for record, same in zip(
        timeless(one.history), log_of(two / name)[one.steps_per_epoch :: one.steps_per_epoch + 1], strict=True
    ):
        assert record["train_loss"] == pytest.approx(same["train_loss"], rel=1e-5)
        assert record["val_loss"] == pytest.approx(same["val_loss"], rel=1e-5)
        assert record["captions"]["captions"] == same["captions"]["captions"] == 5
        assert record["scores"].keys() == same["scores"].keys()


@pytest.mark.parametrize("name", [*RUNS, "rewarded"])
def test_both_processes_have_the_same_weights(name, two):
    torch.testing.assert_close(*(torch.load(two / f"{name}-{rank}.pt") for rank in (0, 1)), rtol=0, atol=0)
    if name == "dropout":
        assert load_resume(two / name / "resume.pt")["scheduler"]["last_epoch"] == 50
    if name in RUNS:
        saved = load_checkpoint(two / name / "last.safetensors").model.state_dict()
        trained = torch.load(two / f"{name}-1.pt")[0]
        assert (name == "attend") != all(torch.equal(saved[key], trained[key]) for key in saved)  # its average


def test_processes_have_dropout_of_their_own(two):
    first, second = load_resume(two / "dropout" / "resume.pt")["generators"]
    assert not torch.equal(first["torch"], second["torch"])


def test_a_signal_to_one_process_stops_both_and_the_run_continues_bit_for_bit(two):
    assert [(two / f"stopped-{rank}").read_text() for rank in (0, 1)] == ["5", "5"], "one more step than the signal"
    for rank in (0, 1):
        run, straight = (torch.load(two / f"{name}-{rank}.pt") for name in ("stopped", "dropout"))
        torch.testing.assert_close(run, straight, rtol=0, atol=0)
    assert log_of(two / "stopped") == log_of(two / "dropout")


def test_features_are_computed_in_shares(two, tmp_path):
    trainer_in(tmp_path / "run", RESNET, drawn(70), features=str(tmp_path / "features")).fit(progress=False)
    (one,), (shared,) = ((folder / "features").iterdir() for folder in (tmp_path, two))
    assert one.name == shared.name
    lines = [[json.loads(line) for line in (f / "index.jsonl").read_text().splitlines()] for f in (one, shared)]
    assert len(lines[0]) == len(lines[1]) == 75
    rows = [{digest: row for row, digest, _ in own} for own in lines]
    assert rows[0].keys() == rows[1].keys()
    features = [torch.frombuffer(bytearray((f / "features.f16").read_bytes()), dtype=torch.half) for f in (one, shared)]
    features = [each.view(len(set(own.values())), -1) for each, own in zip(features, rows, strict=True)]
    for digest, row in rows[0].items():
        torch.testing.assert_close(features[0][row], features[1][rows[1][digest]], rtol=2e-3, atol=1e-3)


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "config.json"
    run = {"dataset": "few", "weights": None, "features": "", "print_every": 1, "save_minutes": 0}
    run |= {"timeout_minutes": TIMEOUT_S / 60}
    path.write_text(json.dumps({"recipe": PLAIN.to_dict(), "run": run}))
    return path


def test_a_killed_process_ends_the_run_and_it_is_resumed_by_one_and_by_two(config, two, tmp_path):
    out = tmp_path / "run"
    started = time.monotonic()
    killed = torchrun("train", str(out), "--config", str(config), FAIL="1", SIGNAL=str(int(signal.SIGKILL)))
    assert time.monotonic() - started < TIMEOUT_S
    assert killed.returncode == 1
    said = [line for line in killed.stderr.splitlines() if line.startswith("showtell: ")]
    assert len(said) == 1, killed.stderr
    assert "another process of this run has ended" in said[0] or "saved; to continue" in said[0]

    torch.manual_seed(999)
    one = Trainer.resume(out, drawn(), drawn(5, "val"))
    assert (one.epoch, one.step, one.batches, one.accumulate) == (0, 2, 4, 2)
    before_each_step(one, lambda _: signal.raise_signal(signal.SIGTERM) if one.epoch == 1 else None)
    with pytest.raises(Stopped, match="epoch 2 after step 1"):
        one.fit(progress=False)
    done = torchrun("train", str(out), "--resume")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the best epoch was") == 1
    assert losses(out) == pytest.approx(losses(two / "image"), rel=1e-5)


def test_an_error_is_said_once(tmp_path):
    done = torchrun("train", str(tmp_path), "--resume")
    assert done.returncode == 1
    assert done.stderr.count("holds no run to resume") == 1


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="a process cannot be stopped")
def test_a_process_that_does_not_answer_ends_the_run_after_the_timeout(config, tmp_path):
    out = tmp_path / "run"
    config.write_text(config.read_text().replace(str(TIMEOUT_S / 60), "0.1"))
    done = torchrun("train", str(out), "--config", str(config), FAIL="1", SIGNAL=str(int(signal.SIGSTOP)))
    assert done.returncode == 1
    assert done.stderr.count("showtell: another process of this run has ended or does not answer") == 1


def test_a_run_of_one_process_goes_on_with_another_batch(tmp_path, monkeypatch):
    """Of 1 batch per step, two processes take 2: at the same place of the sample order and the schedule."""
    trainer = trainer_in(tmp_path, SMALL)
    signal_at(trainer, signal.SIGTERM, 3)
    with pytest.raises(Stopped):
        trainer.fit(progress=False)
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        again = resumed(tmp_path)
        assert (again.batches, again.batches_per_step, again.steps_per_epoch) == (3, 2, 3)
        assert again.scheduler.last_epoch == 2
        sampler = again.loader.batch_sampler
        sampler.skip = again.batches
        assert list(sampler) == trainer.loader.batch_sampler.left()[3:][rank::2]


def test_settings_are_checked(tmp_path):
    with pytest.raises(UserError, match="timeout_minutes=0 is too low"):
        Run(timeout_minutes=0)
    with pytest.raises(UserError, match="accumulate=0 must be above 0"):
        Recipe(accumulate=0)
    trainer = trainer_in(tmp_path, PLAIN.with_settings({"accumulate": 2}))
    assert "steps of 2 batches on cpu" in trainer.describe()
    assert "batches" not in trainer_in(tmp_path, PLAIN).describe()


if __name__ == "__main__":
    sys.exit(work(*sys.argv[1:]))
