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


def test_two_systems_or_images_without_a_page_are_refused(files, capsys):
    words = ["score", str(files / "true.json"), str(files / "mine.json")]
    assert main([*words, str(files / "true.json"), "--html", "page.html"]) == 2
    assert "name one file of candidates" in capsys.readouterr().err
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
