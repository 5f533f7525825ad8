"""Images with captions, from the layouts people have: `load("flickr8k", "data/flickr8k", split="train")`.

Every reader gives a `CaptionSet`: images and, for each, its captions. Splits are by image, never by caption. Nothing
is decoded until `image(i)` is called.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from random import Random

import torch

from showtell.annotations import find_table, read_json, read_text, table_rows
from showtell.errors import MissingFileError, UserError
from showtell.transforms import read_image

SPLIT_NAMES = {"dev": "val", "valid": "val", "validation": "val", "restval": "train"}  # what tables call the three


class CaptionSet:
    """The images of one split and their captions.

    Args:
        name: The reader it came from.
        split: The split.
        image_ids: One per image, an int where the annotations have one, else the file's name.
        captions: The captions of each image.
        files: Each image's path below `folder`.
        folder: Where the files are.
        missing: Files that the annotations list and that are not there; their images are left out.
        empty: How many empty captions were dropped.
    """

    def __init__(
        self,
        name: str,
        split: str,
        image_ids: list,
        captions: list[list[str]],
        files: list[str],
        folder: str | os.PathLike = "",
        missing: Sequence[str] = (),
        empty: int = 0,
    ):
        self.name, self.split = name, split
        self.image_ids, self.captions, self.files = image_ids, captions, files
        self.folder = os.fspath(folder)
        self.missing, self.empty = list(missing), empty

    def __len__(self) -> int:
        """The number of images."""
        return len(self.image_ids)

    def __repr__(self) -> str:
        n_captions = sum(map(len, self.captions))
        without = f", {len(self.missing)} files missing" if self.missing else ""
        return f"<CaptionSet {self.name} {self.split}: {len(self)} images, {n_captions} captions{without}>"

    def image(self, i: int) -> torch.Tensor:
        """Reads image `i`: (3, H, W) uint8 RGB. Raises as `showtell.transforms.read_image` does."""
        return read_image(self.path(i))

    def path(self, i: int) -> str | None:
        """The file of image `i`; None if it has none."""
        return os.path.join(self.folder, self.files[i])

    def all_captions(self) -> Iterator[str]:
        """Every caption, image by image: what a vocabulary is built from."""
        for captions in self.captions:
            yield from captions

    def references(self) -> dict[str, list[str]]:
        """The captions of each image by its id, written as a string: what the scores compare with."""
        return {str(i): captions for i, captions in zip(self.image_ids, self.captions, strict=True)}

    def subset(self, n: int, seed: int = 0) -> CaptionSet:
        """`n` images drawn by `seed`, in their old order; all of them if there are no more than `n`."""
        if n < 1:
            raise UserError(f"a subset of {n} images is empty; ask for 1 or more")
        # By a draw for each image rather than `sample`, so that a larger subset holds the smaller ones.
        rng = Random(f"{seed}/subset")
        draws = [rng.random() for _ in range(len(self))]
        chosen = sorted(sorted(range(len(self)), key=draws.__getitem__)[:n])
        return self._of(chosen)

    def _of(self, chosen: Sequence[int]) -> CaptionSet:
        parts = ([values[i] for i in chosen] for values in (self.image_ids, self.captions, self.files))
        return CaptionSet(self.name, self.split, *parts, self.folder, self.missing, self.empty)


def join(sets: Sequence[CaptionSet]) -> CaptionSet:
    """Several sets of files as one, in their order.

    Raises:
        UserError: an image id is in two of them, or one of them is drawn and has no files.
    """
    if drawn := next((captions.name for captions in sets if isinstance(captions, SyntheticSet)), None):
        raise UserError(
            f"the data set {drawn} is drawn and has no files to join with others; write it out as COCO first"
        )
    ids = [image_id for captions in sets for image_id in captions.image_ids]
    if twice := next((image_id for image_id, n in Counter(map(str, ids)).items() if n > 1), None):
        raise UserError(f"the image id {twice} is in two of the data sets that are joined; give each image its own id")
    return CaptionSet(
        ",".join(captions.name for captions in sets),
        sets[0].split,
        ids,
        [texts for captions in sets for texts in captions.captions],
        [captions.path(i) for captions in sets for i in range(len(captions))],
        missing=[path for captions in sets for path in captions.missing],
        empty=sum(captions.empty for captions in sets),
    )


class SyntheticSet(CaptionSet):
    """Scenes of `showtell.synthetic`, drawn when first asked for; image `i` is `scene(i, seed, split)`.

    Drawings are kept while they fit into `KEEP_BYTES`: a third of a small training step would be drawing.
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
        """The `Scene` of image `i`, with which `showtell.synthetic.check` judges sentences."""
        from showtell.synthetic import scene

        return scene(self.indices[i], self.seed, self.split)

    def image(self, i: int) -> torch.Tensor:
        """Draws image `i`: (3, size, size) uint8."""
        from showtell.synthetic import draw

        if i not in self._drawn:
            drawn = torch.from_numpy(draw(self.scene(i), self.size)).permute(2, 0, 1).contiguous()
            if (len(self._drawn) + 1) * drawn.nbytes > self.KEEP_BYTES:
                return drawn
            self._drawn[i] = drawn
        return self._drawn[i].clone()

    def path(self, i: int) -> None:
        """None: the images are drawn, not read."""

    def _of(self, chosen: Sequence[int]) -> SyntheticSet:
        indices, captions = ([values[i] for i in chosen] for values in (self.indices, self.captions))
        return SyntheticSet(self.split, indices, self.size, self.seed, captions)


def load(name: str, data_dir: str | os.PathLike | None = None, split: str = "train", **options) -> CaptionSet:
    """Opens a split of a data set.

    Args:
        name: A reader: `coco`, `karpathy`, `flickr8k`, `folder` or `synthetic`; or several, `flickr8k,coco`, joined.
        data_dir: The data set's folder, `synthetic` needs none; of several, as many: `data/flickr8k,data/coco`.
        split: `train`, `val` or, where the data set has it, `test` (`synthetic` has `unseen` besides).
        options: The reader's own, see `read_coco` and the others. All that read files take `on_missing` (`"skip"`, or
            `"error"` at the first image file that is not there) and `max_missing` (how many may be skipped; the default
            is a tenth of the images).

    Raises:
        UserError: an unknown name, split or option, or annotations that are not what they should be.
        MissingFileError: the folder or the annotations are not there, or too many image files.
    """
    if "," in name:
        names, folders = name.split(","), str(data_dir or "").split(",")
        if len(names) != len(folders):
            raise UserError(
                f"{len(names)} data sets ({name}) were given with {len(folders)} folders ({data_dir}); "
                "give a folder for each, in the same order, with commas between them"
            )
        return join([load(one, folder, split, **options) for one, folder in zip(names, folders, strict=True)])
    if name not in READERS:
        raise UserError(f"there is no data set {name!r}; choose one of {', '.join(READERS)}")
    reader = READERS[name]
    accepted = reader.__annotations__.keys() - {"data_dir", "split", "return"}
    if unknown := sorted(options.keys() - accepted):
        raise UserError(f"the data set {name} has no option {', '.join(unknown)}; it has {', '.join(sorted(accepted))}")
    if name == "synthetic":
        return reader(split, **options)
    if data_dir is None:
        raise UserError(f"the data set {name} needs the folder it is in; give data_dir (--data-dir data/{name})")
    if not Path(data_dir).is_dir():
        raise MissingFileError(f"there is no folder {data_dir}; give the folder that holds the {name} data")
    return reader(Path(data_dir), split, **options)


def read_synthetic(split: str = "train", n: int | None = None, size: int = 64, seed: int = 0) -> CaptionSet:
    """Draws `n` scenes of a split (12,000 for train, 1,000 for the others) at `size` pixels; nothing is on disk."""
    from showtell.synthetic import MIN_SIZE, SPLITS

    _require_split("synthetic", split, SPLITS)
    n = (12_000 if split == "train" else 1_000) if n is None else n
    if n < 1:
        raise UserError(f"n={n} synthetic images are too few; ask for 1 or more")
    if size < MIN_SIZE:
        raise UserError(f"size={size} is too small for synthetic images; use {MIN_SIZE} or more")
    return SyntheticSet(split, range(n), size, seed)


def read_coco(
    data_dir: Path,
    split: str = "train",
    year: int | None = None,
    on_missing: str = "skip",
    max_missing: int | None = None,
) -> CaptionSet:
    """Reads COCO's layout: `annotations/captions_{split}{year}.json` and the images in `{split}{year}/`.

    The images may also be in `images/{split}{year}/`. Without a `year` the one that is there is taken, 2017 first.
    COCO's test images have no captions. Images without any caption are left out.
    """
    _require_split("coco", split, ("train", "val"))
    annotations = data_dir / "annotations"
    # One year for all splits: 2014's validation images are among 2017's training images.
    if year is None:
        year = 2017 if any(annotations.glob("captions_*2017.json")) or not annotations.is_dir() else 2014
    path = annotations / f"captions_{split}{year}.json"
    if not path.is_file():
        raise MissingFileError(f"there is no {path}; give the folder that holds COCO's annotations/")
    values = read_json(path)
    _require_keys(
        values, path, {"images": list, "annotations": list}, 'COCO captions: an object with "images" and "annotations"'
    )
    if values["annotations"] and "caption" not in values["annotations"][0]:
        raise UserError(f"{path} holds no captions (is it the instances file?); give COCO's captions json")
    records: dict[int, tuple[str, list[str]]] = {}
    try:
        for image in values["images"]:
            if image["id"] in records:
                raise UserError(f"{path} lists the image id {image['id']} twice; give each image its own id")
            records[image["id"]] = (image["file_name"], [])
        seen = set()
        for annotation in values["annotations"]:
            if annotation["id"] in seen:
                raise UserError(
                    f"{path} lists the annotation id {annotation['id']} twice; give each caption its own id"
                )
            seen.add(annotation["id"])
            if annotation["image_id"] not in records:
                raise UserError(
                    f"{path} has a caption of the image id {annotation['image_id']}, which its images do not list; "
                    "add the image or leave the caption out"
                )
            records[annotation["image_id"]][1].append(annotation["caption"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} has an entry without {error}; give COCO's captions json") from None
    folder = _first_folder([data_dir / f"{split}{year}", data_dir / "images" / f"{split}{year}"], "COCO's images")
    return _assemble("coco", split, ((i, *record) for i, record in records.items()), folder, on_missing, max_missing)


def read_karpathy(
    data_dir: Path,
    split: str = "train",
    annotations: str | os.PathLike | None = None,
    on_missing: str = "skip",
    max_missing: int | None = None,
) -> CaptionSet:
    """Reads Karpathy's json (`dataset_coco.json`, `dataset_flickr8k.json`, `dataset_flickr30k.json`).

    `restval` counts as train, as in published results. The images are in the json's `filepath` below `data_dir` (or
    below its `images/`), or in `images/` itself.

    Args:
        annotations: The json's path; by default the only `dataset_*.json` in `data_dir`.
    """
    _require_split("karpathy", split, ("train", "val", "test"))
    if annotations is None:
        found = sorted(data_dir.glob("dataset*.json"))
        if len(found) != 1:
            names = ", ".join(path.name for path in found) or "no dataset_*.json"
            raise MissingFileError(f"{data_dir} holds {names}; name the json to read with the option annotations")
        path = found[0]
    else:
        path = Path(annotations)
    values = read_json(path)
    _require_keys(values, path, {"images": list}, 'Karpathy\'s splits: an object with "images"')
    wanted = {"train": ("train", "restval")}.get(split, (split,))
    records, seen = [], set()
    try:
        for number, image in enumerate(values["images"]):
            identity = image.get("cocoid", image.get("imgid", number))
            if identity in seen:
                raise UserError(f"{path} lists the image id {identity} twice; give each image its own id")
            seen.add(identity)
            if image["split"] in wanted:
                file = os.path.join(image.get("filepath", ""), image["filename"])
                records.append((identity, file, [sentence["raw"] for sentence in image["sentences"]]))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} has an image without {error}; each needs filename, split and sentences[].raw"
        ) from None
    if not records:
        there = ", ".join(sorted({image["split"] for image in values["images"]}))
        raise UserError(f"{path} has no images of the split {split}; it has {there or 'none at all'}")
    first = records[0][1]
    tried = [data_dir, data_dir / "images"]
    folder = next((f for f in tried if os.path.dirname(first) and (f / os.path.dirname(first)).is_dir()), None)
    if folder is None:
        folder = _first_folder([data_dir / "images", data_dir / "Flicker8k_Dataset", data_dir], "the images")
        records = [(identity, os.path.basename(file), captions) for identity, file, captions in records]
    return _assemble("karpathy", split, records, folder, on_missing, max_missing)


def read_flickr8k(
    data_dir: Path, split: str = "train", on_missing: str = "skip", max_missing: int | None = None
) -> CaptionSet:
    """Reads Flickr8k as published: `Flickr8k.token.txt`, the official split lists, `images/` or `Flicker8k_Dataset/`.

    The splits are `train` (6,000 images), `val` (1,000; its other name is `dev`) and `test` (1,000).
    """
    _require_split("flickr8k", split, ("train", "val", "dev", "test"))
    listing = data_dir / f"Flickr_8k.{'dev' if split == 'val' else split}Images.txt"
    names = [line.strip() for line in read_text(listing).split("\n") if line.strip()]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{listing} lists {twice[0]} twice; list each image once")
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
            raise UserError(
                f"line {number} of {path} is not `image.jpg#0<tab>caption`; give Flickr8k.token.txt as published"
            )
        if name in captions:
            captions[name].append(caption)
    folder = _first_folder(
        [data_dir / "images", data_dir / "Flicker8k_Dataset", data_dir / "Images"], "Flickr8k's images"
    )
    records = ((name, name, texts) for name, texts in captions.items())
    return _assemble("flickr8k", split, records, folder, on_missing, max_missing)


def read_folder(
    data_dir: Path,
    split: str = "train",
    annotations: str | os.PathLike | None = None,
    images: str | os.PathLike | None = None,
    val: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    on_missing: str = "skip",
    max_missing: int | None = None,
) -> CaptionSet:
    """Reads one's own images and a csv, tsv, json or jsonl file of (image, caption) or (image, caption, split) rows.

    Columns or keys are `image` (or file, filename, path, file_name), `caption` (or text, sentence; in json it may be a
    list) and, if wanted, `split`. A table without such a header is read by position. A json may also be an object from
    image to its captions. An image has as many captions as rows. Without a `split` column each image falls to a split
    by `seed` and its name, whatever else is in the file: adding images does not move the others from the test to
    training (but where there are so few that a split would be empty).

    Args:
        annotations: The table; by default the only one in `data_dir`, or the one named captions.
        images: The folder that the names in the table are below; by default `data_dir`, or its `images/`.
        val: The part of the images for validation, where the table has no splits.
        test: The part for the test.
        seed: Decides who falls where.
    """
    _require_split("folder", split, ("train", "val", "test"))
    if val < 0 or test < 0 or val + test >= 1:
        raise UserError(
            f"val={val} and test={test} leave nothing to train on; give parts of 1 that add up to less than 1"
        )
    path = find_table(data_dir) if annotations is None else Path(annotations)
    captions: dict[str, list[str]] = {}
    splits: dict[str, str] = {}
    for number, (file, texts, named_split) in enumerate(table_rows(path), 1):
        captions.setdefault(file, []).extend(texts)
        named_split = SPLIT_NAMES.get(named_split, named_split)
        if named_split not in (None, "train", "val", "test"):
            raise UserError(f"row {number} of {path} has the split {named_split!r}; write train, val or test")
        if splits.setdefault(file, named_split) != named_split:
            raise UserError(f"{path} puts {file} into two splits; write the same split in all rows of an image")
    if not captions:
        raise UserError(f"{path} has no rows; write one of image and caption for every caption")
    drawn = _draw_splits((file for file in captions if not splits[file]), val, test, seed)
    if images is not None:
        folder = _first_folder([Path(images), data_dir / images], "the images")
    else:
        candidates = (data_dir, data_dir / "images", path.parent)
        some = list(captions)[:20]
        folder = max(candidates, key=lambda folder: sum((folder / file).is_file() for file in some))
    records = [(file, file, texts) for file, texts in captions.items() if (splits[file] or drawn[file]) == split]
    if not records:
        raise UserError(
            f"none of the {len(captions)} images of {path} is in the split {split}; add images or choose another"
        )
    return _assemble("folder", split, records, folder, on_missing, max_missing)


READERS: dict[str, Callable[..., CaptionSet]] = {
    "coco": read_coco,
    "karpathy": read_karpathy,
    "flickr8k": read_flickr8k,
    "folder": read_folder,
    "synthetic": read_synthetic,
}


def _assemble(
    name: str,
    split: str,
    records: Iterable[tuple[int | str, str, list[str]]],
    folder: Path,
    on_missing: str,
    max_missing: int | None,
) -> CaptionSet:
    """A set of (id, file, captions) records, without the empty captions and the images whose file is not there."""
    if on_missing not in ("skip", "error"):
        raise UserError(f"on_missing={on_missing!r} is not known; write skip or error")
    image_ids, kept, files, missing, empty, total = [], [], [], [], 0, 0
    present: dict[str, set[str]] = {}  # one listing a folder: a hundred times faster than asking for each file
    for identity, file, captions in records:
        total += 1
        texts = [" ".join(caption.split()) for caption in captions if isinstance(caption, str)]
        texts = [text for text in texts if text]
        empty += len(captions) - len(texts)
        parent, base = os.path.split(file)
        if parent not in present:
            inside = folder / parent
            present[parent] = set(os.listdir(inside)) if inside.is_dir() else set()
        if base not in present[parent]:
            missing.append(file)
        elif texts:
            image_ids.append(identity)
            kept.append(texts)
            files.append(file)
    limit = 0 if on_missing == "error" else total // 10 if max_missing is None else max_missing
    if len(missing) > limit:
        listed = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise MissingFileError(
            f"{len(missing)} of {total} images of {name} {split} are not in {folder} ({listed}); "
            f"at most {limit} may be missing: add them, or raise max_missing"
        )
    if not image_ids:
        raise UserError(f"no image of {name} {split} in {folder} has a caption; check the annotations")
    return CaptionSet(name, split, image_ids, kept, files, folder, missing, empty)


def _require_split(name: str, split: str, splits: Sequence[str]) -> None:
    if split not in splits:
        raise UserError(f"the data set {name} has no split {split!r}; choose one of {', '.join(splits)}")


def _first_folder(candidates: Sequence[Path], what: str) -> Path:
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise MissingFileError(f"there is no folder {' or '.join(map(str, candidates))}; put {what} there")


def _require_keys(values: object, path: Path, keys: dict[str, type], expected: str) -> None:
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a json {type(values).__name__}; give {expected}")
    for key, kind in keys.items():
        if not isinstance(values.get(key), kind):
            raise UserError(f"{path} has no {kind.__name__} named {key!r}; give {expected}")


def _draw_splits(files: Iterable[str], val: float, test: float, seed: int) -> dict[str, str]:
    """A split for each file by a draw of its name; the extreme draws see to it that no split asked for is empty."""
    splits: dict[str, str] = {}
    unfilled = {name for name, part in (("test", test), ("val", val)) if part}
    draws = sorted((Random(f"{seed}/{file}").random(), file) for file in files)
    for draw, file in draws:
        if file == draws[-1][1]:
            split = "train"
        elif draw < test or "test" in unfilled:
            split = "test"
        elif draw < test + val or "val" in unfilled:
            split = "val"
        else:
            split = "train"
        splits[file] = split
        unfilled.discard(split)
    return splits
