"""Count the kinds of words in predicted captions that none of the image's true captions contains.

    python tools/mistakes.py captions.json flickr8k data/flickr8k test

`captions.json` is written by `showtell evaluate`. The count overestimates, because a word can be right although no
annotator used it; for comparison it is repeated on each image's first true caption against its other true captions.
"""

from __future__ import annotations

import sys
from collections import Counter

from showtell import datasets
from showtell.annotations import read_candidates
from showtell.confidence import FEMALE, MALE
from showtell.tokenizer import ptb

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


def mistakes(caption: str, references: list[str]) -> set[str]:
    """Return the kinds of words in a caption that none of the references contains."""
    words, known = set(ptb(caption)), {word for text in references for word in ptb(text)}
    kinds = {kind for kind, of_kind in KINDS.items() if words & of_kind - known}
    for claimed, other in ((MALE, FEMALE), (FEMALE, MALE)):
        if words & claimed and known & other and not known & claimed:
            kinds.add("gender")
    return kinds


def shares(captions: dict[str, str], references: dict[str, list[str]]) -> dict[str, tuple[float, float]]:
    """Return for each kind the share of predicted captions, and of first true captions, with such a word."""
    predicted = Counter(kind for i, text in captions.items() for kind in mistakes(text, references[i]))
    people = Counter(kind for i in captions for kind in mistakes(references[i][0], references[i][1:]))
    return {kind: (predicted[kind] / len(captions), people[kind] / len(captions)) for kind in (*KINDS, "gender")}


def main(path: str, dataset: str, data_dir: str, split: str) -> None:
    """Print a table of shares."""
    captions = read_candidates(path)
    print(f"{'in no true caption':20}{'predicted':>10}{'people':>10}   of {len(captions)} captions")
    for kind, (predicted, people) in shares(captions, datasets.load(dataset, data_dir, split).references()).items():
        print(f"{kind:20}{predicted:10.1%}{people:10.1%}")


if __name__ == "__main__":
    main(*sys.argv[1:5])
