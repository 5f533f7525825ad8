"""The synthetic scenes: reproducible, drawn as described, with correct verdicts on sentences."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from showtell.errors import UserError
from showtell.sentences import COLORS, NUMBERS, PLACES, RELATIONS, SHAPES, SIZES, Scene, Thing, Verdict, check, describe
from showtell.synthetic import HELD_OUT, SPLITS, draw, export_coco, scene

SCENES = [scene(i) for i in range(300)]


def thing(words: str, x: float = 0.5, y: float = 0.5) -> Thing:
    size, color, shape = words.split()
    return Thing(shape, color, size, x, y, 0.08 if size == "small" else 0.14)


TWO_CIRCLES_AND_SQUARE = Scene(
    (thing("small red circle", 0.2, 0.2), thing("small red circle", 0.25, 0.75), thing("large blue square", 0.75, 0.3))
)


def right(sentence: str, scene: Scene) -> bool:
    verdict = check(sentence, scene)
    assert (verdict.true and verdict.complete) == (not verdict.problems)
    return verdict.true and verdict.complete


def test_scenes_are_a_function_of_index_seed_and_split_and_the_first_is_pinned():
    """A golden value: models and their scores depend on these images staying the same."""
    assert scene(7) == scene(7)
    assert len({scene(7), scene(8), scene(7, seed=1), scene(7, split="val")}) == 4
    assert [(t.kind, t.x, t.y, t.radius) for t in scene(0).things] == [
        (("small", "green", "star"), 0.7912, 0.4804, 0.0991),
        (("small", "green", "triangle"), 0.6223, 0.2146, 0.0949),
    ]
    assert describe(scene(0))[:2] == [
        "a small green star below a small green triangle",
        "a small green triangle and a small green star on the right",
    ]


@pytest.mark.parametrize("split", SPLITS)
def test_held_out_pairs_are_in_every_unseen_scene_and_in_no_other(split):
    held = [any((t.color, t.shape) in HELD_OUT for t in scene(i, split=split).things) for i in range(300)]
    assert all(held) if split == "unseen" else not any(held)


def test_training_has_every_word_of_the_held_out_pairs_and_all_kinds_of_scenes():
    things = [t for s in SCENES for t in s.things]
    assert len(HELD_OUT) == 4
    assert len({color for color, _ in HELD_OUT}) == len({shape for _, shape in HELD_OUT}) == 4
    assert {t.color for t in things} == set(COLORS)
    assert {t.shape for t in things} == set(SHAPES)
    assert {t.size for t in things} == set(SIZES)
    counts = Counter(tuple(sorted(len(group) for group in s.groups())) for s in SCENES)
    assert set(counts) == {(1,), (2,), (1, 1), (1, 2)}
    assert min(counts.values()) >= 10


@pytest.mark.parametrize("split", SPLITS)
def test_nothing_touches_the_border_or_another_thing(split):
    """Tested in the pixels: a border of background, and one patch of color for each thing."""
    from scipy.ndimage import label

    for i in range(40):
        drawn = scene(i, split=split)
        image = draw(drawn, 96).astype(int)
        ink = np.abs(image - np.array(drawn.background)).sum(2) > 0
        assert not np.any([ink[0], ink[-1], ink[:, 0], ink[:, -1]])
        assert label(ink, np.ones((3, 3)))[1] == len(drawn.things)


def test_small_and_large_differ_clearly():
    radii = {size: [t.radius for s in SCENES for t in s.things if t.size == size] for size in SIZES}
    assert min(radii["large"]) > 1.5 * max(radii["small"])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_covers_its_outline_in_its_color(shape):
    """The antialiased area equals the polygon's that `export_coco` writes, and the middle has the pure color."""
    from showtell.synthetic import _instance

    drawn = Scene((thing(f"large red {shape}"),), (0, 0, 0))
    for size in (64, 331):
        image = draw(drawn, size)
        covered = image[..., 0].sum() / COLORS["red"][0]
        outline = _instance(drawn.things[0], size)
        tolerance = 0.02 if shape == "circle" else 0.01  # the circle's outline is a polygon of 24 corners
        assert covered == pytest.approx(outline["area"], rel=tolerance)
        assert tuple(image[size // 2, size // 2]) == COLORS["red"]
        rows, columns = np.nonzero(image[..., 0])
        x, y, width, height = outline["bbox"]
        assert (columns.min(), rows.min()) == pytest.approx((x, y), abs=2)
        assert (columns.max() + 1, rows.max() + 1) == pytest.approx((x + width, y + height), abs=2)


def test_an_image_is_the_same_at_any_resolution():
    small, large = draw(SCENES[1], 64).astype(float), draw(SCENES[1], 256).astype(float)
    assert small.shape == (64, 64, 3)
    assert draw(SCENES[1], 64).dtype == np.uint8
    shrunk = large.reshape(64, 4, 64, 4, 3).mean((1, 3))
    # Corners differ a little; a shift by a quarter of a small pixel would give 0.5.
    assert np.abs(shrunk - small).mean() < 0.25


def test_wrong_arguments_are_errors():
    with pytest.raises(UserError, match="no split 'dev'; choose one of train, val, test, unseen"):
        scene(0, split="dev")
    with pytest.raises(UserError, match="of 8 pixels is too small to show shapes; use 16 or more"):
        draw(SCENES[0], 8)
    with pytest.raises(UserError, match=r"a scene has only .* different sentences, not 1000; ask for fewer"):
        describe(SCENES[0], 1000)


def test_five_different_sentences_all_true_and_complete():
    words = Counter()
    for drawn in SCENES:
        sentences = describe(drawn)
        assert len(set(sentences)) == 5
        for sentence in sentences:
            assert right(sentence, drawn), (sentence, check(sentence, drawn).problems)
            assert 4 <= len(sentence.split()) <= 16
            assert sentence == sentence.lower()
            words.update(sentence.split())
    assert len(words) <= 50
    assert min(words.values()) >= 5


def test_sentences_are_a_function_of_scene_and_seed():
    assert describe(SCENES[0]) == describe(SCENES[0])
    assert describe(SCENES[0]) != describe(SCENES[0], seed=1)
    assert describe(SCENES[0], 3) == describe(SCENES[0], 5)[:3]
    assert all(len(describe(drawn, 6)) == 6 for drawn in SCENES)


@pytest.mark.parametrize(
    "sentence",
    [
        "two small red circles left of a large blue square",
        "Two red circles left of one blue square.",
        "a blue square right of two red circles .",
        "two red circles on the left and a blue square on the right",
        "blue square and two small red circles",
        "there are two red circles and a blue square",
        "here is a large blue square and two red circles",
        "a picture of two red circles on the left and a large blue square",
        "right of two red circles is a large blue square",
        "in the top right is a large blue square and two red circles",
    ],
)
def test_true_and_complete_sentences(sentence):
    assert check(sentence, TWO_CIRCLES_AND_SQUARE).problems == []
    assert right(sentence, TWO_CIRCLES_AND_SQUARE)


@pytest.mark.parametrize(
    ("sentence", "problem"),
    [
        ("three red circles and a blue square", 'there is no "three red circles"; nearest to it is the 2 small red'),
        ("a red circle and a blue square", 'there is no "a red circle"'),
        ("two green circles and a blue square", 'there is no "two green circles"'),
        ("two red stars and a blue square", 'there is no "two red stars"'),
        ("two large red circles and a blue square", "the 2 small red circles is not large"),
        ("two red circles right of a blue square", "is not right of the large blue square"),
        ("two red circles above a blue square", "is not above"),
        ("two red circles at the top and a blue square", "is not at the top"),
        ("two red circles and a blue square in the bottom right", "is not in the bottom right"),
        ("two red circles and a blue square and a blue square", "names 3 groups and the image has 2"),
        ("a blue square and a blue square", 'there is no "a blue square"'),
        ("two red circle and a blue square", '"two red circle" does not agree in number'),
        ("a red circles and a blue square", "does not agree in number"),
        ("there is two red circles and a blue square", '"is" does not agree with "two red circles"'),
        ("two red circles and an blue square", '"an blue square" has the wrong article'),
        ("two red circles and a blue", "word 7: expected a shape, found the end"),
        ("two red circles and", "expected a color, found the end"),
        ("two red circles are happy", 'word 4: expected the end, found "are"'),
        ("two red circles left a blue square", 'word 4: expected the end, found "left"'),
        ("two red circles, a blue square", 'expected a shape, found "circles,"'),
        ("at the top are two red circles on the left", "has two places"),
        ("", "word 1: expected a color, found the end"),
        ("a man riding a wave", 'expected a color, found "man"'),
    ],
)
def test_false_or_unreadable_sentences_and_why(sentence, problem):
    verdict = check(sentence, TWO_CIRCLES_AND_SQUARE)
    assert not verdict.true
    assert problem in " | ".join(verdict.problems)


@pytest.mark.parametrize(
    ("sentence", "problem"),
    [
        ("two red circles", "the large blue square is not named"),
        ("a large blue square", "the 2 small red circles is not named"),
        ("red circles and a blue square", '"red circles" does not name a number'),
    ],
)
def test_true_sentences_that_are_not_complete(sentence, problem):
    assert check(sentence, TWO_CIRCLES_AND_SQUARE) == Verdict(true=True, complete=False, problems=[problem])


def test_left_of_is_false_where_above_is_the_main_direction():
    steep = Scene((thing("small red circle", 0.4, 0.1), thing("small blue star", 0.6, 0.9)))
    assert right("a red circle above a blue star", steep)
    assert not check("a red circle left of a blue star", steep).true
    even = Scene((thing("small red circle", 0.2, 0.2), thing("small blue star", 0.8, 0.8)))
    assert right("a red circle above a blue star", even)
    assert right("a red circle left of a blue star", even)


KINDS = [COLORS, SHAPES, [f"{shape}s" for shape in SHAPES], SIZES, NUMBERS]
KINDS += [["top", "bottom"], ["left", "right"], ["above", "below"]]
SWAPS = {word: [other for other in kind if other != word] for kind in KINDS for word in kind}


@settings(max_examples=300)
@given(index=st.integers(0, 5000), which=st.integers(0, 4), at=st.integers(0, 100), to=st.integers(0, 100))
def test_one_changed_word_makes_a_sentence_false(index, which, at, to):
    """Number, color, shape, size, place or relation."""
    drawn = scene(index, split="test")
    words = describe(drawn)[which].split()
    spots = [i for i, word in enumerate(words) if word in SWAPS and words[i : i + 2] != ["a", "image"]]
    spot = spots[at % len(spots)]
    # "one" for "a" says the same; so does swapping two equal names, which one changed word cannot do.
    others = [other for other in SWAPS[words[spot]] if NUMBERS.get(other, 0) != NUMBERS.get(words[spot], -1)]
    words[spot] = others[to % len(others)]
    verdict = check(" ".join(words), drawn)
    assert not verdict.true, words
    assert verdict.problems


@settings(max_examples=300)
@given(
    st.lists(st.sampled_from([*COLORS, *SHAPES, *SIZES, *NUMBERS, *RELATIONS, *PLACES, "and", "is", "."]), max_size=12)
)
def test_every_string_of_words_gets_a_verdict(words):
    """And a true one names only what is drawn."""
    verdict = check(" ".join(words), TWO_CIRCLES_AND_SQUARE)
    assert verdict.true or verdict.problems
    if verdict.true:
        assert set(words) & set(COLORS) <= {"red", "blue"}
        assert "large" not in words or "blue" in words


def test_truth_does_not_depend_on_the_background_or_the_order_of_the_things():
    drawn = TWO_CIRCLES_AND_SQUARE
    other = replace(drawn, things=drawn.things[::-1], background=(1, 2, 3))
    for sentence in ("two red circles left of a blue square", "two red circles right of a blue square"):
        assert check(sentence, drawn).true == check(sentence, other).true


@pytest.mark.filterwarnings("ignore::DeprecationWarning:pycocotools")
def test_exported_scenes_are_a_coco_folder(tmp_path):
    COCO = pytest.importorskip("pycocotools.coco").COCO
    from PIL import Image

    export_coco(tmp_path, n_train=3, n_val=2, size=48, seed=4)
    captions = COCO(str(tmp_path / "annotations" / "captions_val2017.json"))
    instances = COCO(str(tmp_path / "annotations" / "instances_val2017.json"))
    assert len(captions.anns) == 10
    assert {c["name"] for c in instances.loadCats(instances.getCatIds())} == set(SHAPES)
    for index, image_id in enumerate(captions.getImgIds()):
        drawn = scene(index, 4, "val")
        image = captions.loadImgs(image_id)[0]
        assert np.array_equal(np.array(Image.open(tmp_path / "val2017" / image["file_name"])), draw(drawn, 48))
        assert [a["caption"] for a in captions.loadAnns(captions.getAnnIds(image_id))] == describe(drawn, seed=4)
        objects = instances.loadAnns(instances.getAnnIds(image_id))
        assert len(objects) == len(drawn.things)
        for annotation, t in zip(objects, drawn.things, strict=True):
            x, y, width, height = annotation["bbox"]
            assert abs(x + width / 2 - t.x * 48) < 0.5
            assert t.y * 48 - t.radius * 48 * 1.15 <= y <= y + height <= t.y * 48 + t.radius * 48 * 1.15
            assert instances.annToMask(annotation).sum() == pytest.approx(annotation["area"], rel=0.2)
    train = json.loads((tmp_path / "annotations" / "captions_train2017.json").read_text())
    assert not {i["id"] for i in train["images"]} & set(captions.imgs)
    assert len(list((tmp_path / "train2017").iterdir())) == 3
