"""The demo: a captioner that learns in three minutes, from scratch, to describe drawn shapes.

    showtell demo

If there is a released model, it first captions the photographs of scikit-image. The demo then trains on scenes drawn on
the fly, captions 200 images of combinations seen in training and 200 with a (colour, shape) combination that training
held out, checks every caption against its scene, and writes a page with the results.
"""

from __future__ import annotations

import importlib.util
import time
from collections import Counter
from functools import partial
from pathlib import Path

from showtell import datasets, synthetic
from showtell.captioner import Caption, Captioner, load, model_name
from showtell.datasets import SyntheticSet
from showtell.errors import MissingFileError, UserError
from showtell.files import lock, write_json
from showtell.recipes import recipe_named
from showtell.released import locate
from showtell.report import Card, Gallery, Tile, write_figure, write_page
from showtell.train import Run, Trainer
from showtell.training_log import curves

N_TRAIN, N_VAL, N_TEST = 12_000, 60, 200
PHOTOGRAPHS = (  # of scikit-image's, those that show a scene or an object
    "astronaut.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "motorcycle_left.png", "rocket.jpg",
    "grass.png",
)  # fmt: skip


def run(out: str = "runs/demo", seed: int = 0, device: str = "cpu", n_train: int = N_TRAIN, epochs: int = 0) -> dict:
    """Train, caption and check, write `index.html` and `demo.png`, and print where they are.

    Return the rates of right captions, from 0 to 1: `seen`, `unseen`, and `constant` for the best single caption; they
    are written to `demo.json` too.

    Args:
        out: the output folder: new, empty, or an earlier demo's, which is replaced; any other, or one in use, raises a
            `UserError`.
        seed: random seed of the scenes and of training.
        n_train, epochs: number of training scenes, and of passes over them; 0 for the recipe's number.
    """
    started = time.monotonic()
    folder = Path(out)
    _prepare(folder)
    photographs = caption_photographs(device)
    if photographs:
        print("captions of scikit-image's photographs by the released model:")
    for card in photographs:
        print(f"  {card.title:<20} {card.predicted}")
    recipe = recipe_named("demo").with_settings({"epochs": epochs} if epochs else {})
    print(f"training on {n_train:,} drawn scenes of coloured shapes, {len(synthetic.HELD_OUT)} combinations held out …")
    scenes = partial(datasets.load, "synthetic", seed=seed)
    settings = Run(out=out, seed=seed, device=device, save_minutes=60)
    trainer = Trainer(recipe, settings, scenes(split="train", n=n_train), scenes(split="val", n=N_VAL))
    history = trainer.fit()
    captioner = Captioner(trainer.checkpoint(), device)
    seen = judge(captioner, scenes(split="test", n=N_TEST))
    unseen = judge(captioner, scenes(split="unseen", n=N_TEST))
    constant = best_constant(trainer.train_set, [scene for scene, *_ in seen])
    rates = {"seen": _rate(seen), "unseen": _rate(unseen), "constant": constant}

    curve, _, rate = curves(history)
    cards_seen = [_card(*row, f"seen {i}") for i, row in enumerate(seen)]
    cards_unseen = [_card(*row, f"unseen {i}") for i, row in enumerate(unseen)]
    page = write_page(
        folder / "index.html",
        "showtell demo",
        f"A captioner ({recipe.decoder} on {recipe.encoder}, seed {seed}), trained from scratch on {n_train:,} drawn "
        f"scenes in {_minutes(time.monotonic() - started)}. "
        "A caption is right only if it names the number, colour and shape of everything, and all it states is true.",
        [
            Tile("right, seen combinations", f"{rates['seen']:.1%}", f"{len(seen)} new images"),
            Tile("right, unseen combinations", f"{rates['unseen']:.1%}", "colour and shape never seen together"),
            Tile("best constant caption", f"{rates['constant']:.1%}", "the same words for every image"),
            Tile("validation perplexity", f"{history[-1]['val_perplexity']:.2f}", "per word"),
        ],
        [
            *([Gallery(f"Photographs, by {model_name()}", photographs)] if photographs else []),
            Gallery("Combinations seen in training", cards_seen),
            Gallery("Combinations not seen in training", cards_unseen),
            curve,
            rate,
        ],
    )
    figure = write_figure(folder / "demo.png", _mixed(cards_seen, 8), curve, "showtell demo")
    write_json(folder / "demo.json", rates)

    for _, caption, verdict in seen[:5]:
        print(f"  {caption.text}" + ("" if _right(verdict) else f"   (wrong: {verdict.problems[0]})"))
    print(
        f"right captions: {rates['seen']:.1%} of {len(seen)} images of seen combinations, {rates['unseen']:.1%} of "
        f"{len(unseen)} of unseen ones; the best constant caption: {rates['constant']:.1%}"
    )
    print(f"page: {page}\nfigure: {figure}\ntotal time: {_minutes(time.monotonic() - started)}")
    return rates


def caption_photographs(device: str = "cpu") -> list[Card]:
    """Caption scikit-image's photographs with the released model; empty if model or package is not installed."""
    package = importlib.util.find_spec("skimage")
    folder = Path(package.origin).parent / "data" if package else Path()
    paths = [folder / name for name in PHOTOGRAPHS if package and (folder / name).is_file()]
    try:
        captioner = load(locate(download=False), device)
    except MissingFileError:
        return []
    found = ((path, captioner.caption(path)[0]) for path in paths)
    return [Card(path, path.name, c.text, (), c.pieces, c.word_probs, c.score) for path, c in found]


def _prepare(folder: Path) -> None:
    """Mark the folder as a demo's, and remove the run of an earlier demo; refuse a folder of anything else."""
    mark = folder / "demo.json"
    if folder.is_dir() and not mark.exists() and any(path.name != "lock" for path in folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no demo; choose another --out, or remove the folder yourself")
    with lock(folder, "is training in"):
        write_json(mark, {})
        for name in ("resume.pt", "best.safetensors", "last.safetensors", "training_log.txt", "training_log.jsonl"):
            (folder / name).unlink(missing_ok=True)


Judged = tuple[synthetic.Scene, Caption, synthetic.Verdict]


def judge(captioner: Captioner, scenes: SyntheticSet, beam_size: int = 3) -> list[Judged]:
    """Caption every scene of a set and check each caption against its scene."""
    images = [partial(scenes.image, i) for i in range(len(scenes))]
    rows: list[Judged] = []
    for i, (caption,) in captioner.caption_stream(images, batch_size=100, beam_size=beam_size):
        rows.append((scenes.scene(i), caption, synthetic.check(caption.text, scenes.scene(i))))
    return rows


def best_constant(train_set: SyntheticSet, scenes: list[synthetic.Scene], candidates: int = 50) -> float:
    """The rate of right captions if every scene got the same one: the best of the most frequent in training."""
    common = [sentence for sentence, _ in Counter(train_set.all_captions()).most_common(candidates)]
    verdicts = ([synthetic.check(sentence, scene) for scene in scenes] for sentence in common)
    return max(sum(map(_right, row)) / len(scenes) for row in verdicts)


def _right(verdict: synthetic.Verdict) -> bool:
    return verdict.true and verdict.complete


def _rate(rows: list[Judged]) -> float:
    return sum(_right(verdict) for *_, verdict in rows) / len(rows)


def _card(scene: synthetic.Scene, caption: Caption, verdict: synthetic.Verdict, title: str) -> Card:
    image, references = synthetic.draw(scene, 320), synthetic.describe(scene)
    words = (caption.pieces, caption.word_probs, caption.score)
    return Card(image, title, caption.text, references, *words, _right(verdict), verdict.problems)


def _mixed(cards: list[Card], n: int) -> list[Card]:
    """The first `n` cards, the last of them a wrong one if there is any."""
    right, wrong = ([card for card in cards if card.ok is verdict] for verdict in (True, False))
    chosen = right[: n - len(wrong[:1])]
    return chosen + wrong[: n - len(chosen)]


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.1f} minutes"
