"""The examples of docs/extending.md run as written: a decoder, a data set, a backbone and a metric from outside."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from showtell.synthetic import describe, draw, scene

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text("utf-8")
TRAIN, EVALUATE, CAPTION = re.findall(r"(?m)^python mine\.py (.*)$", PAGE)
TINY = "--epochs 2 --batch-size 8 --set embed_size=16 hidden_size=24 threshold=1 dropout=0.1"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with the page's `mine.py`, twelve images with captions in the format of its reader, and a photo."""
    home = tmp_path_factory.mktemp("extending")
    (home / "mine.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.S)), encoding="utf-8")
    (home / "my").mkdir()
    rows = []
    for i in range(12):
        Image.fromarray(draw(scene(i), 64)).save(home / "my" / f"{i}.png")
        rows.append("|".join([f"{i}.png", *describe(scene(i))]))
    (home / "my" / "train.txt").write_text("\n".join(rows[:8]), encoding="utf-8")
    (home / "my" / "val.txt").write_text("\n".join(rows[8:]), encoding="utf-8")
    Image.fromarray(draw(scene(20), 64)).save(home / "photo.jpg")
    return home


def mine(home: Path, arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of `mine.py` in a process of its own, with the package of this checkout."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "mine.py", *arguments.split()],
        cwd=home,
        env={**os.environ, "PYTHONPATH": path, "PATH": ""},  # no Java: METEOR would take most of the time
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def trained(home) -> subprocess.CompletedProcess[str]:
    return mine(home, f"{TRAIN} {TINY}")


def test_training_with_the_new_decoder_data_set_and_backbone(home, trained):
    assert trained.returncode == 0, trained.stderr
    from showtell.checkpoint import read_header

    header = read_header(home / "runs" / "gru" / "best.safetensors")
    assert header["model"]["decoder"]["name"] == "gru"
    assert header["model"]["encoder"]["backbone"] == "mobilenet_v3_small"
    assert header["meta"]["run"]["dataset"] == "mine"


def test_resuming_and_fine_tuning_it(home, trained):
    again = mine(home, "train --resume --out runs/gru")
    assert again.returncode == 0, again.stderr
    other = TRAIN.replace("runs/gru", "runs/tuned")
    tuned = mine(home, f"{other} --init runs/gru --epochs 1 --best-by Recall --set threshold=2")
    assert tuned.returncode == 0, tuned.stderr  # another vocabulary: the decoder's rows are remapped by word


def test_evaluating_it_with_the_new_metric(home, trained):
    result = mine(home, f"{EVALUATE} --json")
    assert result.returncode == 0, result.stderr
    scores = json.loads(result.stdout)["scores"]
    assert 0 <= scores["Recall"] <= 1
    assert scores["CIDEr"] >= 0
    table = mine(home, EVALUATE)
    assert "recall" in table.stdout


@pytest.mark.parametrize(("options", "n"), [("", 1), ("--beam-size 1", 1), ("--sample --top-p 0.9 --n-best 3", 3)])
def test_captioning_with_it(home, trained, options, n):
    result = mine(home, f"{CAPTION} {options}")
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == n


@pytest.mark.parametrize(
    ("wrong", "listed"), [("--decoder gruu --dataset synthetic", "gru"), ("--dataset mien --data-dir my", "mine")]
)
def test_lists_of_names_come_from_the_registries(home, wrong, listed):
    result = mine(home, f"train {wrong} --out runs/wrong")
    assert result.returncode == 2
    assert re.search(rf"choose one of .*\b{listed}\b", result.stderr), result.stderr
