"""Caption the training images of a data set with a model or an ensemble, to train another model on the captions.

    python tools/pseudo_captions.py runs/a,runs/b,runs/c flickr8k data/flickr8k --out data/distilled/captions.csv

The file is that of a `folder` data set: the training images with `n` captions of a beam search or, with
`--temperature`, samples, and the validation images with their true captions. Training on an ensemble's captions distils
it into one model (Kim and Rush 2016, arXiv 1606.07947).
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

import showtell
from showtell import datasets
from showtell.errors import UserError
from showtell.files import atomic_path


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the caption file; each caption of an image is in it once, and images that cannot be read are left out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL[,MODEL…]")
    parser.add_argument("dataset", help="reader, such as flickr8k")
    parser.add_argument("data_dir")
    parser.add_argument("--out", required=True, metavar="FILE.csv")
    parser.add_argument("--n", type=int, default=5, help="captions per image (default 5)")
    parser.add_argument("--temperature", type=float, help="sample at this temperature instead of searching")
    parser.add_argument("--style", help="style of the captions, of a model with several")
    parser.add_argument("--keep", action="store_true", help="also write the true captions of the training images")
    args = parser.parse_args(arguments)
    train, val = (datasets.load(args.dataset, args.data_dir, split) for split in ("train", "val"))
    sampling = {"strategy": "sample", "temperature": args.temperature} if args.temperature else {}
    found = showtell.load(args.model).caption_stream(train.sources(), n_best=args.n, style=args.style, **sampling)
    rows = []
    for i, captions in tqdm(found, total=len(train), unit=" images"):
        if not isinstance(captions, UserError):
            texts = dict.fromkeys(caption.text for caption in captions if caption.words)
            rows += [(train.path(i), text, "train") for text in (*texts, *(train.captions[i] if args.keep else ()))]
    n_train = len(rows)
    rows += [(val.path(i), text, "val") for i, texts in enumerate(val.captions) for text in texts]
    with atomic_path(args.out) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption", "split"])
        table.writerows([os.path.relpath(path, Path(args.out).parent), text, split] for path, text, split in rows)
    print(f"{args.out}: {n_train:,} captions to train on, {len(rows) - n_train:,} to validate")


if __name__ == "__main__":
    main()
