"""The README is true: its commands and its snippet run as written, and its file tree and line counts are right."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from showtell.__main__ import main
from showtell.checkpoint import save_checkpoint
from showtell.model import CaptionModel
from showtell.synthetic import describe, draw, scene
from showtell.transforms import TINY
from showtell.vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)
COMMANDS = [line for _, block in BLOCKS for line in block.splitlines() if line.startswith("showtell ")]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with what the commands need: images, captions, a data set, a trained model."""
    home = tmp_path_factory.mktemp("home")
    scenes = [scene(i) for i in range(24)]

    def image(path: str, i: int) -> str:
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw(scenes[i], 64)).save(home / path)
        return Path(path).name

    image("photo.jpg", 0)
    image("holiday/one.jpg", 1)
    with (home / "references.json").open("w") as file:
        json.dump({str(i): describe(scenes[i]) for i in range(4)}, file)
    for name, n in (("captions", 0), ("other-system", 1)):
        rows = [{"image_id": i, "caption": describe(scenes[i])[n]} for i in range(4)]
        (home / f"{name}.json").write_text(json.dumps(rows))
    (home / "my").mkdir()
    with (home / "my" / "captions.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption"])
        rows.writerows([image(f"my/{i}.jpg", i), text] for i in range(24) for text in describe(scenes[i]))
    names = [image(f"data/flickr8k/images/{i}.jpg", i) for i in range(24)]
    lines = [f"{name}#{k}\t{t}" for i, name in enumerate(names) for k, t in enumerate(describe(scenes[i]))]
    (home / "data/flickr8k/Flickr8k.token.txt").write_text("\n".join(lines))
    for split, part in (("train", names[:16]), ("dev", names[16:20]), ("test", names[20:])):
        (home / f"data/flickr8k/Flickr_8k.{split}Images.txt").write_text("\n".join(part))
    return home


@pytest.fixture(scope="module")
def model(home) -> Path:
    vocab = Vocabulary.build([t for i in range(24) for t in describe(scene(i))], 1)
    config = {
        "encoder": {"embed_size": 16, "backbone": "tiny"},
        "decoder": {"name": "show-tell", "embed_size": 16, "hidden_size": 16, "vocab_size": len(vocab)},
    }
    path = home / "runs" / "first" / "best.safetensors"
    save_checkpoint(path, CaptionModel(config), vocab, TINY)
    return path.parent


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_run_as_written(line, home, model, monkeypatch, capsys, recwarn):
    monkeypatch.chdir(home)
    words = shlex.split(line)[1:]
    if "train" in words:
        words += ["--set", "epochs=1", "embed_size=16", "hidden_size=16", "threshold=1"]
    elif "--model" in words and not Path(words[words.index("--model") + 1]).exists():
        words[words.index("--model") + 1] = str(model)
    assert main(words) == 0, capsys.readouterr().err
    if "--html" in words:
        assert (home / words[words.index("--html") + 1]).stat().st_size > 1000


def test_there_are_commands_for_every_purpose():
    assert {shlex.split(line)[1] for line in COMMANDS} >= {"train", "evaluate", "caption", "score"}


def test_the_snippet_runs(home, monkeypatch, capsys):
    (snippet,) = [block for kind, block in BLOCKS if kind == "python"]
    monkeypatch.chdir(home)
    exec(snippet, {})
    assert len(capsys.readouterr().out.split()) > 2


def test_the_tree_lists_the_files_of_the_checkout():
    spec = importlib.util.spec_from_file_location("tree", ROOT / "tools" / "tree.py")
    tree = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tree)

    def rows(text: str) -> dict[str, int]:
        found = re.findall(r"^(\S+\.(?:py|ipynb)) +(\d*)", text, re.M)
        return {name: int(lines or 0) for name, lines in found}

    written, real = rows(README.split(tree.BEGIN)[1].split(tree.END)[0]), rows(tree.tree())
    assert written.keys() == real.keys(), "the README's tree is outdated: run python tools/tree.py"
    for name, lines in real.items():
        assert abs(written[name] - lines) <= 10 + lines // 10, f"{name} has {lines} lines: run python tools/tree.py"


def test_the_core_has_as_many_lines_as_it_says():
    sentence = re.search(r"The core is readable in an afternoon: (.*?), ([\d,]+) lines", README, re.S)
    modules = re.findall(r"`(\w+)`", sentence[1])
    lines = sum(len((ROOT / "showtell" / f"{name}.py").read_text("utf-8").splitlines()) for name in modules)
    assert len(modules) == 8
    assert abs(lines - int(sentence[2].replace(",", ""))) <= 50, f"the core has {lines:,} lines"
