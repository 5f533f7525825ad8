"""Images with captions, from the usual layouts: `load("flickr8k", "data/flickr8k", split="train")`.

Every reader returns a `CaptionSet`: images and, for each, its captions. Splits are by image, never by caption. Nothing
is decoded until `image(i)` is called. A new data set is a function and a line: `READERS["mine"] = read_mine`.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from showtell.annotations import ID, find_table, json_lists, json_values, normal_path, read_json, read_rows, read_text
from showtell.errors import MissingFileError, UserError
from showtell.image_stream import digest_of_pixels
from showtell.shards import Sample, read_shard
from showtell.transforms import decode_image, read_image

if TYPE_CHECKING:
    import torch


@dataclass(eq=False, repr=False)
class CaptionSet:
    """The images of one split and their captions."""

    name: str  # of the reader it came from
    split: str
    image_ids: list  # an int where the annotations have one, else the file's name
    captions: list[list[str]]  # of each image
    files: list[str]  # each image's path below `folder`; empty if the images are drawn
    folder: str | os.PathLike = ""
    missing: list[str] = field(default_factory=list)  # listed files that do not exist; their images are left out
    empty: int = 0  # how many empty captions were dropped
    styles: list[str] = field(default_factory=list)  # the name of the data set that each image is from

    def __post_init__(self):
        self.folder = os.fspath(self.folder)
        self.styles = self.styles or [self.name] * len(self)

    def __len__(self) -> int:
        return len(self.image_ids)

    def __repr__(self) -> str:
        without = f", {len(self.missing)} files missing" if self.missing else ""
        counts = f"{len(self)} images, {sum(map(len, self.captions))} captions{without}"
        return f"<CaptionSet {self.name} {self.split}: {counts}>"

    def image(self, i: int) -> torch.Tensor:
        """Read image `i`: (3, H, W) uint8 RGB. Raises as `showtell.transforms.read_image` does."""
        return read_image(self.path(i))

    def path(self, i: int) -> str | None:
        """Return the file of image `i`; None if it is drawn or in a shard."""
        return os.path.join(self.folder, self.files[i]) if self.files else None

    def label(self, i: int) -> str:
        """Return what messages call image `i`: its path or, without one, its id."""
        return str(self.path(i) or self.image_ids[i])

    def digest(self, i: int) -> str:
        """Return what identifies the contents of image `i` if it has no file of its own; drawing it is fast."""
        return digest_of_pixels(self.image(i))

    def sources(self) -> list[str | Callable[[], torch.Tensor | bytes]]:
        """Return a path for each image, or a function that draws or reads it, for `image_stream.stream_images`."""
        return [self.path(i) or functools.partial(self.image, i) for i in range(len(self))]

    def all_captions(self) -> Iterator[str]:
        """Yield every caption, image by image; a vocabulary is built from them."""
        return itertools.chain.from_iterable(self.captions)

    def references(self) -> dict[str, list[str]]:
        """Return the captions of each image by its id as text; scores compare with them."""
        return {str(i): captions for i, captions in zip(self.image_ids, self.captions, strict=True)}

    def subset(self, n: int, seed: int = 0) -> CaptionSet:
        """Draw `n` images by `seed` and keep their order; a larger subset contains the smaller ones."""
        if n < 1:
            raise UserError(f"a subset of {n} images is empty; ask for 1 or more")
        rng = Random(f"{seed}/subset")
        draws = [rng.random() for _ in self.image_ids]
        return self._of(sorted(sorted(range(len(self)), key=draws.__getitem__)[:n]))

    def _of(self, chosen: Sequence[int]) -> CaptionSet:
        lists = (self.image_ids, self.captions, self.files, self.styles)
        ids, captions, files, styles = ([values[i] for i in chosen] for values in lists)
        return CaptionSet(self.name, self.split, ids, captions, files, self.folder, self.missing, self.empty, styles)


def join(sets: Sequence[CaptionSet], styles: Sequence[str] = ()) -> CaptionSet:
    """Join several sets of files, in their order, with a style each; no two may have an image id in common."""
    if drawn := next((caption_set.name for caption_set in sets if not caption_set.files), None):
        raise UserError(f"the data set {drawn} has no files to join with others; export it as COCO first")
    ids = [image_id for caption_set in sets for image_id in caption_set.image_ids]
    if twice := next((image_id for image_id, n in Counter(map(str, ids)).items() if n > 1), None):
        raise UserError(f"the image id {twice} is in two of the data sets that are joined; give each image its own id")
    name = ",".join(caption_set.name for caption_set in sets)
    captions = [captions for caption_set in sets for captions in caption_set.captions]
    paths = [path for caption_set in sets for path in caption_set.sources()]
    missing = [path for caption_set in sets for path in caption_set.missing]
    empty = sum(caption_set.empty for caption_set in sets)
    styles = styles or [caption_set.name for caption_set in sets]
    styles = [style for style, caption_set in zip(styles, sets, strict=True) for _ in range(len(caption_set))]
    return CaptionSet(name, sets[0].split, ids, captions, paths, missing=missing, empty=empty, styles=styles)


class SyntheticSet(CaptionSet):
    """Scenes of `showtell.synthetic`, drawn when first used; image `i` is `scene(indices[i], seed, split)`.

    Drawings are kept while they fit into `KEEP_BYTES`: drawing takes a third of the time of a small training step.
    """

    KEEP_BYTES = 2**28

    def __init__(
        self, split: str, indices: Iterable[int], size: int, seed: int, captions: list[list[str]] | None = None
    ):
        from showtell.synthetic import describe, scene

        self.indices, self.size, self.seed = list(indices), size, seed
        captions = captions or [describe(scene(i, seed, split), seed=seed) for i in self.indices]
        super().__init__("synthetic", split, [f"{split}-{seed}-{i}" for i in self.indices], captions, [])
        self._drawn: dict[int, torch.Tensor] = {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_drawn": {}}  # a loader worker draws for itself

    def scene(self, i: int):
        """Return the `Scene` of image `i`, for `showtell.synthetic.check`."""
        from showtell.synthetic import scene

        return scene(self.indices[i], self.seed, self.split)

    def image(self, i: int) -> torch.Tensor:
        """Draw image `i`: (3, size, size) uint8."""
        import torch

        from showtell.synthetic import draw

        if i not in self._drawn:
            drawn = torch.from_numpy(draw(self.scene(i), self.size)).permute(2, 0, 1).contiguous()
            if (len(self._drawn) + 1) * drawn.nbytes > self.KEEP_BYTES:
                return drawn
            self._drawn[i] = drawn
        return self._drawn[i].clone()

    def _of(self, chosen: Sequence[int]) -> SyntheticSet:
        indices, captions = ([values[i] for i in chosen] for values in (self.indices, self.captions))
        return SyntheticSet(self.split, indices, self.size, self.seed, captions)


class ShardSet(CaptionSet):
    """Images inside the tar files of `showtell.shards`, each read from its place there."""

    def __init__(self, split: str, samples: list[Sample]):
        self.samples = samples
        ids, captions = ([getattr(sample, name) for sample in samples] for name in ("id", "captions"))
        super().__init__("shards", split, ids, captions, [])

    def image(self, i: int) -> torch.Tensor:
        """Read image `i`: (3, H, W) uint8 RGB."""
        return decode_image(self.samples[i](), self.samples[i].name)

    def label(self, i: int) -> str:
        """Return shard and member of image `i`."""
        return self.samples[i].name

    def digest(self, i: int) -> str:
        """Return the digest of the image's bytes, which is in the shard's index."""
        return self.samples[i].digest

    def sources(self) -> list[Sample]:
        """Return the samples, which are functions that read an image."""
        return self.samples

    def _of(self, chosen: Sequence[int]) -> ShardSet:
        return ShardSet(self.split, [self.samples[i] for i in chosen])


def load(name: str, data_dir: str | os.PathLike | None = None, split: str = "train", **options) -> CaptionSet:
    """Open a split of a data set.

    Args:
        name: A name in `READERS`; or several, `flickr8k,coco`, joined. The style of an image is the name of its reader;
            where several have the same reader, of its folder.
        data_dir: The data set's folder (`synthetic` needs none); of several, as many: `data/flickr8k,data/coco`.
        split: `train`, `val` or, where the data set has it, `test` (`synthetic` also has `unseen`).
        options: The reader's own, see `read_coco` and the others. All that read files take `max_missing`, how many
            missing image files are skipped (the default is a tenth of the images).

    Files that are missing, and too many missing images, raise a `MissingFileError`; other mistakes a `UserError`.
    """
    if "," in name:
        names, folders = name.split(","), str(data_dir or "").split(",")
        if len(names) != len(folders):
            given = f"{len(names)} data sets ({name}) were given with {len(folders)} folders ({data_dir})"
            raise UserError(f"{given}; give a folder for each, in the same order, with commas between them")
        sets = [load(one, folder, split, **options) for one, folder in zip(names, folders, strict=True)]
        pairs = zip(names, folders, strict=True)
        return join(sets, [Path(folder).name if names.count(one) > 1 else one for one, folder in pairs])
    if name not in READERS:
        raise UserError(f"there is no data set {name!r}; choose one of {', '.join(READERS)}")
    reader = READERS[name]
    parameters = inspect.signature(reader).parameters
    accepted = sorted(parameters.keys() - {"data_dir", "split"})
    if unknown := sorted(options.keys() - accepted):
        raise UserError(f"the data set {name} has no option {', '.join(unknown)}; it has {', '.join(accepted)}")
    if "data_dir" not in parameters:
        return reader(split=split, **options)
    if data_dir is None:
        raise UserError(f"the data set {name} needs the folder it is in; give data_dir (--data-dir data/{name})")
    if not Path(data_dir).is_dir():
        raise MissingFileError(f"there is no folder {data_dir}; give the folder that holds the {name} data")
    return reader(data_dir=Path(data_dir), split=split, **options)


def read_synthetic(split: str = "train", n: int | None = None, size: int = 64, seed: int = 0) -> CaptionSet:
    """Draw `n` scenes of a split (12,000 for train, 1,000 for the others) at `size` pixels; reads no files."""
    from showtell.synthetic import MIN_SIZE, SPLITS

    _require_split("synthetic", split, SPLITS)
    n = (12_000 if split == "train" else 1_000) if n is None else n
    if n < 1:
        raise UserError(f"n={n} synthetic images are too few; ask for 1 or more")
    if size < MIN_SIZE:
        raise UserError(f"size={size} is too small for synthetic images; use {MIN_SIZE} or more")
    return SyntheticSet(split, range(n), size, seed)


def read_coco(
    data_dir: Path, split: str = "train", year: int | None = None, max_missing: int | None = None
) -> CaptionSet:
    """Read COCO's layout: `annotations/captions_{split}{year}.json` and the images in `{split}{year}/`.

    The images may also be in `images/{split}{year}/`. Without a `year` the one that is there is taken, 2017 first.
    COCO's test images have no captions. Images without any caption are left out.
    """
    _require_split("coco", split, ("train", "val"))
    annotations = data_dir / "annotations"
    # One year for all splits: 2014's validation images are among 2017's training images.
    if year is None:
        year = 2017 if any(annotations.glob("captions_*2017.json")) or not annotations.is_dir() else 2014
    path = annotations / f"captions_{split}{year}.json"
    if not path.exists():
        raise MissingFileError(f"there is no {path}; give the folder that holds COCO's annotations/")
    form = 'COCO captions: an object with "images" and "annotations"'
    images, captions = json_lists(path, ("images", "annotations"), form)
    if captions and isinstance(captions[0], dict) and "caption" not in captions[0]:
        raise UserError(f"{path} holds no captions (is it the instances file?); give COCO's captions json")
    kinds = {"id": ID, "file_name": str}
    files = [json_values(image, kinds, f"image {number} of {path}") for number, image in enumerate(images, 1)]
    _require_unique((identity for identity, _ in files), f"{path} lists the image id", "give each image its own id")
    records: dict[int | str, tuple[str, list[str]]] = {identity: (file, []) for identity, file in files}
    kinds = {"id": ID, "image_id": ID, "caption": (str, type(None))}
    rows = [json_values(row, kinds, f"annotation {number} of {path}") for number, row in enumerate(captions, 1)]
    _require_unique((row[0] for row in rows), f"{path} lists the annotation id", "give each caption its own id")
    for _, image_id, caption in rows:
        if image_id not in records:
            given = f"{path} has a caption of the image id {image_id}, which its images do not list"
            raise UserError(f"{given}; add the image")
        records[image_id][1].append(caption or "")
    folder = _first_folder([data_dir / f"{split}{year}", data_dir / "images" / f"{split}{year}"], "COCO's images")
    return _assemble("coco", split, [(i, *record) for i, record in records.items()], folder, max_missing)


def read_karpathy(
    data_dir: Path, split: str = "train", annotations: str | os.PathLike | None = None, max_missing: int | None = None
) -> CaptionSet:
    """Read Karpathy's json (`dataset_coco.json`, `dataset_flickr8k.json`, `dataset_flickr30k.json`).

    `restval` counts as train, as in published results. The images are in the json's `filepath` below `data_dir` (or
    below its `images/`), or in `images/` itself; the json is `annotations`, or the only `dataset_*.json` in `data_dir`.
    """
    _require_split("karpathy", split, ("train", "val", "test"))
    if annotations is None:
        found = sorted(data_dir.glob("dataset*.json"))
        if len(found) != 1:
            names = ", ".join(path.name for path in found) or "no dataset_*.json"
            raise MissingFileError(f"{data_dir} holds {names}; name the json to read with the option annotations")
        annotations = found[0]
    path = Path(annotations)
    (images,) = json_lists(path, ("images",), 'Karpathy\'s splits: an object with "images"')
    wanted = {"train": ("train", "restval")}.get(split, (split,))
    records, ids, files, splits = [], [], [], set()
    for number, image in enumerate(images):
        place = f"image {number + 1} of {path}"
        name, named_split, sentences = json_values(image, {"filename": str, "split": str, "sentences": list}, place)
        optional = {"id": image.get("cocoid", image.get("imgid", number)), "filepath": image.get("filepath", "")}
        identity, parent = json_values(optional, {"id": ID, "filepath": str}, place)
        ids.append(identity)
        files.append(normal_path(os.path.join(parent, name)))
        splits.add(named_split)
        if named_split in wanted:
            texts = [json_values(sentence, {"raw": str}, f"a sentence of {place}")[0] for sentence in sentences]
            records.append((identity, files[-1], texts))
    _require_unique(ids, f"{path} lists the image id", "list each image once")
    _require_unique(files, f"{path} lists the file", "list each image once")
    if not records:
        raise UserError(f"{path} has no images of the split {split}; it has {', '.join(sorted(splits)) or 'none'}")
    parent = os.path.dirname(records[0][1])
    folder = next((f for f in (data_dir, data_dir / "images") if parent and os.path.isdir(f / parent)), None)
    if folder is None:
        folder = _first_folder([data_dir / "images", data_dir / "Flicker8k_Dataset", data_dir], "the images")
        records = [(identity, os.path.basename(file), captions) for identity, file, captions in records]
    return _assemble("karpathy", split, records, folder, max_missing)


def read_flickr8k(data_dir: Path, split: str = "train", max_missing: int | None = None) -> CaptionSet:
    """Read Flickr8k as published: `Flickr8k.token.txt`, the official split lists, `images/` or `Flicker8k_Dataset/`.

    The splits are `train` (6,000 images), `val` (1,000; its other name is `dev`) and `test` (1,000).
    """
    _require_split("flickr8k", split, ("train", "val", "dev", "test"))
    listing = data_dir / f"Flickr_8k.{'dev' if split == 'val' else split}Images.txt"
    names = [line.strip() for line in read_text(listing).split("\n") if line.strip()]
    _require_unique(names, f"{listing} lists", "list each image once")
    captions: dict[str, list[str]] = {name: [] for name in names}
    path = data_dir / "Flickr8k.token.txt"
    keys = set()
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        key, tab, caption = line.partition("\t")
        if key in keys:
            raise UserError(f"line {number} of {path} is a second {key}; number an image's captions #0, #1, …")
        keys.add(key)
        name, mark, _ = key.rpartition("#")
        if not (tab and mark):
            raise UserError(f"line {number} of {path} is not `image.jpg#0<tab>caption`; give the file as published")
        if name in captions:
            captions[name].append(caption)
    folder = _first_folder([data_dir / f for f in ("images", "Flicker8k_Dataset", "Images")], "Flickr8k's images")
    records = [(name, name, texts) for name, texts in captions.items()]
    return _assemble("flickr8k", split, records, folder, max_missing)


def read_folder(
    data_dir: Path,
    split: str = "train",
    annotations: str | os.PathLike | None = None,
    images: str | os.PathLike | None = None,
    val: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    max_missing: int | None = None,
) -> CaptionSet:
    """Read your own images and a caption file: (image, caption) or (image, caption, split) rows.

    The file has any form that `showtell.annotations` reads. An image has as many captions as rows. Without a `split`
    column each image falls into a split by `seed` and its name, whatever else is in the file: adding images does not
    move the others from test to training (unless there are so few that a split would be empty).

    Args:
        annotations: The caption file; by default the only one in `data_dir`, or the one named captions.
        images: The folder that the names in the file are relative to; by default `data_dir`, or its `images/`.
        val, test: The fractions of the images for validation and test, where the file has no splits.
        seed: Decides which image falls into which split.
    """
    _require_split("folder", split, ("train", "val", "test"))
    if val < 0 or test < 0 or val + test >= 1:
        raise UserError(f"val={val} and test={test} leave nothing to train on; give fractions that sum to less than 1")
    path = find_table(data_dir) if annotations is None else Path(annotations)
    captions: dict[str, list[str]] = {}
    splits: dict[str, str | None] = {}
    identities: dict[str, int | str] = {}
    for row in read_rows(path):
        captions.setdefault(row.file, []).extend(row.captions)
        identities.setdefault(row.file, row.image)
        if splits.setdefault(row.file, row.split) != row.split:
            raise UserError(f"{path} puts {row.file} into two splits; write the same split in all rows of an image")
    drawn = _draw_splits((file for file in captions if not splits[file]), val, test, seed)
    if images is not None:
        folder = _first_folder([Path(images), data_dir / images], "the images")
    else:
        candidates = (data_dir, data_dir / "images", path.parent)
        some = list(captions)[:20]
        folder = max(candidates, key=lambda folder: sum(os.path.isfile(folder / file) for file in some))
    chosen = [file for file in captions if (splits[file] or drawn[file]) == split]
    records = [(identities[file], file, captions[file]) for file in chosen]
    if not records:
        raise UserError(f"none of the {len(captions)} images of {path} is in the split {split}; choose another")
    return _assemble("folder", split, records, folder, max_missing)


def read_samples(split: str = "test") -> CaptionSet:
    """Read 16 embedded photographs of free licence with five captions each, for galleries and never for training.

    Most are inside scikit-image and matplotlib; where these are not installed, they are listed as missing.
    """
    _require_split("samples", split, ("val", "test"))
    homes, records = {"skimage": "data", "matplotlib": "mpl-data/sample_data"}, []
    folder = Path(__file__).resolve().parent / "samples"
    for row in read_json(folder / "captions.json"):
        package, _, name = row["image"].rpartition(":")
        spec = importlib.util.find_spec(package) if package else None
        home = Path(spec.origin).parent / homes[package] if spec else folder
        records.append((Path(name).stem, str(home / name), row["captions"]))
    return _assemble("samples", split, records, Path(), len(records))


def read_shards(data_dir: Path, split: str = "train") -> CaptionSet:
    """Read WebDataset tars with the split in their names, of `showtell shard` or another program.

    Images without captions are left out. What is in memory is the table of captions, not the images.
    """
    _require_split("shards", split, ("train", "val", "test"))
    if not (paths := sorted(data_dir.glob(f"*{split}*.tar"))):
        raise MissingFileError(f"there is no *{split}*.tar in {data_dir}; write it with showtell shard --split {split}")
    samples = [sample for path in paths for sample in read_shard(path) if sample.captions]
    if not samples:
        raise UserError(f"no image in the shards of {split} in {data_dir} has a caption; shard a data set (--dataset)")
    _require_unique((sample.id for sample in samples), f"{data_dir} has the image id", "give each image its own id")
    return ShardSet(split, samples)


# A reader takes `split`, `data_dir` (a Path) unless it reads no files, and its own options by name.
READERS: dict[str, Callable[..., CaptionSet]] = {
    "coco": read_coco,
    "karpathy": read_karpathy,
    "flickr8k": read_flickr8k,
    "folder": read_folder,
    "samples": read_samples,
    "shards": read_shards,
    "synthetic": read_synthetic,
}


def _assemble(
    name: str, split: str, records: Sequence[tuple[int | str, str, list[str]]], folder: Path, max_missing: int | None
) -> CaptionSet:
    """Make a set of (id, file, captions) records; leave out empty captions and images whose file is missing."""

    @functools.cache  # one listing a folder: a hundred times faster than asking for each file
    def names_in(parent: str) -> set[str]:
        return set(os.listdir(folder / parent)) if os.path.isdir(folder / parent) else set()

    image_ids, kept, files, missing, empty = [], [], [], [], 0
    for identity, file, captions in records:
        texts = [text for caption in captions if (text := " ".join(caption.split()))]
        empty += len(captions) - len(texts)
        parent, base = os.path.split(file)
        if base not in names_in(parent):
            missing.append(file)
        elif texts:
            image_ids.append(identity)
            kept.append(texts)
            files.append(file)
    limit = len(records) // 10 if max_missing is None else max_missing
    if len(missing) > limit:
        listed = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        given = f"{len(missing)} of {len(records)} images of {name} {split} are not in {folder} ({listed})"
        raise MissingFileError(f"{given}; at most {limit} may be missing: add them, or raise max_missing")
    if not image_ids:
        raise UserError(f"no image of {name} {split} in {folder} has a caption; check the annotations")
    return CaptionSet(name, split, image_ids, kept, files, folder, missing, empty)


def _require_split(name: str, split: str, splits: Sequence[str]) -> None:
    if split not in splits:
        raise UserError(f"the data set {name} has no split {split!r}; choose one of {', '.join(splits)}")


def _require_unique(values: Iterable[int | str], what: str, advice: str) -> None:
    if twice := [value for value, n in Counter(values).items() if n > 1]:
        raise UserError(f"{what} {twice[0]} twice; {advice}")


def _first_folder(candidates: Sequence[Path], what: str) -> Path:
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise MissingFileError(f"there is no folder {' or '.join(map(str, candidates))}; put {what} there")


def _draw_splits(files: Iterable[str], val: float, test: float, seed: int) -> dict[str, str]:
    """Draw a split for each file from its name; the extreme draws keep every requested split from being empty."""
    draws = sorted((Random(f"{seed}/{file}").random(), file) for file in files)
    splits = dict.fromkeys((file for _, file in draws), "train")
    parts = [(name, bound) for name, part, bound in (("test", test, test), ("val", val, test + val)) if part]
    filled = set()
    for draw, file in draws[:-1]:
        if name := next((name for name, bound in parts if draw < bound or name not in filled), None):
            splits[file] = name
            filled.add(name)
    return splits
