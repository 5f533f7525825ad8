"""The report of a system's scores, and the image file of an id."""

from __future__ import annotations

import json
import re
from html import escape

import numpy as np
import pytest
from PIL import Image

from showtell.__main__ import main
from showtell.results import image_finder


@pytest.fixture
def files(tmp_path):
    """COCO annotations of three images, a system's results, and the images."""
    folder = tmp_path / "images"
    folder.mkdir()
    images = [{"id": i, "file_name": f"COCO_val2014_{i:012d}.png"} for i in (7, 12, 139)]
    for image in images:
        Image.fromarray(np.full((20, 20, 3), image["id"], np.uint8)).save(folder / image["file_name"])
    texts = {7: "a dog runs fast", 12: "a red bus on a street", 139: "two cats sleep <b>here</b>"}
    annotations = [{"id": 10 * i + k, "image_id": i, "caption": t} for i, t in texts.items() for k in range(2)]
    (tmp_path / "true.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    rows = [{"image_id": i, "caption": "a dog runs"} for i in texts]
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    return tmp_path


def test_score_writes_a_page_with_images_and_captions(files, capsys):
    page = files / "page.html"
    words = ["score", str(files / "true.json"), str(files / "mine.json"), "--no-java", "--html", str(page)]
    assert main([*words, "--images", str(files / "images")]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.count("data:image/") == 2  # of three images, one among the best and one among the worst
    assert "a dog runs fast" in text
    assert "<b>here" not in text
    table = capsys.readouterr().out
    assert "CIDEr-D" in table
    health = [re.split(" {2,}", line) for line in table.split("\n\n")[2].splitlines()]
    assert len(health) >= 7
    for label, value in health:  # the words of the terminal
        row = rf'<th scope="row" dir="auto">{escape(label)}</th><td dir="auto"[^>]*>{value}</td>'
        assert re.search(row, text), label


def test_systems_are_compared_on_one_page(files, capsys):
    captions = {"good": ["a dog runs", "a red bus", "two cats"], "bad": ["a dog runs", "a fork", "<i>a</i> fork"]}
    for name, texts in captions.items():
        rows = [{"image_id": i, "caption": text} for i, text in zip((7, 12, 139), texts, strict=True)]
        (files / f"{name}.json").write_text(json.dumps(rows))
    systems = [str(files / f"{name}.json") for name in ("bad", "good", "mine")]
    words = ["score", str(files / "true.json"), *systems, "--no-java", "--images", str(files / "images"), "--html"]

    def cards(*command: str) -> tuple[str, list[tuple]]:
        assert main([*command]) == 0
        text = (files / "page.html").read_text(encoding="utf-8")
        found = []
        for card in re.findall(r'<li class="card.*?</li>\n(?=<li class="card|</ul>)', text, re.S):
            shown = re.findall(
                r'<p class="small"><span dir="auto">(.*?)</span> <b>(.*?)</b></p>\s*<p[^>]*>(.*?)</p>', card
            )
            found.append(
                (re.search(r"data-text>(\w+)</span>", card)[1], float(re.search('score="(.*?)"', card)[1]), shown)
            )
        return text, found

    page = str(files / "page.html")
    text, three = cards(*words, page)
    assert text.count("data:image/") == 3
    assert {name for name, *_ in three} == {"7", "12", "139"}
    for _, difference, shown in three:
        assert [name for name, *_ in shown] == ["bad.json", "good.json", "mine.json"]
        values = [float(value) for _, value, _ in shown]
        assert difference == pytest.approx(max(values) - min(values), abs=0.011)
    assert "&lt;i&gt;a&lt;/i&gt; fork" in text
    capsys.readouterr()
    text, two = cards(*words[:4], *words[5:], page)  # bad and good
    sizes = [abs(difference) for _, difference, _ in two]
    assert sizes == sorted(sizes, reverse=True)
    for name, difference, shown in two:
        (_, bad, _), (_, good, _) = shown
        assert difference == pytest.approx(float(good) - float(bad), abs=0.011), name
    assert max(difference for _, difference, _ in two) > 1
    assert ">highest difference first</button>" in text
    for line in capsys.readouterr().out.splitlines():  # the numbers of the terminal
        if match := re.fullmatch(r"(BLEU-1|CIDEr-D) +(-?[\d.]+) \[.*?\] +(-?[\d.]+) \[.*", line):
            row = rf'<th scope="row" dir="auto">{match[1]}</th>' + "".join(
                rf'<td dir="auto" class="number">{value} <span' + r".*?</td>" for value in match.groups()[1:]
            )
            assert re.search(row, text), line
    assert "Differences from bad.json" in text


def test_images_without_a_page_are_refused(files, capsys):
    words = ["score", str(files / "true.json"), str(files / "mine.json")]
    assert main([*words, "--images", str(files / "images")]) == 2
    assert "add --html FILE" in capsys.readouterr().err
    assert main([*words, "--html", "page.html", "--images", str(files / "none")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_images_are_found_by_annotations_name_and_number(files):
    find = image_finder(files / "images", files / "true.json")
    assert find("139").name == find("COCO_val2014_000000000139.png").name == "COCO_val2014_000000000139.png"
    assert find("8") is None
    by_number = image_finder(files / "images", "true.csv")
    assert by_number("12").name == "COCO_val2014_000000000012.png"
