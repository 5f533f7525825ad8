"""Sentences about scenes of coloured shapes: generate true ones, and check any sentence against a scene.

The grammar; a group is one thing, or two or three equal ones:

    sentence = [opener] group {(relation | "and") group}     a small red circle left of two blue squares
             | place verb group {(relation | "and") group}   in the top left is a red circle
             | relation group verb group                     above a blue square is a red circle
    group    = [number] [size] color shape [place]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from random import Random
from typing import NoReturn

from showtell.errors import UserError

COLORS = {
    "red": (214, 40, 40), "green": (44, 150, 66), "blue": (38, 84, 196),
    "yellow": (240, 200, 20), "orange": (242, 128, 24), "black": (26, 26, 30),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star")
SIZES = ("small", "large")
NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3}
OPENERS = ("there", "here", "a picture of")
RELATIONS = ("left of", "right of", "above", "below")
PLACES = {
    "in the top left": ("top", "left"), "in the top right": ("top", "right"),
    "in the bottom left": ("bottom", "left"), "in the bottom right": ("bottom", "right"),
    "in the center": ("center",), "at the top": ("top",), "at the bottom": ("bottom",),
    "on the left": ("left",), "on the right": ("right",),
}  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """One drawn shape: its centre `x`, `y` (to the right and down) and `radius`, as fractions of the image's side."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def kind(self) -> tuple[str, str, str]:
        """(size, color, shape): two things of the same kind are equal."""
        return self.size, self.color, self.shape


@dataclass(frozen=True)
class Scene:
    """The contents of one image: the things and the background's RGB."""

    things: tuple[Thing, ...]
    background: tuple[int, int, int] = (255, 255, 255)

    def groups(self) -> list[tuple[Thing, ...]]:
        """Group equal things, which a sentence names together: "two red circles"."""
        kinds = dict.fromkeys(thing.kind for thing in self.things)
        return [tuple(thing for thing in self.things if thing.kind == kind) for kind in kinds]


@dataclass(frozen=True)
class Verdict:
    """The result of `check`: whether everything in the sentence holds, and whether it names everything drawn.

    A complete sentence has the number, colour and shape of everything ("red circle" means one). Only a sentence that is
    true and complete has no `problems`.
    """

    true: bool
    complete: bool
    problems: list[str]


def describe(scene: Scene, n: int = 5, seed: int = 0) -> list[str]:
    """Generate `n` different sentences of 4 to 16 words, each true and complete; a function of its arguments.

    They differ in the order of the groups, in openers, articles, sizes, places and relations. Places and relations are
    used only where they are visually clear; `check` accepts slightly more. Every scene of `scene` has at least 6
    sentences; if there are fewer than `n`, this raises a `UserError`.
    """
    rng = Random(f"{seed}/{scene!r}")
    sentences: dict[str, None] = {}
    for _ in range(60 * (n + 1)):
        if len(sentences) == n:
            break
        sentence = _sentence(rng, scene.groups())
        if 4 <= len(sentence.split()) <= 16:
            sentences[sentence] = None
    if len(sentences) < n:
        raise UserError(f"a scene has only {len(sentences)} different sentences, not {n}; ask for fewer")
    return list(sentences)


def check(sentence: str, scene: Scene) -> Verdict:
    """Check a sentence, generated or written; capitals and a final period are ignored. What does not parse is false.

    A mention must match a group of the scene with its exact number. "left of" must hold for all things of both groups
    and must not be mainly vertical. A place after a mention is that group's place.
    """
    try:
        mentions, links = _Parser(sentence).parse()
    except _GrammarError as error:
        return Verdict(False, False, [str(error)])
    groups = scene.groups()
    if len(mentions) > len(groups):
        return Verdict(False, False, [f"the sentence names {len(mentions)} groups and the image has {len(groups)}"])
    # A sentence does not define which mention means which group: take the assignment with the fewest problems.
    verdicts = [_verdict(mentions, links, chosen, groups) for chosen in permutations(groups, len(mentions))]
    return min(verdicts, key=lambda verdict: (not verdict.true, not verdict.complete, len(verdict.problems)))


def pick(rng: Random, options: Sequence):
    """Return a random option, the same in every Python version, which `choice` does not guarantee."""
    return options[int(rng.random() * len(options))]


def related(first: Sequence[Thing], relation: str, second: Sequence[Thing], clearly: bool = False) -> bool:
    """Return whether all of `first` are left of (…) all of `second`, and that is the main direction between them."""
    if relation in ("right of", "below"):
        return related(second, {"right of": "left of", "below": "above"}[relation], first, clearly)
    along, across = ("x", "y") if relation == "left of" else ("y", "x")
    gap = min(getattr(b, along) for b in second) - max(getattr(a, along) for a in first)

    def apart(axis: str) -> float:
        return sum(getattr(b, axis) for b in second) / len(second) - sum(getattr(a, axis) for a in first) / len(first)

    least_gap, least_slope = (0.12, 0.8) if clearly else (0.08, 0.5)
    return gap >= least_gap and apart(along) >= least_slope * abs(apart(across))


def _placed(group: Sequence[Thing], place: str, clearly: bool = False) -> bool:
    """Return whether every thing's centre is in that part of the image."""
    edge, middle = (0.35, 0.09) if clearly else (0.42, 0.14)
    inside = {
        "left": lambda x, y: x < edge,
        "right": lambda x, y: x > 1 - edge,
        "top": lambda x, y: y < edge,
        "bottom": lambda x, y: y > 1 - edge,
        "center": lambda x, y: max(abs(x - 0.5), abs(y - 0.5)) < middle,
    }
    return all(inside[word](thing.x, thing.y) for thing in group for word in PLACES[place])


def _sentence(rng: Random, groups: Sequence[Sequence[Thing]]) -> str:
    groups = sorted(groups, key=lambda group: sum(thing.x for thing in group) / len(group))  # from left to right
    style = rng.random()
    number = "" if style < 0.12 else "one" if style < 0.24 else "a"
    relate = rng.random() < 0.5
    if relate and rng.random() < 0.5:
        groups.reverse()
    names = [_name(rng, group, number) for group in groups]
    relations = [r for r in RELATIONS if len(groups) == 2 and related(groups[0], r, groups[1], clearly=True)]
    verb = "is" if len(groups[0]) == 1 else "are"
    if not (relations and relate):
        places = [_clear_place(rng, group, 0.35) for group in groups]
        if number and places[0] and rng.random() < 0.2:
            return " and ".join([f"{places[0]} {verb} {names[0]}", *names[1:]])
        body = " and ".join(f"{name} {place}".strip() for name, place in zip(names, places, strict=True))
    else:
        relation = pick(rng, relations)
        if number and rng.random() < 0.12:
            return f"{relation} {names[1]} {verb} {names[0]}"
        body = f"{names[0]} {relation} {names[1]} {_clear_place(rng, groups[1], 0.15)}".strip()
    if not number or rng.random() < 0.6:
        return body
    opener = pick(rng, OPENERS)
    return f"{opener} {body}" if opener.endswith("of") else f"{opener} {verb} {body}"


def _name(rng: Random, group: Sequence[Thing], number: str) -> str:
    words = [group[0].size] if rng.random() < 0.8 else []
    words += [group[0].color, _noun(group)]
    if len(group) > 1:
        number = {2: "two", 3: "three"}[len(group)]
    elif number == "a":
        number = _article(words[0])
    return " ".join([number, *words]).strip()


def _noun(group: Sequence[Thing]) -> str:
    return group[0].shape if len(group) == 1 else f"{group[0].shape}s"


def _clear_place(rng: Random, group: Sequence[Thing], probability: float) -> str:
    if rng.random() >= probability:
        return ""
    places = [place for place in PLACES if _placed(group, place, clearly=True)]
    return pick(rng, places) if places else ""


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


_NOUNS = {noun: shape for shape in SHAPES for noun in (shape, f"{shape}s")}


@dataclass(frozen=True)
class _Mention:
    """A group as a sentence names it; `number` is None for a bare plural, `size` and `place` if they are not named."""

    text: str
    number: int | None
    size: str | None
    color: str
    shape: str
    place: str | None


_Link = tuple[int, str, int]  # (i, relation, j): "mention i is left of mention j"


class _GrammarError(Exception):
    pass


class _Parser:
    """Parse a sentence of the module's grammar into its mentions and the relations between them."""

    def __init__(self, sentence: str):
        self.words = sentence.strip().lower().removesuffix(".").split()
        self.at = 0

    def parse(self) -> tuple[list[_Mention], list[_Link]]:
        if relation := self.one_of(RELATIONS):
            other, verb = self.mention(), self.verb()
            mentions, links = [self.mention(), other], [(0, relation, 1)]
        else:
            place = self.one_of(PLACES)
            opener = None if place else self.one_of(OPENERS)
            verb = self.verb() if place or opener in ("there", "here") else None
            first = self.mention()
            if place and first.place:
                raise _GrammarError(f'"{first.text}" has two places')
            mentions, links = [replace(first, place=place or first.place)], []
            while (word := self.one_of((*RELATIONS, "and"))) is not None:
                mentions.append(self.mention())
                if word != "and":
                    links.append((len(mentions) - 2, word, len(mentions) - 1))
        if verb and (verb == "is") != (mentions[0].number == 1):
            raise _GrammarError(f'"{verb}" does not agree with "{mentions[0].text}"')
        if self.at < len(self.words):
            self.fail("the end")
        return mentions, links

    def mention(self) -> _Mention:
        start = self.at
        article = self.one_of(NUMBERS)
        size = self.one_of(SIZES)
        color = self.one_of(COLORS) or self.fail("a color")
        shape = self.one_of(_NOUNS) or self.fail("a shape")
        text = " ".join(self.words[start : self.at])
        number = NUMBERS[article] if article else 1 if shape in SHAPES else None
        if (number == 1) != (shape in SHAPES):
            raise _GrammarError(f'"{text}" does not agree in number')
        if article in ("a", "an") and article != _article(size or color):
            raise _GrammarError(f'"{text}" has the wrong article')
        return _Mention(text, number, size, color, _NOUNS[shape], self.one_of(PLACES))

    def verb(self) -> str:
        return self.one_of(("is", "are")) or self.fail('"is" or "are"')

    def one_of(self, phrases: Iterable[str]) -> str | None:
        """Consume and return the next phrase if it is one of these; none of them is the beginning of another."""
        for phrase in phrases:
            words = phrase.split()
            if self.words[self.at : self.at + len(words)] == words:
                self.at += len(words)
                return phrase
        return None

    def fail(self, expected: str) -> NoReturn:
        found = f'"{self.words[self.at]}"' if self.at < len(self.words) else "the end"
        raise _GrammarError(f"word {self.at + 1}: expected {expected}, found {found}")


def _verdict(
    mentions: list[_Mention], links: list[_Link], chosen: Sequence[Sequence[Thing]], groups: Sequence[Sequence[Thing]]
) -> Verdict:
    """Return the verdict if mention i means the group `chosen[i]`."""
    wrong, vague, named = [], [], []
    for mention, group in zip(mentions, chosen, strict=True):
        size, color, shape = group[0].kind
        number_fits = len(group) == mention.number or (mention.number is None and len(group) > 1)
        if not (number_fits and (mention.color, mention.shape) == (color, shape)):
            wrong.append(f'there is no "{mention.text}"; nearest to it is {_name_of(group)}')
            continue
        named.append(group)
        if mention.number is None:
            vague.append(f'"{mention.text}" does not name a number')
        if mention.size not in (None, size):
            wrong.append(f"{_name_of(group)} is not {mention.size}")
        if mention.place and not _placed(group, mention.place):
            wrong.append(f"{_name_of(group)} is not {mention.place}")
    for i, relation, j in links:
        if not related(chosen[i], relation, chosen[j]):
            wrong.append(f"{_name_of(chosen[i])} is not {relation} {_name_of(chosen[j])}")
    vague += [f"{_name_of(group)} is not named" for group in groups if group not in named]
    return Verdict(not wrong, not vague, wrong + vague)


def _name_of(group: Sequence[Thing]) -> str:
    number = "the" if len(group) == 1 else f"the {len(group)}"
    return f"{number} {group[0].size} {group[0].color} {_noun(group)}"
