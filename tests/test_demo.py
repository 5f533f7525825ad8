"""The demo: a small one writes and prints all it should, known captions are judged correctly, the real one learns."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from showtell import datasets, demo, synthetic
from showtell.__main__ import main
from showtell.captioner import Caption, load
from showtell.checkpoint import save_checkpoint
from showtell.errors import UserError
from showtell.files import lock
from showtell.model import CaptionModel
from showtell.recipes import recipe_named
from showtell.report import Card
from showtell.vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parent.parent


class Says:
    """A captioner whose caption of an image is a function of its pixels."""

    def __init__(self, sentence_of) -> None:
        self.sentence_of = sentence_of

    def caption_stream(self, sources: list, **_: int):
        for i, source in enumerate(sources):
            text = self.sentence_of(source())
            yield i, [Caption(text, -1.0, text.lower().split(), [0.5] * len(text.split()))]


def scenes_of(n: int = 250, split: str = "test") -> datasets.SyntheticSet:
    return datasets.load("synthetic", split=split, n=n)


def by_pixels(scenes: datasets.SyntheticSet) -> dict[bytes, synthetic.Scene]:
    return {scenes.image(i).numpy().tobytes(): scenes.scene(i) for i in range(len(scenes))}


def whole_truth(scene: synthetic.Scene) -> str:
    """A sentence that names everything in the scene."""
    return next(s for s in synthetic.describe(scene, n=5) if synthetic.check(s, scene).complete)


def test_without_a_released_model_no_photograph_is_captioned(tmp_path, monkeypatch):
    monkeypatch.setattr("showtell.released.MODELS", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo.caption_photographs() == []


def test_the_released_model_captions_the_photographs_of_scikit_image(tmp_path, monkeypatch):
    pytest.importorskip("skimage")
    vocab = Vocabulary(["<start>", "<end>", "<unk>", "a", "cat"], 1, "words")
    model = CaptionModel(recipe_named("demo").model_config(len(vocab)))
    save_checkpoint(tmp_path / "showtell-attend-1.safetensors", model, vocab, recipe_named("demo").transform())
    monkeypatch.setattr("showtell.released.MODELS", tmp_path)
    cards = demo.caption_photographs()
    assert [card.title for card in cards] == list(demo.PHOTOGRAPHS)
    assert all(Path(card.image).is_file() for card in cards)
    assert [card.predicted for card in cards] == [load().caption(card.image)[0].text for card in cards]


@pytest.mark.parametrize("split", ["test", "unseen"])
def test_a_perfect_captioner_is_always_right(split):
    scenes = scenes_of(split=split)
    known = by_pixels(scenes)
    rows = demo.judge(Says(lambda image: whole_truth(known[image.numpy().tobytes()])), scenes)
    assert [scene for scene, *_ in rows] == [scenes.scene(i) for i in range(250)]  # more than two batches
    assert demo._rate(rows) == 1.0


def test_a_caption_of_another_image_is_mostly_wrong():
    """Captions are checked against the image they belong to."""
    scenes = scenes_of(120)
    sentences = [whole_truth(scenes.scene(i)) for i in range(120)]
    shifted = iter(sentences[1:] + sentences[:1])
    rows = demo.judge(Says(lambda image: next(shifted)), scenes)
    assert demo._rate(rows) < 0.1
    assert all(verdict.problems for *_, verdict in rows if not (verdict.true and verdict.complete))


def test_a_true_caption_that_leaves_something_out_is_not_right():
    scenes = scenes_of(40)
    known = by_pixels(scenes)

    def first_group(image: torch.Tensor) -> str:
        things = known[image.numpy().tobytes()].groups()[0]
        noun = things[0].shape if len(things) == 1 else {"cross": "crosses"}.get(things[0].shape, f"{things[0].shape}s")
        return f"{('one', 'two', 'three')[len(things) - 1]} {things[0].color} {noun}"

    rows = demo.judge(Says(first_group), scenes)
    n_groups = [len(scene.groups()) for scene, *_ in rows]
    assert n_groups.count(2) > 10
    assert n_groups.count(1) > 0
    assert all(verdict.true for *_, verdict in rows)
    assert [verdict.complete for *_, verdict in rows] == [n == 1 for n in n_groups]
    assert demo._rate(rows) == n_groups.count(1) / 40


def test_the_best_constant_caption_is_found_among_the_training_captions():
    training = datasets.load("synthetic", split="train", n=300)
    scenes = [synthetic.scene(i, 0, "test") for i in range(60)]
    rate = demo.best_constant(training, scenes)
    common = sorted(Counter(training.all_captions()).items(), key=lambda item: -item[1])[:50]
    rates = [sum(v.true and v.complete for v in (synthetic.check(c, s) for s in scenes)) / 60 for c, _ in common]
    assert rate == max(rates)
    assert 0 < rate < 0.1  # no one sentence fits many images
    same = [scenes[0]] * 3
    for sentences, rate in (([whole_truth(scenes[0]), "a pink elephant"], 1.0), (["a pink elephant"], 0.0)):
        assert demo.best_constant(SimpleNamespace(all_captions=lambda own=sentences: own), same) == rate


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [("rrrrrwww", "rrrw"), ("rrrrrr", "rrrr"), ("wwwwww", "wwww"), ("wwwrw", "rwww"), ("rr", "rr"), ("", "")],
)
def test_the_figure_shows_a_wrong_one_among_the_right(verdicts, expected):
    cards = [Card(None, str(i), "", ok=letter == "r") for i, letter in enumerate(verdicts)]
    assert "".join("r" if card.ok else "w" for card in demo._mixed(cards, 4)) == expected


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A demo of few scenes: its folder, the rates it returns and what it prints."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "N_TEST", 20)
        patch.setattr("builtins.print", lambda *parts, **_: printed.append(" ".join(map(str, parts))))
        printed: list[str] = []
        rates = demo.run(str(folder), n_train=64, epochs=1)
    return folder, rates, "\n".join(printed)


def test_it_writes_a_page_a_figure_and_a_model(small):
    folder, _, _ = small
    page = (folder / "index.html").read_text()
    assert page.count('<li class="card') == 40 + len(demo.PHOTOGRAPHS)
    assert page.count("data:image/") == 40 + len(demo.PHOTOGRAPHS)
    assert "64 drawn scenes" in page
    words = ("right, seen combinations", "right, unseen combinations", "best constant caption", "Loss")
    assert [text for text in words if text not in page] == []
    with Image.open(folder / "demo.png") as image:
        assert image.format == "PNG"
        assert image.width > 800
        assert np.asarray(image.convert("L")).std() > 10  # something is drawn
    captioner = load(folder, "cpu")
    assert captioner.meta["recipe"] == recipe_named("demo").with_settings({"epochs": 1}).to_dict()
    assert not list(folder.glob(".*"))


def test_it_prints_the_rates_five_captions_and_where_things_are(small):
    folder, rates, printed = small
    assert sorted(rates) == ["constant", "seen", "unseen"]
    assert all(0 <= rate <= 1 for rate in rates.values())
    found = re.search(r"right captions: (\S+)% of 20 images .* (\S+)% of 20 of unseen .*caption: (\S+)%", printed)
    expected = [100 * rates[name] for name in ("seen", "unseen", "constant")]
    assert [float(number) for number in found.groups()] == pytest.approx(expected, abs=0.051)
    assert len(re.findall(r"(?m)^  ", printed)) == 5 + len(demo.PHOTOGRAPHS)
    assert all(str(folder / name) in printed for name in ("index.html", "demo.png"))
    assert json.loads((folder / "demo.json").read_text()) == rates


def test_an_earlier_demo_is_replaced_and_nothing_else_of_the_folder(small, monkeypatch):
    folder, first, _ = small
    (folder / "notes.txt").write_text("mine")
    monkeypatch.setattr(demo, "N_TEST", 20)
    assert demo.run(str(folder), n_train=64, epochs=1) == first  # the same seed, the same captions
    assert (folder / "notes.txt").read_text() == "mine"
    assert len((folder / "training_log.txt").read_text().splitlines()) == 2  # of this run alone


@pytest.mark.parametrize("names", [["run.json", "resume.pt", "best.safetensors"], ["best.safetensors"], ["notes.txt"]])
def test_a_folder_that_holds_no_demo_is_left_alone(names, tmp_path, capsys):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in names:
        (folder / name).write_text("weeks of work")
    assert main(["demo", "--out", str(folder), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    expected = f"{folder} is not empty and holds no demo; choose another --out, or remove the folder yourself"
    assert said == f"showtell: {expected}\n"
    assert {path.name: path.read_text() for path in folder.iterdir()} == dict.fromkeys(names, "weeks of work")
    file = folder / names[0]
    assert main(["demo", "--out", str(file), "--device", "cpu"]) == 2
    assert capsys.readouterr().err == f"showtell: cannot open {file}: it is not a folder; choose another path\n"


def test_a_running_demo_is_not_disturbed(tmp_path):
    with lock(tmp_path, "is training in"), pytest.raises(UserError, match=r"is training in .*choose another folder"):
        demo.run(str(tmp_path), n_train=64, epochs=1)
    assert os.listdir(tmp_path) == ["lock"]


def test_when_stopped_it_prints_how_to_start_again(tmp_path, monkeypatch, capsys):
    from showtell.train import Stopped

    def stops(*_):
        raise Stopped("resume the run")

    monkeypatch.setattr(demo, "run", stops)
    assert main(["demo", "--out", str(tmp_path / "a demo"), "--device", "cpu"]) == 130
    expected = f"showtell: stopped; to start the demo again, type: showtell demo --out '{tmp_path / 'a demo'}'\n"
    assert capsys.readouterr().err == expected


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_real_demo_learns_to_caption(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(
        [sys.executable, "-m", "showtell", "demo"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    rates = json.loads((tmp_path / "runs" / "demo" / "demo.json").read_text())
    assert rates["seen"] >= 0.9, result.stdout
    assert rates["unseen"] > 2 * rates["constant"], result.stdout  # 13.5 % measured; the goal, 80 %, is not reached
    assert rates["constant"] < 0.1
    assert (tmp_path / "runs" / "demo" / "index.html").stat().st_size > 100_000
