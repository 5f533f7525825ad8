"""Make a data set of captions without images, for text-only pre-training of the decoder.

    python tools/text_only.py data/text flickr30k.txt.gz coco_val2014.tsv.gz:75000 --without data/coco/captions_val.json

A file has one caption per line, or `file name <tab> caption`; a number after the file limits it to a random sample of
its captions. `--without` excludes the captions of images listed in a COCO annotation file, such as a test set. All
training captions belong to one grey image, and 500 of every file to another for validation.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

GREY = (124, 116, 104)  # ImageNet's mean, which normalisation makes 0
N_VAL = 500


def read(path: str, without: set[int]) -> list[str]:
    """Return the captions of one file, except those of the COCO images in `without`."""
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
        rows = [line.strip().rpartition("\t") for line in file if line.strip()]
    ids = (re.search(r"(\d{12})\.", name) for name, _, _ in rows)
    return [text for (_, _, text), found in zip(rows, ids, strict=True) if not found or int(found[1]) not in without]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write `captions.csv` and the two images."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("files", nargs="+", metavar="FILE[:NUMBER]")
    parser.add_argument("--without", metavar="JSON")
    args = parser.parse_args(arguments)
    without = {i["id"] for i in json.loads(Path(args.without).read_text("utf-8"))["images"]} if args.without else set()

    rng, val, train = random.Random(0), [], []
    for file in args.files:
        path, _, number = file.partition(":")
        texts = read(path, without)
        rng.shuffle(texts)
        val += texts[:N_VAL]
        train += texts[N_VAL : N_VAL + int(number) if number else None]

    folder = Path(args.out)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name in ("grey.png", "grey_val.png"):
        Image.new("RGB", (224, 224), GREY).save(folder / "images" / name)
    with open(folder / "captions.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption", "split"])
        rows.writerows(["grey_val.png", text, "val"] for text in val)
        rows.writerows(["grey.png", text, "train"] for text in train)
    print(f"{folder}: {len(train):,} training captions, {len(val):,} validation captions")


if __name__ == "__main__":
    main()
