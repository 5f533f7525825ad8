"""The HTML pages and PNG figures: what they hold, that no text breaks out, and that the pages work in a browser."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from showtell import figures, report
from showtell.errors import UserError
from showtell.figures import write_curve
from showtell.report import (
    Bars,
    Card,
    Curve,
    Gallery,
    Histogram,
    Interval,
    Table,
    write_figure,
    write_page,
)

NASTY = [
    '<script>alert("x")</script>',
    "\"><img src=x onerror=alert(1)> & 'quotes' &amp;",
    "</ul></section></body><!-- script -->",
    "@@title@@ @@script@@ \\1 \\g<0>",
    "امرأة تقف أمام العلم",
    "一只猫坐在沙发上 🙂 café",
]
VOID = {"meta", "link", "img", "input"}


class Page(HTMLParser):
    """Reads a page strictly: every tag is closed by its own end tag, and what matters is collected."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: Counter = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []  # of the elements a search looks at
        self.scripts: list[str] = []
        self.depth: int | None = None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag in VOID:
            return
        self.open.append(tag)
        if any(name == "data-text" for name, _ in attrs):
            self.depth = len(self.open)
            self.texts.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if self.depth is not None and len(self.open) < self.depth:
            self.depth = None

    def handle_data(self, data):
        if self.depth is not None:
            self.texts[-1] += data
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)

    def values(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]


def drawing(color=(200, 30, 40), size=64) -> np.ndarray:
    pixels = np.full((size, size, 3), 245, np.uint8)
    pixels[size // 4 : size // 2, size // 4 : size // 2] = color
    return pixels


def write(tmp_path, *sections, **options) -> str:
    path = write_page(tmp_path / "page.html", options.pop("title", "A page"), sections=sections, **options)
    return path.read_text("utf-8")


def every_section() -> list:
    card = Card(
        drawing(), "a.png", "A red square.", ["a red square"], ["a", "red", "square", "."], [0.9] * 4, 0.5, True
    )
    return [
        Gallery("Images", [card]),
        Table("Scores", ["metric", "value"], [["BLEU-4", 16.6]]),
        Curve("Loss", {"train": [(1, 3.0), (2, 2.0)], "validation": [(1, 3.2), (2, 2.5)]}, "epoch", "loss"),
        Histogram("Lengths", [3, 4, 4, 5], "words"),
        Bars("Words", {"a": 10, "cat": 3}),
    ]


# The page


def test_page_is_well_formed_and_asks_for_nothing(tmp_path):
    text = write(
        tmp_path, *every_section(), summary="What it is.", tiles=[("right", "96 %", "192 of 200"), ("words", 52)]
    )
    page = Page(text)
    addresses = page.values("src") + page.values("href")
    assert addresses
    assert all(address.startswith("data:") for address in addresses)
    assert "url(" not in text
    assert "@import" not in text
    assert "http" not in re.sub(r"http-equiv", "", text)
    assert page.tags["section"] == 5
    assert page.tags["svg"] == 3
    assert page.tags["h1"] == 1
    assert "@@" not in text


def test_only_the_pages_own_script_may_run(tmp_path):
    page = Page(write(tmp_path, *every_section()))
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [value for value in page.values("content") if "default-src" in value]
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


@pytest.mark.parametrize("text", NASTY)
def test_any_text_comes_out_as_text(tmp_path, text):
    words = text.split()
    card = Card(drawing(), text, text, [text], notes=[text], alternatives=[text], ok=False, score=1.0)
    tinted = Card(None, text, text, [text], words, [0.5] * len(words))
    sections = [
        Gallery(text, [card, tinted], text, score_name=text),
        Table(text, [text, text], [[text, text]], text),
        Curve(text, {text: [(0, 1), (1, 2)]}, text, text, text),
        Histogram(text, {text: [1, 2]}, text, text, text),
        Bars(text, {text: 1}, note=text),
    ]
    written = write(tmp_path, *sections, title=text, summary=text, tiles=[(text, text, text)])
    page, plain = Page(written), Page(write(tmp_path, *every_section()))
    assert page.tags["script"] == plain.tags["script"] == 1
    assert page.scripts == plain.scripts
    assert page.tags["img"] == 1
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert [" ".join(found.split()) for found in page.texts] == [" ".join(text.split())] * 8
    assert page.values("alt") == [text]


def test_characters_that_no_page_can_hold_are_replaced(tmp_path):
    text = write(tmp_path, Gallery("g", [Card(None, "caf\udce9.jpg", "a\x00b\x1bc")]))
    assert Page(text).texts == ["caf?.jpg", "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c"]


def test_every_caption_finds_its_own_direction(tmp_path):
    page = Page(write(tmp_path, Gallery("g", [Card(None, "1", NASTY[4], [NASTY[4], "a cat"])])))
    assert (
        page.values("dir").count("auto") == 1 + 1 + 4
    )  # the page's and the section's heading; name and three captions


def test_a_page_without_anything_is_a_page(tmp_path):
    page = Page(
        write(tmp_path, Gallery("none", []), Table("none", ["a"], []), Curve("none", {}), Histogram("none", []))
    )
    assert page.tags["li"] == 0
    assert page.tags["section"] == 4


def test_a_broken_image_leaves_no_half_page(tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"broken\.jpg"):
        write_page(tmp_path / "out" / "page.html", "t", sections=[Gallery("g", [Card(broken, "b", "a cat")])])
    assert not list(tmp_path.glob("out/*"))


# Cards


@pytest.mark.parametrize(
    ("predicted", "words", "shown"),
    [
        ("A red circle.", ["a", "red", "circle", ".", "<end>"], ["A", "red", "circle", "."]),
        ("A cat's tail", ["a", "cat", "'s", "tail"], ["A", "cat", "'s", "tail"]),
        ("A dog", ["<start>", "a", "<unk>", "dog", "<end>"], ["A", "dog"]),
        ("A <unk> dog", ["a", "<unk>", "dog"], ["A", "<unk>", "dog"]),
        (
            'He said "no"',
            ["he", "said", "``", "no", "''", "<end>"],
            ["he", "said", "``", "no", "''"],
        ),  # cannot be found
        ("", ["<end>"], []),
    ],
)
def test_words_keep_the_spelling_of_the_clean_caption(predicted, words, shown):
    spelled = list(report._spell(predicted, words, [i / 10 for i in range(len(words))]))
    assert [word for _, word, _ in spelled] == shown
    if "``" not in words:
        assert "".join(gap + word for gap, word, _ in spelled).split() == [w for w in predicted.split() if shown]
        first = words.index(shown[0].lower()) if shown else None
        assert not shown or spelled[0][2] == first / 10


@given(
    st.lists(st.sampled_from(["a", "cat", "İstanbul", "ß", ".", ",", "'s", "<unk>", "猫", "<end>"]), max_size=12),
    st.data(),
)
def test_no_tinted_word_is_lost(words, data):
    predicted = data.draw(st.sampled_from([" ".join(words), "".join(words), " ".join(words).capitalize(), "other"]))
    spelled = list(report._spell(predicted, words, [0.5] * len(words)))
    text = "".join(gap + word for gap, word, _ in spelled)
    assert text.strip() in (predicted.strip(), " ".join(word for word in words if word != "<end>"))


def test_word_probabilities_become_tints():
    found = Card(None, "1", "A dog", words=["a", "dog"], word_probs=[0.25, 1.0]).html()
    assert re.findall(r"--p:([\d.]+)", found) == ["0.25", "1.00"]
    assert re.findall(r'data-p="(\d+)"', found) == ["25", "100"]


def test_arrays_do_as_probabilities_and_numbers():
    found = Card(None, "1", "A dog", words=["a", "dog"], word_probs=np.array([0.25, 1], np.float32)).html()
    assert re.findall(r"--p:([\d.]+)", found) == ["0.25", "1.00"]
    text = Table("t", ["a", "b", "c"], [["x", np.float32(0.1), np.int64(1234)]]).html()
    assert ">0.1</td>" in text
    assert ">1,234</td>" in text


def test_words_and_probabilities_must_match():
    with pytest.raises(ValueError, match="card 1: 2 words have 1 word_probs"):
        Card(None, "1", "a dog", words=["a", "dog"], word_probs=[0.5])


def test_badge_score_and_reasons():
    wrong = Card(None, "1", "a dog", score=0.1234, ok=False, notes=["there is no dog"]).html(score_name="CIDEr-D")
    assert 'data-verdict="wrong"' in wrong
    assert ">wrong</span>" in wrong
    assert "there is no dog" in wrong
    assert 'CIDEr-D <span class="score">0.12</span>' in wrong
    assert 'data-score="0.1234"' in wrong
    unknown = Card(None, "1", "a dog", score=float("nan")).html()
    assert "badge" not in unknown
    assert "data-score" not in unknown


def image_in(markup: str) -> tuple[str, Image.Image]:
    kind, data = re.search(r'src="data:image/(\w+);base64,([^"]+)"', markup).groups()
    return kind, Image.open(io.BytesIO(base64.b64decode(data)))


def test_a_image_is_the_same_whatever_holds_it(tmp_path):
    pixels = drawing()
    Image.fromarray(pixels).save(tmp_path / "p.png")
    sources = [pixels, Image.fromarray(pixels), torch.from_numpy(pixels).permute(2, 0, 1), tmp_path / "p.png"]
    images = [image_in(Card(source, "p", "c").html()) for source in sources]
    assert all(kind == "png" for kind, _ in images)  # a drawing is smaller so, and exact
    for _, image in images:
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), pixels)


def test_photographs_are_small_jpegs():
    from skimage import data

    photograph = data.coffee()  # 400 x 600
    markup = Card(photograph, "coffee", "a cup").html(thumbnail=160)
    kind, image = image_in(markup)
    assert kind == "jpeg"
    assert image.size == (160, 107)
    assert len(markup) < 16_000
    error = np.asarray(image, float).mean((0, 1)) - photograph.mean((0, 1))
    assert abs(error).max() < 2
    assert max(image_in(Card(photograph, "coffee", "a cup").html(thumbnail=80))[1].size) == 80
    assert image_in(Card(drawing(size=64), "d", "c").html(thumbnail=160))[1].size == (64, 64)  # never enlarged


def test_controls_appear_as_the_cards_allow():
    plain = Gallery("g", [Card(None, "1", "a")]).html()
    assert 'type="search"' in plain
    assert "data-key" not in plain
    assert "ramp" not in plain
    judged = Gallery("g", [Card(None, "1", "a", ok=True), Card(None, "2", "b", ok=False), Card(None, "3", "c")]).html()
    assert re.findall(r'data-key="show" data-value="\w+" aria-pressed="(\w+)">([^<]+)<', judged) == [
        ("true", "all 3"), ("false", "right 1"), ("false", "wrong 1"),
    ]  # fmt: skip
    assert 'data-key="sort"' in Gallery("g", [Card(None, "1", "a", score=0.0)]).html()


# Tables


def test_table_cells():
    rows = [["BLEU-4", Interval(16.64, 15.91, 17.42), 1234, 0.5], ["METEOR", None, None, None]]
    text = Table("t", ["metric", "ours", "n", "x"], rows, digits=2).html()
    assert '16.6 <span class="interval">15.9 to 17.4</span>' in text
    assert ">1,234</td>" in text
    assert ">0.50</td>" in text
    assert text.count(">\N{EN DASH}</td>") == 3
    assert re.findall(r'<th scope="col"( class="number")?>', text) == ["", *[' class="number"'] * 3]


@pytest.mark.parametrize(
    ("value", "number"), [("+2.8", True), ("< 0.001", True), ("3 %", True), ("a dog", False), ("", False)]
)
def test_which_columns_are_numbers(value, number):
    assert ('<td dir="auto" class="number">' in Table("t", ["a", "b"], [["x", value]]).html()) is number


def test_a_ragged_table_is_refused():
    with pytest.raises(ValueError, match="table t: a row has 1 cells for 2 columns"):
        Table("t", ["a", "b"], [["x"]]).html()


# Charts

NUMBERS = st.floats(-1e12, 1e12, allow_subnormal=False) | st.integers(-50, 50) | st.sampled_from([math.nan, math.inf])


def assert_inside(marks, width, height):
    for mark in marks:
        for x, y in mark.xy:
            assert -0.1 <= x <= width + 0.1, mark
            assert -0.1 <= y <= height + 0.1, mark


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=30), st.booleans())
def test_any_curve_fits_its_chart(points, log_y):
    curve = Curve("c", {"a": points, "b": points[:1]}, "x", "y", log_y=log_y)
    marks = curve.marks(460, 270)
    assert_inside(marks, 460, 270)
    drawn = curve.points()["a"] + curve.points()["b"]
    ticks = [mark.text for mark in marks if mark.kind == "text" and mark.anchor == "end"]
    assert len([mark for mark in marks if mark.kind == "dot"]) == len(drawn)
    assert (2 <= len(ticks) <= 8) if drawn else ticks == []


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.floats(-1e9, 1e9, allow_subnormal=False) | st.integers(-50, 90) | st.just(0.3), min_size=1, max_size=50)
)
def test_any_histogram_counts_everything_once(values):
    marks = Histogram("h", values).marks(460, 270)
    assert_inside(marks, 460, 270)
    counts = [int(mark.text.rsplit(": ")[-1]) for mark in marks if mark.kind == "box"]
    assert sum(counts) == len(values)
    assert len(counts) <= 40


def test_histogram_of_lengths():
    marks = Histogram("h", [4, 4, 5, 9]).marks(460, 270)
    assert [mark.text for mark in marks if mark.kind == "box"] == ["4: 2", "5: 1", "9: 1"]
    counted = Histogram("h", {4: 2, 5: 1, 9: 1}).marks(460, 270)
    assert counted == marks
    shares = Histogram("h", {"true": [4, 4, 5, 9], "predicted": {4: 7}}).marks(460, 270)
    assert [mark.text for mark in shares if mark.kind == "box"] == [
        "true, 4: 50 %", "true, 5: 25 %", "true, 9: 25 %", "predicted, 4: 100 %",
    ]  # fmt: skip
    by_tenths = Histogram("h", [0.0, 0.3, 0.35, 3.0]).marks(460, 270)
    assert [mark.text for mark in by_tenths if mark.kind == "box"] == ["0 to 0.1: 1", "0.3 to 0.4: 2", "3 to 3.1: 1"]


def test_curve_says_its_values_and_leaves_out_what_is_not_finite():
    curve = Curve("Loss", {"train": [(1, 3.5), (2, math.nan), (3, 1.25)], "none": []}, "epoch", "loss")
    marks = curve.marks(460, 270)
    assert [m.text for m in marks if m.kind == "dot"] == ["train: loss 3.5, epoch 1", "train: loss 1.25, epoch 3"]
    assert curve.alt() == "train from 3.5 to 1.25"
    line = next(m for m in marks if m.kind == "line" and m.tone == "s0" and len({y for _, y in m.xy}) > 1)
    assert line.xy[0][1] < line.xy[1][1]  # a falling loss falls
    assert 'aria-label="Loss: train from 3.5 to 1.25"' in curve.html()


def test_long_curves_are_thinned_and_keep_their_end():
    marks = Curve("c", {"train": [(i, 1 / (i + 1)) for i in range(30_000)]}, "step", "loss").marks(460, 270)
    lines = [mark for mark in marks if mark.kind == "line" and mark.tone == "s0"]
    dots = [mark for mark in marks if mark.kind == "dot"]
    assert 500 < max(len(line.xy) for line in lines) <= 1001
    assert len(dots) <= 41
    assert "step 29,999" in dots[-1].text


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 3, [0, 1, 2, 3]), (0.2, 2.9, [0, 1, 2, 3]), (10, 52, [10, 20, 30, 40, 50, 60]), (0, 0.3, [0, 0.1, 0.2, 0.3])],
)
def test_axes_have_round_numbers(low, high, expected):
    assert figures._ticks(low, high, outward=True) == pytest.approx(expected)


def test_logarithmic_axes():
    assert figures._log_ticks(12, 9000) == pytest.approx([10, 100, 1000, 10000])
    assert figures._log_ticks(3, 40) == pytest.approx([2, 5, 10, 20, 50])
    assert len(figures._log_ticks(1e-30, 1e30)) <= 8


def test_whole_axes_have_whole_numbers():
    assert figures._ticks(1, 3, whole=True) == [1, 2, 3]


def test_bars_come_largest_first_and_few():
    bars = Bars("b", {"rare": 1, "a": 90, "dog": 30}, limit=2)
    assert [mark.text for mark in bars.marks(460, bars.height) if mark.kind == "box"] == ["a: 90", "dog: 30"]
    assert_inside(bars.marks(460, bars.height), 460, bars.height)
    assert bars.alt() == "a 90, dog 30"


# PNGs


def has_color(image: Image.Image, color: str) -> bool:
    rgb = tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))
    return bool((np.asarray(image.convert("RGB")) == rgb).all(-1).any())


def test_figure_shows_images_and_marks_the_wrong_ones(tmp_path):
    cards = [Card(drawing((10, 200, 90)), str(i), "a green square", ["a green square"], ok=True) for i in range(5)]
    curve = Curve("Loss", {"train": [(1, 3.0), (2, 1.0)]}, "epoch", "loss")
    right = Image.open(write_figure(tmp_path / "a" / "right.png", cards, curve, "A title"))
    assert right.format == "PNG"
    assert has_color(right, "#0ac85a")
    assert has_color(right, figures.TONES["s0"])
    assert not has_color(right, figures.TONES["wrong"])
    wrong_card = Card(drawing(), "x", "a blue square", ["a red square"], ok=False, notes=["it is red"])
    wrong = Image.open(write_figure(tmp_path / "wrong.png", [*cards, wrong_card]))
    assert has_color(wrong, figures.TONES["wrong"])
    assert wrong.size[0] == right.size[0]
    assert wrong.size[1] < right.size[1]


def test_figure_of_odd_shapes_and_texts(tmp_path):
    wide, tall = np.zeros((3, 300, 3), np.uint8), np.zeros((300, 2, 3), np.uint8)
    cards = [Card(wide, "w", ""), Card(tall, "t", "x" * 5000, NASTY), Card(None, "n", "a cat", [NASTY[5]])]
    assert Image.open(write_figure(tmp_path / "f.png", cards, columns=2)).size[1] < 1600
    assert Image.open(write_figure(tmp_path / "none.png", [])).format == "PNG"


@given(st.text(alphabet="ab WMil.", max_size=300))
@settings(deadline=None, max_examples=50)
def test_wrapped_lines_fit(text):
    lines = report._wrapped(text, 120, 14, max_lines=100)
    font = report.ImageFont.load_default(14 * figures.SCALE)
    assert all(font.getlength(line) <= 120 * figures.SCALE for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_long_texts_are_clipped_and_accents_left_out():
    lines = report._wrapped("café – " * 100, 120, 14)
    assert len(lines) == 4
    assert lines[0].startswith("cafe - cafe")
    assert lines[-1].endswith("...")
    assert report.ImageFont.load_default(14 * figures.SCALE).getlength(lines[-1]) <= 120 * figures.SCALE


def test_curve_png(tmp_path):
    series = {"train": [(1, 3.0), (2, 1.0)], "validation": [(1, 3.1), (2, 2.0)]}
    one = Image.open(write_curve(tmp_path / "one.png", series, "Loss"))
    assert has_color(one, figures.TONES["s0"])
    assert has_color(one, figures.TONES["s1"])
    two = Image.open(
        write_curve(tmp_path / "two.png", [Curve("Loss", series), Curve("Perplexity", series, log_y=True)])
    )
    assert two.size == (2 * one.size[0], one.size[1])
    assert Image.open(write_curve(tmp_path / "empty.png", {"train": []})).size == one.size


# In a browser


@pytest.fixture(scope="module")
def browser(chromium):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Opens sections as a page from a file; at the end, no error was logged and nothing but the file was asked for."""
    problems, requests, pages = [], [], []

    def opened(*sections, **context):
        path = write_page(tmp_path / "page.html", "A page", "What it shows.", [("cards", 3)], sections)
        page = browser.new_page(**context)
        pages.append(page)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        return page

    yield opened
    for page in pages:
        page.close()
    assert problems == []
    assert requests
    assert all(url.startswith("data:") or url == (tmp_path / "page.html").as_uri() for url in requests)


def names(page) -> list[str]:
    """The titles of the cards to be seen, in order."""
    return page.locator(".card:visible .name").all_inner_texts()


def some_cards() -> list[Card]:
    return [
        Card(
            drawing(),
            "one",
            "A red square.",
            ["a crimson box"],
            ["a", "red", "square", "."],
            [0.9, 0.4, 1, 1],
            0.5,
            True,
        ),
        Card(drawing(), "two", "A Café at night", ["a street"], score=0.9, ok=False, notes=["there is no café"]),
        Card(drawing(), "three", NASTY[0], NASTY, score=0.1, ok=True),
        Card(None, "four", "no score, no verdict"),
    ]


def test_search_in_a_browser(open_page):
    page = open_page(Gallery("Images", some_cards()), *every_section()[1:])
    search, count = page.get_by_role("searchbox"), page.locator(".count")
    assert count.inner_text() == "4 of 4 shown"
    for query, expected in [
        ("CRIMSON", ["one"]), ("a cafe at", ["two"]), ("there is", ["two"]),
        ("square red", ["one"]), ("<script>", ["three"]),
        ("العلم", ["three"]), ("four", ["four"]), ("zebra", []), ("", ["one", "two", "three", "four"]),
    ]:  # fmt: skip
        search.fill(query)
        assert names(page) == expected, query
        assert count.inner_text() == f"{len(expected)} of 4 shown"
        assert page.get_by_text("No card matches.").is_visible() == (not expected)


def test_sort_and_filter_in_a_browser_by_keyboard(open_page):
    page = open_page(Gallery("Images", some_cards()))

    def press(name):
        button = page.get_by_role("button", name=name)
        button.focus()
        page.keyboard.press("Enter")
        assert button.get_attribute("aria-pressed") == "true"

    press("best first")
    assert names(page) == ["two", "one", "three", "four"]
    press("worst first")
    assert names(page) == ["three", "one", "two", "four"]
    press("right 2")
    assert names(page) == ["three", "one"]
    page.get_by_role("searchbox").fill("square")
    assert names(page) == ["one"]
    press("wrong 1")
    assert names(page) == []
    page.get_by_role("searchbox").fill("")
    assert names(page) == ["two"]
    press("all 4")
    press("as listed")
    assert names(page) == ["one", "two", "three", "four"]
    assert page.get_by_role("button", name="wrong 1").get_attribute("aria-pressed") == "false"


def test_probabilities_can_be_read_as_numbers(open_page):
    page = open_page(Gallery("Images", some_cards()))
    shown = "el => getComputedStyle(el, '::after').content"
    red = page.locator(".w", has_text="red")
    assert red.evaluate(shown) == "none"
    page.get_by_label("show numbers").check()
    assert '"40"' in red.evaluate(shown) or "attr" in red.evaluate(shown)
    strength = "el => getComputedStyle(el).backgroundColor"
    assert red.evaluate(strength) != page.locator(".w", has_text="square").evaluate(strength)


def test_two_galleries_do_not_disturb_each_other(open_page):
    page = open_page(Gallery("First", some_cards()), Gallery("Second", some_cards()))
    page.get_by_label("Search in Second").fill("crimson")
    assert names(page) == ["one", "two", "three", "four", "one"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_and_nothing_sticks_out(open_page, scheme):
    page = open_page(
        Gallery("P", some_cards()), *every_section()[1:], color_scheme=scheme, viewport={"width": 400, "height": 800}
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    colors = page.evaluate(
        """() => [".summary", ".predicted", ".badge.right", ".badge.wrong", ".name", ".true li", ".notes li", "td",
                  "button[aria-pressed=true]", "button[aria-pressed=false]"].map((selector) => {
            const el = document.querySelector(selector);
            let back = el;
            while (getComputedStyle(back).backgroundColor === "rgba(0, 0, 0, 0)") back = back.parentElement;
            return [selector, getComputedStyle(el).color, getComputedStyle(back).backgroundColor];
        })"""
    )
    for selector, ink, paper in colors:
        assert contrast(ink, paper) >= 4.5, selector  # WCAG AA


def contrast(*colors: str) -> float:
    luminances = []
    for color in colors:
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
            for c in (int(v) / 255 for v in re.findall(r"\d+", color)[:3])
        ]
        luminances.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(luminances) + 0.05) / (min(luminances) + 0.05)


def test_a_thousand_cards_stay_usable(open_page):
    cards = [
        Card(drawing((i % 256, 90, 90)), f"card {i}", f"square {i}", ["a square"] * 5, score=i) for i in range(1000)
    ]
    page = open_page(Gallery("Many", cards))
    took = page.evaluate(
        """() => {
            const box = document.querySelector("input[type=search]"), start = performance.now();
            for (const query of ["s", "square 99", "square 999", ""]) {
                box.value = query;
                box.dispatchEvent(new Event("input"));
                document.body.offsetHeight;
            }
            document.querySelector("[data-value=best]").click();
            document.body.offsetHeight;
            return performance.now() - start;
        }"""
    )
    assert names(page)[0] == "card 999"
    assert took < 3000  # five whole layouts, on a slow machine that is busy
