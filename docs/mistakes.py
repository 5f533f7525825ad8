"""Words of written captions that none of the true captions of their image has, by kind: what a captioner gets wrong.

    python docs/mistakes.py captions.json flickr8k data/flickr8k test

`captions.json` is what `showtell evaluate` keeps. A rough test: a true word that nobody happened to say is counted too,
so the same is counted of people, each image's first caption against its others.
"""

from __future__ import annotations

import json
import sys
from collections import Counter

from showtell import datasets
from showtell.tokenizer import ptb

MALE, FEMALE = (
    set("man men boy boys guy male he his him".split()),
    set("woman women girl girls lady female she her".split()),
)
KINDS = {
    "colour": set("red green blue yellow purple orange black white brown gray grey pink tan".split()),
    "number": set("two three four five six several many group couple pair crowd".split()),
    "place": set(
        "beach field grass street road water pool ocean snow mountain forest woods park sand river lake rock hill "
        "track court stage sidewalk building city room bench".split()
    ),
    "animal or thing": set(
        "dog dogs cat horse bird ball bike bicycle motorcycle car truck boat swing slide skateboard snowboard "
        "surfboard frisbee stick toy shirt hat jacket helmet camera bed table".split()
    ),
}


def mistakes(written: str, true: list[str]) -> set[str]:
    """The kinds of words in a caption that no true caption has."""
    words, known = set(ptb(written)), {word for text in true for word in ptb(text)}
    kinds = {kind for kind, of_kind in KINDS.items() if words & of_kind - known}
    if (words & MALE and known & FEMALE and not known & MALE) or (
        words & FEMALE and known & MALE and not known & FEMALE
    ):
        kinds.add("gender")
    return kinds


def main(path: str, dataset: str, data_dir: str, split: str) -> None:
    """Prints a table of shares."""
    true = datasets.load(dataset, data_dir, split).references()
    with open(path, encoding="utf-8") as file:
        written = {str(row["image_id"]): row["caption"] for row in json.load(file)}
    ours = Counter(kind for name, text in written.items() for kind in mistakes(text, true[name]))
    people = Counter(kind for name in written for kind in mistakes(true[name][0], true[name][1:]))
    print(f"{'a word nobody said':20}{'written':>10}{'people':>10}   of {len(written)} captions")
    for kind in (*KINDS, "gender"):
        print(f"{kind:20}{ours[kind] / len(written):10.1%}{people[kind] / len(written):10.1%}")


if __name__ == "__main__":
    main(*sys.argv[1:5])
