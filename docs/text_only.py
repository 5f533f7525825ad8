"""A data set of captions without pictures, for teaching a decoder the language before it has to look.

    python docs/text_only.py data/text flickr30k.txt.gz coco_val2014.tsv.gz:75000 --without data/coco/captions_val.json

Each file is a caption a line, or `file name <tab> caption`; a number behind it is how many of its captions to take,
drawn at random. Captions of images in `--without`, an annotation file of COCO, are left out: those that will be tested
on. All captions are of one grey picture, which tells nothing, and 500 of every file are of its twin, for validation.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import random
import re
from pathlib import Path

from PIL import Image

GREY = (124, 116, 104)  # ImageNet's mean, which a transform takes away
N_VAL = 500


def read(path: str, without: set[int]) -> list[str]:
    """The captions of one file, but those of COCO images that are to be left out."""
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
        rows = [line.strip().rpartition("\t") for line in file if line.strip()]
    ids = (re.search(r"(\d{12})\.", name) for name, _, _ in rows)
    return [text for (_, _, text), number in zip(rows, ids, strict=True) if not number or int(number[1]) not in without]


def main() -> None:
    """Writes `captions.csv` and the two pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("files", nargs="+", metavar="FILE[:NUMBER]")
    parser.add_argument("--without", metavar="JSON")
    args = parser.parse_args()
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
    print(f"{folder}: {len(train):,} captions to learn from, {len(val):,} to validate")


if __name__ == "__main__":
    main()
