"""What the benchmark works on: sizes, images and captions, real where they are found and made where not."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from showtell import datasets
from showtell.captioner import Captioner
from showtell.checkpoint import load_checkpoint, save_checkpoint
from showtell.datasets import CaptionSet
from showtell.features import Entry, FeatureCache
from showtell.image_stream import file_stamp
from showtell.model import CaptionModel
from showtell.onnx_engine import OnnxEngine
from showtell.onnx_export import export_onnx
from showtell.recipes import RECIPES, Recipe
from showtell.run import Run
from showtell.train import Trainer
from showtell.vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parent.parent
MODELS = {"attend": "showtell-attend-1", "classic": "showtell-classic-1"}  # Top-Down, and Show and Tell


@dataclass(frozen=True)
class Size:
    """How much is measured; speeds are extrapolated to the sizes in the table."""

    runs: int = 5  # of ways that take seconds, interleaved; their median counts
    few: int = 3  # of ways that take longer
    flickr_images: int = 6000  # with five captions each
    images: int = 64  # read and encoded in one run
    one_by_one: int = 8  # captioned in one run by the way that takes one image at a time
    encoded: int = 1000  # images to decode
    decoded: int = 40  # of these, by the way that takes one image at a time
    steps: int = 15  # of training from cached features
    matrix: int = 2048  # the side of the product that measures the processor's limit
    coco_images: int = 82783
    coco_captions: int = 414113
    vocabulary: int = 345000
    scored: int = 5000
    side: int = 224
    settings: dict = field(default_factory=dict)  # of recipes and models

    @property
    def weights(self) -> str | None:
        """Backbone weights that are there without a download; their values do not matter."""
        return None if self.settings else str(ROOT / "models" / f"{MODELS['classic']}.safetensors")

    def recipe(self, name: str, **settings: object) -> Recipe:
        return RECIPES[name].with_settings(self.settings | settings)


_SMALL = {"encoder": "resnet18", "embed_size": 32, "hidden_size": 32, "resize": 64, "crop": 64, "threshold": 1}
SIZES = {
    "full": Size(),
    "tiny": Size(1, 1, 20, 4, 1, 8, 2, 2, 64, 40, 200, 500, 20, 64, _SMALL),
}


def made_captions(n: int, seed: int = 0) -> list[str]:
    """Return captions of random words, whose frequencies fall as those of a language do."""
    draw = np.random.default_rng(seed)
    words = [f"{'bcdfgklmnprst'[i % 13]}{'aeiou'[i % 5]}{i:x}".translate(_LETTERS) for i in range(20000)]
    lengths = draw.integers(8, 14, n)
    chosen = iter((draw.zipf(1.3, int(lengths.sum())) % len(words)).tolist())
    return [" ".join(words[next(chosen)] for _ in range(length)).capitalize() + "." for length in lengths]


_LETTERS = str.maketrans("0123456789", "ghijklmnop")


def real_captions() -> Iterator[str]:
    """Yield the captions of `captions_text` in the folder `SHOWTELL_DATA`, if it is there."""
    for path in sorted(Path(os.environ.get("SHOWTELL_DATA", "data")).glob("captions_text/*.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            yield from (line.rstrip("\n").rpartition("\t")[2] for line in file)


def captions(n: int) -> list[str]:
    """Return `n` captions: real ones, repeated if there are fewer, or else made ones."""
    found = list(itertools.islice(real_captions(), n)) or made_captions(min(n, 100000))
    return list(itertools.islice(itertools.cycle(found), n))


class Workload:
    """Data and models of one size, made when first used, in a temporary folder."""

    def __init__(self, size: str, folder: Path, data_dir: str | None = None) -> None:
        self.size, self.size_name, self.folder = SIZES[size], size, folder
        self._data_dir = data_dir

    @cached_property
    def data_dir(self) -> Path | None:
        """The folder of Flickr8k, if there is one."""
        places = [self._data_dir, Path(os.environ.get("SHOWTELL_DATA", "data")) / "flickr8k", ROOT / "data/flickr8k"]
        found = [Path(place) for place in places if place and Path(place).is_dir()]
        return found[0] if found and self.size_name == "full" else None

    @cached_property
    def caption_set(self) -> CaptionSet:
        """Flickr8k's training split, or as many captions and a few images, each of which stands for many."""
        if self.data_dir:
            return datasets.load("flickr8k", self.data_dir, "train")
        folder, n = self.folder / "images", self.size.flickr_images
        folder.mkdir()
        names = [f"{i}.jpg" for i in range(min(n, 200))]
        for i, name in enumerate(names):
            draw = np.random.default_rng(i)
            coarse = Image.fromarray(draw.integers(0, 256, (24, 32, 3), np.uint8)).resize((500, 375), 2)
            noise = draw.normal(0, 8, (375, 500, 3))
            Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)).save(folder / name, quality=85)
        texts = made_captions(5 * n)
        own = [texts[5 * i : 5 * i + 5] for i in range(n)]
        return CaptionSet("folder", "train", list(range(n)), own, [names[i % len(names)] for i in range(n)], folder)

    @cached_property
    def paths(self) -> list[str]:
        """Different images, in random order."""
        paths = sorted({self.caption_set.path(i) for i in range(len(self.caption_set))})
        return random.Random(0).sample(paths, len(paths))

    def files(self, n: int, run: int = 0) -> list[str]:
        """Return `n` images, others in each run while they last."""
        start = run * n % max(1, len(self.paths) - n + 1)
        return [self.paths[(start + i) % len(self.paths)] for i in range(n)]

    def trainer(self, recipe: str, **settings: object) -> Trainer:
        """Return a trainer on Flickr8k whose cached features are random numbers."""
        own = self.size.recipe(recipe, **settings)
        run = Run(out=str(self.folder / "run"), weights=self.size.weights, features=str(self.folder / "features"))
        trainer = Trainer(own, run, self.caption_set, self.caption_set.subset(10))
        fill_cache(trainer, Path(run.features))
        trainer.prepare(progress=False)
        trainer.model.train()
        return trainer

    @property
    def encoder(self) -> str:
        return self.size.recipe("flickr8k-show-tell").encoder

    def model(self, kind: str = "attend") -> Path:
        """Return a released model, or a small one with random weights."""
        path = ROOT / "models" / f"{MODELS[kind]}.safetensors"
        if not self.size.settings:
            return path
        path = self.folder / f"{kind}.safetensors"
        if not path.exists():
            vocab = Vocabulary.build(self.caption_set.all_captions(), 1, "words")
            recipe = self.size.recipe("flickr8k-top-down" if kind == "attend" else "flickr8k-show-tell")
            model = CaptionModel(recipe.model_config(len(vocab)))
            save_checkpoint(path, model, vocab, recipe.transform())
        return path

    @cached_property
    def captioner(self) -> Captioner:
        """The model with attention, as `showtell caption --engine torch` opens it."""
        return open_model(self.model())

    @cached_property
    def exact(self) -> Captioner:
        """The same in float32."""
        return open_model(self.model(), "float32")

    @cached_property
    def exported(self) -> Path:
        """The same as 8-bit graphs; calibrated on few images, which changes captions but not speed."""
        folder = self.folder / "onnx"
        export_onnx(load_checkpoint(self.model()), folder, [Path(path) for path in self.files(8)])
        return folder

    @cached_property
    def onnx(self) -> Captioner:
        return Captioner(OnnxEngine(self.exported))


def open_model(path: Path, precision: str = "auto") -> Captioner:
    return Captioner(load_checkpoint(path), precision=precision)


def fill_cache(trainer: Trainer, folder: Path) -> None:
    """Write random features for all images of a trainer, which finds them by the files' names and times."""
    precision = "bfloat16" if trainer.bfloat16 else "float32"
    frozen = trainer.model.encoder.backbone.frozen_part()
    cache = FeatureCache.open(folder, frozen, trainer.transform.evaluation(), precision)
    if len(cache):
        return
    paths = {s.path(i) for s in (trainer.train_set, trainer.val_set) for i in range(len(s))}
    part = torch.rand(256, *cache.shape).half().numpy().astype("<f2")
    with open(cache._features_file, "wb") as features, open(cache._index_file, "w") as index:
        for row, path in enumerate(sorted(paths)):
            if row % len(part) == 0:
                features.write(part[: len(paths) - row].tobytes())
            index.write(json.dumps(Entry(row, f"{row:032x}", file_stamp(path))) + "\n")


def write_coco(folder: Path, size: Size) -> None:
    """Write a data set of COCO's size in its layout, with an empty file for each image."""
    texts = captions(size.coco_captions)
    (folder / "annotations").mkdir(parents=True)
    for split, n_images in (("train", size.coco_images), ("val", 10)):
        images = [{"id": i, "file_name": f"COCO_{split}2014_{i:012}.jpg"} for i in range(1, n_images + 1)]
        (folder / f"{split}2014").mkdir()
        for image in images:
            (folder / f"{split}2014" / image["file_name"]).touch()
        own = texts if split == "train" else texts[:50]
        rows = [{"id": i, "image_id": i % n_images + 1, "caption": text} for i, text in enumerate(own)]
        table = {"images": images, "annotations": rows}
        (folder / "annotations" / f"captions_{split}2014.json").write_text(json.dumps(table))
